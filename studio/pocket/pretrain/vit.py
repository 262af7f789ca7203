"""Train `pocket-vit`: which known sprite is in the picture.

A timm `VisionTransformer` (Dosovitskiy et al., An Image is Worth 16x16 Words: Transformers for Image Recognition at
Scale, 2021, arXiv 2010.11929) for 64 px pictures in patches of 8, with one class for each known sprite and cross
entropy on smoothed labels. It sees scenes of one thing at any size and place; a part of them is worn (blurred, noisy),
since it also judges what the diffusion model draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.pretrain import network_adapter
from graft.studio.pocket.pretrain.draw import on_device, pictures, rng_of, worn
from graft.studio.pocket.scenes import COLOURS, Scene, centred, sample_scene

if TYPE_CHECKING:
    from pathlib import Path

    from graft.studio.adapter import Adapter
    from graft.studio.job import TrainConfig

ARCHITECTURE = "vit_tiny_patch16_224"
"""The entry of timm whose settings `CONFIG` changes."""
CONFIG: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 160,
    "depth": 6,
    "num_heads": 5,
    "num_classes": 900,
}


class Batch(NamedTuple):
    """Pictures (b, 3, 64, 64) and the place of each one's sprite among the known ones (b,)."""

    pictures: Tensor
    target: Tensor


@dataclass(frozen=True)
class Vit:
    """What it is trained from and on."""

    go_on: bool = False
    """Start from the committed weights instead of from nothing."""
    worn: float = 0.25
    """Share of blurred or noisy pictures."""
    label_smoothing: float = 0.05
    """Probability that is spread over all classes."""

    def task(self, train: TrainConfig) -> VitTask:
        """Return the training."""
        task = VitTask(train.batch_size, self.worn, self.label_smoothing)
        if self.go_on:
            from graft.studio.pocket import models

            task.vit.load_state_dict(models.vit().state_dict())
        return task


class VitTask(nn.Module):
    """One training of the classifier.

    Args:
        batch_size: pictures in a step.
        worn: share of blurred or noisy pictures.
        label_smoothing: probability that is spread over all classes.
    """

    default_learning_rate = 1e-3

    def __init__(self, batch_size: int = 128, worn: float = 0.25, label_smoothing: float = 0.05):
        super().__init__()
        from timm import create_model

        self.batch_size, self.worn, self.label_smoothing = batch_size, worn, label_smoothing
        self.known = Atlas.load().known
        self.vit = create_model(ARCHITECTURE, **CONFIG)
        for block in self.vit.blocks:
            block.attn.fused_attn = False  # on a CPU the fused one takes twice as long for 65 tokens

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """Return the pictures of one step; no sprite occurs twice."""
        rng = rng_of(generator)
        target = rng.permutation(len(self.known))[: self.batch_size]
        scenes = [self._scene(rng, self.known[k]) for k in target]
        return Batch(worn(pictures(scenes), generator, self.worn), torch.from_numpy(target))

    def _scene(self, rng: np.random.Generator, sprite: int) -> Scene:
        """Draw a scene of one sprite; one in eight is the plainest."""
        if rng.random() < 0.125:
            return centred(sprite, str(rng.choice(list(COLOURS))))
        return sample_scene(rng, [sprite], objects=(1.0,))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the share of pictures told rightly."""
        batch = on_device(batch, self)
        logits = self.vit(batch.pictures).float()
        hit = (logits.argmax(1) == batch.target).float().mean()
        return cross_entropy(logits, batch.target, label_smoothing=self.label_smoothing), {"top1": hit}

    def sample(self, step: int, folder: Path) -> list[Path]:
        """Draw nothing: this model has no pictures of its own."""
        return []

    def adapter(self, metrics: dict[str, Any]) -> Adapter:
        """Return the network."""
        return network_adapter(self.vit, "vit", metrics)
