"""The embedded world and its models: small, of the real classes, trained by the scripts in `pretrain`."""

from pathlib import Path


def resolve(name: str) -> Path:
    """Return the standard folder (diffusers, transformers) of an embedded model; see `graft.studio.pocket.models`."""
    from graft.studio.pocket.models import resolve

    return resolve(name)
