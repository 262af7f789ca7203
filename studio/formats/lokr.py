"""LoKr in the files of others: keys ``<module>.lokr_w1``, ``.lokr_w2``; of thin factors ``.lokr_w2_a``, ``.lokr_w2_b``.

| format | file | module | scale |
|---|---|---|---|
| `kohya` | `kohya.safetensors`, LyCORIS's layout, for ComfyUI | `lora_unet_...`, `lora_te_...` | `.alpha` |
| `diffusers` | `pytorch_lora_weights.safetensors` | `transformer.<path>`, `unet.<path>` | none |
| `peft` | a folder, or one for each component | `base_model.model.<path>` | in the config |

The scale is alpha / rank where a factor is thin, else 1, whatever alpha says (peft: alpha / rank always). In what is
written it is multiplied into the first factor and alpha equals the rank, so a reader which ignores alpha is right too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.studio.adapter import Adapter, Card
from graft.studio.errors import FormatError, InputError
from graft.studio.formats import kohya, provenance
from graft.studio.formats.files import read_tensors, write_tensors
from graft.studio.formats.peft_folder import COMPONENTS, FILE, PREFIX, by_component, refuse_options, write_folder
from graft.studio.methods.lokr import NAMES, split
from graft.studio.sites import Plan, Site, nearest

_DIFFUSERS = "pytorch_lora_weights.safetensors"
_MARK = ".lokr_"
Factors = dict[str, Tensor]
"""Tensors of one module by `NAMES`, with the scale in the first."""


def recognises(keys: Iterable[str]) -> bool:
    """Whether these are the keys of such a file."""
    return any(_MARK in key for key in keys)


def _modules(adapter: Adapter) -> dict[str, Factors]:
    """Factors by module."""
    config, modules = adapter.card.config, {}
    for site in Plan.from_list(adapter.card.sites):
        own = {name: adapter.tensors[key].float() for name in NAMES if (key := f"{site.key}.{name}") in adapter.tensors}
        if site.rows is not None or site.kind not in ("linear", "conv"):
            reason = "other libraries have LoKr of whole linear layers and convolutions only"
            raise InputError(site.key, reason, "use native, or target the projection by its path")
        thin = bool({"w1_a", "w2_a"} & set(own))
        first = "w1" if "w1" in own else "w1_a"
        own[first] = own[first] * (config["alpha"] / config["rank"] if thin else 1.0)
        modules[site.name] = own
    return modules


def _write_kohya(adapter: Adapter, folder: Path) -> list[Path]:
    """Writes LyCORIS's file.

    Raises:
        InputError: sites outside the UNet and text encoders of SD or SDXL.
    """
    modules = _modules(adapter)
    two = any(name.startswith("text_encoder_2.") for name in modules)
    named = {kohya.name_of(path, two): own for path, own in modules.items()}
    tensors: Factors = {}
    for short, own in named.items():
        tensors |= {f"{short}{_MARK}{name}": tensor for name, tensor in own.items()}
        tensors[f"{short}.alpha"] = torch.tensor(float(_rank(own) or adapter.card.config["rank"]))
    told = {"format": "pt", "ss_network_module": "lycoris.kohya", **provenance.header(adapter.card)}
    return [_checked(write_tensors(folder / kohya.FILE, tensors, told), named)]


def _write_diffusers(adapter: Adapter, folder: Path) -> list[Path]:
    """Writes the file that ``load_lora_weights`` of Z-Image and FLUX.2, and any denoiser's ``load_lora_adapter``, load.

    Raises:
        InputError: sites outside a pipeline's components.
    """
    modules = _modules(adapter)
    for path in modules:
        if path.partition(".")[0] not in COMPONENTS:
            raise InputError(path, "names no component of a pipeline", "attach to {'unet': unet} or export to peft")
    tensors = {f"{path}{_MARK}{name}": tensor for path, own in modules.items() for name, tensor in own.items()}
    told = {"format": "pt", **provenance.header(adapter.card)}
    return [_checked(write_tensors(folder / _DIFFUSERS, tensors, told), modules)]


def _write_peft(adapter: Adapter, folder: Path) -> list[Path]:
    """Writes a folder that ``PeftModel.from_pretrained`` loads, or one for each component.

    Raises:
        InputError: factors that no ``decompose_factor`` gives.
    """
    modules, paths = _modules(adapter), []
    factor = factor_of(Plan.from_list(adapter.card.sites), modules)
    if factor is None:
        raise InputError("the adapter", "no one factor splits all its layers like this", "use native or kohya")
    for component, parts in by_component(modules).items():
        ranks = {path: _rank(own) or max(own["w2"].shape[:2]) for path, own in parts.items()}
        rank = max(ranks.values())
        others = {path: each for path, each in ranks.items() if each != rank}
        config = {
            "peft_type": "LOKR",
            "base_model_name_or_path": adapter.card.base,
            "r": rank,
            "alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "decompose_both": any("w1_a" in own for own in parts.values()),
            "decompose_factor": factor,
            "use_effective_conv2d": False,
            "target_modules": sorted(parts),
            "inference_mode": True,
            "task_type": None,
        }
        keys = {f"{PREFIX}{path}{_MARK}{name}": tensor for path, own in parts.items() for name, tensor in own.items()}
        paths += write_folder(folder / component, config, keys, adapter.card)
    return paths


WRITERS: dict[str, Callable[[Adapter, Path], list[Path]]] = {
    "kohya": _write_kohya,
    "diffusers": _write_diffusers,
    "peft": _write_peft,
}
"""Format -> what writes it."""


def read(path: Path) -> Adapter:
    """Reads a file of LyCORIS (kohya) or of diffusers.

    Raises:
        FormatError: modules that are not known, or factors that do not belong together.
    """
    modules: dict[str, Factors] = {}
    for given, own in _grouped(read_tensors(path)[0], str(path)).items():
        name = re.sub(r"^diffusion_model\.", "transformer.", given)  # ai-toolkit's, on Z-Image
        known = name.partition(".")[0] in COMPONENTS
        module = name if known else kohya.path_of(name.replace("lycoris_", "lora_unet_", 1))
        if not module or module in modules:
            reason = (
                "a module that is named twice" if module else "no module of Stable Diffusion's UNet or text encoders"
            )
            raise FormatError(f"{path}: {name}", reason, "LoKrs of SD 1.x, SD 2.x, SDXL, and of diffusers are read")
        modules[module] = own
    return _adapter(modules, "diffusion")


def read_folder(folder: Path, settings: Mapping[str, Any]) -> Adapter:
    """Reads what peft wrote."""
    refuse_options(settings, ("layers_pattern", "layers_to_transform"), str(folder))
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in read_tensors(folder / FILE)[0].items()}
    modules = _grouped(tensors, str(folder / FILE))
    ranks, alphas = (settings.get(f"{name}_pattern") or {} for name in ("rank", "alpha"))
    for path, own in modules.items():
        rank, alpha = (_of(given, path, settings[name]) for given, name in ((ranks, "r"), (alphas, "alpha")))
        first = "w1" if "w1" in own else "w1_a"
        own[first] = own[first] * (alpha / rank)
    return _adapter(modules, "")


def factor_of(sites: Iterable[Site], modules: Mapping[str, Factors]) -> int | None:
    """The factor by which peft splits all modules as they are, if there is one."""
    splits = []
    for site in sites:
        out, inside, *_ = site.shape
        rows, columns = _sides(modules[site.name], "w1")
        splits += [(rows, out // rows), (columns, inside // columns)]
    candidates = [-1, *sorted({first for first, _ in splits})]
    return next((f for f in candidates if all(_in_peft(a * b, f) == (a, b) for a, b in splits)), None)


def _in_peft(number: int, factor: int) -> tuple[int, int]:
    """peft's way of splitting a width: any factor that divides it is taken, even one above the root."""
    return (factor, number // factor) if factor > 0 and number % factor == 0 else split(number, factor)


def _of(patterns: Mapping[str, Any], path: str, default: Any) -> float:
    """A setting of a module, which patterns may have by the end of its path."""
    found = (value for key, value in patterns.items() if path == key or path.endswith(f".{key}"))
    return float(next(found, default))


def _grouped(tensors: Mapping[str, Tensor], where: str) -> dict[str, Factors]:
    """Factors by the module's name in a file, the scale by its alpha multiplied in, Tucker's form multiplied out."""
    groups: dict[str, Factors] = {}
    for key, tensor in tensors.items():
        name, mark, end = key.rpartition(_MARK)
        if not mark and key.endswith(".alpha"):
            name, end = key.removesuffix(".alpha"), "alpha"
        if not name or end not in (*NAMES, "t2", "alpha"):
            raise FormatError(f"{where}: {key}", "no factor of a LoKr", nearest(end, (*NAMES, "alpha")))
        groups.setdefault(name, {})[end] = tensor.float()
    for name, own in groups.items():
        thin = bool({"w1_a", "w2_a"} & set(own))
        alpha = float(own.pop("alpha", torch.tensor(0.0)))
        if "t2" in own and {"w2_a", "w2_b"} <= set(own):
            rank = own["w2_a"].shape[0]
            own["w2"] = torch.einsum("ij...,ip,jr->pr...", own.pop("t2"), own.pop("w2_a"), own.pop("w2_b"))
        else:
            rank = _rank(own) or 1
        first = "w1" if "w1" in own else "w1_a"
        halves = [{whole} <= set(own) or {f"{whole}_a", f"{whole}_b"} <= set(own) for whole in ("w1", "w2")]
        if not all(halves) or len(own) != sum(1 if each in own else 2 for each in ("w1", "w2")):
            held = ", ".join(sorted(own))
            raise FormatError(f"{where}: {name}", f"{held} are not two factors", "download or export it again")
        if thin:
            own[first] = own[first] * ((alpha or rank) / rank)
    return groups


def _adapter(modules: Mapping[str, Factors], domain: str) -> Adapter:
    """The adapter with scale 1; what its layers are like is told by the factors."""
    tensors: Factors = {}
    sites, ranks = [], [1]
    for path, own in modules.items():
        (rows, columns), (k, n) = _sides(own, "w1"), _sides(own, "w2")
        kernel = own["w2"].shape[2:] if "w2" in own else ()
        shape = (rows * k, columns * n, *kernel)
        site = Site(path, "conv" if len(shape) > 2 else "linear", shape)
        sites.append(site)
        ranks.append(_rank(own) or 1)
        tensors |= {f"{path}.{name}": tensor for name, tensor in own.items()}
    config = {
        "rank": max(ranks),
        "alpha": float(max(ranks)),
        "factor": factor_of(sites, modules) or -1,
        "targets": list(modules),
    }
    return Adapter(tensors, Card("lokr", config, domain, sites=Plan(tuple(sites)).to_list()))


def _sides(own: Factors, name: str) -> tuple[int, int]:
    """Rows and columns of a factor."""
    if name in own:
        return own[name].shape[0], own[name].shape[1]
    return own[f"{name}_a"].shape[0], own[f"{name}_b"].shape[1]


def _rank(own: Factors) -> int:
    """Inner width of a module's thin factors, 0 if it has none."""
    return next((own[name].shape[1] for name in ("w2_a", "w1_a") if name in own), 0)


def _checked(path: Path, named: Mapping[str, Factors]) -> Path:
    """Reads a file back and compares every factor.

    Raises:
        FormatError: the file does not say the same.
    """
    found = _grouped(read_tensors(path)[0], str(path))
    for name in sorted(set(found) | set(named)):
        own, read = named.get(name, {}), found.get(name, {})
        if own.keys() != read.keys() or not all(torch.equal(own[key], read[key]) for key in own):
            raise FormatError(f"{path}: {name}", "it reads back different", "report this: nothing was exported")
    return path
