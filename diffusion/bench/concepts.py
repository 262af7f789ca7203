"""Ways to learn a concept side by side, and two concepts in one picture: `graft bench concepts`.

**One concept.** New sprites x seeds x methods with default settings. `CLIP-I` is pocket-clip's and `DINO` pocket-vit's
cosine between drawn and held-out pictures; `CLIP-T` pocket-clip's between a drawing and its prompt, in which the known
sprite that looks most like the concept stands for its word; `recognised` as in `graft bench personalization`. `KID` is
what else has changed: the kernel distance (Binkowski et al., 2018, arXiv:1801.01401; x 1000, unbiased, so about 0 for
no change and possibly below) of pocket-vit's features between pictures of known sprites that the adapted and, from
another seed, the plain base draw. `seconds` are those of the steps alone; `lora, prior` is DreamBooth's recipe with
LoRA. Trainings of a method may share a batch (`jobs`), each as if alone, and then share its seconds.

**Two concepts.** Each was learnt alone; then one prompt asks for both, in pictures twice as wide as high. `both` and
`one` are the shares of pictures in which both sprites, or at least one, are found: one of five square windows counts
if, of all new sprites and those asked for, the one in question is nearest to it by the mean cosine of both models, and
nearer than `NEAR`. True scenes, and true scenes of two other sprites, say how good that measure is; two *known*
sprites, by name, what the base can do at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from graft.diffusion.base import DiffusionBase, load_base, save_base
from graft.diffusion.bench.personalization import ASKED, COLOURED, PLAIN, Judge
from graft.diffusion.bench.pictures import held_out_pictures, new_sprites, write_pictures
from graft.diffusion.concept_merge import merge_concepts
from graft.diffusion.features import Clip, Eye
from graft.diffusion.measures import background_alignment, image_similarity, kid
from graft.diffusion.previews import PreviewConfig, draw
from graft.studio.adapter import Adapter
from graft.studio.disk import write_atomic
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.scenes import COLOURS, SIDE, caption, centred, render, sample_scene, side_by_side, with_article
from graft.studio.runs import Run

METHODS: dict[str, dict[str, Any]] = {
    "textual_inversion": {"name": "textual_inversion"},
    "custom_diffusion": {"name": "custom_diffusion", "class_word": "{}"},
    "custom_diffusion, prior": {"name": "custom_diffusion", "class_word": "{}", "class_prompt": "a photo of a {}"},
    "pivotal": {"name": "pivotal"},
    "lora": {"name": "lora", "trigger": "sks {}"},
    "lora, prior": {"name": "lora", "trigger": "sks {}", "class_prompt": "a photo of a {}"},
}
"""Rows of the first table: method sections, where {} is the concept's class: the known sprite that looks most like
it."""
PAIR = ("{} and {}", "{} left of {}", "{} and {} on a green background")
NEAR = 0.5
_ONE = ("CLIP-I", "DINO", "CLIP-T", "background", "recognised", "KID", "seconds", "parameters", "KB")
_TWO = ("both", "one")


@dataclass
class Eyes:
    """pocket-clip and pocket-vit: unit features of pictures."""

    clip: Clip
    vit: Eye
    known: int = 32
    """Known sprites that `drift` draws."""
    cache: dict[str, Any] = field(default_factory=dict)

    def both(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Features of both models."""
        return self.clip.images(pictures), self.vit.images(pictures)

    @cached_property
    def names(self) -> list[str]:
        """Known sprites that `drift` draws."""
        atlas = Atlas.load()
        return [atlas.names[i] for i in np.random.default_rng(7).permutation(atlas.known)[: self.known]]

    def drift(self, base: DiffusionBase) -> float:
        """Kernel distance x 1000 of what the base draws now to what it drew when this was first called."""
        prompts = [f"a photo of {with_article(name)}" for name in self.names]
        if "prior" not in self.cache:
            self.cache["prior"] = self.vit.images(sum(draw(base, prompts, [100], PreviewConfig()), []))
        now = self.vit.images(sum(draw(base, prompts, [0], PreviewConfig()), []))
        return 1000 * kid(now, self.cache["prior"], range(len(prompts)))

    def prototypes(self, sprites: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean feature of plain pictures of each sprite: (s, d) by each model."""
        found: dict[int, tuple[Tensor, Tensor]] = self.cache.setdefault("prototypes", {})
        for sprite in sprites:
            if sprite not in found:
                shown = [Image.fromarray(render(centred(sprite, colour))) for colour in list(COLOURS)[::2]]
                found[sprite] = tuple(F.normalize(part.mean(0), dim=0) for part in self.both(shown))  # type: ignore[assignment]
        clip, vit = (torch.stack([found[sprite][i] for sprite in sprites]) for i in (0, 1))
        return clip, vit

    def find(self, pictures: Sequence[Image.Image], wanted: Sequence[int]) -> dict[str, float]:
        """Shares of pictures in which both wanted sprites, or at least one of them, are found."""
        sprites = list(dict.fromkeys([*wanted, *Atlas.load().new]))
        clip, vit = self.prototypes(sprites)
        seen = []
        for picture in pictures:
            cut = [picture.convert("RGB").crop((x, 0, x + SIDE, SIDE)) for x in range(0, SIDE + 1, SIDE // 4)]
            a, b = self.both(cut)
            best, which = ((a @ clip.T + b @ vit.T) / 2).max(1)
            seen.append({sprites[i] for i, near in zip(which.tolist(), best.tolist(), strict=True) if near > NEAR})
        hits = [sum(sprite in found for sprite in wanted) for found in seen]
        return {"both": mean(n == 2 for n in hits), "one": mean(n > 0 for n in hits)}


def concepts(
    out: Path | None = None,
    sprites: int = 4,
    seeds: int = 2,
    steps: int = 0,
    methods: Sequence[str] = tuple(METHODS),
    base: str = "pocket-sd",
    jobs: int = 1,
) -> dict[str, Any]:
    """Trains, measures and returns the tables.

    Args:
        out: folder for runs, pictures and `concepts.json`; None takes `runs/concepts`.
        sprites: new sprites to learn, at least two.
        seeds: trainings of each.
        steps: of each training; 0 leaves the default.
        methods: rows of the first table. Custom Diffusion and LoRA are trained for the second in any case.
        base: a base that knows the embedded world.
        jobs: trainings of a method in one batch, each as if alone; `seconds` are then a share of the batch's.
    """
    out = Path(out or "runs/concepts")
    clip = Clip("pocket-clip")
    bench = _Bench(Judge(load_base(base, "cpu"), clip), Eyes(clip, Eye("pocket-vit")), out, steps, jobs)
    chosen = new_sprites(max(2, sprites))
    for method in methods:
        bench.learn(method, [(sprite, seed) for sprite in chosen for seed in range(seeds)])
    one = [row for sprite in chosen for row in bench.alone(sprite, seeds, methods)]
    two = [row for pair in zip(chosen[::2], chosen[1::2], strict=False) for row in bench.together(pair)]
    result: dict[str, Any] = {"one": _means(one, _ONE), "two": _means(two, _TWO), "rows": [*one, *two]}
    write_atomic(out / "concepts.json", (json.dumps(result, indent=1) + "\n").encode())
    return result | {"table": f"{table(result['one'], _ONE)}\n\n{table(result['two'], _TWO)}"}


@dataclass
class _Bench:
    """Trains and measures."""

    judge: Judge
    eyes: Eyes
    out: Path
    steps: int
    jobs: int

    @property
    def base(self) -> DiffusionBase:
        return self.judge.base

    def alone(self, sprite: int, seeds: int, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Rows of one sprite: the base by its best name, then every method and seed."""
        near = self.near(sprite)
        self.eyes.drift(self.base)
        tried = [self.measured(with_article(name), sprite, near) for name in self.judge.own_names(sprite)]
        yield {"method": "base", "sprite": sprite, **max(tried, key=lambda figures: figures["CLIP-I"])}
        for method in methods:
            for seed in range(seeds):
                run = self.trained(method, sprite, seed)
                adapter = run.adapter()
                with adapter.attached(self.base):
                    figures = self.measured(adapter.card.trigger or "", sprite, near)
                yield {"method": method, "sprite": sprite, "seed": seed, **figures, **self.cost(run)}

    def near(self, sprite: int) -> str:
        """A concept's class."""
        return self.judge.near_names(sprite, 1)[0]

    def cost(self, run: Run) -> dict[str, float]:
        """What a training and its file take; one of a group takes its share of the group's seconds."""
        adapter, file = run.adapter(), run.folder / "result" / "adapter.safetensors"
        size = sum(tensor.numel() for tensor in adapter.tensors.values())
        seconds = adapter.card.metrics["seconds"] / len(run.group)
        return {"seconds": seconds, "parameters": size, "KB": file.stat().st_size / 1000}

    def measured(self, word: str, sprite: int, near: str) -> dict[str, float]:
        """All figures of what a word now stands for."""
        config, seeds = PreviewConfig(), range(self.judge.pictures)
        plain: list[Image.Image] = sum(draw(self.base, [p.format(word) for p in PLAIN], seeds, config), [])
        asked = [colour for colour in ASKED for _ in seeds]
        coloured = sum(draw(self.base, [COLOURED.format(word, colour=c) for c in ASKED], seeds, config), [])
        features, real = self.judge.clip.images(plain), held_out_pictures(sprite)
        new, means = self.judge.world
        told = self.eyes.clip.texts([COLOURED.format(with_article(near), colour=colour) for colour in asked])
        return {
            "CLIP-I": image_similarity(features, self.judge.clip.images(real)),
            "DINO": image_similarity(self.eyes.vit.images(plain), self.eyes.vit.images(real)),
            "CLIP-T": float((self.eyes.clip.images(coloured) * told).sum(-1).mean()),
            "background": background_alignment(coloured, asked),
            "recognised": float(((features @ means.T).argmax(1) == new.index(sprite)).float().mean()),
            "KID": self.eyes.drift(self.base),
        }

    def run(self, method: str, sprite: int, seed: int) -> Run | None:
        """The newest training of a method on a sprite, finished or not."""
        found = sorted((self.out / "runs").glob(f"*-{_name(method, sprite, seed)}/job.toml"))
        return Run(found[-1].parent) if found else None

    def learn(self, method: str, which: Sequence[tuple[int, int]]) -> None:
        """Trains a method on sprites and seeds, in groups, as far as it was not done before."""
        from graft.studio.training import resume, train_many

        for sprite, seed in which:
            begun = self.run(method, sprite, seed)
            if begun is not None and not (begun.folder / "result").exists():
                resume(begun)
        missing = [each for each in which if self.run(method, *each) is None]
        for start in range(0, len(missing), self.jobs):
            jobs = [self.job(method, *each) for each in missing[start : start + self.jobs]]
            train_many(jobs, runs=self.out / "runs")

    def job(self, method: str, sprite: int, seed: int) -> dict[str, Any]:
        """A method's training on one sprite."""
        section = {key: value.format(self.near(sprite)) for key, value in METHODS[method].items()}
        pictures = write_pictures(self.out / "pictures" / str(sprite), sprite)
        return self.described(section, pictures, seed) | {"name": _name(method, sprite, seed)}

    def described(self, section: dict[str, Any], pictures: Path, seed: int, base: str = "") -> dict[str, Any]:
        """A job."""
        settings: dict[str, Any] = {"seed": seed, "device": "cpu"} | ({"steps": self.steps} if self.steps else {})
        job = {"base": base or self.base.name, "domain": "diffusion", "method": section, "train": settings}
        return job | {"data": {"path": str(pictures)}}

    def trained(self, method: str, sprite: int, seed: int) -> Run:
        """A method's training on one sprite, which is done now if it was not before."""
        self.learn(method, [(sprite, seed)])
        run = self.run(method, sprite, seed)
        assert run is not None
        return run

    def fit(self, section: dict[str, Any], pictures: Path, where: Path, seed: int = 0, base: str = "") -> Adapter:
        """A training, unless it is finished already."""
        from graft.studio.training import train

        if not (where / "result").exists():
            train(self.described(section, pictures, seed, base), run_dir=where)
        return Adapter.load(where / "result")

    def together(self, pair: tuple[int, int]) -> Iterator[dict[str, Any]]:
        """Rows of two sprites in one picture."""
        atlas = Atlas.load()
        rng = np.random.default_rng(pair)
        known = tuple(int(i) for i in rng.choice(atlas.known, 2, replace=False))
        names = [atlas.names[i] for i in known]
        yield {"method": "base, two known sprites", **self.drawn(self.base, names, known)}
        near = [self.near(sprite) for sprite in pair]
        words = [f"<new{k}> {name}" for k, name in enumerate(near, start=1)]
        custom = [self.trained("custom_diffusion", sprite, 0).adapter() for sprite in pair]
        merged = merge_concepts(self.base, custom, _captions(rng))
        with merged.attached(self.base):
            yield {"method": "custom_diffusion, merged", **self.drawn(self.base, words, pair)}
        joint = self.joint(pair)
        with joint.attached(self.base):
            yield {"method": "custom_diffusion, joint", **self.drawn(self.base, words, pair)}
        with self.sequential(pair, custom[0]) as base:
            yield {"method": "custom_diffusion, sequential", **self.drawn(base, words, pair)}
        with ExitStack() as stack:
            for sprite in pair:
                stack.enter_context(self.trained("lora", sprite, 0).adapter().attached(self.base))
            yield {"method": "lora, sum", **self.drawn(self.base, [f"sks {name}" for name in near], pair)}
        for name, of in (("true scenes", pair), ("true scenes of others", tuple(rng.choice(atlas.known, 2, False)))):
            scenes = [side_by_side(int(of[0]), int(of[1]), colour) for colour in COLOURS]
            yield {"method": name, **self.eyes.find([Image.fromarray(render(scene)) for scene in scenes], pair)}

    def drawn(self, base: DiffusionBase, words: Sequence[str], sprites: Sequence[int]) -> dict[str, float]:
        """What is found in pictures of two words."""
        prompts = [prompt.format(*map(with_article, words)) for prompt in PAIR]
        pictures = draw(base, prompts, range(8), PreviewConfig(width=2 * SIDE))
        return self.eyes.find(sum(pictures, []), sprites)

    def joint(self, pair: tuple[int, int]) -> Adapter:
        """Both sprites in one training, as long as that of one."""
        folder = self.out / "pictures" / "-".join(map(str, pair))
        for place, sprite in enumerate(pair):
            write_pictures(folder / str(place), sprite)
        section = {"name": "custom_diffusion", "token": ("<new1>", "<new2>"), "class_word": tuple(map(self.near, pair))}
        where = self.out / "runs" / f"joint-{pair[0]}-{pair[1]}"
        return self.fit(section, folder, where)

    @contextmanager
    def sequential(self, pair: tuple[int, int], first: Adapter) -> Iterator[DiffusionBase]:
        """The base with the first sprite in its weights, and the second learnt on top of it."""
        folder = self.out / "bases" / str(pair[0])
        if not folder.exists():
            with first.attached(self.base) as handle:
                handle.merge()
                save_base(self.base, folder)
        section = {"name": "custom_diffusion", "token": "<new2>", "class_word": self.near(pair[1])}
        where = self.out / "runs" / f"sequential-{pair[0]}-{pair[1]}"
        second = self.fit(section, self.out / "pictures" / str(pair[1]), where, base=str(folder))
        base = load_base(str(folder), "cpu")
        with second.attached(base):
            yield base


def _name(method: str, sprite: int, seed: int) -> str:
    return f"{method}-{sprite}-{seed}".replace(", ", "-").replace("_", "-")


def _captions(rng: np.random.Generator, count: int = 200) -> list[str]:
    """Captions of the embedded world, for which a merge leaves the base as it is."""
    return [caption(sample_scene(rng, Atlas.load().known), rng) for _ in range(count)]


def _means(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> dict[str, dict[str, float]]:
    of: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of.setdefault(row["method"], []).append(row)
    return {name: {c: mean(row[c] for row in some) for c in columns if c in some[0]} for name, some in of.items()}


def table(means: dict[str, dict[str, float]], columns: Sequence[str]) -> str:
    """Figures as text, a line for each method."""
    digits = {"KID": 1, "seconds": 0, "parameters": 0, "KB": 0}
    lines = [f"{'':28}" + "".join(f"{column:>11}" for column in columns)]
    for name, figures in means.items():
        cells = [f"{figures[c]:11,.{digits.get(c, 3)}f}" if c in figures else " " * 11 for c in columns]
        lines.append(f"{name:28}{''.join(cells)}".rstrip())
    return "\n".join(lines)
