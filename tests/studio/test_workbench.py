"""Resizing, adding up and extracting against dense matrices and outputs."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from graft.studio.adapter import Adapter, Card, base_hash, load_adapter
from graft.studio.cli import main
from graft.studio.config import to_dict
from graft.studio.errors import BaseMismatchError, InputError
from graft.studio.formats.low_rank import LowRank, to_adapter
from graft.studio.methods.adalora import AdaLoRA
from graft.studio.methods.dora import DoRA
from graft.studio.methods.gated_lora import GatedLoRA
from graft.studio.methods.lora import LoRA
from graft.studio.workbench import Cut, add, extract, plain, resize


class Net(nn.Module):
    """A layer of each kind, and one with packed rows."""

    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(11, 8), nn.Conv1d(8, 6, 3, padding=1)
        self.qkv, self.norm = nn.Linear(6, 12), nn.LayerNorm(12)

    def forward(self, ids):
        return self.norm(self.qkv(self.conv(self.table(ids).mT).mT))


IDS = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(0))
TARGETS = ("embedding", "conv", "q", "v")
MODULE = {"table": "table", "conv": "conv"}


def net(seed=0):
    torch.manual_seed(seed)
    return Net().requires_grad_(False)


def trained(method, seed=1, model=None):
    model = model or net()
    handle = method.attach(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    handle.detach()
    name = type(method).__name__.lower()
    card = Card(name, to_dict(method), base="toy", base_hash=base_hash({"": model}), sites=handle.plan.to_list())
    return Adapter(handle.tensors(), card)


def changes(adapter):
    """Merged weights less those of the base, by module."""
    model, base = net(), net()
    with adapter.attached(model) as handle:
        handle.merge()
        return {name: (model.get_submodule(name).weight - base.get_submodule(name).weight).flatten(1)
                for name in ("table", "conv", "qkv")}  # fmt: skip


def output(adapter):
    model = net()
    with adapter.attached(model):
        return model(IDS)


@pytest.mark.parametrize("method", [LoRA(rank=4, alpha=7, targets=TARGETS), LoRA(rank=4, rslora=True, targets=TARGETS)])
def test_a_smaller_rank_is_the_best_one_and_tells_its_error(method):
    adapter = trained(method)
    before, done = changes(adapter), resize(adapter, Cut(rank=2))
    after = changes(done.adapter)
    square = whole = 0.0
    for loss in done.losses:
        name, _, rows = loss.module.partition("[")
        part = slice(*map(int, rows.rstrip("]").split(":"))) if rows else slice(None)
        change = before[name][part]
        tail = torch.linalg.svdvals(change)[2:].norm()
        assert (loss.rank, loss.lost) == (2, pytest.approx(float(tail), rel=1e-4))
        assert float((change - after[name][part]).norm()) == pytest.approx(float(tail), rel=1e-4)
        assert loss.error == pytest.approx(float(tail / change.norm()), rel=1e-4)
        square, whole = square + loss.lost**2, whole + loss.size**2
    assert 0.05 < done.error == pytest.approx((square / whole) ** 0.5)
    assert done.adapter.card.config["rank"] == done.adapter.card.config["alpha"] == 2


def test_all_of_the_rank_changes_nothing():
    adapter = trained(LoRA(rank=3, alpha=7, targets=TARGETS))
    for cut in (Cut(rank=3), Cut(rank=99), Cut(keep=1.0)):
        done = resize(adapter, cut)
        assert done.error < 1e-6
        torch.testing.assert_close(output(done.adapter), output(adapter), rtol=1e-4, atol=1e-5)


def test_a_share_of_the_energy_takes_the_smallest_rank_that_has_it():
    adapter = trained(LoRA(rank=5, targets=("conv", "q")))
    done = resize(adapter, Cut(keep=0.8))
    for loss in done.losses:
        name, _, rows = loss.module.partition("[")
        change = changes(adapter)[name][slice(*map(int, rows.rstrip("]").split(":"))) if rows else slice(None)]
        energy = torch.linalg.svdvals(change).square()
        assert energy[: loss.rank].sum() >= 0.8 * energy.sum() > energy[: loss.rank - 1].sum()
        assert loss.error**2 == pytest.approx(float(1 - energy[: loss.rank].sum() / energy.sum()), abs=1e-5)
    assert max(loss.rank for loss in resize(adapter, Cut(2, 0.99)).losses) == 2


def test_what_is_a_lora_in_the_end_is_resized_too_and_a_dora_keeps_its_lengths():
    ada = trained(AdaLoRA(rank=4, target_rank=4, targets="q"))
    done = resize(ada, Cut(rank=4))
    assert done.adapter.card.method == "lora"
    torch.testing.assert_close(output(done.adapter), output(ada), rtol=1e-4, atol=1e-5)
    dora = trained(DoRA(rank=4, targets=("q", "conv")))
    done = resize(dora, Cut(rank=4, keep=1.0))
    assert done.adapter.card.method == "dora"
    torch.testing.assert_close(output(done.adapter), output(dora), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="no LoRA in the end"):
        plain(trained(GatedLoRA(rank=2, targets="q")).__class__({}, Card("gated_lora", {"rank": 2, "alpha": 2.0})))
    with pytest.raises(InputError, match="no low-rank factors"):
        plain(Adapter({}, Card("ia3", {})))


def test_a_weighted_sum_is_the_sum_of_the_changes():
    a = trained(LoRA(rank=2, alpha=5, targets=("conv", "q", "embedding")), seed=1)
    b = trained(LoRA(rank=3, alpha=2, targets=("conv", "v", "embedding")), seed=2)
    a, b = replace(a, card=replace(a.card, trigger="cat")), replace(b, card=replace(b.card, trigger="dog"))
    done = add([a, b], [0.7, -0.4])
    assert done.error < 1e-6
    assert (done.adapter.card.config["rank"], done.adapter.card.trigger) == (5, "cat and dog")
    found, first, second = changes(done.adapter), changes(a), changes(b)
    for name, change in found.items():
        torch.testing.assert_close(change, 0.7 * first[name] - 0.4 * second[name], rtol=1e-4, atol=1e-6)
    cut = add([a, b], [0.7, -0.4], Cut(rank=2))
    whole = sum(float((found[name]).square().sum()) for name in found)
    lost = sum(float((found[name] - change).square().sum()) for name, change in changes(cut.adapter).items())
    assert cut.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


def test_sums_that_make_no_sense_are_refused():
    a, b = trained(LoRA(rank=2, targets="q")), trained(LoRA(rank=2, targets="q"), model=net(seed=5))
    with pytest.raises(BaseMismatchError, match="adapters of different bases"):
        add([a, b], [1, 1])
    with pytest.raises(InputError, match="there are 2 adapters"):
        add([a, a], [1])
    with pytest.raises(InputError, match="dora: these cannot be added up"):
        add([trained(DoRA(rank=2, targets="q"))] * 2, [1, 1])
    with pytest.raises(InputError, match=r"embedding.<dog>: lora holds more than factors"):
        add([Adapter({**a.tensors, "embedding.<dog>": torch.zeros(1, 2)}, a.card)] * 2, [1, 1])
    with pytest.raises(InputError, match="cannot be added up"):
        cards = replace(a.card, domain="vlm", method="clip_lora"), replace(a.card, domain="diffusion")
        add([replace(a, card=card) for card in cards], [1, 1])
    with pytest.raises(InputError, match="in one adapter"):
        sites = [{**site, "shape": [3, 6], "rows": None} for site in a.card.sites]
        other = {"qkv.A": torch.zeros(2, 6), "qkv.B": torch.zeros(3, 2)}
        own = [{**site, "rows": None} for site in a.card.sites]
        add([Adapter(other, replace(a.card, sites=sites)), Adapter(other, replace(a.card, sites=own))], [1, 1])
    for wrong in ({}, {"rank": 0}, {"keep": 0.0}, {"keep": 1.5}):
        with pytest.raises(InputError):
            Cut(**wrong)


def as_base(model, name):
    return SimpleNamespace(name=name, modules={"net": model}, hash=base_hash({"net": model}))


def test_the_difference_of_two_bases_is_the_lora_that_made_it():
    adapter = trained(LoRA(rank=2, alpha=6, targets=("conv", "qkv")))
    expected, tuned = output(adapter), net()
    handle = LoRA.attach_to(tuned, adapter.tensors, adapter.card)
    handle.merge()
    merged = net()
    merged.load_state_dict(tuned.state_dict())
    handle.detach()
    done = extract(as_base(merged, "tuned"), as_base(net(), "plain"), Cut(rank=2))
    assert done.error < 1e-5 and {loss.module for loss in done.losses} == {"net.conv", "net.qkv"}
    base = as_base(net(), "plain")
    with done.adapter.attached(base):
        torch.testing.assert_close(base.modules["net"](IDS), expected, rtol=1e-4, atol=1e-5)
    less = extract(as_base(merged, "tuned"), as_base(net(), "plain"), Cut(rank=1))
    assert less.error > 0.05
    with torch.no_grad():
        merged.norm.bias += 1
        merged.table.weight += 0.1
    more = extract(as_base(merged, "tuned"), as_base(net(), "plain"), Cut(rank=2))
    assert set(more.elsewhere) == {"net.table.weight", "net.norm.bias"}
    assert more.elsewhere_size == pytest.approx((12 + 0.01 * 88) ** 0.5, rel=1e-4)
    assert more.error > 0.3
    with pytest.raises(InputError, match="their weights are the same"):
        extract(as_base(net(), "a"), as_base(net(), "b"), Cut(rank=2))
    with pytest.raises(InputError, match="give bases of one architecture"):
        extract(as_base(nn.Sequential(nn.Linear(2, 2)), "a"), as_base(net(), "b"), Cut(rank=2))


@pytest.mark.parametrize("format", ["native", "peft", "loralib"])
def test_the_command_resizes_any_file_and_leaves_nothing_half(tmp_path, capsys, monkeypatch, format):
    adapter = trained(LoRA(rank=4, targets="qkv"))
    adapter.export(tmp_path / "in", format)
    run = ["adapters", "resize", str(tmp_path / "in"), str(tmp_path / "out"), "--rank", "2"]
    assert main([*run, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = document["modules"]
    assert (row["module"], row["rank"]) == ("qkv", 2)
    assert 0.01 < row["error"] == pytest.approx(document["error"])
    read = load_adapter(tmp_path / "out")
    assert read.tensors["qkv.A"].shape == (2, 6)
    assert read.card.details["reworked"] == ["resized (rank 2)"]
    assert main(run) == 2  # the folder holds something
    assert "it is not an empty folder" in capsys.readouterr().err
    assert main([*run[:3], str(tmp_path / "no")]) == 2
    assert "give --rank 8, or --keep 0.9" in capsys.readouterr().err
    monkeypatch.setattr("graft.studio.formats.peft.check_written", lambda *args: 1 / 0)
    assert main([*run[:3], str(tmp_path / "no"), "--keep", "0.5", "--to", "peft"]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_the_command_adds_up(tmp_path, capsys):
    paths = [str(trained(LoRA(rank=2, targets="qkv"), seed).save(tmp_path / str(seed))) for seed in (1, 2)]
    out = str(tmp_path / "out")
    assert main(["adapters", "merge", *paths, out, "--weights", "0.5,0.25"]) == 0
    assert "1 modules of ranks 4 to 4: " in capsys.readouterr().out
    a, b = (changes(load_adapter(path))["qkv"] for path in paths)
    torch.testing.assert_close(changes(load_adapter(out))["qkv"], 0.5 * a + 0.25 * b, rtol=1e-4, atol=1e-6)
    assert main(["adapters", "merge", *paths, str(tmp_path / "two"), "--weights", "0.5;1"]) == 2
    assert "Write --weights 0.7,0.3" in capsys.readouterr().err
    assert main(["adapters", "merge", *paths, str(tmp_path / "two"), "--captions", "file"]) == 2
    assert "--captions: these are for custom_diffusion" in capsys.readouterr().err


def test_text_encoders_that_are_spelled_in_two_ways_are_one():
    def of(name):
        return to_adapter({name: LowRank("linear", torch.ones(1, 2), torch.ones(3, 1))}, "diffusion", "here")

    done = add([of("text_encoder.text_model.fc"), of("text_encoder.fc")], [1, 2])
    assert [loss.module for loss in done.losses] == ["text_encoder.fc"]
    tensors = done.adapter.tensors
    assert torch.equal(tensors["text_encoder.fc.B"] @ tensors["text_encoder.fc.A"], torch.full((3, 2), 3.0))
