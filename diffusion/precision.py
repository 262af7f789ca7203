"""The type that a frozen base computes in while something is trained on it, and the attention that is fast in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.diffusion.base import DiffusionBase

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PLAIN_SCORES = 1 << 17
"""Scores (queries times keys) of a row and head up to which plain attention is taken; bounds its memory too."""


class ShortAttention:
    """Attention processor of diffusers: plain products where there are few scores, the fused kernel where many.

    On a CPU the backward pass of the fused kernel is slow in 16 bits. Forward and backward of the fused one over those
    of the plain one, in bfloat16, on one thread of a Xeon with AMX, batches of 1 to 16: 16 x 16 positions 2.1 to 9,
    64 x 64 2.3 to 7, 256 x 256 1.0 to 2.5, 1024 x 77 1.4 to 1.9, 1024 x 1024 0.7 to 1.6. In float32 0.3 to 1.3: there
    the fused one stays.
    """

    def __init__(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        self.plain, self.fused = AttnProcessor(), AttnProcessor2_0()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(b, n, d) or (b, d, h, w) -> the same shape; diffusers calls it by these names."""
        queries = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states[0, 0].numel()
        keys = queries if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        attend = self.plain if queries * keys <= PLAIN_SCORES else self.fused
        out: Tensor = attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return out


def narrow(base: DiffusionBase, precision: str) -> None:
    """Puts the denoiser's frozen weights into the type of mixed precision, instead of casting them at every step.

    Args:
        base: on a CPU its attention becomes the one that is fast in 16 bits, unless another was asked for.
        precision: of the job's training section; "no", and an "auto" that was not settled, leave the base as it is.
    """
    if precision not in TYPES:
        return
    _ = base.hash  # the identity is that of the float32 weights
    nn.Module.to(base.denoiser, dtype=TYPES[precision])
    if base.device.type == "cpu" and base.attention == "auto":
        _attend_quickly(base)


def _attend_quickly(base: DiffusionBase) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    own, short = getattr(base.denoiser, "attn_processors", {}), ShortAttention()
    if any(type(processor) is AttnProcessor2_0 for processor in own.values()):
        base.denoiser.set_attn_processor({k: short if type(v) is AttnProcessor2_0 else v for k, v in own.items()})
    encoders: list[Any] = [module for name, module in base.modules.items() if name.startswith("text_encoder")]
    for encoder in encoders:
        if getattr(encoder.config, "max_position_embeddings", PLAIN_SCORES) ** 2 <= PLAIN_SCORES:
            encoder.set_attn_implementation("eager")
