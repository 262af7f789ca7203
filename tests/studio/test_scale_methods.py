"""(IA)3, SSF and BitFit against their formula in plain torch and, for (IA)3, against peft."""

from typing import Any

import peft
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from graft.studio.errors import SiteError
from graft.studio.methods.bitfit import BitFit
from graft.studio.methods.ia3 import IA3
from graft.studio.methods.ssf import SSF


def randomised(method, model, slots=1):
    handle = method.attach(model.requires_grad_(False), slots)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, 1.0, 0.3)
    return handle


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=16, num_heads=2, num_classes=3
    ).eval()


def test_ia3_gives_pefts_output_and_gradients():
    ids = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(1))
    ours, model = llama(), llama()
    handle = IA3().attach(ours.requires_grad_(False))
    modules = ["k_proj", "v_proj", "down_proj"]
    config = peft.IA3Config(target_modules=modules, feedforward_modules=["down_proj"], init_ia3_weights=False)
    theirs = peft.get_peft_model(model, config)
    named = dict(theirs.base_model.model.named_modules())
    factors = {site.name: named[site.name].ia3_l["default"] for site in handle.plan}
    handle.load({f"{name}.l": factor.detach().flatten() for name, factor in factors.items()})
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    ours(ids).logits.square().mean().backward()
    theirs(ids).logits.square().mean().backward()
    slots: list[Any] = handle._slots
    for slot, factor in zip(slots, factors.values(), strict=True):
        torch.testing.assert_close(slot.l.grad[0], factor.grad.flatten())
    counted = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert handle.plan.parameters == counted == 2 * (16 + 16 + 24)


def test_ia3_on_the_rows_of_a_packed_projection():
    model, x = vit(), torch.randn(2, 5, 16)
    handle = randomised(IA3(), model)
    tensors, layer = handle.tensors(), model.blocks[0].attn.qkv
    factor = torch.cat([torch.ones(16), tensors["blocks.0.attn.qkv[16:32].l"], tensors["blocks.0.attn.qkv[32:48].l"]])
    torch.testing.assert_close(layer(x), factor * F.linear(x, layer._parameters["weight"], layer.bias))
    down, inside = model.blocks[1].mlp.fc2, torch.randn(2, 5, 64)
    expected = F.linear(tensors["blocks.1.mlp.fc2.l"] * inside, down._parameters["weight"], down.bias)
    torch.testing.assert_close(down(inside), expected)
    with pytest.raises(SiteError, match="share one input"):
        IA3(targets="down", inputs=("k",)).attach(vit())


def test_ssf_is_scale_and_shift_after_every_operation():
    model = vit()
    plan = SSF().plan(model)
    names = {site.name for site in plan}
    assert {"patch_embed.proj", "blocks.0.norm1", "blocks.0.attn.qkv", "blocks.1.mlp.fc2", "norm"} < names
    assert "head" not in names
    assert plan.parameters == 2 * sum(site.covered[0] for site in plan)
    layers = {"conv": nn.Conv2d(3, 4, 3), "group": nn.GroupNorm(2, 4), "rms": nn.RMSNorm(6), "linear": nn.Linear(6, 4)}
    layers["out"] = nn.Linear(6, 4, bias=False)
    inputs = {"conv": (2, 3, 6, 6), "group": (2, 4, 6), "rms": (2, 5, 6), "linear": (2, 5, 6), "out": (2, 5, 6)}
    whole = nn.ModuleDict(layers)
    x = {name: torch.randn(shape) for name, shape in inputs.items()}
    before = {name: layers[name](x[name]) for name in layers}
    handle = randomised(SSF(), whole)
    tensors = handle.tensors()
    for name, y in before.items():
        shape = (-1, *[1] * (y.dim() - 2)) if name in ("conv", "group") else (-1,)
        expected = tensors[f"{name}.gamma"].view(shape) * y + tensors[f"{name}.beta"].view(shape)
        torch.testing.assert_close(layers[name](x[name]), expected)
    with pytest.raises(SiteError, match="rms: a ScaleShift cannot be part of the base"):
        handle.merge()
    handle.detach()
    merged = randomised(SSF(targets=("conv", "group", "linear", "out")), whole)
    expected = {name: layers[name](x[name]) for name in layers}
    merged.merge()
    for name, y in expected.items():
        torch.testing.assert_close(layers[name](x[name]), y)
    assert layers["out"].bias is not None  # only while merged
    merged.detach()
    assert layers["out"].bias is None
    assert all(torch.equal(layers[name](x[name]), before[name]) for name in layers)


def test_ssf_starts_as_the_authors_code():
    gamma, beta = SSF().attach(nn.Sequential(nn.Linear(3, 2000))).tensors().values()
    assert gamma.mean().item() == pytest.approx(1, abs=2e-3)
    assert [each.std().item() for each in (gamma, beta)] == pytest.approx([0.02, 0.02], rel=0.1)


def test_bitfit_steps_as_training_the_biases_themselves():
    x = torch.randn(2, 3, 32, 32)
    ours, theirs = vit().requires_grad_(False), vit()
    handle = BitFit(targets=("everything", "head")).attach(ours)
    biases = {name: p for name, p in theirs.named_parameters() if name.rpartition(".")[2] == "bias"}
    assert {site.key for site in handle.plan} == set(biases)
    assert handle.plan.parameters == sum(p.numel() for p in biases.values())
    for model, parameters in ((ours, list(handle.bank.parameters())), (theirs, list(biases.values()))):
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_bitfit_of_the_paper_and_of_a_model_without_biases():
    assert {site.role for site in BitFit(targets=("q", "up")).plan(vit())} == {"q", "up"}
    with pytest.raises(SiteError, match="none of these layers has a bias"):
        BitFit().plan(llama())
