"""Adaptation methods for timm vision models."""
