"""A frozen diffusion pipeline with the names that the rest of the studio asks for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from graft.studio.adapter import base_hash
from graft.studio.disk import naming_full_disk
from graft.studio.errors import InputError

PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")


@dataclass(eq=False)
class DiffusionBase:
    """A diffusers pipeline whose modules are frozen and in evaluation mode.

    Example:
        >>> base = load_base("pocket-sd")  # doctest: +SKIP
        >>> base.pipe("a red apple").images[0]  # doctest: +SKIP
    """

    name: str
    """As it was asked for."""
    pipe: Any
    """The pipeline: `StableDiffusionPipeline` or another of the family with `unet`, `vae` and `text_encoder`."""
    domain: str = field(default="diffusion", init=False)
    """Registry name of this domain."""

    def __post_init__(self) -> None:
        for module in self.modules.values():
            module.requires_grad_(False).eval()
        self.pipe.set_progress_bar_config(disable=True)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The pipeline's networks by component name."""
        parts = ((name, getattr(self.pipe, name, None)) for name in PARTS)
        return {name: module for name, module in parts if isinstance(module, nn.Module)}

    @cached_property
    def hash(self) -> str:
        """Identity of all weights; adapters carry it."""
        return base_hash(self.modules)

    @cached_property
    def part_hashes(self) -> dict[str, str]:
        """Identity of each network alone: a cached latent depends on the VAE and on nothing else."""
        return {name: base_hash({name: module}) for name, module in self.modules.items()}

    @property
    def denoiser(self) -> Any:
        """The network that is called at every step."""
        return self.pipe.unet if getattr(self.pipe, "unet", None) is not None else self.pipe.transformer

    @property
    def tokenizer(self) -> Any:
        """The pipeline's (first) tokenizer."""
        return self.pipe.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's weights."""
        return next(self.denoiser.parameters()).dtype

    @property
    def resolution(self) -> int:
        """Side in pixels that the base was trained at."""
        return int(self.denoiser.config.sample_size) * int(self.pipe.vae_scale_factor)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids as the pipeline makes them, placeholders of several vectors expanded: (p, n) long, on the CPU."""
        tokenizer = self.tokenizer
        return tokenizer(
            self.pipe.maybe_convert_prompt(prompts, tokenizer),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def encode(self, ids: Tensor) -> Tensor:
        """Text embeddings for the denoiser's cross-attention: (p, n) -> (p, n, d)."""
        return self.pipe.text_encoder(ids.to(self.device))[0]

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> dict[str, Tensor]:
        """The VAE's posterior of pictures, in the denoiser's scale.

        Args:
            pixels: (b, 3, h, w) uint8.

        Returns:
            `mean` and `std`, each (b, c, h/f, w/f) float32.
        """
        vae = self.pipe.vae
        inputs = pixels.to(vae.device, vae.dtype) / 127.5 - 1
        posterior = vae.encode(inputs).latent_dist
        scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
        return {"mean": ((posterior.mean - shift) * scale).float(), "std": (posterior.std * scale).float()}


def load_base(name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> DiffusionBase:
    """Loads a pocket model, a diffusers folder, or a model from the hub.

    Args:
        name: a pocket name such as `pocket-sd`, a folder with `model_index.json`, or a hub id.
        device: where the networks go; None takes the accelerator if there is one.
        dtype: their weights' type; None is float32.

    Raises:
        InputError: nothing of that name, a download that was cut short, or a pipeline of another family.
    """
    from diffusers import DiffusionPipeline

    source = _source(name)
    try:
        with _without_progress_bars():
            pipe = DiffusionPipeline.from_pretrained(source, **_no_safety_checker(source))
    except (OSError, ValueError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        remedy = "Check the name and the connection, or delete the folder and fetch it again"
        raise InputError(name, f"the base cannot be loaded ({lines[0]})", remedy) from error
    if not all(hasattr(pipe, part) for part in ("unet", "vae", "text_encoder")):
        kind = type(pipe).__name__
        raise InputError(name, f"{kind} has no unet, vae and text_encoder", "Use a Stable Diffusion base")
    base = DiffusionBase(name, pipe)
    _place(base, device or ("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)
    if dtype not in (None, torch.float32):
        _ = base.hash, base.part_hashes  # the identity is that of the float32 weights, in whatever type they run
        _place(base, base.device, dtype)
    return base


def _place(base: DiffusionBase, device: str | torch.device, dtype: torch.dtype) -> None:
    for module in base.modules.values():
        nn.Module.to(module, device, dtype)  # diffusers' own `to` warns of what cannot happen here


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Loading reports through our own progress line; two libraries' bars would tear it."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loud = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in loud:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in loud:
            log.enable_progress_bar()


def _source(name: str) -> str:
    """Folder or hub id behind a name."""
    if name.startswith("pocket-"):
        from graft.studio.pocket import resolve

        return str(resolve(name))
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise InputError(name, "the folder has no model_index.json", "Give a folder saved by diffusers")
    if not folder.is_dir() and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1):
        raise InputError(name, "there is no such base", "Give pocket-sd, a diffusers folder, or a hub id owner/name")
    return str(folder) if folder.is_dir() else name


def _no_safety_checker(source: str) -> dict[str, None]:
    """Leaves the picture filter out: it would blank previews and cost a CLIP forward for each."""
    from diffusers import DiffusionPipeline

    config = DiffusionPipeline.load_config(source)
    return {name: None for name in ("safety_checker", "feature_extractor") if name in config}


def save_base(base: DiffusionBase, folder: str | Path) -> Path:
    """Writes a base as it is now, merged adapters and all, as a diffusers folder; whole or not at all.

    Raises:
        InputError: the folder holds something.
        DiskFullError: no space.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(str(folder), "it exists and is not an empty folder", "Name a new folder")
    draft = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        with naming_full_disk(folder):
            base.pipe.save_pretrained(draft)
            if folder.exists():
                folder.rmdir()
            draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder
