"""Full fine-tuning: every weight of the model is trained, or those of its last blocks. The other baseline.

The adapter file holds the trained weights whole, in float32. `blocks` gives what the VPT paper (Jia et al., 2022,
arXiv:2203.12119) calls Partial-k. Buffers, and with them the statistics of a batch norm, stay as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from graft.studio.errors import InputError, SiteError
from graft.studio.sites import Plan, Site
from graft.studio.weights import WeightsHandle
from graft.vision.base import classifiers
from graft.vision.method import VisionMethod


@dataclass(frozen=True)
class FullTuning(VisionMethod):
    """All weights of the model, or those of its last blocks."""

    blocks: int = 0
    """How many of the last blocks, with the norm behind them; 0 trains the whole model."""

    default_learning_rate: ClassVar[float] = 1e-4
    default_weight_decay: ClassVar[float] = 0.05
    head_lr_scale: ClassVar[float] = 10.0

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise InputError(f"method.blocks = {self.blocks}", "expected 0 or more", "Change it")

    def plan(self, model: Any) -> Plan:
        """Returns one site for each weight that is trained; a classifier that is replaced is none.

        Raises:
            SiteError: `blocks` for a model that has fewer, or none in one list.
        """
        heads = tuple(f"{name}." for name in classifiers(model))
        names = [name for name, _ in model.named_parameters() if not f"{name}".startswith(heads)]
        if self.blocks:
            count = len(getattr(model, "blocks", ()))
            if self.blocks > count:
                reason = f"{type(model).__name__} has {count or 'no list of'} blocks"
                raise SiteError(f"method.blocks = {self.blocks}", reason, "Use 0 to train all of it")
            kept = (*(f"blocks.{k}." for k in range(count - self.blocks, count)), "norm.", "fc_norm.", "attn_pool.")
            names = [name for name in names if name.startswith(kept)]
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        sites = tuple(Site(name, "linear", shapes[name], None, "vision") for name in names)
        return Plan(sites, tuple(torch.Size(site.shape).numel() for site in sites))

    def attach(self, model: nn.Module, slots: int = 1, plan: Plan | None = None) -> WeightsHandle:
        """Makes the weights trainable, and keeps what they were.

        Raises:
            InputError: more than one adapter at once.
        """
        if slots != 1:
            raise InputError(f"{slots} slots", "full fine-tuning has one set of weights", "Attach one")
        return WeightsHandle(model, plan or self.plan(model))
