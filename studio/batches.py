"""The batches of a training in order, drawn when they are needed or ahead of it by other processes.

A batch is a function of (seed, step, micro step, rank), so who draws it, and when, changes nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from graft.studio.job import TrainConfig


def step_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Return the seed of one micro step: 63 bits of a hash."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class _Batches(Dataset[tuple[int, Any]]):
    """Seed and batch of each micro step, counted over the whole training."""

    def __init__(self, task: Any, configs: Sequence[TrainConfig], rank: int, processes: int):
        self.task, self.configs, self.rank, self.processes = task, configs, rank, processes

    def __getitem__(self, place: int) -> tuple[int, Any]:
        step, micro = divmod(place, self.configs[0].gradient_accumulation)
        seeds = [step_seed(config.seed, step, micro, self.rank) for config in self.configs]
        number = place * self.processes + self.rank
        return seeds[0], self.task.batch(number, *(torch.Generator().manual_seed(seed) for seed in seeds))


def batches(
    task: Any, configs: Sequence[TrainConfig], rank: int, first_step: int, processes: int = 1
) -> Iterator[tuple[int, Any]]:
    """Yield seed and batch of each micro step from a step on.

    Args:
        task: its `batch` is called; with `workers`, in copies of this process, where it must not touch an accelerator.
        configs: of the jobs that share the batch; the longest says how many, each says its seed.
        rank: of this process among those that train together.
        first_step: where a resumed training goes on.
        processes: how many train together.
    """
    config, steps = configs[0], max(each.steps for each in configs)
    accumulation = config.gradient_accumulation
    ahead: dict[str, Any] = {}
    if config.workers:
        begin = partial(_begin, os.getpid())
        ahead = {"prefetch_factor": 4, "multiprocessing_context": "fork", "worker_init_fn": begin}
    loader = DataLoader(
        _Batches(task, configs, rank, processes),
        batch_size=None,
        sampler=range(first_step * accumulation, steps * accumulation),
        collate_fn=_as_it_is,
        num_workers=config.workers,
        **ahead,
    )
    return iter(loader)


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin(training: int, worker: int) -> None:
    """Ignore Ctrl-C, which reaches every process of a terminal, and end with the training, which decides when to stop.

    torch's workers look every five seconds whether their parent is another than when they began, so they stay for ever
    if it was killed before that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != training:
        os._exit(1)
