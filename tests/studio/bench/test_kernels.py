import json
from types import SimpleNamespace

import pytest
import torch

from graft.studio.bench import kernel_cases, kernels

TINY = {
    "LINEARS": [("tiny", 16, 5, 8, 12)],
    "RANKED": [],
    "PACKED": [("tiny qkv", 16, 5, 8, 24)],
    "GROUPED": [("tiny", 64, 3, 8, 8, 3)],
    "ATTENTIONS": [("tiny", 16, 2, 9, 8, (5, 3), False), ("tiny", 16, 2, 9, 8, (3,), True)],
    "BOTTLENECKS": [("tiny", 64, 5, 16, 4, False, 3), ("tiny", 16, 5, 16, 4, True, 1)],
    "CACHES": [(256, 100, 8, 10), (66_000, 10, 8, 10)],
    "OPTIMISERS": [("tiny", 32, 20, 2, 3)],
}


@pytest.fixture
def tiny(monkeypatch):
    for name, shapes in TINY.items():
        monkeypatch.setattr(kernel_cases, name, shapes)


@pytest.mark.slow
def test_every_path_is_measured_and_near_the_formula(tiny, tmp_path):
    result = kernels.run(tmp_path, rounds=1)
    text = result.pop("table")
    assert json.loads((tmp_path / "kernels.json").read_text()) == result
    assert result["passed"], text
    assert {row["operation"] for row in result["rows"]} == {
        *("lora_linear", "gated_attention", "bottleneck", "class_votes", "flat_adamw")
    }
    assert all(row["chosen"] == "library" for row in result["rows"])
    assert "lora_linear tiny 5 x 8 -> 12, rank 16" in text
    assert "largest error over eager" in text


def test_one_operation_alone(tiny):
    result = kernels.run(rounds=1, only="class_votes,flat_adamw")
    assert [row["operation"] for row in result["rows"]] == ["class_votes"] * 3 + ["flat_adamw"]


def test_a_path_that_fails_is_one_less(tiny):
    case = next(kernel_cases.cases(torch.device("cpu"), {"bottleneck"}))()

    def broken(*inputs):
        raise RuntimeError("out of registers")

    case.paths["triton"] = broken
    rows = list(kernels._measured(case, torch.device("cpu"), 1))
    assert rows[0]["failures"] == {"triton": "RuntimeError: out of registers"}
    assert "triton" not in case.paths


@pytest.mark.slow
def test_replays_see_the_other_adapters(tiny, monkeypatch):
    """With a stand-in for a CUDA graph, which does the captured work again where its results lie."""

    class Graph:
        def __init__(self, work):
            self.work, self.results = work, work()

        def replay(self):
            for old, new in zip(self.results, self.work(), strict=True):
                old.copy_(new)

    def captured(work):
        graph = Graph(work)
        return graph, graph.results

    monkeypatch.setattr(kernels, "_captured", captured)
    monkeypatch.setattr(kernels, "_milliseconds", lambda work, place, rounds: 2.0 - bool(work()))
    case = next(kernel_cases.cases(torch.device("cpu"), {"grouped"}))()
    assert case.route is not None
    before = case.route.clone()
    replays = list(kernels._replayed(case))
    assert [replay["path"] for replay in replays] == ["library", "split 2", "inline 2"]
    assert all(replay["same bits"] for replay in replays)
    assert torch.equal(case.route, before)
    row = next(kernels._measured(case, SimpleNamespace(type="cuda"), 1))  # type: ignore[arg-type]
    assert row["eager"] == row["triton"] == 1.0  # calls return what they made, replays do not
    assert row["eager*"] == row["library*"] == row["triton*"] == 2.0
    assert row["gain*"] == 1.0
