"""The forward of torch's MultiheadAttention as products that slots can join, and a call of its output layer.

torch hands the packed weight and that of ``out_proj`` to one function, so nothing that is put on a layer acts there.
The result is torch's own, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.studio.config import require
from graft.studio.errors import InputError

Project = Callable[[Tensor, int, int], Tensor]
"""Rows a to b of the packed projection of a sequence (b, n, d)."""


def refuse_xformers(attention: str, library: str) -> None:
    """Refuses a setting `attention` that a base of a library without xformers cannot have.

    Raises:
        InputError: xformers, or no such way to compute attention.
    """
    require("attention", attention, attention in ("auto", "sdpa", "xformers"), '"auto", "sdpa" or "xformers"')
    if attention == "xformers":
        reason = f"models of {library} compute their attention by torch, and have no place for xformers"
        raise InputError('attention = "xformers"', reason, 'Take "sdpa" or "auto"')


def is_plain_attention(module: nn.Module | None) -> bool:
    """Whether a module is a MultiheadAttention of the usual form: one packed weight, no further keys."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
    )


def attend(
    module: Any,
    project: Project,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns what ``module(query, key, value, ...)`` does; the arguments after ``project`` are torch's.

    ``is_causal`` only says what ``attn_mask`` holds, and is not needed.
    """
    same = (query is key, key is value)
    batched = query.dim() == 3
    q, k, v = (_batch_first(x, module.batch_first, batched) for x in (query, key, value))
    d, heads = module.embed_dim, module.num_heads
    if all(same):
        q, k, v = _heads(project(q, 0, 3 * d), 3, heads)
    elif same[1]:
        (q,), (k, v) = _heads(project(q, 0, d), 1, heads), _heads(project(k, d, 3 * d), 2, heads)
    else:
        q, k, v = (_heads(project(x, i * d, (i + 1) * d), 1, heads)[0] for i, x in enumerate((q, k, v)))
    mask = _mask(attn_mask, key_padding_mask if batched else _first(key_padding_mask), q)
    dropout = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        scores = q @ k.mT / sqrt(q.shape[-1])
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        out = weights @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    y = module.out_proj(out.transpose(1, 2).flatten(2))
    if weights is not None:
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights[0]
    if not batched:
        return y[0], weights
    return (y if module.batch_first else y.transpose(0, 1)), weights


def _heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Parts of (b, n, parts d), each (b, heads, n, d / heads)."""
    return x.view(*x.shape[:2], parts, heads, -1).permute(2, 0, 3, 1, 4).unbind()


def _batch_first(x: Tensor, already: bool, batched: bool) -> Tensor:
    if not batched:
        return x[None]
    return x if already else x.transpose(0, 1)


def _first(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[None]


def _mask(attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as one that is added to the scores, (b or 1, heads or 1, n, s); True means left out."""
    parts = []
    if attention is not None:
        whole = attention if attention.dim() == 2 else attention.unflatten(0, (q.shape[0], -1))
        parts.append(_additive(whole, q.dtype))
    if padding is not None:
        parts.append(_additive(padding[:, None, None], q.dtype))
    return None if not parts else sum(parts[1:], parts[0])


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
