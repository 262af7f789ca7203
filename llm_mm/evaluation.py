"""How well questions about pictures are answered, and whether the pictures are read at all.

*Exact match* counts answers that are right to the letter, end mark included: every token of the right answer is the
likeliest one after those before it, which is the case where greedy decoding writes it. *Choice accuracy* takes the
likeliest of the answers offered. Yes/no questions are counted as by POPE (Li et al., Evaluating Object Hallucination in
Large Vision-Language Models, 2023, arXiv:2305.10355): the likelier word of the two; precision, recall and F1 of "yes",
and how often it is said. Later turns of a conversation see the right answers before them.

Two controls stand beside: every question with the picture of another row (`rotated`), and with a grey one (`blank`).
What is right then was guessed. Old data, if a run has some, are asked too: what falls there was forgotten.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import Conversation
from graft.llm_mm.data import DataConfig, read_rows
from graft.llm_mm.parts import part_of
from graft.llm_mm.task import Reader
from graft.studio.caches import Cache
from graft.studio.config import require
from graft.studio.errors import InputError

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter
    from graft.studio.runs import Run

log = logging.getLogger(__name__)
GREY = np.full((64, 64, 3), 128, np.uint8)
Control = Literal["", "rotated", "blank"]


@dataclass(frozen=True)
class EvaluationConfig:
    """What `evaluate` measures on. `graft eval` fills in what the run's data section says."""

    path: str = ""
    """File of conversations or questions, as in `[data]`."""
    dataset: str = ""
    """Instead of a path, a built-in set."""
    format: Literal["auto", "llava", "sharegpt", "messages", "alpaca", "questions"] = "auto"
    """Of the file."""
    images: str = ""
    """Folder that pictures are named in."""
    part: Literal["test", "val", "train", "all"] = "test"
    """Which rows; "all" for a file that is for measuring only."""
    validation: float = 0.1
    """As in the run's data section, so that the same rows are put aside."""
    test: float = 0.1
    """As in the run's data section."""
    seed: int = 0
    """As in the run's data section."""
    length: int = 2048
    """Most tokens of a row."""
    fit: Literal["crop", "pad"] = "crop"
    """As in training."""
    background: str = "white"
    """What transparent pictures are laid on."""
    system: str = ""
    """What the system says."""
    replay_path: str = ""
    """File of old data, to see what was forgotten."""
    replay_dataset: str = ""
    """Instead, a built-in set."""
    rows: int = 0
    """Most rows of each set; 0 takes all."""
    batch_size: int = 32
    """Rows in a forward pass."""

    def __post_init__(self) -> None:
        require("eval.rows", self.rows, self.rows >= 0, "0 or more")
        require("eval.batch_size", self.batch_size, self.batch_size >= 1, "1 or more")

    @property
    def data(self) -> DataConfig:
        """The same as a data section."""
        named = {field.name for field in fields(DataConfig)}
        return DataConfig(**{f.name: getattr(self, f.name) for f in fields(self) if f.name in named})


def evaluation_settings(adapter: Adapter, run: Run | None, path: str | None = None) -> dict[str, Any]:
    """What `graft eval` measures an adapter on: what the run's data section and `[eval]` say, or all rows of another
    file, read as the adapter's card says that it was trained."""
    details = adapter.card.details
    card: dict[str, Any] = {key: details[key] for key in ("fit", "background", "system") if key in details}
    if run is None:
        return {**card, "path": path or ""}
    known = {field.name for field in fields(EvaluationConfig)}
    told = {key: value for key, value in run.job.data.items() if key in known}
    if path:
        kept: dict[str, Any] = {k: told[k] for k in ("fit", "background", "system", "length") if k in told}
        return {**card, **run.job.eval, **kept, "path": path, "part": "all"}
    return {**card, **told, **run.job.eval}


def evaluate(base: MultimodalBase, adapter: Adapter | None, settings: EvaluationConfig) -> dict[str, Any]:
    """Measures an adapter, or the base, on rows that were not trained on.

    Args:
        base: the adapter's own.
        adapter: None measures the base.
        settings: the rows.

    Returns:
        `exact`, `rotated`, `blank` and `questions`; `choice`, `yes_no`, `precision`, `recall`, `f1` and `yes_rate`
        where there are such questions; `exact NAME` of each kind, and `old` and `old rotated` of old data.

    Raises:
        InputError: no rows, or none of that part.
    """
    data = settings.data
    reader = Reader.of(base, data, Cache())
    asked = _asked(data, settings)
    sites = adapter.card.sites if adapter is not None else []
    frozen = all(part_of(site["name"]) in ("projector", "language") for site in sites)
    with adapter.attached(base) if adapter is not None else nullcontext():
        figures = measured(reader, asked, frozen, settings.batch_size)
        if data.old is not None:
            old = _asked(data.old, settings)
            for name, control in (("old", ""), ("old rotated", "rotated")):
                figures[name] = exact_match(reader, old, control, frozen, settings.batch_size)  # type: ignore[arg-type]
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}


def _asked(data: DataConfig, settings: EvaluationConfig) -> Sequence[Conversation]:
    found = read_rows(data)
    rows = (*found.train, *found.val, *found.test) if settings.part == "all" else found.part(settings.part)
    if not rows:
        reason = f"no row is in the part {settings.part!r}"
        raise InputError(found.where, reason, "Put data.test above 0, or give --data FILE")
    return rows[: settings.rows or None]


def measured(
    reader: Reader, rows: Sequence[Conversation], frozen_tower: bool = True, batch_size: int = 32
) -> dict[str, Any]:
    """All figures of some rows by one model; see `evaluate`. Turns that ``data.length`` leaves out are not asked."""
    reader, rows = _fitting(reader, rows)
    single = [each for row in rows for each in row.split()]
    hits = [hit for row in _hits(reader, rows, frozen_tower, batch_size) for hit in row]
    figures: dict[str, Any] = {"exact": _mean(hits)}
    for control in ("rotated", "blank"):
        figures[control] = exact_match(reader, rows, control, frozen_tower, batch_size)  # type: ignore[arg-type]
    figures["questions"] = len(hits)
    choosing = [row for row in single if len(row.choices) > 1 and row.answers[-1] in row.choices]
    if choosing:
        figures["choice"] = _mean([chosen(reader, row, frozen_tower) == row.answers[-1] for row in choosing])
    binary = [row for row in single if _plain(row.answers[-1]) in ("yes", "no")]
    if binary:
        figures |= yes_no(reader, binary, frozen_tower, batch_size)
    kinds = sorted({row.kind for row in rows if row.kind})
    if len(kinds) > 1:
        of_kind = [row.kind for row in single]
        pairs = list(zip(hits, of_kind, strict=True))
        figures |= {f"exact {kind}": _mean([hit for hit, of in pairs if of == kind]) for kind in kinds}
    return figures


def exact_match(
    reader: Reader, rows: Sequence[Conversation], control: Control = "", frozen_tower: bool = True, batch_size: int = 32
) -> float:
    """Share of answers that are right to the letter; under a control, of rows with pictures. NaN without any."""
    reader, rows = _fitting(reader, rows)
    rows = controlled(reader, rows, control)
    return _mean([hit for row in _hits(reader, rows, frozen_tower, batch_size) for hit in row])


def _fitting(reader: Reader, rows: Sequence[Conversation]) -> tuple[Reader, Sequence[Conversation]]:
    """Rows without the turns that do not fit, and a reader that takes all: other answers and pictures may be longer."""
    if not reader.length:
        return reader, rows
    return replace(reader, length=0), [row.split()[len(reader.tokens(row).answers) - 1] for row in rows]


def controlled(reader: Reader, rows: Sequence[Conversation], control: Control) -> Sequence[Conversation]:
    """Rows as they are asked under a control, which leaves out those without pictures."""
    shown = [row for row in rows if row.pictures]
    if control == "blank":
        return [replace(row, pictures=(GREY,) * len(row.pictures)) for row in shown]
    return rotated(reader, shown) if control == "rotated" else rows


def rotated(reader: Reader, rows: Sequence[Conversation]) -> list[Conversation]:
    """Rows with the pictures of others that have as many, none with its own."""
    keys = [tuple(map(reader.store.key, row.pictures)) for row in rows]
    found = []
    for k, row in enumerate(rows):
        others = (j % len(rows) for j in range(k + 1, k + len(rows)))
        other = next((j for j in others if len(keys[j]) == len(keys[k]) and keys[j] != keys[k]), None)
        if other is not None:
            found.append(replace(row, pictures=rows[other].pictures))
    return found


def _mean(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else float("nan")


def _plain(text: str) -> str:
    return text.strip().strip(".!").lower()


@torch.no_grad()
def _hits(reader: Reader, rows: Sequence[Conversation], frozen_tower: bool, batch_size: int) -> list[list[bool]]:
    """Whether each answer of each row is right to the letter."""
    found: list[list[bool]] = []
    for start in range(0, len(rows), batch_size):
        batch, tokens = reader.batch(rows[start : start + batch_size])
        logits, labels = reader.logits(batch, frozen_tower)
        right, place = (logits.argmax(-1) == labels).tolist(), 0
        for each in tokens:
            row = []
            for a, b in each.answers:
                row.append(all(right[place : place + b - a]))
                place += b - a
            found.append(row)
    return found


@torch.no_grad()
def chosen(reader: Reader, row: Conversation, frozen_tower: bool = True) -> str:
    """The likeliest of a row's choices as its last answer, by the mean log-probability of its tokens."""
    batch, tokens = reader.batch([row.answering(choice) for choice in row.choices])
    logits, labels = reader.logits(batch, frozen_tower)
    scores = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    sizes = [sum(b - a for a, b in each.answers) for each in tokens]
    last = [each.answers[-1][1] - each.answers[-1][0] for each in tokens]
    means = [part[-count:].mean() for part, count in zip(scores.split(sizes), last, strict=True)]
    return row.choices[int(torch.stack(means).argmax())]


@torch.no_grad()
def yes_no(
    reader: Reader, rows: Sequence[Conversation], frozen_tower: bool = True, batch_size: int = 32
) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and how often it is said; of rows whose last answer is yes or no."""
    said, truth = list[bool](), [_plain(row.answers[-1]) == "yes" for row in rows]
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        scores = []
        for word in ("yes", "no"):
            written = [row.answering(_like(row.answers[-1], word)) for row in part]
            batch, tokens = reader.batch(written)
            logits, labels = reader.logits(batch, frozen_tower)
            each = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
            sizes = [sum(b - a for a, b in one.answers) for one in tokens]
            last = [one.answers[-1][1] - one.answers[-1][0] for one in tokens]
            scores.append(torch.stack([p[-n:].sum() for p, n in zip(each.split(sizes), last, strict=True)]))
        said += (scores[0] > scores[1]).tolist()
    both = sum(a and b for a, b in zip(said, truth, strict=True))
    return {
        "yes_no": _mean([a == b for a, b in zip(said, truth, strict=True)]),
        "precision": both / sum(said) if any(said) else float("nan"),
        "recall": both / sum(truth) if any(truth) else float("nan"),
        "f1": 2 * both / (sum(said) + sum(truth)) if any((*said, *truth)) else float("nan"),
        "yes_rate": _mean(said),
    }


def _like(answer: str, word: str) -> str:
    """A word written as an answer is: its case and its full stop."""
    word = word.capitalize() if answer[:1].isupper() else word
    return word + "." * answer.strip().endswith(".")
