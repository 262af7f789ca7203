"""`graft bench vqa`: what each method learns of a new question, what it forgets of the old ones, and what it costs.

The new question ("how many things on what colour ?", answered as "two on red") joins two things that pocket-llava can
tell, in a form that it has never seen. Beside it stand the ten kinds of questions that it was taught, and the new one
with the pictures of other scenes. "lora for each" trains one adapter for the new question and one for the old ones, and
finds out by perplexity which of them a question is for. Last, a projector drawn anew is trained alone, as in LLaVA's
stage 1.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from graft.llm_mm.base import load_base
from graft.llm_mm.data import DataConfig, read_rows
from graft.llm_mm.evaluation import Control, EvaluationConfig, controlled, evaluate, exact_match
from graft.llm_mm.perplexity import perplexity_by_adapter
from graft.llm_mm.task import Reader
from graft.studio.caches import Cache
from graft.studio.disk import write_json
from graft.studio.training import train

METHODS: dict[str, tuple[dict[str, Any], float, float]] = {
    "lora": ({"name": "lora"}, 2e-3, 0.0),
    "lora, replay 1:1": ({"name": "lora"}, 2e-3, 0.5),
    "lora for each": ({"name": "lora"}, 2e-3, 0.0),
    "llama_adapter": ({"name": "llama_adapter"}, 3e-2, 0.0),
    "llama_adapter_multimodal": ({"name": "llama_adapter_multimodal"}, 3e-2, 0.0),
    "llama_adapter_v2": ({"name": "llama_adapter_v2"}, 5e-3, 0.0),
    "prompt_tuning": ({"name": "prompt_tuning"}, 3e-2, 0.0),
    "projector": ({"name": "llava", "stage": 1, "projector_rate": 2e-3}, 2e-3, 0.0),
    "full": ({"name": "llava", "language": "full", "language_rate": 1e-3, "projector_rate": 1e-3}, 1e-3, 0.0),
}
"""Row of the table -> the [method] section of its job, its learning rate, its share of old rows."""
NEW, OLD = "pocket-scenes", "pocket-questions"
APART = "lora for each"
RESTORED = {"name": "llava", "stage": 1, "fresh": True, "projector_rate": 3e-3}


def run(
    out: Path | None = None,
    *,
    base: str = "pocket-llava",
    methods: Sequence[str] = tuple(METHODS),
    seeds: int = 1,
    steps: int = 80,
    batch_size: int = 16,
    restore_steps: int = 300,
    rows: int = 0,
) -> dict[str, Any]:
    """Measures the methods.

    Args:
        out: folder for vqa.json, and for the runs; None keeps no runs.
        base: a base of this domain.
        methods: rows of `METHODS`.
        seeds: trainings of each.
        steps: of each training; with replay twice as many, so that as many new rows are seen.
        batch_size: rows in a batch.
        restore_steps: of the projector that is drawn anew; 0 leaves it out.
        rows: most test rows of each set; 0 takes all.

    Returns:
        `rows`, `checks` and `table`.
    """
    found: list[dict[str, Any]] = []
    loaded = load_base(base)
    settings = EvaluationConfig(dataset=NEW, replay_dataset=OLD, rows=rows)
    start = evaluate(loaded, None, settings)
    found.append({"method": "base", **_figures(start), "parameters": 0, "seconds": 0.0, "mib": 0.0})
    with tempfile.TemporaryDirectory() as spare:
        runs = Path(spare) if out is None else out / "runs"

        def job(method: dict[str, Any], data: dict[str, Any], **changes: Any) -> dict[str, Any]:
            section = {"batch_size": batch_size, "checkpoint_seconds": 0, **changes}
            data = {"checked": 1, **data}
            return {"base": base, "domain": "llm_mm", "method": method, "data": data, "train": section}

        for name in methods:
            section, rate, replay = METHODS[name]
            measured = []
            for seed in range(seeds):
                folder = runs / name.replace(" ", "_") / str(seed)
                make = partial(job, section, learning_rate=rate, seed=seed)
                if name == APART:
                    both = {each: make({"dataset": each, "learn": "all"}, steps=steps) for each in (NEW, OLD)}
                    measured.append(_apart(both, folder, rows))
                else:
                    beside = {"replay": replay, "replay_dataset": OLD} if replay else {}
                    one = make({"dataset": NEW, **beside}, steps=steps * (2 if replay else 1))
                    measured.append(_measured(one, folder, settings))
            found.append({"method": name, **_mean(measured)})
        if restore_steps:
            old = EvaluationConfig(dataset=OLD, rows=rows)
            restored = job(RESTORED, {"dataset": OLD}, steps=restore_steps)
            figures = _measured(restored, runs / "restored", old)
            found.append({"method": "fresh projector, stage 1", **figures, "new": None, "old": figures["new"]})
    result: dict[str, Any] = {
        "work": f"{base}, {steps} steps of {batch_size} rows, {seeds} seed{'s' * (seeds > 1)}",
        "rows": found,
        "checks": _checks(found),
    }
    result["passed"] = all(check["ok"] for check in result["checks"].values())
    result["table"] = table(result)
    if out is not None:
        write_json(out / "vqa.json", {key: value for key, value in result.items() if key != "table"})
    return result


def _figures(told: dict[str, Any]) -> dict[str, Any]:
    return {"new": told["exact"], "rotated": told["rotated"], "blank": told["blank"], "old": told.get("old")}


def _measured(job: dict[str, Any], folder: Path, settings: EvaluationConfig) -> dict[str, Any]:
    """One training and its figures on the test rows."""
    _forget_peak()
    began = time.process_time()
    finished = train(job, run_dir=folder)
    seconds, peak = time.process_time() - began, _peak()
    adapter = finished.adapter()
    told = evaluate(load_base(job["base"]), adapter, settings)
    return {**_figures(told), "parameters": adapter.card.metrics["parameters"], "seconds": seconds, "mib": peak}


def _apart(jobs: Mapping[str, dict[str, Any]], folder: Path, rows: int) -> dict[str, Any]:
    """One training for each set, and the figures of whichever adapter finds a question least surprising."""
    _forget_peak()
    began = time.process_time()
    adapters = {name: train(job, run_dir=folder / name).adapter() for name, job in jobs.items()}
    told: dict[str, Any] = {"seconds": time.process_time() - began, "mib": _peak()}
    told["parameters"] = sum(adapter.card.metrics["parameters"] for adapter in adapters.values())
    base = load_base(jobs[NEW]["base"])
    reader = Reader.of(base, DataConfig(dataset=NEW), Cache())
    asked: tuple[tuple[str, str, Control], ...]
    asked = (("new", NEW, ""), ("rotated", NEW, "rotated"), ("blank", NEW, "blank"), ("old", OLD, ""))
    for figure, name, control in asked:
        shown = controlled(reader, read_rows(DataConfig(dataset=name)).test[: rows or None], control)
        found = perplexity_by_adapter(base, adapters, [row.asking() for row in shown])
        right = 0.0
        for each, adapter in adapters.items():
            own = [row for row, values in zip(shown, found, strict=True) if min(values, key=values.__getitem__) == each]
            with adapter.attached(base):
                right += len(own) * exact_match(reader, own) if own else 0
        told[figure] = right / len(shown)
    return told


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: mean(row[key] for row in rows) if rows[0][key] is not None else None for key in rows[0]}


def _forget_peak() -> None:
    """Starts the process's record of memory anew, where the system lets it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> float:
    """Most resident memory since then, in MiB; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def _checks(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is asked of the embedded model's adaptation."""
    of = {row["method"]: row for row in rows}
    start, checks = of["base"], dict[str, dict[str, Any]]()

    def check(name: str, value: float, limit: float, ok: bool) -> None:
        checks[name] = {"value": value, "limit": limit, "ok": ok}

    check("base on the new question, below", start["new"], 0.15, start["new"] < 0.15)
    if lora := of.get("lora"):
        check("lora on the new question, from", lora["new"], 0.60, lora["new"] >= 0.60)
        check("lora with other pictures, below", lora["rotated"], 0.20, lora["rotated"] < 0.20)
        check("lora in CPU seconds, below", lora["seconds"], 90, lora["seconds"] < 90)
    for name in ("llama_adapter", "llama_adapter_multimodal", "llama_adapter_v2"):
        if gated := of.get(name):
            check(f"{name} on the new question, from", gated["new"], 0.45, gated["new"] >= 0.45)
    if replay := of.get("lora, replay 1:1"):
        lost = start["old"] - replay["old"]
        check("old questions lost with replay, below", lost, 0.05, lost < 0.05)
    if apart := of.get(APART):
        check("lora for each on the new question, from", apart["new"], 0.60, apart["new"] >= 0.60)
        if lora:
            share = (start["old"] - apart["old"]) / max(start["old"] - lora["old"], 1e-9)
            check("old questions lost by lora for each over lora, below", share, 0.5, share < 0.5)
    if fresh := of.get("fresh projector, stage 1"):
        lost = start["old"] - fresh["old"]
        check("old questions lost by a fresh projector, below", lost, 0.05, lost < 0.05)
    return checks


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    head = f"{'':26} {'new':>6} {'rotated':>8} {'blank':>6} {'old':>6} {'parameters':>11} {'CPU s':>7} {'peak MiB':>9}"
    lines = [result["work"], head]
    for row in result["rows"]:
        shown = " ".join(
            f"{'' if row[key] is None else format(row[key], '.3f'):>{width}}"
            for key, width in (("new", 6), ("rotated", 8), ("blank", 6), ("old", 6))
        )
        lines.append(f"{row['method']:26} {shown} {row['parameters']:11,} {row['seconds']:7.1f} {row['mib']:9.0f}")
    lines += [""]
    for name, check in result["checks"].items():
        word = "ok" if check["ok"] else "MISSED"
        lines.append(f"{name:52} {check['value']:7.3f}  limit {check['limit']:6.2f}  {word}")
    return "\n".join(lines)
