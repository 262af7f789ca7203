"""kohya's FLUX files against diffusers' own converters, which have FLUX.1's widths built in."""

from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux2_lora_to_diffusers,
    _convert_kohya_flux_lora_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from graft.studio.adapter import Adapter, load_adapter
from graft.studio.errors import FormatError, InputError
from graft.studio.formats.low_rank import LowRank, to_adapter

WIDTH = 3072


def module(out: int, inside: int, rank: int = 2, length: Tensor | None = None) -> LowRank:
    return LowRank("linear", torch.randn(rank, inside), torch.randn(out, rank), length)


def lora(**sites: LowRank) -> Adapter:
    return to_adapter({f"transformer.{name}": each for name, each in sites.items()}, "diffusion", "test")


def applied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each module of diffusers' keys does to an input of chance."""
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            x = torch.randn(down.shape[1], generator=torch.Generator().manual_seed(len(name)))
            found[name] = tensors[f"{name}.lora_B.weight"] @ (down @ x)
    return found


def of(adapter: Adapter) -> dict[str, Tensor]:
    ends = {"A": "lora_A.weight", "B": "lora_B.weight"}
    parts = {name: name.rpartition(".") for name in adapter.tensors}
    return applied({f"{site}.{ends[end]}": adapter.tensors[name] for name, (site, _, end) in parts.items()})


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    theirs = {name: each for name, each in theirs.items() if each.any()}
    assert ours.keys() == theirs.keys()
    for name, each in ours.items():
        torch.testing.assert_close(each, theirs[name], rtol=1e-4, atol=1e-3)


def test_parts_are_fused_as_diffusers_takes_them_apart(tmp_path: Path):
    """Parts of other ranks, and one that is not adapted, too."""
    torch.manual_seed(0)
    adapter = lora(**{
        "transformer_blocks.3.attn.to_q": module(WIDTH, WIDTH),
        "transformer_blocks.3.attn.to_v": module(WIDTH, WIDTH, 3),
        "transformer_blocks.3.attn.add_k_proj": module(WIDTH, WIDTH),
        "transformer_blocks.3.norm1_context.linear": module(8, WIDTH),
        "single_transformer_blocks.0.attn.to_k": module(WIDTH, WIDTH, 1),
        "single_transformer_blocks.0.proj_mlp": module(4 * WIDTH, WIDTH, 1),
        "single_transformer_blocks.0.proj_out": module(WIDTH, 5 * WIDTH),
    })  # fmt: skip
    (file,) = adapter.export(tmp_path, "kohya")
    assert load_file(file)["lora_unet_double_blocks_3_img_attn_qkv.alpha"] == 5
    same(of(adapter), applied(_convert_kohya_flux_lora_to_diffusers(load_file(file))))
    read = load_adapter(file)
    same(of(adapter), of(read))
    assert len(read.tensors["transformer.transformer_blocks.3.attn.to_v.A"]) == 3  # no larger than it was


@pytest.mark.parametrize("family", [1, 2])
def test_what_sd_scripts_trains_is_read_as_diffusers_reads_it(tmp_path: Path, family: int):
    """Fused factors with one A, an alpha of its own in each module, and CLIP's."""
    torch.manual_seed(1)
    width, rows = (WIDTH, 7) if family == 1 else (16, 9)
    shapes = {
        "unet_double_blocks_0_img_attn_qkv": (3 * width, width),
        "unet_double_blocks_0_txt_mlp_0": ((4 if family == 1 else 6) * width, width),
        "unet_single_blocks_2_linear1": (rows * width, width),
        "unet_single_blocks_2_linear2": (width, (5 if family == 1 else 4) * width),
    }  # fmt: skip
    if family == 1:
        shapes["te1_text_model_encoder_layers_1_self_attn_out_proj"] = (8, 8)
    tensors: dict[str, Tensor] = {}
    for i, (name, (out, inside)) in enumerate(shapes.items()):
        tensors |= {
            f"lora_{name}.lora_down.weight": torch.randn(2, inside),
            f"lora_{name}.alpha": torch.tensor(1.0 + i),
        }
        tensors[f"lora_{name}.lora_up.weight"] = torch.randn(out, 2)
    save_file(tensors, tmp_path / "theirs.safetensors")
    convert = _convert_kohya_flux_lora_to_diffusers if family == 1 else _convert_kohya_flux2_lora_to_diffusers
    theirs = convert(dict(tensors))
    renamed = {
        name.replace(".lora.down.weight", ".lora_A.weight").replace(".lora.up.weight", ".lora_B.weight")
        .replace("out_proj.lora_linear_layer", "out_proj.lora").replace("lora_linear_layer.down", "lora_A")
        .replace("lora_linear_layer.up", "lora_B").replace("to_out_lora.down", "out_proj.lora_A")
        .replace("to_out_lora.up", "out_proj.lora_B"): tensor
        for name, tensor in theirs.items()
    }  # fmt: skip
    same(of(load_adapter(tmp_path / "theirs.safetensors")), applied(renamed))


BAD = {
    "lora_unet_double_blocks_0_img_norm": "no module of FLUX's blocks",
    "lora_unet_single_blocks_0_linear3": "no module of FLUX's blocks",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "no module of FLUX's blocks or of its CLIP",
}


@pytest.mark.parametrize("name", BAD)
def test_unknown_names_are_told(tmp_path: Path, name: str):
    good = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{each}.lora_{end}.weight": torch.ones(2, 2) for each in (name, good) for end in ("up", "down")}
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(FormatError, match=BAD[name]):
        load_adapter(tmp_path / "odd.safetensors")


def test_what_the_format_lacks_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="only FLUX has such a file"):  # of SD3 or Qwen-Image, perhaps
        lora(**{"transformer_blocks.0.attn.to_q": module(4, 4)}).export(tmp_path, "kohya")
    single = {"single_transformer_blocks.0.proj_out": module(4, 20)}
    with pytest.raises(InputError, match="no name for it"):
        lora(**single, **{"x_embedder": module(4, 4)}).export(tmp_path, "kohya")
    with pytest.raises(InputError, match="it has 6 rows, in FLUX.1 it would have 4"):
        lora(**single, **{"transformer_blocks.0.attn.to_k": module(6, 4)}).export(tmp_path, "kohya")
    with pytest.raises(InputError, match="drops a DoRA"):
        lora(**{"single_transformer_blocks.0.proj_out": module(4, 20, length=torch.ones(4))}).export(tmp_path, "kohya")
