"""Measure the embedded models with fixed seeds and write `docs/pocket_models.md` with its pictures.

    graft pocket report [--out docs] [--seeds 4]

Every figure is the mean over the seeds, with the lowest and the highest beside it; a seed draws the scenes, the choice
of names and the noise.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graft.studio.pocket import measures, models
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.pretrain.draw import pictures
from graft.studio.pocket.qa import answer
from graft.studio.pocket.questions import KINDS, ask, question_scene
from graft.studio.pocket.scenes import COLOURS, UNSEEN_OPENING, render, sample_scene

Figures = dict[str, dict[str, list[float]]]
"""Model -> measure -> one value for each seed."""


def grid(images: Tensor, columns: int, scale: int = 1) -> Any:
    """Return pictures (b, 3, h, w) in [-1, 1] as one PIL picture with white gaps."""
    from PIL import Image

    b, _, h, w = images.shape
    rows = math.ceil(b / columns)
    sheet = np.full((rows * (h + 4) - 4, columns * (w + 4) - 4, 3), 255, np.uint8)
    array = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for k, picture in enumerate(array):
        y, x = k // columns * (h + 4), k % columns * (w + 4)
        sheet[y : y + h, x : x + w] = picture
    return Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST)


def measure(seeds: int = 4, names: int = 200) -> tuple[Figures, dict[str, Any]]:
    """Return all figures, and the pictures that show them.

    Args:
        seeds: 0, 1, ... up to this number.
        names: known names that are drawn for each seed.
    """
    rounds: list[dict[str, dict[str, float]]] = []
    shown: dict[str, Any] = {}
    for seed in range(seeds):
        drawn, images = measures.measure_sd(seed, names)
        rounds.append(
            {
                "pocket-sd, autoencoder": measures.measure_autoencoder(seed),
                "pocket-sd": drawn,
                "pocket-vit": measures.measure_vit(seed),
                "pocket-clip": measures.measure_clip(seed),
                "pocket-llava": measures.measure_llava(seed),
            }
        )
        if not seed:
            shown |= {"known_names": grid(images["known_names"][:100], 10), "colours": grid(images["colours"][:24], 12)}
            shown |= {"pairs": grid(images["pairs"][:18], 6)}
    figures = {model: {name: [one[model][name] for one in rounds] for name in rounds[0][model]} for model in rounds[0]}
    return figures, shown | _reconstructed() | _compositions()


def _reconstructed() -> dict[str, Any]:
    vae, atlas = models.autoencoder(), Atlas.load()
    sides = {"known": atlas.known, "new": atlas.new}
    return {
        f"reconstructions_{side}": grid(torch.cat(measures.reconstructions(vae, sprites, 12)), 12, 2)
        for side, sprites in sides.items()
    }


COMPOSITIONS = (
    "a small {} in the top left", "a large {}", "a {} in the bottom right on a blue background",
    "a {} and a {}", "a {} left of a {}", "a {} above a {} on a yellow background",
)  # fmt: skip


def _compositions() -> dict[str, Any]:
    """Draw more than one thing, sizes and places: four pictures of each kind of prompt."""
    from diffusers import StableDiffusionPipeline

    atlas, rng = Atlas.load(), np.random.default_rng(0)
    pipe = StableDiffusionPipeline.from_pretrained(models.resolve("pocket-sd"))
    names = [atlas.names[i] for i in rng.permutation(atlas.known)]
    prompts = [form.format(*(names.pop() for _ in range(form.count("{}")))) for form in COMPOSITIONS for _ in range(4)]
    return {"compositions": grid(measures.generate(pipe, prompts, seed=5), 12)}


def retrieval(count: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Return scenes (3, 64, 64) of one thing with the three names that pocket-clip finds nearest."""
    atlas, rng, clip = Atlas.load(), np.random.default_rng(seed), models.clip()
    chosen = [int(s) for s in rng.choice(atlas.known, count, replace=False)]
    scenes = pictures([sample_scene(rng, [s], objects=(1.0,)) for s in chosen])
    told = measures.text_features(clip, [UNSEEN_OPENING.format(bare=atlas.names[i]) for i in atlas.known])
    scores = measures.image_features(clip, scenes) @ told.T
    return [
        {"picture": scenes[row], "name": atlas.names[sprite],
         "found": [(atlas.names[atlas.known[int(k)]], float(scores[row, k])) for k in scores[row].topk(3).indices]}
        for row, sprite in enumerate(chosen)
    ]  # fmt: skip


def conversations(count: int = 6, seed: int = 1) -> list[dict[str, Any]]:
    """Return scenes (3, 64, 64) with three questions about each, as (question, right answer, pocket-llava's)."""
    rng, known = np.random.default_rng(seed), Atlas.load().known
    model, processor, talks = models.llava(), models.llava_processor(), []
    for scene in [question_scene(rng, known) for _ in range(count)]:
        asked = [q for kind in rng.permutation(KINDS) if (q := ask(scene, str(kind), rng, known)) is not None][:3]
        told = answer(model, processor, [render(scene)] * len(asked), [q.text for q in asked])
        lines = [(q.text, q.answer, given) for q, given in zip(asked, told, strict=True)]
        talks.append({"picture": pictures([scene])[0], "lines": lines})
    return talks


def _forward(name: str) -> tuple[float, float]:
    """Return median seconds and added memory in MB of one forward pass of one row; in a process of its own."""
    torch.set_num_threads(1)
    tokens = models.load_tokenizer()(["red apple"], padding="max_length", return_tensors="pt").input_ids
    pixels = torch.zeros(1, 3, 64, 64)
    network = getattr(models, name)()
    asked = torch.tensor([[network.config.image_token_id] * 64 + [1] * 16]) if name == "llava" else tokens
    calls = {
        "autoencoder": lambda: network(pixels),
        "clip": lambda: network(pixel_values=pixels, input_ids=tokens),
        "vit": lambda: network(pixels),
        "unet": lambda: network(torch.zeros(1, 16, 8, 8), 500, torch.zeros(1, 32, 192)),
        "llava": lambda: network(input_ids=asked, pixel_values=pixels),
    }
    seconds = []
    with torch.no_grad():
        before = _resident("VmRSS", anew=True)
        calls[name]()
        memory = _resident("VmHWM") - before
        for _ in range(11):
            began = time.perf_counter()
            calls[name]()
            seconds.append(time.perf_counter() - began)
    return sorted(seconds)[5], memory


def _resident(which: str, anew: bool = False) -> float:
    """Return this process's memory now (VmRSS) or at its highest (VmHWM, counted anew from now on), in MB; Linux."""
    if anew:
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # else the forward pass takes what loading left, and seems to need nothing
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(which))


def report(out: Path | str = "docs", seeds: int = 4, names: int = 200) -> dict[str, Any]:
    """Measure, write `pocket_models.md` and its pictures below `out`, and return the figures."""
    out = Path(out)
    began = time.perf_counter()
    figures, shown = measure(seeds, names)
    (out / "pocket").mkdir(parents=True, exist_ok=True)
    found, talks = retrieval(), conversations()
    shown["retrieval"] = grid(torch.stack([row["picture"] for row in found]), len(found), 2)
    shown["conversations"] = grid(torch.stack([talk["picture"] for talk in talks]), len(talks), 2)
    for name, picture in shown.items():
        picture.save(out / "pocket" / f"{name}.png", optimize=True)
    (out / "pocket_models.md").write_text(_page(figures, seeds, found, talks), encoding="utf-8")
    print(f"report: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return {"figures": figures, "page": str(out / "pocket_models.md")}


def _page(figures: Figures, seeds: int, found: list[dict[str, Any]], talks: list[dict[str, Any]]) -> str:
    rows = "\n".join(
        f"| {model} | {name} | {np.mean(values):.2f} | {min(values):.2f} to {max(values):.2f} |"
        for model, of in figures.items()
        for name, values in of.items()
    )
    seen = "\n".join(
        f"- {row['name']}: " + ", ".join(f"{name} ({score:.2f})" for name, score in row["found"]) for row in found
    )
    said = "\n\n".join(
        f"Picture {k}:\n\n"
        + "\n".join(
            f"- {question} **{given}**" + ("" if given == right else f" (wrong: {right})")
            for question, right, given in talk["lines"]
        )
        for k, talk in enumerate(talks, start=1)
    )
    return f"""# The embedded models

`graft pocket report` computed this page from the committed weights: the mean over {seeds} seeds, the lowest and the
highest. A seed draws the scenes, the names and the noise. Pictures are drawn with {measures.STEPS} DDIM steps and
guidance {measures.GUIDANCE}. Known sprites are those of pretraining; new ones no model has seen.

| model | measure | mean | lowest to highest |
|---|---|---|---|
{rows}

{_parts()}

Weights are Apache-2.0; the sprites are drawn from Noto Color Emoji (OFL 1.1). `graft pocket train NETWORK`, NETWORK one
of autoencoder, clip, vit, unet, llava, trains one anew, on a GPU if there is one; with `--set method.go_on=true` it
goes on from these weights. The unet needs the autoencoder and the text tower of clip, llava the image tower of clip.

## Known names, one picture each

![one hundred names](pocket/known_names.png)

## Two names, pictures twice as wide

![pairs](pocket/pairs.png)

## Background colours

"NAME on a COLOUR background", the colours in the order {", ".join(COLOURS)}.

![colours](pocket/colours.png)

## Sizes, places and company

Four pictures of each: {"; ".join(form.format(*("NAME",) * form.count("{}")) for form in COMPOSITIONS)}.

![compositions](pocket/compositions.png)

## Reconstructions

Random scenes above, what the autoencoder makes of them below: known sprites, then new ones.

![known sprites](pocket/reconstructions_known.png)
![new sprites](pocket/reconstructions_new.png)

## What pocket-clip finds nearest

![scenes](pocket/retrieval.png)

{seen}

## What pocket-llava answers

![scenes](pocket/conversations.png)

{said}
"""


def _parts() -> str:
    lines = ["| network | parameters | file, MB | forward of a row, ms | memory for it, MB |", "|---|---|---|---|---|"]
    trained = ["| network | trained on | date | steps | seconds |", "|---|---|---|---|---|"]
    context = multiprocessing.get_context("spawn")
    for name in ("autoencoder", "unet", "clip", "vit", "llava"):
        facts = models.facts(name)
        size = (models.WEIGHTS / f"{name}.safetensors").stat().st_size / 1e6
        with context.Pool(1) as pool:
            seconds, memory = pool.apply(_forward, (name,))
        lines.append(
            f"| {name} | {facts['parameters'] / 1e6:.2f} M | {size:.1f} | {1e3 * seconds:.1f} | {memory:.0f} |"
        )
        trained += [
            f"| {name} | {one['hardware']} | {one['date']} | {one['steps']:,} | {one['seconds']:,.0f} |"
            for one in facts["trainings"]
        ]
    return "\n".join(
        [*lines, "", "Each training in turn; one that follows another went on from its weights:", "", *trained]
    )
