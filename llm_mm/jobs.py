"""From a job to the task that the loop trains: base, rows, pictures, adapter; all checked before the first step."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from graft.llm_mm.base import MultimodalBase, load_base
from graft.llm_mm.conversations import Conversation, Turn
from graft.llm_mm.data import DataConfig, Rows, read_rows
from graft.llm_mm.joint import check_joint, kinds
from graft.llm_mm.method import whole_logits
from graft.llm_mm.packing import check_packing
from graft.llm_mm.parts import table
from graft.llm_mm.pictures import PictureStore
from graft.llm_mm.task import LanguageTask, Reader, ways
from graft.studio.bench.measure import saved_bytes
from graft.studio.caches import Cache
from graft.studio.config import from_dict
from graft.studio.errors import DataError, InputError
from graft.studio.registry import method_class

if TYPE_CHECKING:
    from graft.studio.job import Job

log = logging.getLogger(__name__)
PLAIN_TOKENS = 256
"""Tokens up to which plain attention is faster than the fused one in training on a CPU."""


def prepare(job: Job, run_folder: Path | None = None) -> LanguageTask:
    """The task of one job, ready for its first step.

    Raises:
        InputError: anything wrong with base, data or method; nothing has been trained then.
    """
    section = dict(job.method)
    name = str(section.pop("name"))
    method: Any = from_dict(method_class("llm_mm", name), section, "method")
    data = from_dict(DataConfig, dict(job.data), "data")
    rows, old = read_rows(data), read_rows(data.old) if data.old is not None else None
    check_joint(method, rows.train, job)
    base, cache = load_base(job.base, job.train.device, attention=job.train.attention), Cache()
    _ = base.hash  # before anything is attached
    reader = Reader.of(base, data, cache)
    check_sight(base, reader.store)
    longest = max(checked(reader, rows), checked(reader, old) if old is not None else 0)
    if base.device.type == "cpu" and job.train.attention == "auto" and max(longest, data.packing) <= PLAIN_TOKENS:
        base.model.set_attn_implementation("eager")
    looked = {"losses": losses(reader, rows.train)} if getattr(method, "needs_losses", False) else {}
    handle = method.attach(base.model, **looked)
    try:
        if data.packing:
            check_packing(reader, rows.train[:DRY], handle.plan, data.packing)
        handle.reset(0, job.train.seed)
        task = LanguageTask(job, reader, handle, method, data, rows, old)
        dry = DryStep(task)
        handle.probe(dry)
    except BaseException:
        handle.detach()
        raise
    task.facts = _facts(job, task, longest, dry)
    print(task.facts, file=sys.stderr, flush=True)
    return task


def _facts(job: Job, task: LanguageTask, longest: int, dry: DryStep) -> str:
    """What is trained on what, and about how long it takes in how much memory, from the dry step."""
    peak = (job.train.learning_rate or task.default_learning_rate) / task.default_learning_rate
    rates = {part: rate * peak for part, rate in task.rates.items()}
    rows = ", ".join(f"{len(task.rows.part(part)):,} {part}" for part in ("train", "val", "test"))
    old = "none" if task.old is None else f"{len(task.old.train):,}, {task.data.replay:.0%} of a batch"
    share = job.train.batch_size / DRY
    steps = job.train.steps
    minutes = dry.seconds * share * steps * job.train.gradient_accumulation / 60
    slopes = job.train.optimiser != "mezo"  # which keeps neither gradients nor moments nor anything for them
    weights = sum(parameter.nbytes for parameter in task.reader.base.model.parameters())
    learnt = sum(parameter.nbytes for parameter in task.bank.parameters()) * (4 if slopes else 1)
    sizes = {"of weights": weights, "of what is trained, with gradients and moments": learnt}
    sizes["kept for the backward pass"] = round(dry.kept * share) if slopes else 0
    return "\n".join(
        (
            table(task.reader.base.model, task.trained, ways(task.handle, task.trained), rates),
            f"rows: {rows}; old rows: {old}; longest: {longest} tokens",
            f"dry step of {DRY} rows: {dry.seconds:.2f} s; about {minutes:.1f} min for {steps} steps, at most",
            f"memory: about {_mib(sum(sizes.values()))}: {', '.join(f'{_mib(n)} {what}' for what, n in sizes.items())}",
        )
    )


DRY = 4
"""Rows of the dry step."""
LOOKED = 64
"""Rows that a method sees which looks at the data before it is attached."""


def losses(reader: Reader, rows: Sequence[Conversation]) -> Iterator[Tensor]:
    """Gives - log p(answers | all before) by the base, for some rows, evenly spread over all, each by itself."""
    for row in rows[:: -(-len(rows) // LOOKED)]:
        logits, labels = reader.logits(reader.batch([row])[0], frozen_tower=True)
        yield torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


class DryStep:
    """The loss of a few rows, with and without pictures where there are both; remembers what it took.

    Args:
        task: whose first rows are taken.
    """

    kept = 0
    """Bytes that the forward pass keeps for the backward pass, beside weights."""

    def __init__(self, task: LanguageTask):
        self.task, self.calls, self.began = task, 0, time.perf_counter()

    def __call__(self) -> Tensor:
        """Returns the loss."""
        shown, bare = kinds(self.task.rows.train)
        few = [*shown[: DRY // 2 if bare else DRY], *bare[:DRY]]
        batch = self.task.reader.batch((few * DRY)[:DRY], self.task.data.packing)[0]
        losses: list[Tensor] = []
        own = [*self.task.reader.base.model.parameters(), *self.task.bank.parameters()]
        self.kept = saved_bytes(lambda: losses.append(self.task(batch)[0]), own)
        self.calls += 1
        return losses[0]

    @cached_property
    def seconds(self) -> float:
        """Of one pass forward and backward, asked for when all are done."""
        return (time.perf_counter() - self.began) / self.calls


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def checked(reader: Reader, rows: Rows) -> int:
    """Reads every row's tokens once and returns the length of the longest.

    Raises:
        DataError: naming the rows that cannot be used, with what is wrong with each.
    """
    problems, longest, shortened = list[str](), 0, 0
    found: Sequence[Conversation] = [row for part in ("train", "val", "test") for row in rows.part(part)]
    for row in sorted(found, key=lambda row: row.number):
        try:
            for picture in row.pictures:
                reader.store.size(picture)
        except DataError as error:
            problems.append(f"row {row.number}: {error}")
            continue
        try:
            tokens = reader.tokens(row)
        except DataError as error:
            problems.append(str(error))
            continue
        longest = max(longest, len(tokens.ids))
        shortened += tokens.dropped > 0
    if problems:
        shown = [*problems[:20], *([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])]
        reason = "\n  ".join([f"{len(problems)} of {len(found)} rows cannot be used:", *shown])
        raise DataError(rows.where, reason + "\n", "Correct these rows; graft data preview JOB shows them")
    if shortened:
        log.warning("%d of %d rows lose their last turns to data.length = %d", shortened, len(found), reader.length)
    return longest


@torch.no_grad()
def check_sight(base: MultimodalBase, store: PictureStore) -> None:
    """Refuses a model that answers the same whatever it is shown.

    Raises:
        InputError: a black and a white picture give the same logits.
    """
    from graft.llm_mm.conversations import Writer

    writer, shown = Writer(base.processor), [np.full((64, 64, 3), value, np.uint8) for value in (0, 255)]
    told = []
    for number, picture in enumerate(shown):
        row = Conversation(number, (Turn("user", (0, "what is this ?")),), (picture,))
        told.append(whole_logits(base, store, writer.prompt(row, store.expand), row.pictures)[:, -1])
    if float((told[0] - told[1]).abs().max()) <= 1e-6 * float(told[0].abs().max()):
        reason = "a black and a white picture give the same logits: it does not see"
        raise InputError(base.name, reason, "Load weights that fit this version of transformers, or another base")
