"""LoRA of FLUX.1 and FLUX.2 in kohya's file (sd-scripts): ``lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight``.

Modules have the names of Black Forest Labs' code, in which projections are fused that diffusers keeps apart: q, k and v
of a block with two streams, and in FLUX.1 q, k, v and the feed-forward layer of a block with one. Factors of parts
stand in a fused one side by side, block-diagonal; a fused one is taken apart by rows, each with the columns of B that
these rows have. Both are exact. The scale is multiplied into B, alpha equals the rank of each module.
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
from graft.studio.formats import kohya, provenance
from graft.studio.formats.files import write_tensors
from graft.studio.formats.low_rank import LowRank, block_diagonal, from_adapter, to_adapter

_BLOCKS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
_ALIKE = {
    "double_img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "double_img_attn_proj": ("attn.to_out.0",),
    "double_txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "double_txt_attn_proj": ("attn.to_add_out",),
}
_PARTS = {
    1: _ALIKE
    | {
        "double_img_mlp_0": ("ff.net.0.proj",),
        "double_img_mlp_2": ("ff.net.2",),
        "double_img_mod_lin": ("norm1.linear",),
        "double_txt_mlp_0": ("ff_context.net.0.proj",),
        "double_txt_mlp_2": ("ff_context.net.2",),
        "double_txt_mod_lin": ("norm1_context.linear",),
        "single_linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "single_linear2": ("proj_out",),
        "single_modulation_lin": ("norm.linear",),
    },
    2: _ALIKE
    | {
        "double_img_mlp_0": ("ff.linear_in",),
        "double_img_mlp_2": ("ff.linear_out",),
        "double_txt_mlp_0": ("ff_context.linear_in",),
        "double_txt_mlp_2": ("ff_context.linear_out",),
        "single_linear1": ("attn.to_qkv_mlp_proj",),
        "single_linear2": ("attn.to_out",),
    },
}
"""FLUX.1 and FLUX.2: kind of block and name in it -> what diffusers has in its place."""
_OF_FLUX_1 = {"single_linear1": 7.0, "double_img_mlp_0": 4.0, "double_txt_mlp_0": 4.0, "single_linear2": 1 / 5}
_OF_FLUX_1 |= {"double_img_mlp_2": 1 / 4, "double_txt_mlp_2": 1 / 4}
"""Modules by which the two are told apart -> their rows over their columns in FLUX.1."""
_SHORT = re.compile(r"lora_unet_(double|single)_blocks_(\d+)_(.+)")
_PATH = re.compile(r"transformer\.(single_)?transformer_blocks\.(\d+)\.(.+)")


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is of FLUX."""
    return any(_SHORT.match(key) for key in keys)


def export(adapter: Adapter, folder: Path) -> list[Path]:
    """Writes a file that sd-scripts, ComfyUI and diffusers load.

    Raises:
        InputError: sites of another base, or that sd-scripts does not adapt; a DoRA.
    """
    modules = from_adapter(adapter)
    family = _family_of(modules)
    places = {
        (name.split("_")[0], end): (name, i) for name, ends in _PARTS[family].items() for i, end in enumerate(ends)
    }
    groups: dict[str, dict[int, LowRank]] = {}
    for path, module in modules.items():
        if module.length is not None:
            raise InputError(path, "diffusers drops a DoRA of kohya's FLUX file", "use native, diffusers or peft")
        found = _PATH.fullmatch(path)
        kind = "single" if found and found[1] else "double"
        if found and (kind, found[3]) in places:
            name, place = places[kind, found[3]]
            short = f"lora_unet_{kind}_blocks_{found[2]}_{name.partition('_')[2]}"
        elif path.startswith("text_encoder."):
            short, place = kohya.name_of(path, True), 0
        else:
            raise InputError(path, "kohya's FLUX file has no name for it", "use native, diffusers or peft")
        groups.setdefault(short, {})[place] = module
    fused = {short: _joined(short, parts, family) for short, parts in groups.items()}
    tensors: dict[str, Tensor] = {}
    for short, module in fused.items():
        tensors |= {f"{short}.lora_down.weight": module.down, f"{short}.lora_up.weight": module.up}
        tensors[f"{short}.alpha"] = torch.tensor(float(module.rank))
    tensors |= kohya.companions(tensors)
    told = {"format": "pt", "ss_network_module": "networks.lora_flux", **provenance.header(adapter.card)}
    file = write_tensors(folder / kohya.FILE, tensors, told)
    _check(modules, apart(kohya.factors(file), str(file)), str(file))
    return [file]


def read(path: Path) -> Adapter:
    """Reads a LoRA of FLUX.1 or FLUX.2.

    Raises:
        FormatError: a name that is none of their modules'.
    """
    return to_adapter(apart(kohya.factors(path), str(path)), "diffusion", str(path))


def _family_of(modules: Mapping[str, LowRank]) -> int:
    """1 or 2, by the names of an adapter's modules.

    Raises:
        InputError: they may be those of another transformer.
    """
    single = [found[3] for path in modules if (found := _PATH.fullmatch(path)) and found[1]]
    if not single:
        reason = "only FLUX has such a file, and is known by its blocks with one stream, none of which is adapted"
        raise InputError(next(iter(modules)), reason, "use native, diffusers or peft")
    return 2 if set(single) & {"attn.to_qkv_mlp_proj", "attn.to_out"} else 1


def _joined(short: str, parts: Mapping[int, LowRank], family: int) -> LowRank:
    """Factors of a fused module."""
    found = _SHORT.fullmatch(short)
    ends = _PARTS[family][f"{found[1]}_{found[3]}"] if found else ("",)
    if len(ends) == 1:
        return parts[0]
    width = next(iter(parts.values())).down.shape[1]
    sizes = [width, width, width, 4 * width][: len(ends)]
    rows = {place: (sum(sizes[:place]), sum(sizes[: place + 1])) for place in parts}
    if wrong := [place for place, part in parts.items() if part.up.shape[0] != sizes[place]]:
        reason = f"it has {parts[wrong[0]].up.shape[0]} rows, in FLUX.1 it would have {sizes[wrong[0]]}"
        raise InputError(f"{short}: {ends[wrong[0]]}", reason, "use native, diffusers or peft")
    return block_diagonal([(rows[place], part) for place, part in sorted(parts.items())], sum(sizes))


def apart(fused: Mapping[str, LowRank], where: str) -> dict[str, LowRank]:
    """Modules as diffusers has them.

    Raises:
        FormatError: an unknown name, or rows that cannot be shared out.
    """
    ratios = {
        name: module.up.shape[0] / module.down.shape[1]
        for short, module in fused.items()
        if (found := _SHORT.fullmatch(short)) and (name := f"{found[1]}_{found[3]}") in _OF_FLUX_1
    }
    family = 2 if any(abs(ratio - _OF_FLUX_1[name]) > 1e-6 for name, ratio in ratios.items()) else 1
    modules: dict[str, LowRank] = {}
    for short, module in fused.items():
        found = _SHORT.fullmatch(short)
        ends = _PARTS[family].get(f"{found[1]}_{found[3]}") if found else None
        if found is None or ends is None:
            path = kohya.path_of(short)
            if not path.startswith("text_encoder."):
                reason = "no module of FLUX's blocks or of its CLIP"
                raise FormatError(f"{where}: {short}", reason, "merge it in the program that made it")
            modules[path] = module
            continue
        out, width = module.up.shape[0], module.down.shape[1]
        sizes = [out // 3] * 3 if len(ends) == 3 else [width, width, width, out - 3 * width][: len(ends)]
        sizes = [out] if len(ends) == 1 else sizes
        if sum(sizes) != out:
            raise FormatError(f"{where}: {short}", f"{out} rows are not three alike", "download or export it again")
        for i, end in enumerate(ends):
            part = _rows(module, sum(sizes[:i]), sum(sizes[: i + 1]))
            if part is not None:
                modules[f"transformer.{_BLOCKS[found[1]]}.{found[2]}.{end}"] = part
    return modules


def _rows(module: LowRank, start: int, stop: int) -> LowRank | None:
    """Factors of some rows of a module, without the columns of B that are zero there; None if only other rows have
    any."""
    up = module.up[start:stop]
    length = None if module.length is None else module.length[start:stop]
    used = up.any(0)
    if not module.up.any() or used.all():
        return replace(module, up=up.contiguous(), length=length)
    if not used.any():
        return None
    return replace(module, down=module.down[used], up=up[:, used].contiguous(), length=length)


def _check(modules: Mapping[str, LowRank], written: Mapping[str, LowRank], where: str) -> None:
    """Compares what a file makes of inputs of chance, whole changes being large, with what the adapter makes of them;
    a module without change may have been left out.

    Raises:
        FormatError: the file does not say the same.
    """
    for path in set(modules) | set(written):
        own, found = (_probed(each[path]) if path in each else torch.zeros(()) for each in (modules, written))
        if (own - found).abs().max() > 1e-6 * own.abs().max():
            raise FormatError(where, f"{path} reads back different", "report this: nothing was exported")


def _probed(module: LowRank) -> Tensor:
    x = torch.randn(module.down.shape[1], 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return module.up.double() @ (module.down.double() @ x)
