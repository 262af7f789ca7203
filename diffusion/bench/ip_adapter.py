"""Whether a picture works as a prompt: an IP-Adapter for `pocket-sd`, trained on generated pictures and measured.

The training pictures show known sprites on plain backgrounds; their captions tell the background or nothing, so what is
in front only the picture tells. The training goes on from `graft.diffusion.aligned_start`, with the sprites'
names: from nothing it takes many times as long.

Measured are drawings that follow other pictures of known sprites: how often pocket-vit calls the drawing by the
sprite's name (top 1 of all its classes), without text and beside text that asks for a background, and how often that
background is there (the picture shows another one). Beside stand the base without a picture, the base that is told the
sprite's name, and the pictures that are followed themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from graft.diffusion.aligned_start import aligned_start
from graft.diffusion.base import DiffusionBase, load_base
from graft.diffusion.measures import background_alignment
from graft.diffusion.picture_prompts import PicturePrompts
from graft.diffusion.previews import grid, save_png, undisturbed
from graft.studio.adapter import Adapter
from graft.studio.disk import write_atomic
from graft.studio.pocket import models
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.scenes import COLOURS, portrait, render, with_article

ASKED = ("red", "yellow", "green", "blue")
LIMITS = {"named": 0.5, "background": 0.8}
"""What is promised: of drawings that follow a picture alone, and of those that follow one beside text."""
TRAIN = {
    "batch_size": 16, "learning_rate": 1e-4, "schedule": "cosine", "warmup_steps": 20, "log_every": 50, "threads": 1,
    "mixed_precision": "no", "device": "cpu",
}  # fmt: skip
"""How the adapter is trained."""
SCALES = (0.5, 1.0, 1.5)
"""Strengths beside text; the last one is judged and shown."""
STEPS, GUIDANCE, BATCH = 25, 3.0, 24
Classify = Callable[[Sequence[Image.Image]], torch.Tensor]
"""Pictures to the atlas index of the known sprite that is seen in each, (b,)."""


@dataclass
class Followed:
    """Pictures to follow, and what they show."""

    sprites: list[int]
    """Atlas indices, all known."""
    pictures: list[Image.Image]
    """64 x 64, none of the training."""
    asked: list[str]
    """Background to ask for, never the picture's own."""


def write_training(folder: Path, count: int, seed: int = 0) -> Path:
    """Writes pictures of known sprites with captions, once; picture i is the same in every larger set."""
    known, colours = Atlas.load().known, list(COLOURS)
    if (folder / "metadata.jsonl").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        colour = colours[rng.integers(len(colours))]
        name = f"{i:05d}.png"
        Image.fromarray(render(portrait(rng, known[i % len(known)], colour))).save(folder / name)
        form = int(rng.integers(6))
        lines.append(json.dumps({"file_name": name, "text": asking(colour, form) if form < 4 else "a picture"}))
    write_atomic(folder / "metadata.jsonl", ("\n".join(lines) + "\n").encode())
    return folder


def asking(colour: str, form: int = 0) -> str:
    """A caption that tells the background and nothing else."""
    opening = ("a picture", "a photo", "a drawing", "a thing")[form]
    return f"{opening} on {with_article(colour)} background"


def followed(count: int, seed: int = 1) -> Followed:
    """Pictures that were not trained on, of as many known sprites."""
    rng = np.random.default_rng(seed)
    sprites = [int(i) for i in rng.permutation(Atlas.load().known)[:count]]
    asked = [ASKED[i % len(ASKED)] for i in range(count)]
    grounds = [[c for c in COLOURS if c != colour][rng.integers(len(COLOURS) - 1)] for colour in asked]
    shown = [Image.fromarray(render(portrait(rng, i, ground))) for i, ground in zip(sprites, grounds, strict=True)]
    return Followed(sprites, shown, asked)


def classifier() -> Classify:
    """pocket-vit, as a classifier of pictures."""
    vit, known = models.vit(), torch.tensor(Atlas.load().known)

    @torch.no_grad()
    def classify(pictures: Sequence[Image.Image]) -> torch.Tensor:
        pixels = np.stack([np.asarray(p.convert("RGB"), np.float32) for p in pictures])
        return known[vit(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).argmax(1)]

    return classify


def follow(
    handle: PicturePrompts, prompts: Sequence[str], shown: Sequence[Image.Image], scale: float
) -> list[Image.Image]:
    """One drawing for each prompt and picture, from the seed of its place."""
    drawn = []
    for start in range(0, len(prompts), BATCH):
        handle.show([[picture] for picture in shown[start : start + BATCH]], scale)
        drawn += plain(handle.base, prompts[start : start + BATCH], start)
    handle.show([])
    return drawn


def plain(base: DiffusionBase, prompts: Sequence[str], first: int = 0) -> list[Image.Image]:
    """One drawing for each prompt, with whatever is attached and shown."""
    drawn: list[Image.Image] = []
    with undisturbed(base):
        for start in range(0, len(prompts), BATCH):
            some = list(prompts[start : start + BATCH])
            seeds = [torch.Generator().manual_seed(first + start + i) for i in range(len(some))]
            drawn += base.pipe(some, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds).images
    return drawn


def ip_adapter(
    out: Path | None = None, pictures: int = 4000, steps: int = 800, sprites: int = 48, base: str = "pocket-sd"
) -> dict[str, Any]:
    """Trains, unless it has been done, measures and returns the table.

    Args:
        out: folder for pictures, run, `grid.png` and `ip-adapter.json`; None takes `runs/ip-adapter`. A training that
            was cut off there goes on.
        pictures: to train on.
        steps: of the training, 16 pictures each.
        sprites: whose pictures are followed.
        base: a base that knows the embedded world.
    """
    out = Path(out or "runs/ip-adapter")
    loaded, folder = load_base(base, "cpu"), write_training(out / "pictures", pictures)
    start = _start(loaded, folder, out / "start")
    adapter = _trained(out, folder, steps, base)
    told, classify = followed(sprites), classifier()
    names = [with_article(Atlas.load().names[i]) for i in told.sprites]
    grounds = [asking(colour) for colour in told.asked]
    named = [f"{name} on {with_article(colour)} background" for name, colour in zip(names, told.asked, strict=True)]
    drawn = {"base, no picture": plain(loaded, grounds), "base, told the name": plain(loaded, named)}
    with start.attached(loaded) as handle:
        drawn["picture alone, untrained start"] = follow(handle, [""] * sprites, told.pictures, 1.0)
    with adapter.attached(loaded) as handle:
        drawn["picture alone"] = follow(handle, [""] * sprites, told.pictures, 1.0)
        drawn['picture, "a picture"'] = follow(handle, ["a picture"] * sprites, told.pictures, 1.0)
        for scale in SCALES:
            drawn[f"picture beside text, scale {scale:g}"] = follow(handle, grounds, told.pictures, scale)
    rows = [{"prompt": "the pictures followed", **_figures(told.pictures, told, classify, False)}]
    for name, tiles in drawn.items():
        rows.append({"prompt": name, **_figures(tiles, told, classify, "beside text" in name or "base" in name)})
    save_png(out / "grid.png", _sheet(told, drawn))
    result = {
        "steps": steps,
        "pictures": pictures,
        "sprites": sprites,
        "rows": rows,
        "seconds": adapter.card.metrics.get("seconds"),
    }
    write_atomic(out / "ip-adapter.json", (json.dumps(result, indent=1) + "\n").encode())
    return result | {"table": table(result)}


def _start(base: DiffusionBase, folder: Path, where: Path) -> Adapter:
    """What the training goes on from, made once."""
    if not where.exists():
        atlas, files = Atlas.load(), sorted(folder.glob("*.png"))
        names = [atlas.names[atlas.known[i % len(atlas.known)]] for i in range(len(files))]
        aligned_start(base, [Image.open(file) for file in files], names).save(where)
    return Adapter.load(where)


def _trained(out: Path, folder: Path, steps: int, base: str) -> Adapter:
    """The adapter of the run in `out`, which is begun or goes on if it must."""
    from graft.studio.runs.folder import open_run
    from graft.studio.training import resume, train

    run = out / "run"
    if not (run / "result").exists() and (run / "job.toml").exists():
        resume(open_run(run))
    elif not (run / "result").exists():
        method = {"name": "ip_adapter", "init": str(out / "start")}
        job = {"base": base, "domain": "diffusion", "method": method, "data": {"path": str(folder)}}
        train(job | {"train": TRAIN | {"steps": steps}}, run_dir=run)
    return Adapter.load(run / "result")


def _figures(drawn: Sequence[Image.Image], told: Followed, classify: Classify, grounds: bool) -> dict[str, float]:
    named = (classify(drawn) == torch.tensor(told.sprites)).float().mean().item()
    return {"named": named} | ({"background": background_alignment(drawn, told.asked)} if grounds else {})


def _sheet(told: Followed, drawn: dict[str, list[Image.Image]], rows: int = 6) -> Image.Image:
    """Picture, drawing, and drawing beside text, for the first sprites."""
    beside = drawn[f"picture beside text, scale {SCALES[-1]:g}"]
    columns = {"shown": told.pictures, "drawn": drawn["picture alone"], "and text": beside}
    blocks = {name: [[tile] for tile in tiles[:rows]] for name, tiles in columns.items()}
    return grid(blocks, [asking(colour) for colour in told.asked[:rows]], [0]).quantize(256)


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    seconds = result["seconds"]
    lines = [f"{result['steps']} steps on {result['pictures']} pictures" + (f", {seconds:.0f} s" if seconds else "")]
    lines += [f"{result['sprites']} pictures followed", "", f"{'':36} {'named':>10} {'background':>10}"]
    for row in result["rows"]:
        ground = f"{row['background']:10.3f}" if "background" in row else ""
        lines.append(f"{row['prompt']:36} {row['named']:10.3f} {ground}".rstrip())
    figures = {row["prompt"]: row for row in result["rows"]}
    beside = figures[f"picture beside text, scale {SCALES[-1]:g}"]
    for name, value in (("named", figures["picture alone"]["named"]), ("background", beside["background"])):
        held = "ok" if value >= LIMITS[name] else "missed"
        lines.append(f"{'' if name == 'background' else chr(10)}{name}: {value:.3f}  limit {LIMITS[name]:.2f}  {held}")
    return "\n".join(lines)
