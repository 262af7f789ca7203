r"""T2I-Adapter: a small network of convolutions leads the frozen denoiser's encoder by a condition map.

Mou, Wang, Xie, Wu, Zhang, Qi, Shan and Qie, "T2I-Adapter: Learning Adapters to Dig out More Controllable Ability for
Text-to-Image Diffusion Models", 2023, arXiv:2302.08453. The network A reads the map m alone, neither noise nor text nor
noise level, and its features, one for each level of the denoiser's encoder, are added to that level's own:

    h_i <- h_i + scale * A(m)_i,    i = 1 ... 4

So a picture needs it once, not at every step of drawing, and it is a fifth of a ControlNet's size: 77.4 M parameters
for Stable Diffusion 1.5, 79.0 M for XL. Noise levels are drawn with `levels = "cubic"` as

    t = (1 - u^3) T,    u uniform on (0, 1)

which has most of them at much noise, where a picture's composition is decided. The network is diffusers'
`T2IAdapter`, with its names: `full_adapter`, or `full_adapter_xl`, which shrinks the picture twice as much and adds its
last feature behind the middle block. Differs from the authors' code: it is narrower where the denoiser is. There are no
layers that start at zero, so training does not start at the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.diffusion.map_networks import Follower, MapMethod
from graft.studio.errors import InputError

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase


class Adapter(Follower):
    """A T2I-Adapter beside a base."""

    _seen: tuple[Tensor, list[Tensor]] | None = None

    def said(self, given: dict[str, Any], shown: Tensor) -> dict[str, Any]:
        """What is added inside the encoder; the network looks at a map once, however many steps draw after it."""
        if torch.is_grad_enabled() or self._seen is None or self._seen[0] is not shown:
            self._seen = shown, self.bank(shown)
        rounds = len(given["sample"]) // len(shown)
        features = [self.scale * feature.repeat(rounds, 1, 1, 1) for feature in self._seen[1]]
        return {"down_intrablock_additional_residuals": features}

    def must_hear(self) -> dict[str, nn.Parameter]:
        """Last weights of each level."""
        return {f"adapter.body.{i}": level.resnets[-1].block2.weight for i, level in enumerate(self.bank.adapter.body)}


@dataclass(frozen=True)
class T2IAdapter(MapMethod):
    """Hyper-parameters of T2I-Adapter.

    Example:
        >>> adapter = T2IAdapter(condition="soft_edge").attach(base)  # doctest: +SKIP
        >>> adapter.follow_files("sketch.png")  # doctest: +SKIP
    """

    empty_prompts: float = 0.0
    """Share of rows that are trained without their prompt."""
    levels: str = "cubic"
    """How noise levels are drawn: uniform, or cubic, most of them at much noise, where composition is decided."""

    network = "T2IAdapter"
    title = "T2I-Adapter"
    section = "t2i_adapter"
    follower = Adapter

    def new(self, base: DiffusionBase) -> Any:
        """An untrained network of the denoiser's widths.

        Raises:
            InputError: the denoiser has no encoder that features could be added to.
        """
        from diffusers import T2IAdapter as Network

        return Network(**shape(base))

    @classmethod
    def at_strength_1(cls, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """The same network on an input `scale` times as strong, with biases to match: all between them, convolutions,
        means and ReLU, keeps a positive factor."""
        first = "adapter.conv_in.weight"
        return {k: scale * x if k == first or k.endswith(".bias") else x for k, x in tensors.items()}

    def misfit(self, network: Any, base: DiffusionBase) -> str:
        """The first part of its shape that does not fit the denoiser."""
        for key, own in shape(base).items():
            theirs = network.config[key]
            if theirs != own:
                return f"its {key} is {theirs}, {base.name} needs {own}"
        return ""


def shape(base: DiffusionBase) -> dict[str, Any]:
    """Settings of diffusers' class for a base.

    Raises:
        InputError: a denoiser of another family.
    """
    kinds = tuple(base.denoiser.config.get("down_block_types", ()))
    first, crossed = kinds[:1], "CrossAttnDownBlock2D"
    factor = int(base.pipe.vae_scale_factor)
    if first == (crossed,) and all(kind == crossed for kind in kinds[:-1]):
        widths, kind = list(base.denoiser.config.block_out_channels), "full_adapter"
    elif first == ("DownBlock2D",) and 2 <= len(kinds) <= 3 and all(kind == crossed for kind in kinds[1:]):
        widths, kind = list(base.denoiser.config.block_out_channels), "full_adapter_xl"
        factor, widths = 2 * factor, widths + widths[-1:] * (len(widths) == 3)
    else:
        reason = "its denoiser has no encoder of the kind that a T2I-Adapter leads"
        raise InputError(base.name, reason, "Use a base of Stable Diffusion 1, 2 or XL")
    return {"in_channels": 3, "channels": widths, "num_res_blocks": 2, "downscale_factor": factor, "adapter_type": kind}
