"""Starting is quick: nothing heavy is imported before it is needed."""

import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "pydantic", "numpy", "PIL", "rich"}


def fastest(command: list[str], runs: int = 7) -> float:
    """Seconds of the quickest of several runs: the others measure what else the machine was doing."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_import_graft_loads_nothing_heavy() -> None:
    code = "import sys, graft; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    )
    assert "graft" in loaded
    assert not loaded & HEAVY


@pytest.mark.alone
def test_import_graft_is_quick() -> None:
    assert fastest([sys.executable, "-c", "import graft"]) < 0.3


@pytest.mark.alone
def test_help_is_quick() -> None:
    assert fastest([str(Path(sysconfig.get_path("scripts")) / "graft"), "--help"]) < 0.5
