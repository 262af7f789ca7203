"""The four models that `graft bench core` adapts: classes of the libraries that people use, with random weights.

Each takes its input as what the block before hands on (pictures for the vision transformer), and one token a row as
well: the regime where the cost of calling, not of computing, decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.studio.errors import InputError


@dataclass(frozen=True)
class Subject:
    """A frozen model, what it is called with, and where adapters go."""

    name: str
    """One word, for columns."""
    work: str
    """What is measured, for people."""
    model: nn.Module
    """Called as ``model(*inputs)``, gives a tensor."""
    layers: tuple[str, ...]
    """Linear layers that get an adapter, by the end of their name."""
    inputs: tuple[Tensor, ...]
    """Of a step: 8 rows."""
    small: tuple[Tensor, ...]
    """Of the launch-bound regime: 16 rows of one token."""
    inside: bool = True
    """Whether there are blocks before it in the whole model, so that its input needs a gradient too."""


class _Vision(nn.Module):
    def __init__(self, vit: Any):
        super().__init__()
        self.vit = vit

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) to logits, or tokens (b, n, d) to features."""
        out: Tensor = self.vit(x) if x.dim() == 4 else self.vit.norm(self.vit.blocks(x))
        return out


class _Text(nn.Module):
    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Embedded tokens (b, n, d), each of which sees those before it."""
        out: Tensor = self.encoder(inputs_embeds=x, is_causal=True).last_hidden_state
        return out


class _Denoiser(nn.Module):
    def __init__(self, block: Any):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Features (b, d, h, w) with a text (b, n, 768)."""
        out: Tensor = self.block(x, encoder_hidden_states=context, return_dict=False)[0]
        return out


class _Language(nn.Module):
    def __init__(self, llama: Any):
        super().__init__()
        self.llama = llama

    def forward(self, x: Tensor) -> Tensor:
        """Embedded tokens (b, n, d)."""
        out: Tensor = self.llama(inputs_embeds=x, use_cache=False).last_hidden_state
        return out


def vit(tiny: bool) -> Subject:
    """timm's ViT-S without class token."""
    import timm

    depth, width = (1, 64) if tiny else (12, 384)
    sizes = {"depth": depth, "embed_dim": width, "num_heads": width // 64, "img_size": 64 if tiny else 224}
    model = timm.create_model("vit_small_patch16_224", class_token=False, global_pool="avg", **sizes)
    pictures = torch.randn(8, 3, sizes["img_size"], sizes["img_size"])
    work = f"timm ViT-S, {depth} blocks of width {width}, {(sizes['img_size'] // 16) ** 2} tokens"
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    return Subject("vit", work, _Vision(model), layers, (pictures,), (torch.randn(16, 1, width),), inside=False)


def clip(tiny: bool) -> Subject:
    """transformers' CLIP text tower."""
    from transformers import CLIPTextConfig, CLIPTextModel

    depth, width, tokens = (1, 64, 8) if tiny else (12, 512, 77)
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=width // 64
    )
    model: Any = CLIPTextModel(config)
    work = f"transformers CLIP text tower, {depth} blocks of width {width}, {tokens} tokens"
    layers = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    inputs = (torch.randn(8, tokens, width),)
    return Subject("clip", work, _Text(model.encoder), layers, inputs, (torch.randn(16, 1, width),), inside=False)


def unet(tiny: bool) -> Subject:
    """diffusers' transformer block, as the first of Stable Diffusion 1.5."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    width, side, words = (64, 4, 8) if tiny else (320, 32, 77)
    block = Transformer2DModel(8, width // 8, width, num_layers=1, cross_attention_dim=768)
    work = f"diffusers block of SD 1.5's UNet, width {width}, {side} x {side}, {words} text tokens of width 768"
    layers = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    inputs = (torch.randn(8, width, side, side), torch.randn(8, words, 768))
    return Subject(
        "unet", work, _Denoiser(block), layers, inputs, (torch.randn(16, width, 1, 1), torch.randn(16, 1, 768))
    )


def llama(tiny: bool) -> Subject:
    """transformers' Llama block with grouped queries."""
    from transformers import LlamaConfig, LlamaModel

    width, tokens = (64, 8) if tiny else (1024, 128)
    heads = width // 64
    sizes = {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4), "vocab_size": 8}
    model = LlamaModel(LlamaConfig(hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=1, **sizes))
    grouped = f"{heads} heads over {sizes['num_key_value_heads']}"
    work = f"transformers Llama block, width {width}, {grouped}, {tokens} tokens"
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Subject(
        "llama", work, _Language(model), layers, (torch.randn(8, tokens, width),), (torch.randn(16, 1, width),)
    )


SUBJECTS: dict[str, Callable[[bool], Subject]] = {"vit": vit, "clip": clip, "unet": unet, "llama": llama}


def subject(name: str, tiny: bool) -> Subject:
    """Returns a model by name, frozen, in evaluation mode.

    Raises:
        InputError: no such model, or its library is not installed.
    """
    if name not in SUBJECTS:
        raise InputError(f"models {name!r}", "there is no such model", f"use {', '.join(SUBJECTS)}")
    try:
        made = SUBJECTS[name](tiny)
    except ImportError as error:
        raise InputError("bench core", f"{error.name} is not installed", "pip install 'graft-studio[dev]'") from error
    made.model.requires_grad_(False).eval()
    return made
