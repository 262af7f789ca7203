import json

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
    result = kernels.run(rounds=1, only="packed,grouped")
    assert [row["pass"] for row in result["rows"]] == ["forward", "both"] * 2


def test_a_path_that_fails_is_one_less(tiny):
    case = next(kernel_cases.cases(torch.device("cpu"), {"bottleneck"}))()

    def broken(*inputs):
        raise RuntimeError("out of registers")

    case.paths["triton"] = broken
    rows = list(kernels._measured(case, torch.device("cpu"), 1))
    assert rows[0]["failures"] == {"triton": "RuntimeError: out of registers"}
    assert "triton" not in case.paths
