"""Adaptation methods for multimodal language models (transformers)."""
