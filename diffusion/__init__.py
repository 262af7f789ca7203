"""Diffusion: Textual Inversion, Custom Diffusion, ControlNet, T2I-Adapter, IP-Adapter, LoRA, DoRA, on diffusers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Public name -> module that defines it. Resolved on first use, so that the command line starts without torch.
_PUBLIC = {
    "ControlNet": "controlnet",
    "CustomDiffusion": "custom_diffusion",
    "DataConfig": "data",
    "DiffusionBase": "base",
    "DiffusionDoRA": "lora",
    "DiffusionLoKr": "lora",
    "DiffusionLoRA": "lora",
    "EvaluationConfig": "evaluation",
    "IPAdapter": "ip_adapter",
    "PivotalTuning": "pivotal",
    "PreviewConfig": "previews",
    "T2IAdapter": "t2i_adapter",
    "TextualInversion": "textual_inversion",
    "compare": "verification",
    "evaluate": "evaluation",
    "evaluation_settings": "evaluation",
    "load_base": "base",
    "load_words": "textual_inversion",
    "prepare": "jobs",
    "prepare_together": "jobs",
    "preview": "previews",
    "save_base": "base",
    "shown": "showing",
}

ASKS = "prompts"
"""What the studio's preview asks the user for; see `graft.studio.shown`."""

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase, load_base, save_base
    from graft.diffusion.controlnet import ControlNet
    from graft.diffusion.custom_diffusion import CustomDiffusion
    from graft.diffusion.data import DataConfig
    from graft.diffusion.evaluation import EvaluationConfig, evaluate, evaluation_settings
    from graft.diffusion.ip_adapter import IPAdapter
    from graft.diffusion.jobs import prepare, prepare_together
    from graft.diffusion.lora import DiffusionDoRA, DiffusionLoKr, DiffusionLoRA
    from graft.diffusion.pivotal import PivotalTuning
    from graft.diffusion.previews import PreviewConfig, preview
    from graft.diffusion.showing import shown
    from graft.diffusion.t2i_adapter import T2IAdapter
    from graft.diffusion.textual_inversion import TextualInversion, load_words
    from graft.diffusion.verification import compare

__all__ = [
    "ControlNet",
    "CustomDiffusion",
    "DataConfig",
    "DiffusionBase",
    "DiffusionDoRA",
    "DiffusionLoKr",
    "DiffusionLoRA",
    "EvaluationConfig",
    "IPAdapter",
    "PivotalTuning",
    "PreviewConfig",
    "T2IAdapter",
    "TextualInversion",
    "compare",
    "evaluate",
    "evaluation_settings",
    "load_base",
    "load_words",
    "prepare",
    "prepare_together",
    "preview",
    "save_base",
    "shown",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
