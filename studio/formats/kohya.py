"""LoRA in kohya's file (sd-scripts): ``lora_unet_<module>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``;
DoRA with ``.dora_scale`` (o, 1...), which ComfyUI reads and diffusers, at least up to 0.42.1, leaves out.

A module's name is its path with ``_`` for ``.``, so the way back needs the words that Stable Diffusion's modules are
called by; a name that is not made of them is refused. UNets are written with diffusers' names, which sd-scripts gives
those of SD 1.x and which it, ComfyUI and diffusers read for SDXL too; read are also SDXL's own (``input_blocks_4_1``).
Alphas may differ from module to module in what is read. In what is written the scale is multiplied into B such that
alpha is the largest rank in every module: diffusers, at least up to 0.42.1, drops alphas of attention layers that
differ from the most frequent one. FLUX has names of its own: see `graft.studio.formats.kohya_flux`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from graft.studio.adapter import Adapter
from graft.studio.errors import FormatError, InputError
from graft.studio.formats import provenance
from graft.studio.formats.files import read_tensors, write_tensors
from graft.studio.formats.low_rank import (
    LowRank,
    check_lengths,
    check_written,
    from_adapter,
    low_rank,
    pair,
    split_lengths,
    to_adapter,
)

FILE = "kohya.safetensors"
_LENGTH = ".dora_scale"
_SILENT = "_self_attn_out_proj"

_COMPONENTS = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}

# Longer ones first. No word is made of others, so a name has one reading.
_WORD = (
    r"down_blocks|mid_block|up_blocks|transformer_blocks|attentions|resnets|downsamplers|upsamplers"
    r"|attn1|attn2|to_q|to_k|to_v|to_out|ff|net|proj_in|proj_out|proj"
    r"|conv_in|conv_out|conv_shortcut|conv1|conv2|conv"
    r"|time_emb_proj|time_embedding|add_embedding|linear_1|linear_2"
    r"|text_model|text_projection|encoder|layers|self_attn|q_proj|k_proj|v_proj|out_proj|mlp|fc1|fc2"
    r"|\d+"
)

# Of Qwen-Image and Z-Image, as musubi-tuner writes them.
_STREAM = r"transformer_blocks|layers|noise_refiner|context_refiner"
_INSIDE = (
    r"attn|attention|to_q|to_k|to_v|to_out|add_q_proj|add_k_proj|add_v_proj|to_add_out|img_mlp|txt_mlp|img_mod|txt_mod"
    r"|net|proj|feed_forward|w1|w2|w3|adaLN_modulation|\d+"
)


def _sdxl() -> dict[str, str]:
    """How SDXL's own code numbers its blocks, of two layers each, to diffusers' names."""
    names = {
        "input_blocks_0_0": "conv_in",
        "time_embed_0": "time_embedding_linear_1",
        "time_embed_2": "time_embedding_linear_2",
        "label_emb_0_0": "add_embedding_linear_1",
        "label_emb_0_2": "add_embedding_linear_2",
        "middle_block_0": "mid_block_resnets_0",
        "middle_block_1": "mid_block_attentions_0",
        "middle_block_2": "mid_block_resnets_1",
        "out_2": "conv_out",
    }
    for block in range(3):
        for place, part in enumerate(("resnets", "attentions")):
            for layer in range(2):
                names[f"input_blocks_{3 * block + layer + 1}_{place}"] = f"down_blocks_{block}_{part}_{layer}"
            for layer in range(3):
                names[f"output_blocks_{3 * block + layer}_{place}"] = f"up_blocks_{block}_{part}_{layer}"
        names[f"input_blocks_{3 * block + 3}_0_op"] = f"down_blocks_{block}_downsamplers_0_conv"
        names[f"output_blocks_{3 * block + 2}_2"] = f"up_blocks_{block}_upsamplers_0"
    return names


_SDXL = _sdxl()
_SDXL_RESNET = {
    "_in_layers_2": "_conv1",
    "_out_layers_3": "_conv2",
    "_emb_layers_1": "_time_emb_proj",
    "_skip_connection": "_conv_shortcut",
}


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is kohya's."""
    return any(key.startswith(tuple(f"{prefix}_" for prefix in _COMPONENTS)) for key in keys)


def export(adapter: Adapter, folder: Path) -> list[Path]:
    """Writes a file that sd-scripts, ComfyUI and ``pipe.load_lora_weights`` load.

    Raises:
        InputError: sites outside the UNet and the text encoders, or of a kind or name that the format lacks.
    """
    if any(site["name"].startswith("transformer.") for site in adapter.card.sites):
        from graft.studio.formats import kohya_flux

        return kohya_flux.export(adapter, folder)
    modules = from_adapter(adapter)
    two = any(name.startswith("text_encoder_2.") for name in modules)
    names = {name_of(name, two): name for name in modules}
    rank = max(module.rank for module in modules.values())
    tensors: dict[str, Tensor] = {}
    for short, name in names.items():
        module = modules[name]
        if module.kind not in ("linear", "conv"):
            raise InputError(name, f"kohya's file has no LoRA of a site of kind {module.kind}", "use native")
        up = module.up * (module.rank / rank)
        up = up.reshape(*up.shape, *[1] * (module.down.dim() - 2))
        tensors |= {f"{short}.lora_down.weight": module.down, f"{short}.lora_up.weight": up}
        tensors[f"{short}.alpha"] = torch.tensor(float(rank))
        if module.length is not None:
            tensors[f"{short}{_LENGTH}"] = module.length.view(-1, *[1] * (module.down.dim() - 1))
    tensors |= companions(tensors)
    header = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    path = write_tensors(folder / FILE, tensors, {"format": "pt", **header, **provenance.header(adapter.card)})
    check_written(adapter, {names[short]: module for short, module in factors(path).items()}, str(path))
    return [path]


def companions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An output projection, changed by nothing, for each text encoder whose file has q, k or v but none of these:
    diffusers, at least up to 0.42.1, would not read them."""
    found: dict[str, Tensor] = {}
    for prefix in _COMPONENTS:
        keys = [key for key in tensors if key.startswith(f"{prefix}_text_model_") and "_self_attn_" in key]
        if prefix == "lora_unet" or not keys or any("_out_proj." in key for key in keys):
            continue
        layer, _, end = keys[0].partition("_self_attn_")
        projection = f"{layer}_self_attn_{end.partition('.')[0]}"
        out, rank = tensors[f"{projection}.lora_up.weight"].shape
        short = f"{layer}{_SILENT}"
        found |= {
            f"{short}.lora_down.weight": torch.zeros(rank, out),
            f"{short}.lora_up.weight": torch.zeros(out, rank),
        }
        found[f"{short}.alpha"] = tensors[f"{projection}.alpha"].clone()
    return found


def read(path: Path) -> Adapter:
    """Reads a LoRA of SD 1.x, SD 2.x or SDXL, or of Qwen-Image or Z-Image.

    Raises:
        FormatError: a name that is none of their modules', or a key beside factors and alphas.
    """
    modules: dict[str, LowRank] = {}
    for short, module in factors(path).items():
        name = path_of(short)
        if not name or name in modules:
            reason = "a module that is named twice" if name else "no module of Stable Diffusion's UNet or text encoders"
            remedy = "LoRAs of SD 1.x, SD 2.x, SDXL, FLUX, Qwen-Image and Z-Image are read"
            raise FormatError(f"{path}: {short}", reason, remedy)
        modules[name] = module
    return to_adapter(modules, "diffusion", str(path))


def factors(path: Path) -> dict[str, LowRank]:
    """Factors by kohya's names, without `companions`; without an alpha, or with one of 0, it equals the rank."""
    return factors_of(read_tensors(path)[0], str(path))


def factors_of(tensors: Mapping[str, Tensor], path: str) -> dict[str, LowRank]:
    """Factors by the names of their modules.

    Args:
        tensors: ``NAME.lora_down.weight``, ``.lora_up.weight``, ``.alpha``, ``.dora_scale``.
        path: for messages.
    """
    alphas = {key.removesuffix(".alpha"): tensor for key, tensor in tensors.items() if key.endswith(".alpha")}
    scales = {key: tensor for key, tensor in tensors.items() if key.endswith(_LENGTH)}
    if across := [key for key, tensor in scales.items() if tensor.shape[0] != tensor.numel()]:
        reason = "a DoRA of the inputs, not of the outputs as in the paper"
        raise FormatError(f"{path}: {across[0]}", reason, "merge it in the program that made it")
    lengths, factors = split_lengths(tensors, _LENGTH)
    factors = {key: tensor for key, tensor in factors.items() if not key.endswith(".alpha")}
    pairs = pair(factors, ".lora_down.weight", ".lora_up.weight", path)
    if lost := [name for name, alpha in alphas.items() if name not in pairs or alpha.numel() != 1]:
        raise FormatError(f"{path}: {lost[0]}.alpha", "an alpha without factors, or not one number", "export it again")
    modules = {}
    for short, (down, up) in pairs.items():
        if short.endswith(_SILENT) and not (down.any() or up.any()):
            continue
        rank = down.shape[0]
        alpha = float(alphas[short]) if short in alphas else 0.0
        modules[short] = replace(low_rank(down, up, (alpha or rank) / rank), length=lengths.get(short))
    check_lengths(lengths, modules, path)
    return modules


def name_of(path: str, two: bool) -> str:
    """kohya's name of a module; ``two`` says whether the adapter has a second text encoder."""
    component, _, inside = path.partition(".")
    if inside.startswith("encoder."):  # transformers 5.6 took ``text_model`` out of its CLIPTextModel
        inside = f"text_model.{inside}"
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1" if two else "lora_te", "text_encoder_2": "lora_te2"}
    short = f"{prefix.get(component, component)}_{inside.replace('.', '_')}"
    if path_of(short) != f"{component}.{inside}":
        reason = "kohya's file has no name for it"
        raise InputError(path, reason, "attach to the UNet and text encoders of SD or SDXL, or use diffusers or peft")
    # The one place whose diffusers name diffusers itself misreads in these files.
    label = {"lora_unet_add_embedding_linear_1": "label_emb_0_0", "lora_unet_add_embedding_linear_2": "label_emb_0_2"}
    return f"lora_unet_{label[short]}" if short in label else short


def path_of(short: str) -> str:
    """Path of a module; empty if the name is not made of the words."""
    found = re.fullmatch(r"(lora_unet|lora_te[12]?)_(.+)", short)
    if found is None:
        return ""
    component, inside = _COMPONENTS[found[1]], found[2]
    if component == "unet" and re.fullmatch(rf"({_STREAM})(_({_INSIDE}))+", inside):
        return ".".join(["transformer", *re.findall(rf"(?:{_STREAM}|{_INSIDE})(?=_|$)", inside)])
    if own := re.match(rf"({'|'.join(_SDXL)})(?=_|$)", inside) if component == "unet" else None:
        rest = inside[own.end() :]
        inside = _SDXL[own[0]] + _SDXL_RESNET.get(rest, rest)
    if re.fullmatch(rf"({_WORD})(_({_WORD}))*", inside) is None:
        return ""
    return ".".join([component, *re.findall(rf"(?:{_WORD})(?=_|$)", inside)])
