"""From a file to the square of pixels that an image tower sees: whole, or a random crop."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from graft.studio.errors import DataError
from graft.studio.labelled.sources import decoded
from graft.studio.pictures import BROKEN, complaint, opaque
from graft.vlm.base import Preprocess
from graft.vlm.data import DataConfig, Example


def load_view(example: Example, view: int, preprocess: Preprocess, config: DataConfig) -> Tensor:
    """One view of a picture, (3, size, size) uint8.

    Args:
        example: the picture.
        view: 0 is the whole picture as the model's own preprocessing shows it; others are random crops, each the same
            on every machine.
        preprocess: of the model.
        config: crops, mirroring and background.

    Raises:
        DataError: the picture is truncated or damaged.
    """
    try:
        image = decoded(example.read(), config.background)
    except BROKEN as error:
        raise DataError(example.name, f"it cannot be decoded ({complaint(error)})", "Repair or remove it") from error
    image = whole(image, preprocess) if view == 0 else _cropped(image, view, example.digest, preprocess, config)
    return _as_tensor(image)


def to_pixels(image: Image.Image, preprocess: Preprocess, background: str = "white") -> Tensor:
    """The whole of an opened picture of any mode, (3, size, size) uint8."""
    return _as_tensor(whole(opaque(ImageOps.exif_transpose(image), background), preprocess))


def _as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


def whole(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """The square that the model's own preprocessing shows."""
    size, resample = preprocess.size, Image.Resampling[preprocess.filter.upper()]
    width, height = image.size
    if preprocess.squash:
        return image.resize((size, size), resample)
    short = min(width, height)
    image = image.resize((int(size * width / short), int(size * height / short)), resample)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _cropped(image: Image.Image, view: int, digest: str, preprocess: Preprocess, config: DataConfig) -> Image.Image:
    """A crop of random area and shape, perhaps mirrored."""
    rng = np.random.default_rng([view, int(digest[:16], 16)])
    width, height = image.size
    area, shape = rng.uniform(config.crop, 1) * width * height, np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = min(width, (area * shape) ** 0.5), min(height, (area / shape) ** 0.5)
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    resample, size = Image.Resampling[preprocess.filter.upper()], preprocess.size
    image = image.resize((size, size), resample, box=(left, top, left + w, top + h))
    return ImageOps.mirror(image) if config.flip and rng.random() < 0.5 else image
