"""The benches measure what they say, on small sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from graft.studio.errors import InputError
from graft.vlm.bench.few_shot import few_shot, fit, linear_probe, summary
from graft.vlm.bench.speed import speed


def test_few_shot_measures_methods_on_new_classes(tmp_path: Path):
    result = few_shot(tmp_path, classes=4, shots="1,4", seeds=1, tests=2, views=1, methods="task_res, tip_adapter")
    names = ("linear_probe", "task_res", "tip_adapter")
    assert set(result["summary"]) == {"zero_shot 0", *(f"{name} {count}" for name in names for count in (1, 4))}
    assert len(result["rows"]) == len(result["summary"])
    assert "task_res" in result["table"] and (tmp_path / "few-shot.json").exists()
    assert result["costs"]["task_res"]["parameters"] == 4 * 192 and result["costs"]["tip_adapter"]["parameters"] == 0
    assert result["costs"]["task_res"]["saved_mib"] > 0
    with pytest.raises(InputError, match="there is no such method"):
        few_shot(tmp_path, methods="magic")


@pytest.mark.slow
def test_few_shot_goes_on_where_it_stopped(tmp_path: Path):
    settings: dict[str, Any] = {"classes": 3, "shots": "1", "seeds": 1, "tests": 2, "views": 1}
    before = few_shot(tmp_path, methods="task_res", **settings)["rows"]
    after = few_shot(tmp_path, methods="task_res, cross_modal", **settings)["rows"]
    assert after[:-1] == before and after[-1]["method"] == "cross_modal"
    other = few_shot(tmp_path, methods="task_res", **(settings | {"tests": 1}))["rows"]
    assert len(other) == len(before) and other != before


def test_the_linear_probe_is_the_optimum():
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 6, generator=draw), torch.arange(40) % 3
    weight, bias = linear_probe(features, labels, decay=0.1)
    unit = F.normalize(features, dim=-1)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    loss = F.cross_entropy(unit @ weight.T + bias, labels) + 0.1 * (weight / 6**0.5).square().sum()
    for slope in torch.autograd.grad(loss, [weight, bias]):
        assert float(slope.abs().max()) < 1e-4


def test_a_gain_counts_when_it_exceeds_its_spread():
    def row(method: str, seed: int, gain: float) -> dict[str, Any]:
        return {"method": method, "shots": 1, "seed": seed, "accuracy": 0.2 + gain, "gain": gain, "seconds": 1.0}

    good, wide, below = ([row(name, k, g) for k, g in enumerate(gains)] for name, gains in
                         {"a": (0.1, 0.12), "b": (0.01, 0.2), "c": (0.5, -0.01)}.items())  # fmt: skip
    assert summary(good)["passed"]
    assert not summary(good + wide)["passed"] and not summary(below)["passed"]
    assert "b 1" in summary(good + wide)["table"].splitlines()[-1]


@pytest.mark.parametrize("part", ["coop", "cocoop", "tip", "epochs"])
def test_both_sides_compute_the_same(part: str):
    found = speed(batch=2, classes=6, layers=1, part=part)["parts"]
    for name, row in found.items():
        assert row["largest_difference"] < 1e-4, name
        assert row["saved_mib"] <= row["plain_saved_mib"], name
        assert row["ratio"] == row["plain_seconds"] / row["seconds"]


def test_fit_is_the_loop(photos: Path, tiny_folder: Path, tmp_path: Path):
    import graft
    from graft.studio.job import Job
    from graft.vlm.jobs import prepare

    job = Job.load({
        "base": str(tiny_folder), "domain": "vlm", "method": {"name": "clip_adapter"},
        "data": {"path": str(photos), "views": 2}, "train": {"steps": 5, "device": "cpu", "threads": 1},
    })  # fmt: skip
    looped = graft.train(job, run_dir=tmp_path / "run").adapter().tensors
    fitted = fit(prepare(job), job.train).adapter({}).tensors
    for name, tensor in looped.items():
        torch.testing.assert_close(fitted[name], tensor, rtol=1e-5, atol=1e-6)
