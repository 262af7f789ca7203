"""`graft bench batch`: many subjects with two methods, some of them broken, killed once, beside single calls.

Every subject is a *new* sprite with its own pictures. Some rows are broken: a missing folder, a folder without
pictures, a picture that is none. The batch gets SIGKILL, its command, scheduler and worker, when a part of it is done,
and is started again. It must end with a result for each sound row and method, a clear failure for each broken one, and
no run done twice. The time of both starts together stands beside that of a call of `graft train` for each sound row and
method, with the CPU seconds of both. Where only some single calls are timed, half of them come before the batch and
half after it, so that a machine that gets slower or faster counts for both.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from graft.studio.config import write_toml
from graft.studio.runs.folder import Run, list_runs
from graft.studio.runs.lock import holder

LIMIT = 0.6
"""Time of the batch over that of the single calls."""


def run(
    out: Path | None = None,
    subjects: int = 30,
    broken: int = 3,
    steps: int = 100,
    singles: int = 0,
    methods: Sequence[str] = ("textual_inversion", "lora"),
    base: str = "pocket-sd",
) -> dict[str, Any]:
    """Train a batch, kill it, go on, and compare.

    Args:
        out: folder for `batch.json`, the summary and the sheet; None takes a temporary one.
        subjects: rows of the manifest.
        broken: of them.
        steps: of each job.
        singles: single calls that are timed for each method, the rest taken as long as their mean; 0 times all.
        methods: each trains every subject.
        base: what is adapted.
    """
    with tempfile.TemporaryDirectory(prefix="graft-batch-") as spare:
        where = Path(spare)
        environment = {**os.environ, "GRAFT_STATE": str(where / "state"), "GRAFT_DEVICES": "cpu"}
        names = _write(where, subjects, broken, steps, methods, base)
        _train(where, names[0], methods[0], environment)  # fills the caches of frozen things that both share
        some = names[: singles or None]
        early = len(some) // 2 if singles else 0
        calls = [_train(where, name, method, environment) for name in some[:early] for method in methods]
        with _adopting():
            batch = _batch(where, environment)
        calls += [_train(where, name, method, environment) for name in some[early:] for method in methods]
        single, single_cpu = (sum(each) * len(names) / len(some) for each in zip(*calls, strict=True))
        result = {"subjects": subjects, "broken": broken, "steps": steps, **batch}
        result |= {"single s": single, "single CPU s": single_cpu, "ratio": batch["batch s"] / single}
        if out is not None:
            from graft.studio.disk import write_atomic, write_json

            write_json(Path(out) / "batch.json", result)
            for path in (where / "runs" / "garden.batch").glob("*.*"):
                write_atomic(Path(out) / path.name, path.read_bytes())
    sound = (subjects - broken) * len(methods)
    right = (result["finished"], result["failed"]) == (sound, broken * len(methods)) and not result["twice"]
    result["passed"] = right and result["ratio"] <= LIMIT
    result["table"] = (
        f"{subjects} subjects ({broken} broken) x {len(methods)} methods, {steps} steps: {result['finished']} results, "
        f"{result['failed']} clear failures; killed with {result['done before']} done, {result['twice']} done twice\n"
        f"batch {result['batch s']:.0f} s, its restart among it; single calls {result['single s']:.0f} s; "
        f"ratio {result['ratio']:.3f} (limit {LIMIT})\n"
        f"CPU: batch {result['batch CPU s']:.0f} s, single calls {result['single CPU s']:.0f} s"
    )
    return result


def _write(where: Path, subjects: int, broken: int, steps: int, methods: Sequence[str], base: str) -> list[str]:
    """Write pictures, a manifest, and a job for each sound subject and method; return the sound subjects."""
    from graft.diffusion.bench.pictures import new_sprites, write_pictures

    shared = {"steps": steps, "device": "cpu", "log_every": 10, "batch_size": 4, "checkpoint_every": max(steps // 4, 1)}
    sample = {"steps": 10, "seeds": [0], "prompts": ["a photo of {token}"]}
    rows: list[dict[str, Any]] = []
    sound: list[str] = []
    sprites = new_sprites(subjects)
    for k, sprite in enumerate(sprites):
        name, folder = f"subject {k:02d}", where / f"photos-{k:02d}"
        rows.append({"name": name, "data": folder.name, "set": {"train.seed": k}})
        if k % max(subjects // max(broken, 1), 1) == 1 and len(rows) - 1 - len(sound) < broken:
            _break(folder, len(rows) - 1 - len(sound))
            continue
        sound.append(name)
        write_pictures(folder, sprite)
        for method in methods:
            job = {"base": base, "method": {"name": method}, "data": {"path": folder.name}, "name": name}
            job |= {"train": {**shared, "seed": k}, "sample": {**sample, "every": 1_000_000}}
            (where / f"{name} {method}.toml").write_text(write_toml(job))
    manifest = {"base": base, "train": shared, "sample": sample, "methods": [{"name": name} for name in methods]}
    (where / "garden.toml").write_text(write_toml({**manifest, "subjects": rows}))
    return sound


def _break(folder: Path, kind: int) -> None:
    """Make a folder that cannot be used: it is missing, empty, or holds no picture."""
    if kind % 3 == 0:
        return
    folder.mkdir()
    if kind % 3 == 2:
        (folder / "1.png").write_bytes(b"no picture at all")


def _batch(where: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Start, kill, start again."""
    began, used = time.perf_counter(), _cpu()
    command = [sys.executable, "-m", "graft", "batch", "garden.toml", "--json"]
    first = subprocess.Popen(command, cwd=where, env=environment, stdout=subprocess.DEVNULL)
    runs = where / "runs"
    while first.poll() is None and not (_done(runs) and any(run.status == "running" for run in list_runs(runs))):
        time.sleep(1.0)
    before = {run.id: run.state["attempt"] for run in _done(runs)}
    victims = {holder(run.folder) for run in list_runs(runs)} | {holder(where / "state"), first.pid}
    for pid in victims - {None, 0, os.getpid()}:
        os.kill(int(pid or 0), signal.SIGKILL)
    first.wait()
    done = subprocess.run(command, cwd=where, env=environment, stdout=subprocess.PIPE, check=False)
    seconds = time.perf_counter() - began
    _gather()
    counts = json.loads(done.stdout)["counts"]
    twice = sum(Run(runs / name).state["attempt"] != number for name, number in before.items())
    return {
        "batch s": seconds,
        "batch CPU s": _cpu() - used,
        "done before": len(before),
        "twice": twice,
        "finished": counts.get("finished", 0),
        "failed": counts.get("failed", 0),
    }


def _done(runs: Path) -> list[Run]:
    return [run for run in list_runs(runs) if run.state["status"] == "finished" and run.id.startswith("garden-")]


def _train(where: Path, name: str, method: str, environment: Mapping[str, str]) -> tuple[float, float]:
    """Seconds of a single call, and of the processor."""
    command = [sys.executable, "-m", "graft", "train", f"{name} {method}.toml", "--runs", "singles", "--json"]
    began, used = time.perf_counter(), _cpu()
    subprocess.run(command, cwd=where, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began, _cpu() - used


@contextmanager
def _adopting() -> Iterator[None]:
    """Become the parent of what a killed process leaves, so that its time is counted too; only Linux can."""
    if sys.platform != "linux":
        yield
        return
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    try:
        yield
    finally:
        ctypes.CDLL(None).prctl(36, 0)


def _gather() -> None:
    """Wait for processes that were adopted; a scheduler goes when nothing is left to do."""
    late = time.monotonic() + 30
    with suppress(ChildProcessError):  # none is left
        while time.monotonic() < late:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.05)


def _cpu() -> float:
    """Seconds of the processor that the children of this process, and theirs, have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
