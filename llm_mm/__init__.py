"""Multimodal language models of transformers: visual instruction tuning, and answers about pictures."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

ASKS = "conversation"
"""What the studio's preview asks the user for."""

# Public name -> module that defines it. Resolved on first use, so that the command line starts without torch.
_PUBLIC = {
    "DataConfig": "data",
    "Drawing": "previews",
    "EvaluationConfig": "evaluation",
    "LanguageDoRA": "method",
    "LanguageIA3": "method",
    "LanguageLadder": "method",
    "LanguageLoRA": "method",
    "LanguageLoRAFA": "method",
    "LanguageOLoRA": "method",
    "LanguagePrefix": "method",
    "LanguagePrompt": "method",
    "LlamaAdapter": "llama_adapter",
    "LlamaAdapterV2": "llama_adapter_v2",
    "LlavaTuning": "llava",
    "MultimodalBase": "base",
    "MultimodalLlamaAdapter": "llama_adapter_multimodal",
    "PreviewConfig": "previews",
    "ResamplerSettings": "resampler",
    "answer_by_perplexity": "perplexity",
    "assemble": "assembly",
    "chat": "previews",
    "chat_by_perplexity": "perplexity",
    "compare": "verification",
    "evaluate": "evaluation",
    "evaluation_settings": "evaluation",
    "file_by_perplexity": "perplexity",
    "load_base": "base",
    "prepare": "jobs",
    "preview": "previews",
    "save_base": "method",
    "save_merged": "method",
    "show_rows": "rows",
    "shown": "showing",
}

if TYPE_CHECKING:
    from graft.llm_mm.assembly import assemble
    from graft.llm_mm.base import MultimodalBase, load_base
    from graft.llm_mm.data import DataConfig
    from graft.llm_mm.evaluation import EvaluationConfig, evaluate, evaluation_settings
    from graft.llm_mm.jobs import prepare
    from graft.llm_mm.llama_adapter import LlamaAdapter
    from graft.llm_mm.llama_adapter_multimodal import MultimodalLlamaAdapter
    from graft.llm_mm.llama_adapter_v2 import LlamaAdapterV2
    from graft.llm_mm.llava import LlavaTuning
    from graft.llm_mm.method import (
        LanguageDoRA,
        LanguageIA3,
        LanguageLadder,
        LanguageLoRA,
        LanguageLoRAFA,
        LanguageOLoRA,
        LanguagePrefix,
        LanguagePrompt,
        save_base,
        save_merged,
    )
    from graft.llm_mm.perplexity import answer_by_perplexity, chat_by_perplexity, file_by_perplexity
    from graft.llm_mm.previews import Drawing, PreviewConfig, chat, preview
    from graft.llm_mm.resampler import ResamplerSettings
    from graft.llm_mm.rows import show_rows
    from graft.llm_mm.showing import shown
    from graft.llm_mm.verification import compare

__all__ = [
    "ASKS",
    "DataConfig",
    "Drawing",
    "EvaluationConfig",
    "LanguageDoRA",
    "LanguageIA3",
    "LanguageLadder",
    "LanguageLoRA",
    "LanguageLoRAFA",
    "LanguageOLoRA",
    "LanguagePrefix",
    "LanguagePrompt",
    "LlamaAdapter",
    "LlamaAdapterV2",
    "LlavaTuning",
    "MultimodalBase",
    "MultimodalLlamaAdapter",
    "PreviewConfig",
    "ResamplerSettings",
    "answer_by_perplexity",
    "assemble",
    "chat",
    "chat_by_perplexity",
    "compare",
    "evaluate",
    "evaluation_settings",
    "file_by_perplexity",
    "load_base",
    "prepare",
    "preview",
    "save_base",
    "save_merged",
    "show_rows",
    "shown",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
