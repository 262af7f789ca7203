import shutil
from pathlib import Path

import pytest
import torch

from graft.diffusion.base import DiffusionBase, _family, load_base
from graft.studio.errors import InputError


def test_a_base_is_frozen_named_and_hashed(base: DiffusionBase, folder: Path):
    assert set(base.modules) == {"unet", "vae", "text_encoder"}
    assert not any(p.requires_grad or m.training for m in base.modules.values() for p in m.parameters())
    assert (base.domain, base.resolution, base.device.type, base.dtype) == ("diffusion", 8, "cpu", torch.float32)
    again = load_base(str(folder))
    assert again.hash == base.hash and again.part_hashes == base.part_hashes
    with torch.no_grad():
        again.pipe.vae.decoder.conv_out.bias[0] += 1
    moved = DiffusionBase("moved", again.pipe)
    assert moved.hash != base.hash
    assert {n for n in base.modules if moved.part_hashes[n] != base.part_hashes[n]} == {"vae"}


def test_identity_does_not_depend_on_the_running_type(folder: Path, base: DiffusionBase):
    half = load_base(str(folder), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.hash == base.hash


def test_posterior_is_the_pipelines(base: DiffusionBase):
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    posterior = base.pipe.vae.encode(pixels / 127.5 - 1).latent_dist
    mine, scale = base.posterior(pixels), base.pipe.vae.config.scaling_factor
    torch.testing.assert_close(mine["mean"], posterior.mean * scale)
    torch.testing.assert_close(mine["std"], posterior.std * scale)


def test_text_is_encoded_as_the_pipeline_does(base: DiffusionBase):
    prompts = ["a photo of a cat", "a red toy"]
    expected, _ = base.pipe.encode_prompt(prompts, "cpu", 1, False)
    assert torch.equal(base.encode(base.tokenize(prompts)), expected)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./missing", "word"])
def test_missing_bases_are_named(name: str):
    with pytest.raises(InputError, match="there is no such base"):
        load_base(name)


def test_a_cut_download_is_one_clear_error(folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match="no model_index.json"):
        load_base(str(tmp_path))
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="the base cannot be loaded") as error:
        load_base(str(broken))
    assert error.value.exit_code == 2
    shutil.rmtree(broken / "text_encoder")
    with pytest.raises(InputError, match="the base cannot be loaded"):
        load_base(str(broken))


def test_a_base_that_is_told_more_than_text_is_refused(folder: Path, tmp_path: Path):
    pipe = load_base(str(folder)).pipe
    pipe.unet.register_to_config(addition_embed_type="image")
    with pytest.raises(InputError, match="tells its unet image in a way"):
        _family("other", pipe)
    pipe.save_pretrained(tmp_path / "damaged")
    pipe.unet.register_to_config(addition_embed_type=None, in_channels=9)
    pipe.unet.conv_in = torch.nn.Conv2d(9, 16, 3, padding=1)
    pipe.save_pretrained(tmp_path / "inpainting")
    with pytest.raises(InputError, match="the base cannot be loaded"):
        load_base(str(tmp_path / "damaged"))
    with pytest.raises(InputError, match="its unet takes 9 channels, its vae makes 4"):
        load_base(str(tmp_path / "inpainting"))


def test_pickled_weights_are_never_opened(folder: Path, tmp_path: Path):
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    weights = pickled / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save(load_base(str(folder)).pipe.unet.state_dict(), weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="the base cannot be loaded"):
        load_base(str(pickled))


def test_sides_that_cannot_be_drawn_are_refused(base: DiffusionBase):
    assert (base.side(), base.side(24)) == (8, 24)
    with pytest.raises(InputError, match="resolution 20: .* needs a multiple of 8. Use 16"):
        base.side(20)


def test_exercise_calls_every_network(base: DiffusionBase):
    called = []
    for name, module in base.modules.items():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    base.exercise()
    assert sorted(called) == ["text_encoder", "unet", "vae"]
