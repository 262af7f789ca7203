"""Adapters on quantised bases: torchao's tensors, bitsandbytes' layers, and a layer of neither."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from graft.studio.adapter import Adapter, Card, base_hash, load_adapter
from graft.studio.config import to_dict
from graft.studio.errors import SiteError
from graft.studio.methods.bitfit import BitFit
from graft.studio.methods.diff_pruning import DiffPruning
from graft.studio.methods.dora import DoRA
from graft.studio.methods.fish_mask import FishMask
from graft.studio.methods.gated_lora import GatedLoRA
from graft.studio.methods.ia3 import IA3
from graft.studio.methods.krona import KronA
from graft.studio.methods.lora import LoRA
from graft.studio.methods.ssf import SSF
from graft.studio.slotted import dense_weight

INT4: Any = torch.int4  # type: ignore[attr-defined]
torchao = pytest.importorskip("torchao.quantization")
bitsandbytes = pytest.importorskip("bitsandbytes")


class Nibbles(nn.Linear):
    """Four bits for each weight, two in a byte: as libraries pack them, with a shape that tells nothing."""

    levels: Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        levels = layer.weight.abs().amax() / 7
        codes = (layer.weight / levels).round().to(torch.int8).flatten() + 8
        self.register_buffer("levels", levels)
        self.weight = nn.Parameter((codes[::2] | (codes[1::2] << 4)).to(torch.uint8)[:, None], requires_grad=False)
        self.bias = layer.bias

    def forward(self, input):
        codes = torch.stack([self.weight & 15, self.weight >> 4], 1).view(self.out_features, self.in_features)
        return F.linear(input, (codes.to(input.dtype) - 8) * self.levels.to(input.dtype), self.bias)


def replaced(model, make):
    """Each linear layer made anew."""
    for block in model:
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                setattr(block, name, make(child))
    return model


def with_torchao(config):
    def quantise(model):
        torchao.quantize_(model, config())
        return model

    return quantise


def nf4(layer):
    """torchao's NF4, with its scales quantised too."""
    layer.weight = nn.Parameter(torchao.to_nf4(layer.weight, 64, 16), requires_grad=False)
    return layer


def four_bit(layer):
    """bitsandbytes' NF4, with its scales quantised too."""
    made = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4", compress_statistics=True)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def eight_bit(layer):
    made = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


QUANTISED = {
    "torchao int8": with_torchao(lambda: torchao.Int8WeightOnlyConfig()),
    "torchao int4": with_torchao(
        lambda: torchao.IntxWeightOnlyConfig(weight_dtype=INT4, granularity=torchao.PerGroup(32))
    ),
    "torchao nf4": lambda model: replaced(model, nf4),
    "bitsandbytes nf4": lambda model: replaced(model, four_bit),
    "bitsandbytes int8": lambda model: replaced(model, eight_bit),
    "packed bytes": lambda model: replaced(model, Nibbles),
}
each_kind = pytest.mark.parametrize("quantise", QUANTISED.values(), ids=list(QUANTISED))


class Block(nn.Module):
    """Packed attention by one head, and a feed-forward part."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.fc1, self.fc2 = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.fc2(self.fc1(x).relu())


def dense():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).requires_grad_(False).eval()


X = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(1))
TARGETS = ("q", "v", "proj", "fc1", "fc2")


def dequantised(model):
    """A dense model that computes the same, from what the quantised layers make of the identity."""
    twin = dense()
    for (_, layer), (_, other) in zip(model.named_modules(), twin.named_modules(), strict=False):
        if isinstance(layer, nn.Linear):
            assert isinstance(other, nn.Linear)
            other.weight.copy_(dense_weight(layer))
    return twin


def weights(model):
    return {name: type(tensor) for name, tensor in model.state_dict().items()}, base_hash({"": model})


@each_kind
@pytest.mark.parametrize("method", [LoRA(rank=2, targets=TARGETS), DoRA(rank=2, targets=TARGETS)], ids=["lora", "dora"])
def test_it_trains_as_on_the_dequantised_base(quantise, method):
    model = quantise(dense())
    twin = dequantised(model)
    before, classes, out = weights(model), [type(module) for module in model.modules()], model(X)
    assert 1e-4 < (out - dense()(X)).abs().max() < 0.5  # it is quantised
    outs, tensors = [], []
    for each in (model, twin):
        torch.manual_seed(2)
        handle = method.attach(each)
        torch.testing.assert_close(each(X), out, rtol=0, atol=2e-2)
        handle.probe(lambda each=each: each(X))
        optimizer = torch.optim.SGD(handle.bank.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            (each(X) - 1).square().mean().backward()
            optimizer.step()
        outs.append(each(X).detach())
        tensors.append(handle.tensors())
        handle.detach()
    # bitsandbytes' int8 rounds its inputs too; all others compute the product of the weights that they stand for.
    atol = 5e-2 if any(isinstance(m, bitsandbytes.nn.Linear8bitLt) for m in model.modules()) else 1e-4
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=atol)
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensor, tensors[1][name], rtol=0, atol=atol)
    assert not torch.equal(outs[0], out)
    assert torch.equal(model(X), out)
    assert weights(model) == before
    assert [type(module) for module in model.modules()] == classes


@each_kind
@torch.no_grad()
def test_a_saved_adapter_and_rows_of_a_batch_act_on_it(quantise, tmp_path):
    model = quantise(dense())
    base = model(X)
    method = LoRA(rank=2, targets=TARGETS)
    handle = method.attach(model, slots=2)
    for parameter in handle.bank.parameters():
        nn.init.normal_(parameter, std=0.1)
    handle.route(torch.tensor([1, 0, -1, 1]))
    mixed = model(X)
    torch.testing.assert_close(mixed[2], base[2], rtol=1e-4, atol=1e-4)
    handle.route(torch.ones(4, dtype=torch.long))
    alone = model(X)
    torch.testing.assert_close(mixed[::3], alone[::3], rtol=1e-4, atol=1e-4)
    handle.detach()
    card = Card("lora", to_dict(method), base_hash=base_hash({"": model}), sites=handle.plan.to_list())
    Adapter(handle.tensors(1), card).save(tmp_path)
    fresh = quantise(dense())
    with load_adapter(tmp_path).attached(fresh):
        torch.testing.assert_close(fresh(X), alone, rtol=1e-5, atol=1e-5)


@each_kind
@pytest.mark.parametrize(
    "method",
    [IA3(targets=("k", "v"), inputs=("fc2",)), SSF(), BitFit(targets="all-linear"), KronA(targets="mlp"),
     GatedLoRA(targets="mlp")],
    ids=lambda method: type(method).__name__,
)  # fmt: skip
def test_what_acts_beside_the_weight_trains_on_it(quantise, method):
    model = quantise(dense())
    out = model(X)
    handle = method.attach(model)
    handle.probe(lambda: model(X))
    handle.detach()
    assert torch.equal(model(X), out)


@each_kind
def test_what_would_change_the_weight_is_refused(quantise):
    model = quantise(dense())
    handle = LoRA(rank=2, targets="fc1").attach(model)
    with pytest.raises(SiteError, match=r"0\.fc1: its weight is quantised .*merge into the base as it was before"):
        handle.merge()
    handle.detach()
    with pytest.raises(SiteError, match=r"0\.fc1: its weight is quantised .*cannot be changed itself"):
        LoRA(rank=2, targets="fc1", weight_mode=("fc1",)).attach(model)
    with pytest.raises(SiteError, match="cannot be changed itself"):
        DiffPruning(targets="fc1").attach(model)
    with pytest.raises(SiteError, match=r"0\.fc1: its weight is quantised"):
        FishMask(targets="fc1").choose(model, (model(X).square().mean() for _ in range(1)))
    assert weights(model) == weights(quantise(dense()))


def test_a_product_without_a_gradient_is_refused():
    """torchao's dynamic activations: what comes before would get only the part of its gradient that goes around."""
    model = with_torchao(lambda: torchao.Int8DynamicActivationInt8WeightConfig())(dense())
    LoRA(rank=2, targets=TARGETS).attach(model)
    with pytest.raises(SiteError, match=r"passes no gradient to its input.*not the activations"):
        model(X)
    with torch.no_grad():
        model(X)


def test_a_layer_keeps_the_type_that_it_will_compute_in():
    """bitsandbytes' layer takes the type of its first input; a look at its weight must not be that."""
    model = replaced(dense(), four_bit)
    fresh = deepcopy(model[0].fc1.compute_dtype)
    DoRA(rank=2, targets="fc1").attach(model)
    assert model[0].fc1.compute_dtype == fresh


def test_bfloat16_stays_bfloat16():
    model = with_torchao(lambda: torchao.Int8WeightOnlyConfig())(dense().bfloat16())
    out = model(X.bfloat16())
    for method in (LoRA(rank=2, targets=TARGETS), DoRA(rank=2, targets=TARGETS)):
        handle = method.attach(model)
        adapted = model(X.bfloat16())
        assert adapted.dtype == torch.bfloat16
        torch.testing.assert_close(adapted, out, rtol=0, atol=0.05)
        handle.detach()


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param("torchao int8", DoRA, marks=pytest.mark.slow),
        ("torchao nf4", LoRA),
        pytest.param("packed bytes", DoRA, marks=pytest.mark.slow),
    ],
)
def test_it_compiles_whole_and_once(kind, method):
    model = QUANTISED[kind](dense())[:1]
    handle = method(rank=2, targets=("v", "fc1") if kind == "packed bytes" else "fc1").attach(model, slots=2)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    handle.route(torch.tensor([0, 1, 1, 0]))
    compiled(X).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        handle.route(torch.tensor([1, -1, 0, 0]))
        torch.testing.assert_close(compiled(X), model(X))


@pytest.mark.slow
def test_the_recipe_of_the_docs_trains(tmp_path, monkeypatch):
    """QLoRA: NF4 with quantised scales, bfloat16, every linear layer."""
    text = (Path(__file__).parents[2] / "docs" / "quantised.md").read_text()
    (recipe,) = re.findall(r"```python\n(import torch\nfrom transformers.*?)```", text, re.DOTALL)
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **size)).save_pretrained(tmp_path)
    losses: list[float] = []
    made: dict[str, Any] = {}
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: losses.append(made["loss"].item()))
    exec(compile(recipe.replace("path/to/a/model", str(tmp_path)).replace("2e-4", "1e-2"), "recipe", "exec"), made)
    layers = [m for m in made["model"].modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == len(made["handle"].plan) == 14
    assert all(m.weight.quant_state.nested and m.weight.quant_state.quant_type == "nf4" for m in layers)
    assert losses[-1] < losses[0] - 0.1
