"""New words in both text encoders of Stable Diffusion XL, and their files to and from other programs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from graft.diffusion import load_words
from graft.diffusion.base import DiffusionBase, load_base, save_base
from graft.diffusion.jobs import ConceptTask, prepare
from graft.diffusion.textual_inversion import TextualInversion, attach_concepts
from graft.studio.adapter import Adapter, load_adapter
from graft.studio.errors import FormatError, InputError
from graft.studio.job import Job

PROMPT = "a photo of <sprout> on the toy"


def trained(base: Path, photos: Path, **method) -> ConceptTask:
    """A task after three steps."""
    job = {"base": str(base), "method": method, "data": {"path": str(photos)}}
    task = prepare(Job.load({**job, "train": {"batch_size": 2, "device": "cpu", "seed": 3}}))
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        task(task.batch(step, torch.Generator().manual_seed(step)))[0].backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in task.parameters())
    return task


def stock(folder: Path):
    return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)


def picture(pipe, prompt: str = PROMPT) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "np"}
    return pipe(prompt, generator=torch.Generator().manual_seed(11), **settings).images[0]


def twice(pipe, folder: Path, first: str = "learned_embeds", token: str = "<sprout>") -> None:
    """As diffusers documents it for two text encoders."""
    for name, encoder, tokenizer in (
        ("", pipe.text_encoder, pipe.tokenizer),
        ("_2", pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        rows = load_file(folder / f"{first}{name}.safetensors")[token]
        pipe.load_textual_inversion(rows, token=token, text_encoder=encoder, tokenizer=tokenizer)


@pytest.mark.parametrize("vectors", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_word_is_learnt_in_both_encoders_and_stock_diffusers_draws_the_same(
    xl: Path, photos: Path, tmp_path: Path, vectors: int
):
    task = trained(xl, photos, name="textual_inversion", token="<sprout>", vectors=vectors)
    assert [tuple(parameter.shape) for parameter in task.parameters()] == [(vectors, 16), (vectors, 24)]
    expected, plain = picture(task.base.pipe), picture(task.base.pipe, "a photo of toy on the toy")
    adapter = task.adapter({})
    apart, together = adapter.export(tmp_path / "two", "diffusers"), adapter.export(tmp_path / "one", "kohya")
    assert [path.name for path in apart] == ["learned_embeds.safetensors", "learned_embeds_2.safetensors"]
    assert {k: tuple(t.shape) for k, t in load_file(together[0]).items()} == {
        "clip_l": (vectors, 16),
        "clip_g": (vectors, 24),
    }
    assert together[0].name == "sprout.safetensors"
    pipe = stock(xl)
    twice(pipe, tmp_path / "two")
    np.testing.assert_allclose(picture(pipe), expected, atol=1e-5)
    assert not np.array_equal(expected, plain)
    adapter.save(tmp_path / "native")
    for path in (tmp_path / "native", tmp_path / "two", together[0]):
        read = load_adapter(path)
        assert (read.card.method, read.card.trigger) == ("textual_inversion", "<sprout>")
        assert all(torch.equal(read.tensors[name], tensor) for name, tensor in adapter.tensors.items())
    fresh, pipe = load_base(str(xl), "cpu"), stock(xl)
    with read.attached(fresh):
        np.testing.assert_allclose(picture(fresh.pipe), expected, atol=1e-5)
    assert load_words(pipe, tmp_path / "two") == "<sprout>"
    np.testing.assert_allclose(picture(pipe), expected, atol=1e-5)


def test_it_comes_off_without_a_trace_and_a_saved_base_knows_it(xl: Path, tmp_path: Path):
    base = load_base(str(xl), "cpu")
    identity, tokenizers = base.hash, (base.pipe.tokenizer, base.pipe.tokenizer_2)
    plain = picture(base.pipe, "a red cat")
    handle = TextualInversion(token="<sprout>").attach(base, seed=3)
    expected = picture(base.pipe)
    assert np.array_equal(picture(base.pipe, "a red cat"), plain)
    second = TextualInversion(token="<cat>").attach(base)
    with pytest.raises(InputError, match="another word was attached after it"):
        handle.detach()
    with pytest.raises(InputError, match="other words are attached too"):
        handle.merge()
    second.detach()
    handle.merge()
    save_base(base, tmp_path / "whole")
    handle.detach()
    assert DiffusionBase("again", base.pipe).hash == identity
    assert (base.pipe.tokenizer, base.pipe.tokenizer_2) == tokenizers
    for encoder in (base.pipe.text_encoder, base.pipe.text_encoder_2):
        assert type(encoder.get_input_embeddings()) is nn.Embedding
    np.testing.assert_allclose(picture(stock(tmp_path / "whole")), expected, atol=1e-5)


def test_rows_of_several_jobs_are_apart_and_a_cut_off_word_is_told(xl: Path):
    base = load_base(str(xl), "cpu")
    handle = attach_concepts(base, [TextualInversion(token="<cat>"), TextualInversion(token="<toy>")], [0, 1])
    owned = handle.owned()
    assert [slot for _, slot in owned] == [0, 1, 0, 1]
    assert {id(row) for row, _ in owned} == {id(row) for row in handle.bank.parameters()}
    whole, cut = base.tokenize(["a <cat>", "a " * 30 + "<cat>"])
    assert handle.in_prompt(whole)
    assert not handle.in_prompt(cut)


@pytest.mark.slow
def test_pivotal_tuning_is_the_same_in_stock_diffusers(xl: Path, photos: Path, tmp_path: Path):
    settings = {"trigger": "<sprout>", "rank": 2, "targets": "attention"}
    task = trained(xl, photos, name="pivotal", **settings)
    expected, adapter = picture(task.base.pipe), task.adapter({})
    files = adapter.export(tmp_path / "two", "diffusers")
    assert [path.name for path in files[1:]] == ["<sprout>.safetensors", "<sprout>_2.safetensors"]
    pipe = stock(xl)
    pipe.load_lora_weights(tmp_path / "two", weight_name="pytorch_lora_weights.safetensors")
    twice(pipe, tmp_path / "two", "<sprout>")
    np.testing.assert_allclose(picture(pipe), expected, atol=1e-5)
    files = adapter.export(tmp_path / "one", "kohya")
    assert [path.name for path in files] == ["kohya.safetensors", "sprout.safetensors"]
    pipe = stock(xl)
    pipe.load_lora_weights(tmp_path / "one", weight_name="kohya.safetensors")
    load_words(pipe, files[1])
    np.testing.assert_allclose(picture(pipe), expected, atol=1e-5)
    adapter.save(tmp_path / "native")
    fresh = load_base(str(xl), "cpu")
    with graft.load_adapter(tmp_path / "native").attached(fresh):
        np.testing.assert_allclose(picture(fresh.pipe), expected, atol=1e-6)


@pytest.mark.slow
def test_custom_diffusion_learns_words_in_both(xl: Path, photos: Path, tmp_path: Path):
    task = trained(xl, photos, name="custom_diffusion", token="<sprout>", class_word="toy")
    expected, adapter = picture(task.base.pipe), task.adapter({})
    assert {"embedding.<sprout>", "embedding_2.<sprout>"} < set(adapter.tensors)
    adapter.save(tmp_path / "native")
    adapter.export(tmp_path / "theirs", "diffusers")
    for path in (tmp_path / "native", tmp_path / "theirs"):
        fresh = load_base(str(xl), "cpu")
        with load_adapter(path).attached(fresh):
            np.testing.assert_allclose(picture(fresh.pipe), expected, atol=1e-5)
    adapter.export(tmp_path / "merged", "merged")
    pipe = stock(xl)
    pipe.unet.load_state_dict(load_file(tmp_path / "merged" / "custom_diffusion_unet.safetensors"), strict=False)
    twice(pipe, tmp_path / "merged", "<sprout>")
    np.testing.assert_allclose(picture(pipe), expected, atol=1e-5)
    pair = [load_adapter(tmp_path / "native")] * 2
    with pytest.raises(InputError, match="two text encoders cannot be merged"):
        type(task.subjects[0].method).combine(pair, task.base)


FOREIGN: dict[str, tuple[dict[str, tuple[int, ...]], str, int]] = {
    "as diffusers' script writes it": ({"<dog>": (2, 16)}, "<dog>", 2),
    "one row": ({"<dog>": (16,)}, "<dog>", 1),
    "sd-scripts": ({"emb_params": (3, 16)}, "<mine>", 3),
    "OneTrainer": ({"emp_params": (3, 16)}, "<mine>", 3),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_files_of_others_are_read(folder: Path, tmp_path: Path, case: str):
    shapes, token, vectors = FOREIGN[case]
    tensors = {key: torch.randn(*shape) for key, shape in shapes.items()}
    save_file(tensors, tmp_path / "mine.safetensors")
    adapter = load_adapter(tmp_path / "mine.safetensors")
    assert adapter.card.config == {"token": token, "vectors": vectors}
    base, pipe = load_base(str(folder), "cpu"), StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_textual_inversion(tmp_path, weight_name="mine.safetensors", token=token)
    with adapter.attached(base):
        assert np.array_equal(picture(base.pipe, f"a photo of {token}"), picture(pipe, f"a photo of {token}"))


def test_a_dictionary_of_a1111_is_refused_as_the_pickle_that_it_is(tmp_path: Path):
    rows = torch.randn(2, 16)
    kept = {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "mine", "step": 100}
    torch.save(kept, tmp_path / "mine.pt")
    with pytest.raises(FormatError, match="a pickle"):
        load_adapter(tmp_path / "mine.pt")
    inside = torch.load(tmp_path / "mine.pt", weights_only=True)["string_to_param"]["*"]  # as the documentation says
    save_file({"emb_params": inside.detach()}, tmp_path / "mine.safetensors")
    assert torch.equal(load_adapter(tmp_path / "mine.safetensors").tensors["embedding"], rows)


def test_words_of_other_text_encoders_are_refused(xl: Path, folder: Path, tmp_path: Path):
    one, two = Path(tmp_path / "one.safetensors"), Path(tmp_path / "two.safetensors")
    save_file({"<dog>": torch.randn(2, 16)}, one)
    save_file({"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 24)}, two)
    small, large = load_base(str(folder), "cpu"), load_base(str(xl), "cpu")
    with (
        pytest.raises(FormatError, match=r"embedding_2: expected \(2, 24\), got nothing"),
        load_adapter(one).attached(large),
    ):
        pass
    with (
        pytest.raises(FormatError, match="embedding_2: .* the word was learnt in two"),
        load_adapter(two).attached(small),
    ):
        pass
    for base in (small, large):
        assert type(base.pipe.text_encoder.get_input_embeddings()) is nn.Embedding
    with pytest.raises(InputError, match="rows of width 16; the pipeline's text encoders have 16 and 24"):
        load_words(large.pipe, one)
    save_file({"clip_l": torch.randn(2, 16), "t5": torch.randn(2, 24)}, two)
    with pytest.raises(FormatError, match="t5: rows of a text encoder that no word is learnt in"):
        load_adapter(two)
    save_file({"clip_l": torch.randn(2, 16), "clip_g": torch.randn(3, 24)}, two)
    with pytest.raises(FormatError, match="other numbers of rows"):
        load_adapter(two)
    (tmp_path / "a").mkdir()
    save_file({"<dog>": torch.randn(2, 16)}, tmp_path / "a" / "learned_embeds.safetensors")
    save_file({"<cat>": torch.randn(2, 24)}, tmp_path / "a" / "learned_embeds_2.safetensors")
    with pytest.raises(FormatError, match="two files of one word"):
        load_adapter(tmp_path / "a")


def test_formats_without_words_are_refused(tmp_path: Path):
    save_file({"<dog>": torch.randn(2, 16)}, tmp_path / "dog.safetensors")
    adapter: Adapter = load_adapter(tmp_path / "dog.safetensors")
    with pytest.raises(InputError, match="use native, diffusers or kohya"):
        adapter.export(tmp_path / "out", "peft")
