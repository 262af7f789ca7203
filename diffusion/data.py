"""Pictures and captions of one concept, read from a folder with every doubt settled before the first step.

Headers are read first, so a picture that claims 60,000 x 60,000 pixels is refused before a byte of it is decoded. All
problems of a folder are listed in one error. A phone's 12-megapixel JPEG is decoded once, at the reduced scale that the
format offers (`draft`), never smaller than twice the size needed, so that the difference cannot be seen.

Every picture is cut to one shape: a square or, with `buckets`, the shape of about that area that takes least off it.
Each variant of it is cached under the content of the file and all that was done to it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from graft.diffusion.buckets import Shape, nearest, shapes
from graft.diffusion.folder import Found, find
from graft.diffusion.variants import Variant, as_tensor, rescaling
from graft.studio.caches import Cache, content_key
from graft.studio.config import require
from graft.studio.errors import DataError, InputError
from graft.studio.pictures import BROKEN, alpha_of, checked_bytes, complaint, open_picture, upright_size

TRANSFORM = "pixels-1"  # part of every cache key: change it when `load_pixels` changes

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
    Condition maps: a `condition` column there, or the same name in a folder `conditions` beside the picture. Masks:
    name.mask.png beside it, or the same name in a folder `masks`."""
    caption: str | None = None
    """For pictures without a caption of their own. `{folder}` is the picture's folder, `{name}` its file's name,
    `{token}` the method's word for the concept; with `{caption}` in it, it is laid around the pictures' own captions
    too. None leaves the choice to the method's templates."""
    resolution: int = 0
    """Side of the square that is trained on, in pixels; 0 takes the base's own."""
    buckets: bool = False
    """Cut each picture to the shape of about that area that takes least off it, not to the square. Every batch is of
    one shape."""
    bucket_aspect: float = 2.0
    """Longest side over the shortest of these shapes, at most."""
    crop: Literal["centre", "random"] = "centre"
    """Which part is cut from a picture that is not of the shape. Random ones take several variants."""
    flip: bool = False
    """Mirror half of the variants. Off: most subjects have a left and a right."""
    variants: int = 1
    """How many crops and flips of each picture are prepared and cached; each step draws one of them."""
    mask: Literal["files", "alpha", "off"] = "files"
    """Where a picture's mask comes from: a file beside it, if there is one, or its own alpha channel."""
    mask_outside: float = 0.0
    """What a place outside the mask counts in the loss, where one inside counts 1."""
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
        require("data.bucket_aspect", self.bucket_aspect, 1 <= self.bucket_aspect <= 4, "1 to 4")
        require("data.variants", self.variants, 1 <= self.variants <= 64, "1 to 64")
        require("data.max_megapixels", self.max_megapixels, 0 < self.max_megapixels <= 1000, "above 0, up to 1000")
        share = self.validation
        require("data.validation", share, isinstance(share, str) or 0 <= share < 1, "a share below 1, or a folder")
        require("data.crop", self.crop, self.crop in ("centre", "random"), "centre or random")
        require("data.mask", self.mask, self.mask in ("files", "alpha", "off"), "files, alpha or off")
        require("data.mask_outside", self.mask_outside, 0 <= self.mask_outside <= 1, "0 to 1")
        if self.variants == 1 and (self.flip or self.crop == "random"):
            name = "data.flip" if self.flip else "data.crop = 'random'"
            raise InputError(name, "with one variant it would be the same at every step", "Set data.variants, say to 8")


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
    mask_digest: str = ""
    """SHA-256 of its mask's bytes, if it has one."""


@dataclass(frozen=True)
class Dataset:
    """Decoded pictures of one shape, ready for the encoder."""

    pictures: list[Picture]
    """In order of their paths."""
    pixels: Tensor
    """(p, k, 3, h, w) uint8: k variants of p pictures."""
    keys: list[list[str]]
    """Content key of every variant: picture bytes and transform."""
    sizes: Tensor
    """(p, k, 6) float: height and width of the picture, the top left corner of its crop once it is scaled to the shape,
    and the shape; what Stable Diffusion XL is told."""
    masks: Tensor | None = None
    """(p, k, 2, h, w) uint8: what the mask marks, and what the picture covers; None where everything is both."""
    wording: list[list[str]] | None = None
    """What becomes of the caption in each variant, {} standing for it; None where nothing does."""

    @property
    def shape(self) -> Shape:
        """Height and width of every picture."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    @property
    def digest(self) -> str:
        """SHA-256 of pictures, transforms, captions, maps and masks: what the card of a trained adapter names."""
        rows = zip(self.keys, self.pictures, strict=True)
        return content_key([[keys, p.caption, *filter(None, (p.condition_digest, p.mask_digest))] for keys, p in rows])


def load_dataset(config: DataConfig, resolution: int | Shape, cache: Cache) -> Dataset:
    """Reads, checks and decodes a folder, all of it in one shape.

    Args:
        config: where and how; `buckets` counts for nothing here.
        resolution: side in pixels when the config leaves it to the base, or the height and width themselves.
        cache: holds decoded pixels; a picture that is in it is not decoded again.

    Raises:
        DataError: listing every file that cannot be used.
    """
    if isinstance(resolution, tuple):
        return _load(config, (resolution,), cache)[0]
    return _load(config, ((config.resolution or resolution,) * 2,), cache)[0]


def load_buckets(
    config: DataConfig, resolution: int, multiple: int, cache: Cache, rescale: bool = False
) -> tuple[Dataset, ...]:
    """Reads, checks and decodes a folder: a data set for each shape that occurs, the one with most pictures first.

    Args:
        config: where and how.
        resolution: side in pixels when the config leaves it to the base.
        multiple: of pixels that sides must be.
        cache: holds decoded pixels.
        rescale: show the variants smaller and larger, as Custom Diffusion's augmentation does.

    Raises:
        InputError: one variant to be shown in several sizes.
        DataError: listing every file that cannot be used.
    """
    if rescale and config.variants == 1:
        raise InputError("method.augment", "one variant has one size at every step", "Set data.variants, say to 12")
    return _load(config, shapes_of(config, resolution, multiple), cache, rescale)


def shapes_of(config: DataConfig, resolution: int, multiple: int) -> tuple[Shape, ...]:
    """The shapes that pictures may be cut to, in steps no finer than a sixteenth of the square's side."""
    side = config.resolution or resolution
    if not config.buckets:
        return ((side, side),)
    return shapes(side, multiple * max(1, side // 16 // multiple), config.bucket_aspect)


class _Row(NamedTuple):
    """What one picture brings to a data set."""

    picture: Picture
    pixels: Tensor
    keys: list[str]
    sizes: Tensor
    masks: Tensor | None
    wording: list[str]


class _Fault(Exception):
    """What is wrong with a file beside a picture."""


def _load(config: DataConfig, among: tuple[Shape, ...], cache: Cache, rescale: bool = False) -> tuple[Dataset, ...]:
    problems: list[str] = []
    rows: dict[Shape, list[_Row]] = {}
    for found in find(config, problems):
        try:
            files = [_checked(each, config) for each in (found.path, found.condition, mask_of(found, config))]
            shape = nearest(upright_size(files[0]), among)
            rows.setdefault(shape, []).append(_row(found, files, shape, config, cache, rescale))
        except _Fault as fault:
            problems.append(str(fault))
        except BROKEN as error:
            problems.append(f"{found.path.relative_to(config.path)}: {complaint(error)}")
    if problems:
        many = f"{len(problems)} problem{'s' * (len(problems) > 1)}:"
        raise DataError(config.path, "\n  ".join([many, *problems]) + "\n", "Repair or remove what is listed")
    ordered = sorted(rows.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(_dataset(some, rescale) for _, some in ordered)


def mask_of(found: Found, config: DataConfig) -> Path | None:
    """The file of a picture's mask, if such files are used."""
    return found.mask if config.mask == "files" else None


def _checked(file: Path | None, config: DataConfig) -> bytes:
    if file is None:
        return b""
    try:
        return checked_bytes(file, config.max_megapixels)
    except BROKEN as error:
        raise _Fault(f"{file.relative_to(config.path)}: {complaint(error)}") from error


def _row(found: Found, files: list[bytes], shape: Shape, config: DataConfig, cache: Cache, rescale: bool) -> _Row:
    digest, condition, mask = (hashlib.sha256(each).hexdigest() if each else "" for each in files)
    ways = variants(digest, shape, config, rescale)
    pixels = [cache.get("pixels", each.key, partial(_decode, files[0], config.background, each)) for each in ways]
    size, masks = upright_size(files[0]), None
    if mask or rescale or config.mask == "alpha":
        if mask and (fault := mask_fault(files[2], size)):
            raise _Fault(
                f"{found.path.relative_to(config.path)}: its mask {found.mask.name if found.mask else ''} {fault}"
            )
        kind = mask or ("alpha" if config.mask == "alpha" else "")
        masks = torch.stack(
            [
                cache.get("masks", content_key("mask-1", kind, each.key), partial(_decode_mask, files, kind, each))[
                    "mask"
                ]
                for each in ways
            ]
        )
    return _Row(
        Picture(found.path, digest, found.caption, found.condition, condition, mask),
        torch.stack([each["pixels"] for each in pixels]),
        [each.key for each in ways],
        torch.stack([each.told(size) for each in ways]),
        masks,
        [each.rescaling.wording if each.rescaling else "{}" for each in ways],
    )


def variants(digest: str, shape: Shape, config: DataConfig, rescale: bool = False) -> list[Variant]:
    """The ways in which a picture is shown.

    Args:
        digest: of the file's bytes.
        shape: that it is cut to.
        config: how many, and what may differ.
        rescale: show them smaller and larger too.
    """
    side = shape[0] if shape[0] == shape[1] else list(shape)
    found = []
    for k in range(config.variants):
        parts = (TRANSFORM, digest, side, config.crop, config.flip, config.background, k)
        key = content_key(*parts, "rescaled-1") if rescale else content_key(*parts)
        found.append(_variant(shape, config, k, key, rescale))
    return found


def _variant(shape: Shape, config: DataConfig, k: int, key: str, rescale: bool = False) -> Variant:
    mirrored = config.flip and k % 2 == 1
    return Variant(shape, key, config.crop == "random", mirrored, rescaling(key, k) if rescale else None)


def _decode(data: bytes, background: str, variant: Variant) -> dict[str, Tensor]:
    return {"pixels": as_tensor(variant.cut(open_picture(data, background, near=max(variant.shape))))}


def _decode_mask(files: list[bytes], kind: str, variant: Variant) -> dict[str, Tensor]:
    """What is marked and what is covered, (2, h, w) uint8."""
    marked = None
    if kind == "alpha":
        marked = alpha_of(files[0])
    elif kind:
        marked = open_picture(files[2], "black").convert("L")
    cover = as_tensor(variant.covered())
    mark = cover if marked is None else as_tensor(variant.cut(marked, Image.Resampling.BILINEAR))
    return {"mask": torch.cat([mark, cover])}


def mask_fault(mask: bytes, size: tuple[int, int]) -> str | None:
    """What is wrong with a mask for a picture of this width and height, or None."""
    width, height = upright_size(mask)
    if abs(width / height * size[1] / size[0] - 1) > 0.01:
        return f"is {width} x {height} pixels, the picture {size[0]} x {size[1]}"
    if open_picture(mask, "black").convert("L").getextrema()[1] == 0:
        return "is black all over: nothing would be learnt"
    return None


def _dataset(rows: list[_Row], rescale: bool) -> Dataset:
    masks, pixels = None, torch.stack([row.pixels for row in rows])
    if any(row.masks is not None for row in rows):
        all_of_it = pixels.new_full((pixels.shape[1], 2, *pixels.shape[-2:]), 255)
        masks = torch.stack([all_of_it if row.masks is None else row.masks for row in rows])
    return Dataset(
        [row.picture for row in rows],
        pixels,
        [row.keys for row in rows],
        torch.stack([row.sizes for row in rows]),
        masks,
        [row.wording for row in rows] if rescale else None,
    )


def loss_weights(masks: Tensor, latents: Shape, outside: float) -> Tensor:
    """What each latent counts in the loss: (p, k, 2, h, w) uint8 -> (p, k, 1, h', w').

    A latent counts by the share m of it that is marked, outside + (1 - outside) m, and not at all where the picture
    does not cover it.

    Args:
        masks: what is marked, and what is covered.
        latents: height and width of the latents.
        outside: what a place that is not marked counts.
    """
    shares = F.interpolate(masks.flatten(0, 1).float() / 255, size=latents, mode="area").unflatten(0, masks.shape[:2])
    marked, covered = shares.split(1, 2)
    whole = (covered > 0.999).float()
    # A picture may be shown so small that it covers no latent wholly.
    whole = torch.where(whole.flatten(2).any(-1)[..., None, None, None], whole, covered)
    return (outside + (1 - outside) * marked) * whole


def load_pixels(
    data: bytes,
    side: int | Shape,
    config: DataConfig,
    variant: int = 0,
    key: str = "",
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Tensor:
    """One variant of a picture as (3, h, w) uint8.

    Args:
        data: the file's bytes.
        side: pixels of a square, or height and width.
        config: crop, flip and background.
        variant: number of the crop and flip.
        key: seeds the random crop, so that a variant is the same on every machine.
        resample: NEAREST keeps the values of a map that are names, not amounts.

    Raises:
        OSError: the picture is truncated or damaged.
    """
    shape = side if isinstance(side, tuple) else (side, side)
    near = 0 if resample == Image.Resampling.NEAREST else max(shape)
    return as_tensor(_variant(shape, config, variant, key).cut(open_picture(data, config.background, near), resample))
