"""Choosing among several adapters the one that finds an input least surprising.

Andrea Madotto, Zhaojiang Lin, Zhenpeng Zhou, Seungwhan Moon, Paul Crook, Bing Liu, Zhou Yu, Eunjoon Cho, Zhiguang Wang:
Continual Learning in Task-Oriented Dialogue Systems, 2020, arXiv:2012.15504 (AdapterCL).

    chosen = argmin over adapters t of  exp(- mean over words of log p_t(word | words before))

One adapter is trained for each task, and at inference nobody says which task an input belongs to. An adapter that was
trained on answers alone has never learnt to expect its questions; as in the authors' code, those that are to be chosen
from learn both (``data.learn = "all"``). Any method will do, not the authors' bottlenecks alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import Conversation, Turn
from graft.llm_mm.data import DataConfig, read_rows
from graft.llm_mm.method import model_inputs
from graft.llm_mm.previews import answered
from graft.llm_mm.task import Reader
from graft.studio.slots import Handle

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter

log = logging.getLogger(__name__)


@torch.no_grad()
def perplexity(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Returns the perplexity of each row of a batch, (b,).

    Args:
        model: a language model of transformers.
        inputs: what the model is called with: `input_ids` (b, n), `attention_mask`, pictures. Words that the mask lets
            through count, but for the first one, and no placeholders of pictures.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    counts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if (picture := getattr(model.config, "image_token_id", None)) is not None:
        counts = counts & (ids != picture)
    counts = counts[:, 1:] & (mask[:, :-1].bool() if mask is not None else True)
    logits = model(**inputs).logits[:, :-1].float()
    loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (b, n - 1)
    return ((loss * counts).sum(1) / counts.sum(1).clamp(min=1)).exp()


def perplexities(model: Any, handle: Handle, inputs: dict[str, Any]) -> Tensor:
    """Returns `perplexity` under each slot of an attached handle, (b, slots); the route stays as it was."""
    before, found = handle.routed, []
    try:
        for slot in range(handle.slots):
            handle.route(inputs["input_ids"].new_full((len(inputs["input_ids"]),), slot))
            found.append(perplexity(model, inputs))
    finally:
        handle.route(before)
    return torch.stack(found, 1)


def route_by_perplexity(model: Any, handle: Handle, inputs: dict[str, Any]) -> Tensor:
    """Routes each row of a batch to the slot under which it has the lowest perplexity, and returns the route, (b,)."""
    route = perplexities(model, handle, inputs).argmin(1)
    handle.route(route)
    return route


def perplexity_by_adapter(
    base: MultimodalBase, adapters: Mapping[str, Adapter], rows: Sequence[Conversation], batch_size: int = 16
) -> list[dict[str, float]]:
    """Returns the perplexity of each conversation that ends with a question, by the names of the adapters.

    Raises:
        BaseMismatchError: an adapter of another base.
    """
    found = [dict[str, float]() for _ in rows]
    for name, adapter in adapters.items():
        if len(adapters) > 1 and adapter.card.details.get("learn") != "all":
            log.warning("%s has learnt answers alone, so its perplexity tells little: data.learn = 'all'", name)
        reader = _reader(base, adapter)
        with adapter.attached(base):
            for start in range(0, len(rows), batch_size):
                part = slice(start, start + batch_size)
                inputs = _prompts(reader, [_spoken_to(adapter, row) for row in rows[part]])
                for each, value in zip(found[part], perplexity(base.model, inputs).tolist(), strict=True):
                    each[name] = value
    return found


def answer_by_perplexity(
    base: MultimodalBase, adapters: Mapping[str, Adapter], rows: Sequence[Conversation], tokens: int = 32
) -> list[dict[str, Any]]:
    """Answers each conversation with the adapter that finds it least surprising.

    Args:
        base: the adapters' own.
        adapters: by any names; each reads a conversation as it was trained to.
        rows: conversations that end with a question.
        tokens: most of an answer.

    Returns:
        For each row `question`, `chosen` (the adapter's name), `answer`, and `perplexity` by name.

    Raises:
        BaseMismatchError: an adapter of another base.
    """
    found = perplexity_by_adapter(base, adapters, rows)
    chosen, answers = [min(each, key=each.__getitem__) for each in found], [""] * len(rows)
    for name, adapter in adapters.items():
        own = [k for k, each in enumerate(chosen) if each == name]
        with adapter.attached(base) if own else nullcontext():
            said = answered(_reader(base, adapter), [_spoken_to(adapter, rows[k]) for k in own], tokens)
        for k, answer in zip(own, said, strict=True):
            answers[k] = answer
    return [
        {"question": row.turns[-1].text, "chosen": name, "answer": answer, "perplexity": each}
        for row, name, answer, each in zip(rows, chosen, answers, found, strict=True)
    ]


def chat_by_perplexity(
    base: MultimodalBase,
    adapters: Mapping[str, Adapter],
    pictures: Sequence[Any],
    questions: Sequence[str],
    tokens: int = 32,
) -> list[dict[str, Any]]:
    """Asks questions as one conversation; before each answer an adapter is chosen anew, by all that was said so far.

    Returns:
        What `answer_by_perplexity` does, for each question.
    """
    turns, rows = list[Turn](), list[dict[str, Any]]()
    for k, question in enumerate(questions):
        turns.append(Turn("user", (*(range(len(pictures)) if k == 0 else ()), question)))
        row = Conversation(k + 1, tuple(turns), tuple(pictures))
        rows += answer_by_perplexity(base, adapters, [row], tokens)
        turns.append(Turn("assistant", (rows[-1]["answer"] or " ",)))
    return rows


def file_by_perplexity(
    base: MultimodalBase, adapters: Mapping[str, Adapter], path: str, tokens: int = 32
) -> list[dict[str, Any]]:
    """Asks the last question of every row of a file.

    Args:
        base: the adapters' own.
        adapters: by any names.
        path: a file, as `[data] path` of a job.
        tokens: most of an answer.

    Returns:
        What `answer_by_perplexity` does, and `right`, what the row says.

    Raises:
        DataError: anything wrong with the file.
    """
    found = read_rows(DataConfig(path=path))
    rows = sorted((*found.train, *found.val, *found.test), key=lambda row: row.number)
    told = answer_by_perplexity(base, adapters, [row.asking() for row in rows], tokens)
    return [{**each, "right": row.answers[-1]} for each, row in zip(told, rows, strict=True)]


def _spoken_to(adapter: Adapter, row: Conversation) -> Conversation:
    """The conversation with what the system said in an adapter's training, if it says nothing itself."""
    system = str(adapter.card.details.get("system") or "")
    if not system or row.turns[0].role == "system":
        return row
    return replace(row, turns=(Turn("system", (system,)), *row.turns))


def _reader(base: MultimodalBase, adapter: Adapter) -> Reader:
    """Reads conversations as an adapter was trained to."""
    details = adapter.card.details
    known = {key: str(details[key]) for key in ("fit", "background") if details.get(key)}
    return Reader.of(base, DataConfig(path="-", **known))  # type: ignore[arg-type]


def _prompts(reader: Reader, rows: Sequence[Conversation]) -> dict[str, Any]:
    """What the model is called with for conversations up to where an answer begins, padded at their ends."""
    ids = [torch.tensor(reader.writer.prompt(row, reader.store.expand)) for row in rows]
    mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    shown = [row.pictures[part] for row in rows for turn in row.turns for part in turn.parts if isinstance(part, int)]
    device = reader.base.device
    padded = pad_sequence(ids, batch_first=True, padding_value=reader.writer.tokenizer.pad_token_id or 0)
    return model_inputs(reader.base, padded.to(device), mask.to(device), reader.store.inputs(shown))
