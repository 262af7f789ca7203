"""The cost of adapters beside the frozen model and beside peft, in one process, on four models.

Every variant takes the same step (forward, backward from the same gradient) on the same weights, inputs and factors;
how far its results are from peft's stands beside its speed. Ratios are medians over interleaved rounds of process CPU
times on one thread. Saved activations are counted to the byte. A peak is how far resident memory rises in one step.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.studio.bench import core_attention
from graft.studio.bench.core_models import SUBJECTS, Subject, subject
from graft.studio.bench.core_table import table
from graft.studio.bench.core_variants import (
    ADAPTERS,
    DROPOUT,
    RANK,
    Step,
    Variant,
    differences,
    dora,
    draw,
    furthest,
    load,
    lora,
    mixed_differences,
    names,
    ours,
    theirs,
)
from graft.studio.bench.measure import Seconds, Work, interleaved, medians, one_thread, peak_rise, ratio, timed
from graft.studio.disk import write_json

LIMITS = {
    "LoRA step over peft's": 0.95,
    "LoRA saved bytes over peft's": 1.00,
    "DoRA step over peft's": 0.88,
    "DoRA saved bytes over peft's": 0.60,
    "dropout saved bytes over peft's": 0.75,
    "bf16 base saved bytes over peft's": 0.70,
    "8 adapters over 1, step": 1.15,
    "8 adapters over 1, 16 rows of one token": 1.15,
    "MHA step over peft's": 0.65,
    "MHA inference of one row over peft's": 0.35,
}
"""What the core promises, of every model; `run` reports each with its measured values."""


def run(
    out: Path | None = None, rounds: int = 4, models: str = ",".join(SUBJECTS), mha: bool = True, tiny: bool = False
) -> dict[str, Any]:
    """Measures, and returns checks, figures and a table; writes them as ``core.json`` into ``out`` if given.

    Args:
        out: folder of the result.
        rounds: interleaved rounds; about a CPU minute and a half each for all models.
        models: which, joined by commas.
        mha: whether to measure torch's MultiheadAttention too.
        tiny: models of one block and width 64, to see that it works.

    Raises:
        InputError: an unknown model, or a library that is not installed.
    """
    reports = {}
    with one_thread():
        for name in models.split(","):
            torch.manual_seed(0)
            reports[name] = _report(subject(name, tiny), rounds)
        if mha:
            torch.manual_seed(0)
            reports |= {name: core_attention.report(s, rounds) for name, s in core_attention.subjects(tiny).items()}
    checks = {}
    for name, limit in LIMITS.items():
        values = {model: report["promised"][name] for model, report in reports.items() if name in report["promised"]}
        if values:
            checks[name] = {"values": values, "limit": limit, "passed": max(values.values()) <= limit}
    result: dict[str, Any] = {
        "how": f"one thread, medians of {rounds} interleaved rounds of CPU seconds, batch 8, rank {RANK}; "
        f"torch {torch.__version__}, peft {version('peft')}",
        "checks": checks,
        "passed": all(check["passed"] for check in checks.values()),
        "models": reports,
    }
    if out is not None:
        write_json(out / "core.json", result)
    return {**result, "table": table(result)}


def _report(subject: Subject, rounds: int) -> dict[str, Any]:
    """Everything about one model, but its attention in the packed form."""
    variants = _variants(subject)
    route, small_route = (torch.arange(len(inputs[0])) % ADAPTERS for inputs in (subject.inputs, subject.small))
    eight = _handle(variants["lora, 8 adapters"])
    eight.route(route)
    upstream = torch.randn_like(variants["frozen"].infer(subject.inputs)) / len(subject.inputs[0])
    apart = _differences(variants, subject.inputs, upstream, route)
    steps = {name: partial(variants[name].step, subject.inputs, upstream) for name in variants if name != _MIXED}
    seconds = interleaved(steps, rounds)
    large = interleaved(_inference(variants, subject.inputs, route), rounds)
    memory: dict[str, Any] = {
        name: {"saved": variants[name].saved(subject.inputs), "peak": peak_rise(step)} for name, step in steps.items()
    }
    eight.route(small_route)
    small = interleaved(_inference(variants, subject.small, small_route), 3 * rounds)
    half, apart[_HALF] = _half(subject, upstream)
    saved = {name: row["saved"] for name, row in (memory | half).items()}
    return {
        "work": subject.work,
        "promised": _promised(seconds, small, saved),
        "beside": _beside(seconds, large, small, saved),
        "step": {name: medians(seconds[name]) | memory[name] for name in seconds},
        "step of one row": half,
        "inference": {name: medians(times) for name, times in large.items()},
        "inference, 16 rows of one token": {name: medians(times) for name, times in small.items()},
        "differences": apart,
    }


def _promised(seconds: Seconds, small: Seconds, saved: dict[str, int]) -> dict[str, float]:
    return {
        "LoRA step over peft's": ratio(seconds, "lora", "peft lora"),
        "LoRA saved bytes over peft's": saved["lora"] / saved["peft lora"],
        "DoRA step over peft's": ratio(seconds, "dora", "peft dora"),
        "DoRA saved bytes over peft's": saved["dora"] / saved["peft dora"],
        "dropout saved bytes over peft's": saved["lora, dropout"] / saved["peft lora, dropout"],
        "bf16 base saved bytes over peft's": saved[_HALF] / saved[f"peft {_HALF}"],
        "8 adapters over 1, step": ratio(seconds, "lora, 8 adapters", "lora"),
        "8 adapters over 1, 16 rows of one token": ratio(small, "lora, 8 adapters", "lora"),
    }


_MIXED = "peft lora, 8 adapters"
"""Which peft cannot train."""
_HALF = "lora, bf16 base"


def _variants(subject: Subject) -> dict[str, Variant]:
    variants = {
        "frozen": Variant(deepcopy(subject.model), inside=subject.inside),
        "lora": ours(subject, lora(subject)),
        "peft lora": theirs(subject),
        "lora, dropout": ours(subject, lora(subject, DROPOUT)),
        "peft lora, dropout": theirs(subject, lora_dropout=DROPOUT),
        "dora": ours(subject, dora(subject)),
        "peft dora": theirs(subject, use_dora=True),
        "lora, 8 adapters": ours(subject, lora(subject), slots=ADAPTERS),
        _MIXED: theirs(subject, ADAPTERS),
    }
    adapters = [draw(_handle(variants["lora"]), seed) for seed in range(ADAPTERS)]
    lengths = {**draw(_handle(variants["dora"]), 0), **adapters[0]}
    for name, variant in variants.items():
        if name != "frozen":
            load(variant, adapters if "8" in name else [lengths if "dora" in name else adapters[0]])
    return variants


def _handle(variant: Variant) -> Any:
    assert variant.handle is not None
    return variant.handle


def _inference(variants: dict[str, Variant], inputs: tuple[Tensor, ...], route: Tensor) -> dict[str, Work]:
    called = [names(ADAPTERS)[slot] for slot in route.tolist()]
    plain = ("frozen", "lora", "peft lora", "lora, 8 adapters")
    works: dict[str, Work] = {name: partial(variants[name].infer, inputs) for name in plain}
    return works | {_MIXED: partial(variants[_MIXED].infer, inputs, adapter_names=called)}


def _differences(
    variants: dict[str, Variant], inputs: tuple[Tensor, ...], upstream: Tensor, route: Tensor
) -> dict[str, dict[str, float]]:
    """How far ours are from peft's; dropout in evaluation, since its draws differ."""
    found = {name: differences(variants[name], variants[f"peft {name}"], inputs, upstream) for name in ("lora", "dora")}
    mine, peft = variants["lora, dropout"], variants["peft lora, dropout"]
    _handle(mine).bank.eval()
    peft.model.eval()
    found["lora, dropout (in evaluation)"] = differences(mine, peft, inputs, upstream)
    _handle(mine).bank.train()
    peft.model.train()
    mixed = mixed_differences(variants["lora, 8 adapters"], variants[_MIXED], inputs, upstream, route)
    return found | {"lora, 8 adapters": mixed}


def _half(subject: Subject, upstream: Tensor) -> tuple[dict[str, Any], dict[str, float]]:
    """LoRA on a base in bfloat16, one row and one step: a CPU without instructions for it is slow at it."""
    dtype = torch.bfloat16
    inputs, up = tuple(x[:1].to(dtype) for x in subject.inputs), upstream[:1].to(dtype)
    pair = {_HALF: ours(subject, lora(subject), dtype=dtype), f"peft {_HALF}": theirs(subject, dtype=dtype)}
    factors = draw(_handle(pair[_HALF]), 0)
    rows: dict[str, Any] = {}
    steps: list[Step] = []
    for name, variant in pair.items():
        load(variant, [factors])
        seconds: list[tuple[float, float]] = []
        step = partial(variant.step, inputs, up)
        peak = peak_rise(partial(_keep, seconds, partial(timed, partial(_keep, steps, step))))
        rows[name] = medians(seconds) | {"saved": variant.saved(inputs), "peak": peak}
    mine, peft = steps
    return rows, furthest(mine, peft)


def _keep(results: list[Any], work: Work) -> None:
    results.append(work())


def _beside(seconds: Seconds, large: Seconds, small: Seconds, saved: dict[str, int]) -> dict[str, float]:
    """Figures that explain the promised ones."""
    eight, one = "lora, 8 adapters", "lora"
    return {
        "LoRA step over frozen": ratio(seconds, "lora", "frozen"),
        "peft LoRA step over frozen": ratio(seconds, "peft lora", "frozen"),
        "dropout step over none": ratio(seconds, "lora, dropout", "lora"),
        "peft dropout step over none": ratio(seconds, "peft lora, dropout", "peft lora"),
        "dropout step over peft's": ratio(seconds, "lora, dropout", "peft lora, dropout"),
        "dropout saved bytes over none": saved["lora, dropout"] / saved["lora"],
        "peft dropout saved bytes over none": saved["peft lora, dropout"] / saved["peft lora"],
        "DoRA step over LoRA": ratio(seconds, "dora", "lora"),
        "8 adapters over 1, inference": ratio(large, eight, one),
        "peft 8 adapters over 1, inference": ratio(large, f"peft {eight}", f"peft {one}"),
        "peft 8 adapters over 1, 16 rows of one token": ratio(small, f"peft {eight}", f"peft {one}"),
        "8 adapters over peft's 8, 16 rows of one token": ratio(small, eight, f"peft {eight}"),
    }
