"""Attention over a few more keys, each group with its own softmax and gate, added to the main attention.

    y = main + sum_k gate_k softmax(q K_k' / sqrt d) V_k

Decoupled cross attention (IP-Adapter, arXiv:2308.06721): K_1 are the picture's tokens, gate_1 its scale; the text's may
be K_0 with gate 1 and no main. Zero-init gated prefix (LLaMA-Adapter, arXiv:2303.16199): K_1 is the prefix, gate_1 the
tanh of each head's gate, main the attention over the words. Several softmaxes are not one over all keys together.

Library path: torch's attention for every group. The Triton path reads q and writes y once, for all groups.

Letters: b batch rows, h heads, n queries, m keys, d width of a head.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.kernels.dispatch import LIBRARY, autocast, fastest, refusals

TRITON = "triton"


class Group(NamedTuple):
    """Keys with a softmax of their own."""

    key: Tensor
    """(b, h, m, d)."""
    value: Tensor
    """(b, h, m, d)."""
    gate: Tensor | None = None
    """Factor that broadcasts to (b, h): a number, (h,) or (b, 1), as it multiplies; None is 1."""


def reference(query: Tensor, groups: tuple[Group, ...], main: Tensor | None = None) -> Tensor:
    """Returns the formula in plain torch; the yardstick of `gated_attention`, with its shapes."""
    y = torch.zeros_like(query) if main is None else main
    for key, value, gate in groups:
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        y = y + weights @ value * (1.0 if gate is None else _wide(gate, query)[..., None, None])
    return y


def gated_attention(
    query: Tensor, groups: tuple[Group, ...], main: Tensor | None = None, path: str | None = None
) -> Tensor:
    """Returns the sum over the groups' gated attentions, and ``main`` if given.

    Args:
        query: (b, h, n, d).
        groups: one or two on the Triton path, any number on the other.
        main: (b, h, n, d), an attention that was computed elsewhere; it is not changed.
        path: "library" or "triton"; None takes the fastest.

    Returns:
        (b, h, n, d).
    """
    query, main = autocast(query, main)
    cast = [autocast(key, value) for key, value, _ in groups]
    groups = tuple(Group(key, value, group.gate) for (key, value), group in zip(cast, groups, strict=True))
    path = path or choose(query, groups, main)
    if path == LIBRARY:
        return _library(query, groups, main)
    from graft.kernels.gated_attention_triton import fused

    gates = [query.new_ones(()) if group.gate is None else group.gate for group in groups]
    y: Tensor = fused(
        query,
        main,
        [group.key for group in groups],
        [group.value for group in groups],
        [_wide(gate, query).float() for gate in gates],
    )
    return y


def supports(query: Tensor, groups: tuple[Group, ...], main: Tensor | None = None) -> list[str]:
    """Returns why the Triton path cannot do this; nothing if it can."""
    reasons = refusals(query, main, *(tensor for group in groups for tensor in group))
    if len(groups) > 2:
        reasons.append(f"{len(groups)} groups, of at most 2")
    if query.shape[-1] > 128:
        reasons.append(f"heads of width {query.shape[-1]} above 128")
    for key, value, _ in groups:
        if key.shape != value.shape or key.shape[:2] != query.shape[:2] or key.shape[-1] != query.shape[-1]:
            reasons.append(f"keys {tuple(key.shape)}, values {tuple(value.shape)} for {tuple(query.shape)}")
        if not 1 <= key.shape[2] <= 512:
            reasons.append(f"{key.shape[2]} keys, of 1 to 512")
        if key.dtype != query.dtype or value.dtype != query.dtype:
            reasons.append(f"keys of {key.dtype}, values of {value.dtype} for queries of {query.dtype}")
    return reasons


def _wide(gate: Tensor, query: Tensor) -> Tensor:
    return gate.expand(query.shape[:2])


def _library(query: Tensor, groups: tuple[Group, ...], main: Tensor | None) -> Tensor:
    y = main
    for key, value, gate in groups:
        part = F.scaled_dot_product_attention(query, key, value)
        if gate is not None and y is not None:
            y = torch.addcmul(y, part, _wide(gate, query)[..., None, None].to(part.dtype))
        else:
            part = part if gate is None else part * _wide(gate, query)[..., None, None].to(part.dtype)
            y = part if y is None else y + part
    assert y is not None
    return y


def choose(query: Tensor, groups: tuple[Group, ...], main: Tensor | None) -> str:
    """Returns the path that was fastest for this shape, measured with its backward if there will be one."""
    if not query.is_cuda or supports(query, groups, main):
        return LIBRARY
    tensors = [query, *(tensor for group in groups for tensor in group if tensor is not None)]
    wanted = [tensor for tensor in tensors if tensor.requires_grad and torch.is_grad_enabled()]

    def run(path: str) -> list[Tensor]:
        with torch.set_grad_enabled(bool(wanted)):
            y = gated_attention(query, groups, main, path)
            return [y, *torch.autograd.grad(y, wanted, y.detach())] if wanted else [y]

    lengths = "+".join(str(group.key.shape[2]) for group in groups)
    key = ("gated_attention", query.dtype, *query.shape, lengths, main is not None, len(wanted))
    return fastest(key, {path: partial(run, path) for path in (LIBRARY, TRITON)}, query.device)
