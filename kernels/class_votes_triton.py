"""The Triton path of `class_votes`: a tile of affinities holds whole classes, is summed by class and never written.

Each class has the same number of columns, the next power of two of the largest; keys are read through their order.
Backward, which training calls on small batches, makes the affinities again and keeps them for two products.

Letters: m features, n keys, e width, c classes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 128, 128
"""Features and keys of a tile."""


@triton.jit
def votes_kernel(
    features,
    keys,
    order,
    starts,
    beta,
    y,
    count,
    width,
    classes,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Votes of a tile of features for a few classes."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CLASSES * WIDE)
    c = tl.program_id(1) * CLASSES + column // WIDE
    begin = tl.load(starts + c, c < classes, 0)
    place = begin + column % WIDE
    real = (c < classes) & (place < tl.load(starts + c + 1, c < classes, 0))
    key = tl.load(order + place, real, 0)
    row = tl.minimum(m, count - 1).to(tl.int64)
    near = tl.zeros((ROWS, CLASSES * WIDE), tl.float32)
    for start in range(0, width, DEPTH):
        e = start + tl.arange(0, DEPTH)
        part = tl.load(features + row[:, None] * width + e[None, :], e[None, :] < width, 0.0)
        other = tl.load(keys + key[None, :] * width + e[:, None], e[:, None] < width, 0.0)
        near = tl.dot(part, other, near, input_precision="ieee")
    votes = tl.where(real[None, :], tl.exp2((near - 1.0) * (beta * 1.4426950408889634)), 0.0)
    total = tl.sum(tl.reshape(votes, (ROWS, CLASSES, WIDE)), 2)
    c = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    tl.store(y + m[:, None].to(tl.int64) * classes + c[None, :], total, (m < count)[:, None] & (c < classes)[None, :])


@torch.library.custom_op(
    "graft::class_votes",
    mutates_args=(),
    schema="(Tensor features, Tensor keys, Tensor labels, Tensor order, Tensor starts, float beta, int count, "
    "int widest) -> Tensor",
)
def fused(
    features: Tensor,
    keys: Tensor,
    labels: Tensor,
    order: Tensor,
    starts: Tensor,
    beta: float,
    count: int,
    widest: int,
) -> Tensor:
    """Returns (m, c) float32 for features (m, e) and keys (n, e), contiguous; the rest as in `Classes`."""
    (m, width), wide = features.shape, triton.next_power_of_2(widest)
    half = features.dtype != torch.float32
    rows, columns = (ROWS, COLUMNS) if half else (ROWS // 2, max(COLUMNS // 2, wide))
    y = features.new_empty(m, count, dtype=torch.float32)
    grid = (triton.cdiv(m, rows), triton.cdiv(count, columns // wide))
    votes_kernel[grid](
        *(features, keys, order, starts, beta, y, m, width, count),
        ROWS=rows,
        CLASSES=columns // wide,
        WIDE=wide,
        DEPTH=64 if half else 32,
        num_warps=8,
        num_stages=3,
    )
    return y


@fused.register_fake
def _(features: Tensor, keys: Any, labels: Any, order: Any, starts: Any, beta: Any, count: int, widest: Any) -> Tensor:
    return features.new_empty(features.shape[0], count, dtype=torch.float32)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    features, keys, labels, _, _, ctx.beta, _, _ = inputs
    ctx.save_for_backward(features, keys, labels)


def _gradients(ctx: Any, grad: Tensor) -> Any:
    features, keys, labels = ctx.saved_tensors
    near = (keys @ features.T).float()
    slope = (torch.exp(ctx.beta * (near - 1)) * grad.T[labels] * ctx.beta).to(keys.dtype)  # (n, m)
    grad_features = slope.T @ keys if ctx.needs_input_grad[0] else None
    return grad_features, slope @ features if ctx.needs_input_grad[1] else None, *[None] * 6


fused.register_autograd(_gradients, setup_context=_keep)
