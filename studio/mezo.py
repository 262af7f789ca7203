"""MeZO: training by forward passes alone, in the memory of inference.

Sadhika Malladi, Tianyu Gao, Eshaan Nichani, Alex Damian, Jason D. Lee, Danqi Chen, Sanjeev Arora: Fine-Tuning Language
Models with Just Forward Passes, 2023, arXiv:2305.17333.

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps),    theta <- theta - lr (g z + decay theta),    z ~ N(0, 1)

z is drawn again from its seed whenever it is needed, so neither it nor a copy of theta (all trained tensors) is kept;
theta is moved in place. g is a float. Several batches of one step share z, and their slopes are added up.

Differs from the authors' code: both passes draw the same dropout masks and noise, where theirs turns dropout off; so
losses with noise of their own, as a denoiser's, can be trained. Decay is that of the parameter groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class MeZO(torch.optim.Optimizer):
    """Steps along one random direction, by the slope that two forward passes find there.

    Args:
        groups: parameters, as of every optimiser.
        lr: learning rate; the authors' are 1e-7 to 1e-6 for all weights, 5e-5 to 1e-4 for LoRA.
        weight_decay: of groups that do not set their own.
        eps: how far the parameters are moved to either side.
    """

    def __init__(self, groups: Iterable[Any], lr: float, weight_decay: float, eps: float):
        self.eps, self.seed = eps, 0
        self.slope: Tensor | None = None
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def measure(
        self, seed: int, run: Callable[[], tuple[Tensor, dict[str, Tensor]]], share: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the mean loss and figures of both sides; keeps ``share`` of the slope between them for `step`.

        Args:
            seed: of the direction.
            run: gives loss and figures; both times it must draw the same random numbers.
            share: one over the number of batches in a step.
        """
        self.seed = seed
        self._move(self.eps)
        above, told = run()
        self._move(-2 * self.eps)
        below, other = run()
        self._move(self.eps)
        slope = share * (above - below) / (2 * self.eps)
        self.slope = slope if self.slope is None else self.slope + slope
        return (above + below) / 2, {name: (value + other[name]) / 2 for name, value in told.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Takes a step along the direction that was measured last; nothing if none was."""
        if self.slope is None:
            return
        for group, parameter, z in self._directions():
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(z * (group["lr"] * self.slope).to(z))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the slope."""
        self.slope = None

    def _move(self, far: float) -> None:
        for _, parameter, z in self._directions():
            parameter.add_(z, alpha=far)

    def _directions(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Every group's parameters, each with its part of the direction."""
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                where = parameter.device
                if where not in generators:
                    generators[where] = torch.Generator(where).manual_seed(self.seed)
                z = torch.randn(parameter.shape, generator=generators[where], device=where, dtype=parameter.dtype)
                yield group, parameter, z
