import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graft.studio.errors import InputError, SiteError
from graft.studio.methods.dora import DoRA
from graft.studio.methods.loftq import loftq
from graft.studio.methods.lora import LoRA
from graft.studio.sites import is_dense
from graft.studio.slotted import dense_weight


def rounded(weight, bits=2):
    """Symmetric levels for each row."""
    levels = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    return ((weight / levels - 0.5).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5) * levels


class Rounded(nn.Linear):
    """A layer with few levels, whose weight is no plain tensor of floats."""

    levels: Tensor

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        found = rounded(layer.weight)
        self.register_buffer("levels", found.unique())
        self.weight = nn.Parameter(torch.searchsorted(self.levels, found).to(torch.int16), requires_grad=False)
        self.bias = layer.bias

    def forward(self, input):
        return nn.functional.linear(input, self.levels[self.weight.long()], self.bias)


def net():
    torch.manual_seed(0)
    net: Any = nn.ModuleDict({"qkv": nn.Linear(24, 48), "fc1": nn.Linear(24, 32, bias=False)}).requires_grad_(False)
    return net


def svd(matrix, rank):
    u, s, v = torch.linalg.svd(matrix)
    return u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_base_and_product_are_those_of_the_papers_algorithm(steps):
    model = net()
    weight, bias = model["fc1"].weight.clone(), model["qkv"].bias.clone()
    handle = loftq(model, LoRA(rank=3, alpha=7.5, targets=("fc1", "q")), Rounded, steps)
    low_rank = torch.zeros_like(weight)
    for _ in range(steps):
        base = rounded(weight - low_rank)
        low_rank = svd(weight - base, 3)
    torch.testing.assert_close(dense_weight(model["fc1"]), base)
    delta = next(slot.delta(0) for slot in handle._slots if slot.site.name == "fc1")
    torch.testing.assert_close(delta, low_rank, rtol=1e-4, atol=1e-5)
    a, b = handle.tensors()["fc1.A"], handle.tensors()["fc1.B"] * 2.5
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-4, atol=1e-5)  # both have the root of the singular values
    torch.testing.assert_close(model["qkv"].bias, bias)


def test_rows_of_a_packed_layer_have_factors_of_their_own():
    model, before = net(), net()
    x = torch.randn(5, 24)
    handle = loftq(model, LoRA(rank=16, targets="attention"), Rounded, steps=2)
    assert [site.rows for site in handle.plan] == [(0, 16), (16, 32), (32, 48)]
    torch.testing.assert_close(model["qkv"](x), before["qkv"](x), rtol=1e-4, atol=1e-4)  # the rank makes up for all
    handle.detach()
    assert (model["qkv"](x) - before["qkv"](x)).abs().max() > 0.05
    assert type(model["qkv"]) is Rounded and type(model["fc1"]) is nn.Linear


def libraries():
    torchao = pytest.importorskip("torchao.quantization")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    int4: Any = torch.int4  # type: ignore[attr-defined]

    def with_torchao(layer):
        torchao.quantize_(layer, torchao.IntxWeightOnlyConfig(weight_dtype=int4, granularity=torchao.PerGroup(32)))
        return layer

    def nf4(layer):
        made = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4")
        made.load_state_dict(layer.state_dict())
        return made.to("cpu")

    return {"torchao int4": with_torchao, "bitsandbytes nf4": nf4}


@pytest.mark.parametrize(("name", "most"), [("rounded", 2), ("torchao int4", 5), ("bitsandbytes nf4", 5)])
def test_the_error_falls_with_the_start_and_with_the_steps(name, most):
    quantise = Rounded if name == "rounded" else libraries()[name]
    torch.manual_seed(0)
    # Weights as trained ones are: some directions count more.
    weight = torch.randn(64, 16) @ torch.randn(16, 128) / 4 + 0.2 * torch.randn(64, 128)
    errors: list[Tensor] = []
    for steps in (1, most):
        model: Any = nn.Sequential(nn.Linear(128, 64)).requires_grad_(False)
        model[0].weight.copy_(weight)
        handle = loftq(model, LoRA(rank=8, targets="0"), quantise, steps)
        lost = weight - dense_weight(model[0])
        if not errors:  # with one step the base is rounded as it would be anyway
            errors.append(torch.linalg.matrix_norm(lost))
        errors.append(torch.linalg.matrix_norm(lost - handle._slots[0].delta(0)))
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < errors[1]


def test_the_example_of_the_docs_runs():
    pytest.importorskip("torchao.quantization")
    text = (Path(__file__).parents[2] / "docs" / "quantised.md").read_text()
    (example,) = re.findall(r"```python\n(import torch\nfrom torchao.*?)```", text, re.DOTALL)
    made: dict[str, Any] = {"model": nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)}
    exec(compile(example, "example", "exec"), made)
    assert made["handle"].plan.sites[0].name == "0"
    assert not is_dense(made["model"][0].weight)


def test_it_trains_from_there_and_saves_as_a_lora():
    model = net()
    handle = loftq(model, LoRA(rank=2, targets="fc1"), Rounded, 2)
    x = torch.randn(5, 24)
    handle.probe(lambda: model["fc1"](x))
    optimizer = torch.optim.AdamW(handle.bank.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model["fc1"](x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(handle.tensors()) == {"fc1.A", "fc1.B"}


def test_a_rank_beyond_the_matrix_is_filled_with_zeros():
    model = net()
    handle = loftq(model, LoRA(rank=30, targets="fc1"), Rounded, 1)
    assert handle.tensors()["fc1.A"].shape == (30, 24)
    assert not handle.tensors()["fc1.A"][24:].any()


def test_it_says_what_it_cannot_do_before_it_changes_anything():
    model = net()
    with pytest.raises(InputError, match="steps 0: must be at least 1"):
        loftq(model, LoRA(targets="fc1"), Rounded, 0)
    with pytest.raises(InputError, match="DoRA: LoftQ starts a plain LoRA"):
        loftq(model, DoRA(targets="fc1"), Rounded)
    model["conv"] = nn.Conv1d(3, 3, 1)
    with pytest.raises(SiteError, match="conv: LoftQ wants a linear layer"):
        loftq(model, LoRA(targets=("fc1", "conv")), Rounded)
    assert type(model["fc1"]) is nn.Linear
    loftq(model, LoRA(targets="fc1"), Rounded, 1).detach()
    with pytest.raises(SiteError, match="fc1: LoftQ wants a linear layer in full precision"):
        loftq(model, LoRA(targets="fc1"), Rounded)
