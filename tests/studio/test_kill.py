"""SIGKILL at random moments: every run resumes and ends with the bits of the undisturbed one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from graft.studio.bench.kill import torment


@pytest.mark.alone
def test_a_dozen_kills(make_job: Callable[..., dict[str, Any]], toy: ModuleType, tmp_path: Path) -> None:
    job = make_job(steps=15, checkpoint_every=1, log_every=1, learning_rate=0.03, measure_every=1, keep="best")
    modules = ["accelerate", "torch._dynamo", "graft.studio.training", toy.__name__]
    result = torment(job, tmp_path, 12, random.Random(), modules)
    assert result["identical"]
    assert len(result["kills"]) == 12
    assert sum(row["writing"] for row in result["kills"]) >= 3, "too few kills hit a checkpoint"
