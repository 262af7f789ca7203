"""The perceiver resampler of IP-Adapter "plus": a few learnt queries gather what an image encoder's patches say.

In each layer the queries attend to the patches and to themselves, then pass a feed-forward part (Alayrac et al.,
"Flamingo: a Visual Language Model for Few-Shot Learning", 2022, arXiv:2204.14198, section 3.1.1):

    z <- z + Attn(q = W_q N(z), k, v = W_kv [N(x); N(z)]),   z <- z + W_2 gelu(W_1 N(z))

Names of the tensors are those of IP-Adapter's files. Letters: b rows, n patches, m queries, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS, HEAD_WIDTH, EXPANSION = 4, 64, 4
"""What readers of the files take for granted."""


class PerceiverAttention(nn.Module):
    """Queries attend to the patches and to themselves."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, inner = heads, heads * HEAD_WIDTH
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, patches: Tensor, queries: Tensor) -> Tensor:
        """(b, n, d), (b, m, d) -> (b, m, d)."""
        queries = self.norm2(queries)
        key, value = self.to_kv(torch.cat([self.norm1(patches), queries], dim=1)).chunk(2, dim=-1)
        heads = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.to_q(queries), key, value))
        gathered: Tensor = self.to_out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return gathered


def feed_forward(width: int) -> nn.Sequential:
    """(b, m, d) -> (b, m, d)."""
    inner = EXPANSION * width
    layers = nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False)
    return nn.Sequential(nn.LayerNorm(width), *layers)


class Resampler(nn.Module):
    """Patches of a picture to a fixed number of tokens.

    Args:
        given: width of the patches.
        made: width of the tokens.
        queries: their number.
        width: inside; a head is 64 wide.
    """

    def __init__(self, given: int, made: int, queries: int, width: int):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, queries, width) / width**0.5)
        self.proj_in, self.proj_out = nn.Linear(given, width), nn.Linear(width, made)
        self.norm_out = nn.LayerNorm(made)
        heads = max(1, width // HEAD_WIDTH)
        pairs = ([PerceiverAttention(width, heads), feed_forward(width)] for _ in range(LAYERS))
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, patches: Tensor) -> Tensor:
        """(b, n, given) -> (b, m, made)."""
        queries, patches = self.latents.expand(len(patches), -1, -1), self.proj_in(patches)
        for layer in self.layers:
            attend, think = layer.children()
            queries = queries + attend(patches, queries)
            queries = queries + think(queries)
        tokens: Tensor = self.norm_out(self.proj_out(queries))
        return tokens
