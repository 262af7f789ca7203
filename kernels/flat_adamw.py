"""AdamW for many adapters at once: all their parameters in one flat buffer, each adapter with its own settings.

Ilya Loshchilov, Frank Hutter: Decoupled Weight Decay Regularization, 2017, arXiv:1711.05101. For adapter k at step t:

    g <- g min(1, limit_k / |g|_k),   p <- p - rate_k (decay_k p + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))

|g|_k is the norm over all of the adapter's parameters. The buffer is cut into pieces (a slot of a stack, say), each
owned by one adapter. The library path is a loop over the adapters around torch's fused AdamW; the Triton path is three
launches for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from graft.kernels.dispatch import LIBRARY, fastest, refusals

TRITON = "triton"
BLOCK = 1024
"""Elements that a program of the Triton path updates."""


class Layout(NamedTuple):
    """Whose parameters lie where; made by `layout`."""

    pieces: tuple[tuple[int, int, int], ...]
    """(start, stop, adapter) of each piece."""
    blocks: Tensor
    """(n, 3) long, the same cut into blocks, an adapter's next to each other."""
    firsts: Tensor
    """(adapters + 1,) long, where each adapter's blocks begin, and the end."""


class Settings(NamedTuple):
    """One entry per adapter, (adapters,) float32; tensors, so that a captured graph sees their changes."""

    rate: Tensor
    """Learning rate."""
    decay: Tensor
    """Weight decay."""
    limit: Tensor
    """Largest norm of the gradient; inf for any."""


class State(NamedTuple):
    """What the steps carry along; made by `state`."""

    first: Tensor
    """Mean of the gradients, as flat as the parameters."""
    second: Tensor
    """Mean of their squares."""
    steps: Tensor
    """(adapters,) float32, steps taken."""


def layout(pieces: Sequence[tuple[int, int]], device: torch.device | str = "cpu") -> Layout:
    """Returns the layout of a buffer from each piece's size and adapter, in order; adapters count from 0."""
    placed, start = [], 0
    for size, owner in pieces:
        placed.append((start, start + size, owner))
        start += size
    blocks = [(owner, at, min(at + BLOCK, stop)) for begin, stop, owner in placed for at in range(begin, stop, BLOCK)]
    table = torch.tensor(sorted(blocks), dtype=torch.long).view(-1, 3)
    counts = torch.bincount(table[:, 0], minlength=1 + max((owner for _, owner in pieces), default=0))
    firsts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Layout(tuple(placed), table[:, [1, 2, 0]].contiguous().to(device), firsts.to(device))


def state(parameters: Tensor, settings: Settings) -> State:
    """Returns the state before the first step."""
    return State(torch.zeros_like(parameters), torch.zeros_like(parameters), torch.zeros_like(settings.rate))


def reference(
    parameters: Tensor,
    gradients: Tensor,
    past: State,
    where: Layout,
    settings: Settings,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Tensor:
    """Returns the parameters after a step, by the formula; the yardstick of `step`, which see."""
    moved = parameters.clone()
    for owner, (rate, decay, limit) in enumerate(zip(*settings, strict=True)):
        mine = [torch.arange(start, stop) for start, stop, other in where.pieces if other == owner]
        index, t = torch.cat([torch.arange(0), *mine]).to(parameters.device), past.steps[owner] + 1
        p, g = parameters[index], gradients[index]
        g = g * (limit / (g.norm() + 1e-6)).clamp(max=1)
        m = betas[0] * past.first[index] + (1 - betas[0]) * g
        v = betas[1] * past.second[index] + (1 - betas[1]) * g * g
        change = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        moved[index] = p - rate * (decay * p + change)
    return moved


@torch.no_grad()
def step(
    parameters: Tensor,
    gradients: Tensor,
    past: State,
    where: Layout,
    settings: Settings,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    path: str | None = None,
) -> None:
    """Takes a step, in place; gradients may be scaled by their limits.

    Args:
        parameters: flat, float32.
        gradients: likewise.
        past: of `state`.
        where: of `layout`.
        settings: one entry per adapter.
        betas: of the two means.
        eps: added to the root.
        path: "library" or "triton"; None takes the fastest.
    """
    path = path or choose(parameters, gradients, past, where, settings, betas, eps)
    if path == LIBRARY:
        _library(parameters, gradients, past, where, settings, betas, eps)
        return
    from graft.kernels.flat_adamw_triton import fused

    fused(parameters, gradients, *past, where.blocks, where.firsts, *settings, *betas, eps)


def supports(parameters: Tensor, gradients: Tensor, past: State, where: Layout, settings: Settings) -> list[str]:
    """Returns why the Triton path cannot do this; nothing if it can."""
    reasons = refusals(parameters, gradients, *past, where.blocks, *settings)
    if {tensor.dtype for tensor in (parameters, *past, *settings)} != {torch.float32}:
        reasons.append("parameters, state or settings that are not float32")
    if not all(tensor.is_contiguous() for tensor in (parameters, gradients, *past, *settings)):
        reasons.append("a buffer with gaps")
    return reasons


def _library(
    parameters: Tensor,
    gradients: Tensor,
    past: State,
    where: Layout,
    settings: Settings,
    betas: tuple[float, float],
    eps: float,
) -> None:
    for owner, (rate, decay, limit) in enumerate(zip(*settings, strict=True)):
        pieces = [slice(start, stop) for start, stop, other in where.pieces if other == owner and stop > start]
        if not pieces:
            continue
        mine, slopes, first, second = (
            [flat[piece] for piece in pieces] for flat in (parameters, gradients, past.first, past.second)
        )
        norm = torch.nn.utils.get_total_norm(slopes)
        torch._foreach_mul_(slopes, (limit / (norm + 1e-6)).clamp(max=1.0))
        torch._foreach_mul_(mine, 1 - rate * decay)
        steps = [past.steps[owner].clone() for _ in pieces]  # each is counted up
        options: dict[str, Any] = {"fused": True, "amsgrad": False, "maximize": False, "weight_decay": 0.0, "eps": eps}
        adamw(mine, slopes, first, second, [], steps, beta1=betas[0], beta2=betas[1], lr=rate, **options)
        past.steps[owner] += 1


def choose(
    parameters: Tensor,
    gradients: Tensor,
    past: State,
    where: Layout,
    settings: Settings,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> str:
    """Returns the path that was fastest for this layout."""
    if not parameters.is_cuda or supports(parameters, gradients, past, where, settings):
        return LIBRARY

    def run(path: str) -> list[Tensor]:
        moved, copies = parameters.clone(), State(*(tensor.clone() for tensor in past))
        step(moved, gradients.clone(), copies, where, settings, betas, eps, path)
        return [moved, *copies]

    key = ("flat_adamw", len(parameters), len(where.pieces), len(settings.rate))
    return fastest(key, {path: partial(run, path) for path in (LIBRARY, TRITON)}, parameters.device)
