"""`graft bench vision`: every method on the built-in sets, with accuracy, parameters, seconds and memory in one table.

The test pictures of a set are opened once for each trained adapter, after its training. Seeds draw the shots and
everything random in the training; the table gives means and, over more than one seed, their standard deviation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from graft.studio.bench import measure
from graft.studio.config import from_dict
from graft.studio.disk import write_json
from graft.studio.job import Job
from graft.studio.loop import seeds_kept, set_threads
from graft.studio.training import train
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
    "adaptformer": {"name": "adaptformer"},
    "adapter_plus": {"name": "adapter_plus"},
    "full": {"name": "full"},
}
"""Row of the table -> the [method] section of its job."""
TASKS = ("pocket-new", "pocket-colour", "pocket-count", "drawn-digits")
BETTER = ("vpt-deep", "adaptformer", "ssf", "lora")
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
        out: folder for vision.json, and for the runs; None keeps no runs.
        base: a base of this domain.
        tasks: built-in sets.
        methods: rows of `METHODS`.
        seeds: trainings of each method on each set.
        shots: labelled pictures for each class, validation among them; 0 takes all.
        steps: of each training; the linear probe, whose steps cost nothing, takes ten times as many.
        batch_size: rows in a batch.

    Returns:
        `rows`, `checks` (method and set -> its accuracy and the linear probe's) and `table`.
    """
    rows = []
    with tempfile.TemporaryDirectory() as spare:
        runs = Path(spare) if out is None else out / "runs"
        for task in tasks:
            for method in methods:
                length = steps * (10 if method == "linear" else 1)
                train_section = {"steps": length, "batch_size": batch_size, "checkpoint_seconds": 0}
                jobs = [
                    {
                        "base": base,
                        "domain": "vision",
                        "method": METHODS[method],
                        "data": {"dataset": task, "shots": shots, "seed": seed},
                        "train": {**train_section, "seed": seed},
                    }
                    for seed in range(seeds)
                ]
                rows.append({"set": task, "method": method, **_measured(jobs, runs / task / method)})
    result: dict[str, Any] = {
        "work": f"{base}, {shots or 'all'} shots, {steps} steps of {batch_size}, {seeds} seeds",
        "rows": rows,
        "checks": _checks(rows),
    }
    result["passed"] = all(check["ok"] for check in result["checks"].values())
    result["table"] = table(result)
    if out is not None:
        write_json(out / "vision.json", {key: value for key, value in result.items() if key != "table"})
    return result


def _measured(jobs: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Trains each job and measures it on the test pictures."""
    accuracies, seconds, card = [], [], None
    for number, job in enumerate(jobs):
        finished = train(job, run_dir=folder / str(number))
        adapter = finished.adapter()
        settings = from_dict(EvaluationConfig, run_settings(finished), "eval")
        figures = evaluate(load_base(adapter.card.base), adapter, settings)
        accuracies.append(100 * figures["accuracy"])
        seconds.append(float(adapter.card.metrics["seconds"]))
        card = adapter.card
    assert card is not None
    return {
        "accuracy": mean(accuracies),
        "spread": stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "validation": 100 * card.metrics["val_accuracy"] if "val_accuracy" in card.metrics else None,
        "parameters": card.metrics["parameters"],
        "seconds": mean(seconds),
        "saved_mib": _saved(jobs[0]) / 2**20,
    }


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


def _checks(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {(row["set"], row["method"]): row["accuracy"] for row in rows}
    checks = {}
    for (task, method), value in found.items():
        limit = found.get((task, "linear"))
        if task in PROMISED and method in BETTER and limit is not None:
            checks[f"{method} over linear on {task}"] = {"value": value, "limit": limit, "ok": value > limit}
    return checks


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        result["work"],
        f"{'set':14} {'method':14} {'accuracy':>14} {'parameters':>11} {'seconds':>8} {'saved MiB':>9}",
    ]
    for row in result["rows"]:
        accuracy = f"{row['accuracy']:.1f} +- {row['spread']:.1f}"
        lines.append(
            f"{row['set']:14} {row['method']:14} {accuracy:>14} {row['parameters']:11,} {row['seconds']:8.1f} "
            f"{row['saved_mib']:9.1f}"
        )
    for name, check in result["checks"].items():
        word = "ok" if check["ok"] else "MISSED"
        lines.append(f"{name:42} {check['value']:5.1f}  above {check['limit']:5.1f}  {word}")
    return "\n".join(lines)
