"""What there is: domains, their methods, benchmarks. Plain tables of names; nothing is imported before it is used."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from graft.studio.errors import InputError

DOMAINS: dict[str, str] = {"diffusion": "graft.diffusion", "pocket": "graft.studio.pocket.pretrain", "vlm": "graft.vlm"}
"""Domain -> package with `DataConfig`, `load_base`, `prepare`, `preview` and `evaluate`."""

METHODS: dict[tuple[str, str], str] = {
    ("diffusion", "lora"): "graft.diffusion.lora:DiffusionLoRA",
    ("diffusion", "textual_inversion"): "graft.diffusion.textual_inversion:TextualInversion",
    ("pocket", "autoencoder"): "graft.studio.pocket.pretrain.autoencoder:Autoencoder",
    ("pocket", "clip"): "graft.studio.pocket.pretrain.clip:Clip",
    ("pocket", "vit"): "graft.studio.pocket.pretrain.vit:Vit",
    ("pocket", "unet"): "graft.studio.pocket.pretrain.unet:Unet",
    ("vlm", "clip_lora"): "graft.vlm.clip_lora:ClipLoRA",
    ("vlm", "cocoop"): "graft.vlm.cocoop:CoCoOp",
    ("vlm", "coop"): "graft.vlm.coop:CoOp",
    ("vlm", "clip_adapter"): "graft.vlm.clip_adapter:ClipAdapter",
    ("vlm", "cross_modal"): "graft.vlm.cross_modal:CrossModal",
    ("vlm", "prolip"): "graft.vlm.prolip:ProLIP",
    ("vlm", "task_res"): "graft.vlm.task_res:TaskRes",
    ("vlm", "tip_adapter"): "graft.vlm.tip_adapter:TipAdapter",
    ("vlm", "tip_adapter_f"): "graft.vlm.tip_adapter:TipAdapterF",
}
"""(domain, method) -> "module:class", a frozen dataclass."""

BENCHMARKS: dict[str, str] = {
    "clip-speed": "graft.vlm.bench:speed",
    "core": "graft.studio.bench.core:run",
    "few-shot": "graft.vlm.bench:few_shot",
    "kill": "graft.studio.bench.kill:run",
    "personalization": "graft.diffusion.bench:personalization",
    "textual-inversion": "graft.diffusion.bench:textual_inversion",
}
"""Benchmark -> "module:function"."""

# The file that marks a local folder, and what its "model_type" may be -> its domain.
_MARKS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("model_index.json", (), "diffusion"),
    ("open_clip_config.json", (), "vlm"),
    ("config.json", ("clip", "siglip"), "vlm"),
)
# The beginning of a base's name -> its domain.
_PREFIXES = {"pocket-clip": "vlm", "open_clip:": "vlm", "hf-hub:": "vlm", "local-dir:": "vlm"}


def _refuse(kind: str, name: str, known: list[str]) -> InputError:
    from graft.studio.config import suggest

    return InputError(f"{kind} {name!r}", f"there is no such {kind}", suggest(name, known))


def domain(name: str) -> ModuleType:
    """Return a domain's package.

    Raises:
        InputError: no such domain, or its libraries are not installed.
    """
    return _package(name)


def _package(name: str) -> ModuleType:
    if name not in DOMAINS:
        raise _refuse("domain", name, sorted(DOMAINS))
    return _load(DOMAINS[name], name)


def domain_of(method: str) -> str:
    """Return the only domain that has a method.

    Raises:
        InputError: no domain has it, or several have.
    """
    found = sorted(domain for domain, name in METHODS if name == method)
    if not found:
        raise _refuse("method", method, sorted({name for _, name in METHODS}))
    if len(found) > 1:
        raise InputError(f"method {method!r}", f"{' and '.join(found)} have it", "Add domain = ... to the job")
    return found[0]


def method_class(domain: str, method: str) -> type:
    """Return a method's class, the dataclass of its settings.

    Raises:
        InputError: no such domain or method.
    """
    if domain not in DOMAINS:
        raise _refuse("domain", domain, sorted(DOMAINS))
    if (domain, method) not in METHODS:
        raise _refuse("method", method, sorted(name for of, name in METHODS if of == domain))
    return find(METHODS[domain, method], domain)


def find(place: str, extra: str = "") -> Any:
    """Return what "module:name" names."""
    module, name = place.split(":")
    return getattr(_load(module, extra), name)


def _load(module: str, extra: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("graft"):
            raise
        remedy = f'Run: pip install "graft-studio[{extra}]"' if extra else f"Install {error.name}"
        raise InputError(module, f"the library {error.name!r} is not installed", remedy) from error


def load_base(name: str, device: str | None = None, dtype: Any = None, domain: str = "") -> Any:
    """Return a frozen base, ready to run.

    Args:
        name: an embedded model ("pocket-sd"), a local folder, or a hub id.
        device: where it runs; None takes the accelerator if there is one.
        dtype: type of its weights; None is float32.
        domain: its domain; hub ids do not tell theirs, and are taken for diffusion pipelines without it.

    Raises:
        InputError: no such base, or it could not be loaded whole.
    """
    device = device or default_device()
    of = domain or _domain_of_base(name)
    return _package(of).load_base(name, device=device, dtype=dtype)


def _domain_of_base(name: str) -> str:
    """The domain that a base's name or folder tells."""
    for prefix, of in _PREFIXES.items():
        if name.startswith(prefix):
            return of
    folder = Path(name)
    if not folder.is_dir():
        return "diffusion"
    for mark, kinds, of in _MARKS:
        if (folder / mark).exists() and (not kinds or _model_type(folder / mark) in kinds):
            return of
    marks = dict.fromkeys(mark for mark, _, _ in _MARKS)
    raise InputError(name, f"the folder has none of {', '.join(marks)}", "Give the folder of a saved model")


def _model_type(file: Path) -> str:
    try:
        return str(json.loads(file.read_text(encoding="utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError):
        return ""


def default_device() -> str:
    """Return "cuda", "mps" or "cpu": the fastest that this machine has."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"
