"""Variants of a picture: which part of it is cut, to which shape, mirrored or not, and how large it is shown.

All that is random comes from the variant's content key, so a variant is the same on every machine and may be cached;
which of its variants a picture shows is drawn anew at every step. The same variant cuts picture, condition map and
mask.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from graft.diffusion.buckets import Shape

CANVAS = (128, 128, 128)
"""On which small pictures are pasted: the autoencoder's zero."""
FAR, NEAR = ("a far away {}", "a very small {}"), ("a zoomed in {}", "a close up {}")
"""What a caption becomes where the picture is shown small or large."""


class Rescaling(NamedTuple):
    """How Custom Diffusion's augmentation shows a picture."""

    scale: float
    """Of its sides: below 1 it is pasted on an empty canvas, above 1 its middle fills the shape."""
    left: float
    """Where it is pasted, 0 to 1 of the free width."""
    top: float
    """The same for the height."""
    wording: str
    """What becomes of the caption, {} standing for it."""


def rescaling(key: str, number: int) -> Rescaling:
    """The rescaling of a variant: two in three are shown at 1/3 to 1 of the size, the others at 1.2 to 1.4.

    Args:
        key: of the variant; seeds the choice.
        number: of the variant.
    """
    dice = np.random.default_rng([int(key[:16], 16), 1])
    scale = float(dice.uniform(1 / 3, 1) if number % 3 < 2 else dice.uniform(1.2, 1.4))
    left, top = (float(place) for place in dice.random(2))
    words = FAR if scale < 0.6 else NEAR if scale > 1 else ("{}",)
    return Rescaling(scale, left, top, words[int(dice.integers(len(words)))])


def reworded(prompt: str, wording: str) -> str:
    """A prompt as `Rescaling.wording` has it: "a photo of a cat" becomes "a far away photo of a cat"."""
    return prompt if wording == "{}" else wording.format(re.sub(r"^(a|an|the)\s+", "", prompt, flags=re.IGNORECASE))


@dataclass(frozen=True)
class Variant:
    """One way to show a picture in a shape."""

    shape: Shape
    """Height and width in pixels."""
    key: str = ""
    """Of its content; seeds the random crop."""
    random: bool = False
    """Cut anywhere, not in the middle."""
    mirrored: bool = False
    """Left and right exchanged."""
    rescaling: Rescaling | None = None
    """Shown smaller or larger; None fills the shape."""

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """What is cut from a picture of this width and height: left, top, right and bottom."""
        (h, w), (width, height) = self.shape, size
        part = (min(width, height * w / h), min(height, width * h / w))
        dice = np.random.default_rng(int(self.key[:16] or "0", 16))
        along = dice.random(2) if self.random else np.full(2, 0.5)
        if self.rescaling and self.rescaling.scale > 1:
            part, along = (part[0] / self.rescaling.scale, part[1] / self.rescaling.scale), np.full(2, 0.5)
        left, top = (round((whole - own) * at) for whole, own, at in zip(size, part, along, strict=True))
        left, top = min(left, width - part[0]), min(top, height - part[1])
        return left, top, left + part[0], top + part[1]

    def place(self) -> tuple[int, int, int, int]:
        """Where the picture lies in the shape, before it is mirrored: left, top, width and height in pixels."""
        h, w = self.shape
        if self.rescaling is None or self.rescaling.scale > 1:
            return 0, 0, w, h
        width, height = (max(1, round(side * self.rescaling.scale)) for side in (w, h))
        return round((w - width) * self.rescaling.left), round((h - height) * self.rescaling.top), width, height

    def cut(self, image: Image.Image, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
        """The picture as it is trained on; so are its map and its mask, whose values NEAREST keeps as they are."""
        left, top, width, height = self.place()
        gap = None if resample == Image.Resampling.NEAREST else 3.0
        image = image.resize((width, height), resample, box=self.box(image.size), reducing_gap=gap)
        if (height, width) != self.shape:
            empty = CANVAS if image.mode == "RGB" else 0
            canvas = Image.new(image.mode, self.shape[::-1], empty)
            canvas.paste(image, (left, top))
            image = canvas
        return ImageOps.mirror(image) if self.mirrored else image

    def covered(self) -> Image.Image:
        """White where the picture lies in the shape, black on the canvas beside it."""
        left, top, width, height = self.place()
        cover = Image.new("L", self.shape[::-1], 0)
        cover.paste(255, (left, top, left + width, top + height))
        return ImageOps.mirror(cover) if self.mirrored else cover

    def told(self, size: tuple[int, int]) -> Tensor:
        """What Stable Diffusion XL is told of a picture of this width and height, (6,): its height and width, the top
        and left of the cut once the picture is scaled to the shape, and the shape."""
        (h, w), (width, height) = self.shape, size
        left, top, right, bottom = self.box(size)
        beside = width - right if self.mirrored else left
        corner = (round(top * h / (bottom - top)), round(beside * w / (right - left)))
        return torch.tensor([height, width, *corner, h, w], dtype=torch.float32)


def as_tensor(image: Image.Image) -> Tensor:
    """A picture as (c, h, w) uint8."""
    array = np.asarray(image).copy()
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1).contiguous()
