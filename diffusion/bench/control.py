"""How well a ControlNet follows the outlines that it is asked for, on scenes of the embedded world that it never saw.

A ControlNet is trained on `scenes` pictures of known sprites with captions and their outlines: edges of the blurred
picture, since those of the picture itself fill so much of a small sprite that one of any other picture is near. Then
held-out scenes are drawn from their caption and their outlines, and what is drawn is judged by its own: precision,
recall and F1 against those that were asked for, where one counts as found if there is one within a pixel (`exact`: F1
without that pixel). Beside it stand the base, which is told the caption alone, and the scene itself through the
autoencoder, which no drawing can be expected to beat. `clip` is pocket-clip's cosine between picture and caption:
following the outlines must not cost the prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from graft.diffusion.base import DiffusionBase, load_base
from graft.diffusion.conditions import picture_of
from graft.diffusion.features import Clip
from graft.diffusion.folder import CONDITIONS
from graft.diffusion.measures import edge_scores
from graft.diffusion.previews import PreviewConfig, draw, grid, save_png
from graft.studio.adapter import Adapter
from graft.studio.disk import write_atomic
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.scenes import caption, render, sample_scene

LIMITS = {"f1": 0.7, "f1 over base": 3.0, "loss of clip": 0.05}
"""What is promised: F1, how many times the base's it is, and the share of the base's prompt alignment that it costs."""
BLUR = 2.5
"""Standard deviation in pixels of the Gaussian under the outlines."""
THRESHOLDS = (40, 80)
"""Of Canny's gradients, lower than for pictures that are not blurred."""


def scenes(count: int, seed: int) -> list[tuple[np.ndarray, str]]:
    """Pictures (64, 64, 3) uint8 of known sprites, with captions; a seed names them."""
    rng = np.random.default_rng([seed, 20])
    drawn = [sample_scene(rng, Atlas.load().known) for _ in range(count)]
    return [(render(scene), caption(scene, rng)) for scene in drawn]


def followed(count: int) -> list[tuple[np.ndarray, str]]:
    """Scenes that are held out. A sprite as bright as what is behind it has no outlines, and is left out."""
    drawn = scenes(2 * count, seed=1)
    return [(pixels, text) for pixels, text in drawn if outlines(pixels).any()][:count]


def outlines(picture: np.ndarray) -> np.ndarray:
    """Canny's edges of the grey picture after blur, 0 or 255: (h, w, 3) uint8 -> (h, w) uint8."""
    import cv2

    grey = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.Canny(cv2.GaussianBlur(grey, (0, 0), BLUR), *THRESHOLDS), np.uint8)


def write_scenes(folder: Path, count: int, seed: int = 0) -> Path:
    """Writes scenes as a data folder, with their outlines as finished maps."""
    (folder / CONDITIONS).mkdir(parents=True, exist_ok=True)
    lines = []
    for k, (pixels, text) in enumerate(scenes(count, seed)):
        Image.fromarray(pixels).save(folder / f"{k:05d}.png")
        Image.fromarray(outlines(pixels)).save(folder / CONDITIONS / f"{k:05d}.png")
        lines.append(json.dumps({"file_name": f"{k:05d}.png", "text": text}))
    write_atomic(folder / "metadata.jsonl", ("\n".join(lines) + "\n").encode())
    return folder


def control(
    out: Path | None = None,
    count: int = 2000,
    steps: int = 4000,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    empty_prompts: float = 0.3,
    levels: str = "cubic",
    held_out: int = 64,
    guidance: float = 3.0,
    base: str = "pocket-sd",
    init: str = "",
) -> dict[str, Any]:
    """Trains, unless that was done before, measures and returns the table.

    Args:
        out: folder for pictures, the run and `control.json`; None takes `runs/control`.
        count: scenes to train on.
        steps: of the training.
        batch_size: of the training.
        learning_rate: of the training; it ends at zero by a cosine.
        empty_prompts: share of rows that are trained without their caption.
        levels: how noise levels are drawn.
        held_out: scenes to measure on.
        guidance: of the pictures that are measured.
        base: a base that knows the embedded world.
        init: folder of a ControlNet of diffusers to go on from.
    """
    from graft.studio.runs.folder import open_run
    from graft.studio.training import resume, train

    out = Path(out or "runs/control")
    where = out / "run"
    if (where / "result").exists():
        run = open_run(where)
    elif where.exists():
        run = resume(where)
    else:
        run = train(
            {
                "base": base,
                "method": {"name": "controlnet", "condition": "map", "empty_prompts": empty_prompts,
                           "levels": levels} | ({"init": init} if init else {}),
                "data": {"path": str(write_scenes(out / "scenes", count))},
                "train": {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate,
                          "schedule": "cosine", "warmup_steps": min(100, steps // 10)},
            },
            run_dir=where,
        )  # fmt: skip
    judged = judge(load_base(base, "cpu"), run.adapter(), followed(held_out), guidance, out / "grid.png")
    minutes = run.metrics()[-1]["seconds"] / 60
    result = {"steps": run.state["step"], "minutes": minutes, "measures": judged, "checks": checks(judged)}
    write_atomic(out / "control.json", (json.dumps(result, indent=1) + "\n").encode())
    return result | {"table": table(result)}


def judge(
    base: DiffusionBase, adapter: Adapter, held_out: list[tuple[np.ndarray, str]], guidance: float, sheet: Path | None
) -> dict[str, dict[str, float]]:
    """Draws held-out scenes and measures them.

    Args:
        base: the adapter's own.
        adapter: a ControlNet on outlines.
        held_out: pictures and captions.
        guidance: classifier-free guidance scale.
        sheet: gets the first pictures side by side.
    """
    pictures, prompts = [pixels for pixels, _ in held_out], [text for _, text in held_out]
    asked = [outlines(pixels) for pixels in pictures]
    maps = torch.from_numpy(np.stack(asked))[:, None]
    config = PreviewConfig(guidance=guidance, batch_size=16)
    plain = [row[0] for row in draw(base, prompts, [0], config)]
    with adapter.attached(base) as handle:
        handle.follow(maps)
        led = [row[0] for row in draw(base, prompts, [0], config)]
    clip = Clip("pocket-clip")
    drawn = {"base": plain, "control": led, "the scene, autoencoded": autoencoded(base, pictures)}
    if sheet is not None:
        shown = {"condition": [picture_of(each) for each in maps], "base": plain, "control": led}
        save_png(sheet, grid({name: [[p] for p in row[:6]] for name, row in shown.items()}, prompts[:6], [0]))
    return {name: _measures(clip, row, asked, prompts) for name, row in drawn.items()}


def _measures(clip: Clip, drawn: list[Image.Image], asked: list[np.ndarray], prompts: list[str]) -> dict[str, float]:
    scores = [edge_scores(outlines(np.asarray(p)), edges) for p, edges in zip(drawn, asked, strict=True)]
    told = float((clip.images(drawn) * clip.texts(prompts)).sum(-1).mean())
    exact = [edge_scores(outlines(np.asarray(p)), edges, 0)["f1"] for p, edges in zip(drawn, asked, strict=True)]
    return {**{name: mean(score[name] for score in scores) for name in scores[0]}, "exact": mean(exact), "clip": told}


@torch.no_grad()
def autoencoded(base: DiffusionBase, pictures: list[np.ndarray]) -> list[Image.Image]:
    """Pictures after encoding and decoding."""
    vae = base.pipe.vae
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    decoded: Tensor = vae.decode(base.posterior(pixels)["mean"] / vae.config.scaling_factor).sample
    found: list[Image.Image] = base.pipe.image_processor.postprocess(decoded)
    return found


def checks(judged: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """The promises: {name: {"value", "limit", "ok"}}."""
    base, control = judged["base"], judged["control"]
    values = {
        "f1": control["f1"],
        "f1 over base": control["f1"] / max(base["f1"], 1e-9),
        "loss of clip": 1 - control["clip"] / base["clip"],
    }
    kept = {name: value <= LIMITS[name] if name == "loss of clip" else value >= LIMITS[name]
            for name, value in values.items()}  # fmt: skip
    return {name: {"value": value, "limit": LIMITS[name], "ok": kept[name]} for name, value in values.items()}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{result['steps']} steps, {result['minutes']:.1f} minutes", ""]
    columns = ("precision", "recall", "f1", "exact", "clip")
    lines.append(f"{'':24}" + " ".join(f"{name:>9}" for name in columns))
    for name, row in result["measures"].items():
        lines.append(f"{name:24}" + " ".join(f"{row[key]:9.3f}" for key in columns))
    lines.append("")
    for name, check in result["checks"].items():
        verdict = "ok" if check["ok"] else "MISSED"
        lines.append(f"{name:24} {check['value']:7.3f}  limit {check['limit']:.2f}  {verdict}")
    return "\n".join(lines)
