"""Several conversations in one row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import graft
from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import Conversation
from graft.llm_mm.data import DataConfig
from graft.llm_mm.llama_adapter import LlamaAdapter
from graft.llm_mm.llama_adapter_multimodal import MultimodalLlamaAdapter
from graft.llm_mm.method import (
    LanguageLoRA,
    LanguagePrefix,
    LanguagePrompt,
)
from graft.llm_mm.packing import check_packing, together
from graft.llm_mm.task import Reader
from graft.studio.caches import Cache
from graft.studio.errors import InputError

SLOW = pytest.mark.slow
FAMILIES = ("LlavaNext", "SmolVLM", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL")


@pytest.mark.parametrize(
    "family", ["Llava", *(each if each == "Qwen3VL" else pytest.param(each, marks=SLOW) for each in FAMILIES)]
)
def test_packed_conversations_are_those_that_stand_alone(
    family: str, tiny: Path, of_family: Callable[[str], MultimodalBase], conversations: list[Conversation]
):
    """Loss of each and the gradients of all, in one row and in a row for each; pictures whole and in their places."""
    torch.manual_seed(0)
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm") if family == "Llava" else of_family(family)
    reader, given = Reader.of(base, DataConfig(path="-"), Cache()), conversations
    with torch.no_grad():  # a model as drawn hardly minds where a token stands
        for weight in base.model.parameters():
            weight.mul_(4 if weight.dim() > 1 and family != "Llava" else 1)
    handle = LanguageLoRA(rank=2, towers=("language", "projector")).attach(base.model)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    check_packing(reader, given, handle.plan, 100)

    def told(rows: list[Conversation], most: int, frozen: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The losses of the conversations, and the gradients of their sum."""
        batches = [reader.batch(rows, most)[0]] if most else [reader.batch([row])[0] for row in rows]
        told = [reader.logits(batch, frozen) for batch in batches]
        logits, labels = (torch.cat(each) for each in zip(*told, strict=True))
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").view(len(rows), -1).sum(1)
        return losses.detach(), list(torch.autograd.grad(losses.sum(), list(handle.bank.parameters())))

    lengths = [len(reader.tokens(row).ids) for row in given]
    assert lengths == sorted(lengths, reverse=True)  # as they are packed
    for frozen in (True, False):
        alone, want = told(given, 0, frozen)
        for most, count in ((sum(lengths), 1), (lengths[0], 2)):
            batch = reader.batch(given, most)[0]
            assert batch.ids.shape == (count, most)
            assert batch.pictures == (given[0].pictures + given[1].pictures)
            packed, found = told(given, most, frozen)
            torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
            for one, other in zip(found, want, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_prompts_behind_gates_are_seen_by_every_packed_conversation(tiny: Path, conversations: list[Conversation]):
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    reader, given = Reader.of(base, DataConfig(path="-"), Cache()), conversations
    handle = LlamaAdapter(num_tokens=3, layers=2).attach(base.model)
    for parameter in handle.bank.parameters():
        parameter.normal_()
    check_packing(reader, given, handle.plan, 300)
    apart, packed = (reader.logits(reader.batch(given, most)[0], True)[0] for most in (0, 300))
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_packed_is_refused(tiny: Path, conversations: list[Conversation]):
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    reader, given = Reader.of(base, DataConfig(path="-")), conversations
    for method, why in (
        (LanguagePrefix(length=2), "begins every row with what it trains"),
        (LanguagePrompt(length=2), "begins every row with what it trains"),
        (MultimodalLlamaAdapter(num_tokens=2), "shows a row's pictures to all"),
    ):
        with pytest.raises(InputError, match=f"data.packing = 90: this method {why}.*data.packing = 0"):
            check_packing(reader, given, method.plan(base.model), 90)
    forward = base.model.forward
    base.model.forward = lambda position_ids=None, **rest: forward(**rest)
    with pytest.raises(InputError, match="LlavaForConditionalGeneration lets conversations of one row see each other"):
        check_packing(reader, given, (), 90)
    assert together([5, 3, 9, 4, 20], 10) == [[4], [2], [0, 3], [1]]
