"""The text engine: text features from embeddings, with nothing computed twice that is the same for all classes.

A prompt learner changes a few input vectors and needs the features of every class at every step. Three things are exact
and cheap where the tower allows them (Radford et al. 2021, arXiv:2103.00020, is causal and reads the end mark):

- *cutting*: behind the end mark nothing is read, so 77 positions become as many as the longest name needs;
- *one prefix*: start mark and context are the same for all classes, and a causal tower never looks ahead, so keys and
  values of the prefix are computed once; only the names' own tokens run for each class;
- *one query*: in the last layer only the end mark's row is wanted.

Towers that see their padding or read the last position (SigLIP, CLIPA, some MobileCLIP) get whole rows, always.

Letters: g groups that have a prefix each (1, or the pictures of a batch), c classes, p prefix tokens, s suffix tokens,
n tokens, d width, h heads, e output width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graft.studio.errors import DataError

CHUNK = 8192
"""Tokens of a step above which classes go in chunks that are computed again in the backward pass."""
Map = Callable[[Tensor], Tensor]


class Words:
    """A tokenizer with its marks told apart from its words.

    Args:
        encode: text -> ids with marks, neither padded nor cut.
        length: positions of the text tower.
        pad: id that fills a row.
        start: id of the start mark, if rows begin with one.
        end: id of the end mark, if rows end with one.
    """

    def __init__(self, encode: Callable[[str], list[int]], length: int, pad: int, start: int | None, end: int | None):
        self.encode, self.length, self.pad = encode, length, pad
        probe = encode("a")
        self.start = [start] if start is not None and probe[:1] == [start] else []
        self.end = [end] if end is not None and probe[-1:] == [end] else []

    def content(self, text: str) -> list[int]:
        """Ids of a text without marks."""
        ids = self.encode(text)
        return ids[len(self.start) : len(ids) - len(self.end)]

    def row(self, content: Sequence[int], text: str) -> list[int]:
        """A padded row with marks.

        Raises:
            DataError: it is longer than the tower.
        """
        ids = [*self.start, *content, *self.end]
        if len(ids) > self.length:
            reason = f"its {len(ids)} tokens do not fit the {self.length} of the text tower"
            raise DataError(f"{text!r}", reason, "Shorten the class name, the template or the context")
        return ids + [self.pad] * (self.length - len(ids))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Rows of texts, (b, length) long."""
        return torch.tensor([self.row(self.content(text), text) for text in texts])


class Parts(NamedTuple):
    """What a pre-norm layer is made of; layer scales are inside `out` and `mlp`."""

    norm1: Map
    qkv: Callable[[Tensor], Sequence[Tensor]]
    """(..., d) -> queries, keys and values, (..., d) each."""
    out: Map
    norm2: Map
    mlp: Map
    heads: int


@dataclass(frozen=True, eq=False)
class Layer:
    """One transformer layer, as its library calls it and, where known, in parts."""

    whole: Callable[[Tensor, Tensor | None], Tensor]
    """(b, n, d) and an additive mask (n, n), or None -> (b, n, d). Adapters attached to its modules act."""
    parts: Parts | None
    """None: it cannot be taken apart, and prefixes are not shared."""


@dataclass(frozen=True, eq=False)
class TextTower:
    """The text side of a CLIP-type model, from token embeddings to features before normalisation."""

    embed: Map
    """Token ids (...) -> embeddings (..., d), without positions."""
    positions: Tensor
    """(length, d)."""
    layers: list[Layer]
    finish: Map
    """Final norm and projection: (..., d) -> (..., e)."""
    at: Map
    """Ids (b, length) -> the position whose output is the feature, (b,)."""
    causal: bool
    """Whether a token sees only those before it."""
    cuttable: bool
    """Whether what stands behind `at` changes nothing."""

    @property
    def length(self) -> int:
        """Positions."""
        return len(self.positions)

    @property
    def width(self) -> int:
        """Width d of the embeddings."""
        return self.positions.shape[1]

    @property
    def shares(self) -> bool:
        """Whether prefixes can be computed once."""
        return self.cuttable and all(layer.parts is not None for layer in self.layers)

    def encode_ids(self, ids: Tensor) -> Tensor:
        """Features of rows of ids, cut where that is exact: (b, length) -> (b, e)."""
        ids = ids.to(self.positions.device)
        at = self.at(ids)
        return self.encode(self.embed(self._cut(ids, at)), at)

    def _cut(self, rows: Tensor, at: Tensor) -> Tensor:
        return rows[:, : int(at.max()) + 1] if self.cuttable else rows

    def encode(self, x: Tensor, at: Tensor) -> Tensor:
        """Features of embeddings through the library's own layers: (b, n, d) and (b,) -> (b, e)."""
        n = x.shape[1]
        if not self.cuttable and n != self.length:
            raise ValueError(f"this tower needs all {self.length} positions, got {n}")
        x = self._placed(x, 0)
        mask = x.new_full((n, n), float("-inf")).triu(1) if self.causal else None
        for layer in self.layers:
            x = layer.whole(x, mask)
        return self.finish(x[torch.arange(len(x), device=x.device), at])

    def encode_shared(self, prefix: Tensor, suffix: Tensor, at: Tensor, chunk: int = CHUNK) -> Tensor:
        """Features of every suffix behind every prefix; the same numbers as `encode` of the two in a row.

        Args:
            prefix: (g, p, d), p at least 1.
            suffix: (c, s, d), or (g, c, s, d) where it depends on the group.
            at: (c,), positions in the suffix whose output is the feature.
            chunk: tokens that are worked on at once.

        Returns:
            (g, c, e).
        """
        keys = self._prefix(prefix)
        suffix = suffix[:, : int(at.max()) + 1] if suffix.dim() == 3 else suffix[:, :, : int(at.max()) + 1]
        groups, (count, tokens) = len(prefix), suffix.shape[-3:-1]
        suffix = self._placed(suffix, prefix.shape[1]).expand(groups, -1, -1, -1)
        step = max(1, chunk // (groups * tokens))
        run = partial(self._suffixes, keys)
        if step >= count:
            return run(suffix, at)
        again = partial(checkpoint, run, use_reentrant=False) if torch.is_grad_enabled() else run
        pieces = zip(suffix.split(step, dim=1), at.split(step), strict=True)
        return torch.cat([again(part, places) for part, places in pieces], dim=1)

    def _placed(self, x: Tensor, first: int) -> Tensor:
        """Embeddings (..., n, d) with their positions, in the tower's type: what is learnt may be wider."""
        return (x + self.positions[first : first + x.shape[-2]]).to(self.positions.dtype)

    def _parts(self) -> Iterator[tuple[int, Parts]]:
        for number, layer in enumerate(self.layers):
            assert layer.parts is not None
            yield number, layer.parts

    def _prefix(self, prefix: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the prefix in every layer, (g, h, p, d / h) each."""
        x = self._placed(prefix, 0)
        mask = x.new_full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        found = []
        for number, layer in self._parts():
            q, k, v = (_split(part, layer.heads) for part in layer.qkv(layer.norm1(x)))
            found.append((k, v))
            if number < len(self.layers) - 1:  # the last layer's prefix is read by nobody but its keys and values
                weights = (q @ k.mT * q.shape[-1] ** -0.5 + mask).softmax(-1)
                x = x + layer.out(_joined(weights @ v))
                x = x + layer.mlp(layer.norm2(x))
        return found

    def _suffixes(self, keys: list[tuple[Tensor, Tensor]], x: Tensor, at: Tensor) -> Tensor:
        """Features of (g, c, s, d) behind the prefix whose keys and values are given: (g, c, e)."""
        tokens = x.shape[2]
        mask = x.new_full((tokens, tokens), float("-inf")).triu(1)
        for number, layer in self._parts():
            q, k, v = layer.qkv(layer.norm1(x))
            if number == len(self.layers) - 1:
                q, x, mask = (_rows(part, at) for part in (q, x, mask.expand(1, len(at), -1, -1)))
                mask = mask[0]  # (c, 1, s)
            x = x + layer.out(_attend(q, k, v, keys[number], mask, layer.heads))
            x = x + layer.mlp(layer.norm2(x))
        return self.finish(x[:, :, 0])


def _split(x: Tensor, heads: int) -> Tensor:
    """(..., n, d) -> (..., h, n, d / h)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _joined(x: Tensor) -> Tensor:
    """(..., h, n, d / h) -> (..., n, d)."""
    return x.transpose(-3, -2).flatten(-2)


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """Row `at` of each class: (g, c, s, k) -> (g, c, 1, k)."""
    return x.gather(2, at.view(1, -1, 1, 1).expand(x.shape[0], -1, 1, x.shape[-1]))


def _attend(q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor], mask: Tensor, heads: int) -> Tensor:
    """Attention of suffixes to the prefix, without copying it for every class, and to themselves.

    Args:
        q: (g, c, q, d), the queries wanted.
        k: (g, c, s, d).
        v: (g, c, s, d).
        prefix: keys and values, (g, h, p, d / h).
        mask: (q, s) or (c, q, s).
        heads: h.
    """
    q, k, v = (part.unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4) for part in (q, k, v))  # (g, h, c, n, d/h)
    q = q * q.shape[-1] ** -0.5
    shape = q.shape[2:4]
    before = (q.flatten(2, 3) @ prefix[0].mT).unflatten(2, shape)  # (g, h, c, q, p)
    weights = torch.cat([before, q @ k.mT + mask], dim=-1).softmax(-1)
    first, own = weights.split([before.shape[-1], k.shape[-2]], dim=-1)
    y = (first.flatten(2, 3) @ prefix[1]).unflatten(2, shape) + own @ v
    return y.permute(0, 2, 3, 1, 4).flatten(-2)


def transformers_layers(encoder: Any) -> list[Layer]:
    """Layers of a transformers CLIP or SigLIP text encoder."""
    return [_transformers_layer(layer) for layer in encoder.layers]


def _transformers_layer(layer: Any) -> Layer:
    def whole(x: Tensor, mask: Tensor | None) -> Tensor:
        y = layer(x, attention_mask=None if mask is None else mask[None, None])
        return y if isinstance(y, Tensor) else y[0]  # a tuple before transformers 5

    attention = layer.self_attn

    def qkv(x: Tensor) -> list[Tensor]:
        return [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]

    parts = Parts(layer.layer_norm1, qkv, attention.out_proj, layer.layer_norm2, layer.mlp, layer.self_attn.num_heads)
    return Layer(whole, parts)


def open_clip_layers(transformer: Any) -> list[Layer]:
    """Layers of open_clip's text transformer."""
    return [_open_clip_layer(block) for block in transformer.resblocks]


def _open_clip_layer(block: Any) -> Layer:
    def whole(x: Tensor, mask: Tensor | None) -> Tensor:
        return block(x, attn_mask=mask)

    attention = block.attn
    if type(attention).forward is not nn.MultiheadAttention.forward or not attention.batch_first:
        return Layer(whole, None)

    def qkv(x: Tensor) -> Sequence[Tensor]:
        return F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)

    # Called as a function: torch's attention never calls its `out_proj`, so a hook on it would not fire either.
    parts = Parts(
        block.ln_1,
        qkv,
        lambda x: block.ls_1(F.linear(x, attention.out_proj.weight, attention.out_proj.bias)),
        block.ln_2,
        lambda x: block.ls_2(block.mlp(x)),
        attention.num_heads,
    )
    return Layer(whole, parts)
