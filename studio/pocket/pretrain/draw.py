"""Batches of scenes as tensors, drawn while training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from graft.studio.pocket.scenes import Scene, render


def rng_of(generator: torch.Generator) -> np.random.Generator:
    """Return a NumPy generator that continues a torch one: scenes are drawn with NumPy."""
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def worn(batch: Tensor, generator: torch.Generator, share: float = 0.5) -> Tensor:
    """Return pictures of which a share is blurred or noisy, as a copy, a small thumbnail or a generator leaves them."""
    out = batch.clone()
    for row in torch.nonzero(torch.rand(len(batch), generator=generator) < share).flatten().tolist():
        side = int(torch.randint(20, 56, (), generator=generator))
        small = interpolate(batch[row : row + 1], (side, side), mode="bilinear", antialias=True)
        out[row] = interpolate(small, batch.shape[-2:], mode="bilinear")[0]
        strength = 0.15 * torch.rand((), generator=generator)
        out[row] += strength * torch.randn(batch.shape[1:], generator=generator)
    return out.clamp_(-1, 1)


def on_device(batch: Any, task: nn.Module) -> Any:
    """Return a batch, a tensor or a tuple of tensors, where the task's parameters are."""
    from accelerate.utils import send_to_device

    return send_to_device(batch, next(task.parameters()).device, non_blocking=True)


def kept(folder: Path, name: str, of: Sequence[Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what `make` computes from networks and values `of`; computed once and kept in `folder`."""
    digest = hashlib.sha256()
    for part in of:
        tensors = part.state_dict().values() if isinstance(part, nn.Module) else ()
        for weight in tensors:
            digest.update(weight.float().cpu().numpy().tobytes())
        digest.update(b"" if isinstance(part, nn.Module) else repr(part).encode())
    path = folder / f"{name}-{digest.hexdigest()[:16]}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in make().items()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    return load_file(path)


def pictures(scenes: Sequence[Scene]) -> Tensor:
    """Return the pictures of scenes of one width, (b, 3, 64, width) float32 in [-1, 1], channels last in memory."""
    stack = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    return stack.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
