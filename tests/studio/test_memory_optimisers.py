"""MeZO and GaLore against their formulas, alone and as settings of the one loop."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graft.studio.batches import step_seed
from graft.studio.errors import InputError
from graft.studio.galore import GaLore
from graft.studio.job import TrainConfig
from graft.studio.loop import learning_rate
from graft.studio.mezo import MeZO
from graft.studio.runs import Run
from graft.studio.training import resume, train, train_many

Make = Callable[..., dict[str, Any]]


def normals(net: nn.Module, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) for p in net.parameters()]


def test_mezo_takes_the_step_of_the_formula_and_keeps_nothing():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 1)), torch.randn(9, 5)
    optimizer = MeZO(net.parameters(), lr=0.1, weight_decay=0.2, eps=1e-2)
    before, z, saved = [p.detach().clone() for p in net.parameters()], normals(net, 3), []

    sides = []
    for side in (1, -1):
        other = deepcopy(net).requires_grad_(False)
        for parameter, d in zip(other.parameters(), z, strict=True):
            parameter.add_(d, alpha=side * 1e-2)
        torch.manual_seed(1)
        sides.append(other(x).square().mean())
    slope = (sides[0] - sides[1]) / 2e-2
    expected = [w - 0.1 * (slope * d + 0.2 * w) for w, d in zip(before, z, strict=True)]

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(1)
        return net(x).square().mean(), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        told, _ = optimizer.measure(3, run)
        back = [p.detach().clone() for p in net.parameters()]
        optimizer.step()
    torch.testing.assert_close(back, before, rtol=1e-6, atol=1e-6)
    for parameter, w in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), w, rtol=1e-4, atol=1e-6)
        assert parameter.grad is None
    torch.testing.assert_close(told, sum(sides) / 2)
    assert not saved
    assert not optimizer.state


def test_the_mean_of_mezos_estimates_is_the_gradient():
    torch.manual_seed(0)
    net, x = nn.Linear(3, 2), torch.randn(8, 3)
    optimizer = MeZO(net.parameters(), lr=0.1, weight_decay=0.0, eps=1e-3)
    net(x).square().mean().backward()
    exact = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    total = torch.zeros_like(exact)
    for seed in range(300):
        optimizer.measure(seed, lambda: (net(x).square().mean(), {}))
        assert optimizer.slope is not None
        total += optimizer.slope * torch.cat([z.flatten() for z in normals(net, seed)])
        optimizer.zero_grad()
    assert torch.cosine_similarity(total, exact, 0) > 0.95


def test_mezo_is_a_setting_of_the_loop(make_job: Make, toy: Any, tmp_path: Path):
    settings = {"optimiser": "mezo", "learning_rate": 0.02, "gradient_accumulation": 2, "schedule": "linear"}
    job = make_job({"dropout": 0.2}, **settings)
    run = train(job, tmp_path / "run")
    task = toy.prepare(run.job)
    for step in range(6):
        slope, z = torch.zeros(()), normals(task, step_seed(0, step, -1, 0))
        for micro in range(2):
            seed = step_seed(0, step, micro, 0)
            batch = task.batch(step, torch.Generator().manual_seed(seed))
            for side in (1, -1):
                with torch.no_grad():
                    for parameter, d in zip(task.parameters(), z, strict=True):
                        parameter.add_(d, alpha=side * 1e-3)
                    torch.manual_seed(seed)
                    slope += side * task(batch)[0] / 2e-3 / 2
                    for parameter, d in zip(task.parameters(), z, strict=True):
                        parameter.sub_(d, alpha=side * 1e-3)
        rate = learning_rate(run.job.train, 0.02, step)
        with torch.no_grad():
            for parameter, d in zip(task.parameters(), z, strict=True):
                parameter.sub_(rate * slope * d)
    for name, tensor in run.adapter().tensors.items():
        torch.testing.assert_close(tensor, task.nets[0].state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimiser", ["galore", pytest.param("mezo", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_with_the_same_bits(make_job: Make, toy: Any, tmp_path: Path, optimiser: str):
    job = make_job(optimiser=optimiser, galore_rank=2, galore_every=4, steps=7)
    whole = train(job, tmp_path / "whole").adapter().tensors
    original = toy.Task.batch

    def batch(self: Any, at: int, generator: torch.Generator) -> Any:
        if at == 3 and not (tmp_path / "asked").exists():
            (tmp_path / "asked").touch()
            Run(tmp_path / "run").request("stop")
        return original(self, at, generator)

    toy.Task.batch = batch
    run = train(job, tmp_path / "run")
    toy.Task.batch = original
    assert run.status == "stopped"
    for name, tensor in resume(run).adapter().tensors.items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (3, 6, 20)])
def test_galore_is_adamw_in_the_space_of_the_gradients_first_directions(shape: tuple[int, ...]):
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(shape))
    start, slopes = W.detach().clone(), [torch.randn(shape) for _ in range(4)]
    optimizer = GaLore([W], lr=0.1, weight_decay=0.0, rank=2, every=3, scale=0.5)
    tall = shape[-2] >= shape[-1]
    low = nn.Parameter(torch.zeros(*shape[:-2], *((20, 2) if tall else (2, 20))))
    theirs, expected = torch.optim.AdamW([low], lr=0.1, weight_decay=0.0), start
    for step, slope in enumerate(slopes):
        if step in (0, 3):
            U, _, V = torch.linalg.svd(slope, full_matrices=False)
            P = V.mT[..., :2] if tall else U[..., :2]
        low.grad, before = slope @ P if tall else P.mT @ slope, low.detach().clone()
        theirs.step()
        moved = low.detach() - before
        expected = expected + 0.5 * (moved @ P.mT if tall else P @ moved)
        W.grad = slope.clone()
        optimizer.step()
        torch.testing.assert_close(W.detach(), expected, rtol=1e-5, atol=1e-6)
    stacks = shape[0] if len(shape) > 2 else 1
    held = sum(value.numel() for value in optimizer.state[W].values() if value.dim())
    assert held == stacks * 2 * (2 * 20 + 6)  # AdamW's is 2 * 6 * 20


def test_what_is_small_is_plain_adamw():
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(4, 9)), nn.Parameter(torch.ones(5))] for _ in range(2))
    optimizers = GaLore(ours, 0.1, 0.3, rank=4, every=2, scale=0.5), torch.optim.AdamW(theirs, 0.1, weight_decay=0.3)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_fit_together_is_refused(make_job: Make, tmp_path: Path):
    with pytest.raises(InputError, match="no or bf16 with optimiser = mezo"):
        TrainConfig(optimiser="mezo", mixed_precision="fp16")
    with pytest.raises(InputError, match=r"train\.galore_rank = 0"):
        TrainConfig(galore_rank=0)
    runs = train_many([make_job(optimiser="mezo", steps=1, seed=seed) for seed in (0, 1)], tmp_path)
    assert [run.status for run in runs] == ["finished"] * 2
    assert not (runs[0].folder / "group.json").exists()  # one by one
