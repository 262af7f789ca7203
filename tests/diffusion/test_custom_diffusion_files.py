"""Custom Diffusion's files and merge: every file gives the same pictures in plain diffusers as the attached adapter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from safetensors.torch import load_file, save_file

from graft.diffusion.base import DiffusionBase
from graft.diffusion.concept_merge import constrained, features, merge_concepts
from graft.diffusion.custom_diffusion import CustomDiffusion
from graft.diffusion.custom_diffusion_files import changes, whole_weights
from graft.studio.adapter import Adapter, Card, load_adapter
from graft.studio.cli import main
from graft.studio.config import to_dict
from graft.studio.errors import BaseMismatchError, FormatError, InputError
from graft.studio.formats.files import read_tensors

PROMPT = "a photo of <new1> cat on the toy"


def trained(base: DiffusionBase, seed: int = 0, **settings) -> Adapter:
    """An adapter as a training leaves it, with random values."""
    method = CustomDiffusion(**settings)
    handle = method.attach(base, seed)
    torch.manual_seed(seed)
    for change in handle.weights.bank.parameters():
        torch.nn.init.normal_(change, std=0.3)
    for rows in handle.words.bank.rows:
        torch.nn.init.normal_(rows)
    tensors, plan = handle.tensors(), handle.plan.to_list()
    handle.detach()
    card = Card("custom_diffusion", to_dict(method), "diffusion", base.name, base.hash, plan, trigger=method.trigger)
    return Adapter(tensors, card)


@pytest.fixture
def adapter(base: DiffusionBase) -> Adapter:
    return trained(base, class_word="cat")


def picture(pipe, prompt: str = PROMPT) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(11)
    return pipe(prompt, num_inference_steps=2, height=8, width=8, generator=generator, output_type="np").images[0]


def attached(adapter: Adapter, base: DiffusionBase, prompt: str = PROMPT) -> np.ndarray:
    with adapter.attached(base):
        return picture(base.pipe, prompt)


def by_hand(unet: UNet2DConditionModel, file: Path) -> None:
    """What diffusers' own loading does not do: its processors with the file's weights."""
    found, made = load_file(file), {}
    for name in unet.attn_processors:
        attention, text = unet.get_submodule(name.removesuffix(".processor")), name.endswith("attn2.processor")
        q_out = any(key.startswith(f"{name}.to_q") for key in found)
        made[name] = CustomDiffusionAttnProcessor(text, q_out, attention.to_k.out_features, attention.to_k.in_features)
        own = {key.removeprefix(f"{name}."): value for key, value in found.items() if key.startswith(f"{name}.")}
        made[name].load_state_dict(own)
    unet.set_attn_processor(made)


def merged_into(unet: UNet2DConditionModel, file: Path) -> None:
    assert not unet.load_state_dict(load_file(file), strict=False).unexpected_keys


@pytest.mark.parametrize("freeze_model", ["crossattn_kv", "crossattn"])
@pytest.mark.parametrize(("format", "put"), [("diffusers", by_hand), ("merged", merged_into)])
def test_plain_diffusers_draws_the_same(
    base: DiffusionBase, folder: Path, tmp_path: Path, format: str, put, freeze_model: str
):
    adapter = trained(base, class_word="cat", freeze_model=freeze_model)
    weights, word = adapter.export(tmp_path, format)
    stock = StableDiffusionPipeline.from_pretrained(folder)
    stock.load_textual_inversion(str(word))
    put(stock.unet, weights)
    ours = attached(adapter, base)
    np.testing.assert_allclose(picture(stock), ours, atol=1e-5)
    assert np.abs(picture(base.pipe, "a photo of red cat on the toy") - ours).max() > 1e-3
    if format == "diffusers":  # and is read again
        read = load_adapter(weights)
        assert read.card.config.get("freeze_model", "crossattn_kv") == freeze_model
        np.testing.assert_allclose(attached(read, base), ours, atol=1e-5)


def test_a_lora_leaves_biases_out_and_keys_alone_can_be_merged(base: DiffusionBase, tmp_path: Path):
    adapter = trained(base, freeze_model="crossattn")
    file, _ = adapter.export(tmp_path, "lora-32")
    found = changes(adapter)
    size = {dim: sum(float(d.square().sum()) for d in found.values() if d.dim() == dim) for dim in (1, 2)}
    assert size[1] > 0 and len(load_file(file)) == 2 * sum(d.dim() == 2 for d in found.values())
    wanted = (size[1] / sum(size.values())) ** 0.5
    assert float(read_tensors(file)[1]["residual"]) == pytest.approx(wanted, rel=1e-3)
    with pytest.raises(InputError, match="the merge is of keys and values"):
        merge_concepts(base, [adapter, trained(base, 1)])


def test_a_lora_says_what_it_leaves_out(
    base: DiffusionBase, folder: Path, adapter: Adapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    whole, ours = changes(adapter), attached(adapter, base)
    whole = {name.removesuffix(".weight"): change for name, change in whole.items()}
    for format, kept in (("lora-4", lambda values: 4), ("lora", _most), ("lora-16", len)):
        file, word = adapter.export(tmp_path / format, format)
        factors, lost = load_file(file), 0.0
        for name, change in whole.items():
            up, down = factors[f"{name}.lora_B.weight"], factors[f"{name}.lora_A.weight"]
            values = torch.linalg.svdvals(change)
            assert len(down) == kept(values)
            left = float((change - up @ down).square().sum())
            assert left == pytest.approx(float(values[len(down) :].square().sum()), rel=1e-3, abs=1e-6)
            lost += left
        residual = float(read_tensors(file)[1]["residual"])
        assert residual == pytest.approx((lost / sum(float(d.square().sum()) for d in whole.values())) ** 0.5, abs=1e-5)
        assert f"{100 * residual:.2f} % of the change is left out" in caplog.messages[-1]
    stock = StableDiffusionPipeline.from_pretrained(folder)
    stock.load_textual_inversion(str(word))
    stock.load_lora_weights(file.parent, weight_name=file.name)  # of full rank
    np.testing.assert_allclose(picture(stock), ours, atol=1e-5)


def _most(values: torch.Tensor) -> int:
    return next(i for i in range(1, 17) if values[:i].sum() >= 0.6 * values.sum())


def test_the_scripts_files_are_read(base: DiffusionBase, adapter: Adapter, tmp_path: Path):
    ours = attached(adapter, base)
    weights, word = adapter.export(tmp_path / "theirs", "diffusers")
    for path in (tmp_path / "theirs", weights):
        read = load_adapter(path)
        np.testing.assert_allclose(attached(read, base), ours, atol=1e-5)
    word.rename(word.with_suffix(".bin"))  # as some versions of the script name a safetensors file
    np.testing.assert_allclose(attached(load_adapter(weights), base), ours, atol=1e-5)
    again = load_adapter(weights).export(tmp_path / "again", "diffusers")[0]
    assert all(torch.equal(a, b) for a, b in zip(load_file(again).values(), load_file(weights).values(), strict=True))
    torch.testing.assert_close(changes(load_adapter(weights), base), changes(adapter), atol=1e-6, rtol=1e-5)
    save_file(load_file(weights), weights)  # without the header, as the script writes it
    with pytest.raises(InputError, match="does not name its base"):
        load_adapter(weights).export(tmp_path / "no", "lora")
    word.with_suffix(".bin").write_bytes(b"\x80\x04pickled")
    with pytest.raises(FormatError, match="a pickle"):
        load_adapter(weights)
    word.with_suffix(".bin").unlink()
    with pytest.raises(FormatError, match="no file of a word"):
        load_adapter(weights)
    save_file({"mid_block.attn2.processor.to_x_custom_diffusion.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(FormatError, match="the script writes no such key"):
        load_adapter(weights)


def test_native_files_and_a_saved_base(base: DiffusionBase, adapter: Adapter, tmp_path: Path, capsys):
    ours = attached(adapter, base)
    adapter.save(tmp_path / "native")
    assert np.array_equal(attached(load_adapter(tmp_path / "native"), base), ours)
    with pytest.raises(InputError, match="use native, diffusers, merged, lora"):
        adapter.export(tmp_path, "kohya")
    assert main(["adapters", "merge", str(tmp_path / "native"), str(tmp_path / "whole")]) == 0
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "whole")
    np.testing.assert_allclose(picture(stock), ours, atol=1e-5)


def test_constrained_is_the_least_change_that_obeys():
    """Against the conditions of the optimum: it obeys, and its change lies in the span that Lagrange's rule names."""
    torch.manual_seed(0)
    weight, told, wanted = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3, 5)
    ordinary = torch.randn(200, 8)
    merged = constrained(weight, told, wanted, ordinary)
    torch.testing.assert_close(merged @ told.double().T, wanted.double().T, rtol=1e-12, atol=1e-12)

    def drift(other: torch.Tensor) -> float:
        return float(((other - weight) @ ordinary.double().T).square().sum())

    null = torch.eye(8).double() - torch.linalg.pinv(told.double()) @ told.double()
    for _ in range(20):
        assert drift(merged) < drift(merged + 0.01 * torch.randn(5, 8).double() @ null)
    with pytest.raises(InputError, match="the same features"):
        constrained(weight, told[[0, 0]], wanted[:2], ordinary)


@pytest.fixture
def pair(base: DiffusionBase) -> list[Adapter]:
    return [trained(base, 1, class_word="cat"), trained(base, 2, class_word="toy", vectors=2)]


def test_merged_concepts_are_what_each_was_alone(base: DiffusionBase, pair: list[Adapter]):
    """Keys and values of both concepts are those of their own trainings."""
    merged = merge_concepts(base, pair)
    assert merged.card.trigger == "<new1> cat and <new2> toy" and merged.card.config["token"] == ["<new1>", "<new2>"]
    torch.testing.assert_close(merged.tensors["embedding.<new2>"], pair[1].tensors["embedding.<new1>"])
    now, own = whole_weights(merged, base), [whole_weights(each, base) for each in pair]
    with merged.attached(base) as handle:
        assert (base.tokenize(["a <new2> toy"]) >= handle.words.tables["embedding"].known).sum() == 2
        told = [features(base, [phrase, f"photo of a {phrase}"]) for phrase in ("<new1> cat", "<new2> toy")]
        first = features(base, ["photo of a <new1> cat"], "photo of a")
    for name in now:
        for i, features_of in enumerate((told[0][:3], told[1][:4])):
            wanted = features_of @ own[i][name].double().T
            torch.testing.assert_close(features_of @ now[name].double().T, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(first @ now[name].double().T, first @ own[0][name].double().T, rtol=1e-4, atol=1e-4)


def test_merge_on_the_command_line(base: DiffusionBase, pair: list[Adapter], tmp_path: Path, capsys):
    for name, each in zip("ab", pair, strict=True):
        each.save(tmp_path / name)
    (tmp_path / "captions.txt").write_text("a red toy\na cat on a toy\na blue cat\n")
    a, b, out = (str(tmp_path / name) for name in ("a", "b", "out"))
    assert main(["adapters", "merge", a, b, out, "--captions", str(tmp_path / "captions.txt")]) == 0
    assert "<new1> cat and <new2> toy" in capsys.readouterr().out
    picture_of_both = attached(load_adapter(out), base, "a photo of <new1> cat and <new2> toy")
    assert np.isfinite(picture_of_both).all()
    assert main(["adapters", "merge", a, b, out]) == 2  # the folder holds something


def test_what_cannot_be_merged(base: DiffusionBase, pair: list[Adapter]):
    with pytest.raises(InputError, match="two or more"):
        merge_concepts(base, pair[:1])
    with torch.no_grad():
        base.pipe.vae.decoder.conv_out.bias[0] += 1
    with pytest.raises(BaseMismatchError, match="use its own base"):
        merge_concepts(DiffusionBase("other", base.pipe), pair)
