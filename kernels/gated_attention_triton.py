"""The Triton path of `gated_attention`: queries stay on the chip while they pass through every group of keys.

Forward writes y only. Backward makes the weights again, since a group has few keys: one kernel goes through the groups
twice for the gradient of the queries and the sums over keys (log-sum-exp, and ``delta``, the weighted mean of the
weights' gradients), one per group goes through the queries for those of keys and values. It adds up parts in a fixed
order, so the bits are the same every time. A gate's gradient is the sum of ``delta`` over the queries.

Letters: b batch rows, h heads, n queries, m keys, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, KEYS = 64, 64
"""Queries and keys of a tile."""


@triton.jit
def _scores(q, key, at, m, length, d, width: tl.constexpr, root):
    """Scaled scores of a tile of queries (in base 2, masked) and the addresses of its keys (m, d)."""
    where = at * length * width + m[:, None] * width + d[None, :]
    inside = (m[:, None] < length) & (d[None, :] < width)
    keys = tl.load(key + where, inside, 0.0)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * (root * 1.4426950408889634)
    return tl.where((m < length)[None, :], scores, -1.0e30), where, inside, keys


@triton.jit
def _attend(
    q,
    key,
    value,
    at,
    length,
    d,
    width: tl.constexpr,
    root,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Attention of a tile of queries over all keys of a group, (n, d) float32."""
    top = tl.full((QUERIES,), -1.0e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(0, length, KEYS):
        m = start + tl.arange(0, KEYS)
        scores, where, inside, _ = _scores(q, key, at, m, length, d, width, root)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(value + where, inside, 0.0)
        mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision="ieee")
        top = higher
    return mixed / total[:, None]


@triton.jit
def forward_kernel(
    query,
    main,
    y,
    key0,
    value0,
    gate0,
    key1,
    value1,
    gate1,
    queries,
    width: tl.constexpr,
    length0,
    length1,
    root,
    MAIN: tl.constexpr,
    TWO: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A tile of queries of one head of one batch row."""
    at = tl.program_id(1).to(tl.int64)
    n, d = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    where = at * queries * width + n[:, None] * width + d[None, :]
    inside = (n[:, None] < queries) & (d[None, :] < width)
    q = tl.load(query + where, inside, 0.0)
    total = _attend(q, key0, value0, at, length0, d, width, root, QUERIES, KEYS, WIDTH) * tl.load(gate0 + at)
    if TWO:
        total += _attend(q, key1, value1, at, length1, d, width, root, QUERIES, KEYS, WIDTH) * tl.load(gate1 + at)
    if MAIN:
        total += tl.load(main + where, inside, 0.0).to(tl.float32)
    tl.store(y + where, total.to(y.dtype.element_ty), inside)


@triton.jit
def _query_gradient(
    q,
    up,
    key,
    value,
    gate,
    sums,
    at,
    n,
    d,
    queries,
    length,
    width: tl.constexpr,
    root,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gradient of a tile of queries from one group; stores its log-sum-exp and delta."""
    top = tl.full((QUERIES,), -1.0e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mean = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, length, KEYS):
        m = start + tl.arange(0, KEYS)
        scores, where, inside, _ = _scores(q, key, at, m, length, d, width, root)
        values = tl.load(value + where, inside, 0.0)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        mean = mean * shrink + tl.sum(weights * tl.dot(up, tl.trans(values), input_precision="ieee"), 1)
        top = higher
    level, delta = top + tl.log2(total), mean / total
    tl.store(sums + (2 * at) * queries + n, level, n < queries)
    tl.store(sums + (2 * at + 1) * queries + n, delta, n < queries)
    strength = tl.load(gate + at) * root
    grad = tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(0, length, KEYS):
        m = start + tl.arange(0, KEYS)
        scores, where, inside, keys = _scores(q, key, at, m, length, d, width, root)
        values = tl.load(value + where, inside, 0.0)
        weights = tl.exp2(scores - level[:, None])
        slope = weights * (tl.dot(up, tl.trans(values), input_precision="ieee") - delta[:, None]) * strength
        grad = tl.dot(slope.to(keys.dtype), keys, grad, input_precision="ieee")
    return grad


@triton.jit
def query_gradient_kernel(
    query,
    upstream,
    grad,
    key0,
    value0,
    gate0,
    sums0,
    key1,
    value1,
    gate1,
    sums1,
    queries,
    width: tl.constexpr,
    length0,
    length1,
    root,
    TWO: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradient of a tile of queries; per group (b h, 2, n) its log-sum-exp in base 2 and its delta."""
    at = tl.program_id(1).to(tl.int64)
    n, d = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    where = at * queries * width + n[:, None] * width + d[None, :]
    inside = (n[:, None] < queries) & (d[None, :] < width)
    q, up = tl.load(query + where, inside, 0.0), tl.load(upstream + where, inside, 0.0)
    total = _query_gradient(
        q, up, key0, value0, gate0, sums0, at, n, d, queries, length0, width, root, QUERIES, KEYS, WIDTH
    )
    if TWO:
        total += _query_gradient(
            q, up, key1, value1, gate1, sums1, at, n, d, queries, length1, width, root, QUERIES, KEYS, WIDTH
        )
    tl.store(grad + where, total.to(grad.dtype.element_ty), inside)


@triton.jit
def key_gradient_kernel(
    query,
    upstream,
    key,
    value,
    gate,
    sums,
    parts,
    queries,
    width: tl.constexpr,
    length,
    root,
    tiles,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A share of the queries' part of the gradients of a tile of keys and values: parts is (2, splits, b h, m, d)."""
    at, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    m, d = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, WIDTH)
    grad_key = tl.zeros((KEYS, WIDTH), tl.float32)
    grad_value = tl.zeros((KEYS, WIDTH), tl.float32)
    where = at * length * width + m[:, None] * width + d[None, :]
    inside = (m[:, None] < length) & (d[None, :] < width)
    values = tl.load(value + where, inside, 0.0)
    for tile in range(split * tiles, split * tiles + tiles):
        n = tile * QUERIES + tl.arange(0, QUERIES)
        rows = at * queries * width + n[:, None] * width + d[None, :]
        real = (n[:, None] < queries) & (d[None, :] < width)
        q, up = tl.load(query + rows, real, 0.0), tl.load(upstream + rows, real, 0.0)
        scores, _, _, _ = _scores(q, key, at, m, length, d, width, root)
        level = tl.load(sums + (2 * at) * queries + n, n < queries, 0.0)
        delta = tl.load(sums + (2 * at + 1) * queries + n, n < queries, 0.0)
        weights = tl.where((n < queries)[:, None], tl.exp2(scores - level[:, None]), 0.0)
        grad_value = tl.dot(tl.trans(weights.to(up.dtype)), up, grad_value, input_precision="ieee")
        slope = weights * (tl.dot(up, tl.trans(values), input_precision="ieee") - delta[:, None])
        grad_key = tl.dot(tl.trans(slope.to(q.dtype)), q, grad_key, input_precision="ieee")
    strength = tl.load(gate + at)
    half = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * length * width
    place = parts + split.to(tl.int64) * tl.num_programs(1) * length * width + where
    tl.store(place, grad_key * (strength * root), inside)
    tl.store(place + half, grad_value * strength, inside)


@torch.library.custom_op(
    "graft::gated_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor? main, Tensor[] keys, Tensor[] values, Tensor[] gates) -> Tensor",
)
def fused(query: Tensor, main: Tensor | None, keys: list[Tensor], values: list[Tensor], gates: list[Tensor]) -> Tensor:
    """Returns (b, h, n, d); keys and values (b, h, m, d), gates (b, h) float32."""
    b, h, n, d = query.shape
    query, keys, values, gates = query.contiguous(), _dense(keys), _dense(values), _dense(gates)
    y = torch.empty_like(query)
    forward_kernel[(triton.cdiv(n, ROWS), b * h)](
        query,
        main.contiguous() if main is not None else query,
        y,
        *(keys[0], values[0], gates[0], keys[-1], values[-1], gates[-1]),
        *(n, d, keys[0].shape[2], keys[-1].shape[2], d**-0.5),
        MAIN=main is not None,
        TWO=len(keys) == 2,
        **_tile(d),
    )
    return y


@fused.register_fake
def _(query: Tensor, main: Any, keys: Any, values: Any, gates: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "graft::gated_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor[] keys, Tensor[] values, Tensor[] gates) -> Tensor[]",
)
def fused_backward(
    grad: Tensor, query: Tensor, keys: list[Tensor], values: list[Tensor], gates: list[Tensor]
) -> list[Tensor]:
    """Returns the gradients of the query, then of each group's keys, values and gate."""
    b, h, n, d = query.shape
    grad, query, keys, values, gates = grad.contiguous(), query.contiguous(), *map(_dense, (keys, values, gates))
    grad_query, sums = torch.empty_like(query), [query.new_empty(b, h, 2, n, dtype=torch.float32) for _ in keys]
    query_gradient_kernel[(triton.cdiv(n, ROWS), b * h)](
        query,
        grad,
        grad_query,
        *(keys[0], values[0], gates[0], sums[0], keys[-1], values[-1], gates[-1], sums[-1]),
        *(n, d, keys[0].shape[2], keys[-1].shape[2], d**-0.5),
        TWO=len(keys) == 2,
        **_tile(d),
    )
    found = [grad_query]
    tiles = triton.cdiv(n, ROWS)
    for key, value, gate, each in zip(keys, values, gates, sums, strict=True):
        m = key.shape[2]
        across = triton.cdiv(m, KEYS)
        splits = max(1, min(tiles, 264 // (across * b * h)))  # two programs for each processor of a large card
        parts = query.new_empty(2, splits, *key.shape, dtype=torch.float32)
        key_gradient_kernel[(across, b * h, splits)](
            *(query, grad, key, value, gate, each, parts, n, d, m, d**-0.5, triton.cdiv(tiles, splits)), **_tile(d)
        )
        grad_key, grad_value = parts.sum(1).to(key.dtype)
        found += [grad_key.clone(), grad_value.clone(), each[:, :, 1].sum(-1)]
    return found


@fused_backward.register_fake
def _(grad: Any, query: Tensor, keys: list[Tensor], values: list[Tensor], gates: list[Tensor]) -> list[Tensor]:
    groups = zip(keys, values, gates, strict=True)
    found = [query, *(tensor for group in groups for tensor in group)]
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in found]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    query, main, keys, values, gates = inputs
    ctx.groups, ctx.main = len(keys), main is not None
    ctx.save_for_backward(query, *keys, *values, *gates)


def _gradients(ctx: Any, grad: Tensor) -> Any:
    query, *rest = ctx.saved_tensors
    count = ctx.groups
    grad_query, *found = fused_backward(grad, query, rest[:count], rest[count : 2 * count], rest[2 * count :])
    return grad_query, grad if ctx.main else None, found[0::3], found[1::3], found[2::3]


fused.register_autograd(_gradients, setup_context=_keep)


def _dense(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _tile(width: int) -> dict[str, int]:
    padded = max(16, triton.next_power_of_2(width))
    return {"QUERIES": ROWS, "KEYS": KEYS, "WIDTH": padded, "num_warps": 4 if padded <= 64 else 8, "num_stages": 2}
