"""LoRAs of transformers as ai-toolkit and musubi-tuner write them, against diffusers' own converters."""

from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux2_lora_to_diffusers,
    _convert_non_diffusers_qwen_lora_to_diffusers,
    _convert_non_diffusers_z_image_lora_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor

from graft.studio.adapter import load_adapter

BLOCK = "transformer_blocks.0"
MODULES = {
    "qwen": (
        (f"{BLOCK}.attn.to_q", "transformer_blocks.11.attn.add_k_proj", f"{BLOCK}.attn.to_out.0",
         f"{BLOCK}.img_mlp.net.0.proj", f"{BLOCK}.attn.to_add_out"),
        _convert_non_diffusers_qwen_lora_to_diffusers,
    ),
    "z-image": (
        ("layers.0.attention.to_q", "layers.12.attention.to_out.0", "noise_refiner.1.feed_forward.w2",
         "context_refiner.0.attention.to_v"),
        _convert_non_diffusers_z_image_lora_to_diffusers,
    ),
}  # fmt: skip


def factors(names: tuple[str, ...], ends: tuple[str, str]) -> dict[str, Tensor]:
    return {
        f"{name}{end}": torch.randn(2, 6) if i == 0 else torch.randn(6, 2)
        for name in names
        for i, end in enumerate(ends)
    }


def changes(tensors: dict[str, Tensor], down: str, up: str) -> dict[str, Tensor]:
    names = [key.removesuffix(down) for key in tensors if key.endswith(down)]
    return {name.removeprefix("transformer."): tensors[name + up] @ tensors[name + down] for name in names}


@pytest.mark.parametrize("layout", ["comfyui", "comfyui with alpha", "kohya"])
@pytest.mark.parametrize("family", MODULES)
def test_qwen_image_and_z_image_are_read_as_diffusers_reads_them(tmp_path: Path, family: str, layout: str):
    torch.manual_seed(0)
    names, convert = MODULES[family]
    ends = (".lora_A.weight", ".lora_B.weight") if layout == "comfyui" else (".lora_down.weight", ".lora_up.weight")
    spelled = tuple(f"lora_unet_{n.replace('.', '_')}" if layout == "kohya" else f"diffusion_model.{n}" for n in names)
    tensors = factors(spelled, ends)
    if layout != "comfyui":
        tensors |= {f"{name}.alpha": torch.tensor(1.0 + i) for i, name in enumerate(spelled)}
    save_file(tensors, tmp_path / "theirs.safetensors")
    read = load_adapter(tmp_path / "theirs.safetensors")
    ours, theirs = (
        changes(read.tensors, ".A", ".B"),
        changes(convert(dict(tensors)), ".lora_A.weight", ".lora_B.weight"),
    )
    assert set(ours) == set(names) == set(theirs)
    for name, change in ours.items():
        torch.testing.assert_close(change, theirs[name])


def test_flux_is_taken_apart(tmp_path: Path):
    """The same factors as in kohya's file."""
    torch.manual_seed(1)
    shapes = {"double_blocks.0.img_attn.qkv": (48, 16), "single_blocks.0.linear1": (144, 16)}
    tensors: dict[str, Tensor] = {}
    for name, (out, inside) in shapes.items():
        tensors |= {f"{name}.lora_down.weight": torch.randn(2, inside), f"{name}.lora_up.weight": torch.randn(out, 2)}
    save_file({f"diffusion_model.{key}": each for key, each in tensors.items()}, tmp_path / "theirs.safetensors")
    read = load_adapter(tmp_path / "theirs.safetensors")
    kohyas = {}
    for key, tensor in tensors.items():
        name, end = key.split(".lora_")
        kohyas[f"lora_unet_{name.replace('.', '_')}.lora_{end}"] = tensor
    theirs = changes(_convert_kohya_flux2_lora_to_diffusers(kohyas), ".lora_A.weight", ".lora_B.weight")
    ours = changes(read.tensors, ".A", ".B")
    assert set(ours) == set(theirs) and len(ours) == 4
    for name, change in ours.items():
        torch.testing.assert_close(change, theirs[name])
