"""Condition maps: what a ControlNet is shown beside the prompt, made from the picture or read from a file.

Maps are kept as bytes, (c, h, w) uint8, cut and mirrored as the picture is: those that are made are made from the
finished variant, those that are read go through the same crop. One channel is an amount, three are a picture, and four
are a picture and a mask. `hint` turns them into what the network takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from graft.diffusion.buckets import Shape
from graft.diffusion.data import TRANSFORM, DataConfig, Dataset, Picture, load_dataset, load_pixels
from graft.diffusion.folder import CONDITIONS, find, map_beside
from graft.studio.caches import Cache, content_key
from graft.studio.errors import DataError, InputError
from graft.studio.pictures import BROKEN, checked_bytes, complaint, find_pictures, upright_size

THRESHOLDS = (100, 200)
"""Of Canny's gradients: edges begin above the second and go on above the first. The ControlNet authors' default."""


def _opencv() -> Any:
    try:
        import cv2
    except ModuleNotFoundError as error:
        reason = "maps are made from pictures by OpenCV, which is not installed"
        raise InputError("method.condition", reason, 'Run: pip install "graft-studio[diffusion]"') from error
    return cv2


def canny(picture: np.ndarray) -> np.ndarray:
    """Canny's edges, one pixel wide, 0 or 255: (h, w, 3) uint8 -> (h, w) uint8."""
    cv2 = _opencv()
    return np.asarray(cv2.Canny(np.ascontiguousarray(picture), *THRESHOLDS), np.uint8)


def soft_edge(picture: np.ndarray) -> np.ndarray:
    """Strength of the gradient after a little blur, the strongest at 255.

    The authors' soft edges are those of a network (HED); this one needs no weights.
    """
    cv2 = _opencv()
    smooth = cv2.GaussianBlur(np.asarray(picture, np.float32), (0, 0), 1.0)
    across, down = (cv2.Sobel(smooth, cv2.CV_32F, *order, ksize=3) for order in ((1, 0), (0, 1)))
    strength = np.hypot(across, down).max(axis=2)
    return (strength * (255 / max(float(strength.max()), 1.0))).round().astype(np.uint8)


def scribble(picture: np.ndarray) -> np.ndarray:
    """Edges of the blurred picture as lines three pixels thick: coarse, as a hand draws."""
    cv2 = _opencv()
    smooth = cv2.GaussianBlur(np.asarray(picture), (0, 0), 1.5)
    return np.asarray(cv2.dilate(cv2.Canny(smooth, *THRESHOLDS), np.ones((3, 3), np.uint8)), np.uint8)


MADE: dict[str, Callable[[np.ndarray], np.ndarray]] = {"canny": canny, "soft_edge": soft_edge, "scribble": scribble}
"""Conditions that are made from the picture."""
GIVEN = ("depth", "segmentation", "pose", "normal", "map")
"""Conditions that are read from files; "map" is any other."""
NAMES = ("segmentation",)
"""Those whose values are names: pixels are taken over as they are, not mixed."""
KINDS = (*MADE, *GIVEN, "inpaint")
"""All conditions. For "inpaint" the file is a mask, white where the picture is to be made anew."""


def hint(maps: Tensor) -> Tensor:
    """What a ControlNet takes: (b, c, h, w) of 0 to 255 -> (b, 3, h, w) in [0, 1]; masked places are -1."""
    maps = maps if maps.is_floating_point() else maps.float()
    if maps.shape[1] == 1:
        return (maps / 255).expand(-1, 3, -1, -1)
    return maps / 255 if maps.shape[1] == 3 else torch.where(maps[:, 3:] > 127, -1.0, maps[:, :3] / 255)


def picture_of(condition: Tensor) -> Image.Image:
    """A map to look at: (c, h, w) uint8; masked places are grey."""
    shown = hint(condition[None])[0]
    pixels = torch.where(shown < 0, 0.5, shown).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def condition_maps(dataset: Dataset, config: DataConfig, kind: str, cache: Cache) -> Tensor:
    """The map of every variant of every picture: (p, k, c, h, w) uint8.

    Args:
        dataset: the pictures.
        config: what they were read with.
        kind: one of `KINDS`.
        cache: holds decoded maps.

    Raises:
        DataError: listing every map that is missing, is of another size than its picture, or belongs to none.
    """
    if kind in MADE:
        return torch.stack([torch.stack([_made(kind, pixels) for pixels in row]) for row in dataset.pixels])
    problems = [*_misfits(dataset), *_strays(config)]
    if problems:
        files = sum(picture.condition is not None for picture in dataset.pictures)
        many = f"{len(dataset.pictures)} pictures, {files} of them with a {kind} map:"
        remedy = f"Put one map of each picture, of its size, into {CONDITIONS}/ beside it, under its name"
        raise DataError(config.path, "\n  ".join([many, *problems]) + "\n", remedy)
    rows = []
    for picture, keys, row in zip(dataset.pictures, dataset.keys, dataset.pixels, strict=True):
        read = partial(_read, picture, kind, dataset.shape, config)
        found = [cache.get("conditions", _key(picture, kind, key), partial(read, k, key)) for k, key in enumerate(keys)]
        maps = [entry["map"] for entry in found]
        if kind == "inpaint":
            maps = [torch.cat([pixels, mask[:1]]) for pixels, mask in zip(row, maps, strict=True)]
        rows.append(torch.stack(maps))
    return torch.stack(rows)


def as_squares(maps: Tensor, side: int) -> Tensor:
    """The middle of maps of any shape as squares: (p, c, h, w) -> (p, c, side, side), values taken over as they are."""
    edge = min(maps.shape[-2:])
    top, left = ((length - edge) // 2 for length in maps.shape[-2:])
    return F.interpolate(maps[..., top : top + edge, left : left + edge], size=side, mode="nearest-exact")


def maps_of_files(path: Path, kind: str, side: int | Shape, ready: bool = False) -> Tensor:
    """Maps to draw after, from a picture or a folder of them: (r, c, h, w) uint8.

    Args:
        path: of what `kind` is made from; for a kind that is given, of the map itself, or a folder of maps or of
            pictures with maps.
        kind: one of `KINDS`.
        side: pixels of a square, or height and width.
        ready: the files are finished maps of any kind.

    Raises:
        InputError: no such file, or it is no picture.
    """
    config = DataConfig(path=str(path if path.is_dir() else path.parent))
    if path.is_dir() and not ready and (kind not in GIVEN or (path / CONDITIONS).is_dir()):
        cache = Cache()
        return condition_maps(load_dataset(config, side, cache), config, kind, cache)[:, 0]
    files = find_pictures(path) if path.is_dir() else [path]
    try:
        data = [checked_bytes(file, config.max_megapixels) for file in files]
        loaded = [load_pixels(each, side, config, resample=_filter(kind if kind in NAMES else "")) for each in data]
        if not ready and kind == "inpaint":
            loaded = [
                torch.cat([pixels, _mask_of(file, side, config)]) for pixels, file in zip(loaded, files, strict=True)
            ]
    except BROKEN as error:
        raise InputError(f"condition {path}", complaint(error), "Give a picture, or a folder of them") from error
    if not loaded:
        raise InputError(f"condition {path}", "the folder holds no pictures", "Give a picture, or a folder of them")
    return torch.stack([_made(kind, pixels) if kind in MADE and not ready else pixels for pixels in loaded])


def _filter(kind: str) -> Image.Resampling:
    return Image.Resampling.NEAREST if kind in (*NAMES, "inpaint") else Image.Resampling.BICUBIC


def _made(kind: str, pixels: Tensor) -> Tensor:
    return torch.from_numpy(MADE[kind](pixels.permute(1, 2, 0).numpy()))[None]


def _key(picture: Picture, kind: str, key: str) -> str:
    return content_key("condition-1", TRANSFORM, picture.condition_digest, key, kind in (*NAMES, "inpaint"))


def _read(picture: Picture, kind: str, shape: Shape, config: DataConfig, variant: int, key: str) -> dict[str, Tensor]:
    assert picture.condition is not None
    return {"map": load_pixels(picture.condition.read_bytes(), shape, config, variant, key, _filter(kind))}


def _mask_of(file: Path, side: int | Shape, config: DataConfig) -> Tensor:
    mask = map_beside(file)
    if mask is None:
        raise InputError(f"condition {file}", "it has no mask", f"Put one into {CONDITIONS}/ beside it, under its name")
    return load_pixels(mask.read_bytes(), side, config, resample=Image.Resampling.NEAREST)[:1]


def _misfits(dataset: Dataset) -> Iterator[str]:
    """Pictures without a map, and maps that are not of their picture's size."""
    for picture in dataset.pictures:
        if picture.condition is None:
            yield f"{picture.path.name}: there is no {CONDITIONS}/{picture.path.name}"
            continue
        own, given = (upright_size(path.read_bytes()) for path in (picture.path, picture.condition))
        if own != given:
            sizes = f"{given[0]} x {given[1]} pixels, the picture {own[0]} x {own[1]}"
            yield f"{picture.path.name}: its map {picture.condition.name} is {sizes}"


def _strays(config: DataConfig) -> Iterator[str]:
    """Maps that belong to no picture of the folder, of whatever shape."""
    root = Path(config.path)
    used = {found.condition.resolve() for found in find(config, []) if found.condition is not None}
    for path in find_pictures(root):
        if CONDITIONS in path.relative_to(root).parts[:-1] and path.resolve() not in used:
            yield f"{path.relative_to(root)}: there is no picture of this name"
