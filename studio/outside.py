"""Does an adapter do in the library that it is written for what it does here?

The same input goes three times through the same model: as it is, with the adapter attached here, and with the file that
the other library loads itself. With outputs p, x and y of the three

    change = || x - p || / || p ||,    error = || y - x || / || x - p ||

An error of some percent is a file that was not read whole, or read with another strength; that of rounding in float32
is far below one.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.studio.errors import InputError

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter

TOLERANCE = 0.01
"""Largest error of a file that does the same."""
REFUSALS = (ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)
"""What libraries raise on files that they do not take."""
_PEFT = "adapter_config.json"


def likeness(plain: Tensor, ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """`change`, `error`, and whether that is `same`; without a change the error is that of the outputs."""
    moved = float((ours - plain).norm())
    error = float((theirs - ours).norm()) / (moved or float(plain.norm()))
    return {"change": moved / float(plain.norm()), "error": error, "same": error <= TOLERANCE}


def refusal(error: Exception) -> dict[str, Any]:
    """What a library says of a file that it does not load."""
    return {"refused": (str(error).strip().splitlines() or [type(error).__name__])[0], "same": False}


@torch.no_grad()
def compare_in_peft(
    base: Any, adapter: Adapter, source: Path | None, run: Callable[[Any], Tensor]
) -> dict[str, Any] | str:
    """Compares with peft, which loads the adapter's file into a copy of the model: it leaves traces in what it was in.

    Args:
        base: of the adapter; nothing is attached.
        adapter: to compare.
        source: the file it was read from, which peft reads too if it is one of peft's; else one is written.
        run: outputs of a model, or of what peft makes of it.

    Returns:
        `library`, `file`, `change`, `error` and `same`, or `refused`, peft's message; or why nothing is compared.
    """
    try:
        from peft import PeftModel
    except ModuleNotFoundError:
        return "peft, for which it is written, is not installed"
    with tempfile.TemporaryDirectory() as written:
        folder = Path(written)
        if source is not None and (source / _PEFT).is_file():
            folder = source
        elif source is not None and (source.parent / _PEFT).is_file():
            folder = source.parent
        else:
            try:
                adapter.export(folder, "peft")
            except InputError as error:
                return str(error)
        plain = run(base.model)
        with adapter.attached(base):
            ours = run(base.model)
        told = {"library": "peft", "file": "adapter_model.safetensors"}
        try:
            found = run(PeftModel.from_pretrained(copy.deepcopy(base.model), folder).eval())
        except REFUSALS as error:
            return told | refusal(error)
    return told | likeness(plain, ours, found)
