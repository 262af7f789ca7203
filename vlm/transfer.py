"""From base to new: trained on one half of the classes, tested on both, each half told apart in itself.

The protocol of Zhou et al., Conditional Prompt Learning for Vision-Language Models, 2022, arXiv:2203.05557: classes in
order of their folders, the first ceil(c / 2) are the base classes; the two accuracies meet in their harmonic mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from graft.studio.config import from_dict, require
from graft.studio.errors import InputError
from graft.studio.registry import method_class
from graft.vlm.base import load_base
from graft.vlm.evaluation import EvaluationConfig, evaluate, harmonic_mean, run_settings

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter
    from graft.studio.job import Job
    from graft.studio.runs import Run


def base_to_new(job: Job, runs: str | Path | None = None, seeds: int = 1) -> dict[str, Any]:
    """Trains on the base classes and measures both halves.

    Args:
        job: its `data.classes` is set to `base`.
        runs: where the run goes.
        seeds: trainings, each with the next seed of the job's, for the shots and for the rest; the paper has three.

    Returns:
        `run`, and for `zero_shot` and `adapter` the accuracies `base`, `new` and their `harmonic_mean`. Over several
        seeds `runs`, the means, the harmonic mean of these, and their `spread`, the standard deviation.

    Raises:
        InputError: a method that says nothing of new classes.
    """
    from graft.studio.training import train

    require("seeds", seeds, seeds >= 1, "1 or more")
    method = method_class("vlm", str(job.method["name"]))
    if getattr(method, "bound", False) or job.method.get("class_specific"):
        reason = "what it learns belongs to the classes it is trained on"
        raise InputError(str(job.method["name"]), reason, "Use coop, cocoop, clip_adapter, prolip or clip_lora")
    if seeds > 1:
        return _over([base_to_new(_seeded(job, k), runs) for k in range(seeds)])
    run = train(replace(job, data={**job.data, "classes": "base"}), runs=runs)
    base, adapter = load_base(job.base, job.train.device, attention=job.train.attention), run.adapter()
    result: dict[str, Any] = {"run": str(run.folder)}
    sides: dict[str, Adapter | None] = {"zero_shot": None, "adapter": adapter}
    for name, side in sides.items():
        halves = {half: evaluate(base, side, _settings(run, half))["accuracy"] for half in ("base", "new")}
        result[name] = {**halves, "harmonic_mean": harmonic_mean(**halves)}
    return result


def _seeded(job: Job, further: int) -> Job:
    data = {**job.data, "seed": int(job.data.get("seed", 0)) + further}
    return replace(job, data=data, train=replace(job.train, seed=job.train.seed + further))


def _over(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and spreads; the harmonic mean is that of the means, as in the paper."""
    result: dict[str, Any] = {"runs": [one["run"] for one in found]}
    for side in ("zero_shot", "adapter"):
        each = {key: [one[side][key] for one in found] for key in ("base", "new", "harmonic_mean")}
        means = {half: mean(each[half]) for half in ("base", "new")}
        spread = {key: stdev(values) for key, values in each.items()}
        result[side] = {**means, "harmonic_mean": harmonic_mean(**means), "spread": spread}
    return result


def _settings(run: Run, half: Any) -> EvaluationConfig:
    """Of base classes the test part of the run's split; of new ones, of which nothing was trained on, all there is."""
    told = run_settings(run) | {"classes": half} | ({} if half == "base" else {"split": ""})
    return from_dict(EvaluationConfig, told, "eval")
