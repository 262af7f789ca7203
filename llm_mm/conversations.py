"""Conversations about pictures as tokens and labels, made in one pass by the model's own chat template and tokenizer.

The template renders the whole conversation once, and the tokenizer cuts that text once, with the place of each token in
it. What the assistant says, its end mark included, is known as places in the text: from the template's own generation
marks where it has them, else from what it renders up to and including each turn. A token is learnt if it lies there. So
labels are never counted again or searched for, and a picture's tokens are put in whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from graft.studio.errors import DataError, InputError

IGNORED = -100
"""Label of a token that is not learnt."""
_MARKS = re.compile(r"{%-?\s*generation\s*-?%}")
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """What one side says: pieces of text, and numbers that stand for the conversation's pictures."""

    role: Role
    """Who speaks."""
    parts: tuple[str | int, ...]
    """In order."""

    @property
    def text(self) -> str:
        """Its text alone."""
        return " ".join(part.strip() for part in self.parts if isinstance(part, str)).strip()


@dataclass(frozen=True)
class Conversation:
    """One row of a data set."""

    number: int
    """Of the row, counted from 1, for messages."""
    turns: tuple[Turn, ...]
    """User and assistant in turn, perhaps after a system's."""
    pictures: tuple[Any, ...] = ()
    """Paths, or pictures in memory, as the turns number them."""
    kind: str = ""
    """Of question, for figures by kind."""
    choices: tuple[str, ...] = ()
    """Answers to choose from, if the question offers some."""
    part: str = ""
    """train, val or test where the data declare it."""

    @property
    def answers(self) -> tuple[str, ...]:
        """What the assistant says, turn by turn."""
        return tuple(turn.text for turn in self.turns if turn.role == "assistant")

    def answering(self, text: str) -> Conversation:
        """The conversation with another last answer."""
        return replace(self, turns=(*self.turns[:-1], Turn("assistant", (text,))))

    def asking(self) -> Conversation:
        """The conversation up to where its last answer begins."""
        return replace(self, turns=self.turns[:-1])

    def split(self) -> list[Conversation]:
        """One conversation for each answer, with all that was said before it."""
        ends = [k + 1 for k, turn in enumerate(self.turns) if turn.role == "assistant"]
        return [replace(self, turns=self.turns[:end]) for end in ends]


@dataclass(frozen=True)
class Tokens:
    """A conversation as the model reads it."""

    ids: list[int]
    """Of all tokens, a picture's in their place."""
    labels: list[int]
    """The id where a token is learnt, else `IGNORED`."""
    answers: list[tuple[int, int]]
    """Places of each answer, its end mark included."""
    dropped: int = 0
    """Answers that did not fit."""


@dataclass(frozen=True)
class Writer:
    """Turns conversations into tokens, as one processor wants them.

    Args:
        processor: of transformers, with a chat template and a fast tokenizer.

    Raises:
        InputError: there is no template, or the tokenizer cannot tell where its tokens lie.
    """

    processor: Any

    def __post_init__(self) -> None:
        if not self.template:
            remedy = "Set processor.chat_template, or use a base for conversations"
            raise InputError("the base", "its processor has no chat template", remedy)
        if not self.tokenizer.is_fast:
            reason = "its tokenizer does not tell where in the text a token lies"
            raise InputError(type(self.tokenizer).__name__, reason, "Use the base's fast tokenizer")

    @property
    def tokenizer(self) -> Any:
        """Of the processor."""
        return self.processor.tokenizer

    @property
    def template(self) -> str:
        """The chat template."""
        found = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        return found if isinstance(found, str) else (found or {}).get("default", "")

    @property
    def image_token(self) -> str:
        """What stands for a picture in rendered text."""
        return str(getattr(self.processor, "image_token", "<image>"))

    @property
    def image_id(self) -> int:
        """Its id."""
        return int(self.tokenizer.convert_tokens_to_ids(self.image_token))

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """The turns as templates take them: as lists of parts, or as text where that is all that the template knows."""

        def content(turn: Turn, listed: bool) -> Any:
            if not listed:
                pieces = [f"{self.image_token}\n" if isinstance(part, int) else part for part in turn.parts]
                return "".join(pieces)
            image = {"type": "image"}
            return [image if isinstance(part, int) else {"type": "text", "text": part} for part in turn.parts]

        listed = _takes_lists(self.template)
        return [{"role": turn.role, "content": content(turn, listed)} for turn in turns]

    def render(self, turns: Sequence[Turn], prompt: bool = False) -> str:
        """The turns as text; with `prompt`, up to where the assistant would begin."""
        with _refusals():
            text: str = self.tokenizer.apply_chat_template(
                self.messages(turns), chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        return text

    def said(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and from where to where in it the assistant speaks.

        Raises:
            InputError: the template changes what it has written when more follows, or marks some answers alone.
        """
        if _MARKS.search(self.template):
            from transformers.utils.chat_template_utils import render_jinja_template

            with _refusals():
                texts, marked = render_jinja_template(
                    conversations=[self.messages(turns)],
                    chat_template=self.template,
                    return_assistant_tokens_mask=True,
                    **self.tokenizer.special_tokens_map,
                )
            answers = sum(turn.role == "assistant" for turn in turns)
            if len(marked[0]) != answers:
                reason = f"the chat template marks {len(marked[0])} of a conversation's {answers} answers"
                remedy = "Put {% generation %} and {% endgeneration %} around every answer in it"
                raise InputError("the base", reason, remedy)
            return texts[0], [(int(start), int(end)) for start, end in marked[0]]
        text, places = self.render(turns), []
        for k, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before, through = self.render(turns[:k], prompt=True), self.render(turns[: k + 1])
            if not (through.startswith(before) and text.startswith(through)):
                reason = "the chat template writes a turn differently when more turns follow"
                remedy = "Put {% generation %} and {% endgeneration %} around the assistant's words in it"
                raise InputError("the base", reason, remedy)
            places.append((len(before), len(through)))
        return text, places

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered text and the place of each; marks at the start are added where the text has none."""
        begun = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        found = self.tokenizer(text, add_special_tokens=not begun, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"]

    def prompt(self, conversation: Conversation, expand: Callable[[Any], Sequence[int]]) -> list[int]:
        """Ids up to where the assistant's next answer begins."""
        ids, _ = self.encode(self.render(conversation.turns, prompt=True))
        return self._expanded(conversation, ids, [-1] * len(ids), expand)[0]

    def tokens(self, conversation: Conversation, expand: Callable[[Any], Sequence[int]], limit: int = 0) -> Tokens:
        """A conversation's tokens and labels.

        Args:
            conversation: ends with an answer.
            expand: gives the ids that stand for a picture.
            limit: most tokens; whole turns are dropped from the end until they fit. 0 takes all.

        Raises:
            DataError: nothing to learn in it, its first answer does not fit, or its text holds the image token.
        """
        turns, dropped = conversation.turns, 0
        while True:
            found = self._whole(replace(conversation, turns=turns), expand)
            if not limit or len(found.ids) <= limit:
                return replace(found, dropped=dropped)
            ends = [k + 1 for k, turn in enumerate(turns) if turn.role == "assistant"]
            if len(ends) < 2:
                reason = f"its first answer ends at token {len(found.ids)}, beyond the limit of {limit}"
                raise DataError(f"row {conversation.number}", reason, "Raise data.length, or shorten the row")
            turns, dropped = turns[: ends[-2]], dropped + 1

    def _whole(self, conversation: Conversation, expand: Callable[[Any], Sequence[int]]) -> Tokens:
        text, places = self.said(conversation.turns)
        ids, offsets = self.encode(text)
        special = set(self.tokenizer.all_special_ids)
        whose = [-1] * len(ids)
        for answer, (start, end) in enumerate(places):
            # a token may begin with the space before its word, which can be the template's
            inside = [k for k, (a, b) in enumerate(offsets) if a < b and start < b and a < end]
            marks = [k for k in inside if ids[k] in special]
            for k in inside:
                if not marks or k <= marks[-1]:  # a line break behind the end mark is the template's, not an answer's
                    whose[k] = answer
        if not places or set(range(len(places))) - set(whose):
            reason = f"an answer of it has no token that would be learnt: {text!r}"
            raise DataError(f"row {conversation.number}", reason, "Give it an assistant's turn with words in it")
        last = len(whose) - whose[::-1].index(len(places) - 1)
        if ids[last - 1] not in special and self.tokenizer.eos_token_id is not None:
            # the template writes no end mark: without one the model would not learn to stop
            ids, whose = [*ids[:last], self.tokenizer.eos_token_id], [*whose[:last], len(places) - 1]
        ids, whose = self._expanded(conversation, ids, whose, expand)
        labels = [token if answer >= 0 else IGNORED for token, answer in zip(ids, whose, strict=True)]
        last = len(whose)
        ends = [(whose.index(k), last - whose[::-1].index(k)) for k in range(len(places))]
        return Tokens(ids, labels, ends)

    def _expanded(
        self, conversation: Conversation, ids: list[int], whose: list[int], expand: Callable[[Any], Sequence[int]]
    ) -> tuple[list[int], list[int]]:
        """The same with each picture's tokens for its one."""
        parts = [part for turn in conversation.turns for part in turn.parts]
        shown = [conversation.pictures[part] for part in parts if isinstance(part, int)]
        if ids.count(self.image_id) != len(shown):
            reason = f"its text holds {ids.count(self.image_id)} image tokens for {len(shown)} pictures"
            remedy = f"Take {self.image_token} out of its words; each picture gets one by itself"
            raise DataError(f"row {conversation.number}", reason, remedy)
        pictures, out, told = iter(shown), list[int](), list[int]()
        for token, answer in zip(ids, whose, strict=True):
            piece = list(expand(next(pictures))) if token == self.image_id else [token]
            out += piece
            told += [-1 if token == self.image_id else answer] * len(piece)
        return out, told


@contextmanager
def _refusals() -> Iterator[None]:
    """Tells what a chat template says against a conversation, or what is wrong with it itself."""
    try:
        yield
    except Exception as error:  # of jinja2, which transformers writes templates with, if it is there
        if not type(error).__module__.startswith("jinja2"):
            raise
        reason = f"its chat template does not write this conversation ({error})"
        remedy = "Leave out what it has no place for, such as the system's words, or set another template"
        raise InputError("the base", reason, remedy) from error


_LISTS: dict[str, bool] = {}


def _takes_lists(template: str) -> bool:
    """Whether a template takes lists of parts, as those of processors do; found by rendering one."""
    if template not in _LISTS:
        from transformers.utils.chat_template_utils import render_jinja_template

        turns = [{"role": "user", "content": [{"type": "text", "text": "graft"}]}]
        try:
            marks: Mapping[str, str] = {"bos_token": "", "eos_token": "", "pad_token": "", "unk_token": ""}
            texts, _ = render_jinja_template(conversations=[turns], chat_template=template, **marks)
            _LISTS[template] = "graft" in texts[0] and "'type'" not in texts[0]
        except Exception:  # a template raises whatever it likes
            _LISTS[template] = False
    return _LISTS[template]
