"""What the methods of this domain share: sites and learning rates by part, and a merged model as a folder.

LoRA, DoRA, LoRA-FA, O-LoRA, (IA)3, ladder side-tuning, prefix and prompt tuning are those of `graft.studio.methods`;
here they are told which part of the model to stay in, by the whole path of a layer, and leave out layers whose output
nobody reads.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from graft.llm_mm.parts import PARTS, is_dead, part_of
from graft.studio.config import require
from graft.studio.disk import require_empty
from graft.studio.errors import GraftError, SiteError
from graft.studio.methods.dora import DoRA
from graft.studio.methods.ia3 import IA3
from graft.studio.methods.ladder_side_tuning import LadderSideTuning
from graft.studio.methods.lora import LoRA
from graft.studio.methods.lora_fa import LoRAFA
from graft.studio.methods.o_lora import OrthogonalLoRA
from graft.studio.methods.prefix_tuning import PrefixTuning
from graft.studio.methods.prompt_tuning import PromptTuning
from graft.studio.sites import Model, Plan

if TYPE_CHECKING:
    from graft.llm_mm.base import MultimodalBase
    from graft.studio.adapter import Adapter

log = logging.getLogger(__name__)
TRAIN: Mapping[str, Any] = {"batch_size": 16, "schedule": "cosine", "warmup_steps": 10}
"""What a job's `[train]` says where the user does not."""


class MultimodalMethod:
    """Mixin of the methods on sites; `towers` names parts of `graft.llm_mm.parts`, whatever the model's classes."""

    default_learning_rate: ClassVar[float] = 1e-3
    """Peak of AdamW."""
    train_defaults: ClassVar[Mapping[str, Any]] = TRAIN
    towers: tuple[str, ...] | None

    def sites(self, model: Model) -> Plan:
        """Returns the sites that the targets name in these parts, without those that do nothing.

        Raises:
            SiteError: there are none.
        """
        if self.towers is not None:
            for part in self.towers:
                require("method.towers", part, part in PARTS, f"some of {', '.join(PARTS)}")
            found: Plan = replace(self, towers=None).sites(model)  # type: ignore[type-var]
            kept = tuple(site for site in found if part_of(site.name) in self.towers)
        else:
            found = super().sites(model)  # type: ignore[misc]
            root = model if isinstance(model, nn.Module) else next(iter(model.values()))
            kept = tuple(site for site in found if not is_dead(site.name, root))
        if not kept:
            there = sorted({part_of(site.name) for site in found})
            reason = f"the targets name nothing that acts in {', '.join(self.towers or PARTS)}"
            raise SiteError(f"method.towers {self.towers}", reason, f"They name layers in {', '.join(there)}")
        return Plan(kept)

    def rates(self) -> dict[str, float]:
        """Returns the learning rate of each part."""
        return dict.fromkeys((*PARTS, "other"), self.default_learning_rate)

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes the adapter for another library, or with "transformers" the model with the adapter in its weights."""
        if format != "transformers":
            found: list[Path] = super().export(adapter, folder, format)  # type: ignore[misc]
            return found
        from graft.llm_mm.base import load_base

        base = load_base(adapter.card.base, "cpu")
        with adapter.attached(base) as handle:
            off = save_merged(base, handle, folder)
        print(f"logits are within {off:.2g} of the attached adapter's", file=sys.stderr, flush=True)
        return sorted(folder.iterdir())


def save_base(base: MultimodalBase, folder: Path) -> Path:
    """Writes the model, as it is now, and its processor as the folder that transformers loads.

    Raises:
        InputError: the folder is not empty.
    """
    require_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base.model.save_pretrained(folder)
    base.processor.save_pretrained(folder)
    return folder


def save_merged(base: MultimodalBase, handle: Any, folder: Path) -> float:
    """Merges in float32, writes the model, loads it again and compares its logits with those of the attached adapter.

    Returns:
        The largest difference of a logit, as a share of the largest logit.

    Raises:
        InputError: the folder is not empty.
        SiteError: the method is no change of weights.
        GraftError: the merged model answers differently; it is left where it was written.
    """
    from graft.llm_mm.base import load_base

    require_empty(folder)
    attached = sample_logits(base)
    handle.merge()
    save_base(base, folder)
    merged = sample_logits(load_base(str(folder), base.device))
    off = float((attached - merged).abs().max() / attached.abs().max().clamp(min=1e-9))
    log.info(
        "logits of the merged model against the attached adapter: largest difference %.2g of the largest logit", off
    )
    if off > 1e-3:
        reason = f"the merged model's logits differ by {off:.2g} of the largest one"
        raise GraftError(f"{folder}: {reason}; use the adapter beside its base")
    return off


@torch.no_grad()
def sample_logits(base: MultimodalBase) -> Tensor:
    """Logits of the whole model for three pictures (black, white, a wedge) and a question, (3, n, vocabulary)."""
    import numpy as np

    from graft.llm_mm.conversations import Conversation, Turn, Writer
    from graft.llm_mm.pictures import PictureStore

    store, writer = PictureStore(base), Writer(base.processor)
    wedge = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 64, 3))
    shown = [np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8), np.ascontiguousarray(wedge)]
    rows = [Conversation(k, (Turn("user", (0, "what is this ?")),), (each,)) for k, each in enumerate(shown)]
    return torch.cat([whole_logits(base, store, writer.prompt(row, store.expand), row.pictures) for row in rows])


def whole_logits(base: MultimodalBase, store: Any, ids: Sequence[int], pictures: Sequence[Any]) -> Tensor:
    """Logits of one sequence by the model itself, (1, n, vocabulary), on the CPU."""
    tokens = torch.tensor([list(ids)], device=base.device)
    found: Tensor = base.model(**model_inputs(base, tokens, torch.ones_like(tokens), store.inputs(pictures))).logits
    return found.float().cpu()


def model_inputs(
    base: MultimodalBase, ids: Tensor, mask: Tensor | None, pictures: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What a whole model is called with, beside `use_cache`: some want to know which tokens are a picture's."""
    import inspect

    given = {"input_ids": ids, "attention_mask": mask, **pictures}
    own = base.model.get_base_model() if hasattr(base.model, "get_base_model") else base.model  # in peft's, the model
    if "mm_token_type_ids" in inspect.signature(own.forward).parameters and pictures:
        image = base.processor.tokenizer.convert_tokens_to_ids(base.processor.image_token)
        given["mm_token_type_ids"] = (ids == image).int()
    return given


@dataclass(frozen=True)
class LanguageLoRA(MultimodalMethod, LoRA):
    """LoRA on a multimodal language model.

    Example:
        >>> handle = LanguageLoRA(rank=8, towers=("language", "projector")).attach(base.model)  # doctest: +SKIP
    """

    default_learning_rate: ClassVar[float] = 2e-3
    targets: str | tuple[str, ...] = "all-linear"
    """Layers: roles (q k v o up gate down), attention, mlp, all-linear, or patterns of whole paths."""
    towers: tuple[str, ...] | None = ("language",)
    """Parts to stay in: language, projector, vision."""


@dataclass(frozen=True)
class LanguageDoRA(MultimodalMethod, DoRA):
    """DoRA on a multimodal language model."""

    default_learning_rate: ClassVar[float] = 2e-3
    targets: str | tuple[str, ...] = "all-linear"
    """Layers: roles (q k v o up gate down), attention, mlp, all-linear, or patterns of whole paths."""
    towers: tuple[str, ...] | None = ("language",)
    """Parts to stay in: language, projector, vision."""


@dataclass(frozen=True)
class LanguageLoRAFA(MultimodalMethod, LoRAFA):
    """LoRA-FA on a multimodal language model."""

    default_learning_rate: ClassVar[float] = 4e-3
    targets: str | tuple[str, ...] = "all-linear"
    """Layers: roles (q k v o up gate down), attention, mlp, all-linear, or patterns of whole paths."""
    towers: tuple[str, ...] | None = ("language",)
    """Parts to stay in: language, projector, vision."""


@dataclass(frozen=True)
class LanguageOLoRA(MultimodalMethod, OrthogonalLoRA):
    """O-LoRA on a multimodal language model."""

    default_learning_rate: ClassVar[float] = 2e-3
    targets: str | tuple[str, ...] = "all-linear"
    """Layers: roles (q k v o up gate down), attention, mlp, all-linear, or patterns of whole paths."""
    towers: tuple[str, ...] | None = ("language",)
    """Parts to stay in: language, projector, vision."""


@dataclass(frozen=True)
class LanguageIA3(MultimodalMethod, IA3):
    """(IA)3 on a multimodal language model."""

    default_learning_rate: ClassVar[float] = 2e-2
    towers: tuple[str, ...] | None = ("language",)
    """Parts to stay in: language, projector, vision."""


@dataclass(frozen=True)
class LanguageLadder(MultimodalMethod, LadderSideTuning):
    """Ladder side-tuning of a multimodal language model."""

    default_learning_rate: ClassVar[float] = 3e-3


@dataclass(frozen=True)
class LanguagePrefix(MultimodalMethod, PrefixTuning):
    """Prefix tuning of a multimodal language model."""

    default_learning_rate: ClassVar[float] = 5e-3
    hidden: int | None = None
    """Inside of the network that makes them; none trains them directly."""


@dataclass(frozen=True)
class LanguagePrompt(MultimodalMethod, PromptTuning):
    """Prompt tuning of a multimodal language model."""

    default_learning_rate: ClassVar[float] = 3e-2
    length: int = 20
    """Vectors; each costs as much as a token."""
