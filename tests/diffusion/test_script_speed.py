"""Both loops of the benches train the same thing: from the same weights, on the same batches, with equal losses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from graft.diffusion.bench.script_loop import Laps, _cut, on_bases, table
from graft.diffusion.bench.script_speed import compared
from graft.studio.registry import BENCHMARKS, find


@pytest.mark.slow
@pytest.mark.parametrize("method", ["custom_diffusion", "lora"])
def test_the_losses_of_both_loops_are_equal(folder: Path, tmp_path: Path, method: str):
    found = compared(tmp_path / "small", method, str(folder), rows=2, rounds=3)
    assert found["equal"] and found["ratio"] > 0
    left_out = {"VAE"} if method == "custom_diffusion" else {"VAE", "text encoder"}
    assert found["parts"]["plain"].keys() - found["parts"]["ours"].keys() == left_out
    result = {"threads": 1, "width": 1.0, "side": 8, "limit": 1e9, "bases": {"tiny": found}}
    assert "MISSED" in table(result) and "equal, the last" in table(result)


def test_every_base_is_measured_and_the_threads_are_as_before(tmp_path: Path):
    threads, seen = torch.get_num_threads(), []

    def measure(name: str, base: str, made: bool) -> dict[str, Any]:
        seen.append((name, base, made, torch.get_num_threads()))
        parts = {"plain": {"step": 3.0}, "ours": {"step": 2.0}}
        return {name: {"batch_size": 2, "parts": parts, "ratio": 1.5, "equal": True, "losses apart": 0.0,
                       "last losses": (1.0, 1.0), "prepared in": 0.0}}  # fmt: skip

    told = on_bases(tmp_path / "speed.json", ("a", "b"), (0.5, 8), threads + 1, 1.4, measure)
    assert seen == [(name, name, False, threads + 1) for name in "ab"] and torch.get_num_threads() == threads
    assert told["table"].count("promised 1.4  ok") == 2
    assert json.loads((tmp_path / "speed.json").read_text())["bases"]["b"]["ratio"] == 1.5


def test_parts_come_in_pieces(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 10.0, 11.0, 12.0, 14.0])
    monkeypatch.setattr("graft.diffusion.bench.script_loop.time.process_time", lambda: next(clock))
    laps = Laps()
    for _ in range(2):
        laps.start()
        for part in ("files", "denoiser", "files"):
            laps(part)
    assert laps.medians() == {"files": 3000, "denoiser": 1000, "step": 4000}


def test_pictures_are_cut_as_the_scripts_cut_them():
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (10, 0, 30, 20))
    assert _cut(wide, 10).size == (10, 10) and _cut(wide, 10).getpixel((5, 5)) == (0, 0, 255)
    assert all(callable(find(BENCHMARKS[name])) for name in ("lora-speed", "custom-diffusion-speed"))
