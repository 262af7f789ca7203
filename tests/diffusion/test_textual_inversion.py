from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from graft.diffusion.base import DiffusionBase, save_base
from graft.diffusion.textual_inversion import TextualInversion, attach_concepts
from graft.studio.adapter import Adapter, Card
from graft.studio.errors import FormatError, InputError, SiteError


def table(base: DiffusionBase) -> nn.Embedding:
    return base.pipe.text_encoder.get_input_embeddings()


def states(base: DiffusionBase) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n, m in base.modules.items() for k, v in m.state_dict().items()}


def draw(pipe, prompt: str, seed: int = 0) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=3, height=8, width=8, generator=generator, output_type="np").images[0]


@pytest.mark.parametrize("vectors", [1, 3])
def test_new_rows_are_what_a_longer_table_would_give(base: DiffusionBase, vectors: int):
    handle = TextualInversion(token="<cat>", vectors=vectors).attach(base)
    ids = base.tokenize(["a photo of <cat> on a toy"])
    longer = torch.cat([table(base).weight, handle.bank()])  # the diffusers script's table
    assert (ids >= len(table(base).weight)).sum() == vectors
    assert torch.equal(table(base)(ids), nn.functional.embedding(ids, longer))


def test_only_new_rows_are_parameters_and_the_gradient_is_the_tables(base: DiffusionBase):
    handle = TextualInversion(token="<cat>", vectors=2).attach(base)
    assert [tuple(p.shape) for p in handle.bank.parameters()] == [(2, 16)]
    assert not any(p.requires_grad for m in base.modules.values() for p in m.parameters())
    ids = base.tokenize(["<cat> and <cat>", "a <cat>"])
    base.encode(ids).square().sum().backward()
    mine = handle.bank.rows[0].grad
    longer = torch.cat([table(base).weight, handle.bank()]).detach()
    table(base).__dict__.pop("concepts")
    table(base).__class__ = nn.Embedding
    table(base).weight = nn.Parameter(longer)
    base.encode(ids).square().sum().backward()
    theirs = table(base).weight.grad
    assert theirs is not None
    torch.testing.assert_close(mine, theirs[-2:])


def test_detach_restores_tokenizer_classes_and_bits(base: DiffusionBase):
    before, tokenizer, types = states(base), base.tokenizer, [type(m) for m in base.pipe.text_encoder.modules()]
    picture, identity = draw(base.pipe, "a red cat"), base.hash
    handle = TextualInversion(token="<cat>").attach(base)
    assert states(base).keys() == before.keys()
    assert np.array_equal(draw(base.pipe, "a red cat"), picture)  # prompts without the word are untouched
    handle.detach()
    assert base.tokenizer is tokenizer and "<cat>" not in tokenizer.get_vocab()
    assert [type(m) for m in base.pipe.text_encoder.modules()] == types
    assert "concepts" not in table(base).__dict__
    after = states(base)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert np.array_equal(draw(base.pipe, "a red cat"), picture)
    assert DiffusionBase("again", base.pipe).hash == identity


def test_words_stack_and_come_off_in_turn(base: DiffusionBase):
    first = TextualInversion(token="<cat>", vectors=2).attach(base)
    alone = base.encode(base.tokenize(["a <cat>"]))
    second = TextualInversion(token="<toy>").attach(base, seed=5)
    assert torch.equal(base.encode(base.tokenize(["a <cat>"])), alone)
    with pytest.raises(InputError, match="another word was attached after it"):
        first.detach()
    second.detach()
    assert torch.equal(base.encode(base.tokenize(["a <cat>"])), alone)
    first.detach()
    assert type(table(base)) is nn.Embedding


def test_mixed_rows_equal_separate_words(base: DiffusionBase):
    methods = [TextualInversion(token="<cat>", vectors=2), TextualInversion(token="<toy>", vectors=1)]
    apart = []
    for seed, method in enumerate(methods):
        handle = method.attach(base, seed)
        apart.append(base.encode(base.tokenize([f"a photo of {method.token}"])))
        handle.detach()
    handle = attach_concepts(base, methods, [0, 1])
    together = base.encode(base.tokenize(["a photo of <cat>", "a photo of <toy>", "a red cat"]))
    handle.detach()
    torch.testing.assert_close(together[:2], torch.cat(apart), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together[2:], base.encode(base.tokenize(["a red cat"])), rtol=1e-5, atol=1e-6)


def test_initialiser_words_are_dealt_out_with_noise_on_repeats(base: DiffusionBase):
    red, cat = (table(base).weight[i] for i in base.tokenizer("red cat", add_special_tokens=False).input_ids)
    handle = TextualInversion(vectors=3, initializer="red cat").attach(base)
    rows = handle.bank.rows[0]
    assert torch.equal(rows[0], red) and torch.equal(rows[1], cat)
    spread = float(table(base).weight.std())
    assert 0 < (rows[2] - red).norm() < 0.1 * spread * 3 * 16**0.5
    handle.detach()
    random = TextualInversion(vectors=32).attach(base).bank.rows[0]
    assert float(random.detach().std()) == pytest.approx(spread, rel=0.15)


def test_kept_norm_is_the_tables_median(base: DiffusionBase):
    handle = TextualInversion(keep_norm=True).attach(base)
    handle.load({"embedding": 100 * torch.randn(2, 16)})
    median = table(base).weight.norm(dim=-1).median()
    torch.testing.assert_close(handle.tensors()["embedding"].norm(dim=-1), median.expand(2))


@pytest.mark.parametrize("vectors", [1, 3])
def test_stock_diffusers_loads_the_export_and_draws_the_same(
    base: DiffusionBase, folder: Path, tmp_path: Path, vectors: int
):
    method = TextualInversion(token="<sprout>", vectors=vectors)
    handle = method.attach(base, seed=3)
    picture = draw(base.pipe, "a photo of <sprout> on the toy", seed=11)
    card = Card("textual_inversion", {"token": "<sprout>", "vectors": vectors}, "diffusion")
    Adapter(handle.tensors(), card).export(tmp_path, "diffusers")
    stock = StableDiffusionPipeline.from_pretrained(folder)
    stock.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    assert np.array_equal(draw(stock, "a photo of <sprout> on the toy", seed=11), picture)
    assert not np.array_equal(draw(stock, "a photo of toy on the toy", seed=11), picture)


def test_a_saved_base_knows_the_words(base: DiffusionBase, tmp_path: Path):
    before, rows = states(base), len(table(base).weight)
    handle = TextualInversion(token="<sprout>", vectors=2).attach(base, seed=3)
    picture = draw(base.pipe, "a photo of <sprout>", seed=11)
    handle.merge()
    assert np.array_equal(draw(base.pipe, "a photo of <sprout>", seed=11), picture)
    save_base(base, tmp_path / "whole")
    handle.detach()
    assert all(torch.equal(before[k], v) for k, v in states(base).items())
    assert base.pipe.text_encoder.config.vocab_size == rows == table(base).num_embeddings
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert np.array_equal(draw(stock, "a photo of <sprout>", seed=11), picture)


def test_attach_to_restores_what_was_saved(base: DiffusionBase):
    card = SimpleNamespace(config={"token": "<sprout>", "vectors": 2, "keep_norm": True})
    handle = TextualInversion(**card.config).attach(base, seed=3)
    kept, hidden = handle.tensors(), base.encode(base.tokenize(["<sprout>"]))
    handle.detach()
    again = TextualInversion.attach_to(base, kept, card)
    torch.testing.assert_close(base.encode(base.tokenize(["<sprout>"])), hidden)
    again.detach()
    with pytest.raises(FormatError, match=r"expected \(2, 16\), got \(2, 8\)"):
        TextualInversion.attach_to(base, {"embedding": torch.zeros(2, 8)}, card)
    assert type(table(base)) is nn.Embedding
    with pytest.raises(InputError, match="adapter.json.tokne"):
        TextualInversion.attach_to(base, kept, SimpleNamespace(config={"tokne": "<sprout>"}))


def test_a_word_that_no_prompt_holds_is_dead(base: DiffusionBase):
    handle = attach_concepts(base, [TextualInversion(token="<cat>"), TextualInversion(token="<toy>")], [0, 0])
    with pytest.raises(SiteError, match="<toy>: no gradient reaches"):
        handle.probe(lambda: base.encode(base.tokenize(["a <cat>"])).square())
    handle.probe(lambda: base.encode(base.tokenize(["a <cat> <toy>"])).square())


def test_bad_words_are_refused_and_leave_no_trace(base: DiffusionBase):
    for token in ["two words", "<Sprout>", " "]:
        with pytest.raises(InputError, match="one lower-case word"):
            TextualInversion(token=token)
    with pytest.raises(InputError, match="the tokenizer has this word already"):
        TextualInversion(token="<|endoftext|>").attach(base)
    with pytest.raises(InputError, match="no tokens for these words"):
        TextualInversion(initializer="漢字").attach(base)
    assert type(table(base)) is nn.Embedding


def test_captions_must_hold_the_word():
    method = TextualInversion(token="<cat>")
    assert method.prompts("a {token} in the sun") == ["a <cat> in the sun"]
    assert all("<cat>" in prompt for prompt in method.prompts(None))
    with pytest.raises(InputError, match="does not contain <cat>"):
        method.prompts("a dog")
