"""How well new concepts are learnt: 10 new sprites x 5 pictures x 3 seeds x two methods, with default settings.

Image similarity is the mean cosine of pocket-clip's features between drawn and held-out pictures, as a rise over the
base's best attempt, the best of the sprite's true name and the words in it.

A new sprite is outside pocket-clip's world too: to it, some known sprite may look as much like the new one as the new
one's own pictures. The row `nearest known` shows what the base gets by naming the known sprites that pocket-clip finds
nearest to the training pictures. So two stricter measures stand beside: how often a drawn picture is nearest to the
right one of *all* new sprites (`recognised`), and how well the sprite is found in it by its pixels (`match`, in dB).
All come with what real pictures of the sprite, and of another, reach.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from graft.diffusion.base import DiffusionBase, load_base
from graft.diffusion.bench.pictures import (
    held_out_pictures,
    nearest_match,
    new_sprites,
    training_pictures,
    write_pictures,
)
from graft.diffusion.features import Clip
from graft.diffusion.measures import background_alignment, image_similarity
from graft.diffusion.previews import PreviewConfig, draw
from graft.studio.disk import write_atomic
from graft.studio.pocket.atlas import Atlas

METHODS = ("textual_inversion", "lora")
RISES = {"textual_inversion": 0.15, "lora": 0.25}
"""Rise of image similarity that each method promises."""
DROP = 0.10
"""Relative drop of background alignment that is allowed."""
ASKED = ("red", "yellow", "green", "blue")
PLAIN, COLOURED = ("a photo of {}", "a picture of {}"), "a photo of {} on a {colour} background"


@dataclass
class Judge:
    """Draws and measures what a word stands for."""

    base: DiffusionBase
    """Draws."""
    clip: Clip
    """Compares."""
    pictures: int = 4
    """Drawn per prompt."""

    @cached_property
    def world(self) -> tuple[list[int], Tensor]:
        """All new sprites and the mean unit feature of each one's held-out pictures, (s, d)."""
        sprites = list(Atlas.load().new)
        means = [self.clip.images(held_out_pictures(sprite)).mean(0) for sprite in sprites]
        return sprites, F.normalize(torch.stack(means), dim=-1)

    def measure(self, word: str, sprite: int, quick: bool = False) -> dict[str, float]:
        """Similarity, recognition and match of plain prompts, background alignment of coloured ones."""
        seeds, config = range(self.pictures), PreviewConfig()
        drawn: list[Image.Image] = sum(draw(self.base, [p.format(word) for p in PLAIN], seeds, config), [])
        figures = self.of_pictures(drawn, sprite)
        if quick:
            return figures
        prompts = [COLOURED.format(word, colour=colour) for colour in ASKED]
        coloured: list[Image.Image] = sum(draw(self.base, prompts, seeds, config), [])
        return figures | {"background": background_alignment(coloured, [c for c in ASKED for _ in seeds])}

    def of_pictures(self, drawn: list[Image.Image], sprite: int) -> dict[str, float]:
        """Similarity, recognition and match of given pictures."""
        features, real = self.clip.images(drawn), self.clip.images(held_out_pictures(sprite))
        sprites, means = self.world
        nearest = (features @ means.T).argmax(1)
        return {
            "similarity": image_similarity(features, real),
            "recognised": float((nearest == sprites.index(sprite)).float().mean()),
            "match": mean(nearest_match(picture, sprite) for picture in drawn),
        }

    def own_names(self, sprite: int) -> list[str]:
        """What a user could call the sprite: its name, and each word of it."""
        name = Atlas.load().names[sprite]
        return list(dict.fromkeys([name, *(word for word in name.split() if len(word) > 2)]))

    def near_names(self, sprite: int, count: int = 3) -> list[str]:
        """Known names that CLIP finds nearest to the training pictures."""
        atlas = Atlas.load()
        known = [atlas.names[i] for i in atlas.known]
        seen = self.clip.images(training_pictures(sprite)).mean(0)
        scores = self.clip.texts([f"a photo of a {name}" for name in known]) @ seen
        return [known[i] for i in scores.topk(count).indices.tolist()]

    def best_attempt(self, sprite: int, names: list[str]) -> dict[str, float]:
        """The base's most similar pictures, over some names."""
        best = max(names, key=lambda name: self.measure(f"a {name}", sprite, quick=True)["similarity"])
        return self.measure(f"a {best}", sprite)


def personalization(
    out: Path | None = None, sprites: int = 10, seeds: int = 3, steps: int = 0, base: str = "pocket-sd"
) -> dict[str, Any]:
    """Trains, measures and returns the table.

    Args:
        out: folder for runs, pictures and `personalization.json`; None takes `runs/personalization`.
        sprites: new sprites to learn.
        seeds: trainings of each.
        steps: of each training; 0 leaves the default.
        base: a base that knows the embedded world.
    """
    out = Path(out or "runs/personalization")
    judge = Judge(load_base(base, "cpu"), Clip("pocket-clip"))
    rows: list[dict[str, Any]] = []
    for sprite in new_sprites(sprites):
        folder = write_pictures(out / "pictures" / str(sprite), sprite)
        for name, words in (("base", judge.own_names(sprite)), ("nearest known", judge.near_names(sprite))):
            rows.append({"method": name, "sprite": sprite, "seed": 0, **judge.best_attempt(sprite, words)})
        for method in METHODS:
            for seed in range(seeds):
                figures = _trained(judge, out, folder, method, sprite, seed, steps)
                rows.append({"method": method, "sprite": sprite, "seed": seed, **figures})
    result = {"rows": rows, "real": _real(judge, new_sprites(sprites)), **summary(rows)}
    write_atomic(out / "personalization.json", (json.dumps(result, indent=1) + "\n").encode())
    return result | {"table": table(result)}


def _trained(
    judge: Judge, out: Path, folder: Path, method: str, sprite: int, seed: int, steps: int
) -> dict[str, float]:
    """Trains one run, unless it is finished already, and measures its saved adapter."""
    from graft.studio.adapter import Adapter
    from graft.studio.training import train

    where = out / "runs" / f"{method}-{sprite}-{seed}"
    if not (where / "result").exists():
        settings: dict[str, Any] = {"seed": seed} | ({"steps": steps} if steps else {})
        job = {
            "base": judge.base.name,
            "domain": "diffusion",
            "method": {"name": method},
            "data": {"path": str(folder)},
        }
        train(job | {"train": settings}, run_dir=where)
    adapter = Adapter.load(where / "result")
    with adapter.attached(judge.base):
        return judge.measure(adapter.card.trigger or "", sprite)


def _real(judge: Judge, sprites: list[int]) -> dict[str, dict[str, float]]:
    """What the measures say of true pictures of the sprite, and of pictures of the next sprite."""
    same = [judge.of_pictures(training_pictures(sprite), sprite) for sprite in sprites]
    others = [
        judge.of_pictures(training_pictures(a), b) for a, b in zip(sprites, sprites[1:] + sprites[:1], strict=True)
    ]
    return {"right sprite": _means(same), "another sprite": _means(others)}


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    names = [name for name in ("similarity", "recognised", "match", "background") if name in rows[0]]
    return {name: mean(row[name] for row in rows) for name in names}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means per method and the promises: {"means": ..., "checks": {name: {"value", "limit", "ok"}}}."""
    means = {m: _means([r for r in rows if r["method"] == m]) for m in ("base", "nearest known", *METHODS)}
    checks = {}
    for method in METHODS:
        rise = means[method]["similarity"] - means["base"]["similarity"]
        drop = 1 - means[method]["background"] / max(means["base"]["background"], 1e-9)
        checks[f"{method}: rise of similarity"] = {"value": rise, "limit": RISES[method], "ok": rise >= RISES[method]}
        checks[f"{method}: drop of background"] = {"value": drop, "limit": DROP, "ok": drop <= DROP}
    return {"means": means, "checks": checks}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{'':20} {'similarity':>10} {'recognised':>10} {'match dB':>10} {'background':>10}"]
    for name, figures in {**result["means"], **result["real"]}.items():
        cells = [
            f"{figures[k]:10.3f}" if k in figures else " " * 10
            for k in ("similarity", "recognised", "match", "background")
        ]
        lines.append(f"{name:20} {' '.join(cells)}")
    lines.append("")
    for name, check in result["checks"].items():
        lines.append(
            f"{name:36} {check['value']:7.3f}  limit {check['limit']:.2f}  {'ok' if check['ok'] else 'MISSED'}"
        )
    return "\n".join(lines)
