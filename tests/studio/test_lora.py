from math import sqrt

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graft.studio.config import from_dict, to_dict
from graft.studio.errors import InputError
from graft.studio.methods.lora import LoRA


def randomised(method, model, slots=1):
    handle = method.attach(model.requires_grad_(False), slots)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    return handle


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / sqrt(4))])
def test_a_linear_layer_computes_the_equation(rslora, scale):
    layer, x = nn.Linear(5, 7), torch.randn(2, 3, 5)
    base = layer(x)
    handle = randomised(LoRA(rank=4, alpha=6, rslora=rslora, targets="0"), nn.Sequential(layer))
    factors = handle.tensors()
    torch.testing.assert_close(layer(x), base + scale * x @ factors["0.A"].T @ factors["0.B"].T)


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 9, 9)),
        (nn.Conv3d(4, 6, 3, padding="same"), (2, 4, 3, 3, 3)),
    ],
)
def test_a_convolution_convolves_with_the_product(conv, shape):
    x, rank = torch.randn(shape), 3
    weight, geometry = conv.weight.detach().clone(), (conv.stride, conv.padding, conv.dilation)
    handle = randomised(LoRA(rank=rank, alpha=6, targets="all"), nn.Sequential(conv), slots=2)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    expected = []
    for row, slot in enumerate((1, 0)):
        factors = handle.tensors(slot)
        delta = 2 * torch.einsum("or,r...->o...", factors["0.B"], factors["0.A"])
        expected.append(convolve(x[row : row + 1], weight + delta, conv.bias, *geometry))
    handle.route(torch.tensor([1, 0]))
    torch.testing.assert_close(conv(x), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_an_embedding_looks_up_the_product():
    table, ids = nn.Embedding(11, 5), torch.randint(11, (3, 4))
    weight = table.weight.detach().clone()
    handle = randomised(LoRA(rank=2, alpha=6, targets="embedding"), nn.Sequential(table), slots=2)
    handle.route(torch.tensor([1, -1, 0]))
    expected = F.embedding(ids, weight)
    for row, slot in ((0, 1), (2, 0)):
        factors = handle.tensors(slot)
        expected[row] += 3 * (factors["0.B"] @ factors["0.A"]).T[ids[row]]
    torch.testing.assert_close(table(ids), expected)


def test_initial_values_are_those_of_the_papers_code():
    handle = LoRA(rank=64, targets=("0", "embedding")).attach(nn.Sequential(nn.Linear(100, 7), nn.Embedding(50, 9)))
    tensors = handle.tensors()
    assert tensors["0.A"].abs().max() <= 1 / sqrt(100)
    assert tensors["0.A"].std().item() == pytest.approx(1 / sqrt(300), rel=0.05)
    assert not tensors["0.B"].any()
    assert not tensors["1.A"].any()
    assert tensors["1.B"].std().item() == pytest.approx(1, rel=0.15)


def test_the_count_is_rank_times_both_widths():
    model = nn.Sequential(nn.Linear(5, 7), nn.Conv2d(4, 6, 3), nn.Embedding(11, 5))
    method = LoRA(rank=3, targets=("all", "embedding"))
    assert method.plan(model).counts == (3 * (5 + 7), 3 * (4 * 9 + 6), 3 * (11 + 5))
    assert sum(p.numel() for p in method.attach(model).bank.parameters()) == method.plan(model).parameters


def test_dropout_acts_in_training_only_and_follows_the_global_seed():
    model, x = nn.Sequential(nn.Linear(50, 7)), torch.randn(4, 50)
    handle = randomised(LoRA(rank=2, dropout=0.5, targets="0"), model)
    torch.manual_seed(3)
    one = model(x)
    assert not torch.equal(one, model(x))
    torch.manual_seed(3)
    assert torch.equal(one, model(x))
    handle.bank.eval()
    assert torch.equal(model(x), model(x))


def test_bfloat16_bases_keep_float32_factors():
    model = nn.Sequential(nn.Linear(6, 6), nn.Conv1d(4, 4, 1)).bfloat16()
    handle = LoRA(rank=2, targets="all").attach(model.requires_grad_(False))
    y = model(torch.randn(2, 4, 6, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in handle.bank.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "rank -1: must be at least 1"),
        ({"alpha": 0.0}, "alpha 0.0: must be above 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"dropout": 0.1, "weight_mode": ("a",)}, "no input to drop"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        LoRA(**settings)


def test_settings_survive_a_card():
    method = LoRA(rank=3, targets=("q", "v"), towers=("text",))
    assert from_dict(LoRA, to_dict(method), "card") == method
    with pytest.raises(InputError, match="rank"):
        from_dict(LoRA, {"rnak": 3}, "method")
