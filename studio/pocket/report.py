"""Measure the embedded models with fixed seeds and write `docs/pocket_models.md` with its pictures.

    graft pocket report [--out docs]

Every figure is computed here, from the committed weights. Known sprites are those of pretraining; new ones were never
seen. Pictures are drawn as any user would draw them: by a `StableDiffusionPipeline` loaded from the standard folder.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from graft.studio.pocket import models
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.pretrain.draw import pictures
from graft.studio.pocket.scenes import COLOURS, UNSEEN_OPENING, sample_scene

STEPS, GUIDANCE = 25, 5.0
"""DDIM steps and classifier-free guidance of every generated picture."""


def psnr(pictures: Tensor, others: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each pair of pictures (b, 3, h, w) in [-1, 1], in dB, (b,)."""
    return -10 * torch.log10((pictures - others).square().mean((1, 2, 3)) / 4)


@torch.no_grad()
def reconstructions(vae: Any, sprites: Sequence[int], count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random scenes of the given sprites and what the autoencoder makes of them, (count, 3, 64, 64) each."""
    rng = np.random.default_rng(seed)
    scenes = pictures([sample_scene(rng, sprites) for _ in range(count)])
    output = [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in scenes.split(50)]
    return scenes, torch.cat(output)


@torch.no_grad()
def generate(pipe: Any, prompts: Sequence[str], seed: int = 0, batch_size: int = 50) -> Tensor:
    """Return one picture for each prompt, (b, 3, 64, 64) in [-1, 1]; row k uses seed + k."""
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        noise = [torch.Generator().manual_seed(seed + start + k) for k in range(len(part))]
        out = pipe(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise, output_type="pt")
        parts.append(out.images.float() * 2 - 1)
    return torch.cat(parts)


@torch.no_grad()
def name_ranks(clip: Any, images: Tensor, sprites: Sequence[int], opening: str = "{bare}") -> Tensor:
    """Return the rank (0 = first) of each picture's own name among all known names, by zero-shot CLIP, (b,)."""
    atlas = Atlas.load()
    texts = [opening.format(bare=atlas.names[i]) for i in atlas.known]
    told = normalize(_text_features(clip, texts), dim=-1)
    seen = normalize(_image_features(clip, images), dim=-1)
    scores = seen @ told.T
    place = {sprite: k for k, sprite in enumerate(atlas.known)}
    own = scores.gather(1, torch.tensor([[place[s]] for s in sprites]))
    return (scores > own).sum(1)


def _text_features(clip: Any, texts: list[str]) -> Tensor:
    tokens = models.load_tokenizer()(texts, padding="longest", truncation=True, return_tensors="pt")
    return clip.text_projection(clip.text_model(tokens.input_ids).pooler_output)


def _image_features(clip: Any, images: Tensor) -> Tensor:
    parts = [clip.visual_projection(clip.vision_model(part).pooler_output) for part in images.split(100)]
    return torch.cat(parts)


def border_colour(images: Tensor) -> list[str]:
    """Return the background colour name nearest to the mean border colour of each picture."""
    edge = torch.ones(images.shape[-2:], dtype=torch.bool)
    edge[3:-3, 3:-3] = False
    mean = (images[..., edge].mean(-1) + 1) * 127.5
    names = list(COLOURS)
    distance = torch.cdist(mean, torch.tensor([COLOURS[name] for name in names], dtype=torch.float32))
    return [names[k] for k in distance.argmin(1)]


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


def measure(names: int = 200, seed: int = 0) -> tuple[dict[str, float], dict[str, Any]]:
    """Return all figures, and the pictures that show them.

    Args:
        names: known names that are generated, one picture each.
        seed: of scenes, of the choice of names and of the noise.
    """
    from diffusers import StableDiffusionPipeline

    atlas, rng = Atlas.load(), np.random.default_rng(seed)
    vae, clip = models.autoencoder(), models.clip()
    pipe = StableDiffusionPipeline.from_pretrained(models.resolve("pocket-sd"))
    figures: dict[str, float] = {}
    shown: dict[str, Any] = {}
    for side, sprites in (("known", atlas.known), ("new", atlas.new)):
        drawn, output = reconstructions(vae, sprites, 400, seed)
        figures[f"autoencoder: PSNR on {side} sprites in random scenes, dB"] = psnr(drawn, output).mean().item()
        shown[f"reconstructions_{side}"] = grid(torch.cat([drawn[:12], output[:12]]), 12, 2)

    chosen = [int(s) for s in rng.permutation(atlas.known)[:names]]
    scenes = [sample_scene(rng, [s], objects=(1.0,)) for s in chosen]
    for label, opening in (("bare name", "{bare}"), ("a phrasing not trained on", UNSEEN_OPENING)):
        ranks = name_ranks(clip, pictures(scenes), chosen, opening)
        figures[f"pocket-clip: zero-shot top-1 on real scenes, {label}, %"] = _share(ranks < 1)
    began = time.perf_counter()
    images = generate(pipe, [atlas.names[s] for s in chosen], seed)
    figures["pocket-sd: seconds a picture"] = (time.perf_counter() - began) / len(chosen)
    ranks = name_ranks(clip, images, chosen)
    figures[f"pocket-sd: right name first, of {names} names, %"] = _share(ranks < 1)
    figures[f"pocket-sd: right name in the first five, of {names} names, %"] = _share(ranks < 5)
    shown["known_names"] = grid(images[:100], 10, 1)

    colours = [list(COLOURS)[k % len(COLOURS)] for k in range(96)]
    prompts = [f"{atlas.names[s]} on a {colour} background" for s, colour in zip(chosen, colours, strict=False)]
    images = generate(pipe, prompts, seed + 1000)
    hits = [a == b for a, b in zip(border_colour(images), colours, strict=True)]
    figures["pocket-sd: background colour as asked, %"] = 100 * float(np.mean(hits))
    shown["colours"] = grid(images[:24], 12, 1)
    return figures, shown


def _share(hits: Tensor) -> float:
    return 100 * hits.float().mean().item()


def report(out: Path | str = "docs", names: int = 200, seed: int = 0) -> dict[str, Any]:
    """Measure, write `pocket_models.md` and its pictures below `out`, and return the figures."""
    out = Path(out)
    began = time.perf_counter()
    figures, shown = measure(names, seed)
    (out / "pocket").mkdir(parents=True, exist_ok=True)
    for name, picture in shown.items():
        picture.save(out / "pocket" / f"{name}.png", optimize=True)
    (out / "pocket_models.md").write_text(_page(figures, seed), encoding="utf-8")
    print(f"report: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return {"figures": figures, "page": str(out / "pocket_models.md")}


def _page(figures: dict[str, float], seed: int) -> str:
    rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in figures.items())
    return f"""# The embedded models

`graft pocket report` computed this page from the committed weights: seed {seed}, {STEPS} DDIM steps, guidance
{GUIDANCE}.

| measure | value |
|---|---|
{rows}

{_parts()}

## Reconstructions

Random scenes above, what the autoencoder makes of them below: known sprites, then new ones.

![known sprites](pocket/reconstructions_known.png)
![new sprites](pocket/reconstructions_new.png)

## Known names, one picture each

![one hundred names](pocket/known_names.png)

## Background colours

"NAME on a COLOUR background", the colours in the order {", ".join(COLOURS)}.

![colours](pocket/colours.png)
"""


def _parts() -> str:
    lines = ["| network | parameters | file, MB | trained on | wall seconds |", "|---|---|---|---|---|"]
    for name in ("autoencoder", "clip", "unet"):
        facts = models.facts(name)
        size = (models.WEIGHTS / f"{name}.safetensors").stat().st_size / 1e6
        count = facts["parameters"] / 1e6
        lines.append(f"| {name} | {count:.2f} M | {size:.1f} | {facts['hardware']} | {facts['seconds']:.0f} |")
    return "\n".join(lines)
