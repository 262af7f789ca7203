"""Small random timm models of the true classes, as the folders that timm loads; pictures of two kinds of noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from graft.vision.base import VisionBase, load_base

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


def small(architecture: str = "vit_tiny_patch16_224", seed: int = 0, **settings: Any) -> Any:
    """A random model whose weights are large enough to matter."""
    torch.manual_seed(seed)
    model = timm.create_model(architecture, **(SMALL | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "bias" in name or "token" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def save_timm(model: Any, folder: Path, architecture: str, settings: dict[str, Any]) -> Path:
    """The folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": architecture,
        "num_classes": settings["num_classes"],
        "num_features": model.num_features,
        "model_args": settings,
        "pretrained_cfg": {
            "input_size": [3, settings["img_size"], settings["img_size"]],
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.4],
            "num_classes": settings["num_classes"],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "label_names": [f"thing {k}" for k in range(settings["num_classes"])],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """Makes a small random model: `build("eva02_tiny_patch14_224", depth=2)`."""
    return small


@pytest.fixture(scope="session")
def save() -> Callable[..., Path]:
    """Writes a model as timm's folder: `save(model, folder, architecture, settings)`."""
    return save_timm


@pytest.fixture(scope="session")
def draw() -> Callable[..., Image.Image]:
    """Draws a picture: `draw(kind, seed)`."""
    return picture


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT as a timm folder."""
    path = tmp_path_factory.mktemp("bases") / "vit"
    return save_timm(small(), path, "vit_tiny_patch16_224", SMALL)


@pytest.fixture
def base(folder: Path) -> VisionBase:
    return load_base(str(folder), "cpu")


def picture(kind: int, seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Stripes of one of three directions, with noise: easy to tell apart."""
    rng = np.random.default_rng([kind, seed])
    y, x = np.mgrid[: size[1], : size[0]]
    wave = np.sin([x, y, x + y][kind % 3] / 2 + rng.uniform(0, 6))
    pixels = 128 + 80 * wave[..., None] + rng.normal(0, 20, (*wave.shape, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


CLASSES = ("across", "down", "slanted")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three class folders of ten pictures."""
    root = tmp_path / "photos"
    for kind, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for k in range(10):
            picture(kind, k).save(root / name / f"{k}.png")
    return root


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
