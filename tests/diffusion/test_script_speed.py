"""Both loops of the benches train the same thing: from the same weights, on the same batches, with equal losses."""

from pathlib import Path

import pytest
from PIL import Image

from graft.diffusion.bench.script_loop import Laps, _cut, table
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
