"""Many jobs in one batch beside the same jobs in sequence: time, and how far apart the results are.

Both sides are whole calls, `train` for each job and `train_many` for all: loading the base, reading pictures, probing
and saving are part of the time, the cache of frozen latents is filled before. Two trainings that sum in another order
drift apart where Adam divides a gradient of nothing by itself, so beside the tensors stand what they do: the denoiser's
predictions for the same noise, and what changing the number of threads alone makes of one of the jobs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.diffusion.base import DiffusionBase, load_base
from graft.diffusion.bench.pictures import new_sprites, write_pictures
from graft.studio.adapter import Adapter
from graft.studio.disk import write_json
from graft.studio.runs.folder import Run
from graft.studio.training import train, train_many

LIMIT = 0.7
"""Time of one batch over that of the sequence, on a CPU."""


def many(
    out: Path | None = None,
    jobs: int = 16,
    steps: int = 50,
    methods: Sequence[str] = ("textual_inversion", "lora"),
    threads: int = 1,
    base: str = "pocket-sd",
) -> dict[str, Any]:
    """Trains new sprites in sequence and together, and compares.

    Args:
        out: folder for the runs and `many.json`; None takes a temporary one.
        jobs: new sprites, one job each, with seeds of their own.
        steps: of each job.
        methods: one line of the table each.
        threads: of the tensor library.
        base: a base that knows the embedded world.
    """
    with tempfile.TemporaryDirectory() as spare:
        folder = Path(out or spare)
        rows = [_compare(folder, method, jobs, steps, threads, base) for method in methods]
    result = {"jobs": jobs, "steps": steps, "threads": threads, "rows": rows}
    result["passed"] = all(row["wall"] <= LIMIT for row in rows)
    if out is not None:
        write_json(Path(out) / "many.json", result)
    return result | {"table": table(result)}


def _compare(folder: Path, method: str, count: int, steps: int, threads: int, base: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"steps": steps, "threads": threads, "device": "cpu", "log_every": steps}
    settings["checkpoint_seconds"] = 0  # each would log the loss of fewer steps
    jobs: list[dict[str, Any]] = [
        {
            "base": base,
            "domain": "diffusion",
            "method": {"name": method},
            "data": {"path": str(write_pictures(folder / "pictures" / str(sprite), sprite))},
            "train": {**settings, "seed": seed},
        }
        for seed, sprite in enumerate(new_sprites(count))
    ]
    where = folder / method
    train({**jobs[0], "train": {**settings, "steps": 1}}, runs=where / "warm")
    alone, cpu_alone, wall_alone = _timed(lambda: [train(job, runs=where / "alone") for job in jobs])
    together, cpu, wall = _timed(lambda: train_many(jobs, runs=where / "together"))
    other = train({**jobs[0], "train": {**settings, "seed": 0, "threads": threads + 1}}, runs=where / "other")
    pairs = [(one.adapter(), two.adapter()) for one, two in zip(alone, together, strict=True)]
    loaded = load_base(base, "cpu")
    return {
        "method": method,
        "wall_alone": wall_alone,
        "wall_together": wall,
        "wall": wall / wall_alone,
        "cpu": cpu / cpu_alone,
        "loss": max(abs(_loss(one) / _loss(two) - 1) for one, two in zip(alone, together, strict=True)),
        "tensors": max(_apart(one.tensors, two.tensors) for one, two in pairs),
        "predictions": max(_apart(_predicts(loaded, one), _predicts(loaded, two)) for one, two in pairs),
        "threads: tensors": _apart(alone[0].adapter().tensors, other.adapter().tensors),
        "threads: predictions": _apart(_predicts(loaded, alone[0].adapter()), _predicts(loaded, other.adapter())),
    }


def _timed(work: Callable[[], list[Run]]) -> tuple[list[Run], float, float]:
    """Result, CPU seconds and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    return work(), time.process_time() - cpu, time.perf_counter() - wall


def _loss(run: Run) -> float:
    return float(run.metrics()[-1]["loss"])


@torch.no_grad()
def _predicts(base: DiffusionBase, adapter: Adapter) -> dict[str, Tensor]:
    """The denoiser's predictions for four noise levels of one picture of noise, told the adapter's word."""
    with adapter.attached(base):
        told = {name: part.expand(4, -1, -1) for name, part in base.condition(
            base.tokenize([f"a photo of {adapter.card.trigger}"])).items()}  # fmt: skip
        side = int(base.denoiser.config.sample_size)
        noise = torch.randn(1, base.denoiser.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
        return {"": base.denoise(noise.expand(4, -1, -1, -1), torch.tensor([50, 300, 600, 900]), told)}


def _apart(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Root mean square difference over root mean square value, of all tensors."""
    difference = sum(float((one[name] - two[name]).square().sum()) for name in one)
    return (difference / sum(float(value.square().sum()) for value in one.values())) ** 0.5


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{result['jobs']} jobs of {result['steps']} steps, {result['threads']} thread(s)", ""]
    lines.append(f"{'':20} {'alone s':>9} {'together s':>10} {'wall':>7} {'CPU':>7}  limit {LIMIT}")
    for row in result["rows"]:
        verdict = "ok" if row["wall"] <= LIMIT else "MISSED"
        lines.append(
            f"{row['method']:20} {row['wall_alone']:9.1f} {row['wall_together']:10.1f} {row['wall']:7.3f} "
            f"{row['cpu']:7.3f}  {verdict}"
        )
    lines += ["", f"{'difference':20} {'loss':>9} {'tensors':>9} {'predictions':>12}  by threads alone"]
    for row in result["rows"]:
        lines.append(
            f"{row['method']:20} {row['loss']:9.1e} {row['tensors']:9.1e} {row['predictions']:12.1e}  tensors "
            f"{row['threads: tensors']:.1e}, predictions {row['threads: predictions']:.1e}"
        )
    return "\n".join(lines)
