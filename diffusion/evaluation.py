"""How well an adapter shows its concept, and how much of the prompt survives.

Two numbers are always read together. *Image similarity* is the cosine between CLIP features of drawn and real pictures;
a copy machine would win it. *Text alignment* says whether the rest of the prompt is still obeyed: the cosine between
picture and prompt, and, measured in pixels and not by any model, whether the background has the colour that was asked
for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from graft.diffusion.previews import PreviewConfig, draw
from graft.studio.errors import InputError
from graft.studio.pocket import scenes

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase
    from graft.studio.adapter import Adapter

COLOURS = {name: scenes.COLOURS[name] for name in ("red", "yellow", "green", "blue", "black", "white")}
"""Colours that are asked for, as sRGB; they lie far apart, so that the nearest one is no matter of taste."""
FOLLOWED = 4
"""Pictures that an adapter of pictures is measured with."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What `evaluate` draws and measures with."""

    path: str = ""
    """Folder of real pictures, best ones that were not trained on. `graft eval` fills in those of the run."""
    clip: str = "pocket-clip"
    """CLIP that compares: pocket-clip, a transformers folder, or a hub id."""
    prompts: tuple[str, ...] = ("a photo of {}", "a picture of {}")
    """Prompts for image similarity; {} is the trigger."""
    background: str = "{} on a {colour} background"
    """Prompt for background alignment."""
    colours: tuple[str, ...] = ("red", "yellow", "green", "blue")
    """Colours asked for in turn."""
    class_word: str = "thing"
    """Stands for the trigger where the base or CLIP, which do not know it, read the prompt."""
    seeds: int = 4
    """Pictures of each prompt."""
    steps: int = 25
    """Denoiser calls per picture."""
    guidance: float = 3.0
    """Classifier-free guidance scale."""

    def __post_init__(self) -> None:
        unknown = [colour for colour in self.colours if colour not in COLOURS]
        if unknown or self.seeds < 1:
            raise InputError(
                str(unknown or self.seeds), "colours must be known, seeds at least 1", f"Known: {', '.join(COLOURS)}"
            )
        for prompt in (*self.prompts, self.background):
            try:
                prompt.format("word", colour="red")
            except (LookupError, ValueError):
                remedy = "Write {} for the concept, and {colour} in the background's prompt"
                raise InputError(f"prompt {prompt!r}", "its braces name something else", remedy) from None


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
            reason = f"no CLIP can be loaded from it ({(str(error).splitlines() or [type(error).__name__])[0]})"
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


def image_similarity(drawn: Tensor, real: Tensor) -> float:
    """Mean cosine between every drawn and every real picture: (a, d) and (b, d) unit features."""
    return float((drawn @ real.T).mean())


def background_alignment(pictures: Sequence[Image.Image], asked: Sequence[str]) -> float:
    """Share of pictures whose border is nearest to the colour that was asked for.

    The border is the outermost sixteenth on every side; its median colour is compared in sRGB with `COLOURS`.
    """
    names, table = list(COLOURS), np.array(list(COLOURS.values()), dtype=np.float64)
    right = 0
    for picture, colour in zip(pictures, asked, strict=True):
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
        rim = max(1, min(pixels.shape[:2]) // 16)
        border = np.ones(pixels.shape[:2], dtype=bool)
        border[rim:-rim, rim:-rim] = False
        median = np.median(pixels[border], axis=0)
        right += names[int(((table - median) ** 2).sum(1).argmin())] == colour
    return right / len(pictures)


def evaluate(
    base: DiffusionBase, adapter: Adapter | None, settings: EvaluationConfig, clip: Clip | None = None
) -> dict[str, float]:
    """Measures an adapter, or the base with the class word in the trigger's place.

    Args:
        base: the adapter's own.
        adapter: None measures the base.
        settings: pictures, prompts and CLIP.
        clip: a loaded CLIP to use instead of loading `settings.clip`.

    Returns:
        `image_similarity`, `text_alignment`, `background_alignment`.

    Raises:
        InputError: no folder of real pictures was named.
    """
    if not settings.path:
        raise InputError("eval.path", "there is nothing to compare with", "Name a folder of real pictures")
    clip = clip or Clip(settings.clip, base.device)
    pictures = _real(Path(settings.path))
    real = clip.images(pictures)
    word = settings.class_word if adapter is None else adapter.card.trigger or settings.class_word
    if adapter is None:
        return _measure(base, word, real, settings, clip)
    with adapter.attached(base) as handle:
        if hasattr(handle, "follow_files"):
            reason = "this adapter draws after a condition, and these measures show it none"
            raise InputError(
                "evaluate", reason, "Look at it with graft preview, or measure it with graft bench control"
            )
        if not hasattr(handle, "show"):
            return _measure(base, word, real, settings, clip)
        rows = []
        for i, picture in enumerate(pictures[:FOLLOWED]):  # an adapter of pictures is compared with what it follows
            handle.show([[picture]])
            rows.append(_measure(base, word, real[i : i + 1], settings, clip))
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _measure(base: DiffusionBase, word: str, real: Tensor, settings: EvaluationConfig, clip: Clip) -> dict[str, float]:
    config = PreviewConfig(steps=settings.steps, guidance=settings.guidance)
    seeds = range(settings.seeds)
    plain = [p.format(word) for p in settings.prompts]
    features = clip.images(sum(draw(base, plain, seeds, config), []))
    coloured = [settings.background.format(word, colour=colour) for colour in settings.colours]
    pictures = sum(draw(base, coloured, seeds, config), [])
    asked = [colour for colour in settings.colours for _ in seeds]
    told = [settings.background.format(settings.class_word, colour=colour) for colour in asked]
    return {
        "image_similarity": image_similarity(features, real),
        "text_alignment": float((clip.images(pictures) * clip.texts(told)).sum(-1).mean()),
        "background_alignment": background_alignment(pictures, asked),
    }


def _real(folder: Path) -> list[Image.Image]:
    """The folder's pictures, upright, on white."""
    from graft.diffusion.data import DataConfig, load_dataset
    from graft.studio.caches import Cache

    pixels = load_dataset(DataConfig(path=str(folder)), 224, Cache()).pixels[:, 0]
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]
