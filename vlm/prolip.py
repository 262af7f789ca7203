r"""ProLIP: only the image tower's last linear map is trained, and held near where it was.

Mohammad Fahes, Tuan-Hung Vu, Andrei Bursuc, Patrick Perez, Raoul de Charette: Fine-tuning CLIP's Last Visual Projector:
A Few-Shot Cornucopia, 2024, arXiv:2410.05270.

    loss = CE(s unit(x P) W', y) + strength / shots |P - P0|^2

x is the pooled feature before the projection, P (p, e) starts at the base's own P0, W the zero-shot weights. Every step
sees all pictures, each in one of its crops. p e parameters. `strength` is 1 in the paper: the penalty is the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from graft.studio.errors import InputError
from graft.vlm.head import Head, HeadMethod, Setting, Shots


@dataclass(frozen=True)
class ProLIP(HeadMethod):
    """The image tower's last linear map, trained near where it was."""

    strength: float = 1.0
    """Penalty on the squared distance from the start, divided by the shots of a class."""

    default_learning_rate: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        self._check("strength", self.strength, self.strength >= 0, "0 or more")

    def build(self, setting: Setting, tensors: Mapping[str, Tensor] | None = None) -> Head:
        """The base's own projection.

        Raises:
            InputError: the image tower ends in no plain linear map.
        """
        if setting.base.projection is None:
            reason = "its image tower does not end in a linear map without bias, which is what ProLIP trains"
            raise InputError(setting.base.name, reason, "Use task_res, cross_modal or tip_adapter_f")
        return Projection(setting, self.strength)


class Projection(Head):
    """P."""

    full_batch: ClassVar[bool] = True

    def __init__(self, setting: Setting, strength: float):
        super().__init__(setting)
        assert setting.base.projection is not None
        self.original = setting.base.projection.detach().float()
        self.projection = nn.Parameter(self.original.clone())
        self.strength, self.shots = strength, 1.0

    def start(self, shots: Shots) -> None:
        """Takes the mean number of shots."""
        self.shots = len(shots.labels) / len(self.setting.names)

    def prepare(self, pooled: Tensor) -> Tensor:
        """The pooled features themselves."""
        return pooled

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits (b, c) of features before the projection (b, p)."""
        return self.setting.zero_shot(pooled @ self.projection)

    def loss(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy and penalty."""
        loss, logits = super().loss(inputs, labels)
        return loss + self.strength / self.shots * (self.projection - self.original).square().sum(), logits
