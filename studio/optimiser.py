"""The optimiser of jobs that share a batch: AdamW on one flat buffer, each job with its own settings and moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.kernels.flat_adamw import Settings, State, layout, state, step


class JobsAdamW(torch.optim.Optimizer):
    """AdamW for several jobs at once; clips each job's gradients by their own norm.

    The parameters become views of one buffer, and so do their gradients: they are cleared in place, never let go.

    Args:
        owned: float32 parameters and whose they are; None is a stack, (jobs, ...), with an entry for each.
        jobs: how many there are.

    Source: `graft.kernels.flat_adamw`.
    """

    def __init__(self, owned: Sequence[tuple[nn.Parameter, int | None]], jobs: int):
        parameters = [parameter for parameter, _ in owned]
        pieces = [
            (parameter.numel() // (jobs if owner is None else 1), slot)
            for parameter, owner in owned
            for slot in (range(jobs) if owner is None else [owner])
        ]
        self.flat = nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
        self.flat.grad = torch.zeros_like(self.flat)
        for parameter, values, slopes in zip(
            parameters, *map(_cutter(parameters), (self.flat, self.flat.grad)), strict=True
        ):
            parameter.data, parameter.grad = values, slopes
        self.where = layout(pieces, self.flat.device)
        zeros = torch.zeros(jobs, device=self.flat.device)
        self.settings = Settings(zeros, zeros.clone(), torch.full_like(zeros, float("inf")))
        super().__init__([self.flat], {"lr": 0.0})
        self.state[self.flat] = state(self.flat.detach(), self.settings)._asdict()

    def set(self, rates: Sequence[float], decays: Sequence[float], limits: Sequence[float]) -> None:
        """Sets each job's learning rate, weight decay, and largest gradient norm (0 for any)."""
        wanted = (rates, decays, [limit or float("inf") for limit in limits])
        for values, numbers in zip(self.settings, wanted, strict=True):
            values.copy_(torch.tensor(numbers), non_blocking=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Takes a step; gradients may be scaled down by it."""
        assert self.flat.grad is not None
        past = State(**self.state[self.flat])
        step(self.flat.data, self.flat.grad, past, self.where, self.settings)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients, in place whatever is asked for."""
        assert self.flat.grad is not None
        self.flat.grad.zero_()

    def broken(self) -> list[int]:
        """The jobs with parameters that are not finite."""
        if bool(self.flat.isfinite().all()):
            return []
        return sorted({job for a, b, job in self.where.pieces if not bool(self.flat[a:b].isfinite().all())})

    @torch.no_grad()
    def drop(self, job: int) -> None:
        """Sets a job's parameters, gradients and moments to zero: what is not finite there can do no harm then."""
        assert self.flat.grad is not None
        first, second = self.state[self.flat]["first"], self.state[self.flat]["second"]
        for start, stop, owner in self.where.pieces:
            for flat in (self.flat.data, self.flat.grad, first, second) if owner == job else ():
                flat[start:stop] = 0


def _cutter(parameters: Sequence[Tensor]) -> Callable[[Tensor], list[Tensor]]:
    """A function that cuts a flat buffer into the shapes of parameters."""

    def cut(flat: Tensor) -> list[Tensor]:
        parts = flat.detach().split([parameter.numel() for parameter in parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]

    return cut
