"""Adaptation methods for diffusion models (diffusers)."""
