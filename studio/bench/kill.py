"""`graft bench kill`: real trainings, killed with SIGKILL at random moments and resumed until they are done.

A first run is left in peace. Then the same job is trained again and again by a process of its own, which gets SIGKILL
at a moment drawn from its whole life: while it starts, trains, or writes its result. Every other kill waits, from that
moment on, for one of the next five checkpoints to be half written. After each kill the folder is read as any reader
would, and every file with a manifest must match it. Each run must end with the bits of the first.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from graft.studio.errors import FormatError, GraftError
from graft.studio.runs import Run

PRELOAD = (
    "accelerate",
    "torch._dynamo",
    "graft.studio.training",
    "graft.diffusion.jobs",
    "diffusers",
    "graft.studio.pocket.models",
)
"""Imported once, before the killed processes are forked off."""
COLUMNS = ("kill", "run", "seconds", "status", "step", "checkpoint", "writing", "whole")


def run(
    out: Path | None = None,
    kills: int = 50,
    steps: int = 60,
    method: str = "lora",
    base: str = "pocket-sd",
    seed: int = 0,
) -> dict[str, Any]:
    """Kill trainings of a diffusion model and return what became of them.

    Args:
        out: folder for `kill.json`; None writes nothing.
        kills: how many.
        steps: of the training.
        method: "lora" or "textual_inversion".
        base: what is adapted.
        seed: of the moments.

    Raises:
        GraftError: a run did not end with the bits of the undisturbed one, or a torn file was read as whole.
    """
    from graft.studio.commands import table
    from graft.studio.demo import CONCEPT, write_photos

    with tempfile.TemporaryDirectory(prefix="graft-kill-") as folder:
        where = Path(folder)
        write_photos(where / "photos", where / "held_out", CONCEPT)
        train = {"steps": steps, "checkpoint_every": 3, "threads": 1, "device": "cpu", "batch_size": 2}
        job = {"base": base, "method": {"name": method}, "data": {"path": str(where / "photos")}, "train": train}
        result = torment(job, where, kills, random.Random(seed), PRELOAD)
    result["table"] = table(result["kills"], COLUMNS) + f"\n\n{result['summary']}"
    if out is not None:
        from graft.studio.disk import write_json

        write_json(out / "kill.json", result)
    return result


def torment(
    job: Mapping[str, Any], where: Path, kills: int, moments: random.Random, modules: Sequence[str]
) -> dict[str, Any]:
    """Train a job in peace, then kill and resume it until so many kills are done.

    Args:
        job: the job's mapping.
        where: folder of the runs.
        kills: how many.
        moments: draws them.
        modules: imported by the training process before anything else.

    Raises:
        GraftError: see `run`.
    """
    started = time.monotonic()
    _life(job, where / "peace", modules)  # this one also fills the caches, so that the next is as long as the others
    began = time.monotonic()
    _life(job, where / "again", modules)
    life = time.monotonic() - began
    peace = _result(where / "peace")
    if _result(where / "again") != peace:
        raise GraftError("two undisturbed runs differ: the training itself is not deterministic")
    rows: list[dict[str, Any]] = []
    run = 0
    while len(rows) < kills:
        run += 1
        folder = where / f"run-{run}"
        while len(rows) < kills:
            row = {"kill": len(rows) + 1, "run": run}
            facts = _life(job, folder, modules, moments.uniform(0, life), moments.randint(1, 5) * (len(rows) % 2))
            if facts is None:
                break  # it was done before its time had come
            rows.append({**row, **facts})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), file=sys.stderr)
        if len(rows) == kills:
            _life(job, folder, modules)  # the last one may live
        if _result(folder) != peace:
            raise GraftError(f"{folder}: its weights are not those of the undisturbed run")
    torn = sum(row["writing"] for row in rows)
    summary = (
        f"{len(rows)} kills, {torn} of them while a checkpoint was being written; {run} runs, all with the bits of the "
        f"undisturbed one; {time.monotonic() - started:.0f} s"
    )
    return {"kills": rows, "runs": run, "identical": True, "summary": summary}


def _life(
    job: Mapping[str, Any], folder: Path, modules: Sequence[str], seconds: float | None = None, writes: int = 0
) -> dict[str, Any] | None:
    """Start or resume a run in a process of its own; kill it after some seconds and checkpoints, or let it live.

    Returns:
        What the killed process left, or None if it ended by itself.

    Raises:
        GraftError: it failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    process = context.Process(target=_train, args=(dict(job), str(folder), tuple(modules)))
    process.start()
    process.join(seconds)
    seen: set[str] = set()
    while len(seen) < writes and process.is_alive():
        seen |= _drafts(folder, process.pid)
        time.sleep(0.0003)
    if seconds is not None:
        process.kill()
    process.join()
    if process.exitcode not in (0, -9):
        log = folder / "log.txt"
        raise GraftError(
            f"{folder}: failed\n{log.read_text() if log.exists() else folder.with_suffix('.err').read_text()}"
        )
    if process.exitcode == 0:
        return None
    return {"seconds": round(seconds or 0.0, 3), "writing": bool(_drafts(folder, process.pid)), **_inspect(folder)}


def _train(job: dict[str, Any], folder: str, modules: Sequence[str]) -> None:
    """What the process does: as `graft train --run-dir`, or `graft runs resume` if there is something to resume."""
    for module in modules:
        import_module(module)
    from graft.studio.training import resume, train

    errors = os.open(Path(folder).with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, sys.stderr.fileno())
    if (Path(folder) / "job.toml").exists():
        resume(folder)
    else:
        train(job, folder)


def _inspect(folder: Path) -> dict[str, Any]:
    """Read what a killed run left behind, as any reader would.

    Raises:
        GraftError: a file that counts as whole is not.
    """
    from graft.studio.adapter import Adapter
    from graft.studio.runs.checkpoints import read_checkpoint

    run, steps = Run(folder), []
    try:
        for path in sorted(folder.glob("checkpoints/[0-9]*")):
            steps.append(read_checkpoint(path).step)
        if (folder / "result").exists():
            Adapter.load(folder / "result")
        if folder.exists():
            _ = run.job, json.loads((folder / "env.json").read_text()), run.metrics(), run.events()
    except (FormatError, ValueError) as error:
        raise GraftError(f"{folder}: half written, yet under its name: {error}") from error
    status = run.status if folder.exists() else "absent"
    if status == "running":
        raise GraftError(f"{folder}: it says running, but its process is dead")
    step = run.metrics()[-1]["step"] if run.metrics() else 0
    return {"status": status, "step": step, "checkpoint": max(steps, default=0), "whole": True}


def _drafts(folder: Path, pid: int | None) -> set[str]:
    """Checkpoints that a process is writing, or was when it died."""
    return {path.name for path in (folder / "checkpoints").glob(f".*-{pid}")}


def _result(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor of a finished run's adapter."""
    tensors = Run(folder).adapter().tensors
    return {
        name: (str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().numpy().tobytes())
        for name, tensor in sorted(tensors.items())
    }
