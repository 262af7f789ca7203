"""What a training is said to take beforehand, beside what it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import graft
from graft.studio.cli import main
from graft.studio.errors import InputError
from graft.studio.estimate import STEPS, Estimate, free_memory, resident, told_size, told_time
from graft.studio.job import Job

MB = 1_000_000
KNOWN = Estimate("cpu", 10, 2.0, 0.5, 3.0, 7.0, 100 * MB, 200 * MB, 150 * MB, 3 * MB, MB, 1000)


@pytest.fixture
def job(make_job: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return make_job(steps=500)


def test_the_first_steps_are_measured_and_nothing_stays(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = graft.estimate(job)
    assert told.trained == 4 * 16 + 16 + 16 + 1
    assert told.checkpoint > 3 * 4 * told.trained  # weights and two moments, and what names them
    assert told.loaded <= told.peak <= resident()[1]
    assert 0 < told.step < 5 and told.memory > told.peak and told.fits
    assert (told.sample, told.measurement) == (0.0, 0.0)
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_would_fail_fails(job: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="width 0"):
        graft.estimate({**job, "method": {"name": "regression", "width": 0}})
    with pytest.raises(Exception, match="step 2: the training diverged"):
        graft.estimate(
            {**job, "method": {"name": "regression", "breaks_at": 1}, "train": job["train"] | {"log_every": 1}}
        )


def test_too_little_memory_names_the_batch(
    job: dict[str, Any], toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(toy.Task, "forward", full)
    with pytest.raises(InputError, match=r"train.batch_size = 4: cpu has too little memory .* Set a smaller"):
        graft.estimate(job)


def test_the_sums() -> None:
    train = {"steps": 100, "measure_every": 50, "keep_checkpoints": 2, "log_every": 10}
    assert KNOWN.seconds(train, every=30) == 2 + 100 * 0.5 + 4 * 3 + 2 * 7
    assert KNOWN.disk(train, every=30) == 3 * 3 * MB + 2 * MB + 2 * 4 * 1000 + 10 * 250
    assert not KNOWN.fits
    text = KNOWN.text(train, 30, 5 * 10**9)
    assert "78 s: 2.0 s to prepare, 100 steps of 500 ms, 4 samples of 3.0 s" in text
    assert "200 MB on cpu, 100 MB of them once loaded; there are 150 MB. Too little: set a smaller" in text
    assert KNOWN.document(train, 30, 7)["seconds"] == 78
    assert [told_time(s) for s in (0.05, 5, 99.6, 600, 9000)] == ["50 ms", "5.0 s", "100 s", "10 min", "2.5 h"]
    assert [told_size(s) for s in (5e5, 5e7, 5e9)] == ["0.5 MB", "50 MB", "5.0 GB"]


def test_memory_that_is_free() -> None:
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_memory() < page * pages
    kept = bytearray(50 * MB)
    kept[::4096] = b"x" * len(kept[::4096])
    assert resident()[0] > 50 * MB


def test_memory_is_this_process_own() -> None:
    """Linux hands the highest memory of the process that starts another on to it, in getrusage's figure."""
    kept = bytearray(400 * MB)
    kept[::4096] = b"x" * len(kept[::4096])
    command = "from graft.studio.estimate import resident; print(*resident())"
    now, highest = map(int, subprocess.check_output([sys.executable, "-c", command]).split())
    assert now <= highest < len(kept) < resident()[0]


def test_the_command(job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.toml"
    file.write_text(Job.load(job).to_toml())
    assert main(["train", str(file), "--dry-run", "--json", "--runs", str(tmp_path / "runs")]) == 0
    document = json.loads(capsys.readouterr().out)
    fields = {key: document[key] for key in asdict(KNOWN)}
    assert document["disk"] == Estimate(**fields).disk({"steps": 500, "log_every": 2})
    assert document["disk_free"] > 0 and document["fits"]
    assert main(["train", str(file), "--dry-run"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"time", "memory", "disk"}
    assert not (tmp_path / "runs").exists()


def test_it_takes_few_steps(job: dict[str, Any], toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    forward = toy.Task.forward

    def counted(self: Any, x: Any) -> Any:
        taken.append(0)
        return forward(self, x)

    monkeypatch.setattr(toy.Task, "forward", counted)
    graft.estimate(job)
    assert len(taken) == STEPS
    graft.estimate({**job, "train": job["train"] | {"steps": 1}})
    assert len(taken) == STEPS + 1


@pytest.mark.alone
def test_it_is_what_the_training_takes(tmp_path: Path) -> None:
    """A LoRA for the embedded diffusion model: memory, time and disk of the process that trains it."""
    from graft.diffusion.bench.pictures import write_pictures
    from graft.studio.pocket.atlas import Atlas

    photos = write_pictures(tmp_path / "photos", Atlas.load().index("hedgehog"), captions=False)
    file = tmp_path / "job.toml"
    file.write_text(f'base = "pocket-sd"\n[method]\nname = "lora"\n[data]\npath = "{photos}"\n'
                    "[train]\nsteps = 24\ncheckpoint_every = 8\n[sample]\nevery = 12\nsteps = 10\n")  # fmt: skip
    base = [sys.executable, "-m", "graft", "train", str(file)]
    told = json.loads(subprocess.run([*base, "--dry-run", "--json"], check=True, capture_output=True).stdout)
    began = time.monotonic()
    train = [*base, "--run-dir", str(tmp_path / "run")]
    # in a process that has no other child: the figure is the highest of all
    watch = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
    watch += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    watched = subprocess.run([sys.executable, "-c", watch, *train], check=True, capture_output=True)
    seconds = time.monotonic() - began
    peak = int(watched.stdout) * 1024
    disk = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    print(f"told {told['seconds']} s, {told['peak'] / 1e6:.0f} MB, {told['disk'] / 1e6:.1f} MB on disk; "
          f"took {seconds:.1f} s with Python's start, {peak / 1e6:.0f} MB, {disk / 1e6:.1f} MB")  # fmt: skip
    assert told["peak"] == pytest.approx(peak, rel=0.1)
    assert seconds / 3 < told["seconds"] < seconds * 2
    assert disk <= told["disk"] < 3 * disk
