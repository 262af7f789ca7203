"""`graft adapters verify` compares with stock diffusers; `extract` makes a LoRA of two folders."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from graft.diffusion.base import DiffusionBase, load_base, save_base
from graft.diffusion.controlnet import ControlNet
from graft.diffusion.custom_diffusion import CustomDiffusion
from graft.diffusion.ip_adapter import IPAdapter
from graft.diffusion.lora import DiffusionDoRA, DiffusionLoKr, DiffusionLoRA
from graft.diffusion.t2i_adapter import T2IAdapter
from graft.diffusion.textual_inversion import TextualInversion
from graft.diffusion.verification import compare
from graft.studio.adapter import Adapter, Card, base_hash, load_adapter
from graft.studio.cli import main
from graft.studio.config import to_dict
from graft.studio.errors import FormatError
from graft.studio.formats import map_networks
from graft.studio.formats.files import read_tensors


def trained(base: DiffusionBase, **settings) -> Adapter:
    method = DiffusionLoRA(**{"rank": 2, "alpha": 6, "targets": "attention", **settings})
    handle = method.attach(base.modules)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    handle.detach()
    sites = handle.plan.to_list()
    card = Card("lora", to_dict(method), "diffusion", base.name, base.hash, sites, trigger="sks")
    return Adapter(handle.tensors(), card)


@pytest.mark.slow
def test_a_lora_is_the_same_in_diffusers_and_one_of_another_strength_is_not(base: DiffusionBase, tmp_path: Path):
    adapter, before = trained(base), base_hash(base.modules)
    for format in ("diffusers", "kohya"):
        (file,) = adapter.export(tmp_path / format, format)
        for source in (file, tmp_path / format):
            told = compare(base, load_adapter(file), source)
            assert isinstance(told, dict) and told["same"] and told["error"] < 1e-4 and told["change"] > 0.01
            assert told["file"] == file.name
    tensors, header = read_tensors(file)
    save_file({k: 2 * t if k.endswith("up.weight") else t for k, t in tensors.items()}, tmp_path / "twice.safetensors")
    told = compare(base, adapter, tmp_path / "twice.safetensors")
    assert isinstance(told, dict) and not told["same"] and 0.1 < told["error"] < 10
    assert base_hash(base.modules) == before


def test_a_word_is_compared_by_its_file(base: DiffusionBase, xl: Path, tmp_path: Path):
    for pipeline in (base, load_base(str(xl), "cpu")):
        handle = TextualInversion(token="<cat>").attach(pipeline, seed=3)
        card = Card("textual_inversion", {"token": "<cat>", "vectors": 2}, "diffusion", trigger="<cat>")
        adapter = Adapter(handle.tensors(), card)
        handle.detach()
        known = len(pipeline.tokenizer)
        for format in ("diffusers", "kohya"):
            (file, *_) = adapter.export(tmp_path / f"{format}-{len(adapter.tensors)}", format)
            told = compare(pipeline, load_adapter(file.parent), file.parent if format == "diffusers" else file)
            assert isinstance(told, dict) and told["error"] == 0 and told["change"] > 0
        assert len(pipeline.tokenizer) == known
    other = compare(base, replace(adapter, card=replace(card, method="adalora")))
    assert other == "files of adalora are not loaded into stock diffusers here"


def test_the_command_tells_and_exits_by_it(base: DiffusionBase, folder: Path, tmp_path: Path, capsys):
    adapter = trained(base)
    adapter.save(tmp_path / "native")
    assert main(["adapters", "verify", str(tmp_path / "native"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["detaches"] and document["compared"]["file"] == "pytorch_lora_weights.safetensors"
    assert document["compared"]["same"] and document["compared"]["error"] < 1e-4
    # An alpha of its own in one of kohya's modules: diffusers drops it, so the file is another thing there.
    (file,) = adapter.export(tmp_path / "kohya", "kohya")
    tensors = load_file(file)
    tensors["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v.alpha"] *= 20
    save_file(tensors, file)
    assert main(["adapters", "verify", str(file), "--base", str(folder)]) == 1
    assert "diffusers makes NOT the same of kohya.safetensors: error " in capsys.readouterr().out


@pytest.mark.slow
def test_a_lora_is_extracted_from_two_folders(base: DiffusionBase, folder: Path, tmp_path: Path, capsys):
    adapter = trained(base)
    with adapter.attached(base) as handle:
        handle.merge()
        save_base(base, tmp_path / "tuned")
    run = ["adapters", "extract", str(tmp_path / "tuned"), str(folder)]
    assert main([*run, str(tmp_path / "out"), "--rank", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["error"] < 1e-5
    assert {row["module"] for row in document["modules"]} == {site["name"] for site in adapter.card.sites}
    made, tuned = load_adapter(tmp_path / "out"), StableDiffusionPipeline.from_pretrained(tmp_path / "tuned")
    made.export(tmp_path / "theirs", "diffusers")
    stock = StableDiffusionPipeline.from_pretrained(folder)
    stock.load_lora_weights(tmp_path / "theirs")
    x, text = torch.randn(1, 4, 4, 4), torch.randn(1, 24, 16)
    with torch.no_grad(), made.attached(base):
        expected = tuned.unet(x, 3, text).sample
        torch.testing.assert_close(base.pipe.unet(x, 3, text).sample, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stock.unet(x, 3, text).sample, expected, rtol=1e-4, atol=1e-5)
    assert main([*run, str(tmp_path / "less"), "--rank", "1"]) == 0
    assert "% of the change is left out; written to" in capsys.readouterr().out
    assert main([*run[:3], str(tmp_path / "tuned"), str(tmp_path / "none"), "--rank", "1"]) == 2
    assert "their weights are the same" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dora_of_kohya_is_told_to_be_another_thing_in_diffusers(base: DiffusionBase, tmp_path: Path):
    """diffusers drops `dora_scale`; in its own file the same DoRA is the same."""
    method = DiffusionDoRA(rank=2, targets="attention")
    handle = method.attach(base.modules)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    handle.detach()
    card = Card("dora", to_dict(method), "diffusion", base.name, base.hash, handle.plan.to_list(), trigger="sks")
    adapter = Adapter(handle.tensors(), card)
    (file,) = adapter.export(tmp_path, "kohya")
    dropped, own = compare(base, load_adapter(file), file), compare(base, adapter)
    assert isinstance(dropped, dict) and not dropped["same"] and dropped["error"] > 0.1
    assert isinstance(own, dict) and own["same"]


@pytest.mark.slow
def test_a_lokr_is_compared_through_the_denoiser(base: DiffusionBase, tmp_path: Path):
    method, before = DiffusionLoKr(rank=1, alpha=3.0, factor=4), base_hash(base.modules)
    handle = method.attach(base.modules)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    handle.detach()
    card = Card("lokr", to_dict(method), "diffusion", base.name, base.hash, handle.plan.to_list(), trigger="sks")
    (file,) = Adapter(handle.tensors(), card).export(tmp_path, "kohya")
    told = compare(base, load_adapter(file), file)
    assert isinstance(told, dict) and told["same"] and told["error"] < 1e-4 and told["change"] > 0.01
    assert base_hash(base.modules) == before


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_files_of_diffusers_and_kohya_are_resized(base: DiffusionBase, tmp_path: Path, format: str, capsys):
    (file,) = trained(base, rank=3).export(tmp_path / "in", format)
    assert main(["adapters", "resize", str(file), str(tmp_path / "out"), "--rank", "1", "--to", format, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["files"] == [str(tmp_path / "out" / file.name)]
    told = compare(base, load_adapter(tmp_path / "out"), tmp_path / "out")
    assert isinstance(told, dict) and told["same"]
    whole, less = load_adapter(file), load_adapter(tmp_path / "out")
    lost = size = 0.0
    for site in whole.card.sites:
        change = whole.tensors[f"{site['name']}.B"] @ whole.tensors[f"{site['name']}.A"]
        lost += float((change - less.tensors[f"{site['name']}.B"] @ less.tensors[f"{site['name']}.A"]).square().sum())
        size += float(change.square().sum())
    assert document["error"] == pytest.approx((lost / size) ** 0.5, rel=1e-3)


def random_network(method, base: DiffusionBase, **settings) -> Adapter:
    """An untrained network's adapter, with values of chance wherever it starts at zero."""
    handle = method(**settings).attach(base)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    handle.detach()
    name = {"ControlNet": "controlnet", "T2IAdapter": "t2i_adapter"}[method.__name__]
    return Adapter(handle.tensors(), Card(name, settings, "diffusion", base.name, base.hash, details=handle.details))


@pytest.mark.parametrize("method", [ControlNet, T2IAdapter])
@pytest.mark.parametrize("strength", [1.0, pytest.param(0.6, marks=pytest.mark.slow)])
def test_networks_beside_the_denoiser_are_the_same_in_diffusers(
    base: DiffusionBase, tmp_path: Path, method, strength: float
):
    """Also with another strength than 1, which is in the tensors that are written."""
    before = base_hash(base.modules)
    adapter = random_network(method, base, condition="depth", scale=strength)
    adapter.export(tmp_path / "out", "diffusers")
    read = load_adapter(tmp_path / "out")
    assert (read.card.method, read.card.config["condition"]) == (adapter.card.method, "depth")
    for each, source in ((adapter, None), (read, tmp_path / "out"), (read, tmp_path / "out" / map_networks.FILE)):
        told = compare(base, each, source)
        assert isinstance(told, dict) and told["same"] and told["error"] < 1e-4 and told["change"] > 1e-3
        assert told["file"] == map_networks.FILE
    tensors, _ = read_tensors(tmp_path / "out" / map_networks.FILE)
    save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, tmp_path / "out" / map_networks.FILE)
    told = compare(base, adapter, tmp_path / "out")
    assert isinstance(told, dict) and not told["same"]
    assert base_hash(base.modules) == before


@pytest.mark.slow
def test_networks_of_xl_are_the_same_in_diffusers(xl: Path):
    base = load_base(str(xl), "cpu")
    for method in (ControlNet, T2IAdapter):
        told = compare(base, random_network(method, base, condition="canny"))
        assert isinstance(told, dict) and told["same"] and told["change"] > 1e-3


def test_networks_that_diffusers_saved_are_read_for_their_base_only(base: DiffusionBase, tmp_path: Path):
    torch.manual_seed(4)
    ControlNetModel.from_unet(base.pipe.unet, conditioning_embedding_out_channels=(16, 32)).save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.card.method == "controlnet" and adapter.card.config == {"condition": "map"}
    with adapter.attached(base) as handle:
        assert handle.method.condition == "map"
    other = UNet2DConditionModel(
        sample_size=4, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, attention_head_dim=8,
    )  # fmt: skip
    ControlNetModel.from_unet(other, conditioning_embedding_out_channels=(16, 32)).save_pretrained(tmp_path / "other")
    with (
        pytest.raises(FormatError, match=r"its block_out_channels is \[8, 8\]"),
        load_adapter(tmp_path / "other").attached(base),
    ):
        pass
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="no config of ControlNetModel or T2IAdapter stands beside"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("kind", ["base", pytest.param("plus", marks=pytest.mark.slow)])
def test_an_ip_adapter_is_compared_on_what_it_is_shown(base: DiffusionBase, tmp_path: Path, kind: Any):
    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=10,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "encoder")
    CLIPImageProcessor(size=16, crop_size=16, image_mean=[0.1] * 3, image_std=[0.9] * 3).save_pretrained(
        tmp_path / "encoder"
    )
    before, method = base_hash(base.modules), IPAdapter(kind=kind, image_encoder=str(tmp_path / "encoder"), queries=5)
    handle = method.attach(base)
    details = handle.details
    tensors = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in handle.tensors().items()}
    handle.detach()
    processors = {name: type(each) for name, each in base.pipe.unet.attn_processors.items()}
    adapter = Adapter(tensors, Card("ip_adapter", to_dict(method), "diffusion", base.name, base.hash, details=details))
    adapter.export(tmp_path / "out", "diffusers")
    for each, source in ((adapter, None), (load_adapter(tmp_path / "out"), tmp_path / "out")):
        told = compare(base, each, source)
        assert isinstance(told, dict) and told["same"] and told["error"] < 1e-3 and told["change"] > 1e-3
    assert processors == {name: type(each) for name, each in base.pipe.unet.attn_processors.items()}
    assert base_hash(base.modules) == before


@pytest.mark.parametrize("tokens", ["<new1>", pytest.param(("<new1>", "<new2>"), marks=pytest.mark.slow)])
def test_custom_diffusion_is_compared_by_its_whole_weights_and_words(base: DiffusionBase, tokens):
    before, method = base_hash(base.modules), CustomDiffusion(token=tokens)
    handle = method.attach(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    sites, tensors = handle.plan.to_list(), handle.tensors()
    handle.detach()
    card = Card("custom_diffusion", to_dict(method), "diffusion", base.name, base.hash, sites, trigger=method.trigger)
    told = compare(base, Adapter(tensors, card))
    assert isinstance(told, dict) and told["same"] and told["error"] < 1e-4 and told["change"] > 1e-3
    assert told["file"].startswith("custom_diffusion_unet.safetensors, <new1>.safetensors")
    assert base_hash(base.modules) == before
