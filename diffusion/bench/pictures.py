"""Pictures of one *new* sprite of the embedded world: what a user's folder of photos is to a real base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.scenes import COLOURS, SIZES, centred, portrait, render

GROUNDS = ("teal", "orange", "purple", "white", "brown")
"""Backgrounds of the five training pictures; none is asked for in the evaluation, so obeying it is no memory."""


def new_sprites(count: int, seed: int = 0) -> list[int]:
    """Atlas indices of sprites that no embedded model has seen, in a random order that the seed fixes."""
    return np.random.default_rng(seed).permutation(Atlas.load().new)[:count].tolist()


def training_pictures(sprite: int) -> list[Image.Image]:
    """Five 64 x 64 pictures on five backgrounds."""
    return [Image.fromarray(render(centred(sprite, colour))) for colour in GROUNDS]


def held_out_pictures(sprite: int) -> list[Image.Image]:
    """One 64 x 64 picture on every background; sizes and places are not those of the training pictures."""
    rng = np.random.default_rng([sprite, 2])
    return [Image.fromarray(render(portrait(rng, sprite, colour))) for colour in COLOURS]


def write_pictures(folder: Path, sprite: int, captions: bool = True) -> Path:
    """Writes the training pictures, with captions that say what a user would: the concept, and what is behind it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (picture, colour) in enumerate(zip(training_pictures(sprite), GROUNDS, strict=True)):
        picture.save(folder / f"{i}.png")
        if captions:
            article = "an" if colour[0] in "aeiou" else "a"
            (folder / f"{i}.txt").write_text(f"a photo of {{token}} on {article} {colour} background\n", "utf-8")
    return folder


def write_phone_photos(folder: Path, sprite: int, count: int = 5) -> Path:
    """Writes training pictures as 12-megapixel JPEG files: 4000 x 3000, the square in the middle, with grain."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(training_pictures(sprite)[:count]):
        photo = Image.new("RGB", (4000, 3000), picture.getpixel((0, 0)))
        photo.paste(picture.resize((3000, 3000), Image.Resampling.BICUBIC), (500, 0))
        grain = np.random.default_rng(i).normal(0, 4, (3000, 4000, 1))
        noisy = np.clip(np.asarray(photo, np.float32) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i}.jpg", quality=92)
    return folder


def nearest_match(picture: Image.Image, sprite: int) -> float:
    """How well a sprite is found in a picture, by pixels alone: PSNR in dB under its mask at the best size and place.

    No model judges it, so it also holds for a sprite that CLIP has never seen. A picture as rendered gives about 46 dB,
    the picture of another sprite about 11 dB.
    """
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255).permute(2, 0, 1)[None]
    best = float("inf")
    atlas = Atlas.load().pixels[sprite]
    for size in SIZES:
        if size < 28:
            continue
        small = np.asarray(Image.fromarray(atlas).resize((size, size), Image.Resampling.BILINEAR), np.float32) / 255
        mask = torch.from_numpy((small[..., 3] > 0.9).astype(np.float32))
        shape = torch.from_numpy(small[..., :3]).permute(2, 0, 1) * mask
        energy = F.conv2d(pixels.square().sum(1, keepdim=True), mask[None, None])
        cross = F.conv2d(pixels, shape[None])
        error = (energy - 2 * cross + shape.square().sum()) / (3 * mask.sum())
        best = min(best, float(error.min()))
    return float(-10 * np.log10(max(best, 1e-6)))
