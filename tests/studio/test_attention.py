from copy import deepcopy
from itertools import product

import peft
import pytest
import timm
import torch
from torch import nn

from graft.studio.methods.lora import LoRA
from graft.studio.sites import plan_blocks, plan_sites


def randomised(model, **settings):
    handle = LoRA(rank=2, **settings).attach(model.requires_grad_(False))
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    return handle


def masks(n, s):
    generator = torch.Generator().manual_seed(0)
    padding = torch.zeros(3, s, dtype=torch.bool)
    padding[1, -2:] = True
    causal = torch.ones(n, s).triu(1).bool()
    added = torch.randn(3 * 2, n, s, generator=generator)
    return {"none": {}, "padding": {"key_padding_mask": padding}, "causal": {"attn_mask": causal, "is_causal": True},
            "added": {"attn_mask": added}, "both": {"attn_mask": causal, "key_padding_mask": padding}}  # fmt: skip


@pytest.mark.parametrize(("first", "weights", "bias"), [*product((True, False), repeat=3)])
def test_attention_is_torchs_own_whatever_the_arguments(first, weights, bias):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, bias=bias, batch_first=first).eval()
    theirs = nn.MultiheadAttention(8, 2, bias=bias, batch_first=first).eval()
    theirs.load_state_dict(model.state_dict())
    LoRA(rank=2).attach(nn.ModuleDict({"attn": model}))
    x, other, third = (torch.randn(3, n, 8) for n in (4, 4, 4))
    for (q, k, v), mask in product(((x, x, x), (x, other, other), (x, other, third)), masks(4, 4).values()):
        sequences = [t if first else t.transpose(0, 1) for t in (q, k, v)]
        if q is k:  # the same object is one product
            sequences = sequences[:1] * 3
        for average in (True, False):
            settings = {"need_weights": weights, "average_attn_weights": average, **mask}
            ours, expected = model(*sequences, **settings), theirs(*sequences, **settings)
            torch.testing.assert_close(ours[0], expected[0])
            assert (ours[1] is None) is (expected[1] is None)
            if weights:
                torch.testing.assert_close(ours[1], expected[1])
    alone = torch.randn(4, 8)
    torch.testing.assert_close(model(alone, alone, alone)[0], theirs(alone, alone, alone)[0])


def test_all_four_projections_are_sites_and_merge_into_the_packed_weight():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}).eval()
    assert [(site.key, site.role) for site in plan_sites(model, "attention")] == [
        ("attn[0:8]", "q"), ("attn[8:16]", "k"), ("attn[16:24]", "v"), ("attn.out_proj", "o")
    ]  # fmt: skip
    x, keys = torch.randn(3, 4, 8), list(model.state_dict())
    base = model["attn"](x, x, x)[0]
    handle = randomised(model)
    handle.probe(lambda: model["attn"](x, x, x)[0])
    adapted = model["attn"](x, x, x)[0]
    assert not torch.allclose(adapted, base, atol=1e-2)
    assert list(model.state_dict()) == keys
    handle.merge()
    torch.testing.assert_close(model["attn"](x, x, x)[0], adapted)
    handle.detach()
    assert type(model["attn"]) is nn.MultiheadAttention
    assert torch.equal(model["attn"](x, x, x)[0], base)


def test_the_output_projection_is_changed_once_where_peft_changes_it_twice():
    """peft up to 0.21.2 adds the change of ``out_proj`` two times, and so gives half of its gradient."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    model = nn.ModuleDict({"attn": attention})
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    base, weight = attention(x, x, x)[0], attention.out_proj.weight.detach().clone()
    handle = randomised(model, targets="o")
    delta = handle._slots[0].delta(0)
    ours = attention(x, x, x)[0]
    handle.detach()
    mixed = torch.linalg.solve(weight, (base - attention.out_proj.bias).mT).mT  # what out_proj is given
    torch.testing.assert_close(ours, base + mixed @ delta.T.double())
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["attn"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    layer = theirs.base_model.model["attn"].base_layer.out_proj
    twice = 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    with torch.no_grad():
        theirs.base_model.model["attn"].lora_B["default"].weight.zero_()
    found = theirs.base_model.model["attn"](x, x, x)[0] - base
    torch.testing.assert_close(found, 2 * mixed @ twice.T)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("targets", ["attention", "mlp", "linear1", "self_attn"])
def test_torchs_fast_path_does_not_bypass_a_slot(targets, padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).requires_grad_(False)
    targets = ("linear1", "linear2") if targets == "mlp" else targets
    x = torch.randn(3, 4, 8)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2:] = True
    settings = {"src_key_padding_mask": mask} if padded else {}
    kept = ~mask if padded else torch.ones_like(mask)
    with torch.inference_mode():
        base = model.eval()(x, **settings)
        handle = randomised(model, targets=targets)
        adapted, trained = model.eval()(x, **settings)[kept], model.train()(x, **settings)[kept]
        torch.testing.assert_close(adapted, trained)
        assert not torch.allclose(adapted, base[kept], atol=1e-2)
        handle.detach()
        assert torch.equal(model.eval()(x, **settings), base)
    assert type(model) is nn.TransformerEncoder
    assert {type(each) for each in model.layers} == {nn.TransformerEncoderLayer}


def test_an_exception_in_the_model_leaves_nothing_behind():
    """peft leaves its hooks in place when a forward with mixed rows raises; the next call then uses them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    x = torch.randn(3, 8)
    handle = LoRA(rank=2, targets=("0", "1")).attach(model.requires_grad_(False), slots=2)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter)
    expected = model(x)
    handle.route(torch.tensor([1, 0, 1]))
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5))
    handle.route(None)
    assert torch.equal(model(x), expected)
    assert not any(module._forward_pre_hooks for module in model)


def test_an_exception_within_a_mixed_batch_changes_no_later_call():
    """In the middle of a model, where some sites were called and others not; in a call, a probe and a search."""
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **settings).requires_grad_(False).eval()
    x, base = torch.randn(3, 3, 16, 16), deepcopy(model.state_dict())
    plain = model(x)
    handle = LoRA(rank=2, targets="all-linear").attach(model, slots=2)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    handle.route(torch.tensor([1, -1, 0]))
    expected = model(x)
    fail = model.blocks[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    for call in (lambda: model(x), lambda: handle.probe(lambda: model(x)), lambda: handle.bypassed(lambda: model(x))):
        with pytest.raises(ZeroDivisionError):
            call()
    fail.remove()
    assert torch.equal(model(x), expected)
    assert handle.bank.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    handle.route(None)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 4, 16, 16))
    handle.detach()
    assert torch.equal(model(x), plain)
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


def test_a_bfloat16_attention_does_not_drift():
    """peft adds the change to the weight and takes it off again in each forward, which rounds a narrow base away."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, batch_first=True)}).bfloat16()
    base, x = deepcopy(model.state_dict()), torch.randn(3, 4, 16).bfloat16()
    handle = randomised(model)
    optimizer = torch.optim.AdamW(handle.bank.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model["attn"](x, x, x, need_weights=False)[0].float().square().mean().backward()
        optimizer.step()
        handle.merge()
        assert not torch.equal(model.state_dict()["attn.in_proj_weight"], base["attn.in_proj_weight"])
        handle.unmerge()
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    handle.detach()
    config = peft.LoraConfig(r=2, target_modules=["attn"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    for _ in range(20):
        theirs.base_model.model["attn"](x, x, x)
    drifted = theirs.state_dict()["base_model.model.attn.base_layer.in_proj_weight"]
    assert not torch.equal(drifted, base["attn.in_proj_weight"])


def test_open_clip_is_reached_whole():
    import open_clip

    torch.manual_seed(0)
    vision = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
    text = {"layers": 1, "width": 64, "heads": 2, "vocab_size": 50, "context_length": 8}
    model = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).eval()
    picture, words = torch.randn(2, 3, 32, 32), torch.randint(1, 50, (2, 8))
    handle = LoRA(rank=2, targets="all-linear").attach(model.requires_grad_(False))
    assert len(handle.plan) == 2 * 6
    handle.probe(lambda: torch.cat([model.encode_image(picture), model.encode_text(words)]))
    assert [site.key for site in plan_blocks(model)] == [
        "visual.transformer.resblocks.0.attn", "visual.transformer.resblocks.0.mlp",
        "transformer.resblocks.0.attn", "transformer.resblocks.0.mlp",
    ]  # fmt: skip
