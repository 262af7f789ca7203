"""The optimiser of jobs that share a batch: AdamW on one flat buffer, each job with its own settings and moments."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

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
        stacks = [parameter for parameter, owner in owned if owner is None]
        single = sorted(
            ((owner, parameter) for parameter, owner in owned if owner is not None), key=lambda pair: pair[0]
        )
        # All that a job has of the stacks lies side by side: a step goes over few long pieces. Autograd adds to such
        # gradients as to any, but tells once that it likes others better.
        warnings.filterwarnings("ignore", "grad and param do not obey", UserWarning)
        rows = [stack.detach().reshape(jobs, -1) for stack in stacks]
        flat = [torch.cat(rows, 1).reshape(-1)] if stacks else []
        self.flat = nn.Parameter(torch.cat([*flat, *(parameter.detach().reshape(-1) for _, parameter in single)]))
        self.flat.grad = torch.zeros_like(self.flat)
        width = sum(row.shape[1] for row in rows)
        for values, place in ((self.flat.detach(), "data"), (self.flat.grad, "grad")):
            parts = values[: jobs * width].view(jobs, width).split([row.shape[1] for row in rows], 1) if stacks else ()
            for stack, part in zip(stacks, parts, strict=True):
                setattr(stack, place, part.unflatten(1, stack.shape[1:]))
            ends = values[jobs * width :].split([parameter.numel() for _, parameter in single])
            for (_, parameter), part in zip(single, ends, strict=True):
                setattr(parameter, place, part.view(parameter.shape))
        pieces = [(width, job) for job in range(jobs) if width] + [(p.numel(), owner) for owner, p in single]
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
