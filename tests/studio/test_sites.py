import json

import pytest
import timm
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from graft.studio.errors import SiteError
from graft.studio.sites import Plan, Site, plan_sites

CLIP_SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=16, num_heads=2, num_classes=3)


def unet():
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def text_encoder():
    return CLIPTextModel(CLIPTextConfig(vocab_size=50, **CLIP_SIZE))


def found(plan):
    return {(site.key, site.role) for site in plan}


def test_timm_packed_projection_is_three_sites():
    plan = plan_sites(vit(), ("q", "v"))
    assert found(plan) == {("blocks.0.attn.qkv[0:16]", "q"), ("blocks.0.attn.qkv[32:48]", "v")}
    assert {(site.kind, site.tower, site.covered) for site in plan} == {("packed", "vision", (16, 16))}


def test_roles_mean_the_same_in_every_library():
    llama = LlamaModel(LlamaConfig(vocab_size=50, **CLIP_SIZE))
    assert {site.name for site in plan_sites(llama, "mlp")} == {
        f"layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert {site.tower for site in plan_sites(llama, "mlp")} == {"language"}
    for model, roles in ((vit(), 4), (llama, 4), (text_encoder(), 4)):
        assert [site.role for site in plan_sites(model, "attention")].count("q") == 1
        assert len({site.role for site in plan_sites(model, "attention")}) == roles
    attention = plan_sites(unet(), "attention")
    assert {site.name.partition("transformer_blocks.0.")[2] for site in attention} == {
        f"attn{n}.{end}" for n in (1, 2) for end in ("to_q", "to_k", "to_v", "to_out.0")
    }


def test_towers_of_clip_in_both_libraries():
    ours = CLIPModel(
        CLIPConfig(text_config={**CLIP_SIZE, "vocab_size": 50}, vision_config={**CLIP_SIZE, "image_size": 32})
    )
    assert {site.name.partition(".")[0] for site in plan_sites(ours, "q", towers=("text",))} == {"text_model"}
    import open_clip

    vision, text = (
        {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32},
        {"layers": 1, "width": 64, "heads": 2},
    )
    theirs = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg={**text, "vocab_size": 50})
    assert found(plan_sites(theirs, "mlp", towers=("text",))) == {
        ("transformer.resblocks.0.mlp.c_fc", "up"),
        ("transformer.resblocks.0.mlp.c_proj", "down"),
    }
    assert {site.name.partition(".")[0] for site in plan_sites(theirs, "mlp", towers=("vision",))} == {"visual"}


def test_components_of_a_pipeline_begin_the_names():
    plan = plan_sites({"unet": unet(), "text_encoder": text_encoder()}, "q", towers=("text",))
    assert [site.tower for site in plan] == ["text"]
    assert next(iter(plan)).name.startswith("text_encoder.")
    assert next(iter(plan)).name.endswith("layers.0.self_attn.q_proj")


def test_all_linear_leaves_the_head_out_and_all_adds_convolutions():
    linear = {site.name for site in plan_sites(vit(), "all-linear")}
    assert linear == {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"}
    assert {site.name for site in plan_sites(vit(), "all")} - linear == {"patch_embed.proj"}
    assert [site.name for site in plan_sites(vit(), "head")] == ["head"]
    assert {site.kind for site in plan_sites(unet(), "all", kinds=("conv",))} == {"conv"}


def test_paths_match_whole_or_from_a_dot():
    assert [site.name for site in plan_sites(vit(), "attn.proj")] == ["blocks.0.attn.proj"]
    assert [site.name for site in plan_sites(vit(), r"blocks\.\d+\.mlp\.fc[12]")] == [
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
    ]


def test_plan_prints_hashes_and_survives_json():
    plan = plan_sites(vit(), "attention")
    text = str(plan)
    assert "blocks.0.attn.qkv[0:16]" in text
    assert text.splitlines()[-1].split() == ["4", "sites", "1,024"]
    again = Plan.from_list(json.loads(json.dumps(plan.to_list())))
    assert again == plan
    assert again.hash == plan.hash != plan_sites(vit(), "mlp").hash


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("atention", "attention"),
        ("attn.qvk", "qkv"),
        ("blocks.0.norm1", "LayerNorm"),
        ("attn.(", "regular expression"),
        (("attn.qkv", "q"), "as a whole and by rows"),
    ],
)
def test_a_target_that_names_nothing_is_refused_with_the_nearest(targets, message):
    with pytest.raises(SiteError, match=message):
        plan_sites(vit(), targets)


def test_filters_that_leave_nothing_say_what_there_is():
    with pytest.raises(SiteError, match="use vision"):
        plan_sites(vit(), "attention", towers=("text",))


def test_grouped_convolutions_are_no_sites():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1))
    assert [site.name for site in plan_sites(model, "all")] == ["1"]
    assert plan_sites(model, "all").parameters == 32


def test_a_site_is_plain_data():
    site = Site("a.qkv", "packed", (12, 4), (4, 8))
    assert (site.key, site.covered) == ("a.qkv[4:8]", (4, 4))
    assert torch.Size(site.covered).numel() == 16
