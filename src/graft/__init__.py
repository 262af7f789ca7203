"""Graft Studio: adapt frozen foundation models and preview the result."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if not (Path(__file__).parent / "studio").is_dir():
    # A checkout without symbolic links (Windows) holds the seven folders two levels up.
    __path__.append(str(Path(__file__).parents[2]))

# Public name -> module that defines it. Resolved on first use: `import graft` must not import torch.
_PUBLIC = {
    "Adapter": "graft.studio.adapter",
    "Job": "graft.studio.job",
    "Run": "graft.studio.runs",
    "estimate": "graft.studio.training",
    "load_adapter": "graft.studio.adapter",
    "load_base": "graft.studio.registry",
    "submit": "graft.studio.runs",
    "train": "graft.studio.training",
    "train_many": "graft.studio.training",
    "wait": "graft.studio.runs",
}

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter, load_adapter
    from graft.studio.job import Job
    from graft.studio.registry import load_base
    from graft.studio.runs import Run, submit, wait
    from graft.studio.training import estimate, train, train_many

__all__ = [
    "Adapter",
    "Job",
    "Run",
    "__version__",
    "estimate",
    "load_adapter",
    "load_base",
    "submit",
    "train",
    "train_many",
    "wait",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'graft' has no attribute {name!r}")
