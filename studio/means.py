"""What a loop remembers of the losses of its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class Patience:
    """Smoothed losses of jobs, and when each of them was lowest."""

    def __init__(self, limits: Sequence[int]):
        self.limits = limits
        self.mean: Tensor | None = None
        self.best = [(math.inf, 0) for _ in limits]

    def add(self, loss: Tensor) -> None:
        """Take a step's loss into the means, without waiting for it; (jobs,), or a scalar of one."""
        if any(self.limits):
            loss = loss.detach().reshape(-1)
            self.mean = loss if self.mean is None else self.mean.lerp(loss, 0.02)

    def stalled(self, step: int, accelerator: Accelerator) -> list[int]:
        """The jobs that have been without a new low for longer than they may."""
        if self.mean is None:
            return []
        found = []
        for slot, value in enumerate(accelerator.reduce(self.mean, "mean").tolist()):
            if value < self.best[slot][0]:
                self.best[slot] = (value, step)
            elif self.limits[slot] and step - self.best[slot][1] >= self.limits[slot]:
                found.append(slot)
        return found

    def state(self) -> dict[str, Any]:
        """What `restore` takes, as JSON holds it: None for no low yet."""
        best = [(None if low == math.inf else low, step) for low, step in self.best]
        return {"mean": None if self.mean is None else self.mean.tolist(), "best": best}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.mean = None if state["mean"] is None else torch.tensor(state["mean"])
        self.best = [(math.inf if low is None else low, step) for low, step in state["best"]]


class Means:
    """Running means of figures, each over the steps that told it; added up where they are and fetched once."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Take in what a step told: scalars, or one number per run."""
        for name, value in figures.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, list[float]]:
        """One mean per figure, or one per run."""
        means = {
            name: [value / self.counts[name] for value in total.reshape(-1).tolist()]
            for name, total in self.sums.items()
        }
        self.sums, self.counts = {}, {}
        return means
