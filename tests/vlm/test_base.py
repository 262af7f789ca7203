"""Any CLIP-type model behind one face, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

import graft
from graft.studio import registry
from graft.studio.errors import InputError
from graft.studio.pocket import resolve
from graft.vlm.base import ClipBase, Preprocess, load_base
from graft.vlm.pictures import to_pixels


@torch.no_grad()
def test_pictures_are_encoded_as_the_library_does(any_base: ClipBase):
    size: Any = getattr(any_base.vision, "image_size", 16)
    side = size[0] if isinstance(size, tuple) else size
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs, model = pixels / 127.5 - 1, any_base.model
    if hasattr(model, "encode_image"):
        expected = model.encode_image(inputs)
    else:
        expected = model.get_image_features(pixel_values=inputs).pooler_output
    torch.testing.assert_close(any_base.encode_image(pixels), expected, rtol=1e-5, atol=1e-5)
    pooled = any_base.pool(any_base.preprocess.normalise(pixels))
    torch.testing.assert_close(any_base.project(pooled), expected, rtol=1e-5, atol=1e-5)


def test_everything_is_frozen_and_named(any_base: ClipBase):
    assert not any(p.requires_grad for p in any_base.model.parameters())
    assert not any(module.training for module in any_base.model.modules())
    assert any_base.projection is None or not any_base.projection.requires_grad
    assert any_base.domain == "vlm" and len(any_base.hash) == 64
    any_base.logit_scale.item()


@torch.no_grad()
def test_the_embedded_model_is_the_same_from_both_libraries(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GRAFT_CACHE")
    folder = resolve("pocket-clip")
    one, other = graft.load_base("pocket-clip", "cpu"), load_base(f"local-dir:{folder}", "cpu")
    assert one.domain == graft.load_base(str(folder), "cpu").domain == "vlm"
    texts, pixels = ["a photo of a red apple."], torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(one.encode_text(texts), other.encode_text(texts), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.encode_image(pixels), other.encode_image(pixels), rtol=1e-5, atol=1e-5)
    assert one.preprocess == other.preprocess == Preprocess(64, (0.5,) * 3, (0.5,) * 3)
    half = load_base("pocket-clip", "cpu", torch.bfloat16)
    assert half.hash == one.hash and half.encode_text(texts).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("files", "domain"),
    [
        ({"config.json": {"model_type": "clip"}, "open_clip_config.json": {"model_cfg": {}}}, "vlm"),
        ({"config.json": {"architecture": "vit"}, "open_clip_config.json": {"model_cfg": {}}}, "vlm"),
        ({"config.json": {"model_type": "siglip"}}, "vlm"),
        ({"config.json": {"model_type": "bert"}}, None),
        ({"config.json": {"architecture": "vit"}}, "vision"),
        ({"config.json": [], "model_index.json": {"_class_name": "X"}}, "diffusion"),
    ],
)
def test_a_folder_tells_its_domain(tmp_path: Path, files: dict[str, Any], domain: str | None):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert registry.domain_of_base(str(tmp_path)) == domain


def test_a_name_tells_its_domain():
    for name in ("pocket-clip", "open_clip:ViT-B-32/openai", "hf-hub:owner/name", "local-dir:somewhere"):
        assert registry.domain_of_base(name) == "vlm", name
    with pytest.raises(InputError, match="Give pocket-clip"):  # a job's or a card's domain goes first
        registry.load_base("./nowhere", "cpu", domain="vlm")


def test_a_hub_id_is_asked_for_its_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """First its files in the cache, then the hub; without either it is taken for a pipeline of diffusers."""
    taken: list[str] = []

    def package(name: str) -> SimpleNamespace:
        taken.append(name)
        return SimpleNamespace(load_base=lambda *args, **kwargs: None)

    hub: dict[str, Any] = {
        "a/pipe": {"library_name": "diffusers"}, "a/siglip": {"library_name": "transformers", "model_type": "siglip"},
        "a/vit": {"library_name": "timm"}, "a/oc": {"library_name": "open_clip"}, "a/llava": {"model_type": "llava"},
    }  # fmt: skip

    def model_info(self: Any, name: str, timeout: float) -> SimpleNamespace:
        told = hub[name]  # KeyError: as good as a hub that does not answer
        return SimpleNamespace(library_name=told.get("library_name"), config={"model_type": told.get("model_type")})

    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    cached = {("a/clip", "config.json"): str(tmp_path / "config.json")}
    monkeypatch.setattr(registry, "_package", package)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: cached.get((name, file)))
    for name in ("a/clip", *hub, "a/unknown"):
        registry.load_base(name, "cpu")
    assert taken == ["vlm", "diffusion", "vlm", "vision", "vlm", "llm_mm", "diffusion"]


def test_weights_of_another_activation_are_an_error_and_not_a_warning():
    with pytest.raises(InputError, match=r"trained with QuickGELU.*Use open_clip:ViT-B-16-quickgelu/dfn2b"):
        load_base("open_clip:ViT-B-16/dfn2b")
    with pytest.raises(InputError, match=r"this architecture computes GELU.*Use open_clip:ViT-B-32-quickgelu/openai"):
        load_base("open_clip:ViT-B-32/openai")
    with pytest.raises(InputError, match="no such architecture and tag"):
        load_base("open_clip:ViT-B-16/nothing")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./missing", "word"])
def test_missing_bases_are_named(name: str):
    with pytest.raises(InputError, match="there is no such base"):
        load_base(name)


def test_folders_of_other_models_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="neither config.json nor open_clip_config.json"):
        load_base(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="of type 'bert', not clip or siglip"):
        load_base(str(tmp_path))
    with pytest.raises(InputError, match="the folder has none of"):
        graft.load_base(str(tmp_path))


def test_a_saved_base_loads_with_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GRAFT_CACHE")
    from graft.vlm.base import save_base

    base = load_base("pocket-clip", "cpu")
    again = load_base(str(save_base(base, tmp_path / "saved")), "cpu")
    assert again.hash == base.hash and again.words(["a cat"]).tolist() == base.words(["a cat"]).tolist()
    with pytest.raises(InputError, match="not an empty folder"):
        save_base(base, tmp_path / "saved")


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (33, 32), (16, 16)])
def test_preprocessing_is_that_of_both_libraries(size: tuple[int, int]):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    preprocess: Any = Preprocess(16, (0.48, 0.45, 0.4), (0.26, 0.26, 0.27))
    mine = preprocess.normalise(to_pixels(image, preprocess)[None])[0]
    theirs = open_clip.image_transform(16, is_train=False, mean=preprocess.mean, std=preprocess.std)(image)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    squashed = to_pixels(image, Preprocess(16, (0,), (1,), squash=True))
    square = open_clip.image_transform(16, is_train=False, resize_mode="squash", mean=(0,) * 3, std=(1,) * 3)(image)
    torch.testing.assert_close(squashed / 255, square, rtol=1e-5, atol=1e-5)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_mean=preprocess.mean,
        image_std=preprocess.std,
    )  # fmt: skip
    hugging_face = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
    assert (mine - hugging_face).abs().mean() < 0.05  # its resizing works on tensors, and rounds differently


@torch.no_grad()
def test_sdpa_says_the_same_as_what_is_taken_without_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GRAFT_CACHE")
    auto, asked = (load_base("pocket-clip", "cpu", attention=name) for name in ("auto", "sdpa"))
    assert [each.model.config._attn_implementation for each in (auto, asked)] == ["eager", "sdpa"]
    assert asked.model.vision_model.config._attn_implementation == "sdpa"
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(asked.encode_image(pixels), auto.encode_image(pixels), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(asked.encode_text(["a cat"]), auto.encode_text(["a cat"]), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="no place for xformers"):
        load_base("pocket-clip", "cpu", attention="xformers")
