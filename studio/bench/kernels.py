"""`graft bench kernels`: every path of every fused operation, on the shapes of real models, errors beside times.

On a GPU in bfloat16, else on one CPU thread in float32 with fewer rows, where only the library path can run. ``eager``
is the operation as its paper writes it, in plain torch. Times are medians with a cold cache: as Python calls it, and
replayed from a captured CUDA graph, which leaves out what the CPU adds. An error is the distance to the formula in
float64 and stands as the ratio to eager's own; the promise is at most 1.5. ``chosen`` is what the dispatch takes by
itself. Graphs are also replayed with another mix of adapters than at capture, beside a plain call.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from graft.kernels import dispatch
from graft.kernels.dispatch import LIBRARY
from graft.studio.bench.kernel_cases import Case, cases, gradients
from graft.studio.disk import write_json

LIMITS = {"largest error over eager": 1.5, "choices over 1.1 x library": 0, "replays that differ": 0, "failures": 0}
"""What is promised; `run` reports each with its measured value."""

FLOOR = 1.2e-6
"""Ten roundings of float32: below it, which error is larger is chance, in sums over thousands of tokens."""
COLUMNS = ("frozen", "eager", LIBRARY, "triton", "eager*", "library*", "triton*", "gain", "gain*", "error")


def run(out: Path | None = None, rounds: int = 20, device: str = "", only: str = "") -> dict[str, Any]:
    """Measures, and returns rows, checks and a table.

    Args:
        out: folder for ``kernels.json``; None writes nothing.
        rounds: milliseconds that each time may take on a GPU; repetitions on a CPU, a tenth of it and two.
        device: cuda or cpu; the GPU if there is one when not given.
        only: operations to measure, joined by commas; all when not given.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    replays: list[dict[str, Any]] = []
    began = time.monotonic()
    with _measuring():
        for make in cases(place, set(only.split(",")) - {""}):
            case = make()
            rows += _measured(case, place, rounds)
            if place.type == "cuda" and case.route is not None:
                replays += _replayed(case)
    slower = [row for row in rows if row["chosen"] not in (None, LIBRARY) and row["gain"] < 1 / 1.1]
    values = (
        max((row["error"] for row in rows), default=0.0),
        len(slower),
        sum(replay["difference"] > 0.01 for replay in replays),
        sum(len(row["failures"]) for row in rows),
    )
    checks = {name: {"value": value, "limit": LIMITS[name]} for name, value in zip(LIMITS, values, strict=True)}
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else platform.machine(),
        "versions": {name: _version(name) for name in ("torch", "triton")},
        "seconds": round(time.monotonic() - began, 1),
        "checks": checks,
        "passed": all(check["value"] <= check["limit"] for check in checks.values()),
        "rows": rows,
        "replays": replays,
    }
    if out is not None:
        write_json(out / "kernels.json", result)
    return {**result, "table": table(result)}


def _measured(case: Case, place: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for the forward pass, and one for both where there are gradients."""
    errors, failures = _errors(case)
    fused = [path for path in case.paths if path not in ("frozen", "eager", LIBRARY)]
    for backward in (False, True) if case.wanted(case.inputs) else (False,):
        times, replayed = {}, {}
        for path in case.paths:
            work = partial(case.call, path, backward)
            times[path] = _milliseconds(work, place, rounds)
            if place.type == "cuda":
                try:
                    graph, _ = _captured(work)
                    replayed[path] = _milliseconds(graph.replay, place, rounds)
                except RuntimeError as error:
                    failures[f"{path}, replayed"] = str(error)
        with torch.set_grad_enabled(backward):
            chosen = case.choose(*case.inputs)
        row: dict[str, Any] = {"operation": case.operation, "shape": case.shape}
        row |= {"pass": "both" if backward else "forward", "chosen": chosen, "gain": times[LIBRARY] / times[chosen]}
        for mark, found in {"": times, "*": replayed}.items():
            row |= {f"{name}{mark}": found.get(name) for name in ("frozen", "eager", LIBRARY)}
            row[f"triton{mark}"] = min((found[path] for path in fused if path in found), default=None)
        row["gain*"] = row["library*"] / row["triton*"] if row["library*"] and row["triton*"] else None
        row["error"] = max(errors.values())
        yield row | {"errors": errors, "failures": failures, "times": times, "replayed": replayed}


def _errors(case: Case) -> tuple[dict[str, float], dict[str, str]]:
    """The largest of each path's errors, output or gradient, as a ratio to eager's; what a path that fails says."""
    backward = bool(case.wanted(case.inputs))
    found, failures = {}, {}
    for path in [path for path in case.paths if path != "frozen"]:
        try:
            found[path] = case.call(path, backward, _copied(case.inputs))
        except Exception as error:  # of Triton's compiler or launcher: one path less, not the end
            if path in ("eager", LIBRARY):
                raise
            failures[path] = f"{type(error).__name__}: {error}"
            del case.paths[path]
    wide = _copied(case.inputs, torch.float64)
    expected = case.reference(*wide)
    exact = [expected]
    if backward and case.upstream is not None:
        exact += gradients(expected, case.wanted(wide), case.upstream)
    errors = {path: [_distance(a, b) for a, b in zip(results, exact, strict=True)] for path, results in found.items()}
    eager = errors.pop("eager")
    ratios = {
        path: max(a / max(b, FLOOR / 1.5) for a, b in zip(values, eager, strict=True))
        for path, values in errors.items()
    }
    return ratios, failures


def _distance(value: Tensor, expected: Tensor) -> float:
    value, expected = value.detach().double(), expected.detach().double()
    norm = expected.norm()
    return float((value - expected).norm() / norm) if norm else float(value.abs().max())


def _copied(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Copies of the inputs, as leaves; what is one tensor stays one."""
    kept: dict[int, Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in kept:
                copy = value.detach().clone()
                copy = copy.to(dtype) if dtype is not None and copy.is_floating_point() else copy
                kept[id(value)] = copy.requires_grad_(value.requires_grad)
            return kept[id(value)]
        if isinstance(value, tuple):
            parts = [copied(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    return copied(value)


def _replayed(case: Case) -> Iterator[dict[str, Any]]:
    """How far a graph, given another mix of adapters than at capture, is from a plain call."""
    assert case.route is not None
    first = case.route.clone()
    other = torch.cat([first[1:], first.new_full((1,), -1)])
    for path in case.paths:
        if path in ("frozen", "eager"):
            continue
        graph, results = _captured(partial(case.call, path, True))
        case.route.copy_(other)
        graph.replay()
        pairs = list(zip(results, case.call(path, True), strict=True))
        yield {
            "operation": case.operation,
            "shape": case.shape,
            "path": path,
            "difference": max(_distance(a, b) for a, b in pairs),
            "same bits": all(torch.equal(a, b) for a, b in pairs),
        }
        case.route.copy_(first)


def _captured(work: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results


def _milliseconds(work: Callable[[], object], place: torch.device, rounds: int) -> float:
    if place.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(work, warmup=max(2, rounds // 4), rep=rounds, return_mode="median"))
    times = []
    for _ in range(3 + rounds // 10):
        began = time.process_time()
        work()
        times.append(1e3 * (time.process_time() - began))
    return median(times[1:])


@contextmanager
def _measuring() -> Iterator[None]:
    """One CPU thread, and a table of choices that begins empty and is not kept."""
    threads, before = torch.get_num_threads(), os.environ.get("GRAFT_CACHE")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRAFT_CACHE"] = folder
        known = dict(dispatch._known)
        dispatch._known.clear()
        try:
            yield
        finally:
            dispatch._known.update(known)
            torch.set_num_threads(threads)
            del os.environ["GRAFT_CACHE"]
            os.environ.update({} if before is None else {"GRAFT_CACHE": before})


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table(result: dict[str, Any]) -> str:
    """Returns the result of `run` as text."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [f"{result['device']}, {versions}, {result['seconds']} s", ""]
    lines.append(
        "milliseconds, medians; *: replayed from a CUDA graph; gain: of the dispatch's choice over the library;"
    )
    lines.append("gain*: of the best kernel, replayed; error: the largest, output or gradients, over that of eager")
    head = "".join(f"{name:>10}" for name in COLUMNS)
    lines += ["", f"{'operation, shape':66}{'pass':8}{head}  chosen"]
    for row in result["rows"]:
        cells = "".join(f"{'' if row[name] is None else format(row[name], '.3f'):>10}" for name in COLUMNS)
        lines.append(f"{row['operation'] + ' ' + row['shape']:66}{row['pass']:8}{cells}  {row['chosen']}")
    lines.append("")
    lines += [
        f"{row['shape']}, {path}: {said[:200]}" for row in result["rows"] for path, said in row["failures"].items()
    ]
    for replay in result["replays"]:
        bits = "same bits" if replay["same bits"] else "other bits"
        name = f"{replay['operation']} {replay['shape']}, {replay['path']}"
        lines.append(f"graph, other adapters: {name:80} {replay['difference']:.1e}, {bits}")
    for name, check in result["checks"].items():
        verdict = "ok" if check["value"] <= check["limit"] else "MISSED"
        lines.append(f"{name:38} {check['value']:8.3f}  limit {check['limit']:.2f}  {verdict}")
    return "\n".join(lines)
