"""Which of an operation's paths runs: the one that was fastest on this device for this shape.

A path is measured once, on the inputs at hand, and the choice is kept in a file: a run that goes on in another process
takes the same path and gets the same bits. The library path is the floor: another one must give its results on these
inputs, gradients included, and be faster by `MARGIN`.
Where nothing can be measured (under torch.compile, while a CUDA graph is captured) an unknown shape takes the library.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("graft")

LIBRARY = "library"
"""Name of the path in plain torch."""
MARGIN = 0.97
"""What another path's time may be at most, as a share of the library's."""
DISTANCES = {torch.float32: 3e-3, torch.float16: 3e-2, torch.bfloat16: 3e-2}
"""How far another path's result may be from the library's, relative to its norm."""
HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's kernels run on the CPU, one numpy operation at a time: for tests."""
_known: dict[tuple[object, ...], str] = {}
"""Choices of this process, where compiled code finds them."""


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Returns tensors of one device as torch's own products would see them: under autocast in its type."""
    kind = next(tensor for tensor in tensors if tensor is not None).device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def refusals(*tensors: Tensor | None) -> list[str]:
    """Returns why no Triton kernel can run on these tensors: nothing if one can."""
    given = [tensor for tensor in tensors if tensor is not None]
    reasons = []
    if not HAS_TRITON:
        reasons.append("triton is not installed")
    if len(devices := {tensor.device for tensor in given}) > 1:
        reasons.append(f"tensors on {', '.join(sorted(map(str, devices)))}")
    if not (given[0].is_cuda or INTERPRETED):
        reasons.append(f"device {given[0].device.type} has no Triton")
    elif given[0].is_cuda and given[0].device.index != torch.cuda.current_device():
        reasons.append("not the current device")  # where Triton would launch
    if given[0].dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"{given[0].dtype} is not float16, bfloat16 or float32")
    if given[0].numel() == 0:
        reasons.append("no elements")
    return reasons


def fastest(key: tuple[object, ...], paths: Mapping[str, Callable[[], Sequence[Tensor]]], device: torch.device) -> str:
    """Returns the name of the path to take.

    Args:
        key: what the time depends on: operation, shapes, types.
        paths: what to run, by name; one of them is `LIBRARY`. Each returns its results.
        device: a CUDA device; any other has the library only.
    """
    if device.type != "cuda":
        return LIBRARY
    if key in _known or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return _known.get(key, LIBRARY)
    table, name = _table(_file(device)), "/".join(map(str, key))
    if table.get(name) not in paths:
        expected = paths[LIBRARY]()
        times = {path: _milliseconds(run, path, expected) for path, run in paths.items()}
        best = min(times, key=lambda path: times[path])
        table[name] = best if times[best] <= MARGIN * times[LIBRARY] else LIBRARY
        _write(_file(device), table)
        log.debug("%s: %s", name, ", ".join(f"{path} {time:.3f} ms" for path, time in times.items()))
    _known[key] = table[name]
    return table[name]


def agree(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Returns whether results are those of the library, but for rounding; what is not finite never is."""
    for result, wanted in zip(results, expected, strict=True):
        distance = (result.double() - wanted.double()).norm()
        if not distance <= DISTANCES[wanted.dtype] * wanted.double().norm():
            return False
    return True


def _milliseconds(run: Callable[[], Sequence[Tensor]], name: str, expected: Sequence[Tensor]) -> float:
    """Median time of a path; one that fails or errs counts as endless, so that the library takes its place."""
    try:
        if not agree(run(), expected):
            raise ArithmeticError("its results are not the library's")
        for _ in range(3):
            run()
        times = []
        for _ in range(10):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return median(times)
    except Exception as error:  # of the compiler, the launcher or the card: what they raise is not one family
        if name == LIBRARY:
            raise
        log.warning("kernel path %s is left out: %s", name, error)
        return float("inf")


def _file(device: torch.device) -> Path:
    """The table of a kind of card, for this version of torch."""
    root = Path(os.environ.get("GRAFT_CACHE") or Path.home() / ".cache" / "graft")
    card = torch.cuda.get_device_name(device).replace(" ", "-")
    return root / "kernels" / f"{card}-{torch.__version__}.json"


@cache
def _table(file: Path) -> dict[str, str]:
    return _read(file)


def _read(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text())
        return {str(key): str(value) for key, value in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(file: Path, table: Mapping[str, str]) -> None:
    """Keeps the table, with what other processes wrote in the meantime."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({**_read(file), **table}, indent=1, sort_keys=True))
        draft.replace(file)
    except OSError as error:
        log.debug("the choice of kernels is not kept: %s", error)
