"""`graft adapters verify` compares with stock diffusers; `extract` makes a LoRA of two folders."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from graft.diffusion.base import DiffusionBase, load_base, save_base
from graft.diffusion.lora import DiffusionDoRA, DiffusionLoKr, DiffusionLoRA
from graft.diffusion.textual_inversion import TextualInversion
from graft.diffusion.verification import compare
from graft.studio.adapter import Adapter, Card, base_hash, load_adapter
from graft.studio.cli import main
from graft.studio.config import to_dict
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
    other = compare(base, replace(adapter, card=replace(card, method="controlnet")))
    assert other == "files of controlnet are not loaded into stock diffusers here"


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
