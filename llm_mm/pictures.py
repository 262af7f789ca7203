"""Pictures as a model of transformers reads them: opened late, cropped or padded, and what a frozen tower says, kept.

What the image tower says of a picture never changes while the tower is frozen. So it is asked once for each picture,
and its answer is kept by the content of the picture, the tower and the processor's settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from graft.llm_mm.base import MultimodalBase
from graft.studio.caches import Cache, content_key
from graft.studio.errors import DataError
from graft.studio.pictures import BROKEN, check_header, checked_bytes, complaint, open_picture, upright_size

MEGAPIXELS = 120.0
"""Larger pictures are refused from their header."""
KEPT = 1 << 30
"""Bytes of the tower's answers that stay in memory; the others are read from the cache's files."""
READS = ("vision_feature_layer", "vision_feature_select_strategy")
"""What a model's config says of its tower's answers that is in no weight."""
TOGETHER = 64
"""Pictures that the tower sees at once."""


class PictureStore:
    """Opens pictures for one base.

    Args:
        base: frozen.
        fit: "crop" leaves the shape to the processor; "pad" makes a square first.
        background: behind transparent pictures.
        cache: of the tower's answers; None asks the tower every time.
    """

    def __init__(self, base: MultimodalBase, fit: str = "crop", background: str = "white", cache: Cache | None = None):
        self.base, self.fit, self.background, self.cache = base, fit, background, cache
        self.processor: Any = base.processor
        self.features_kept = cache is not None and base.is_llava
        self._answers: dict[str, Tensor] = {}
        self._keys: dict[str, str] = {}
        self._ids: dict[tuple[int, int], list[int]] = {}
        self._size = 0
        wide, high = (self._expanded(Image.new("RGB", size)) for size in ((96, 64), (64, 96)))
        self._fixed = wide if wide == high and base.is_llava else None
        image: Any = getattr(self.processor, "image_processor", None)
        self._settings = json.dumps(image.to_dict(), sort_keys=True, default=str) if image is not None else ""
        config: Any = base.model.config
        self._reads = str({name: getattr(config, name, None) for name in READS}) if base.is_llava else ""

    def open(self, picture: Any) -> Image.Image:
        """Returns a picture as RGB in the shape that the processor gets.

        Args:
            picture: a path, an array (h, w, 3) uint8, or a picture.

        Raises:
            DataError: a file that is no sound picture.
        """
        if isinstance(picture, str | Path):
            try:
                found = open_picture(checked_bytes(Path(picture), MEGAPIXELS), self.background)
            except BROKEN as error:
                raise DataError(str(picture), complaint(error), "Replace or remove it") from error
        else:
            found = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture.convert("RGB")
        return padded(found, self._mean()) if self.fit == "pad" else found

    def size(self, picture: Any) -> tuple[int, int]:
        """Returns width and height of what `open` returns; of a file, only the header is read.

        Raises:
            DataError: a file whose header is no picture's.
        """
        if isinstance(picture, str | Path):
            try:
                check_header(Path(picture), MEGAPIXELS)
                width, height = upright_size(Path(picture))
            except BROKEN as error:
                raise DataError(str(picture), complaint(error), "Replace or remove it") from error
        else:
            width, height = picture.shape[1::-1] if isinstance(picture, np.ndarray) else picture.size
        return (max(width, height),) * 2 if self.fit == "pad" else (width, height)

    def expand(self, picture: Any) -> list[int]:
        """Returns the ids that stand for a picture in a conversation: its size alone decides about them."""
        if self._fixed is not None:
            return self._fixed
        size = self.size(picture)
        if size not in self._ids:
            self._ids[size] = self._expanded(Image.new("RGB", size))
        return self._ids[size]

    def key(self, picture: Any) -> str:
        """Returns the SHA-256 of a picture's content."""
        name = str(picture) if isinstance(picture, str | Path) else ""
        if name and name in self._keys:
            return self._keys[name]
        content = Path(name).read_bytes() if name else np.asarray(picture).tobytes()
        found = hashlib.sha256(content).hexdigest()
        if name:
            self._keys[name] = found
        return found

    def inputs(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        """Returns what the model takes beside the ids, for pictures in the order of their places."""
        each = [self._processed(self.open(picture)) for picture in pictures]
        return {name: joined([one[name] for one in each]).to(self.base.device) for name in (each[0] if each else ())}

    def features(self, pictures: Sequence[Any]) -> Tensor:
        """Returns what the projector is given for pictures, (p, n, d), from memory, the cache or the tower."""
        keys = [self.key(picture) for picture in pictures]
        found = {key: self._answers.get(key) for key in keys}
        missing = {}
        for key, picture in zip(keys, pictures, strict=True):
            if found[key] is None:
                entry = self.cache.peek("vision", self._name(key)) if self.cache is not None else None
                if entry is None:
                    missing[key] = picture
                else:
                    found[key] = self._remember(key, entry["features"])
        names = list(missing)
        for start in range(0, len(names), TOGETHER):
            part = names[start : start + TOGETHER]
            told = self._asked([missing[key] for key in part])
            for key, answer in zip(part, told, strict=True):
                kept = answer.clone()
                if self.cache is not None:
                    kept = self.cache.get("vision", self._name(key), lambda kept=kept: {"features": kept})["features"]  # type: ignore[misc]
                found[key] = self._remember(key, kept)
        return torch.stack([answer for key in keys if (answer := found[key]) is not None]).to(self.base.device)

    def _remember(self, key: str, answer: Tensor) -> Tensor:
        if self._size + answer.nbytes <= KEPT:
            self._size += answer.nbytes
            self._answers[key] = answer
        return answer

    def _name(self, key: str) -> str:
        """Name of a cache entry: all that the answer depends on."""
        return content_key("vision-2", self.base.hash, self._reads, self._settings, self.fit, self.background, key)

    @torch.no_grad()
    def _asked(self, pictures: Sequence[Any]) -> Tensor:
        """The projector's input for pictures, by the model itself: (p, n, d), on the CPU."""
        model, seen = self.base.model, list[Tensor]()
        hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            model.model.get_image_features(**self.inputs(pictures))
        finally:
            hook.remove()
        return seen[0].float().cpu()

    def _processed(self, picture: Image.Image) -> dict[str, Tensor]:
        found = self.processor(images=[picture], text=[self._mark], add_special_tokens=False, return_tensors="pt")
        self._ids_of = found["input_ids"][0].tolist()
        beside = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
        return {name: found[name] for name in found if name not in beside}

    @property
    def _mark(self) -> str:
        return str(getattr(self.processor, "image_token", "<image>"))

    def _expanded(self, picture: Image.Image) -> list[int]:
        self._processed(picture)
        return list(self._ids_of)

    def _mean(self) -> tuple[int, int, int]:
        mean = getattr(getattr(self.processor, "image_processor", None), "image_mean", None) or [0.5] * 3
        red, green, blue = (round(255 * value) for value in mean)
        return red, green, blue


def padded(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Returns a picture in the middle of the smallest square around it."""
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Returns inputs of several pictures one behind the other; tiles (1, t, ...) are filled up with zeros."""
    if tensors[0].dim() >= 3 and tensors[0].shape[0] == 1 and len({t.shape[1:] for t in tensors}) > 1:
        most = max(t.shape[1] for t in tensors)
        tensors = [torch.cat([t, t.new_zeros(1, most - t.shape[1], *t.shape[2:])], 1) for t in tensors]
    return torch.cat(list(tensors))
