"""Where an adapter comes from stands in the header of every file, and other libraries load it all the same."""

import json
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import nn

from graft.studio.adapter import Adapter, Card, load_adapter
from graft.studio.cli import main
from graft.studio.formats.files import read_tensors
from graft.studio.formats.low_rank import LowRank, to_adapter
from graft.studio.formats.provenance import header

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
MADE: dict[str, Any] = {
    "base": "pocket-sd",
    "base_hash": "ab12",
    "data_digest": "cd34",
    "trigger": "sks toy",
    "created": "2026-01-02T03:04:05+00:00",
    "metrics": {"loss": 0.25},
    "versions": {"graft": "0.1", "torch": "2"},
}


def adapter(name: str, **details) -> Adapter:
    made = to_adapter({name: LowRank("linear", torch.randn(2, 6), torch.randn(4, 2))}, "", "here")
    domain = "diffusion" if name.startswith("unet") else ""
    return replace(made, card=replace(made.card, domain=domain, details=details, **MADE))


@pytest.mark.parametrize(
    ("format", "name"),
    [("diffusers", UNET), ("kohya", UNET), ("peft", "fc"), ("loralib", "fc"), ("torchtune", "lm_head")],
)
def test_every_format_keeps_it_and_writes_the_same_bytes_again(tmp_path, format, name):
    ours = adapter(name, architecture="stable-diffusion-v1")
    files = ours.export(tmp_path / "a", format)
    again = ours.export(tmp_path / "b", format)
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in again]
    (file,) = (path for path in files if path.suffix == ".safetensors")
    entries = read_tensors(file)[1]
    assert entries["format"] == "pt"
    assert entries["modelspec.sai_model_spec"] == "1.0.0"
    assert entries["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert entries["modelspec.trigger_phrase"] == "sks toy"
    assert entries["modelspec.date"] == MADE["created"]
    assert entries["graft.base_hash"] == "ab12"
    assert json.loads(entries["graft.config"])["rank"] == 2
    read = load_adapter(tmp_path / "a")
    for field, value in MADE.items():
        assert getattr(read.card, field) == ("" if field == "base_hash" else value)  # it may be tried on another base
    assert header(read.card) == header(ours.card)
    if format != "torchtune":
        read.export(tmp_path / "c", format)
        assert header(load_adapter(tmp_path / "c").card) == header(ours.card)


def test_peft_loads_what_has_it(tmp_path):
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(6, 4))
    x = torch.randn(3, 6)
    ours = replace(adapter("fc"), card=replace(adapter("fc").card, base_hash=""))
    ours.export(tmp_path, "peft")
    with ours.attached(model):
        expected = model(x)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(model, tmp_path)(x), expected)


def test_our_own_file_has_what_others_show(tmp_path):
    ours = adapter(UNET)
    ours.save(tmp_path)
    entries = read_tensors(tmp_path / "adapter.safetensors")[1]
    assert entries["modelspec.title"] == "sks toy"
    assert "modelspec.architecture" not in entries
    assert load_adapter(tmp_path).card == ours.card


def test_inspect_shows_it(tmp_path, capsys):
    adapter(UNET).export(tmp_path, "kohya")
    assert main(["adapters", "inspect", str(tmp_path), "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert (card["base"], card["data_digest"], card["trigger"]) == ("pocket-sd", "cd34", "sks toy")
    assert card["details"]["provenance"]["graft.base_hash"] == "ab12"
    assert main(["adapters", "inspect", str(tmp_path)]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["modelspec.trigger_phrase", "sks toy"] in rows


def test_a_broken_entry_of_another_program_does_no_harm():
    from graft.studio.formats.provenance import restored

    empty = Adapter({}, Card("lora", {}))
    read = restored(empty, {"graft.metrics": "{", "modelspec.trigger_phrase": "dog", "ss_epoch": "3"})
    assert (read.card.metrics, read.card.trigger) == ({}, "dog")
    assert restored(empty, {"format": "pt"}) is empty
