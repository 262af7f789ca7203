"""Diffusion: Textual Inversion, Custom Diffusion, ControlNet, IP-Adapter, LoRA and DoRA for diffusers pipelines."""

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
    "DiffusionLoRA": "lora",
    "EvaluationConfig": "evaluation",
    "IPAdapter": "ip_adapter",
    "PivotalTuning": "pivotal",
    "PreviewConfig": "previews",
    "TextualInversion": "textual_inversion",
    "evaluate": "evaluation",
    "load_base": "base",
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
    from graft.diffusion.evaluation import EvaluationConfig, evaluate
    from graft.diffusion.ip_adapter import IPAdapter
    from graft.diffusion.jobs import prepare, prepare_together
    from graft.diffusion.lora import DiffusionDoRA, DiffusionLoRA
    from graft.diffusion.pivotal import PivotalTuning
    from graft.diffusion.previews import PreviewConfig, preview
    from graft.diffusion.showing import shown
    from graft.diffusion.textual_inversion import TextualInversion

__all__ = [
    "ControlNet",
    "CustomDiffusion",
    "DataConfig",
    "DiffusionBase",
    "DiffusionDoRA",
    "DiffusionLoRA",
    "EvaluationConfig",
    "IPAdapter",
    "PivotalTuning",
    "PreviewConfig",
    "TextualInversion",
    "evaluate",
    "load_base",
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
