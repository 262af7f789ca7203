"""A frozen CLIP-type model with the names that the rest of the domain asks for, whichever library it is from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from graft.studio.adapter import base_hash
from graft.studio.attention import refuse_xformers
from graft.studio.errors import InputError
from graft.studio.frozen import FrozenModel
from graft.vlm.text import TextTower, Words

REMEDY = "Give pocket-clip, a folder of transformers or open_clip, a hub id owner/name, or open_clip:ARCHITECTURE/TAG"


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the image tower's input."""

    size: int
    """Side in pixels."""
    mean: tuple[float, ...]
    """Subtracted from each channel, in [0, 1]."""
    std: tuple[float, ...]
    """Divided by."""
    filter: str = "bicubic"
    """Of the resizing: bicubic, bilinear, nearest, lanczos, box or hamming."""
    squash: bool = False
    """Resize both sides to `size`; otherwise the shorter one, and cut the centre out."""

    def normalise(self, pixels: Tensor) -> Tensor:
        """(b, 3, h, w) uint8 -> float32."""
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


@dataclass(eq=False)
class ClipBase(FrozenModel):
    """A two-tower model, frozen and in evaluation mode.

    Example:
        >>> base = load_base("pocket-clip")  # doctest: +SKIP
        >>> base.encode_text(["a photo of a cat."]).shape  # doctest: +SKIP
        torch.Size([1, 192])
    """

    words: Words
    """Its tokenizer."""
    preprocess: Preprocess
    """Of pictures."""
    pool: Callable[[Tensor], Tensor]
    """Normalised pixels (b, 3, h, w) -> features before the projection (b, p)."""
    last: Callable[[], Tensor] | None
    """The image tower's last linear map (p, e) as it is now; None where there is none."""
    tower: TextTower | None
    """The text side in parts; None where only the library can run it."""
    vision: nn.Module
    """The image tower, for its identity."""
    save: Callable[[Path], None] | None = None
    """Writes the model into a folder in its library's format."""
    domain: str = field(default="vlm", init=False)
    """Registry name of this domain."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks by name."""
        return {"model": self.model}

    @cached_property
    def image_hash(self) -> str:
        """Identity of what makes `pool`'s features: the image tower and the preprocessing."""
        return base_hash({"vision": self.vision}) + json.dumps(asdict(self.preprocess), sort_keys=True)

    @property
    def projection(self) -> Tensor | None:
        """(p, e), the last linear map of the image tower; None where there is none."""
        return None if self.last is None else self.last()

    @property
    def logit_scale(self) -> Tensor:
        """Factor of the cosines. SigLIP's bias is the same for all classes and changes no softmax."""
        scale: Tensor = self.model.logit_scale.detach()
        return scale.exp().reshape(())

    def project(self, pooled: Tensor) -> Tensor:
        """Features in the common space, not normalised: (..., p) -> (..., e)."""
        projection = self.projection
        return pooled if projection is None else pooled @ projection.to(pooled.dtype)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Features of uint8 pictures (b, 3, h, w), not normalised: (b, e)."""
        return self.project(self.pool(self.preprocess.normalise(pixels.to(self.device))))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Features of texts, not normalised: (b, e).

        Raises:
            DataError: a text is longer than the tower.
        """
        return self.encode_ids(self.words(texts))

    def encode_ids(self, ids: Tensor) -> Tensor:
        """Features of rows of token ids (b, length), not normalised: (b, e)."""
        run = self.model.encode_text if self.tower is None else self.tower.encode_ids
        return torch.cat([run(part) for part in ids.to(self.device).split(256)])

    def text_tower(self) -> TextTower:
        """The text side in parts.

        Raises:
            InputError: it is of a family that is not known.
        """
        if self.tower is None:
            reason = "prompts cannot be learnt for its text tower, which is of a family that is not known here"
            raise InputError(
                self.name, reason, "Use clip_lora, tip_adapter, prolip, task_res, cross_modal or clip_adapter"
            )
        return self.tower

    @torch.no_grad()
    def exercise(self) -> None:
        """Calls both towers once."""
        side = self.preprocess.size
        self.encode_image(torch.zeros(1, 3, side, side, dtype=torch.uint8))
        self.encode_text(["a"])


def load_base(
    name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None, attention: str = "auto"
) -> ClipBase:
    """Loads an embedded model, a folder, or a model from a hub.

    Args:
        name: `pocket-clip`; a folder saved by transformers (CLIP, SigLIP) or open_clip; a hub id `owner/name` of
            transformers; `open_clip:ARCHITECTURE/TAG`; or open_clip's own `hf-hub:owner/name` and
            `local-dir:FOLDER`.
        device: where it goes; None takes the accelerator if there is one.
        dtype: type of the weights; None is float32.
        attention: "sdpa" takes torch's fused function; "auto" too, but plain products on a CPU, where transformers is
            faster with them. open_clip's towers are torch's own and leave no choice.

    Raises:
        InputError: nothing of that name, another kind of model, an activation that does not fit the weights, or
            "xformers".
    """
    refuse_xformers(attention, "transformers and open_clip")
    source = name
    if name.startswith("pocket-"):
        from graft.studio.pocket import resolve

        source = str(resolve(name))
    folder = Path(source).expanduser()
    try:
        if folder.is_dir() and (folder / "config.json").is_file():
            base = _load_transformers(name, str(folder))
        elif folder.is_dir():
            base = _load_open_clip(name, f"local-dir:{folder}", None)
        elif name.startswith(("hf-hub:", "local-dir:")):
            base = _load_open_clip(name, name, None)
        elif name.startswith("open_clip:"):
            base = _load_open_clip(name, *_tagged(name))
        elif name.count("/") == 1 and not name.startswith((".", "~", "/")):
            base = _load_transformers(name, name)
        else:
            raise InputError(name, "there is no such base", REMEDY)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(name, f"the base cannot be loaded ({lines[0]})", REMEDY) from error
    if attention == "sdpa" and hasattr(base.model, "set_attn_implementation"):
        base.model.set_attn_implementation("sdpa")
    if dtype not in (None, torch.float32):
        _ = base.hash, base.image_hash  # the identity is that of the float32 weights
    # In place: the towers hold the model's own parameters.
    nn.Module.to(base.model, device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)
    return base


def _load_transformers(name: str, source: str) -> ClipBase:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    from graft.vlm import families

    config = AutoConfig.from_pretrained(source)
    if config.model_type not in ("clip", "siglip"):
        raise InputError(name, f"it is a model of type {config.model_type!r}, not clip or siglip", REMEDY)
    with _without_progress_bars():
        model = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    tokenizer, processor = AutoTokenizer.from_pretrained(source), AutoImageProcessor.from_pretrained(source)
    words = families.hugging_face_words(tokenizer, config.text_config.max_position_embeddings)
    base = families.from_transformers(name, model, words, families.transformers_preprocess(processor))

    def save(folder: Path) -> None:
        for part in (model, tokenizer, processor):
            part.save_pretrained(folder)

    base.save = save
    return base


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Loading reports through our own progress line."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tagged(name: str) -> tuple[str, str]:
    """Architecture and tag of `open_clip:ARCHITECTURE/TAG`.

    Raises:
        InputError: no such pair, or weights that were trained with another activation than the architecture's.
    """
    import open_clip

    architecture, _, tag = name.removeprefix("open_clip:").partition("/")
    config, weights = open_clip.get_model_config(architecture), open_clip.get_pretrained_cfg(architecture, tag)
    if config is None or not weights:
        raise InputError(name, "open_clip has no such architecture and tag", "See open_clip.list_pretrained()")
    model, trained = (bool(each.get("quick_gelu", False)) for each in (config, weights))
    if model != trained:
        # open_clip only warns; accuracy falls by several points.
        bare = architecture.removesuffix("-quickgelu")
        other = f"{bare}-quickgelu" if trained else bare
        kinds = {True: "QuickGELU", False: "GELU"}
        reason = f"the weights were trained with {kinds[trained]}, this architecture computes {kinds[model]}"
        raise InputError(name, reason, f"Use open_clip:{other}/{tag}")
    return architecture, tag


def _load_open_clip(name: str, source: str, tag: str | None) -> ClipBase:
    import open_clip

    from graft.vlm import families

    folder = Path(source.removeprefix("local-dir:"))
    if source.startswith("local-dir:") and not (folder / "open_clip_config.json").is_file():
        raise InputError(name, "the folder has neither config.json nor open_clip_config.json", REMEDY)
    model = open_clip.create_model(source, pretrained=tag, load_weights=True, require_pretrained=True)
    tokenizer = open_clip.get_tokenizer(source)
    return families.from_open_clip(
        name, model, families.open_clip_words(tokenizer), families.open_clip_preprocess(model)
    )


def save_base(base: ClipBase, folder: str | Path) -> Path:
    """Writes a base as it is now, merged adapters and all, as a transformers folder.

    Raises:
        InputError: the folder holds something, or the model is of open_clip.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(str(folder), "it exists and is not an empty folder", "Name a new folder")
    if base.save is None:
        reason = "merged models are written in the format of transformers only"
        raise InputError(base.name, reason, "Save base.model.state_dict() with the adapter merged")
    base.save(folder)
    return folder
