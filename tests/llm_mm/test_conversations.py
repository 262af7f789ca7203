"""Every format through every kind of chat template, against masks written by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.llm_mm.assembly import TEMPLATE
from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import IGNORED, Conversation, Turn, Writer
from graft.llm_mm.data import DataConfig, Rows, read_rows
from graft.llm_mm.jobs import checked
from graft.llm_mm.pictures import PictureStore
from graft.llm_mm.task import Reader
from graft.studio.errors import DataError, InputError
from graft.studio.pocket import models

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if m['content'] is string %}{{ m['content'] | trim }}"
    "{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN_VL = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<|vision_start|><image><|vision_end|>{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }} "
    "{% elif m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% else %}ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Takes text only, as those of language models do."""
MARKS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "vicuna": (),
    "pocket": (),
}
TEMPLATES = {"pocket": "", "chatml": CHATML, "llama3": LLAMA3, "vicuna": VICUNA}
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


@pytest.fixture(scope="session")
def processors() -> dict[str, Any]:
    """Processors by the kind of their template."""
    made = {}
    for name, template in TEMPLATES.items():
        processor = models.llava_processor()
        if template:
            processor.tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS[name])})
            processor.chat_template = template
        made[name] = processor
    return made


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
        marked = [("<image>" * shown * (len(names) > 1) + question, answer) for shown, question, answer in sides]
        row: dict[str, Any] = {"instruction": marked[-1][0], "input": "", "output": marked[-1][1], "images": names}
        return row | ({"history": [list(side) for side in marked[:-1]]} if len(sides) > 1 else {})
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
    "alpaca": tuple(SHAPES),
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


class Spelt:
    """A processor whose tokens are single characters, spaces and line breaks too, but for marks and a word.

    Args:
        template: of conversations.
        marks: tokens of their own.
    """

    image_token = "<image>"

    def __init__(self, template: str, marks: tuple[str, ...]):
        from tokenizers import Tokenizer
        from tokenizers.decoders import ByteLevel as Spelling
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel
        from transformers import PreTrainedTokenizerFast

        merges = [("\u0120", "r"), ("\u0120r", "e"), ("\u0120re", "d")]  # " red", with the space before it
        letters = [*sorted(ByteLevel.alphabet()), *map("".join, merges)]
        spelt = Tokenizer(BPE(vocab={letter: k for k, letter in enumerate(letters)}, merges=merges))
        spelt.pre_tokenizer, spelt.decoder = ByteLevel(add_prefix_space=False), Spelling()
        self.chat_template = template
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=spelt, bos_token="<|startoftext|>", eos_token="<|endoftext|>"
        )
        self.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *marks]})


BETWEEN: dict[str, tuple[str, ...]] = {
    # template, start, before a question, a picture, behind a question, before an answer (learnt), its end, behind it
    "chatml": (CHATML, "", "<|im_start|>user\n", "*", "<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>", "\n"),
    "llama3": (
        LLAMA3, "<|startoftext|>", "<|start_header_id|>user<|end_header_id|>\n\n", "*",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>", "",
    ),
    "vicuna": (VICUNA, "<|startoftext|>", "USER: ", "*\n", " ASSISTANT:", " ", "<|endoftext|>", ""),
    "qwen-vl": (
        QWEN_VL, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", "<|im_start|>user\n",
        "<|vision_start|>*<|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>", "\n",
    ),
    "gemma": (
        GEMMA, "<|startoftext|>", "<start_of_turn>user\n", "*", "<end_of_turn>\n<start_of_turn>model\n", "",
        "<end_of_turn>", "\n",
    ),
    "mistral": (MISTRAL, "<|startoftext|>", "[INST] ", "*\n", " [/INST]", " ", "<|endoftext|>", ""),
    "from parts": (TEMPLATE, "<|startoftext|>", "USER: ", "*\n", " ASSISTANT:", " ", "<|endoftext|>", ""),
}  # fmt: skip
"""What stands in a conversation by each template, written by hand; `*` are the tokens of a picture."""
SPECIAL = re.compile(r"(<[^<>]*>)")


@pytest.mark.parametrize(
    ("format", "shape"), [(format, shape) for format, shapes in FITTING.items() for shape in shapes]
)
def test_masks_are_right_to_the_space_and_the_line_break(
    format: str, shape: str, photos: Callable[[str], Path], tmp_path: Path, spelt: dict[str, Writer]
):
    """Where these are tokens: those of the template are not learnt, but for the one that an answer begins with."""
    (tmp_path / "data.json").write_text(json.dumps([written(format, shape, photos)]))
    (row,) = read_rows(DataConfig(path=str(tmp_path / "data.json"), validation=0, test=0)).train
    for name, (_, start, ask, picture, asked, say, end, behind) in BETWEEN.items():
        writer = spelt[name]
        pieces = [(start, READ)]
        for shown, question, answer in SHAPES[shape]:
            pictures = picture.replace("*", "<image>" * PICTURE) * shown
            pieces += [(ask + pictures + question + asked, READ), (say + answer + end, LEARNT), (behind, READ)]
        words = [(word, mark) for piece, mark in pieces for word in SPECIAL.split(piece) if word]
        encoded = [(writer.tokenizer(word, add_special_tokens=False).input_ids, mark) for word, mark in words]
        image = [writer.image_id] * PICTURE
        found = writer.tokens(row, dict.fromkeys(row.pictures, image).__getitem__)
        assert found.ids == [token for ids, _ in encoded for token in ids], writer.tokenizer.decode(found.ids)
        marks = "".join(mark * len(ids) for ids, mark in encoded)
        told = "".join(READ if label == IGNORED else LEARNT for label in found.labels)
        assert told == marks, [writer.tokenizer.decode(found.ids[a:b]) for a, b in found.answers]


@pytest.fixture(scope="module")
def spelt() -> dict[str, Writer]:
    """Writers by the name of their template."""
    return {
        name: Writer(Spelt(template, tuple({mark for text in rest for mark in SPECIAL.findall(text)})))
        for name, (template, *rest) in BETWEEN.items()
    }


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


def test_no_limit_cuts_a_picture_or_a_turn(spelt: dict[str, Writer]):
    row = Conversation(
        7,
        tuple(
            Turn("assistant" if k % 2 else "user", parts)
            for k, parts in enumerate(((0, "which ?", 1), ("one",), (2, "and here ?"), ("none",), ("sure ?",), ("no",)))
        ),
        ("a", "b", "c"),
    )
    for writer in spelt.values():

        def image(picture: Any, writer: Writer = writer) -> list[int]:
            return [writer.image_id] * PICTURE

        wholes = [writer.tokens(each, image) for each in row.split()]
        for limit in (len(whole.ids) + more for whole in wholes for more in (-1, 0, 1)):
            fits = [whole for whole in wholes if len(whole.ids) <= limit]
            if not fits:
                with pytest.raises(DataError, match=f"row 7: its first answer ends .* beyond the limit of {limit}"):
                    writer.tokens(row, image, limit)
                continue
            found = writer.tokens(row, image, limit)
            assert (found.ids, found.labels, found.answers) == (fits[-1].ids, fits[-1].labels, fits[-1].answers)
            assert found.dropped == 3 - len(fits)
            assert found.ids.count(writer.image_id) == PICTURE * (2 if len(fits) == 1 else 3)


def test_pictures_of_dropped_turns_are_not_shown(base: MultimodalBase, photos: Callable[[str], Path]):
    shown = (str(photos("a.png")), str(photos("b.png")))
    first, second = (Turn("user", (k, "is it ?")) for k in (0, 1))
    row = Conversation(1, (first, Turn("assistant", ("no",)), second, Turn("assistant", ("yes",))), shown)
    whole = Reader.of(base, DataConfig(path="-"))
    length = len(whole.tokens(row).ids)
    assert whole.batch([row])[0].pictures == shown
    batch, _ = Reader.of(base, DataConfig(path="-", length=length - 1)).batch([row])
    assert batch.pictures == shown[:1] and torch.isfinite(whole.logits(batch, False)[0]).all()


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


def test_templates_that_do_not_write_a_conversation_say_so(processors: dict[str, Any]):
    words = processors["chatml"].tokenizer
    told = Conversation(1, (Turn("system", ("be short .",)), *talk("is it ?", "no").turns))
    gemma = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    for template, why in (
        (gemma + CHATML, r"\(System role not supported\).*Leave out .*the system's words"),
        ("{% generation %}{% endgeneration %}" + gemma, r"\(System role not supported\)"),
        ("{% for m in messages %}", "does not write this conversation .*end of template"),
    ):
        writer = Writer(type("P", (), {"chat_template": template, "tokenizer": words})())
        with pytest.raises(InputError, match=why):
            writer.tokens(told, expand)
    with pytest.raises(InputError, match="its processor has no chat template. Set processor.chat_template"):
        Writer(type("P", (), {"chat_template": None, "tokenizer": type("T", (), {"chat_template": None})()})())


def test_nothing_to_learn_is_refused_with_the_sample(processors: dict[str, Any], base: MultimodalBase):
    words = processors["chatml"].tokenizer

    def by(template: str) -> Writer:
        return Writer(type("P", (), {"chat_template": template, "tokenizer": words})())

    with pytest.raises(InputError, match="writes a turn differently when more turns follow"):
        by("{{ messages | length }} {{ messages[0]['content'] }}").tokens(talk("is it ?", "no"), expand)
    last = (  # marks the last answer alone
        "{% for m in messages %}{% if loop.last %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    )
    with pytest.raises(InputError, match="the chat template marks 1 of a conversation's 2 answers.*every answer"):
        by(last).tokens(talk("is it ?", "no", "is it ?", "yes"), expand)
    silent = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% generation %}{% endgeneration %}"
    for template in ("{{ messages[0]['content'] }}", silent):
        with pytest.raises(DataError, match="row 7: an answer of it has no token that would be learnt: 'is it"):
            by(template).tokens(talk("is it ?", "no"), expand)
    reader = Reader(base, PictureStore(base), by("{{ messages[0]['content'] }}"))
    rows = Rows("rows.json", Path(), (talk("is it ?", "no"), talk("how many ?", "two")), (), ())
    with pytest.raises(DataError, match=r"(?s)2 of 2 rows cannot be used.*row 7: .*'is it .*row 7: .*'how many "):
        checked(reader, rows)
    writer = Writer(processors["chatml"])
    with pytest.raises(DataError, match="row 7: its text holds 1 image tokens for 0 pictures"):
        writer.tokens(talk("is it <image> ?", "no"), expand)


@torch.no_grad()
def test_tokens_of_pictures_are_the_processors_own(base: MultimodalBase, photos: Callable[[str], Path]):
    """Ids and pixel values against transformers' processor, which expands pictures in the text."""
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
