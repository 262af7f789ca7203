from math import log

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graft.studio.adapter import Adapter, Card, base_hash, load_adapter
from graft.studio.config import to_dict
from graft.studio.errors import InputError
from graft.studio.methods.diff_pruning import DiffPruning, GatedSlot


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False)).requires_grad_(False).eval()


X, LABELS = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1, 2])


def concrete(alpha, u, lower=-1.5, upper=1.5):
    """The authors' gate and its derivative, which they write out by hand."""
    s = torch.sigmoid(u.log() - (1 - u).log() + alpha)
    stretched = s * (upper - lower) + lower
    inside = ((stretched > 0) & (stretched < 1)).float()
    return stretched.clamp(0, 1), inside * (upper - lower) * s * (1 - s)


@pytest.mark.parametrize("structured", [False, True])
def test_output_gradients_and_penalty_are_those_of_the_authors_code(structured):
    model = nn.Sequential(nn.Linear(5, 8, bias=False)).requires_grad_(False)
    base = next(model.parameters()).clone()
    method = DiffPruning(targets="0", structured=structured, sparsity=0.01)
    handle = method.attach(model)
    (slot,) = handle.slots_of(GatedSlot)
    with torch.no_grad():
        slot.w.normal_()
        slot.alpha.normal_()
        if slot.group is not None:
            slot.group.fill_(-0.2)
    torch.manual_seed(7)
    u = torch.rand(8, 5).clamp(1e-4, 1 - 1e-4)
    u_group = torch.rand(()).clamp(1e-4, 1 - 1e-4)
    z, dz = concrete(slot.alpha[0].detach(), u)
    z2, dz2 = concrete(torch.tensor(-0.2), u_group) if structured else (torch.tensor(1.0), torch.tensor(0.0))
    assert 0 < z2 <= 1 and (z == 0).any() and (z == 1).any() and dz.any()
    w = slot.w[0].detach()
    weight = (base + z * z2 * w).requires_grad_()
    F.linear(X, weight).square().sum().backward()
    torch.manual_seed(7)
    model(X).square().sum().backward()
    assert weight.grad is not None and slot.w.grad is not None and slot.alpha.grad is not None
    torch.testing.assert_close(slot.w.grad[0], weight.grad * z * z2)
    torch.testing.assert_close(slot.alpha.grad[0], weight.grad * w * z2 * dz)
    expected = torch.sigmoid(slot.alpha - log(1.5 / 1.5)).sum()
    if slot.group is not None:
        assert slot.group.grad is not None
        torch.testing.assert_close(slot.group.grad[0], (weight.grad * w * z * dz2).sum())
        expected = expected + torch.sigmoid(torch.tensor(-0.2))
    penalty = handle.penalty()
    assert penalty is not None
    torch.testing.assert_close(penalty, 0.01 * expected)


def test_the_penalty_is_the_probability_that_a_drawn_gate_is_not_closed():
    method = DiffPruning(targets="0", structured=False, lower=-0.4, upper=1.2, alpha=-0.7, sparsity=1.0)
    model = nn.Sequential(nn.Linear(200, 200, bias=False))
    handle = method.attach(model)
    (slot,) = handle.slots_of(GatedSlot)
    penalty = handle.penalty()
    assert penalty is not None
    share = (slot.gate(0, drawn=True) > 0).float().mean()
    assert abs(share - penalty.item() / 40_000) < 0.01  # four standard deviations


def test_it_trains_prunes_and_trains_on_to_a_sparse_adapter(tmp_path):
    model, method = net(), DiffPruning(density=0.1, sparsity=2e-3)
    handle = method.attach(model)
    optimizer = torch.optim.AdamW(method.groups(handle), lr=1e-2)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.1]
    torch.manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        penalty = handle.penalty()
        assert penalty is not None
        (F.cross_entropy(model(X), LABELS) + penalty).backward()
        optimizer.step()
    handle.bank.eval()
    shares = [float((slot.gate(0, drawn=False) > 0).float().mean()) for slot in handle.slots_of(GatedSlot)]
    assert sum(shares) / len(shares) < 0.7  # the penalty has closed gates; at the start all were open
    changes = {slot.site.key: slot.delta(0).detach() for slot in handle.slots_of(GatedSlot)}
    flat = torch.cat([change.flatten() for change in changes.values()])
    keep = round(0.1 * len(flat))
    limit = flat.abs().sort(descending=True).values[keep - 1]
    pruned = method.prune(handle, model)
    assert sum(p.numel() for p in pruned.bank.parameters()) == keep == pruned.plan.parameters
    assert pruned.penalty() is None
    expected = {name: p.clone() for name, p in net().named_parameters()}
    for key, change in changes.items():
        name = key if key.endswith("bias") else f"{key}.weight"
        expected[name] += change * (change.abs() >= limit)
    torch.testing.assert_close(model(X), torch.func.functional_call(net(), expected, X))
    before = F.cross_entropy(model(X), LABELS)
    optimizer = torch.optim.AdamW(pruned.bank.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        optimizer.step()
    assert F.cross_entropy(model(X), LABELS) < 0.7 * before
    out, tensors = model(X), pruned.tensors()
    assert sum(len(each) for name, each in tensors.items() if name.endswith(".D")) == keep
    pruned.detach()
    assert torch.equal(model(X), net()(X))
    card = Card("diff_pruning", to_dict(method), base_hash=base_hash({"": model}), sites=pruned.plan.to_list())
    Adapter(tensors, card).save(tmp_path)
    with load_adapter(tmp_path).attached(model):
        assert torch.equal(model(X), out)


def test_gates_are_drawn_in_training_only_and_not_for_a_merge():
    model = net()
    handle = DiffPruning(alpha=0.0).attach(model)
    with torch.no_grad():
        for slot in handle.slots_of(GatedSlot):
            slot.w.fill_(0.1)
    assert not torch.equal(model(X), model(X))
    handle.bank.eval()
    expected = model(X)
    assert torch.equal(model(X), expected)
    handle.bank.train()
    handle.merge()
    torch.testing.assert_close(model(X), expected)


def test_it_says_what_it_needs():
    model, method = net(), DiffPruning(density=0.5)
    handle = method.attach(model, slots=2)
    with pytest.raises(InputError, match="2 slots: prune wants"):
        method.prune(handle, model)
    handle.detach()
    pruned = method.prune(method.attach(model), model)
    with pytest.raises(InputError, match="a pruned adapter: prune wants"):
        method.prune(pruned, model)
    with pytest.raises(InputError, match=r"upper 1\.0: must be above 1"):
        DiffPruning(upper=1.0)
