r"""CLIP-LoRA: low-rank changes of the attention of both towers, with one setting for all data.

Maxime Zanella, Ismail Ben Ayed: Low-Rank Few-Shot Adaptation of Vision-Language Models, 2024, arXiv:2405.18541.

    logits = s unit(image(x)) unit(text("a photo of a {}."))',    both towers with W + alpha / sqrt(r) B A at q, k, v

2 r (d_in + d_out) parameters per matrix pair: 184,320 on ViT-B/16 at rank 2. The method itself is
`graft.studio.methods.lora`.

Differs from the authors' code: prompts are tokenised once and cut where that is exact; B A is never formed; the guard's
strength is folded into B.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.studio.adapter import Adapter, Card
from graft.studio.errors import InputError
from graft.studio.formats import peft
from graft.studio.methods.lora import LoRA
from graft.studio.slots import Handle
from graft.vlm.head import Classifier, Head, Setting, Shots

if TYPE_CHECKING:
    from graft.vlm.base import ClipBase


@dataclass(frozen=True)
class ClipLoRA(LoRA):
    """Low-rank changes of the attention of both towers."""

    rank: int = 2
    """Inner width of the change; parameters grow in proportion."""
    alpha: float = 1.0
    """Numerator of the scale."""
    dropout: float = 0.25
    """Probability of dropping an input element of the low-rank path in training, from 0 up to but not 1."""
    rslora: bool = True
    """Divide alpha by the root of the rank."""
    targets: str | tuple[str, ...] = ("q", "k", "v")
    """Sites: roles (q k v o up down), attention, mlp, or patterns of paths."""
    towers: tuple[str, ...] | None = ("vision", "text")
    """Towers to adapt."""
    template: str = "a photo of a {}."
    """The one prompt of every class, in training and after."""

    default_learning_rate: ClassVar[float] = 2e-4
    train_defaults: ClassVar[Mapping[str, Any]] = {
        "steps": 500, "batch_size": 32, "schedule": "cosine", "weight_decay": 0.01, "mixed_precision": "no"
    }  # fmt: skip
    bound: ClassVar[bool] = False

    def build(self, setting: Setting, tensors: Mapping[str, Tensor] | None = None) -> Head:
        """Attaches to both towers.

        Raises:
            SiteError: towers without such sites.
            InputError: dropout on a layer that has no input of its own.
        """
        method = self.fitted(setting.base)
        return Towers(replace(setting, templates=(self.template,)), method.attach(setting.base.modules))

    def fitted(self, base: ClipBase) -> ClipLoRA:
        """Returns the method with those layers in weight mode whose weight the towers read without calling them.

        EVA's first version does so with `qkv`, CLIP's ResNets with the projections of their pooling. Found by running
        both towers once, not by the model's name.

        Raises:
            InputError: dropout, which needs the input of a layer.
        """
        handle = self.attach(base.modules)
        try:
            dead = set(handle.bypassed(base.exercise))
        finally:
            handle.detach()
        if not dead:
            return self
        names = sorted({site.name for site in handle.plan if site.key in dead})
        if self.dropout:
            told = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
            reason = f"the weight of {told} is read without a call, so that there is no input to drop"
            raise InputError(f"method.dropout = {self.dropout}", reason, "Set method.dropout = 0")
        return replace(self, weight_mode=(*self.weight_mode, *map(re.escape, names)))

    @classmethod
    def attach_to(cls, base: Any, tensors: Mapping[str, Tensor], card: Card) -> Any:
        """The trained classifier; the base carries the adapter until it is detached."""
        from graft.studio.config import from_dict

        method = from_dict(cls, card.config, "adapter.json")
        if not method.dropout:  # with it, no weight was changed itself
            card = replace(card, config={**card.config, "weight_mode": list(method.fitted(base).weight_mode)})
        handle = super().attach_to(base, tensors, card)
        setting = Setting(base, tuple(card.details["classes"]), tuple(card.details["templates"]))
        return Attached(method, Towers(setting, handle))

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes the factors for another library, whose model is the base's without its name in front of the paths."""
        sites = [{**site, "name": site["name"].removeprefix("model.")} for site in adapter.card.sites]
        tensors = {name.removeprefix("model."): tensor for name, tensor in adapter.tensors.items()}
        bare = Adapter(tensors, replace(adapter.card, sites=sites))
        return peft.export(bare, folder, pipeline=False) if format == "peft" else super().export(bare, folder, format)


class Attached(Classifier):
    """A classifier whose towers carry the adapter."""

    def merge(self) -> None:
        """Adds the change into the base's weights."""
        self.head.handle.merge()


class Towers(Head):
    """Both towers with their adapters; trains the adapters."""

    reads_pixels: ClassVar[bool] = True

    def __init__(self, setting: Setting, handle: Handle):
        super().__init__(setting)
        self.handle, self.bank, self.strength = handle, handle.bank, 1.0
        self.sites = handle.plan.to_list()
        self.ids = setting.base.words([setting.templates[0].format(name) for name in setting.names])

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (b, c) of pictures (b, 3, h, w) uint8."""
        base = self.setting.base
        pictures = F.normalize(base.encode_image(pixels).float(), dim=-1)
        return self.setting.scale * pictures @ self.classifier().T

    def classifier(self) -> Tensor:
        """Unit text features (c, e) through the adapted text tower."""
        return F.normalize(self.setting.base.encode_ids(self.ids).float(), dim=-1)

    def start(self, shots: Shots) -> None:
        """Draws the factors from the seed of the job."""
        self.handle.reset(0, int(torch.initial_seed()) % 2**63)

    def probe(self, run: Callable[[], Tensor]) -> None:
        """Checks that every site takes part."""
        self.handle.probe(run)

    def renamed(self, setting: Setting, method: Any) -> Towers:
        """The same towers for other classes."""
        return Towers(setting, self.handle)

    def strengthen(self, strength: float) -> None:
        """Weakens the change itself: the towers between their start and what was learnt."""
        self.strength = strength
        self.handle.scale(0, strength)

    def tensors(self) -> dict[str, Tensor]:
        """The factors, with the strength in B."""
        tensors = self.handle.tensors().items()
        return {name: tensor * self.strength if name.endswith(".B") else tensor for name, tensor in tensors}

    def detach(self) -> None:
        """Takes the adapters out."""
        self.handle.detach()
