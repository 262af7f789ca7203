"""Checkpoints: whole or absent.

A checkpoint is written into a draft folder, its files are synced, a manifest with their hashes goes in last, and the
folder gets its name by one rename. `LATEST` is replaced by rename, too. A reader trusts only what the manifest proves,
so a process killed at any moment costs the steps since the last checkpoint and nothing else. Nothing is pickled: the
optimiser's state is tensors and JSON like everything else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from graft.studio.disk import naming_full_disk, sync_folder, write_atomic, write_synced
from graft.studio.errors import FormatError


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the rest of a training depends on, after `step` steps."""

    step: int
    """Optimiser steps done. Data order, noise and learning rate are functions of it and of the job's seed."""
    model: dict[str, Tensor]
    """Trainable tensors and buffers of the task."""
    optimizer: dict[str, Any]
    """As `torch.optim.Optimizer.state_dict` gives it."""
    extra: dict[str, Any]
    """JSON values: loss scaler, elapsed seconds."""


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint into a run's `checkpoints`, make it the latest, and drop all but the newest `keep`.

    Raises:
        DiskFullError: no space; the checkpoints that were there stay.
    """
    final = folder / f"{checkpoint.step:08d}"
    draft = folder / f".{final.name}-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with naming_full_disk(draft):
            draft.mkdir(parents=True)
        files = _files(checkpoint)
        for name, data in files.items():
            write_synced(draft / name, data)
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        write_synced(draft / "manifest.json", json.dumps(hashes, indent=1).encode())
        sync_folder(draft)
        _remove(final)  # a rewind to an earlier step
        draft.rename(final)
        sync_folder(folder)
        write_atomic(folder / "LATEST", final.name.encode())
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for old in _complete(folder)[:-keep]:
        _remove(old)
    return final


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint whose files match their hashes, or None."""
    if not folder.is_dir():
        return None
    for draft in folder.glob(".*-*"):  # left by a killed process
        shutil.rmtree(draft, ignore_errors=True)
    for path in reversed(_complete(folder)):
        try:
            return read_checkpoint(path)
        except FormatError:
            continue  # damaged after it was written: the one before it is whole
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint; what is returned comes from the very bytes that were checked.

    Raises:
        FormatError: a file is missing or differs from its hash.
    """
    try:
        hashes = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files = {name: (path / name).read_bytes() for name in hashes}
    except (OSError, ValueError) as error:
        raise FormatError(str(path), f"not a whole checkpoint ({error})", "Resume from an earlier one") from error
    damaged = [name for name, value in hashes.items() if hashlib.sha256(files[name]).hexdigest() != value]
    if damaged:
        raise FormatError(str(path), f"{', '.join(damaged)} changed after writing", "Resume from an earlier one")
    rest = json.loads(files["training.json"])
    optimizer = _unflatten(load(files["optimizer.safetensors"]), rest["optimizer"])
    return Checkpoint(rest["step"], load(files["model.safetensors"]), optimizer, rest["extra"])


def _files(checkpoint: Checkpoint) -> dict[str, bytes]:
    tensors, plain = _flatten(checkpoint.optimizer)
    rest = {"step": checkpoint.step, "optimizer": plain, "extra": checkpoint.extra}
    return {
        "model.safetensors": save({name: tensor.contiguous() for name, tensor in checkpoint.model.items()}),
        "optimizer.safetensors": save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}),
        "training.json": json.dumps(rest).encode(),
    }


def _remove(path: Path) -> None:
    """Delete a checkpoint so that no part of it is ever seen under its name."""
    if path.exists():
        gone = path.with_name(f".{path.name}-gone")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _complete(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("[0-9]*/manifest.json"))


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors by name ("3.exp_avg") and JSON values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        plain[str(index)] = {}
        for name, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                plain[str(index)][name] = value
    return tensors, {"state": plain, "param_groups": state["param_groups"]}


def _unflatten(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state = {int(index): dict(entry) for index, entry in plain["state"].items()}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state[int(index)][name] = tensor
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in plain["param_groups"]]
    return {"state": state, "param_groups": groups}
