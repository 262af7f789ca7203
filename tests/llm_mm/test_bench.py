"""The benchmark measures what it says, on a few rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graft.llm_mm.bench import METHODS, run
from graft.llm_mm.bench_memory import run as memory
from graft.llm_mm.datasets import built_in
from graft.studio.errors import DataError
from graft.studio.registry import BENCHMARKS, find


@pytest.mark.alone
def test_rows_and_checks_of_a_short_run(tmp_path: Path):
    assert find(BENCHMARKS["vqa"]) is run
    methods = ("lora, replay 1:1", "lora for each", "llama_adapter")
    result = run(tmp_path, methods=methods, steps=1, batch_size=4, restore_steps=1, rows=8)
    told = {row["method"]: row for row in result["rows"]}
    assert set(told) >= {"base", "lora, replay 1:1", "fresh projector, stage 1"} and set(METHODS) >= set(told) - {
        "base",
        "fresh projector, stage 1",
    }
    assert told["base"]["new"] == 0 and told["base"]["old"] > 0.5
    assert told["lora, replay 1:1"]["parameters"] == 8 * 3 * (8 * 192 + 3 * (192 + 320))
    assert told["lora for each"]["parameters"] == 2 * told["lora, replay 1:1"]["parameters"]
    assert told["lora for each"]["old"] > 0.5  # after one step either of them is all but the base
    assert told["fresh projector, stage 1"]["old"] < 0.5 and not result["passed"]
    assert "old questions lost with replay" in result["table"]
    assert json.loads((tmp_path / "vqa.json").read_text())["rows"]


@pytest.mark.alone
def test_the_new_question_is_in_no_kind_that_was_taught():
    asked = {row.turns[0].text for row in built_in("pocket-scenes")}
    taught = {turn.text for row in built_in("pocket-questions") for turn in row.turns if turn.role == "user"}
    assert len(asked) == 1 and not asked & taught
    parts = [row.part for row in built_in("pocket-questions")]
    assert [parts.count(part) for part in ("train", "val", "test")] == [1000, 100, 200]
    with pytest.raises(DataError, match="Did you mean 'pocket-scenes'"):
        built_in("pocket-scene")


@pytest.mark.alone
def test_the_memory_of_a_step_is_what_the_methods_promise(tiny: Path, tmp_path: Path):
    assert find(BENCHMARKS["memory"]) is memory
    result = memory(tmp_path, base=str(tiny), batch_size=2, tiny=True)
    kept = 4 * 2 * 8 * 64  # bytes of a hidden state of the small Llama: rows, tokens, width
    rows = result["models"]["llama"]["rows"]
    # Beside a frozen A no layer's input is kept: in each of two layers the outputs of both norms and what the last part
    # of the feed-forward network gets, 176 wide. What attention gives is kept by attention itself.
    inputs = 2 * (2 * kept + kept * 176 // 64)
    assert rows["lora"]["saved"] - rows["lora_fa"]["saved"] == inputs
    # MeZO moves one tensor at a time, by a direction and a multiple of it.
    assert rows["mezo"]["peak"] == pytest.approx(max(rows["inference"]["peak"], 2 * 4 * 176 * 64), abs=64)
    assert rows["full"]["peak"] > rows["full"]["saved"] and "LST saved bytes over full tuning's" in result["table"]
    assert json.loads((tmp_path / "memory.json").read_text())["models"].keys() == result["models"].keys()
