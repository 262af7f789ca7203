"""Models that look at pictures for a measure: CLIP, which reads texts too, and DINO or any other vision model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from graft.diffusion.base import without_progress_bars
from graft.studio.errors import InputError


class Clip:
    """Unit features of pictures and texts.

    Example:
        >>> clip = Clip("pocket-clip")  # doctest: +SKIP
        >>> clip.images([picture]) @ clip.texts(["a red apple"]).T  # doctest: +SKIP
    """

    def __init__(self, name: str = "pocket-clip", device: str | torch.device = "cpu"):
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        source = name
        if name.startswith("pocket-"):
            from graft.studio.pocket import resolve

            source = str(resolve(name))
        try:
            self.model = CLIPModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
            self.model.to(device).eval().requires_grad_(False)
            self.processor = CLIPImageProcessor.from_pretrained(source)
            self.tokenizer = CLIPTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = f"no CLIP can be loaded from it ({_first(error)})"
            raise InputError(name, reason, "Give pocket-clip, a transformers CLIP folder, or a hub id") from error

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(b, d) unit features."""
        pixels = self.processor(list(pictures), return_tensors="pt")["pixel_values"].to(self.model.device)
        return F.normalize(_features(self.model.get_image_features(pixel_values=pixels)), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(b, d) unit features."""
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids.to(self.model.device)
        return F.normalize(_features(self.model.get_text_features(input_ids=ids)), dim=-1).cpu()


def _features(output: Any) -> Tensor:
    # transformers 5 returns an output object, earlier ones the tensor itself
    return output if isinstance(output, Tensor) else output.pooler_output


class Eye:
    """Unit features of pictures by a model that reads no texts.

    Args:
        name: pocket-vit; a timm name, folder or hub id `timm/...`, whose features are what its classifier is given; or
            a folder or hub id of transformers, such as `facebook/dinov2-base`, whose feature is the class token's.
        device: where it runs.
    """

    def __init__(self, name: str = "pocket-vit", device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        if _is_transformers(name):
            self.model, self.processor = _from_transformers(name, "AutoModel")
            self.model.to(self.device)
        else:
            from graft.studio.registry import load_base

            self.model, self.processor = load_base(name, str(device), domain="vision"), None

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(b, d) unit features."""
        some = [picture.convert("RGB") for picture in pictures]
        if self.processor is None:
            pixels = self.model.normalise(torch.stack([self.model.pixels(picture) for picture in some]))
            model = self.model.model
            return F.normalize(model.forward_head(model.forward_features(pixels), pre_logits=True), dim=-1).cpu()
        pixels = self.processor(some, return_tensors="pt")["pixel_values"].to(self.device)
        states = self.model(pixel_values=pixels).last_hidden_state  # (b, n, d), or of a convolutional one (b, d, h, w)
        return F.normalize(states[:, 0] if states.dim() == 3 else states.mean((2, 3)), dim=-1).cpu()


class MapReader:
    """Reads depth or labels from drawings by a model of transformers, to compare them with the map asked for."""

    def __init__(self, name: str, kind: str, device: str | torch.device = "cpu"):
        of = {"depth": "AutoModelForDepthEstimation", "segmentation": "AutoModelForSemanticSegmentation"}
        self.kind = kind
        self.model, self.processor = _from_transformers(name, of[kind])
        self.model.to(device)

    @torch.no_grad()
    def read(self, picture: Image.Image) -> Any:
        """(h, w) at the picture's size: depths, or label numbers."""
        pixels = self.processor([picture.convert("RGB")], return_tensors="pt")["pixel_values"].to(self.model.device)
        output = self.model(pixel_values=pixels)
        found = output.predicted_depth[:, None] if self.kind == "depth" else output.logits
        found = F.interpolate(found.float(), picture.size[::-1], mode="bilinear")[0]
        return (found[0] if self.kind == "depth" else found.argmax(0)).cpu().numpy()


def _is_transformers(name: str) -> bool:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return (folder / "config.json").is_file() and '"architecture"' not in (folder / "config.json").read_text()
    return "/" in name and not name.startswith(("timm/", "hf-hub:"))


def _from_transformers(name: str, kind: str) -> tuple[Any, Any]:
    """A frozen model and its image processor.

    Raises:
        InputError: there is none.
    """
    import transformers

    try:
        with without_progress_bars():
            model = getattr(transformers, kind).from_pretrained(name, dtype=torch.float32, use_safetensors=True)
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"no model can be loaded from it as transformers' {kind} ({_first(error)})"
        raise InputError(name, reason, "Give a folder or hub id of transformers with its image processor") from error
    return model.eval().requires_grad_(False), processor


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@lru_cache(maxsize=2)
def clip_of(name: str, device: torch.device) -> Clip:
    """A CLIP, kept: the base and the adapter are looked at by the same."""
    return Clip(name, device)


@lru_cache(maxsize=2)
def eye_of(name: str, device: torch.device) -> Eye:
    """An eye, kept."""
    return Eye(name, device)
