"""What goes wrong between programs, in files that are made by hand; docs/interchange.md lists it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.studio.adapter import load_adapter
from graft.studio.errors import FormatError
from graft.studio.formats.low_rank import LowRank, to_adapter

QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def test_alpha_stands_in_the_header_only_and_is_lost_with_it(tmp_path):
    """Rank 4 and alpha 8: scale 2 with diffusers' header, 1 without it, as diffusers itself reads both."""
    a, b = torch.randn(4, 6), torch.randn(5, 4)
    tensors = {f"{QUERY}.lora_A.weight": a, f"{QUERY}.lora_B.weight": b}
    told = {"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": ["to_q"]}
    for scale, header in ((2.0, {"lora_adapter_metadata": json.dumps(told)}), (1.0, {})):
        save_file(tensors, tmp_path / "theirs.safetensors", header)
        read = load_adapter(tmp_path / "theirs.safetensors")
        assert torch.equal(read.tensors[f"{QUERY}.A"], a)
        assert torch.equal(read.tensors[f"{QUERY}.B"], scale * b)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_ours_says_the_same_with_its_header_and_without(tmp_path, format):
    adapter = to_adapter({QUERY: LowRank("linear", torch.randn(4, 6), 2 * torch.randn(5, 4))}, "diffusion", "here")
    (file,) = adapter.export(tmp_path, format)
    tensors = load_file(file)
    if format == "kohya":  # and without its alphas: they equal the rank
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    save_file(tensors, tmp_path / "bare.safetensors")
    whole, bare = load_adapter(file), load_adapter(tmp_path / "bare.safetensors")
    for name, tensor in adapter.tensors.items():
        assert torch.equal(whole.tensors[name], tensor) and torch.equal(bare.tensors[name], tensor)


def test_tokens_of_an_ip_adapter_that_diffusers_refuses_are_refused(tmp_path):
    for tokens in (4, 8):
        rows = tokens * 16
        tensors = {"image_proj.proj.weight": torch.zeros(rows, 10), "image_proj.proj.bias": torch.zeros(rows),
                   "image_proj.norm.weight": torch.zeros(16), "image_proj.norm.bias": torch.zeros(16),
                   "ip_adapter.1.to_k_ip.weight": torch.zeros(8, 16)}  # fmt: skip
        save_file(tensors, tmp_path / f"{tokens}.safetensors")
    assert load_adapter(tmp_path / "4.safetensors").card.config["kind"] == "base"
    with pytest.raises(FormatError, match="8 tokens of a picture; diffusers, and this program, have 4"):
        load_adapter(tmp_path / "8.safetensors")


def test_layers_of_a_resampler_that_diffusers_leaves_out_are_refused(tmp_path):
    for layers in (2, 4, 6):
        tensors = {f"image_proj.layers.{i}.0.to_q.weight": torch.zeros(4, 4) for i in range(layers)}
        save_file({**tensors, "image_proj.latents": torch.zeros(1, 16, 4)}, tmp_path / f"{layers}.safetensors")
    assert load_adapter(tmp_path / "4.safetensors").card.config == {"kind": "plus", "queries": 16}
    for layers in (2, 6):
        with pytest.raises(FormatError, match=f"{layers} resampler layers; diffusers has 4"):
            load_adapter(tmp_path / f"{layers}.safetensors")
