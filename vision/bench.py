"""`graft bench vision`: every method on the built-in sets, with accuracy, parameters, seconds and memory in one table.

The test pictures of a set are opened once for each trained adapter, after its training. Seeds draw the shots, what is
kept for validation, and everything random in the training; the table gives means and, over more than one seed, their
standard deviation. All of one seed comes before the next, so that a measurement that is stopped has whole tables.
Seconds are CPU seconds; of a training that was stopped and gone on with, those of its last part.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from graft.studio.bench import measure
from graft.studio.bench.rows import kept_rows
from graft.studio.config import from_dict
from graft.studio.disk import write_json
from graft.studio.job import Job
from graft.studio.loop import seeds_kept, set_threads, settled
from graft.studio.registry import method_class
from graft.studio.runs.folder import Run
from graft.studio.training import resume, train
from graft.vision.base import load_base
from graft.vision.evaluation import EvaluationConfig, evaluate, run_settings
from graft.vision.jobs import prepare
from graft.vision.task import VisionTask

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "bitfit": {"name": "bitfit"},
    "ssf": {"name": "ssf"},
    "lora": {"name": "lora"},
    "vpt-shallow": {"name": "vpt", "deep": False},
    "vpt-deep": {"name": "vpt"},
    "vpt-deep, probe": {"name": "vpt", "head_start": "probe"},
    "adaptformer": {"name": "adaptformer"},
    "adapter_plus": {"name": "adapter_plus"},
    "full": {"name": "full"},
}
"""Row of the table -> the [method] section of its job; `probe` is the start of the classifier (`head_start`)."""
TASKS = ("pocket-new", "pocket-colour", "pocket-count", "drawn-digits")
BETTER = ("vpt-deep", "vpt-deep, probe", "adaptformer", "ssf", "lora")
"""Methods that promise to beat the linear probe ..."""
PROMISED = ("pocket-colour", "pocket-count", "drawn-digits", "digits")
"""... on these sets, whose classes are not what the model was trained to tell."""


def run(
    out: Path | None = None,
    *,
    base: str = "pocket-vit",
    tasks: Sequence[str] = TASKS,
    methods: Sequence[str] = tuple(METHODS),
    seeds: int = 3,
    shots: int = 0,
    steps: int = 300,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Measures the methods.

    Args:
        out: folder for vision.json and the runs, in which nothing is trained or measured twice; None keeps none.
        base: a base of this domain.
        tasks: built-in sets.
        methods: rows of `METHODS`.
        seeds: trainings of each method on each set.
        shots: labelled pictures for each class, validation among them; 0 takes all.
        steps: of each training; the linear probe, whose steps cost nothing, takes ten times as many.
        batch_size: rows in a batch.

    Returns:
        `rows`, one for each training; `summary`, one for each method and set; `checks` (method and set -> its accuracy
        and the linear probe's) and `table`.

    Raises:
        RunError: the folder holds runs of other jobs.
    """
    work = {"base": load_base(base, "cpu").hash}
    path = None if out is None else Path(out) / "vision.json"
    rows = kept_rows(path, work)
    asked = []
    with tempfile.TemporaryDirectory() as spare:
        runs = (Path(spare) if out is None else Path(out)) / "runs"
        for seed, task, method in product(range(seeds), tasks, methods):
            length = steps * (10 if method == "linear" else 1)
            job = _job(base, task, method, shots, seed, {"steps": length, "batch_size": batch_size})
            row = next((row for row in rows if row["job"] == job), None)
            if row is None:
                row = {"set": task, "method": method, "seed": seed, "job": job}
                row |= _measured(job, runs / task / method / str(seed))
                rows.append(row)
                if path is not None:  # a long measurement that is stopped leaves what it has
                    write_json(path, {"work": work, "rows": rows})
            asked.append(row)
    means = [_mean([row for row in asked if (row["set"], row["method"]) == key]) for key in product(tasks, methods)]
    checks = _checks(means)
    head = f"{base}, {shots or 'all'} shots, {steps} steps of {batch_size}, {seeds} seeds"
    result = {
        "work": work,
        "rows": rows,
        "summary": means,
        "checks": checks,
        "passed": all(check["ok"] for check in checks.values()),
        "table": table(head, means, checks),
    }
    if path is not None:
        write_json(path, result)
    return result


def _job(base: str, task: str, row: str, shots: int, seed: int, length: dict[str, Any]) -> dict[str, Any]:
    """A training as it is asked for; the rate stands in it, so that one with another default is another job."""
    section = METHODS[row]
    method: Any = method_class("vision", section["name"])
    return {
        "base": base,
        "domain": "vision",
        "method": section,
        "data": {"dataset": task, "shots": shots, "seed": seed},
        "train": {**length, "learning_rate": method.default_learning_rate, "seed": seed},
    }


def _measured(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Figures of one job: those of its run on the test pictures."""
    saved = _saved(job)  # before the training, whose seconds are then without drawing and opening the pictures
    began = time.process_time()
    finished = _trained(job, folder)
    seconds = time.process_time() - began
    adapter = finished.adapter()
    metrics = adapter.card.metrics
    settings = from_dict(EvaluationConfig, run_settings(finished), "eval")
    figures = evaluate(load_base(adapter.card.base), adapter, settings)
    return {
        "accuracy": 100 * figures["accuracy"],
        "validation": 100 * metrics["val_accuracy"] if "val_accuracy" in metrics else None,
        "parameters": metrics["parameters"],
        "seconds": seconds,
        "saved_mib": saved / 2**20,
    }


def _trained(job: dict[str, Any], folder: Path) -> Run:
    """The finished run of a job: the one in the folder if it is of the same job, gone on with where it stopped."""
    if (folder / "job.toml").exists() and Run(folder).job == settled(Job.load(job)):
        return resume(folder)
    return train(job, run_dir=folder)


def _saved(job: dict[str, Any]) -> int:
    """Bytes that a step keeps for its backward pass, beside weights."""
    with seeds_kept():
        set_threads(0)
        task = prepare(Job.load(job))
        batch = task.batch(0, torch.Generator().manual_seed(0))
        return saved_bytes(lambda: task(batch)[0], task)


def saved_bytes(run: Callable[[], Any], task: VisionTask) -> int:
    """Bytes that a forward pass keeps for its backward pass, without parameters and buffers."""
    model = task.base.model
    return measure.saved_bytes(run, [*model.parameters(), *model.buffers(), *task.parameters(), *task.buffers()])


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one method's trainings on one set."""
    accuracies = [row["accuracy"] for row in rows]
    return {
        **{key: rows[0][key] for key in ("set", "method", "parameters", "saved_mib")},
        "accuracy": mean(accuracies),
        "spread": stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "seconds": mean(row["seconds"] for row in rows),
    }


def _checks(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {(row["set"], row["method"]): row["accuracy"] for row in rows}
    checks = {}
    for (task, method), value in found.items():
        limit = found.get((task, "linear"))
        if task in PROMISED and method in BETTER and limit is not None:
            checks[f"{method} over linear on {task}"] = {"value": value, "limit": limit, "ok": value > limit}
    return checks


def table(head: str, rows: Sequence[dict[str, Any]], checks: Mapping[str, dict[str, Any]]) -> str:
    """The means and what they were promised to be, as text."""
    lines = [head, f"{'set':14} {'method':15} {'accuracy':>14} {'parameters':>11} {'seconds':>8} {'saved MiB':>9}"]
    for row in rows:
        accuracy = f"{row['accuracy']:.1f} +- {row['spread']:.1f}"
        lines.append(
            f"{row['set']:14} {row['method']:15} {accuracy:>14} {row['parameters']:11,} {row['seconds']:8.1f} "
            f"{row['saved_mib']:9.1f}"
        )
    for name, check in checks.items():
        word = "ok" if check["ok"] else "MISSED"
        lines.append(f"{name:42} {check['value']:5.1f}  above {check['limit']:5.1f}  {word}")
    return "\n".join(lines)
