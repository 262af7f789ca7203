"""The Triton path of `bottleneck`: a tile of tokens passes through both layers without leaving the chip.

Backward makes the inside again from x and needs no pass for the norm's two means: those of the gradient ``t = u (g D)``
behind the norm and of ``t norm(x)`` are ``u . (g D) 1`` and ``u . (D norm(x))`` with the gradient u inside, products
that are there. It leaves what the weights' gradients need, for the library's products: what is inside, u, and norm(x).

Letters: g batch rows, n tokens, i input width, o output width, h inside, k slots.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graft.kernels.lora_linear_triton import spread

ROWS = 64
"""Tokens of a tile."""


@triton.jit
def _bend(z, KIND: tl.constexpr):
    """The nonlinearity and its slope: relu, gelu, silu."""
    if KIND == 0:
        y = tl.maximum(z, 0.0)
        slope = tl.where(z > 0, 1.0, 0.0)
    elif KIND == 1:
        share = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        y = z * share
        slope = share + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    else:
        share = 1.0 / (1.0 + tl.exp(-z))
        y = z * share
        slope = share * (1.0 + z * (1.0 - share))
    return y, slope


@triton.jit
def _first(
    x,
    down,
    start,
    weight,
    bias,
    eps,
    at,
    slot,
    inside,
    hidden,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """The first layer on a tile: ``D norm(x)`` but for the norm's bias, the rest of it, and the norm's figures."""
    h = tl.arange(0, HIDDEN)
    h_in = h < hidden
    product = tl.zeros((ROWS, HIDDEN), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((HIDDEN,), tl.float32)
    shift = tl.load(start + slot * hidden + h, h_in, 0.0).to(tl.float32)
    for begin in range(0, inside, DEPTH):
        i = begin + tl.arange(0, DEPTH)
        i_in = i < inside
        part = tl.load(x + at[:, None] * inside + i[None, :], i_in[None, :], 0.0)
        matrix = tl.load(
            down + slot * hidden * inside + h[None, :] * inside + i[:, None], h_in[None, :] & i_in[:, None], 0.0
        ).to(tl.float32)
        if NORM:
            shift += tl.sum(matrix * tl.load(bias + i, i_in, 0.0).to(tl.float32)[:, None], 0)
            matrix *= tl.load(weight + i, i_in, 0.0).to(tl.float32)[:, None]
            wide = part.to(tl.float32)
            total += tl.sum(wide, 1)
            square += tl.sum(wide * wide, 1)
        matrix = matrix.to(part.dtype)
        sums += tl.sum(matrix.to(tl.float32), 0)  # as rounded, so that the mean cancels
        product = tl.dot(part, matrix, product, input_precision="ieee")
    mean = total / inside
    scale = mean * 0.0 + 1.0
    if NORM:
        scale = 1.0 / tl.sqrt(tl.maximum(square / inside - mean * mean, 0.0) + eps)
        product = (product - mean[:, None] * sums[None, :]) * scale[:, None]
    return product, shift, sums, mean, scale


@triton.jit
def _place(route, tokens, ROUTED: tl.constexpr, ROWS: tl.constexpr):
    """Which slot the tile's batch row chose, whether it chose one, and the tile's tokens."""
    tiles = tl.cdiv(tokens, ROWS)
    row = tl.program_id(0) // tiles
    slot = row * 0
    if ROUTED:
        slot = tl.load(route + row).to(tl.int32)
    n = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64) * tokens + tl.minimum(n, tokens - 1)
    return tl.maximum(slot, 0).to(tl.int64), slot >= 0, n < tokens, at


@triton.jit
def forward_kernel(
    x,
    onto,
    down,
    start,
    up,
    end,
    scale,
    route,
    weight,
    bias,
    eps,
    y,
    tokens,
    inside,
    outside,
    hidden,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    ONTO: tl.constexpr,
    ROUTED: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """A tile of tokens."""
    slot, on, n_in, at = _place(route, tokens, ROUTED, ROWS)
    product, shift, _, _, _ = _first(
        x, down, start, weight, bias, eps, at, slot, inside, hidden, NORM, ROWS, DEPTH, HIDDEN
    )
    bent, _ = _bend(product + shift[None, :], KIND)
    narrow = bent.to(x.dtype.element_ty)
    strength = tl.load(scale + slot)
    h = tl.arange(0, HIDDEN)
    for begin in range(0, outside, DEPTH):
        o = begin + tl.arange(0, DEPTH)
        o_in = o < outside
        mask = o_in[None, :] & (h < hidden)[:, None]
        matrix = tl.load(up + slot * outside * hidden + o[None, :] * hidden + h[:, None], mask, 0.0)
        part = tl.dot(narrow, matrix.to(narrow.dtype), input_precision="ieee")
        part = (part + tl.load(end + slot * outside + o, o_in, 0.0).to(tl.float32)[None, :]) * strength
        part = tl.where(on, part, 0.0)
        where = at[:, None] * outside + o[None, :]
        if ONTO:
            part += tl.load(onto + where, o_in[None, :], 0.0).to(tl.float32)
        tl.store(y + where, part.to(y.dtype.element_ty), n_in[:, None] & o_in[None, :])


@triton.jit
def backward_kernel(
    x,
    grad,
    down,
    start,
    up,
    scale,
    route,
    weight,
    bias,
    eps,
    grad_x,
    bent,
    slopes,
    normal,
    tokens,
    inside,
    outside,
    hidden,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROUTED: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """A tile of tokens: the gradient of x; what is inside (times s), its gradient, and norm(x) without its affine."""
    slot, on, n_in, at = _place(route, tokens, ROUTED, ROWS)
    product, shift, sums, mean, factor = _first(
        x, down, start, weight, bias, eps, at, slot, inside, hidden, NORM, ROWS, DEPTH, HIDDEN
    )
    h = tl.arange(0, HIDDEN)
    h_in = h < hidden
    strength = tl.where(on, tl.load(scale + slot), 0.0)
    back = tl.zeros((ROWS, HIDDEN), tl.float32)
    for begin in range(0, outside, DEPTH):
        o = begin + tl.arange(0, DEPTH)
        o_in = o < outside
        part = tl.load(grad + at[:, None] * outside + o[None, :], o_in[None, :], 0.0)
        mask = o_in[:, None] & h_in[None, :]
        matrix = tl.load(up + slot * outside * hidden + o[:, None] * hidden + h[None, :], mask, 0.0)
        back = tl.dot(part, matrix.to(part.dtype), back, input_precision="ieee")
    value, slope = _bend(product + shift[None, :], KIND)
    back = tl.where(on, back * strength * slope, 0.0).to(x.dtype.element_ty)
    store = n_in[:, None] & h_in[None, :]
    tl.store(bent + at[:, None] * hidden + h[None, :], tl.where(on, value * strength, 0.0).to(back.dtype), store)
    tl.store(slopes + at[:, None] * hidden + h[None, :], back, store)
    wide = back.to(tl.float32)
    first = tl.sum(wide * sums[None, :], 1) / inside
    second = tl.sum(wide * product, 1) / inside
    for begin in range(0, inside, DEPTH):
        i = begin + tl.arange(0, DEPTH)
        i_in = i < inside
        matrix = tl.load(
            down + slot * hidden * inside + h[:, None] * inside + i[None, :], h_in[:, None] & i_in[None, :], 0.0
        ).to(tl.float32)
        where, inner = at[:, None] * inside + i[None, :], n_in[:, None] & i_in[None, :]
        if NORM:
            matrix *= tl.load(weight + i, i_in, 0.0).to(tl.float32)[None, :]
        part = tl.dot(back, matrix.to(back.dtype), input_precision="ieee")
        if NORM:
            normed = (tl.load(x + where, i_in[None, :], 0.0).to(tl.float32) - mean[:, None]) * factor[:, None]
            part = (part - first[:, None] - normed * second[:, None]) * factor[:, None]
            tl.store(normal + where, normed.to(normal.dtype.element_ty), inner)
        if RESIDUAL:
            part += tl.load(grad + where, i_in[None, :], 0.0).to(tl.float32)
        tl.store(grad_x + where, part.to(grad_x.dtype.element_ty), inner)


@torch.library.custom_op(
    "graft::bottleneck",
    mutates_args=(),
    schema="(Tensor x, Tensor? onto, Tensor down, Tensor start, Tensor up, Tensor end, Tensor scale, Tensor? "
    "route, Tensor? weight, Tensor? bias, float eps, int kind, bool residual) -> Tensor",
)
def fused(
    x: Tensor,
    onto: Tensor | None,
    down: Tensor,
    start: Tensor,
    up: Tensor,
    end: Tensor,
    scale: Tensor,
    route: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: int,
    residual: bool,
) -> Tensor:
    """Returns y (g, n, o) for x (g, n, i), onto (g, n, o); the rest as in `Layers` and `Norm`, contiguous."""
    g, n, i = x.shape
    o, h = up.shape[1:]
    y = x.new_empty(g, n, o)
    base = x if residual else onto
    forward_kernel[(g * triton.cdiv(n, ROWS),)](
        x,
        base if base is not None else x,
        *(down, start, up, end, scale),
        route if route is not None else scale,
        weight if weight is not None else down,
        bias if bias is not None else down,
        *(eps, y, n, i, o, h),
        KIND=kind,
        NORM=weight is not None,
        ONTO=base is not None,
        ROUTED=route is not None,
        **_tile(h, x.dtype),
    )
    return y


@fused.register_fake
def _(x: Tensor, onto: Any, down: Any, start: Any, up: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], up.shape[1])


@torch.library.custom_op(
    "graft::bottleneck_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor down, Tensor start, Tensor up, Tensor scale, Tensor? route, Tensor? "
    "weight, Tensor? bias, float eps, int kind, bool residual) -> (Tensor, Tensor, Tensor, Tensor)",
)
def fused_backward(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    start: Tensor,
    up: Tensor,
    scale: Tensor,
    route: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: int,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradient of x, what is inside times s, its gradient (both (g, n, h)), and the plain norm of x."""
    g, n, i = x.shape
    o, h = up.shape[1:]
    grad_x, bent, slopes = torch.empty_like(x), x.new_empty(g, n, h), x.new_empty(g, n, h)
    normal = x.new_empty(0) if weight is None else torch.empty_like(x)
    backward_kernel[(g * triton.cdiv(n, ROWS),)](
        *(x, grad, down, start, up, scale),
        route if route is not None else scale,
        weight if weight is not None else down,
        bias if bias is not None else down,
        *(eps, grad_x, bent, slopes, normal, n, i, o, h),
        KIND=kind,
        NORM=weight is not None,
        RESIDUAL=residual,
        ROUTED=route is not None,
        **_tile(h, x.dtype),
    )
    return grad_x, bent, slopes, normal


@fused_backward.register_fake
def _(grad: Any, x: Tensor, down: Tensor, start: Any, up: Any, scale: Any, route: Any, weight: Any, *rest: Any) -> Any:
    inside = (*x.shape[:-1], down.shape[1])
    normal = x.new_empty(0) if weight is None else torch.empty_like(x)
    return torch.empty_like(x), x.new_empty(inside), x.new_empty(inside), normal


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, onto, down, start, up, end, scale, route, weight, bias, ctx.eps, ctx.kind, ctx.residual = inputs
    ctx.onto, ctx.end = onto is not None, end.dtype
    ctx.save_for_backward(x, down, start, up, scale, route, weight, bias)


def _gradients(ctx: Any, grad: Tensor) -> Any:
    x, down, start, up, scale, route, weight, bias = ctx.saved_tensors
    tight = grad.contiguous()
    grad_x, bent, slopes, normal = fused_backward(
        tight, x, down, start, up, scale, route, weight, bias, ctx.eps, ctx.kind, ctx.residual
    )
    strength = scale[:1] if route is None else torch.where(route >= 0, scale[route.clamp(min=0)], 0.0)
    sums = slopes.sum(1, dtype=torch.float32)  # (g, h)
    if weight is None:
        grad_down = slopes.mT @ x  # (g, h, i)
    else:
        grad_down = (slopes.mT @ normal).float() * weight + sums[..., None] * bias
    grad_end = tight.sum(1, dtype=torch.float32) * strength[:, None]
    stacks = ((grad_down, down), (sums, start), (tight.mT @ bent, up))
    found = [spread(part, stack, route) for part, stack in stacks]
    found.append(spread(grad_end, up.new_empty(up.shape[:2], dtype=ctx.end), route))
    return grad_x, grad if ctx.onto else None, *found, None, None, None, None, None, None, None


fused.register_autograd(_gradients, setup_context=_keep)


def _tile(hidden: int, dtype: torch.dtype) -> dict[str, int]:
    padded = max(16, triton.next_power_of_2(hidden))
    depth = 32 if dtype == torch.float32 else 64
    return {"ROWS": ROWS, "DEPTH": depth, "HIDDEN": padded, "num_warps": 4 if padded <= 64 else 8, "num_stages": 3}
