"""Multimodal bases by name and by folder, with an adapter of the core on them."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import graft
from graft.llm_mm import MultimodalBase
from graft.studio.errors import InputError
from graft.studio.methods.lora import LoRA
from graft.studio.pocket import models
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.scenes import centred, render
from graft.studio.registry import domain_of_base


@pytest.fixture(scope="module")
def base() -> MultimodalBase:
    found = graft.load_base("pocket-llava", device="cpu")
    assert isinstance(found, MultimodalBase)
    return found


def test_it_answers_by_name(base: MultimodalBase):
    known = Atlas.load().known[:3]
    shown = [Image.fromarray(render(centred(sprite, "blue"))) for sprite in known]
    assert base.answer(shown, ["what is the background colour ?"] * 3) == ["blue"] * 3
    names = [Atlas.load().names[sprite] for sprite in known]
    assert sum(a == b for a, b in zip(base.answer(shown, ["what is this ?"] * 3), names, strict=True)) >= 2


def test_a_folder_is_the_same_base(base: MultimodalBase, tmp_path: Path):
    folder = models.export("pocket-llava", tmp_path / "llava")
    assert domain_of_base(str(folder)) == "llm_mm"
    assert graft.load_base(str(folder), device="cpu").hash == base.hash


def test_lora_attaches_and_leaves_no_trace(base: MultimodalBase):
    picture = Image.fromarray(render(centred(Atlas.load().known[0], "red")))
    before, weights = base.answer([picture], ["what is this ?"]), base.hash
    handle = LoRA(rank=2, targets=("q_proj", "v_proj")).attach(base.model)
    assert handle.bypassed(base.exercise) == []
    assert base.answer([picture], ["what is this ?"]) == before
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    changed = base.answer([picture], ["what is this ?"])
    handle.detach()
    assert changed != before
    assert base.answer([picture], ["what is this ?"]) == before
    assert MultimodalBase("again", base.model, base.processor).hash == weights


def test_what_is_no_multimodal_model_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="nowhere: there is no such folder here.*Give pocket-llava, a folder"):
        graft.load_base("nowhere", domain="llm_mm")
    folder = models.export("pocket-clip", tmp_path / "clip")
    with pytest.raises(InputError, match="cannot be loaded"):
        graft.load_base(str(folder), domain="llm_mm")


@torch.no_grad()
def test_attention_is_torchs_whether_asked_for_or_not(base: MultimodalBase):
    asked = graft.load_base("pocket-llava", device="cpu", attention="sdpa")
    assert asked.model.config._attn_implementation == "sdpa"
    picture = Image.fromarray(render(centred(Atlas.load().known[0], "red")))
    assert asked.answer([picture], ["what is this ?"]) == base.answer([picture], ["what is this ?"])
    with pytest.raises(InputError, match="models of transformers .* no place for xformers"):
        graft.load_base("pocket-llava", device="cpu", attention="xformers")
