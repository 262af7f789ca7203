"""Multimodal language models of transformers: bases that answer questions about pictures, and LLaMA-Adapter."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Public name -> module that defines it. Resolved on first use, so that the command line starts without torch.
_PUBLIC = {
    "LlamaAdapter": "llama_adapter",
    "LlamaAdapterV2": "llama_adapter_v2",
    "MultimodalBase": "base",
    "MultimodalLlamaAdapter": "llama_adapter_multimodal",
    "load_base": "base",
}

if TYPE_CHECKING:
    from graft.llm_mm.base import MultimodalBase, load_base
    from graft.llm_mm.llama_adapter import LlamaAdapter
    from graft.llm_mm.llama_adapter_multimodal import MultimodalLlamaAdapter
    from graft.llm_mm.llama_adapter_v2 import LlamaAdapterV2

__all__ = ["LlamaAdapter", "LlamaAdapterV2", "MultimodalBase", "MultimodalLlamaAdapter", "load_base"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
