"""Pictures of one part of a split, as the checkpoint wants them. No other part is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from graft.studio.caches import Cache, content_key
from graft.studio.labelled.sources import Item, LabelledConfig, Source, decoded, digest_of, listed
from graft.studio.pictures import BROKEN, complaint


@dataclass(frozen=True)
class DataConfig(LabelledConfig):
    """The `[data]` section of a job."""

    augment: Literal["none", "flip", "crop", "zoom"] = "none"
    """flip is a mirror image half of the time; zoom a random part of half the area or more, at its own aspect, for
    pictures that a mirror would spoil, such as digits; crop is both."""


@dataclass(frozen=True)
class Pictures:
    """The opened pictures of one part."""

    names: list[str]
    """Of the items."""
    pixels: Tensor
    """(n, 3, h, w) uint8, cropped and scaled as the checkpoint was evaluated."""
    labels: Tensor
    """(n,) long, places in the list of classes."""
    digests: list[str] = field(default_factory=list)
    """SHA-256 of each picture as it was stored."""

    def __len__(self) -> int:
        return len(self.names)


def load_part(
    source: Source,
    items: Sequence[Item],
    classes: Sequence[str],
    transform: Callable[[Image.Image], Tensor],
    key: object,
    cache: Cache,
    background: str = "white",
) -> Pictures:
    """Opens the given items of a source, and no other.

    Args:
        source: opens them.
        items: of one part.
        classes: names; a label is a place in them.
        transform: picture -> (3, h, w) uint8.
        key: JSON-able; whatever else the pixels depend on.
        cache: holds the decoded pixels of all items as one entry.
        background: behind transparent pictures.

    Raises:
        DataError: listing every picture that cannot be used.
    """
    place = {name: k for k, name in enumerate(classes)}
    stored: dict[str, Any] = {}
    problems: list[str] = []
    for item in items:
        try:
            stored[item.name] = source.read(item.name)
        except BROKEN as error:
            problems.append(f"{item.name}: {complaint(error)}")
    digests = [digest_of(data) for data in stored.values()]

    def decode() -> dict[str, Tensor]:
        rows = _transformed(stored, transform, background, problems)
        if problems:
            raise listed(source.where, problems, "Repair or remove what is listed")
        return {"pixels": torch.stack(rows)}

    if problems:
        decode()  # so that one message lists all of them
    entry = content_key("vision-1", digests, key, background)
    pixels = cache.get("vision", entry, decode)["pixels"] if items else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    labels = torch.tensor([place[item.label] for item in items], dtype=torch.long)
    return Pictures([item.name for item in items], pixels, labels, digests)


def _transformed(
    stored: Mapping[str, Any], transform: Callable[..., Tensor], background: str, problems: list[str]
) -> list[Tensor]:
    """Pixels of what can be decoded; complaints go to `problems`."""
    rows = []
    for name, data in stored.items():
        try:
            rows.append(transform(decoded(data, background)))
        except BROKEN as error:
            problems.append(f"{name}: {complaint(error)}")
    return rows
