"""Rows with pictures and rows without in one batch, each kind teaching parameters of its own.

The gradient of a parameter is that of the loss of its own kind's rows alone: each kind goes through the model with the
other's parameters held still, and the two losses are added. A method that wants it has `disjoint`, and `learning`,
which holds a part still (`graft.llm_mm.llama_adapter_v2`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graft.studio.errors import DataError, InputError

if TYPE_CHECKING:
    from graft.llm_mm.conversations import Conversation
    from graft.llm_mm.task import Batch
    from graft.studio.job import Job

REMEDY = "or set method.disjoint = false, which lets every row teach all"


def kinds(rows: Sequence[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
    """Returns the rows with pictures, and those without."""
    return [row for row in rows if row.pictures], [row for row in rows if not row.pictures]


def shares(count: int, rows: Sequence[Conversation]) -> tuple[int, int]:
    """Returns how many of a batch's rows have pictures and how many have none, by their share, one of each at least."""
    bare = min(count - 1, max(1, round(count * len(kinds(rows)[1]) / len(rows))))
    return count - bare, bare


def parted(batch: Batch, image_id: int) -> dict[str, Batch]:
    """Returns the rows of a batch by what they teach, "captions" those with pictures, "instructions" those without."""
    shown = (batch.ids == image_id).any(1)
    found = {}
    for part, rows, pictures in (("captions", shown, batch.pictures), ("instructions", ~shown, ())):
        if bool(rows.any()):
            found[part] = type(batch)(batch.ids[rows], batch.labels[rows], batch.mask[rows], pictures)
    return found


def check_joint(method: Any, rows: Sequence[Conversation], job: Job) -> None:
    """Refuses a training in which a kind of rows is missing, or cannot teach its part alone.

    Raises:
        DataError: all rows have pictures, or none has.
        InputError: batches of one row, or an optimiser that knows one loss for all.
    """
    if not getattr(method, "disjoint", False):
        return
    shown, bare = kinds(rows)
    if not (shown and bare):
        kind, what = ("no row", "the picture's part") if bare else ("every row", "all but the picture's part")
        reason = f"{kind} to train on has a picture, so nothing would teach {what}"
        raise DataError("method.disjoint = true", reason, f"Put rows with pictures and rows of text together, {REMEDY}")
    if job.train.batch_size < 2:
        reason = "a batch holds rows with pictures and rows without"
        raise InputError(f"train.batch_size = {job.train.batch_size}", reason, f"Set 2 or more, {REMEDY}")
    if job.train.optimiser == "mezo":
        reason = "it moves all parameters by one loss, and method.disjoint gives each part its own"
        raise InputError("train.optimiser = 'mezo'", reason, f"Use adamw, {REMEDY}")
