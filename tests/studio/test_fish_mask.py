import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graft.studio.errors import InputError
from graft.studio.methods.fish_mask import FishMask


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False)).requires_grad_(False)


X, LABELS = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1, 2])


def losses(model):
    return (F.cross_entropy(model(x[None]), label[None]) for x, label in zip(X, LABELS, strict=True))


def test_the_places_are_those_of_the_largest_fisher_information():
    model = net()
    method = FishMask(density=0.2)
    places = method.choose(model, losses(model))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    twin = net().requires_grad_(True)
    fisher = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for loss in losses(twin):
        twin.zero_grad()
        loss.backward()
        for name, p in twin.named_parameters():
            assert p.grad is not None
            fisher[name] += p.grad**2 / len(X)
    total = sum(each.numel() for each in fisher.values())
    limit = torch.cat([each.flatten() for each in fisher.values()]).sort(descending=True).values[round(0.2 * total) - 1]
    for name, values in fisher.items():
        key = name if name.endswith("bias") else name.removesuffix(".weight")
        expected = (values.flatten() >= limit).nonzero().flatten()
        assert torch.equal(places.get(key, torch.tensor([], dtype=torch.long)), expected), name
    handle = method.attach(model, places=places)
    assert sum(p.numel() for p in handle.bank.parameters()) == round(0.2 * total) == handle.plan.parameters


def test_it_steps_as_masked_training_of_the_weights_themselves():
    ours, theirs = net(), net().requires_grad_(True)
    places = FishMask(density=0.3).choose(ours, losses(ours))
    handle = FishMask(density=0.3).attach(ours, places=places)
    masks = {}
    for name, p in theirs.named_parameters():
        key = name if name.endswith("bias") else name.removesuffix(".weight")
        masks[name] = torch.zeros(p.numel()).index_fill(0, places.get(key, torch.tensor([], dtype=torch.long)), 1)
    for model, parameters in ((ours, handle.bank.parameters()), (theirs, theirs.parameters())):
        optimizer = torch.optim.SGD(list(parameters), lr=0.1, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(X), LABELS).backward()
            for name, p in theirs.named_parameters() if model is theirs else []:
                assert p.grad is not None
                p.grad *= masks[name].view(p.shape)
            optimizer.step()
    torch.testing.assert_close(ours(X), theirs(X))


def test_it_says_what_it_needs():
    model = net()
    with pytest.raises(InputError, match=r"it trains what choose\(\) found"):
        FishMask().attach(model)
    with pytest.raises(InputError, match="computed before"):
        FishMask().choose(model, list(losses(model)))
    with pytest.raises(InputError, match="there are none"):
        FishMask().choose(model, [])
    with pytest.raises(InputError, match="density 0: must be above 0"):
        FishMask(density=0)
