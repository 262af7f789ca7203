import json
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config

from graft.studio import registry
from graft.studio.adapter import base_hash
from graft.studio.errors import InputError
from graft.vision.base import VisionBase, attend_fused, classifiers, load_base, picture_side, save_base


def test_a_base_is_the_plain_timm_model(base: VisionBase, folder: Path):
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(base.model(x), plain(x))
    assert base.hash == base_hash({"": plain})
    assert base.classes == tuple(f"thing {k}" for k in range(5))
    assert not any(p.requires_grad for p in base.model.parameters()) and not base.model.training


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_pictures_are_prepared_as_timm_does_for_this_checkpoint(folder: Path, tmp_path: Path, crop_mode: str, draw):
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"crop_mode": crop_mode, "interpolation": "bilinear"}
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    base = load_base(str(copy), "cpu")
    expected = create_transform(**resolve_model_data_config(base.model), is_training=False)
    image = draw(1, 0, size=(70, 45))
    torch.testing.assert_close(base.normalise(base.pixels(image)[None])[0], expected(image), rtol=1e-5, atol=1e-5)
    assert base.preprocessing["mean"] == [0.5, 0.4, 0.3] and base.preprocessing["crop_mode"] == crop_mode


def test_a_saved_base_is_the_same_for_timm(base: VisionBase, tmp_path: Path):
    again = load_base(str(save_base(base, tmp_path / "copy")), "cpu")
    assert (again.hash, again.classes, again.preprocessing) == (base.hash, base.classes, base.preprocessing)
    with pytest.raises(InputError, match="not an empty folder"):
        save_base(base, tmp_path / "copy")


def test_the_registry_finds_the_domain_of_a_base(folder: Path, tmp_path: Path):
    assert registry.load_base(str(folder), "cpu").domain == "vision"
    for name in ("pocket-vit", "timm/vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224", str(folder)):
        assert registry.domain_of_base(name) == "vision", name
    for name in ("pocket-sd", "pocket-other", "owner/name", str(tmp_path)):
        assert registry.domain_of_base(name) != "vision", name
    assert registry.domain_of("lora", str(folder)) == "vision"
    assert registry.domain_of("lora", "pocket-sd") == "diffusion"
    with pytest.raises(InputError, match=r"Add domain = \.\.\."):
        registry.domain_of("lora", "owner/name")
    (tmp_path / "config.json").write_text('{"architectures": ["CLIPModel"]}')
    with pytest.raises(InputError, match="the folder has none of"):
        registry.load_base(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("name", "told"),
    [("owner/name", "no such base"), ("vit_unknown_patch16", "no such base"), ("./nowhere", "no such base")],
)
def test_names_that_are_no_base_are_refused(name: str, told: str):
    with pytest.raises(InputError, match=told):
        load_base(name, "cpu")


def test_folders_that_are_no_base_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match="pickles are never opened"):
        load_base(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text('{"architectures": ["CLIPModel"]}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="a model of CLIPModel"):
        load_base(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base(str(tmp_path), "cpu")


def test_a_model_without_three_channels_is_refused(build):
    with pytest.raises(InputError, match="3 channels"):
        picture_side(build(in_chans=1))


def test_classifiers_of_true_classes(build):
    assert list(classifiers(build())) == ["head"]
    assert list(classifiers(build(num_classes=0))) == ["head"]
    assert list(classifiers(build("deit_tiny_distilled_patch16_224"))) == ["head", "head_dist"]
    assert list(classifiers(timm.create_model("resnet18", num_classes=3))) == ["fc"]


def test_narrow_weights_keep_the_identity_of_the_wide(base: VisionBase, folder: Path):
    wide, narrow = base, load_base(str(folder), "cpu", torch.bfloat16)
    assert narrow.hash == wide.hash and next(narrow.model.parameters()).dtype == torch.bfloat16


@torch.no_grad()
def test_attention_is_fused_or_plain_and_says_the_same(base: VisionBase, folder: Path):
    asked = load_base(str(folder), "cpu", attention="sdpa")
    assert {block.attn.fused_attn for block in asked.model.blocks} == {True}
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(asked.model(x), base.model(x))
    attend_fused(asked, False)
    torch.testing.assert_close(asked.model(x), base.model(x), rtol=1e-4, atol=1e-5)
    for name, match in (("xformers", "models of timm .* no place for xformers"), ("flash", "attention = 'flash'")):
        with pytest.raises(InputError, match=match):
            registry.load_base(str(folder), "cpu", attention=name)
