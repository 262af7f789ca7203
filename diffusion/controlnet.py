r"""ControlNet: a copy of the denoiser's encoder learns to lead the frozen denoiser by a condition map.

Zhang, Rao and Agrawala, "Adding Conditional Control to Text-to-Image Diffusion Models", 2023, arXiv:2302.05543. The
trainable copy F' of encoder and middle block reads the noisy latents x_t, the timestep t, the prompt and the map m; its
outputs go through convolutions Z_i of one pixel that start at zero, and are added to the skip connections h_i of the
frozen decoder D:

    y = D(h_1 + scale * Z_1(f_1), ..., h_n + scale * Z_n(f_n)),   f = F'(x_t + E(m), t, text)

where E is a small network of convolutions whose last one starts at zero too. So training starts exactly at the base,
whose encoder needs no backward pass. A share `empty_prompts` of all rows has an empty prompt, so that the map alone
must say what is to be seen. The network is diffusers' `ControlNetModel`, with its names. Differs from the authors'
code: E has as many halvings as the base's autoencoder, not always three, and starts from larger weights (`start`).
With torch's own, each layer leaves a third of what tells two maps apart, and behind seven of them there is a constant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.diffusion.map_networks import Follower, MapMethod
from graft.studio.errors import InputError
from graft.studio.formats import control_model, provenance

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase
    from graft.studio.adapter import Adapter

WIDTHS = (16, 32, 96, 256)
"""Of the map's encoder E: one more than it has halvings."""
ZEROS = ("controlnet_down_blocks.", "controlnet_mid_block.")
"""Names of the convolutions Z begin so."""
SHAPE = ("in_channels", "block_out_channels", "down_block_types", "cross_attention_dim", "layers_per_block")
"""What a copy of an encoder has in common with the denoiser."""


class Control(Follower):
    """A ControlNet beside a base."""

    def said(self, given: dict[str, Any], shown: Tensor) -> dict[str, Any]:
        """What is added to the skip connections and behind the middle block."""
        down, middle = self.bank(
            given["sample"],
            given["timestep"],
            encoder_hidden_states=given["encoder_hidden_states"],
            controlnet_cond=shown.repeat(len(given["sample"]) // len(shown), 1, 1, 1),
            conditioning_scale=self.scale,
            added_cond_kwargs=given.get("added_cond_kwargs"),
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def must_hear(self) -> dict[str, nn.Parameter]:
        """Weights of the convolutions that start at zero."""
        weights = ((name, p) for name, p in self.bank.named_parameters() if name.endswith(".weight"))
        return {name: p for name, p in weights if name.startswith(ZEROS)}


@torch.no_grad()
def start(encoder: Any) -> None:
    """Draws the convolutions of a map's encoder so that what tells maps apart is as large behind them as before.

    SiLU halves what is small, so weights are normal with deviation 2 / sqrt(inputs); biases are zero. The last
    convolution stays at zero.
    """
    for layer in (encoder.conv_in, *encoder.blocks):
        nn.init.normal_(layer.weight, std=2 / sqrt(layer.weight[0].numel()))
        nn.init.zeros_(layer.bias)


@dataclass(frozen=True)
class ControlNet(MapMethod):
    """Hyper-parameters of ControlNet.

    Example:
        >>> control = ControlNet(condition="canny").attach(base)  # doctest: +SKIP
        >>> control.follow_files("sketch.png")  # doctest: +SKIP
    """

    network = "ControlNetModel"
    title = "ControlNet"
    section = "controlnet"
    follower = Control
    formats = ("diffusers", "kohya")

    def new(self, base: DiffusionBase) -> Any:
        """A copy of the base's encoder with new convolutions for the map.

        Raises:
            InputError: a base whose map encoder would need another shape.
        """
        from diffusers import ControlNetModel

        factor = int(base.pipe.vae_scale_factor)
        widths = WIDTHS[: factor.bit_length()]
        if getattr(base.pipe, "unet", None) is None or 2 ** (len(widths) - 1) != factor:
            reason = "it needs a unet whose autoencoder shrinks pictures 2, 4 or 8 times"
            raise InputError(base.name, reason, "Use a base of Stable Diffusion 1, 2 or XL")
        network = ControlNetModel.from_unet(base.denoiser, conditioning_embedding_out_channels=widths)
        start(network.controlnet_cond_embedding)
        return network

    @classmethod
    def at_strength_1(cls, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """The same network with its last convolutions, those of one pixel, `scale` times as strong."""
        return {name: scale * tensor if name.startswith(ZEROS) else tensor for name, tensor in tensors.items()}

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes a folder for diffusers, or one file in the authors' layout (`kohya`), which AUTOMATIC1111 and ComfyUI
        read.

        Raises:
            InputError: another format.
        """
        if format != "kohya":
            return super().export(adapter, folder, format)
        tensors = cls.at_strength_1(adapter.tensors, adapter.card.config.get("scale", 1.0))
        return control_model.export(adapter, tensors, Path(folder), provenance.header(adapter.card))

    def misfit(self, network: Any, base: DiffusionBase) -> str:
        """The first part of its shape in which it differs from the denoiser."""
        for key in SHAPE:
            theirs, own = network.config[key], base.denoiser.config[key]
            if json.dumps(theirs) != json.dumps(own):
                return f"its {key} is {theirs}, that of {base.name} {own}"
        return ""
