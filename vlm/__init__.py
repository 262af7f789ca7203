"""CLIP-type models: few-shot classification with prompts, adapters and caches, on open_clip and transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Public name -> module that defines it. Resolved on first use, so that the command line starts without torch.
_PUBLIC = {
    "ClipAdapter": "clip_adapter",
    "ClipBase": "base",
    "ClipLoRA": "clip_lora",
    "CoCoOp": "cocoop",
    "CoOp": "coop",
    "CrossModal": "cross_modal",
    "DataConfig": "data",
    "EvaluationConfig": "evaluation",
    "PreviewConfig": "previews",
    "ProLIP": "prolip",
    "TaskRes": "task_res",
    "TipAdapter": "tip_adapter",
    "TipAdapterF": "tip_adapter",
    "base_to_new": "transfer",
    "compare": "verification",
    "evaluate": "evaluation",
    "load_base": "base",
    "predict": "evaluation",
    "prepare": "jobs",
    "preview": "previews",
    "run_settings": "evaluation",
    "save_base": "base",
    "shown": "showing",
}

ASKS = "pictures"
"""What the studio's preview asks the user for; see `graft.studio.shown`."""

if TYPE_CHECKING:
    from graft.vlm.base import ClipBase, load_base, save_base
    from graft.vlm.clip_adapter import ClipAdapter
    from graft.vlm.clip_lora import ClipLoRA
    from graft.vlm.cocoop import CoCoOp
    from graft.vlm.coop import CoOp
    from graft.vlm.cross_modal import CrossModal
    from graft.vlm.data import DataConfig
    from graft.vlm.evaluation import EvaluationConfig, evaluate, predict, run_settings
    from graft.vlm.jobs import prepare
    from graft.vlm.previews import PreviewConfig, preview
    from graft.vlm.prolip import ProLIP
    from graft.vlm.showing import shown
    from graft.vlm.task_res import TaskRes
    from graft.vlm.tip_adapter import TipAdapter, TipAdapterF
    from graft.vlm.transfer import base_to_new
    from graft.vlm.verification import compare

__all__ = [
    "ClipAdapter",
    "ClipBase",
    "ClipLoRA",
    "CoCoOp",
    "CoOp",
    "CrossModal",
    "DataConfig",
    "EvaluationConfig",
    "PreviewConfig",
    "ProLIP",
    "TaskRes",
    "TipAdapter",
    "TipAdapterF",
    "base_to_new",
    "compare",
    "evaluate",
    "load_base",
    "predict",
    "prepare",
    "preview",
    "run_settings",
    "save_base",
    "shown",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
