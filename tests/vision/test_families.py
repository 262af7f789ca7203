"""One small random model per family through every method: identity, gradients, saving, merging, and clear refusals."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from graft.studio.adapter import Adapter, Card, load_adapter
from graft.studio.config import to_dict
from graft.studio.errors import InputError, SiteError
from graft.vision import (
    VPT,
    AdapterPlus,
    AdaptFormer,
    FullTuning,
    LinearProbe,
    VisionBase,
    VisionBitFit,
    VisionLoRA,
    VisionSSF,
)
from graft.vision.base import sample_input

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
EVA = TINY | {"num_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", TINY),
    "clip": ("vit_base_patch16_clip_224", TINY),
    "dinov2, registers": ("vit_small_patch14_reg4_dinov2", TINY),
    "siglip, attention pooling": ("vit_base_patch16_siglip_224", TINY | {"num_classes": 0}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", TINY),
    "deit3": ("deit3_small_patch16_224", TINY),
    "eva02": ("eva02_tiny_patch14_224", EVA),
    "dinov3": ("vit_small_patch16_dinov3", EVA),
    "beit": ("beit_base_patch16_224", TINY),
    "swin": ("swin_tiny_patch4_window7_224",
             {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}),
    "swin v2": ("swinv2_tiny_window8_256",
                {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}),
    "hiera": ("hiera_tiny_224", {"img_size": (64, 64), "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}),
}  # fmt: skip
METHODS: dict[str, Any] = {
    "vpt": VPT(3, dropout=0.0),
    "vpt, shallow": VPT(3, deep=False),
    "adaptformer": AdaptFormer(4, dropout=0.0),
    "adapter_plus": AdapterPlus(4, drop_path=0.0),
    "ssf": VisionSSF(spread=0.0),
    "bitfit": VisionBitFit(),
    "lora": VisionLoRA(rank=2),
    "linear": LinearProbe(),
    "full": FullTuning(),
}
NOT = {(family, method) for family in ("beit", "swin", "swin v2", "hiera") for method in ("vpt", "vpt, shallow")}
"""What is refused."""
PAIRS = [(family, method) for family in FAMILIES for method in METHODS if (family, method) not in NOT]


def make(family: str) -> Any:
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, **({"num_classes": 5} | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval().requires_grad_(False)


def pictures(model: Any) -> torch.Tensor:
    return torch.randn(3, *sample_input(model).shape[1:], generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_every_method_on_every_family(family: str, name: str, tmp_path: Path):
    """Identity at the start, a gradient everywhere, the same from a file, detach restores bits, equal when merged."""
    method, model = METHODS[name], make(family)
    base = VisionBase(family, model)
    x, before = pictures(model), deepcopy(model.state_dict())
    plain, keys = model(x), base.hash
    if name not in ("vpt", "vpt, shallow", "adapter_plus", "linear", "full"):
        handle = method.attach(model)
        assert torch.equal(model(x), plain)
        handle.detach()

    handle = method.on(model, ("a", "b", "c", "d"))
    handle.bank.eval()
    assert model(x).shape == (3, 4)
    handle.probe(lambda: model(x[:1]))
    optimizer = torch.optim.AdamW(handle.bank.parameters(), lr=2e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    dead = [key for key, p in handle.bank.named_parameters() if p.grad is None or not p.grad.any()]
    assert name == "full" or not dead
    trained = model(x).detach()
    details = {"classes": ["a", "b", "c", "d"], "side": base.side}
    card = Card(
        _registered(name), to_dict(method), "vision", base_hash=keys, sites=handle.plan.to_list(), details=details
    )
    file = Adapter(handle.tensors(), card).save(tmp_path / "adapter")
    if name in ("lora", "ssf", "bitfit", "full", "linear"):
        handle.merge()
        torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-5)
    handle.detach()
    assert torch.equal(model(x), plain)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    fresh = VisionBase(family, make(family))
    with load_adapter(file).attached(fresh):
        torch.testing.assert_close(fresh.model(x), trained, rtol=1e-5, atol=1e-6)
    assert torch.equal(fresh.model(x), plain)


def _registered(name: str) -> str:
    return "vpt" if name.startswith("vpt") else name


@pytest.mark.parametrize(("family", "method"), sorted(NOT))
def test_prompts_without_one_list_of_tokens_are_refused_with_the_alternative(family: str, method: str):
    with pytest.raises(SiteError, match="Use adaptformer, adapter_plus, lora or ssf"):
        METHODS[method].on(make(family), ("a", "b"))


@pytest.mark.parametrize("method", ["vpt", "adaptformer", "adapter_plus"])
def test_models_without_transformer_blocks_are_refused_with_the_alternative(method: str):
    model = timm.create_model("resnet18", num_classes=3).eval().requires_grad_(False)
    with pytest.raises(SiteError, match="Use lora, ssf or bitfit"):
        METHODS[method].on(model, ("a", "b"))
    handle = LinearProbe().on(model, ("a", "b"))
    assert model(sample_input(model)).shape == (1, 2)
    handle.detach()


def test_a_projection_that_is_read_and_not_called_is_still_adapted():
    """BEiT reads `qkv.weight` past the module: LoRA on its output would be dead without an error."""
    model = make("beit")
    x = pictures(model)
    handle = VisionLoRA(rank=2, targets=("q", "v")).attach(model)
    plain = model(x)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.normal_(std=0.3)
    assert (model(x) - plain).abs().max() > 1e-3
    handle.detach()
    with pytest.raises(InputError, match="a weight has no input to drop"):
        VisionLoRA(rank=2, targets=("q", "v"), dropout=0.1).attach(model)


def test_what_cannot_be_scaled_is_told(caplog: pytest.LogCaptureFixture):
    VisionSSF().plan(make("beit"))
    assert "left out, since the model reads them without a call: blocks.0.attn.qkv" in caplog.text


def test_prompts_stay_out_of_the_rotation_of_eva():
    """Where RoPE is not told of the prompts it turns them and every patch behind them by the wrong angle."""
    model = make("dinov3")
    x, prefix = pictures(model), model.blocks[0].attn.num_prefix_tokens
    handle = VPT(3, dropout=0.0).attach(model)
    found = model(x)
    prompts = [p[0].expand(3, -1, -1) for p in handle.bank.parameters()]
    handle.detach()
    assert model.blocks[0].attn.num_prefix_tokens == prefix
    tokens, rope = model._pos_embed(model.patch_embed(x))
    tokens = model.norm_pre(tokens)
    for k, block in enumerate(model.blocks):
        # The prompts in front of everything: among tokens without a place, order says nothing.
        block.attn.num_prefix_tokens = prefix + 3
        tokens = block(torch.cat([prompts[k], tokens], 1), rope=rope)[:, 3:]
        block.attn.num_prefix_tokens = prefix
    torch.testing.assert_close(found, model.forward_head(model.norm(tokens)), rtol=1e-4, atol=1e-5)
    assert prefix == 5


def test_checkpointing_gives_the_same_gradients():
    for name in ("vpt", "adaptformer"):
        model = make("vit")
        handle = METHODS[name].attach(model)
        x = pictures(model)
        model.set_grad_checkpointing(False)
        plain = torch.autograd.grad(model(x).square().sum(), list(handle.bank.parameters()))
        model.train()
        model.set_grad_checkpointing(True)
        saved = torch.autograd.grad(model(x).square().sum(), list(handle.bank.parameters()))
        for a, b in zip(plain, saved, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        handle.detach()
