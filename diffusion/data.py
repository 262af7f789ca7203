"""Pictures and captions of one concept, read from a folder with every doubt settled before the first step.

Headers are read first, so a picture that claims 60,000 x 60,000 pixels is refused before a byte of it is decoded. All
problems of a folder are listed in one error. A phone's 12-megapixel JPEG is decoded once, at the reduced scale that the
format offers (`draft`), never smaller than twice the size needed, so that the difference cannot be seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from graft.studio.caches import Cache, content_key
from graft.studio.config import require
from graft.studio.errors import DataError
from graft.studio.pictures import BROKEN, SUFFIXES, checked_bytes, complaint, find_pictures, open_picture

TRANSFORM = "pixels-1"  # part of every cache key: change it when `load_pixels` changes
CONDITIONS = "conditions"
"""Sub-folder beside pictures: condition maps under their names, which are no pictures to learn from."""

TEMPLATES = {
    "object": (
        "a photo of {}",
        "a picture of {}",
        "an image of {}",
        "a drawing of {}",
        "a close-up of {}",
        "a photo of the {}",
        "a picture of one {}",
        "{}",
    ),
    "style": (
        "a picture in the style of {}",
        "a painting in the style of {}",
        "a drawing in the style of {}",
        "an image in the style of {}",
        "a photo in the style of {}",
        "{} style",
    ),
}
"""Prompts for pictures without a caption; {} is the method's word for the concept."""


@dataclass(frozen=True)
class DataConfig:
    """The `[data]` section of a job."""

    path: str
    """Folder of pictures, searched with its sub-folders. Captions: metadata.jsonl, or name.txt beside name.jpg.
    Condition maps: a `condition` column there, or the same name in a folder `conditions` beside the picture."""
    caption: str | None = None
    """For pictures without a caption of their own. `{folder}` is the picture's folder, `{token}` the method's word for
    the concept. None leaves the choice to the method's templates."""
    resolution: int = 0
    """Side of the square that is trained on, in pixels; 0 takes the base's own."""
    crop: Literal["centre", "random"] = "centre"
    """Which square is cut from a picture that is not square."""
    flip: bool = False
    """Mirror half of the variants. Off: most subjects have a left and a right."""
    variants: int = 1
    """How many crops and flips of each picture are prepared and cached."""
    validation: float | str = 0.0
    """Share of the pictures that are held out from training, or a folder of other pictures: what `train.validate_every`
    and `graft eval` measure on. Which pictures a share takes depends on their bytes alone."""
    background: str = "white"
    """What transparent pictures are laid on: a colour name or #rrggbb."""
    max_megapixels: float = 120.0
    """Larger pictures are refused from their header."""

    def __post_init__(self) -> None:
        fits = self.resolution == 0 or 16 <= self.resolution <= 4096
        require("data.resolution", self.resolution, fits, "0, or 16 to 4096")
        require("data.variants", self.variants, 1 <= self.variants <= 64, "1 to 64")
        require("data.max_megapixels", self.max_megapixels, 0 < self.max_megapixels <= 1000, "above 0, up to 1000")
        share = self.validation
        require("data.validation", share, isinstance(share, str) or 0 <= share < 1, "a share below 1, or a folder")
        require("data.crop", self.crop, self.crop in ("centre", "random"), "centre or random")


@dataclass(frozen=True)
class Picture:
    """A picture that is known to open, with what identifies it."""

    path: Path
    """Where it lies."""
    digest: str
    """SHA-256 of the file's bytes."""
    caption: str | None
    """Its own caption, or the configured one; None leaves it to the method."""
    condition: Path | None = None
    """File of its condition map, if it has one."""
    condition_digest: str = ""
    """SHA-256 of that file's bytes."""


@dataclass(frozen=True)
class Dataset:
    """Decoded pictures, ready for the encoder."""

    pictures: list[Picture]
    """In order of their paths."""
    pixels: Tensor
    """(p, k, 3, h, w) uint8: k variants of p pictures."""
    keys: list[list[str]]
    """Content key of every variant: picture bytes and transform."""

    @property
    def digest(self) -> str:
        """SHA-256 of pictures, transforms, captions and condition maps: what the card of a trained adapter names."""
        rows = zip(self.keys, self.pictures, strict=True)
        return content_key([[keys, p.caption, *([p.condition_digest] if p.condition else [])] for keys, p in rows])


def load_dataset(config: DataConfig, resolution: int, cache: Cache) -> Dataset:
    """Reads, checks and decodes a folder.

    Args:
        config: where and how.
        resolution: side in pixels when the config leaves it to the base.
        cache: holds decoded pixels; a picture that is in it is not decoded again.

    Raises:
        DataError: listing every file that cannot be used.
    """
    side = config.resolution or resolution
    problems: list[str] = []
    pictures, keys, pixels = [], [], []
    for path, caption, condition in _found(config, problems):
        file = condition or path  # whose fault it is
        try:
            mapped = checked_bytes(condition, config.max_megapixels) if condition else b""
            file = path
            data = checked_bytes(path, config.max_megapixels)
            digest = hashlib.sha256(data).hexdigest()
            row = [content_key(TRANSFORM, digest, side, config.crop, config.flip, config.background, k)
                   for k in range(config.variants)]  # fmt: skip
            decoded = [
                cache.get("pixels", key, _decoder(data, side, config, k, key))["pixels"] for k, key in enumerate(row)
            ]
        except BROKEN as error:
            problems.append(f"{file.relative_to(config.path)}: {complaint(error)}")
            continue
        told = hashlib.sha256(mapped).hexdigest() if condition else ""
        pictures.append(Picture(path, digest, caption, condition, told))
        keys.append(row)
        pixels.append(torch.stack(decoded))
    if problems:
        many = f"{len(problems)} problem{'s' * (len(problems) > 1)}:"
        raise DataError(config.path, "\n  ".join([many, *problems]) + "\n", "Repair or remove what is listed")
    return Dataset(pictures, torch.stack(pixels), keys)


def _decoder(data: bytes, side: int, config: DataConfig, variant: int, key: str) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixels": load_pixels(data, side, config, variant, key)}


def _found(config: DataConfig, problems: list[str]) -> list[tuple[Path, str | None, Path | None]]:
    """Pictures of the folder with their captions and condition maps; complaints go to `problems`."""
    root = Path(config.path)
    if not root.is_dir():
        raise DataError(config.path, "there is no such folder", "Give data.path a folder of pictures")
    own, maps = _metadata(root, problems)
    listed = {path.resolve() for path in maps.values()}
    paths = [
        path
        for path in find_pictures(root)
        if CONDITIONS not in path.relative_to(root).parts[:-1] and path.resolve() not in listed
    ]
    if not paths:
        kinds = ", ".join(sorted(SUFFIXES))
        raise DataError(config.path, f"the folder holds no pictures ({kinds})", "Put the pictures there")
    return [
        (
            path,
            own.get(path.resolve()) or _beside(path, problems) or _configured(path, config),
            maps.get(path.resolve()) or map_beside(path),
        )
        for path in paths
    ]


def map_beside(path: Path) -> Path | None:
    """The condition map of a picture in the folder `conditions` beside it: its name, or that with another ending."""
    folder = path.parent / CONDITIONS
    names = [path.name, *(path.stem + suffix for suffix in sorted(SUFFIXES))]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _metadata(root: Path, problems: list[str]) -> tuple[dict[Path, str], dict[Path, Path]]:
    """Captions and condition maps of metadata.jsonl: per line an object with `file_name`, and `text` or `condition`."""
    file = root / "metadata.jsonl"
    captions: dict[Path, str] = {}
    maps: dict[Path, Path] = {}
    if not file.exists():
        return captions, maps
    for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            target, text = (root / entry["file_name"]).resolve(), entry.get("text", entry.get("caption"))
            told = root / entry["condition"] if "condition" in entry else None
        except (ValueError, KeyError, TypeError):
            problems.append(f'{file.name}:{number}: expected {{"file_name": "...", "text": "..."}}')
            continue
        if not target.is_relative_to(root.resolve()):
            problems.append(f"{file.name}:{number}: {entry['file_name']} lies outside the folder")
        elif not target.is_file():
            problems.append(f"{file.name}:{number}: there is no {entry['file_name']}")
        elif told is not None and not told.resolve().is_relative_to(root.resolve()):
            problems.append(f"{file.name}:{number}: {entry['condition']} lies outside the folder")
        elif told is not None and not told.is_file():
            problems.append(f"{file.name}:{number}: there is no {entry['condition']}")
        elif told is None and (not isinstance(text, str) or not text.strip()):
            problems.append(f"{file.name}:{number}: no text")
        else:
            captions |= {target: text.strip()} if isinstance(text, str) and text.strip() else {}
            maps |= {target: told} if told is not None else {}
    return captions, maps


def _beside(path: Path, problems: list[str]) -> str | None:
    file = path.with_suffix(".txt")
    if not file.exists():
        return None
    try:
        return file.read_text("utf-8").strip() or None
    except UnicodeDecodeError:
        problems.append(f"{file.name}: the caption is not UTF-8 text")
        return None


def _configured(path: Path, config: DataConfig) -> str | None:
    """The template with `{folder}` filled in; `{token}` is left for the method."""
    if config.caption is None:
        return None
    return config.caption.replace("{folder}", path.parent.resolve().name.replace("_", " ")).strip() or None


def load_pixels(
    data: bytes,
    side: int,
    config: DataConfig,
    variant: int = 0,
    key: str = "",
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Tensor:
    """One variant of a picture as (3, side, side) uint8.

    Args:
        data: the file's bytes.
        side: pixels.
        config: crop, flip and background.
        variant: number of the crop and flip.
        key: seeds the random crop, so that a variant is the same on every machine.
        resample: NEAREST keeps the values of a map that are names, not amounts.

    Raises:
        OSError: the picture is truncated or damaged.
    """
    amounts = resample != Image.Resampling.NEAREST
    image = open_picture(data, config.background, near=side if amounts else 0)
    edge = min(image.size)
    dice = np.random.default_rng(int(key[:16] or "0", 16))
    along = dice.random(2) if config.crop == "random" else np.full(2, 0.5)
    left, top = (int(round((length - edge) * at)) for length, at in zip(image.size, along, strict=True))
    box = (left, top, left + edge, top + edge)
    image = image.resize((side, side), resample, box=box, reducing_gap=3.0 if amounts else None)
    if config.flip and variant % 2:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()
