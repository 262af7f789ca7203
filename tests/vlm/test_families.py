"""One small random model per family through every method: its start, gradients, a file, merging, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from graft.studio.adapter import Adapter, Card, base_hash, load_adapter
from graft.studio.config import to_dict
from graft.studio.errors import InputError
from graft.vlm.base import ClipBase
from graft.vlm.clip_adapter import ClipAdapter
from graft.vlm.clip_lora import ClipLoRA
from graft.vlm.cocoop import CoCoOp
from graft.vlm.coop import CoOp
from graft.vlm.cross_modal import CrossModal
from graft.vlm.head import Head, Setting, Shots
from graft.vlm.prolip import ProLIP
from graft.vlm.task_res import TaskRes
from graft.vlm.tip_adapter import TipAdapter, TipAdapterF

NAMES = ("cat", "dog", "red cat")
METHODS: dict[str, Any] = {
    "coop": CoOp(words="a photo of a"),
    "cocoop": CoCoOp(reduction=2),
    "clip_adapter": ClipAdapter(safe=True),
    "tip_adapter": TipAdapter(search=False),
    "tip_adapter_f": TipAdapterF(search=False),
    "task_res": TaskRes(),
    "cross_modal": CrossModal(),
    "prolip": ProLIP(),
    "clip_lora": ClipLoRA(dropout=0.0),
}
ZERO_SHOT = {"coop", "clip_adapter", "task_res", "cross_modal", "prolip", "clip_lora"}
"""What starts as the classifier of the prompt."""
QUICK = ("coop", "prolip", "clip_lora")
"""Of each kind the one that asks most of a family; the others run with the slow tests."""
NO_PROMPTS = {"CoCa", "text tower of Hugging Face"}
"""Whose text tower only its library can run."""
NO_LAST_MAP = {
    "transformers SigLIP", "EVA-CLIP", "EVA-CLIP, first", "SigLIP, pooled by attention", "ResNet",
}  # fmt: skip
"""Whose image tower ends in no plain linear map."""


def pixels_for(base: ClipBase) -> Tensor:
    side = base.preprocess.size
    return torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def shots_of(base: ClipBase, pixels: Tensor) -> Shots:
    with torch.no_grad():
        pooled = base.pool(base.preprocess.normalise(pixels)).float()
    return Shots(pooled[:, None], torch.arange(3), pooled[:2], torch.arange(2))


def refused(family: str, name: str) -> str:
    """Why a family does not go with a method; empty if it does."""
    if family in NO_PROMPTS and name in ("coop", "cocoop"):
        return "prompts cannot be learnt .* Use clip_lora"
    return "does not end in a linear map .* Use task_res" if family in NO_LAST_MAP and name == "prolip" else ""


def learn(head: Head, shots: Shots, pixels: Tensor) -> list[str]:
    """Two steps; the names of tensors that got no gradient in the second."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-2)
    for _ in range(2):
        optimizer.zero_grad()
        inputs = pixels if head.reads_pixels else head.prepare(shots.pooled[:, 0])
        head.loss(inputs, shots.labels)[0].backward()
        optimizer.step()
    return [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_every_method_on_every_family(of_every_kind: tuple[str, ClipBase], name: str, tmp_path: Path):
    (family, base), method = of_every_kind, METHODS[name]
    pixels, setting = pixels_for(base), Setting(base, NAMES, ("a photo of a {}.",))
    if told := refused(family, name):
        with pytest.raises(InputError, match=told):
            method.build(setting)
        return
    before, shots = base_hash(base.modules), shots_of(base, pixels)
    torch.manual_seed(1)
    head = method.build(setting)
    head.start(shots)
    inputs = pixels if head.reads_pixels else head.prepare(shots.pooled[:, 0])
    plain = setting.zero_shot(base.project(shots.pooled[:, 0]))
    torch.testing.assert_close(head(inputs), plain, rtol=1e-4, atol=1e-4) if name in ZERO_SHOT else head(inputs)
    if name != "tip_adapter":
        assert learn(head, shots, pixels) == []
        assert not any(p.requires_grad and p.grad is not None for p in base.model.parameters())
    head.eval()
    with torch.no_grad():
        trained = head(pixels if head.reads_pixels else inputs)
    details = {"classes": list(NAMES), "templates": list(setting.templates), "strength": 1.0}
    card = Card(name, to_dict(method), "vlm", base_hash=before, sites=getattr(head, "sites", []), details=details)
    file = Adapter(head.tensors(), card).save(tmp_path / "adapter")
    head.detach()
    assert base_hash(base.modules) == before

    with load_adapter(file).attached(base) as classifier:
        found = classifier.logits_of_pixels(pixels)
        torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-4)
        if name == "clip_lora":
            classifier.merge()
            torch.testing.assert_close(classifier.logits_of_pixels(pixels), trained, rtol=1e-3, atol=1e-3)
    assert base_hash(base.modules) == before


def test_a_weight_that_is_read_and_not_called_is_adapted_itself(of: Callable[[str], ClipBase]):
    """EVA's first version reads `qkv.weight` past its module: factors on its output would be dead without an error."""
    base = of("EVA-CLIP, first")
    pixels, setting = pixels_for(base), Setting(base, NAMES, ("a photo of a {}.",))
    with torch.no_grad():
        plain = base.encode_image(pixels)
    head: Any = replace(ClipLoRA(dropout=0.0), towers=("vision",)).build(setting)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
        assert (base.encode_image(pixels) - plain).abs().max() > 1e-3
    head.detach()
    with pytest.raises(
        InputError, match=r"read without a call, so that there is no input to drop\. Set method.dropout"
    ):
        ClipLoRA().build(setting)
    assert not any(hasattr(module, "graft_slots") for module in base.model.modules())


def test_siglip_is_filled_up_to_its_length(of: Callable[[str], ClipBase], siglip_words: Any):
    """Its tokenizer does not do so unless it is told to, and the tower reads the last position."""
    words, texts = of("transformers SigLIP").words, ["a photo of a cat.", "dog"]
    told = siglip_words(texts, padding="max_length", max_length=32, return_tensors="pt").input_ids
    assert words(texts).tolist() == told.tolist()
    assert len(siglip_words(texts[1]).input_ids) == 4  # as it comes


def test_texts_become_the_rows_of_the_librarys_tokenizer(bert_words: Any):
    """CLIPA writes 0 over BERT's last mark; a context behind the first one would be a prompt of another kind."""
    from graft.vlm.families import open_clip_words

    words, texts = open_clip_words(bert_words), ["a photo of a cat.", "dog", "Red cat"]
    assert words(texts).tolist() == bert_words(texts).tolist()
    assert len(words.content("a cat")) == 4 and (words.start, words.end) == ([2], [0])
    assert words.row([*words.content("a"), *words.content("cat")], "") == bert_words("a cat")[0].tolist()

    class Backwards(HFTokenizer):
        def __call__(self, texts: Any, context_length: int | None = None) -> Tensor:
            return super().__call__(texts, context_length).flip(1)

    bert_words.__class__ = Backwards
    with pytest.raises(InputError, match="marks, cleans or fills texts in a way that is not known here"):
        open_clip_words(bert_words)
