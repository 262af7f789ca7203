"""A frozen diffusion pipeline with the names that the rest of the studio asks for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from graft.studio.adapter import base_hash
from graft.studio.config import require
from graft.studio.disk import new_folder
from graft.studio.errors import InputError

Condition = dict[str, Tensor]
"""What the denoiser is told beside picture and noise level, by name; prompts or rows come first."""
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
    attention: str = "auto"
    """What computes the denoiser's attention: auto, sdpa or xformers; `attend_by` sets it."""
    domain: str = field(default="diffusion", init=False)
    """Registry name of this domain."""
    told_sizes: ClassVar[bool] = False
    """Whether the denoiser is told how large a picture is and how it was cropped."""
    choosers: list[Callable[[Sequence[int] | None], None]] = field(default_factory=list, init=False, repr=False)
    """Told, before pictures are drawn, which prompt each of them is of; None when all are drawn. What is attached and
    differs from prompt to prompt adds itself here."""

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

    @property
    def architecture(self) -> str:
        """Its family as ModelSpec names it, for the header of files; empty for one of which it says nothing."""
        width = int(self.denoiser.config.get("cross_attention_dim") or 0)
        return {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2"}.get(width, "")

    @property
    def step(self) -> int:
        """Sides are multiples of this many pixels."""
        return max(8, int(self.pipe.vae_scale_factor))

    @property
    def multiple(self) -> int:
        """Sides of pictures that are not square are multiples of this many pixels: a denoiser that halves latents
        several times needs more than its pipeline asks for."""
        halvings = len(self.denoiser.config.get("block_out_channels", (0,))) - 1
        return math.lcm(self.step, int(self.pipe.vae_scale_factor) * 2**halvings)

    def tokens(self, side: int) -> int:
        """Tokens of a square picture, where the noise levels of the training depend on them; else nothing."""
        return 0

    def as_drawn(self, latents: Tensor, height: int, width: int) -> Tensor:
        """What the pipeline returns for ``output_type="latent"`` as (b, c, h, w)."""
        return latents

    def side(self, wanted: int = 0, name: str = "resolution") -> int:
        """Side in pixels of pictures to train on or to draw, as a setting names it; 0 is the base's own.

        Raises:
            InputError: the pipeline draws no pictures of that side.
        """
        side, step = wanted or self.resolution, self.step
        if side % step:
            remedy = f"Use {max(step, round(side / step) * step)}"
            raise InputError(f"{name} {side}", f"{self.name} needs a multiple of {step}", remedy)
        return side

    def shape(self, resolution: int = 0, width: int = 0) -> tuple[int, int]:
        """Height and width in pixels of pictures to draw; without a width they are squares.

        Raises:
            InputError: as `side`.
        """
        side = self.side(resolution)
        return side, self.side(width or side, "width")

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids as the pipeline makes them, placeholders of several vectors expanded: (p, n) long, on the CPU."""
        return self._ids(prompts, self.tokenizer)

    def _ids(self, prompts: list[str], tokenizer: Any) -> Tensor:
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

    def condition(self, ids: Tensor) -> Condition:
        """What the denoiser is told of prompts, from their ids as `tokenize` gives them."""
        return {"text": self.encode(ids)}

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The denoiser's prediction: (b, c, h, w), (b,) and rows of `condition` -> (b, c, h, w)."""
        prediction: Tensor = self.denoiser(
            noisy, timesteps, encoder_hidden_states=condition["text"], return_dict=False
        )[0]
        return prediction

    @torch.no_grad()
    def exercise(self) -> None:
        """Calls every network once, on as little as it takes: what is not called then takes no part in pictures."""
        side = 2 ** len(self.denoiser.config.get("block_out_channels", (0,))) * int(self.pipe.vae_scale_factor)
        pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        condition = {name: part.to(self.dtype) for name, part in self.condition(self.tokenize([""])).items()}
        noisy = self.posterior(pixels)["mean"].to(self.device, self.dtype)
        self.denoise(noisy, torch.zeros(1, dtype=torch.long, device=self.device), condition)
        self.pipe.vae(self.as_seen(pixels))

    def as_seen(self, pixels: Tensor) -> Tensor:
        """Pictures, (b, 3, h, w) uint8, as the VAE takes them."""
        return pixels.to(self.pipe.vae.device, self.pipe.vae.dtype) / 127.5 - 1

    def guided(self, scale: float, negative: list[str] | None = None) -> dict[str, Any]:
        """Arguments of the pipeline's call for guidance of this scale away from negative prompts, one per picture."""
        return {"guidance_scale": scale, "negative_prompt": negative}

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> dict[str, Tensor]:
        """The VAE's posterior of pictures, in the denoiser's scale.

        Args:
            pixels: (b, 3, h, w) uint8.

        Returns:
            `mean` and `std`, each (b, c, h/f, w/f) float32.
        """
        vae = self.pipe.vae
        posterior = vae.encode(self.as_seen(pixels)).latent_dist
        scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
        return {"mean": ((posterior.mean - shift) * scale).float(), "std": (posterior.std * scale).float()}


class SDXLBase(DiffusionBase):
    """Stable Diffusion XL (Podell et al., 2023, arXiv:2307.01952): two text encoders, and a denoiser that is told the
    size and crop of the picture too."""

    architecture = "stable-diffusion-xl-v1-base"
    told_sizes = True

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids of both tokenizers: (p, 2, n) long, on the CPU."""
        return torch.stack([self._ids(prompts, each) for each in (self.pipe.tokenizer, self.pipe.tokenizer_2)], dim=1)

    def condition(self, ids: Tensor) -> Condition:
        """The last layers but one of both encoders, side by side, and the second one's pooled output."""
        encoders = (self.pipe.text_encoder, self.pipe.text_encoder_2)
        told = [
            encoder(part, output_hidden_states=True)
            for encoder, part in zip(encoders, ids.to(self.device).unbind(1), strict=True)
        ]
        return {"text": torch.cat([each.hidden_states[-2] for each in told], dim=-1), "pooled": told[1][0]}

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """As for any base. `condition` may have "sizes", (b, 6), as `Dataset` has them; without, the picture is said to
        be of its own size and not cropped, as when it is drawn."""
        height, width = (side * int(self.pipe.vae_scale_factor) for side in noisy.shape[-2:])
        own = torch.tensor([height, width, 0, 0, height, width], device=noisy.device, dtype=noisy.dtype)
        sizes = condition.get("sizes", own.expand(len(noisy), -1))
        prediction: Tensor = self.denoiser(
            noisy,
            timesteps,
            encoder_hidden_states=condition["text"],
            added_cond_kwargs={"text_embeds": condition["pooled"], "time_ids": sizes},
            return_dict=False,
        )[0]
        return prediction


def load_base(
    name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None, attention: str = "auto"
) -> DiffusionBase:
    """Loads a pocket model, a diffusers folder, or a model from the hub.

    Args:
        name: a pocket name such as `pocket-sd`, a folder with `model_index.json`, or a hub id.
        device: where the networks go; None takes the accelerator if there is one.
        dtype: their weights' type; None is float32.
        attention: "auto" leaves it to diffusers, which takes torch's fused function; "sdpa" asks for that one;
            "xformers" takes this library in the denoiser, on a GPU.

    Raises:
        InputError: nothing of that name, a download that was cut short, a pipeline of another family, or xformers where
            it is not installed or there is no GPU.
    """
    with _unheard("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        from diffusers import DiffusionPipeline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_attention(attention, torch.device(device))
    source = _source(name)
    try:
        with without_progress_bars():
            pipe = DiffusionPipeline.from_pretrained(source, use_safetensors=True, **_no_safety_checker(source))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        remedy = "Check the name and the connection, or delete the folder and fetch it again"
        raise InputError(name, f"the base cannot be loaded ({lines[0]})", remedy) from error
    base = _family(name, pipe)(name, pipe)
    _place(base, device, torch.float32)
    attend_by(base, attention)
    if dtype not in (None, torch.float32):
        _ = base.hash, base.part_hashes  # the identity is that of the float32 weights, in whatever type they run
        _place(base, base.device, dtype)
    return base


def _family(name: str, pipe: Any) -> type[DiffusionBase]:
    """The class that knows how a pipeline's denoiser is called.

    Raises:
        InputError: none does.
    """
    from graft.diffusion.transformers import FAMILIES

    kind, remedy = type(pipe).__name__, "Use Stable Diffusion 1, 2, XL or 3, FLUX.1, FLUX.2, Z-Image or Qwen-Image"
    if kind in FAMILIES:
        return FAMILIES[kind]
    if any(getattr(pipe, part, None) is None for part in ("unet", "vae", "text_encoder")):
        raise InputError(name, f"{kind} has no unet, vae and text_encoder", remedy)
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        reason = f"its unet takes {pipe.unet.config.in_channels} channels, its vae makes"
        raise InputError(name, f"{reason} {pipe.vae.config.latent_channels}", remedy)
    families = {(None, False): DiffusionBase, ("text_time", True): SDXLBase}
    told = (pipe.unet.config.addition_embed_type, getattr(pipe, "text_encoder_2", None) is not None)
    if told not in families:
        raise InputError(name, f"{kind} tells its unet {told[0]} in a way that is not known here", remedy)
    return families[told]


def _check_attention(attention: str, device: torch.device) -> None:
    """Refuses what cannot compute attention here, before anything is loaded.

    Raises:
        InputError: no such way, or xformers without its library or off the GPU.
    """
    from diffusers.utils import import_utils

    require("attention", attention, attention in ("auto", "sdpa", "xformers"), '"auto", "sdpa" or "xformers"')
    if attention != "xformers":
        return
    if not import_utils.is_xformers_available():
        remedy = 'Run: pip install xformers, or take "sdpa" or "auto"'
        raise InputError('attention = "xformers"', "the library 'xformers' is not installed", remedy)
    if device.type != "cuda":
        reason = f"xformers computes on a GPU of NVIDIA or AMD only, and the base goes to {device.type!r}"
        raise InputError('attention = "xformers"', reason, 'Take "sdpa" or "auto", or another device')


def attend_by(base: DiffusionBase, attention: str) -> None:
    """Sets what computes the denoiser's attention; "sdpa" sets the text encoders' too.

    Raises:
        InputError: xformers cannot compute it; its own reason is in the message.
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    base.attention = attention
    if attention == "xformers":
        try:
            base.denoiser.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, RuntimeError) as error:
            (reason, *_) = str(error).strip().splitlines() or [type(error).__name__]
            remedy = 'Take "sdpa" or "auto", or a build of xformers for this torch and GPU'
            raise InputError('attention = "xformers"', f"xformers does not run here ({reason})", remedy) from error
    if attention == "sdpa":
        own, fused = getattr(base.denoiser, "attn_processors", {}), AttnProcessor2_0()
        if any(type(processor) is AttnProcessor for processor in own.values()):  # transformers have no other way
            base.denoiser.set_attn_processor({k: fused if type(v) is AttnProcessor else v for k, v in own.items()})
        for name, module in base.modules.items():
            if name.startswith("text_encoder") and getattr(module, "_supports_sdpa", False):
                module.set_attn_implementation("sdpa")  # type: ignore[operator]


def _place(base: DiffusionBase, device: str | torch.device, dtype: torch.dtype) -> None:
    for module in base.modules.values():
        nn.Module.to(module, device, dtype)  # diffusers' own `to` warns of what cannot happen here


@contextmanager
def without_progress_bars() -> Iterator[None]:
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


@contextmanager
def _unheard(*names: str) -> Iterator[None]:
    """Loggers say errors only: diffusers and a torchao of another age, both installed, tell of each other at import."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


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
    with new_folder(Path(folder)) as draft:
        base.pipe.save_pretrained(draft)
    return Path(folder).absolute()
