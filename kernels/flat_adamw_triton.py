"""The Triton path of `flat_adamw`: squares of blocks, sums of squares of adapters, the update of blocks.

Sums are added in a fixed order, so the bits are the same every time; all that changes between steps is read from
memory, so a captured graph goes on with new rates.
"""

from __future__ import annotations

from math import inf, log

import torch
import triton
import triton.language as tl
from torch import Tensor

from graft.kernels.flat_adamw import BLOCK


@triton.jit
def square_kernel(gradients, blocks, squares, BLOCK: tl.constexpr):
    """The sum of squares of a block."""
    block = tl.program_id(0)
    at = tl.load(blocks + 3 * block) + tl.arange(0, BLOCK)
    slope = tl.load(gradients + at, at < tl.load(blocks + 3 * block + 1), 0.0).to(tl.float32)
    tl.store(squares + block, tl.sum(slope * slope, 0))


@triton.jit
def norm_kernel(squares, firsts, limit, steps, factors, BLOCK: tl.constexpr):
    """An adapter's factor for its gradients; counts its step."""
    owner = tl.program_id(0)
    begin, end = tl.load(firsts + owner), tl.load(firsts + owner + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(squares + at, at < end, 0.0)
    norm = tl.sqrt(tl.sum(total, 0))
    tl.store(factors + owner, tl.minimum(tl.load(limit + owner) / (norm + 1e-6), 1.0))
    tl.store(steps + owner, tl.load(steps + owner) + tl.where(end > begin, 1.0, 0.0))


@triton.jit
def update_kernel(
    parameters,
    gradients,
    first,
    second,
    steps,
    blocks,
    rate,
    decay,
    factors,
    beta1,
    beta2,
    log1,
    log2,
    eps,
    BLOCK: tl.constexpr,
):
    """The step of a block."""
    block = tl.program_id(0)
    at = tl.load(blocks + 3 * block) + tl.arange(0, BLOCK)
    inside = at < tl.load(blocks + 3 * block + 1)
    owner = tl.load(blocks + 3 * block + 2)
    count = tl.load(steps + owner).to(tl.float64)  # in float32, 1 - 0.999 has four digits
    missing1 = (1.0 - tl.exp(count * log1)).to(tl.float32)
    missing2 = (1.0 - tl.exp(count * log2)).to(tl.float32)
    speed = tl.load(rate + owner)
    slope = tl.load(gradients + at, inside, 0.0).to(tl.float32) * tl.load(factors + owner)
    mean = tl.load(first + at, inside, 0.0)
    mean += (1.0 - beta1) * (slope - mean)
    square = tl.load(second + at, inside, 0.0)
    square = beta2 * square + (1.0 - beta2) * slope * slope
    value = tl.load(parameters + at, inside, 0.0)
    value *= 1.0 - speed * tl.load(decay + owner)
    value -= speed / missing1 * (mean / (tl.sqrt(square) / tl.sqrt(missing2) + eps))
    tl.store(parameters + at, value, inside)
    tl.store(first + at, mean, inside)
    tl.store(second + at, square, inside)


@torch.library.custom_op(
    "graft::flat_adamw",
    mutates_args=("parameters", "first", "second", "steps"),
    schema="(Tensor(a!) parameters, Tensor gradients, Tensor(b!) first, Tensor(c!) second, Tensor(d!) steps, "
    "Tensor blocks, Tensor firsts, Tensor rate, Tensor decay, Tensor limit, float beta1, float beta2, "
    "float eps) -> ()",
)
def fused(
    parameters: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
    blocks: Tensor,
    firsts: Tensor,
    rate: Tensor,
    decay: Tensor,
    limit: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Takes a step in place; names as in `flat_adamw.step`."""
    count = len(blocks)
    squares, factors = rate.new_empty(count), torch.empty_like(rate)
    square_kernel[(count,)](gradients, blocks, squares, BLOCK=BLOCK)
    norm_kernel[(len(rate),)](squares, firsts, limit, steps, factors, BLOCK=BLOCK)
    update_kernel[(count,)](
        *(parameters, gradients, first, second, steps, blocks, rate, decay, factors),
        *(beta1, beta2, *(log(beta) if beta else -inf for beta in (beta1, beta2)), eps),
        BLOCK=BLOCK,
    )


@fused.register_fake
def _(*given: object) -> None:
    return None
