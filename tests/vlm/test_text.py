"""The text engine gives what the library's own padded forward gives, for every family, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graft.studio.errors import DataError, InputError
from graft.vlm.base import ClipBase
from graft.vlm.prompts import PromptTable, context_of

NAMES = ("cat", "dog", "red cat", "photo of a dog")
PROMPTS = [f"a photo of a {name}." for name in NAMES]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def library(base: ClipBase, ids: Tensor) -> Tensor:
    """Features as the library itself computes them, from padded ids."""
    model: Any = base.model
    if hasattr(model, "encode_text"):
        return model.encode_text(ids)
    return model.get_text_features(input_ids=ids).pooler_output


class Replaced(nn.Module):
    """A token embedding whose output is given: the library's own forward then runs from our embeddings."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows, self.weight = rows, rows

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows


def library_from_embeddings(base: ClipBase, ids: Tensor, rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The library's padded forward, with rows (c, n, d) in place of the embeddings of ids (c, n)."""
    owner = next(
        module for module in base.model.modules() if isinstance(module._modules.get("token_embedding"), nn.Module)
    )
    with monkeypatch.context() as patch:
        patch.setitem(owner._modules, "token_embedding", Replaced(rows))
        return library(base, ids)


def padded(base: ClipBase, table: PromptTable, layouts: list[list[int]], context: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and embeddings of whole rows: a plain implementation with one row per class, all positions."""
    words, embed = base.words, base.text_tower().embed
    filler = words.content("a")[0]
    ids = torch.tensor([words.row([filler if i < 0 else i for i in each], "") for each in layouts])
    rows = embed(ids).clone()
    for c, layout in enumerate(layouts):
        for place, i in enumerate(layout, start=len(words.start)):
            if i < 0:
                rows[c, place] = context[-i - 1] if context.dim() == 2 else context[c, -i - 1]
    return ids, rows


def layouts(base: ClipBase, position: str, length: int) -> list[list[int]]:
    """Where context and name stand, said again independently."""
    context, found = [-(k + 1) for k in range(length)], []
    for name in NAMES:
        own, dotted = base.words.content(name), base.words.content(f"{name}.")
        stop = dotted[len(own) :]
        whole = {
            "end": context + own + stop,
            "middle": context[: length // 2] + own + context[length // 2 :] + stop,
            "front": own + context + stop,
        }
        found.append(whole[position])
    return found


@torch.no_grad()
def test_texts_are_encoded_as_the_library_does(any_base: ClipBase):
    ids = any_base.words(PROMPTS)
    close(any_base.encode_text(PROMPTS), library(any_base, ids))


@torch.no_grad()
def test_towers_that_see_their_padding_are_never_cut(any_base: ClipBase, cuttable: bool):
    tower = any_base.text_tower()
    assert tower.cuttable == tower.shares == cuttable
    if cuttable:
        return
    ids = any_base.words(PROMPTS)
    with pytest.raises(ValueError, match="needs all"):
        tower.encode(tower.embed(ids[:, :12]), tower.at(ids).clamp(max=11))
    # What a cut would have done: another answer, silently.
    x = tower.embed(ids[:, :20]) + tower.positions[:20]
    for layer in tower.layers:
        x = layer.whole(x, None)
    cut = tower.finish(x[torch.arange(len(x)), tower.at(ids).clamp(max=19)])
    assert (cut - library(any_base, ids)).abs().max() > 0.01


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("chunk", [8192, 24])
def test_learnt_prompts_equal_the_padded_path_with_gradients(
    any_base: ClipBase, position: str, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    table = PromptTable(any_base, NAMES, 4, position)
    context = torch.randn(4, any_base.text_tower().width, generator=torch.Generator().manual_seed(1))
    ours, theirs = (context.clone().requires_grad_() for _ in range(2))
    mine = table.features(ours[None], chunk)[0]
    ids, rows = padded(any_base, table, layouts(any_base, position, 4), theirs)
    plain = library_from_embeddings(any_base, ids, rows, monkeypatch)
    close(mine, plain)
    upstream = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2))
    a, b = torch.autograd.grad(mine, ours, upstream)[0], torch.autograd.grad(plain, theirs, upstream)[0]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_contexts_of_classes_and_of_pictures_equal_the_padded_path(any_base: ClipBase, monkeypatch: pytest.MonkeyPatch):
    width, draw = any_base.text_tower().width, torch.Generator().manual_seed(1)
    table, where = PromptTable(any_base, NAMES, 3), layouts(any_base, "end", 3)
    own = torch.randn(len(NAMES), 3, width, generator=draw, requires_grad=True)
    ids, rows = padded(any_base, table, where, own)
    plain, mine = library_from_embeddings(any_base, ids, rows, monkeypatch), table.features_by_class(own)[0]
    close(mine, plain)
    a, b = (torch.autograd.grad(each.square().sum(), own)[0] for each in (mine, plain))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    for group in (contexts := torch.randn(2, 3, width, generator=draw)):
        ids, rows = padded(any_base, table, where, group)
        batched = table.features(contexts)[[torch.equal(each, group) for each in contexts].index(True)]
        close(batched, library_from_embeddings(any_base, ids, rows, monkeypatch))


def test_words_become_as_many_vectors_as_the_tokenizer_makes_of_them(base: ClipBase):
    assert len(context_of(base, "a photo of a")) == 4
    assert len(context_of(base, "a fluffy")) == 1 + len("fluffy")  # this tokenizer knows no such word


def test_a_name_that_is_too_long_is_refused_with_its_length(base: ClipBase):
    name = "extraordinarily long"
    with pytest.raises(DataError, match=r"its 2\d tokens do not fit the 24"):
        base.encode_text([f"a photo of a {name}."])
    with pytest.raises(DataError, match="extraordinarily"):
        PromptTable(base, ["cat", name], 4)


def test_a_tower_of_an_unknown_family_still_has_zero_shot(make_open_clip: Any):
    coca = make_open_clip(True, embed_cls=True)
    assert coca.tower is None
    close(coca.encode_text(PROMPTS), coca.model.encode_text(coca.words(PROMPTS)))
    with pytest.raises(InputError, match="prompts cannot be learnt for its text tower"):
        PromptTable(coca, NAMES, 4)


@torch.no_grad()
def test_an_end_mark_that_is_not_the_largest_id_is_found(make: Any):
    base = make()
    base.words.pad = len(base.model.text_model.embeddings.token_embedding.weight) - 1  # as large as the end mark
    assert base.tower is not None
    ids = base.words(PROMPTS)
    assert base.tower.at(ids).tolist() == [len(base.words.content(p)) + 1 for p in PROMPTS]
