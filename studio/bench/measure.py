"""Seconds, saved activations and peak memory of a piece of work, on one thread of the CPU."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], object]
Seconds = dict[str, list[tuple[float, float]]]
"""(CPU, wall) seconds of each piece of work in each round."""

_SHORTEST = 0.1
"""CPU seconds that a time is taken over, at least: shorter work is repeated."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def interleaved(works: Mapping[str, Work], rounds: int) -> Seconds:
    """Returns the seconds of each work in each round, after one that warms up.

    Every other round is reversed, so that a busy machine hurts all alike.
    """
    seconds: Seconds = {name: [] for name in works}
    first = {name: timed(work)[0] for name, work in works.items()}
    warm = {name: min(took, timed(works[name])[0]) if took < _SHORTEST else took for name, took in first.items()}
    repeats = {name: ceil(_SHORTEST / max(took, 1e-4)) for name, took in warm.items()}
    for turn in range(rounds):
        for name in list(works)[:: 1 if turn % 2 else -1]:
            seconds[name].append(timed(works[name], repeats[name]))
    return seconds


def timed(work: Work, repeats: int = 1) -> tuple[float, float]:
    """Returns (CPU, wall) seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats


def ratio(seconds: Seconds, name: str, over: str) -> float:
    """Returns the median over rounds of the ratio of two works' CPU seconds in the same round."""
    return median(a[0] / b[0] for a, b in zip(seconds[name], seconds[over], strict=True))


def medians(seconds: list[tuple[float, float]]) -> dict[str, float]:
    """Returns the medians of a work's CPU and wall seconds."""
    return {"cpu": median(cpu for cpu, _ in seconds), "wall": median(wall for _, wall in seconds)}


def saved_bytes(forward: Work, own: Iterable[Tensor]) -> int:
    """Returns the bytes of the distinct storages that a forward pass keeps for backward, but for those of ``own``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def peak_allocated(work: Work) -> int:
    """Returns by how many bytes the tensors on the CPU rise at most while it works.

    This is what torch asks for: the same every time, without what the system's allocator makes of it (`peak_rise`).
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes of itself to standard error
    with torch.autograd.profiler.profile(profile_memory=True) as record:
        work()
    results: Any = record.kineto_results
    changes = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes), default=0)


def peak_rise(work: Work) -> int | None:
    """Returns by how many bytes the process's resident memory rises at most while it works; None outside Linux.

    Free memory that the allocator holds is given back first, and the kernel's mark of the highest value is set down
    to the present one, so the work of before does not count.
    """
    gc.collect()
    try:
        trim: Any = ctypes.CDLL(None).malloc_trim
        trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
