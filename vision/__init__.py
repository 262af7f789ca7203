"""Vision: adaptation methods for timm models, on labelled pictures."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Public name -> module that defines it. Resolved on first use, so that the command line starts without torch.
_PUBLIC = {
    "AdaptFormer": "adaptformer",
    "AdapterPlus": "adapter_plus",
    "DataConfig": "data",
    "EvaluationConfig": "evaluation",
    "FullTuning": "full",
    "LinearProbe": "probe",
    "VPT": "vpt",
    "VisionBase": "base",
    "VisionBitFit": "scales",
    "VisionLoRA": "lora",
    "VisionSSF": "scales",
    "compare": "verification",
    "evaluate": "evaluation",
    "load_base": "base",
    "predict": "evaluation",
    "prepare": "jobs",
    "run_settings": "evaluation",
    "save_base": "base",
    "shown": "showing",
}

ASKS = "pictures"
"""What the studio's preview asks the user for; see `graft.studio.shown`."""

if TYPE_CHECKING:
    from graft.vision.adapter_plus import AdapterPlus
    from graft.vision.adaptformer import AdaptFormer
    from graft.vision.base import VisionBase, load_base, save_base
    from graft.vision.data import DataConfig
    from graft.vision.evaluation import EvaluationConfig, evaluate, predict, run_settings
    from graft.vision.full import FullTuning
    from graft.vision.jobs import prepare
    from graft.vision.lora import VisionLoRA
    from graft.vision.probe import LinearProbe
    from graft.vision.scales import VisionBitFit, VisionSSF
    from graft.vision.showing import shown
    from graft.vision.verification import compare
    from graft.vision.vpt import VPT

__all__ = [
    "VPT",
    "AdaptFormer",
    "AdapterPlus",
    "DataConfig",
    "EvaluationConfig",
    "FullTuning",
    "LinearProbe",
    "VisionBase",
    "VisionBitFit",
    "VisionLoRA",
    "VisionSSF",
    "compare",
    "evaluate",
    "load_base",
    "predict",
    "prepare",
    "run_settings",
    "save_base",
    "shown",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
