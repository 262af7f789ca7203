"""Adaptation methods for CLIP models."""
