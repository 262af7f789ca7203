"""What takes the steps of a training: torch's AdamW, MeZO or GaLore for one job, `JobsAdamW` for several.

`JobsAdamW` is AdamW on one flat buffer, each job with its own settings and moments.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.kernels.flat_adamw import Settings, State, layout, state, step
from graft.studio.galore import GaLore
from graft.studio.job import TrainConfig
from graft.studio.mezo import MeZO


def make(config: TrainConfig, groups: Sequence[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    """Returns the optimiser that a job's ``train.optimiser`` names."""
    decay = config.weight_decay
    if config.optimiser == "mezo":
        return MeZO(groups, rate, decay, config.mezo_eps)
    if config.optimiser == "galore":
        return GaLore(groups, rate, decay, config.galore_rank, config.galore_every, config.galore_scale)
    fused = {p.device.type for group in groups for p in group["params"]} <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=fused)


class JobsAdamW(torch.optim.Optimizer):
    """AdamW for several jobs at once; clips each job's gradients by their own norm.

    The parameters become views of one buffer, and so do their gradients: they are cleared in place, never let go.

    Args:
        groups: float32 parameters and whose they are; None is a stack, (jobs, ...), with an entry for each job. Every
            group has a rate and a decay of its own.
        jobs: how many there are.

    Source: `graft.kernels.flat_adamw`.
    """

    def __init__(self, groups: Sequence[Sequence[tuple[nn.Parameter, int | None]]], jobs: int):
        self.jobs, self.groups = jobs, len(groups)
        owned = [(parameter, owner) for group in groups for parameter, owner in group]
        size = sum(parameter.numel() for parameter, _ in owned)
        self.flat = nn.Parameter(torch.empty(size, device=owned[0][0].device))
        self.flat.grad = torch.zeros_like(self.flat)
        pieces: list[tuple[int, int]] = []
        for place, group in enumerate(groups):
            pieces += self._place(group, place, sum(length for length, _ in pieces))
        self.where = layout(pieces, self.flat.device)
        zeros = torch.zeros(jobs * self.groups, device=self.flat.device)
        self.settings = Settings(zeros, zeros.clone(), torch.full_like(zeros, float("inf")))
        self.limits: Sequence[float] = [0.0] * jobs
        super().__init__([self.flat], {"lr": 0.0})
        self.state[self.flat] = state(self.flat.detach(), self.settings)._asdict()

    @torch.no_grad()
    def _place(self, group: Sequence[tuple[nn.Parameter, int | None]], place: int, start: int) -> list[tuple[int, int]]:
        """Moves a group's parameters into the buffer; returns its pieces, (length, owner)."""
        stacks = [parameter for parameter, owner in group if owner is None]
        single = sorted(((owner, p) for p, owner in group if owner is not None), key=lambda pair: pair[0])
        # All that a job has of the stacks lies side by side: a step goes over few long pieces. Autograd adds to such
        # gradients as to any, but tells once that it likes others better.
        warnings.filterwarnings("ignore", "grad and param do not obey", UserWarning)
        widths = [stack[0].numel() for stack in stacks]
        end, ends = start + self.jobs * sum(widths), [parameter.numel() for _, parameter in single]
        assert self.flat.grad is not None
        views: list[list[Tensor]] = []
        for flat in (self.flat.detach(), self.flat.grad):
            rows = flat[start:end].view(self.jobs, -1).split(widths, 1) if stacks else ()
            parts = [row.unflatten(1, stack.shape[1:]) for row, stack in zip(rows, stacks, strict=True)]
            rest = flat[end : end + sum(ends)].split(ends) if single else ()
            views.append([*parts, *(part.view(p.shape) for part, (_, p) in zip(rest, single, strict=True))])
        for parameter, values, slopes in zip([*stacks, *(p for _, p in single)], *views, strict=True):
            values.copy_(parameter)
            parameter.data, parameter.grad = values, slopes
        whole = [(sum(widths), job) for job in range(self.jobs if stacks else 0)]
        lengths = [*whole, *((p.numel(), owner) for owner, p in single)]
        return [(length, owner * self.groups + place) for length, owner in lengths]

    def set(self, rates: Sequence[float], decays: Sequence[float], limits: Sequence[float]) -> None:
        """Sets rate and decay of each job's groups, job by job, and each job's largest norm (0 for any)."""
        one = self.groups == 1  # then the kernel clips, else it is done before, over all of a job's groups
        bounds = [limit or float("inf") for limit in limits] if one else [float("inf")] * len(rates)
        self.limits = [0.0] * self.jobs if one else limits
        for values, numbers in zip(self.settings, (rates, decays, bounds), strict=True):
            values.copy_(torch.tensor(numbers), non_blocking=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Takes a step; gradients may be scaled down by it."""
        assert self.flat.grad is not None
        for job, limit in enumerate(self.limits):
            if limit:
                slopes = [self.flat.grad[start:stop] for start, stop in self._pieces(job)]
                norm = torch.nn.utils.get_total_norm(slopes)
                torch._foreach_mul_(slopes, (limit / (norm + 1e-6)).clamp(max=1.0))
        past = State(**self.state[self.flat])
        step(self.flat.data, self.flat.grad, past, self.where, self.settings)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients, in place whatever is asked for."""
        assert self.flat.grad is not None
        self.flat.grad.zero_()

    def _pieces(self, job: int) -> list[tuple[int, int]]:
        return [(start, stop) for start, stop, owner in self.where.pieces if owner // self.groups == job]

    def broken(self) -> list[int]:
        """The jobs with parameters that are not finite."""
        if bool(self.flat.isfinite().all()):
            return []
        finite = [all(bool(self.flat[a:b].isfinite().all()) for a, b in self._pieces(job)) for job in range(self.jobs)]
        return [job for job, whole in enumerate(finite) if not whole]

    @torch.no_grad()
    def drop(self, job: int) -> None:
        """Sets a job's parameters, gradients and moments to zero: what is not finite there can do no harm then."""
        assert self.flat.grad is not None
        for flat in (self.flat.data, self.flat.grad, self.state[self.flat]["first"], self.state[self.flat]["second"]):
            for start, stop in self._pieces(job):
                flat[start:stop] = 0
