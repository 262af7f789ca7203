"""CLIP's image tower, as IP-Adapter looks at pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from graft.diffusion.base import without_progress_bars
from graft.studio.adapter import base_hash
from graft.studio.caches import content_key
from graft.studio.errors import BaseMismatchError, InputError


class ImageEncoder:
    """A frozen CLIP image tower with its image processor.

    Example:
        >>> ImageEncoder("pocket-clip").features([picture], patches=False).shape  # doctest: +SKIP
        torch.Size([1, 192])
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
        from transformers.utils import logging

        self.name = source = str(Path(name).resolve()) if Path(name).is_dir() else name
        if name.startswith("pocket-"):
            from graft.studio.pocket import resolve

            source = str(resolve(name))
        loud = logging.get_verbosity()
        logging.set_verbosity_error()  # a whole CLIP has a text tower too, which is no news
        try:
            with without_progress_bars():
                load = CLIPVisionModelWithProjection.from_pretrained
                self.model = load(source, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = f"no CLIP image tower can be loaded ({(str(error).splitlines() or [type(error).__name__])[0]})"
            raise InputError(name, reason, "Give pocket-clip, a folder of transformers, or a hub id") from error
        finally:
            logging.set_verbosity(loud)
        self.model.to(device).eval().requires_grad_(False)
        try:
            self.processor = CLIPImageProcessor.from_pretrained(source)
        except OSError:  # folders beside IP-Adapter files hold none: diffusers takes CLIP's own then
            side = self.model.config.image_size
            self.processor = CLIPImageProcessor(size=side, crop_size=side)

    @cached_property
    def hash(self) -> str:
        """Identity of the weights and of what is done to pictures before."""
        return content_key(base_hash({"image_encoder": self.model}), self.processor.to_dict())

    def width(self, patches: bool) -> int:
        """Width of the features."""
        config = self.model.config
        return int(config.hidden_size if patches else config.projection_dim)

    def features(self, pictures: Sequence[Image.Image], patches: bool) -> Tensor:
        """Features of pictures, float32.

        Args:
            pictures: of any size; the middle square is looked at.
            patches: the last layer but one, (b, n, w), instead of the projected feature, (b, d).
        """
        return self._encode(self.processor(list(pictures), return_tensors="pt")["pixel_values"], patches)

    def absent(self, patches: bool) -> Tensor:
        """What stands for no picture: a zero feature (1, d), or the patches (1, n, w) of pixel values that are zero."""
        side = self.model.config.image_size
        found = self._encode(torch.zeros(1, self.model.config.num_channels, side, side), patches)
        return found if patches else torch.zeros_like(found)

    @torch.no_grad()
    def _encode(self, pixels: Tensor, patches: bool) -> Tensor:
        device = self.model.device
        with torch.autocast(device.type, enabled=False):
            told = self.model(pixels.to(device, self.model.dtype), output_hidden_states=patches)
        found: Tensor = told.hidden_states[-2] if patches else told.image_embeds
        return found.float()

    def save(self, folder: Path) -> Path:
        """Writes tower and processor as a folder of transformers."""
        with without_progress_bars():
            self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return folder


@lru_cache(maxsize=1)
def image_encoder(name: str, device: torch.device) -> ImageEncoder:
    """The encoder of a name, kept until another one is asked for: training, samples and previews use the same."""
    return ImageEncoder(name, device)


def same_encoder(name: str, device: torch.device, details: Mapping[str, Any]) -> ImageEncoder:
    """The encoder that an adapter's card names.

    Raises:
        BaseMismatchError: it has other weights now, or another processor.
    """
    encoder, wanted = image_encoder(name, device), details.get("image_encoder_hash")
    if wanted and encoder.hash != wanted:
        given = f"image encoder {name} with hash {encoder.hash}"
        raise BaseMismatchError(given, f"the adapter was trained with {wanted}", "bring that one back")
    return encoder


def as_picture(pixels: Tensor) -> Image.Image:
    """(3, h, w) uint8 as a picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
