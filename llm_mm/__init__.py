"""Multimodal language models of transformers: bases that answer questions about pictures."""

from graft.llm_mm.base import MultimodalBase, load_base

__all__ = ["MultimodalBase", "load_base"]
