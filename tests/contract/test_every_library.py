"""Every method, with its own targets, on a model of each library."""

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

from graft.studio.errors import SiteError
from graft.studio.methods.lora import LoRA
from graft.studio.registry import SITE_METHODS, site_method

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
IDS = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(0))
PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def timm_vit() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    settings = {"img_size": 32, "depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **settings), lambda model: model(PICTURES)


def open_clip_vit() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    vision = {"layers": 2, "width": 64, "patch_size": 16, "image_size": 32}
    text = {"layers": 1, "width": 64, "heads": 2, "vocab_size": 50, "context_length": 8}
    model = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)
    words = torch.randint(1, 50, (2, 8))
    return model, lambda model: torch.cat([model.encode_image(PICTURES), model.encode_text(words)])


def unet() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    x, words = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    return model, lambda model: model(x, torch.tensor([3, 4]), words).sample


def llama() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    return LlamaForCausalLM(LlamaConfig(**SIZE)), lambda model: model(IDS).logits


def clip_text() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    return CLIPTextModel(CLIPTextConfig(**SIZE)), lambda model: model(IDS).last_hidden_state


MODELS = [timm_vit, open_clip_vit, unet, llama, clip_text]
# What a model does not have; everything else must work.
NOWHERE = {
    ("bitfit", "llama"): "none of these layers has a bias",
    **{("ladder_side_tuning", model): "no sequence" for model in ("timm_vit", "open_clip_vit", "unet", "clip_text")},
}


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", SITE_METHODS)
def test_it_acts_at_every_site_and_leaves_no_trace(name, make):
    torch.manual_seed(0)
    model, run = make()
    model.requires_grad_(False).eval()
    if message := NOWHERE.get((name, make.__name__)):
        with pytest.raises(SiteError, match=message):
            site_method(name)().attach(model)
        return
    whole: Any = {"unet": model} if (name, make) == ("prompt_tuning", unet) else model  # no site is the model itself
    before, classes = run(model), {key: type(module) for key, module in model.named_modules()}
    keys = list(model.state_dict())
    method = site_method(name)()
    if name == "fish_mask":
        handle = method.attach(model, places=method.choose(model, (run(model).square().mean() for _ in range(2))))
    else:
        handle = method.attach(whole)
    assert str(handle.plan).endswith(f"{handle.plan.parameters:,}")
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    handle.probe(lambda: run(model))
    assert not torch.allclose(run(model), before)
    assert list(model.state_dict()) == keys
    handle.detach()
    assert torch.equal(run(model), before)
    assert {key: type(module) for key, module in model.named_modules()} == classes


def test_projections_that_diffusers_replaces_are_found_dead_and_those_instead_of_them_alive():
    """After `fuse_qkv_projections` the old layers are still there, and nobody calls them."""
    torch.manual_seed(0)
    model: Any
    model, run = unet()
    model.requires_grad_(False).eval()
    handle = LoRA(rank=2, targets="attn1.to_q").attach(model)
    handle.probe(lambda: run(model))
    model.fuse_qkv_projections()
    with pytest.raises(SiteError, match=r"attn1\.to_q: .* sites get no gradient"):
        handle.probe(lambda: run(model))
    handle.detach()
    LoRA(rank=2, targets=("attn1.to_qkv", "attn2.to_kv")).attach(model).probe(lambda: run(model))
