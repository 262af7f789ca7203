"""Multimodal language models of transformers: bases that answer questions about pictures."""

from graft.llm_mm.base import MultimodalBase, load_base
from graft.llm_mm.llama_adapter import LlamaAdapter

__all__ = ["LlamaAdapter", "MultimodalBase", "load_base"]
