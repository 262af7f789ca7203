"""`graft doctor`."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from graft.studio.commands import Answer, command

OPTIONAL = {
    "timm": ("adapting vision transformers", "vision"),
    "open_clip": ("adapting open_clip models", "vlm"),
    "peft": ("comparing with peft", "dev"),
    "xformers": ("memory-saving attention on a GPU", "gpu"),
}
"""Library -> (what it is for, the extra that brings it)."""
SPACE = 2 * 10**9
"""Bytes free below which a warning is due."""


def add(commands: Any) -> None:
    """Add the command."""
    command(commands, "doctor", doctor, "check this machine: versions, devices, space, embedded models")


def doctor(args: argparse.Namespace) -> Answer:
    """Facts, and what is missing with its remedy; the exit code is 1 if something needed is missing."""
    from graft.studio.runs.folder import environment

    facts = {**environment(), **_threads(), "disk": _disk(), "pocket": _pocket()}
    problems = list(_problems(facts))
    optional = [
        {"what": name, "for": use, "remedy": f'pip install "graft-studio[{extra}]"'}
        for name, (use, extra) in OPTIONAL.items()
        if find_spec(name) is None
    ]
    document = {"ok": not problems, **facts, "problems": problems, "optional": optional}
    return Answer(document, _text(document), 1 if problems else 0)


def _threads() -> dict[str, Any]:
    import torch

    return {"threads": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}


def _disk() -> dict[str, Any]:
    from graft.studio.pocket.models import cache_root

    root = cache_root()
    there = next(path for path in (root, *root.parents) if path.exists())
    free = {"here": shutil.disk_usage(Path.cwd()).free, "cache": shutil.disk_usage(there).free}
    return {"cache": str(root), "writable": os.access(there, os.W_OK), "free_bytes": free}


def _pocket() -> list[dict[str, Any]]:
    from graft.studio.pocket.commands import list_models

    return list_models()


def _problems(facts: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield what keeps the main job from running."""
    for name, version in facts["libraries"].items():
        if version is None:
            yield {"what": f"{name} is not installed", "remedy": "pip install graft-studio"}
    for model in facts["pocket"]:
        if not model["present"]:
            yield {
                "what": f"{model['name']} has no weights",
                "remedy": "Install the package again, or graft pocket train",
            }
    if not facts["disk"]["writable"]:
        yield {"what": f"{facts['disk']['cache']} cannot be written", "remedy": "Set GRAFT_CACHE to another folder"}
    for where, free in facts["disk"]["free_bytes"].items():
        if free < SPACE:
            yield {"what": f"{free / 1e9:.1f} GB free ({where})", "remedy": "Free some space"}


def _text(document: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in document["libraries"].items())
    free = ", ".join(f"{size / 1e9:.1f} GB ({where})" for where, size in document["disk"]["free_bytes"].items())
    pocket = ", ".join(f"{m['name']} {m.get('hash', 'missing')[:12]}" for m in document["pocket"])
    lines = [
        f"python     {document['python']} on {document['platform']}",
        f"libraries  {libraries}",
        f"devices    {', '.join(document['accelerators']) or 'cpu only'}; {document['threads']} threads of "
        f"{document['cores']} cores",
        f"space      {free}",
        f"models     {pocket}",
        *(f"optional   {o['what']} for {o['for']}: {o['remedy']}" for o in document["optional"]),
        *(f"MISSING    {problem['what']}. {problem['remedy']}" for problem in document["problems"]),
    ]
    return "\n".join([*lines, "all is well" if document["ok"] else "something is missing"])
