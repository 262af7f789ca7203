"""Every format through every kind of chat template, against masks written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import IGNORED, Conversation, Turn, Writer
from graft.llm_mm.data import DataConfig, read_rows
from graft.studio.errors import DataError, InputError

PICTURE = 3
"""Tokens of a picture here."""
LEARNT, READ = "+", "-"

# shape -> sides, as (question, answer) with the pictures of each question
SHAPES: dict[str, list[tuple[int, str, str]]] = {
    "one": [(1, "what is this ?", "red apple")],
    "turns": [(1, "what is this ?", "red apple"), (0, "how many ?", "two")],
    "pictures": [(2, "which is red ?", "this one"), (1, "and here ?", "none")],
    "text": [(0, "is it blue ?", "no"), (0, "is it red ?", "yes")],
    "two": [(2, "which is red ?", "this one")],
    "bare": [(0, "is it blue ?", "no")],
}

# What stands around questions and answers, by hand: (start, before question, behind it, before answer, learnt end,
# behind). An entry is a number of tokens, all masked but the end.
AROUND: dict[str, dict[str, list[str]]] = {
    "pocket": {"start": ["<|startoftext|>"], "ask": [], "asked": [], "say": ["<assistant>"], "end": ["<|endoftext|>"]},
    "chatml": {
        "start": [],
        "ask": ["<|im_start|>", "user"],
        "asked": ["<|im_end|>"],
        "say": ["<|im_start|>", "assistant"],
        "end": ["<|im_end|>"],
    },
    "llama3": {
        "start": ["<|startoftext|>"],
        "ask": ["<|start_header_id|>", "user", "<|end_header_id|>"],
        "asked": ["<|eot_id|>"],
        "say": ["<|start_header_id|>", "assistant", "<|end_header_id|>"],
        "end": ["<|eot_id|>"],
    },
    "vicuna": {
        "start": ["<|startoftext|>"],
        "ask": ["user:"],
        "asked": [],
        "say": ["assistant:"],
        "end": ["<|endoftext|>"],
    },
}


def by_hand(template: str, shape: str, tokenizer: Any) -> tuple[list[int], list[str]]:
    """Ids and marks of a shape, laid out piece by piece."""
    around = AROUND[template]
    ids, marks = list[int](), list[str]()

    def put(words: list[str], mark: str) -> None:
        for word in words:
            found = [tokenizer.convert_tokens_to_ids(word)] if word.startswith("<") else tokenizer(word).input_ids
            ids.extend(found)
            marks.extend(mark * len(found))

    put(around["start"], READ)
    for shown, question, answer in SHAPES[shape]:
        put(around["ask"], READ)
        put(["<image>"] * PICTURE * shown, READ)
        put(question.split(), READ)
        put([*around["asked"], *around["say"]], READ)
        put([*answer.split(), *around["end"]], LEARNT)
    return ids, marks


def written(format: str, shape: str, photos: Callable[[str], Path]) -> Any:
    """A row of a shape in a format."""
    sides, names = SHAPES[shape], list[str]()
    for shown, _, _ in sides:
        names += [photos(f"{len(names) + k}.png").name for k in range(shown)]
    if format == "questions":
        (_, question, answer) = sides[0]
        return {"image": "|".join(names), "question": question, "answer": answer}
    if format == "alpaca":
        row: dict[str, Any] = {"instruction": sides[-1][1], "input": "", "output": sides[-1][2], "images": names}
        if len(sides) > 1:
            row["history"] = [[question, answer] for _, question, answer in sides[:-1]]
        return row
    if format == "messages":
        turns, left = [], iter(names)
        for shown, question, answer in sides:
            parts = [{"type": "image_url", "image_url": {"url": next(left)}} for _ in range(shown)]
            turns.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
            turns.append({"role": "assistant", "content": answer})
        return {"messages": turns}
    turns = []
    for shown, question, answer in sides:
        turns.append({"from": "human", "value": "<image>\n" * shown + question})
        turns.append({"from": "gpt", "value": answer})
    return {"image" if format == "llava" else "images": names, "conversations": turns}


FITTING = {
    "llava": tuple(SHAPES),
    "sharegpt": tuple(SHAPES),
    "messages": tuple(SHAPES),
    "alpaca": ("one", "two", "bare", "text"),
    "questions": ("one", "two", "bare"),
}
"""The shapes that a format has a place for."""


@pytest.mark.parametrize(
    ("format", "shape"), [(format, shape) for format, shapes in FITTING.items() for shape in shapes]
)
@pytest.mark.parametrize("template", AROUND)
def test_masks_are_those_written_by_hand(
    template: str, format: str, shape: str, processors: dict[str, Any], photos: Callable[[str], Path], tmp_path: Path
):
    row = written(format, shape, photos)
    (tmp_path / "data.json").write_text(json.dumps([row]))
    (found,) = read_rows(DataConfig(path=str(tmp_path / "data.json"), validation=0, test=0)).train
    writer = Writer(processors[template])
    tokens = writer.tokens(found, lambda picture: [writer.image_id] * PICTURE)
    ids, marks = by_hand(template, shape, writer.tokenizer)
    assert tokens.ids == ids, writer.tokenizer.convert_ids_to_tokens(tokens.ids)
    assert [LEARNT if label != IGNORED else READ for label in tokens.labels] == marks
    assert all(label in (IGNORED, token) for token, label in zip(tokens.ids, tokens.labels, strict=True))
    assert [tokens.ids[a:b] for a, b in tokens.answers] == [
        [*writer.tokenizer(answer).input_ids, writer.tokenizer.convert_tokens_to_ids(AROUND[template]["end"][0])]
        for _, _, answer in SHAPES[shape]
    ]


@pytest.mark.parametrize("template", AROUND)
def test_what_the_system_says_is_read_and_never_learnt(template: str, processors: dict[str, Any]):
    writer, row = Writer(processors[template]), talk("what is this ?", "red apple", "how many ?", "two")
    told = Conversation(7, (Turn("system", ("none is blue",)), *row.turns))
    plain, found = writer.tokens(row, expand), writer.tokens(told, expand)
    assert len(found.ids) > len(plain.ids)
    for one, other in zip(found.answers, plain.answers, strict=True):
        assert found.ids[slice(*one)] == plain.ids[slice(*other)]
    assert [label for label in found.labels if label != IGNORED] == [x for x in plain.labels if x != IGNORED]


def talk(*sides: str, pictures: int = 0) -> Conversation:
    turns = [Turn("assistant" if k % 2 else "user", (side,)) for k, side in enumerate(sides)]
    turns[0] = Turn("user", (*range(pictures), *turns[0].parts))
    return Conversation(7, tuple(turns), tuple("abc"[:pictures]))


def expand(picture: Any) -> list[int]:
    raise AssertionError("no picture here")


def test_whole_turns_are_dropped_and_pictures_never_cut(processors: dict[str, Any]):
    writer = Writer(processors["pocket"])
    row, image = talk("is it ?", "no", "is it ?", "yes", "is it ?", "no", pictures=1), [writer.image_id] * 10
    whole = writer.tokens(row, lambda picture: image)
    short = writer.tokens(row, lambda picture: image, limit=len(whole.ids) - 1)
    assert short.dropped == 1 and len(short.answers) == 2
    assert short.ids == whole.ids[: len(short.ids)] and short.labels == whole.labels[: len(short.ids)]
    with pytest.raises(DataError, match="row 7: its first answer ends at token .* beyond the limit of 12"):
        writer.tokens(row, lambda picture: image, limit=12)


def test_the_prompt_is_what_stands_before_the_last_answer(processors: dict[str, Any]):
    for name in ("pocket", "chatml", "llama3", "vicuna"):
        writer = Writer(processors[name])
        row = talk("what is this ?", "red apple", "how many ?", "two", pictures=2)
        image = [writer.image_id] * 4
        tokens = writer.tokens(row, dict.fromkeys(row.pictures, image).__getitem__)
        prompt = writer.prompt(row.asking(), dict.fromkeys(row.pictures, image).__getitem__)
        assert tokens.ids[: tokens.answers[-1][0]] == prompt, name


def test_an_end_is_learnt_where_the_template_writes_none(processors: dict[str, Any]):
    """The form of llava-1.5's template: no end mark, and a space of its own before the answer."""
    template = (
        "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<image>\n{% elif m['role'] == 'assistant' %}"
        "{% generation %}{{ p['text'] + ' ' }}{% endgeneration %}{% else %}{{ p['text'] + ' ' }}{% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    words = processors["pocket"].tokenizer
    writer = Writer(type("P", (), {"chat_template": template, "tokenizer": words, "image_token": "<image>"})())
    tokens = writer.tokens(talk("is it ?", "red apple", "is it ?", "no", pictures=1), lambda picture: [writer.image_id])
    learnt = [tokens.ids[a:b] for a, b in tokens.answers]
    assert learnt == [words("red apple").input_ids, [*words("no").input_ids, words.eos_token_id]]


def test_nothing_to_learn_is_refused_with_the_sample(processors: dict[str, Any]):
    writer = Writer(processors["chatml"])
    processor = processors["chatml"]
    silent = talk("is it ?", "no")
    broken = Writer(
        type("P", (), {"chat_template": "{{ messages[0]['content'] }}", "tokenizer": processor.tokenizer})()
    )
    with pytest.raises(InputError, match="differently when more turns follow|no token that would be learnt"):
        broken.tokens(silent, expand)
    with pytest.raises(DataError, match="row 7: its text holds 1 image tokens for 0 pictures"):
        writer.tokens(talk("is it <image> ?", "no"), expand)


@torch.no_grad()
def test_tokens_of_pictures_are_the_processors_own(base: MultimodalBase, photos: Callable[[str], Path]):
    """Ids and pixel values against transformers' processor, which expands pictures in the text."""
    from graft.llm_mm.task import Reader

    row = Conversation(1, (Turn("user", (0, 1, "which is red ?")), Turn("assistant", ("none",))),
                       (str(photos("a.png")), str(photos("b.png"))))  # fmt: skip
    reader = Reader.of(base, DataConfig(path="-"))
    batch, _ = reader.batch([row])
    shown = [reader.store.open(picture) for picture in row.pictures]
    parts = [
        {"type": "image", "image": shown[0]},
        {"type": "image", "image": shown[1]},
        {"type": "text", "text": "which is red ?"},
    ]
    theirs = base.processor.apply_chat_template(
        [[{"role": "user", "content": parts}, {"role": "assistant", "content": "none"}]],
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt",
    )  # fmt: skip
    assert torch.equal(batch.ids, theirs["input_ids"])
    assert torch.equal(batch.labels != IGNORED, torch.as_tensor(theirs["assistant_masks"]).bool())
    assert torch.equal(reader.store.inputs(batch.pictures)["pixel_values"], theirs["pixel_values"])
    whole, labels = reader.logits(batch, frozen_tower=False)
    kept, same = reader.logits(batch, frozen_tower=True)
    torch.testing.assert_close(whole, kept, rtol=1e-4, atol=1e-4)
    assert torch.equal(labels, same) and labels.tolist() == batch.labels[batch.labels != IGNORED].tolist()
