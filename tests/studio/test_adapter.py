import json
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

import graft
from graft.studio.adapter import Adapter, Card, base_hash, load_adapter
from graft.studio.config import to_dict
from graft.studio.errors import BaseMismatchError, DiskFullError, FormatError, InputError, SiteError
from graft.studio.methods.lora import LoRA


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).requires_grad_(False)


@pytest.fixture
def adapter():
    base, method = model(), LoRA(rank=2, targets=("0", "2"))
    handle = method.attach(base)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter)
    handle.detach()
    card = Card("lora", to_dict(method), base="toy", base_hash=base_hash({"": base}), sites=handle.plan.to_list())
    return Adapter(handle.tensors(), replace(card, trigger="sks", metrics={"loss": 0.5}))


def test_a_saved_adapter_is_read_back_as_it_was(adapter, tmp_path):
    again = graft.load_adapter(adapter.save(tmp_path / "deep" / "result"))
    assert again.card == adapter.card
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in adapter.tensors.items())
    assert {path.name for path in (tmp_path / "deep" / "result").iterdir()} == {"adapter.safetensors", "adapter.json"}
    assert json.loads((tmp_path / "deep" / "result" / "adapter.json").read_text())["trigger"] == "sks"


def test_the_file_alone_is_an_adapter(adapter, tmp_path):
    adapter.save(tmp_path)
    alone = (tmp_path / "adapter.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / "adapter.json").unlink()
    assert load_adapter(alone).card == adapter.card


def test_attached_changes_the_base_and_leaves_it_as_it_was(adapter):
    base, x = model(), torch.randn(5, 4)
    before, digest = base(x), base_hash({"": base})
    with adapter.attached(base) as handle:
        assert not torch.equal(base(x), before)
        assert not any(parameter.requires_grad for parameter in handle.bank.parameters())
    assert torch.equal(base(x), before)
    assert base_hash({"": base}) == digest


def test_an_error_inside_detaches_too(adapter):
    base, x = model(), torch.randn(5, 4)
    before = base(x)
    with pytest.raises(ZeroDivisionError), adapter.attached(base):
        _ = 1 / 0
    assert torch.equal(base(x), before)


def test_another_base_is_refused_with_both_hashes(adapter):
    other = model(seed=1)
    with pytest.raises(BaseMismatchError) as error, adapter.attached(other):
        pass
    assert adapter.card.base_hash in str(error.value)
    assert base_hash({"": other}) in str(error.value)


def test_the_hash_sees_names_types_shapes_and_every_bit():
    base = {"a": nn.Linear(2, 3)}
    digest = base_hash(base)
    assert base_hash({"a": base["a"]}) == digest
    assert base_hash({"b": base["a"]}) != digest
    with torch.no_grad():
        base["a"].bias[0] = torch.nextafter(base["a"].bias[0], torch.tensor(9.0))
    assert base_hash(base) != digest
    assert base_hash({"a": nn.Linear(2, 3).bfloat16()}) != base_hash({"a": nn.Linear(2, 3)})


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(adapter, tmp_path, keep):
    file = adapter.save(tmp_path) / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        load_adapter(tmp_path)


def test_other_things_are_refused(adapter, tmp_path):
    with pytest.raises(FormatError, match="there is no adapter here.*adapter.safetensors"):
        load_adapter(tmp_path)
    torch.save({}, tmp_path / "weights.bin")
    for path in (tmp_path / "weights.bin", tmp_path):
        with pytest.raises(FormatError, match=r"weights.bin: a pickle.*weights_only=True.*save_file"):
            load_adapter(path)
    (tmp_path / "weights.bin").rename(tmp_path / "weights.safetensors")
    with pytest.raises(FormatError, match="pickle files .* are never opened"):
        load_adapter(tmp_path / "weights.safetensors")
    with pytest.raises(FormatError, match="no such file"):
        Adapter.load(tmp_path / "nothing")
    adapter.save(tmp_path / "a")
    Adapter(adapter.tensors, replace(adapter.card, trigger="other")).save(tmp_path / "b")
    (tmp_path / "b" / "adapter.json").replace(tmp_path / "a" / "adapter.json")
    with pytest.raises(FormatError, match="not the card of adapter.safetensors"):
        load_adapter(tmp_path / "a")


def test_a_card_of_another_kind_or_time_is_refused(adapter):
    with pytest.raises(FormatError, match="not JSON"):
        Card.from_json("{", "x")
    with pytest.raises(FormatError, match="not the card"):
        Card.from_json('{"method": "lora"}', "x")
    with pytest.raises(FormatError, match="not the card.*format_version"):
        Card.from_json(replace(adapter.card, format_version="x").to_json(), "x")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="format 99, this version reads 1"):
        Card.from_json(replace(adapter.card, format_version=99).to_json(), "x")


def test_a_full_disk_leaves_the_old_file(adapter, tmp_path, monkeypatch):
    adapter.save(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="Free some space"):
        Adapter(adapter.tensors, replace(adapter.card, trigger="other")).save(tmp_path)
    assert load_adapter(tmp_path).card == adapter.card
    assert len(list(tmp_path.iterdir())) == 2


def test_unknown_methods_and_formats_say_what_there_is(adapter, tmp_path):
    with pytest.raises(InputError, match="onnx.*native, peft, diffusers"):
        adapter.export(tmp_path, "onnx")
    stranger = Adapter(adapter.tensors, replace(adapter.card, domain="diffusion", method="lara"))
    with pytest.raises(InputError, match="'lora'"), stranger.attached(model()):
        pass
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_do_not_fit_leave_the_base_alone(adapter):
    base = model()
    fewer = Adapter({name: t for name, t in adapter.tensors.items() if name != "2.B"}, adapter.card)
    with pytest.raises(FormatError, match="2.B: missing"), fewer.attached(base):
        pass
    assert [type(module) for module in base] == [nn.Linear, nn.ReLU, nn.Linear]


def test_detaching_inside_is_no_error(adapter):
    base, x = model(), torch.randn(5, 4)
    before = base(x)
    with adapter.attached(base) as handle:
        handle.detach()
    assert torch.equal(base(x), before)


def test_a_foreign_adapter_is_tried_on_a_base_that_can_be(adapter):
    """A file of another library: nobody has ever seen it act on this base."""

    class Base:
        name, domain, hash = "toy", "", "unknown"

        def __init__(self, net, run):
            self.modules, self.exercise = {"net": net}, run

    def moved(card):
        return {name: f"net.{value}" if name == "name" else value for name, value in card.items()}

    sites = [moved(site) for site in adapter.card.sites]
    tensors = {f"net.{name}": tensor for name, tensor in adapter.tensors.items()}
    foreign = Adapter(tensors, replace(adapter.card, base_hash="", sites=sites))
    net, x = model(), torch.randn(5, 4)
    with foreign.attached(Base(net, lambda: net(x))):
        pass
    with (
        pytest.raises(SiteError, match=r"net\.2: .*never called"),
        foreign.attached(Base(net, lambda: nn.functional.linear(net[1](net[0](x)), net[2].weight))),
    ):
        pass
    assert type(net[2]) is nn.Linear
