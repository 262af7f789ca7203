"""A frozen timm model with the names that the studio asks for, and pictures as its checkpoint wants them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from graft.studio.attention import refuse_xformers
from graft.studio.disk import naming_full_disk
from graft.studio.errors import InputError
from graft.studio.frozen import FrozenModel


@dataclass(eq=False)
class VisionBase(FrozenModel):
    """A timm model with its own classifier, if it has one, frozen and in evaluation mode.

    Example:
        >>> base = load_base("pocket-vit")  # doctest: +SKIP
        >>> base.model(base.normalise(base.pixels(picture)[None])).softmax(-1)  # doctest: +SKIP
    """

    classes: tuple[str, ...] = ()
    """Names of the classes that its own classifier tells apart, where its checkpoint says so."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What `timm.create_model` needs beside the architecture to build it again."""
    domain: str = field(default="vision", init=False)
    """Registry name of this domain."""

    @property
    def side(self) -> int:
        """Height and width in pixels of the pictures that the model takes."""
        return picture_side(self.model)

    @cached_property
    def preprocessing(self) -> dict[str, Any]:
        """Side, interpolation, crop, mean and standard deviation, as the checkpoint was trained; JSON-able."""
        from timm.data import resolve_model_data_config

        found = dict(resolve_model_data_config(self.model))
        keys = ("interpolation", "crop_pct", "crop_mode", "mean", "std")
        return {"side": self.side} | {k: list(found[k]) if isinstance(found[k], tuple) else found[k] for k in keys}

    @cached_property
    def _transform(self) -> Any:
        from timm.data import create_transform

        told = dict(self.preprocessing)
        size = (3, told["side"], told.pop("side"))
        return create_transform(input_size=size, is_training=False, normalize=False, **told)

    def pixels(self, picture: Image.Image) -> Tensor:
        """An RGB picture scaled and cropped by timm's own evaluation transform: (3, side, side) uint8."""
        pixels: Tensor = self._transform(picture)
        return pixels

    def normalise(self, pixels: Tensor) -> Tensor:
        """What the model is called on: (b, 3, h, w) uint8 -> float32 with the checkpoint's mean and deviation."""
        mean, std = (torch.tensor(self.preprocessing[k], device=self.device).view(-1, 1, 1) for k in ("mean", "std"))
        return (pixels.to(self.device).float() / 255 - mean) / std


def picture_side(model: Any) -> int:
    """Returns the height and width of the pictures that a timm model was built for.

    Raises:
        InputError: it takes no square pictures of three channels.
    """
    from timm.data import resolve_model_data_config

    built: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if hasattr(model, "tokens_spatial_shape"):  # Hiera
        built = [tokens * stride for tokens, stride in zip(model.tokens_spatial_shape, model.patch_stride, strict=True)]
    if built is None:  # convolutions first: any size will do, and the checkpoint's is the right one
        built = resolve_model_data_config(model)["input_size"][1:]
    height, width = built if isinstance(built, tuple | list) else (built, built)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if height != width or (first is not None and first.in_channels != 3):
        given = f"a model for {height} x {width} pixels of {first.in_channels if first else '?'} channels"
        raise InputError(given, "pictures here are square and have 3 channels", "Use another checkpoint")
    return int(height)


def sample_input(model: nn.Module) -> Tensor:
    """Returns a grey picture that a model can be called on, (1, 3, side, side) float32."""
    side = picture_side(model)
    return torch.zeros(1, 3, side, side, device=next(model.parameters()).device)


def classifiers(model: Any) -> dict[str, nn.Module]:
    """Returns the classifier of a timm model by path; a distilled DeiT has two, a model without classes an Identity.

    Raises:
        InputError: the model offers none that a new one could replace.
    """
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    heads = found if isinstance(found, tuple | list) else (found,)
    named = {name: module for name, module in model.named_modules() if any(module is head for head in heads)}
    if len(named) != len(heads) or not all(isinstance(head, nn.Linear | nn.Identity) for head in heads):
        told = ", ".join(type(head).__name__ for head in heads)
        reason = f"its classifier ({told}) is no linear layer that can be replaced"
        raise InputError(type(model).__name__, reason, "Use a model whose get_classifier() is a linear layer")
    return named


def feature_width(model: Any, head: nn.Module) -> int:
    """Returns the number of features that a classifier gets."""
    return int(
        head.in_features if isinstance(head, nn.Linear) else getattr(model, "head_hidden_size", model.num_features)
    )


def load_base(
    name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None, attention: str = "auto"
) -> VisionBase:
    """Loads a pocket model, a timm folder, a timm name, or a timm model from the hub.

    Args:
        name: `pocket-vit`, a folder with timm's config.json and model.safetensors, a name such as
            `vit_base_patch16_224.augreg_in21k`, or a hub id `timm/...`.
        device: where the model goes; None takes the accelerator if there is one.
        dtype: its weights' type; None is float32.
        attention: "auto" leaves it to timm; "sdpa" takes torch's fused function wherever timm knows it.

    Raises:
        InputError: nothing of that name, it could not be loaded whole, or "xformers".
    """
    refuse_xformers(attention, "timm")
    try:
        import timm
    except ImportError as error:
        remedy = 'Run: pip install "graft-studio[vision]"'
        raise InputError(name, f"the library {error.name!r} is not installed", remedy) from error
    source, facts = _source(name)
    try:
        model: Any = timm.create_model(source, pretrained=True)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        remedy = "Check the name and the connection, or delete the folder and fetch it again"
        raise InputError(name, f"the base cannot be loaded ({lines[0]})", remedy) from error
    labels = (facts.get("pretrained_cfg") or {}).get("label_names") or facts.get("label_names") or ()
    base = VisionBase(name, model, tuple(labels), dict(facts.get("model_args") or {}))
    if attention == "sdpa":
        attend_fused(base, True)
    base.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype not in (None, torch.float32):
        _ = base.hash  # the identity is that of the float32 weights, in whatever type they run
        base.model.to(dtype)
    return base


def attend_fused(base: VisionBase, fused: bool) -> None:
    """Computes attention by torch's fused function, or by plain products, wherever timm knows both."""
    for module in base.model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


def is_timm(name: str) -> bool:
    """Tells whether a name is one that timm knows."""
    import timm

    return timm.is_model(name.partition(".")[0])


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """What timm is asked for, and what a local folder says of it."""
    if name.startswith("pocket-"):
        from graft.studio.pocket import resolve

        name = str(resolve(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
            remedy = "Give a folder saved by timm with safetensors; pickles are never opened"
            raise InputError(name, "the folder lacks config.json or model.safetensors", remedy)
        facts = json.loads((folder / "config.json").read_text("utf-8"))
        if "architecture" not in facts:
            kind = ", ".join(facts.get("architectures", ["another library"]))
            raise InputError(name, f"it is a model of {kind}, not of timm", "Give a timm model")
        return f"local-dir:{folder}", facts
    if name.startswith(("timm/", "hf-hub:timm/")):
        return f"hf-hub:{name.removeprefix('hf-hub:')}", {}
    if "/" in name or name.startswith((".", "~")) or not is_timm(name):
        remedy = "Give pocket-vit, a timm folder, a timm name such as vit_base_patch16_224, or a hub id timm/..."
        raise InputError(name, "there is no such base", remedy)
    return name, {}


def save_base(base: VisionBase, folder: str | Path) -> Path:
    """Writes a base as it is now, merged adapter, new classifier and all, for `timm.create_model("local-dir:...")`.

    Raises:
        InputError: the folder holds something, or something is attached that is not part of the weights.
        DiskFullError: no space.
    """
    from safetensors.torch import save_file

    from graft.vision.head import new_classifier

    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(str(folder), "it exists and is not an empty folder", "Name a new folder")
    tensors, classes = new_classifier(base.model)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in base.model.state_dict().items()} | tensors
    described = _description(base, classes or base.classes)
    _check_buildable(described, state)
    draft = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        with naming_full_disk(folder):
            draft.mkdir(parents=True)
            (draft / "config.json").write_text(json.dumps(described, indent=2, default=str) + "\n", encoding="utf-8")
            save_file(state, draft / "model.safetensors", metadata={"format": "pt"})
            if folder.exists():
                folder.rmdir()
            draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder


def _check_buildable(described: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Refuses weights that timm has no place for, such as a bias that a merge gave to a layer without one.

    Raises:
        InputError: naming them.
    """
    import timm

    with torch.device("meta"):
        built = timm.create_model(described["architecture"], pretrained=False, **described["model_args"])
    wanted = {name: tensor.shape for name, tensor in built.state_dict().items()}
    wrong = sorted(name for name in wanted.keys() ^ state.keys()) or [
        name for name, shape in wanted.items() if state[name].shape != shape
    ]
    if wrong:
        reason = f"timm's {described['architecture']} has another {', '.join(wrong[:5])}"
        raise InputError("the merged model", reason, "Leave the adapter attached, or merge LoRA")


def _description(base: VisionBase, classes: tuple[str, ...]) -> dict[str, Any]:
    """timm's config.json."""
    told = dict(base.model.pretrained_cfg)
    count = len(classes) or int(base.model.num_classes)
    keep = ("interpolation", "crop_pct", "crop_mode", "mean", "std", "fixed_input_size", "pool_size", "first_conv",
            "classifier", "license")  # fmt: skip
    config = {key: told[key] for key in keep if told.get(key) is not None}
    config |= {"input_size": [3, base.side, base.side], "num_classes": count, "label_names": list(classes) or None}
    built = {"img_size": base.side} if getattr(getattr(base.model, "patch_embed", None), "img_size", None) else {}
    return {
        "architecture": told["architecture"],
        "num_classes": count,
        "num_features": int(base.model.num_features),
        "global_pool": getattr(base.model, "global_pool", "") or "",
        "model_args": built | base.arguments | {"num_classes": count},
        "pretrained_cfg": config,
    }
