"""A frozen multimodal language model of transformers with what it needs to answer: its processor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from graft.studio.attention import refuse_xformers
from graft.studio.errors import BaseMismatchError, InputError
from graft.studio.frozen import FrozenModel
from graft.studio.pocket.qa import answer

if TYPE_CHECKING:
    from graft.studio.adapter import Card

REMEDY = "Give pocket-llava, a folder saved by transformers, or a hub id owner/name"


@dataclass(eq=False)
class MultimodalBase(FrozenModel):
    """A model that reads pictures and text and writes text, frozen and in evaluation mode.

    Example:
        >>> base = load_base("pocket-llava")  # doctest: +SKIP
        >>> base.answer([picture], ["what is this ?"])  # doctest: +SKIP
        ['red apple']
    """

    processor: Any
    """Pictures to pixel values, text to tokens, and the form of a conversation."""
    domain: str = field(default="llm_mm", init=False)
    """Registry name of this domain."""

    @property
    def is_llava(self) -> bool:
        """Whether it is LLaVA's plain form: what its tower says goes through the projector into the text's place."""
        from transformers import LlavaForConditionalGeneration

        return isinstance(self.model, LlavaForConditionalGeneration)

    @property
    def picture_settings(self) -> dict[str, Any]:
        """What its processor does to a picture before the model gets it (sizes, crop, colours); adapters carry it."""
        images = getattr(self.processor, "image_processor", None)
        told = {} if images is None else {k: v for k, v in images.to_dict().items() if k != "image_processor_type"}
        found: dict[str, Any] = json.loads(json.dumps(told, default=str))
        return found

    def check_card(self, card: Card) -> None:
        """Refuses an adapter that learnt from pictures of another size or crop.

        Raises:
            BaseMismatchError: naming what differs.
        """
        learnt, now = card.details.get("processor", {}), self.picture_settings
        off = [f"{key} was {learnt[key]} and is {now[key]}" for key in learnt if key in now and learnt[key] != now[key]]
        if off:
            given = f"adapter for {card.base or 'a base'}"
            reason = f"{self.name} shows pictures otherwise than in its training: {', '.join(off)}"
            raise BaseMismatchError(given, reason, "Set these in the base's processor as they were, or train anew")

    def answer(self, pictures: Sequence[Image.Image], questions: Sequence[str], batch_size: int = 100) -> list[str]:
        """Return the greedy answers, 16 tokens at most, to questions about pictures, one question for each."""
        import numpy as np

        shown = [np.array(picture.convert("RGB")) for picture in pictures]
        return answer(self.model, self.processor, shown, questions, batch_size)

    @torch.no_grad()
    def exercise(self) -> None:
        """Call the whole model once."""
        self.answer([Image.new("RGB", (64, 64))], ["what is this ?"])


def load_base(
    name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None, attention: str = "auto"
) -> MultimodalBase:
    """Load an embedded model, a folder, or a model from a hub.

    Args:
        name: `pocket-llava`; a folder saved by transformers; or a hub id `owner/name`.
        device: where it goes; None takes the accelerator if there is one.
        dtype: type of the weights; None is float32.
        attention: "auto" leaves it to transformers; "sdpa" takes torch's fused function.

    Raises:
        InputError: nothing of that name, another kind of model, or "xformers".
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from graft.llm_mm.resampler import register

    refuse_xformers(attention, "transformers")
    register()
    source = name
    if name.startswith("pocket-"):
        from graft.studio.pocket import resolve

        source = str(resolve(name))
    found = Path(source).expanduser().is_dir()
    source = str(Path(source).expanduser()) if found else source
    if not found and "/" not in source:  # no hub's either: asked for it, transformers tries for minutes
        raise InputError(name, "there is no such folder here, and no embedded model of that name", REMEDY)
    try:
        processor = AutoProcessor.from_pretrained(source)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(name, f"the base cannot be loaded ({lines[0]})", REMEDY) from error
    if attention == "sdpa":
        model.set_attn_implementation("sdpa")
    base = MultimodalBase(name, model, processor)
    if dtype not in (None, torch.float32):
        _ = base.hash  # the identity is that of the float32 weights
    nn.Module.to(model, device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)
    return base
