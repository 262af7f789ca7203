"""A domain of one small regression, and the worker that knows it: `python -m graft.studio.bench.line FOLDER`.

It has all that makes a training hard to interrupt (dropout, moments, data workers, a schedule) in a fraction of a
second, so that hundreds of kills are soon done. `data.path` names a folder that must be there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from graft.studio import registry
from graft.studio.adapter import Adapter, Card
from graft.studio.errors import DataError, InputError
from graft.studio.job import Job


def register() -> None:
    """Make the domain known to this process."""
    registry.DOMAINS["line"] = "graft.studio.bench.line"
    registry.METHODS["line", "fit"] = "graft.studio.bench.line:Fit"


@dataclass(frozen=True)
class DataConfig:
    """What is fitted."""

    path: str = ""
    """A folder that must exist; empty needs none."""
    slope: float = 1.0
    """Of the line."""


@dataclass(frozen=True)
class Fit:
    """A small network fitted to a line."""

    width: int = 16
    """Of its hidden layer."""
    dropout: float = 0.1
    """Share of the hidden values that a step leaves out."""
    pause: float = 0.0
    """Seconds that each step sleeps."""


class Line(nn.Module):
    """Regressions side by side, one per job."""

    default_learning_rate = 1e-2

    def __init__(self, jobs: Sequence[Job]):
        super().__init__()
        self.methods = [Fit(**{k: v for k, v in job.method.items() if k != "name"}) for job in jobs]
        self.slopes, self.rows = [DataConfig(**job.data).slope for job in jobs], jobs[0].train.batch_size
        nets = []
        for job, method in zip(jobs, self.methods, strict=True):
            torch.manual_seed(job.train.seed)
            inner = nn.Dropout(method.dropout)
            nets.append(nn.Sequential(nn.Linear(4, method.width), nn.Tanh(), inner, nn.Linear(method.width, 1)))
        self.nets = nn.ModuleList(nets)
        self.done: set[int] = set()

    def batch(self, step: int, *generators: torch.Generator) -> Tensor:
        """Rows for each job."""
        return torch.stack([torch.randn(self.rows, 4, generator=generator) for generator in generators])

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the jobs' losses, and each of them."""
        time.sleep(self.methods[0].pause)
        losses = torch.stack(
            [
                (net(rows) - slope * rows.sum(1, keepdim=True)).square().mean() * float(slot not in self.done)
                for slot, (net, slope, rows) in enumerate(zip(self.nets, self.slopes, x, strict=True))
            ]
        )
        return losses.sum(), {"loss": losses} if len(losses) > 1 else {}

    def owned(self) -> list[tuple[nn.Parameter, int | None]]:
        """Whose each parameter is."""
        return [(p, slot) for slot, net in enumerate(self.nets) for p in net.parameters()]

    def finish(self, slot: int) -> None:
        """Leave a job out."""
        self.done.add(slot)

    def adapter(self, metrics: dict[str, Any], slot: int = 0) -> Adapter:
        """The weights of a job's network."""
        return Adapter(dict(self.nets[slot].state_dict()), Card("fit", {}, domain="line", metrics=metrics))


def load_base(name: str, device: str | None = None, attention: str = "auto") -> Any:
    """Nothing, and a line on what was loaded."""
    print(f"base {name} loaded", flush=True)
    return SimpleNamespace(hash="0")


def prepare(job: Job, run_folder: Path | None = None) -> Line:
    """The task of one job."""
    return prepare_together([job])


def prepare_together(jobs: Sequence[Job]) -> Line:
    """The task of several.

    Raises:
        InputError: they differ in their networks.
        DataError: a folder is missing.
    """
    registry.kept(load_base, jobs[0].base, jobs[0].train.device, jobs[0].train.attention)
    for job in jobs:
        path = DataConfig(**job.data).path
        if path and not Path(path).is_dir():
            raise DataError(path, "no such folder", "Check data.path")
    if len({str(job.method) for job in jobs}) > 1:
        raise InputError("jobs", "their methods differ", "Train them alone")
    return Line(jobs)


if __name__ == "__main__":
    from graft.studio.runs.worker import main

    register()
    raise SystemExit(main())
