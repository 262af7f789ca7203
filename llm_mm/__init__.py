"""Multimodal language models of transformers: bases that answer questions about pictures."""

from graft.llm_mm.base import MultimodalBase, load_base
from graft.llm_mm.llama_adapter import LlamaAdapter
from graft.llm_mm.llama_adapter_multimodal import MultimodalLlamaAdapter
from graft.llm_mm.llama_adapter_v2 import LlamaAdapterV2

__all__ = ["LlamaAdapter", "LlamaAdapterV2", "MultimodalBase", "MultimodalLlamaAdapter", "load_base"]
