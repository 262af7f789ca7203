"""A domain of one small regression, with everything that the loop asks of one. Importing it registers it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.studio import registry
from graft.studio.adapter import Adapter, Card
from graft.studio.errors import InputError
from graft.studio.job import Job


def register() -> None:
    registry.DOMAINS["toy"] = __name__
    registry.METHODS["toy", "regression"] = f"{__name__}:Regression"


register()  # for processes that a test starts


@dataclass(frozen=True)
class DataConfig:
    scale: float = 1.0


@dataclass(frozen=True)
class Regression:
    width: int = 16
    dropout: float = 0.1
    breaks_at: int = -1

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"width {self.width}", "must be at least 1", "16 is usual")


class Task(nn.Module):
    """Several regressions side by side, one per job; each sees its own rows."""

    default_learning_rate = 1e-2

    def __init__(self, jobs: list[Job]):
        super().__init__()
        self.methods = [Regression(**{k: v for k, v in job.method.items() if k != "name"}) for job in jobs]
        self.scales = [DataConfig(**job.data).scale for job in jobs]
        self.rows = jobs[0].train.batch_size
        nets = []
        for job, method in zip(jobs, self.methods, strict=True):
            torch.manual_seed(job.train.seed)
            layers = [nn.Linear(4, method.width), nn.Tanh(), nn.Dropout(method.dropout), nn.Linear(method.width, 1)]
            nets.append(nn.Sequential(*layers))
        self.nets: Any = nn.ModuleList(nets)
        self.done: set[int] = set()
        self.seen: list[tuple[int, Tensor]] = []

    def batch(self, step: int, *generators: torch.Generator) -> Tensor:
        x = torch.stack([torch.randn(self.rows, 4, generator=generator) for generator in generators])
        self.seen.append((step, x[0]))
        for rows, method in zip(x, self.methods, strict=True):
            rows *= float("nan") if step == method.breaks_at else 1
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = x.to(next(self.parameters()).device)
        losses = [
            (net(rows) - scale * rows.sum(1, keepdim=True)).square().mean()
            if slot not in self.done
            else x.new_zeros(())
            for slot, (net, scale, rows) in enumerate(zip(self.nets, self.scales, x, strict=True))
        ]
        own = {"loss": torch.stack(losses)} if len(losses) > 1 else {}
        return torch.stack(losses).sum(), {"first": losses[0], **own}

    def owned(self) -> list[tuple[nn.Parameter, int | None]]:
        return [(p, slot) for slot, net in enumerate(self.nets) for p in net.parameters()]

    def finish(self, slot: int) -> None:
        self.done.add(slot)

    def sample(self, step: int, folder: Path) -> list[Path]:
        torch.rand(3)  # a careless domain: the loop must not mind
        path = folder / f"{step:06d}.png"
        path.write_bytes(b"picture")
        return [path]

    def validate(self) -> dict[str, list[float]]:
        x = torch.linspace(-1, 1, 20).reshape(5, 4)
        with torch.no_grad():
            losses = [(net[3](net[1](net[0](x))) - scale * x.sum(1, keepdim=True)).square().mean().item()
                      for net, scale in zip(self.nets, self.scales, strict=True)]  # fmt: skip
        return {"validation_loss": losses}

    def measure(self) -> dict[str, list[float]]:
        """A score that goes up and down: the weights are best when their first one is at 0.2."""
        torch.rand(3)
        return {"score": [-abs(net[0].weight[0, 0].item() - 0.2) for net in self.nets]}

    def adapter(self, metrics: dict[str, Any], slot: int = 0) -> Adapter:
        return Adapter(dict(self.nets[slot].state_dict()), Card("regression", {}, domain="toy", metrics=metrics))


def prepare(job: Job, run_folder: Path | None = None) -> Task:
    return Task([job])


def prepare_together(jobs: list[Job]) -> Task:
    if len({job.method.get("width") for job in jobs}) > 1:
        raise InputError("jobs", "they differ in their width", "Train them alone")
    return Task(jobs)
