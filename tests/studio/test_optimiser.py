"""Jobs on one flat buffer end where torch's AdamW takes each of them alone."""

import pytest
import torch
from torch import nn

from graft.studio.optimiser import JobsAdamW


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_every_job_is_torchs_adamw_with_its_own_settings(cut: int):
    """All parameters as one group, or the first ones as a group that learns slower."""
    rates, decays, limits = [0.1, 0.0, 0.02], [0.0, 0.5, 0.3], [0.0, 1.0, 0.4]
    stacks = [nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 7))]
    single = [nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(3))]
    whose = [(stacks[0], None), (single[0], 2), (stacks[1], None), (single[1], 0)]
    alone = []
    for job in range(3):
        mine = [p[job] if owner is None else p for p, owner in whose if owner in (None, job)]
        copies = [nn.Parameter(p.detach().clone()) for p in mine]
        first = sum(owner in (None, job) for _, owner in whose[:cut])
        slow, fast = {"params": copies[:first], "lr": 0.5 * rates[job]}, {"params": copies[first:], "lr": rates[job]}
        alone.append((copies, torch.optim.AdamW([g for g in (slow, fast) if g["params"]], weight_decay=decays[job])))
    before = [stack.detach().clone() for stack in stacks]
    groups = [group for group in (whose[:cut], whose[cut:]) if group]
    optimizer = JobsAdamW(groups, 3)
    assert all(torch.equal(stack, old) for stack, old in zip(stacks, before, strict=True))
    scales = [0.5, 1.0] if cut else [1.0]
    optimizer.set([r * s for r in rates for s in scales], [d for d in decays for _ in scales], limits)
    for _ in range(4):
        optimizer.zero_grad()
        torch.stack([(p * torch.randn_like(p)).sum() for p, _ in whose]).sum().backward()
        for job, (copies, theirs) in enumerate(alone):
            slopes = [(p.grad, owner) for p, owner in whose if owner in (None, job)]
            for copy, (slope, owner) in zip(copies, slopes, strict=True):
                assert slope is not None
                copy.grad = (slope[job] if owner is None else slope).clone()
            if limits[job]:
                nn.utils.clip_grad_norm_(copies, limits[job])
            theirs.step()
        optimizer.step()
        for job, (copies, _) in enumerate(alone):
            mine = [p[job] if owner is None else p for p, owner in whose if owner in (None, job)]
            for copy, parameter in zip(copies, mine, strict=True):
                torch.testing.assert_close(parameter, copy)
    with torch.no_grad():
        stacks[1][1, 3] = float("nan")
    assert optimizer.broken() == [1]
    optimizer.drop(1)
    assert optimizer.broken() == [] and not stacks[0][1].any() and stacks[0][0].any() and single[0].any()
