"""A frozen model of another library, with what the studio asks of the base of every domain that has one model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from graft.studio.adapter import base_hash


@dataclass(eq=False)
class FrozenModel:
    """A model, frozen and in evaluation mode."""

    name: str
    """As it was asked for."""
    model: Any
    """The library's own module."""

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).eval()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The model under an empty name: the paths of its sites are those of the model itself."""
        return {"": self.model}

    @cached_property
    def hash(self) -> str:
        """Identity of all weights, the same as that of the library's plain model; adapters carry it."""
        return base_hash(self.modules)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device
