"""The Triton path of `lora_linear`: base product and low-rank product in one accumulator, so that y is written once.

    y = x W' + b + s (x A') B',    grad_x = grad W + s (grad B) A

Both are one kernel: backward reads the same tensors with their roles swapped. The thin product ``s x A'`` is either
accumulated while x streams by (inline, no second read of x), or given (split, a library product). Tiles of rows never
straddle batch rows, so each tile has one slot and reads its factors from the table of all slots; graphs and compiled
code stay valid when rows choose other slots.

Features are cut into equal bands (q, k and v of a packed projection), each with its own ranks: forward, a tile of
outputs has one band; backward, the loop over inputs goes through them.

Letters: g batch rows, n tokens, i input width, o output width, k slots, r rank, c bands.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graft.kernels.lora_linear import Term

TILES: tuple[tuple[int, int, int, int, int], ...] = ((128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (64, 64, 32, 4, 3))
"""Rows, features and depth of a tile, warps, stages. The last is for float32 and for few rows."""


@triton.jit
def product_kernel(
    x,
    w,
    bias,
    a,
    b,
    hidden,
    scale,
    route,
    y,
    tokens,
    inside,
    outside,
    rank,
    slots,
    w_o,
    w_i,
    a_slot,
    a_band,
    a_r,
    a_i,
    b_slot,
    b_band,
    b_o,
    b_r,
    IN_BANDS: tl.constexpr,
    OUT_BANDS: tl.constexpr,
    INLINE: tl.constexpr,
    BIAS: tl.constexpr,
    ROUTED: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
):
    """One tile of y; names as in `lora_linear`, ``inside`` and ``outside`` are the widths of x and y."""
    band_in = inside // IN_BANDS
    band_out = outside // OUT_BANDS
    across = tl.cdiv(band_out, COLS)
    down = tl.cdiv(tokens, ROWS)
    # Eight tiles of rows share their tiles of weights in the cache.
    each = 8 * across * OUT_BANDS
    pid = tl.program_id(0)
    height = tl.num_programs(0) // (across * OUT_BANDS)
    first = pid // each * 8
    share = tl.minimum(height - first, 8)
    tile = first + pid % each % share
    column = pid % each // share
    row, out_band = tile // down, column // across
    slot = row * 0
    if ROUTED:
        slot = tl.load(route + row).to(tl.int32)
    on = slot >= 0
    slot = tl.maximum(slot, 0).to(tl.int64)

    n = tile % down * ROWS + tl.arange(0, ROWS)
    o = column % across * COLS + tl.arange(0, COLS)
    n_in, o_in = n < tokens, o < band_out
    at = row.to(tl.int64) * tokens + tl.where(n_in, n, 0)
    o = out_band * band_out + o  # masked, not clamped: clamped, it would not be known to be contiguous
    r = tl.arange(0, RANK)
    r_in = r < rank

    total = tl.zeros((ROWS, COLS), tl.float32)
    for in_band in tl.static_range(IN_BANDS):
        band = out_band + in_band  # one of the two is 0
        thin = tl.zeros((ROWS, RANK), tl.float32)
        for start in range(0, band_in, DEPTH):
            step = start + tl.arange(0, DEPTH)
            i = in_band * band_in + step
            x_at = x + at[:, None] * inside + i[None, :]
            w_at = w + o[None, :] * w_o + i[:, None] * w_i
            a_at = a + slot * a_slot + band * a_band + r[None, :] * a_r + i[:, None] * a_i
            if WHOLE:
                part, weights = tl.load(x_at), tl.load(w_at)
                factors = tl.load(a_at, r_in[None, :], 0.0) if INLINE else weights
            else:
                i_in = step < band_in
                part = tl.load(x_at, i_in[None, :], 0.0)
                weights = tl.load(w_at, i_in[:, None] & o_in[None, :], 0.0)
                factors = tl.load(a_at, i_in[:, None] & r_in[None, :], 0.0) if INLINE else weights
            total = tl.dot(part, weights, total, input_precision="ieee")
            if INLINE:
                thin = tl.dot(part, factors, thin, input_precision="ieee")
        hidden_at = hidden + at[:, None] * (rank * IN_BANDS * OUT_BANDS) + band * rank + r[None, :]
        if INLINE:
            factor = tl.where(on, tl.load(scale + band * slots + slot), 0.0)
            narrow = tl.where(on, thin * factor, 0.0).to(x.dtype.element_ty)
            if column % across == 0:
                tl.store(hidden_at, narrow, n_in[:, None] & r_in[None, :])
        else:
            narrow = tl.load(hidden_at, r_in[None, :], 0.0)
        b_at = b + slot * b_slot + band * b_band + o[None, :].to(tl.int64) * b_o + r[:, None] * b_r
        total = tl.dot(narrow, tl.load(b_at, r_in[:, None] & o_in[None, :], 0.0), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + o, o_in, 0.0).to(tl.float32)[None, :]
    y_at = y + at[:, None] * outside + o[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), n_in[:, None] & o_in[None, :])


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    route: Tensor | None,
    mode: int,
    backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns y (g, n, o) and the scaled thin product (g, n, c r); backward takes the gradient of y for x.

    Args:
        x: (g, n, i), contiguous; backward (g, n, o).
        weight: (o, i), contiguous.
        bias: (o,) or None.
        down: (k, c r, i), contiguous, in the type of x.
        up: (k, o, r), likewise.
        scale: (c, k) float32.
        route: (g,) long, -1 for none; None is slot 0.
        mode: twice the number of the tile, plus 1 for inline.
        backward: whether the roles are swapped.
    """
    (rows, cols, depth, warps, stages), inline = TILES[mode // 2], mode % 2 == 1
    slots, _, rank = up.shape
    bands = down.shape[1] // rank
    g, n, _ = x.shape
    o, i = weight.shape
    width_in, width_out = (o, i) if backward else (i, o)
    y, hidden = x.new_empty(g, n, width_out), x.new_empty(g, n, bands * rank)
    if not inline:
        hidden = _thin(x, down, up, scale, route, bands, backward)
    in_bands, out_bands = (bands, 1) if backward else (1, bands)
    weight_strides, down_strides = (i, 1), (down.stride(0), rank * i, i, 1)
    up_strides = (up.stride(0), 0, rank, 1)
    if backward:
        weight_strides = (1, i)
        down_strides, up_strides = (up.stride(0), 0, 1, rank), (down.stride(0), rank * i, 1, i)
    grid = (g * triton.cdiv(n, rows) * triton.cdiv(width_out // out_bands, cols) * out_bands,)
    product_kernel[grid](
        x,
        weight,
        bias if bias is not None else weight,
        *((up, down) if backward else (down, up)),
        hidden,
        scale,
        route if route is not None else scale,
        y,
        n,
        width_in,
        width_out,
        rank,
        slots,
        *weight_strides,
        *down_strides,
        *up_strides,
        IN_BANDS=in_bands,
        OUT_BANDS=out_bands,
        INLINE=inline,
        BIAS=bias is not None,
        ROUTED=route is not None,
        WHOLE=width_in // in_bands % depth == 0 and width_out // out_bands % cols == 0,
        ROWS=rows,
        COLS=cols,
        DEPTH=depth,
        RANK=max(16, triton.next_power_of_2(rank)),
        num_warps=warps,
        num_stages=stages,
    )
    return y, hidden


def _thin(
    x: Tensor, down: Tensor, up: Tensor, scale: Tensor, route: Tensor | None, bands: int, backward: bool
) -> Tensor:
    """The scaled thin product, (g, n, c r), by the library."""
    slot, picked = None, scale[:, :1]
    if route is not None:
        slot = route.clamp(min=0)
        picked = torch.where(route >= 0, scale[:, slot], 0.0)
    rank = up.shape[2]
    factor = picked.T.repeat_interleave(rank, 1)[:, None].to(x.dtype)  # (g, 1, c r)
    if not backward:
        return x @ (down[0] if slot is None else down[slot]).mT * factor
    factors = (up[0] if slot is None else up[slot]).unflatten(-2, (bands, -1))  # (..., c, o / c, r)
    parts = x.unflatten(-1, (bands, -1))
    return torch.cat([parts[:, :, c] @ factors[..., c, :, :] for c in range(bands)], -1) * factor


def packed(x: Tensor, weight: Tensor, bias: Tensor | None, terms: tuple[Term, ...], bands: int, path: str) -> Tensor:
    """Returns what `lora_linear` does: the factors of all bands side by side, then one product."""
    mode, tile = path.split()
    first, size = terms[0], terms[0].up.shape[1]
    down, up, scale, route = first.down, first.up, first.scale[None], first.route
    if bands > 1:
        placed = {(term.rows or (0, 0))[0] // size: term for term in terms}
        blank = Term(torch.zeros_like(down), torch.zeros_like(up), torch.zeros_like(first.scale))
        ordered = [placed.get(band, blank) for band in range(bands)]
        down, up = torch.cat([term.down for term in ordered], 1), torch.cat([term.up for term in ordered], 1)
        scale = torch.stack([term.scale for term in ordered])
    if route is not None and len(down) > 2 * len(route):  # a large table: better not cast all of it
        slot = route.clamp(min=0)
        down, up, scale = down[slot], up[slot], scale[:, slot]
        route = torch.where(route >= 0, torch.arange(len(route), device=route.device), -1)
    x3 = x.reshape(1 if route is None else x.shape[0], -1, x.shape[-1]).contiguous()
    factors = (down.contiguous(), up.contiguous(), scale.float())
    y: Tensor
    y, _ = fused(x3, weight.contiguous(), bias, *factors, route, 2 * int(tile) + (mode == "inline"))
    return y.view(*x.shape[:-1], -1)


@torch.library.custom_op(
    "graft::lora_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor scale, Tensor? route, int "
    "mode) -> (Tensor, Tensor)",
)
def fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    route: Tensor | None,
    mode: int,
) -> tuple[Tensor, Tensor]:
    """Returns y (g, n, o) and what backward keeps, (g, n, c r); shapes as in `launch`, factors of any type."""
    return launch(x, weight, bias, down.to(x.dtype), up.to(x.dtype), scale, route, mode)


@fused.register_fake
def _(x: Tensor, weight: Any, bias: Any, down: Tensor, up: Any, scale: Any, route: Any, mode: int) -> Any:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(*x.shape[:-1], down.shape[1])


@torch.library.custom_op(
    "graft::lora_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor weight, Tensor down, Tensor up, Tensor scale, Tensor? route, int mode) -> "
    "(Tensor, Tensor)",
)
def fused_backward(
    grad: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: Tensor, route: Tensor | None, mode: int
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of x, (g, n, i), and that of ``x A'``, (g, n, c r)."""
    return launch(grad, weight, None, down.to(grad.dtype), up.to(grad.dtype), scale, route, mode, backward=True)


@fused_backward.register_fake
def _(grad: Tensor, weight: Any, down: Tensor, up: Any, scale: Any, route: Any, mode: int) -> Any:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1]), grad.new_empty(*grad.shape[:-1], down.shape[1])


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, down, up, scale, route, ctx.mode = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, down, up, scale, route, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Any) -> Any:
    x, weight, down, up, scale, route, hidden = ctx.saved_tensors
    grad, bands = grad.contiguous(), down.shape[1] // up.shape[2]
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x, grad_hidden = fused_backward(grad, weight, down, up, scale, route, ctx.mode)
    else:
        grad_hidden = _thin(grad, down.to(grad.dtype), up.to(grad.dtype), scale, route, bands, backward=True)
    grad_down = None if x is None else spread(_sum(grad_hidden, x, route), down, route)
    parts = zip(grad.chunk(bands, -1), hidden.chunk(bands, -1), strict=True)
    grad_up = spread(torch.cat([_sum(a, b, route) for a, b in parts], 1), up, route)
    return grad_x, None, None, grad_down, grad_up, None, None, None


fused.register_autograd(_gradients, setup_context=_keep)


def _sum(a: Tensor, b: Tensor, route: Tensor | None) -> Tensor:
    """``a' b`` of each group, (g, a, b)."""
    return (a.flatten(0, 1).T @ b.flatten(0, 1))[None] if route is None else a.mT @ b


def spread(grad: Tensor, stack: Tensor, route: Tensor | None) -> Tensor:
    """Gradients of groups, (g, ...), summed into those of the stack, (k, ...); the same bits every time."""
    if route is None:
        return torch.cat([grad.to(stack.dtype), torch.zeros_like(stack[1:])])
    chosen = route == torch.arange(len(stack), device=route.device)[:, None]  # index_add_ on a GPU has no fixed order
    return (chosen.to(stack.dtype) @ grad.flatten(1).to(stack.dtype)).view(stack.shape)
