"""Variants of LoRA against their formula in plain torch and, where it has them, against peft."""

from typing import Any

import peft
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from graft.studio.adapter import Adapter, Card, load_adapter
from graft.studio.config import to_dict
from graft.studio.errors import InputError, SiteError
from graft.studio.methods.dora import DoRA
from graft.studio.methods.gated_lora import GatedLoRA
from graft.studio.methods.lora import LoRA
from graft.studio.methods.lora_fa import LoRAFA
from graft.studio.methods.moslora import MoSLoRA


def randomised(method, model, slots=1):
    handle = method.attach(model.requires_grad_(False), slots)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    return handle


def layer(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7)).to(dtype), torch.randn(2, 3, 5, dtype=dtype)


def saved_bytes(run):
    """Bytes of the distinct tensors that a forward keeps for its backward, parameters left out."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 8), lambda: nn.Linear(6, 8, bias=False),
                                  lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1)])  # fmt: skip
def test_dora_gives_pefts_output_and_gradients(make):
    torch.manual_seed(0)
    model: Any = nn.Sequential(make())
    x = torch.randn(4, 5, 6) if isinstance(model[0], nn.Linear) else torch.randn(4, 3, 8, 8)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=True, init_lora_weights=False)
    weight, bias = model[0].weight.detach().clone(), model[0].bias
    theirs: Any = peft.get_peft_model(model, config)
    inner = theirs.base_model.model[0]
    ours: Any = nn.Sequential(make()).requires_grad_(False)
    ours[0].weight.copy_(weight)
    if bias is not None:
        ours[0].bias.copy_(bias)
    handle = DoRA(rank=3, alpha=5, targets="0").attach(ours)
    first = {"0.A": inner.lora_A["default"].weight, "0.B": inner.lora_B["default"].weight.flatten(1)}
    lengths = inner.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(handle.tensors()["0.m"], weight.flatten(1).norm(dim=1))
    with torch.no_grad():
        lengths.mul_(torch.rand_like(lengths) + 0.5)
    handle.load({name: tensor.detach() for name, tensor in first.items()} | {"0.m": lengths.detach().flatten()})
    upstream = torch.randn_like(theirs(x))
    torch.testing.assert_close(ours(x), theirs(x))
    theirs(x).backward(upstream)
    ours(x).backward(upstream)
    slot: Any = handle._slots[0]
    assert inner.lora_A["default"].weight.grad is not None
    torch.testing.assert_close(slot.A.grad[0], inner.lora_A["default"].weight.grad)
    torch.testing.assert_close(slot.B.grad[0], inner.lora_B["default"].weight.grad.flatten(1))
    torch.testing.assert_close(slot.m.grad[0], lengths.grad.flatten())


def test_dora_is_the_formula_with_rows_strength_and_gradients():
    model, x = layer(torch.float64)
    weight, bias = model[0].weight.detach().clone(), model[0].bias
    handle = randomised(DoRA(rank=2, alpha=3, targets="0"), model, slots=2)
    handle.bank.double()
    handle.scale(1, 0.5)
    route = [1, -1]

    def formula(slot, x):
        a, b, m = (getattr(handle._slots[0], name)[slot] for name in "ABm")
        changed = weight + 1.5 * b @ a
        whole = m[:, None] * changed / changed.norm(dim=1, keepdim=True).detach()
        return F.linear(x, torch.lerp(weight, whole, [1.0, 0.5][slot]), bias)

    expected = torch.stack([formula(1, x[0]), F.linear(x[1], weight, bias)])
    handle.route(torch.tensor(route))
    torch.testing.assert_close(model(x), expected)
    parameters = list(handle.bank.parameters())
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(model(x), parameters, upstream)
    for a, b in zip(ours, torch.autograd.grad(expected, parameters, upstream), strict=True):
        torch.testing.assert_close(a, b)


def test_dora_keeps_little_for_the_backward_pass():
    torch.manual_seed(0)
    settings = {"img_size": 64, "patch_size": 4, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 3}
    names = ["qkv", "proj", "fc1", "fc2"]

    def model():
        return timm.create_model("vit_tiny_patch16_224", **settings).requires_grad_(False)

    x = torch.randn(4, 3, 64, 64)
    theirs = model()
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=[*(rf"{name}" for name in names[:1]), "attn.proj", *names[2:]],
                        use_dora=True), theirs)  # fmt: skip
    ours = model()
    DoRA(rank=4, targets="all-linear").attach(ours)
    lora = model()
    LoRA(rank=4, targets="all-linear").attach(lora)
    sizes = [saved_bytes(lambda model=model: model(x)) for model in (ours, theirs, lora)]
    assert sizes[0] <= 0.6 * sizes[1]
    assert sizes[0] <= 1.1 * sizes[2]


def test_dora_beside_another_adapter_scales_what_it_finds_and_merges_to_the_same():
    model, x = layer()
    first, second = randomised(LoRA(rank=2, targets="0"), model), randomised(DoRA(rank=2, targets="0"), model)
    expected = model(x)
    second.merge()
    first.merge()
    torch.testing.assert_close(model(x), expected)
    second.unmerge()
    torch.testing.assert_close(model(x), expected)


def test_dora_says_no_where_it_cannot_work(tmp_path):
    model, _ = layer()
    made = nn.utils.parametrizations.weight_norm(nn.Linear(5, 7))
    with pytest.raises(SiteError, match="its weight is computed, not a parameter"):
        DoRA(targets="0").attach(nn.Sequential(made))
    handle = randomised(DoRA(rank=2, targets="0"), model)
    card = Card("dora", to_dict(DoRA(rank=2, targets="0")), sites=handle.plan.to_list())
    with pytest.raises(InputError, match="no plain LoRA"):
        Adapter(handle.tensors(), card).export(tmp_path, "loralib")


@pytest.mark.parametrize("method", [LoRAFA(rank=2, alpha=3, targets="0"), MoSLoRA(rank=2, alpha=3, targets="0")])
def test_lora_fa_and_moslora_are_their_formula_and_a_lora_to_others(method, tmp_path):
    model, x = layer()
    base = model(x)
    handle = randomised(method, model)
    tensors = handle.tensors()
    middle = tensors.get("0.M", torch.eye(2))
    expected = base + 1.5 * x @ tensors["0.A"].T @ middle.T @ tensors["0.B"].T
    torch.testing.assert_close(model(x), expected)
    handle.detach()
    name = {LoRAFA: "lora_fa", MoSLoRA: "moslora"}[type(method)]
    Adapter(tensors, Card(name, to_dict(method), sites=handle.plan.to_list())).export(tmp_path, "peft")
    with load_adapter(tmp_path).attached(model):
        torch.testing.assert_close(model(x), expected)


def test_lora_fa_keeps_no_input_and_draws_a_as_lora():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 7)).requires_grad_(False), torch.randn(100, 64)
    handle = LoRAFA(rank=4, targets="0").attach(model)
    assert saved_bytes(lambda: model(x)) < 0.5 * x.nbytes
    first = handle.tensors()["0.A"]
    assert 0 < first.abs().max() <= 1 / 8
    assert not handle.tensors()["0.B"].any()
    assert [name for name, _ in handle.bank.named_parameters()] == ["0.B"]


@pytest.mark.parametrize("per", ["row", "token"])
def test_gated_lora_is_its_formula(per):
    model, x = layer()
    base = model(x)
    handle = randomised(GatedLoRA(rank=2, per=per, targets="0"), model, slots=2)
    handle.route(torch.tensor([1, 0]))
    expected = []
    for row, slot in enumerate((1, 0)):
        t = handle.tensors(slot)
        gate = torch.sigmoid(x[row] @ t["0.w"] + t["0.v"])
        gate = gate.mean() if per == "row" else gate[:, None]
        expected.append(base[row] + gate * (x[row] @ t["0.A"].T @ t["0.B"].T))
    torch.testing.assert_close(model(x), torch.stack(expected))


def test_a_bfloat16_base_keeps_its_type_under_dora():
    model, x = layer(torch.bfloat16)
    handle = randomised(DoRA(rank=2, targets="0"), model)
    y = model(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in handle.bank.parameters())
