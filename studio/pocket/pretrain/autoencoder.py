"""Train the autoencoder of `pocket-sd`: 64 px pictures to 8 x 8 x 16 latents and back.

An `AutoencoderKL` (Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022, arXiv
2112.10752) with the usual factor of 8, narrow and without attention so that two CPU cores can train it:

    loss = |x - x'| + 0.5 |grad x - grad x'| + 2 (x - x')^2 + 1e-4 KL(q(z | x), N(0, 1)),   all means over elements

There is no adversarial or perceptual term: sprites have sharp edges and flat areas, which the gradient term covers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.pretrain import network_adapter
from graft.studio.pocket.pretrain.draw import on_device, pictures, rng_of
from graft.studio.pocket.scenes import COLOURS, Scene, Thing, centred, sample_scene

if TYPE_CHECKING:
    from pathlib import Path

    from graft.studio.adapter import Adapter
    from graft.studio.job import TrainConfig

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 96),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": 64,
    "mid_block_add_attention": False,
}


def crowded_scene(rng: np.random.Generator, sprites: tuple[int, ...]) -> Scene:
    """Draw a scene that five sprites fill, overlapping: every pixel teaches the autoencoder something."""
    ground = sample_scene(rng, sprites)
    things = []
    for sprite in rng.choice(sprites, 5, replace=False):
        size = int(rng.integers(5, 14)) * 4
        x, y = (int(v) for v in rng.integers(0, 64 - size + 1, 2))
        things.append(Thing(int(sprite), size, x, y))
    return Scene(tuple(things), ground.colour, ground.texture)


@dataclass(frozen=True)
class Autoencoder:
    """Which half is trained, and from what."""

    go_on: bool = False
    """Start from the committed weights instead of from nothing."""
    decoder_only: bool = False
    """Go on from the committed weights with the decoder: latents, and so the UNet, stay as they are."""

    compile: bool = False
    """Compile the network: a minute more at the start, each step a third shorter on a CPU."""

    def task(self, train: TrainConfig) -> AutoencoderTask:
        """Return the training."""
        task = AutoencoderTask(train.batch_size, self.decoder_only, self.compile)
        if self.go_on or self.decoder_only:
            from graft.studio.pocket import models

            task.vae.load_state_dict(models.autoencoder().state_dict())
        return task


class AutoencoderTask(nn.Module):
    """One training of the autoencoder.

    Args:
        batch_size: pictures in a step. Half are crowded scenes; for the decoder alone, plain ones.
        decoder_only: leave the encoder as it is.
        compile: compile encoder and decoder.
    """

    default_learning_rate = 2e-3

    def __init__(self, batch_size: int = 16, decoder_only: bool = False, compile: bool = False):
        super().__init__()
        from diffusers import AutoencoderKL

        self.batch_size, self.decoder_only = batch_size, decoder_only
        self.sprites = Atlas.load().known
        self.vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
        if compile:
            self.vae.encoder.compile()
            self.vae.decoder.compile()
        if decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)

    def batch(self, step: int, generator: torch.Generator) -> Tensor:
        """Return pictures (b, 3, 64, 64) in [-1, 1]."""
        rng = rng_of(generator)
        half = self.batch_size // 2
        if self.decoder_only:
            colours = rng.choice(list(COLOURS), half)
            scenes = [centred(int(s), str(c)) for s, c in zip(rng.choice(self.sprites, half), colours, strict=True)]
        else:
            scenes = [crowded_scene(rng, self.sprites) for _ in range(half)]
        scenes += [sample_scene(rng, self.sprites) for _ in range(self.batch_size - half)]
        return pictures(scenes)

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts for pictures (b, 3, h, w)."""
        batch = on_device(batch, self)
        posterior = self.vae.encode(batch).latent_dist
        output = self.vae.decode(posterior.sample()).sample.float()
        error = output - batch
        absolute, square = error.abs().mean(), error.square().mean()
        gradient = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        psnr = -10 * torch.log10(square.detach() / 4)
        return absolute + 0.5 * gradient + 2 * square + 1e-4 * kl, {"psnr": psnr, "kl": kl.detach()}

    @torch.no_grad()
    def sample(self, step: int, folder: Path) -> list[Path]:
        """Draw eight scenes and, below them, what comes back."""
        from graft.studio.pocket.measures import reconstructions
        from graft.studio.pocket.report import grid

        scenes, output = reconstructions(self.vae.eval(), self.sprites, 8)
        self.vae.train()
        path = folder / f"{step:06d}.png"
        grid(torch.cat([scenes, output]), 8, 2).save(path)
        return [path]

    def adapter(self, metrics: dict[str, Any]) -> Adapter:
        """Return the network."""
        return network_adapter(self.vae, "autoencoder", metrics)
