"""Batches of scenes as tensors, drawn while training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from graft.studio.pocket.scenes import Scene, render


def rng_of(generator: torch.Generator) -> np.random.Generator:
    """Return a NumPy generator that continues a torch one: scenes are drawn with NumPy."""
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def pictures(scenes: Sequence[Scene]) -> Tensor:
    """Return the pictures of scenes, (b, 3, 64, 64) float32 in [-1, 1], channels last in memory."""
    stack = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    return stack.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
