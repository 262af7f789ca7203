"""The embedded bases as true instances of their libraries' classes, and as standard folders.

Weights are committed once, in float16, one file per network; a model that uses another's network (the text tower of
`pocket-clip` inside `pocket-sd`) has no copy. `resolve` writes the folder that the library itself would load,
once, into the cache; `graft pocket export` writes the same folder where the user wants it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.studio.disk import require_empty
from graft.studio.errors import InputError
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from timm.models import VisionTransformer
    from torch import Tensor
    from transformers import CLIPModel, CLIPTextModel

WEIGHTS = Path(__file__).parent / "weights"


def cache_root() -> Path:
    """Return `$GRAFT_CACHE`, else `~/.cache/graft`."""
    return Path(os.environ.get("GRAFT_CACHE") or Path.home() / ".cache" / "graft")


def write_weights(name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Write a network's weights as float16 and what is known of its training; returns the weight file."""
    import torch
    from safetensors.torch import save_file

    WEIGHTS.mkdir(exist_ok=True)
    path = WEIGHTS / f"{name}.safetensors"
    small = {k: (v.half() if v.dtype == torch.float32 else v).contiguous() for k, v in tensors.items()}
    save_file(small, path.with_suffix(".tmp"), metadata={"format": "pt"})
    path.with_suffix(".tmp").replace(path)
    (WEIGHTS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return path


def facts(name: str) -> dict[str, Any]:
    """Return what is known of a network: parameters, and steps, seconds, hardware and date of each training."""
    return json.loads((WEIGHTS / f"{name}.json").read_text(encoding="utf-8"))


def _filled(model: Any, name: str) -> Any:
    """Fill a network with its committed weights, in float32, frozen and in eval mode."""
    from safetensors.torch import load_file

    path = WEIGHTS / f"{name}.safetensors"
    if not path.exists():
        raise InputError(f"embedded weights {name!r}", f"{path} is missing", "Install the package again")
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


def autoencoder() -> AutoencoderKL:
    """Return the autoencoder of `pocket-sd`."""
    from diffusers import AutoencoderKL

    from graft.studio.pocket.pretrain.autoencoder import CONFIG

    return _filled(AutoencoderKL(**CONFIG, scaling_factor=facts("autoencoder")["scaling_factor"]), "autoencoder")


def clip() -> CLIPModel:
    """Return `pocket-clip`, both towers."""
    from transformers import CLIPModel

    from graft.studio.pocket.pretrain.clip import config

    return _filled(CLIPModel(config(load_tokenizer())), "clip")


def text_encoder() -> CLIPTextModel:
    """Return the text tower of `pocket-clip`."""
    from transformers import CLIPTextModel

    whole = clip()
    tower = CLIPTextModel(whole.config.text_config)
    tower.load_state_dict(whole.text_model.state_dict())
    return tower.eval().requires_grad_(False)


def unet() -> UNet2DConditionModel:
    """Return the UNet of `pocket-sd`."""
    from diffusers import UNet2DConditionModel

    from graft.studio.pocket.pretrain.unet import CONFIG

    return _filled(UNet2DConditionModel(**CONFIG), "unet")


def vit() -> VisionTransformer:
    """Return `pocket-vit`."""
    from timm import create_model

    from graft.studio.pocket.pretrain.vit import ARCHITECTURE, CONFIG

    return _filled(create_model(ARCHITECTURE, **CONFIG), "vit")


def stable_diffusion() -> StableDiffusionPipeline:
    """Return `pocket-sd`."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from graft.studio.pocket.pretrain.unet import SCHEDULER

    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=load_tokenizer(),
        unet=unet(),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _save_stable_diffusion(folder: Path) -> None:
    stable_diffusion().save_pretrained(folder)


def _save_clip(folder: Path) -> None:
    from transformers import CLIPImageProcessor

    from graft.studio.pocket import as_open_clip

    model = clip()
    model.save_pretrained(folder)
    as_open_clip.save(model, folder)
    load_tokenizer().save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=half, image_std=half
    ).save_pretrained(folder)


def _save_vit(folder: Path) -> None:
    """Write what `timm.create_model("local-dir:FOLDER", pretrained=True)` reads."""
    from safetensors.torch import save_file

    from graft.studio.pocket.pretrain.vit import ARCHITECTURE, CONFIG

    atlas = Atlas.load()
    half = [0.5, 0.5, 0.5]
    side = CONFIG["img_size"]
    description = {
        "architecture": ARCHITECTURE,
        "num_classes": CONFIG["num_classes"],
        "num_features": CONFIG["embed_dim"],
        "global_pool": "token",
        "model_args": CONFIG,
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": half,
            "std": half,
            "num_classes": CONFIG["num_classes"],
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
            "label_names": [atlas.names[i] for i in atlas.known],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    save_file(vit().state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


# name -> (networks whose weights it uses, writer of its standard folder)
MODELS: dict[str, tuple[tuple[str, ...], Callable[[Path], None]]] = {
    "pocket-sd": (("autoencoder", "clip", "unet"), _save_stable_diffusion),
    "pocket-clip": (("clip",), _save_clip),
    "pocket-vit": (("vit",), _save_vit),
}


@cache
def weights_hash(name: str) -> str:
    """Return the SHA-256 over the committed files that a model is made of, as hex."""
    digest = hashlib.sha256()
    files = [WEIGHTS / f"{network}.{kind}" for network in _known(name)[0] for kind in ("safetensors", "json")]
    for path in [*files, *sorted((WEIGHTS / "tokenizer").iterdir())]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _known(name: str) -> tuple[tuple[str, ...], Callable[[Path], None]]:
    if name not in MODELS:
        raise InputError(f"model {name!r}", "no embedded model has this name", f"Choose one of {', '.join(MODELS)}")
    return MODELS[name]


def export(name: str, folder: Path) -> Path:
    """Write a model as the standard folder of its library, whole or not at all.

    Raises:
        InputError: no such model, or the folder exists and is not empty.
    """
    _, save = _known(name)
    folder = Path(folder)
    require_empty(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save(draft)
        draft.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder


def resolve(name: str) -> Path:
    """Return the standard folder of a model in the cache, written on first use.

    Raises:
        InputError: no such model.
    """
    _known(name)
    folder = cache_root() / "pocket" / f"{name}-{weights_hash(name)[:16]}"
    if not folder.exists():
        try:
            export(name, folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    return folder
