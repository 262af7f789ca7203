"""A projector that says of every picture the same number of tokens: learnt queries that attend to the tower's features.

Jean-Baptiste Alayrac et al.: Flamingo: a Visual Language Model for Few-Shot Learning, 2022, arXiv:2204.14198, its
Perceiver resampler; queries that read a frozen tower are also the bridge of BLIP-2 (Q-Former), arXiv:2301.12597.

    x = W_in V(picture),    y = W_out LN q,    q <- q + attention(LN q, [LN x; LN q]) and q <- q + F(LN q) in each block

q starts as the learnt queries (``queries``, width), F is a network of one hidden layer, four times as wide, with
GELU. The language model gets ``queries`` tokens for a picture whatever the tower's resolution, where LLaVA's own
projector gives one for each patch. Differs from the authors' code: no positions of frames, since a picture has one; the
tower's own positions are in its features. With "linear" or "mlp" in its place a model stays plain LLaVA.

transformers' LLaVA has no place for such a projector. So the model is one class below its own, with ``model_type``
"graft_llava": `load_base` reads its folder, which is otherwise one of transformers, and transformers alone refuses the
unknown type. Its processor is LLaVA's own, told to write as many image tokens as there are queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from graft.studio.config import require


@dataclass(frozen=True)
class ResamplerSettings:
    """Shape of the projector.

    Example:
        >>> base = assemble("clip-folder", "llama-folder", ResamplerSettings(queries=32))  # doctest: +SKIP
    """

    queries: int = 64
    """Tokens of a picture."""
    blocks: int = 2
    """Times that they attend to the tower's features."""
    width: int = 0
    """Of the queries; 0 is the tower's."""

    def __post_init__(self) -> None:
        require("queries", self.queries, self.queries >= 1, "1 or more")
        require("blocks", self.blocks, self.blocks >= 1, "1 or more")
        require("width", self.width, self.width >= 0, "0 or more")


class ResamplerLlavaConfig(LlavaConfig):
    """A LLaVA's config with the shape of its resampler."""

    model_type = "graft_llava"

    resampler_queries: int = 64
    resampler_blocks: int = 2
    resampler_width: int = 0

    @property
    def resampler(self) -> ResamplerSettings:
        """The shape as settings."""
        return ResamplerSettings(self.resampler_queries, self.resampler_blocks, self.resampler_width)


class Block(nn.Module):
    """Queries attend to features and themselves, then each goes through a network."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = gcd(width, max(1, width // 64))
        self.norm_x, self.norm_q, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        """(p, k, w) and (p, n, w) -> (p, k, w)."""
        own = self.norm_q(q)
        seen = torch.cat([self.norm_x(x), own], 1)
        parts = (self.q_proj(own), self.k_proj(seen), self.v_proj(seen))
        y = scaled_dot_product_attention(*(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts))
        q = q + self.o_proj(y.transpose(1, 2).flatten(2))
        found: Tensor = q + self.down(gelu(self.up(self.norm(q))))
        return found


class Resampler(nn.Module):
    """Learnt queries, blocks, and the way to the language model's width."""

    def __init__(self, config: ResamplerLlavaConfig):
        super().__init__()
        vision, text, layer = config.vision_config, config.text_config, config.vision_feature_layer
        features = vision.hidden_size * (1 if isinstance(layer, int) else len(layer))
        width = config.resampler.width or vision.hidden_size
        self.into = nn.Linear(features, width)
        self.queries = nn.Parameter(torch.randn(config.resampler.queries, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(config.resampler.blocks))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, text.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """(p, n, c) -> (p, k, d)."""
        x = self.into(features)
        q = self.queries.expand(len(x), -1, -1)
        for block in self.blocks:
            q = block(q, x)
        y: Tensor = self.out(self.norm(q))
        return y


class ResamplerLlava(LlavaForConditionalGeneration):
    """transformers' LLaVA with a resampler where its projector was."""

    config_class = ResamplerLlavaConfig

    def __init__(self, config: Any):
        super().__init__(config)
        self.model.multi_modal_projector = Resampler(config)


def register() -> None:
    """Lets the automatic classes of transformers know the model, for this process."""
    AutoConfig.register(ResamplerLlavaConfig.model_type, ResamplerLlavaConfig, exist_ok=True)
    AutoModelForImageTextToText.register(ResamplerLlavaConfig, ResamplerLlava, exist_ok=True)
