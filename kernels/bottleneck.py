"""A bottleneck adapter: two thin layers with a nonlinearity between them, behind a layer norm or none.

    y = onto + s (U f(D norm(x) + d) + e)

The library path is torch's. The Triton path reads x once for all of it: the norm is folded into the first product,
``D norm(x) = r (x (g D)' - m (g D) 1) + D b`` with mean m and inverse deviation r from sums taken on the way; neither
norm(x) nor what is inside is written in forward.

Letters: b batch rows, n tokens, i input width, o output width, h inside, k slots in a stack.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.kernels.dispatch import LIBRARY, autocast, fastest, refusals

TRITON = "triton"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class Norm(NamedTuple):
    """A frozen layer norm before the adapter."""

    weight: Tensor
    """(i,)."""
    bias: Tensor
    """(i,)."""
    eps: float = 1e-5
    """Added to the variance."""


class Layers(NamedTuple):
    """Stacks of k adapters."""

    down: Tensor
    """D, (k, h, i)."""
    start: Tensor
    """d, (k, h)."""
    up: Tensor
    """U, (k, o, h)."""
    end: Tensor
    """e, (k, o)."""
    scale: Tensor
    """s, (k,) float."""
    route: Tensor | None = None
    """(b,) long, slot of each batch row, -1 for none; None sends every row to slot 0."""


def reference(
    x: Tensor, layers: Layers, activation: str = "relu", norm: Norm | None = None, onto: Tensor | None = None
) -> Tensor:
    """Returns the formula in plain torch, row by row; the yardstick of `bottleneck`, with its shapes."""
    route = [0] * len(x) if layers.route is None else layers.route.tolist()
    rows = []
    for row, slot in zip(x, route, strict=True):
        down, start, up, end, scale = (stack[slot] for stack in layers[:5])
        inside = row if norm is None else F.layer_norm(row, row.shape[-1:], norm.weight, norm.bias, norm.eps)
        y = ACTIVATIONS[activation](inside @ down.T + start) @ up.T + end
        rows.append(y * (scale if slot >= 0 else 0.0))
    y = torch.stack(rows)
    return y if onto is None else onto + y


def bottleneck(
    x: Tensor,
    layers: Layers,
    activation: str = "relu",
    norm: Norm | None = None,
    onto: Tensor | None = None,
    path: str | None = None,
) -> Tensor:
    """Returns what an adapter gives, added to ``onto`` if given.

    Args:
        x: (b, ..., i).
        layers: the adapters; they are cast to the type of x.
        activation: relu, gelu or silu.
        norm: applied to x first.
        onto: (b, ..., o); it may be x itself, and is not changed.
        path: "library" or "triton"; None takes the fastest.

    Returns:
        (b, ..., o).
    """
    (cast,) = autocast(x)
    x, onto = cast, cast if onto is x and cast.dtype == x.dtype else onto
    path = path or choose(x, layers, activation, norm, onto)
    if path == LIBRARY:
        return _library(x, layers, activation, norm, onto)
    from graft.kernels.bottleneck_triton import fused

    down, start, up, end, scale, route = layers
    flat, out = _grouped(x, route).contiguous(), up.shape[1]
    y: Tensor = fused(
        flat,
        None if onto is None or onto is x else _grouped(onto, route).contiguous(),
        *(down.contiguous(), start.contiguous(), up.contiguous(), end.contiguous(), scale.float(), route),
        *((None, None, 0.0) if norm is None else norm),
        list(ACTIVATIONS).index(activation),
        onto is x,
    )
    return y.view(*x.shape[:-1], out)


def supports(x: Tensor, layers: Layers, norm: Norm | None = None, onto: Tensor | None = None) -> list[str]:
    """Returns why the Triton path cannot do this; nothing if it can."""
    parts = () if norm is None else norm[:2]
    reasons = refusals(x, *layers, *parts, onto)
    if layers.down.shape[1] > 128:
        reasons.append(f"inside of {layers.down.shape[1]} above 128")
    if x.dtype == torch.float32 and layers.down.shape[1] > 32:
        reasons.append("float32 above an inside of 32")  # would not fit into the registers
    if x.dtype == torch.float32 and norm is not None:
        reasons.append("a norm in float32")  # where folding it costs a digit
    if any(part.requires_grad for part in parts):
        reasons.append("the norm is trained")
    if onto is not None and onto.dtype != x.dtype:
        reasons.append(f"adds {x.dtype} onto {onto.dtype}")
    return reasons


def _library(x: Tensor, layers: Layers, activation: str, norm: Norm | None, onto: Tensor | None) -> Tensor:
    down, start, up, end, scale, route = layers
    if route is None:
        down, start, up, end, scale = (stack[:1] for stack in layers[:5])
    else:
        slot = route.clamp(min=0)
        down, start, up, end, scale = (stack[slot] for stack in layers[:5])
        scale = scale * (route >= 0)
    inside = x if norm is None else F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    factor = scale.view(-1, 1, 1)
    flat = _grouped(inside, route)
    hidden = ACTIVATIONS[activation](torch.baddbmm(start[:, None].to(x.dtype), flat, down.mT.to(x.dtype)))  # (g, m, h)
    last, shift = (factor * up).mT.to(x.dtype), (factor * end[:, None]).to(x.dtype)
    if onto is not None and onto.dtype == hidden.dtype:
        return torch.baddbmm(_grouped(onto, route), hidden, last).add_(shift).view(*x.shape[:-1], up.shape[1])
    y = torch.baddbmm(shift, hidden, last).view(*x.shape[:-1], up.shape[1])
    return y if onto is None else onto + y


def _grouped(x: Tensor, route: Tensor | None) -> Tensor:
    """(b, ..., i) -> (g, m, i): one group for all rows, or a group per batch row."""
    if route is None:
        return x.reshape(1, -1, x.shape[-1])
    return x.flatten(1, -2) if x.dim() > 2 else x[:, None]


def choose(x: Tensor, layers: Layers, activation: str, norm: Norm | None, onto: Tensor | None) -> str:
    """Returns the path that was fastest for this shape, measured with its backward if there will be one."""
    if not x.is_cuda or supports(x, layers, norm, onto):
        return LIBRARY
    wanted = [each for each in (x, *layers[:4]) if each.requires_grad and torch.is_grad_enabled()]

    def run(path: str) -> list[Tensor]:
        with torch.set_grad_enabled(bool(wanted)):
            y = bottleneck(x, layers, activation, norm, onto, path)
            return [y, *torch.autograd.grad(y, wanted, y.detach())] if wanted else [y]

    groups = 1 if layers.route is None else len(x)
    shape = (x.numel() // x.shape[-1], groups, x.shape[-1], *layers.up.shape[1:])
    kind = (activation, norm is not None, "none" if onto is None else "x" if onto is x else "other")
    key = ("bottleneck", x.dtype, *shape, *kind, x.requires_grad and bool(wanted), len(wanted))
    return fastest(key, {path: partial(run, path) for path in (LIBRARY, TRITON)}, x.device)
