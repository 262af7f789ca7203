"""What there is: domains, their methods, benchmarks. Plain tables of names; nothing is imported before it is used."""

from __future__ import annotations

import copy
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from graft.studio.errors import InputError

DOMAINS: dict[str, str] = {
    "diffusion": "graft.diffusion",
    "llm_mm": "graft.llm_mm",
    "pocket": "graft.studio.pocket.pretrain",
    "vision": "graft.vision",
    "vlm": "graft.vlm",
}
"""Domain -> package with `DataConfig`, `EvaluationConfig`, `load_base`, `prepare`, `evaluate`; `preview` where pictures
are drawn, `predict` where they are told apart; `run_settings`, what `graft eval` takes from a run, or
`evaluation_settings`, from an adapter and its run. A domain without a method in `METHODS` has `load_base` only."""

METHODS: dict[tuple[str, str], str] = {
    ("diffusion", "controlnet"): "graft.diffusion.controlnet:ControlNet",
    ("diffusion", "custom_diffusion"): "graft.diffusion.custom_diffusion:CustomDiffusion",
    ("diffusion", "ip_adapter"): "graft.diffusion.ip_adapter:IPAdapter",
    ("diffusion", "lora"): "graft.diffusion.lora:DiffusionLoRA",
    ("diffusion", "dora"): "graft.diffusion.lora:DiffusionDoRA",
    ("diffusion", "lokr"): "graft.diffusion.lora:DiffusionLoKr",
    ("diffusion", "pivotal"): "graft.diffusion.pivotal:PivotalTuning",
    ("diffusion", "t2i_adapter"): "graft.diffusion.t2i_adapter:T2IAdapter",
    ("diffusion", "textual_inversion"): "graft.diffusion.textual_inversion:TextualInversion",
    ("llm_mm", "llama_adapter"): "graft.llm_mm.llama_adapter:LlamaAdapter",
    ("llm_mm", "llama_adapter_multimodal"): "graft.llm_mm.llama_adapter_multimodal:MultimodalLlamaAdapter",
    ("llm_mm", "llama_adapter_v2"): "graft.llm_mm.llama_adapter_v2:LlamaAdapterV2",
    ("llm_mm", "dora"): "graft.llm_mm.method:LanguageDoRA",
    ("llm_mm", "ia3"): "graft.llm_mm.method:LanguageIA3",
    ("llm_mm", "ladder_side_tuning"): "graft.llm_mm.method:LanguageLadder",
    ("llm_mm", "llava"): "graft.llm_mm.llava:LlavaTuning",
    ("llm_mm", "lora"): "graft.llm_mm.method:LanguageLoRA",
    ("llm_mm", "lora_fa"): "graft.llm_mm.method:LanguageLoRAFA",
    ("llm_mm", "o_lora"): "graft.llm_mm.method:LanguageOLoRA",
    ("llm_mm", "prefix_tuning"): "graft.llm_mm.method:LanguagePrefix",
    ("llm_mm", "prompt_tuning"): "graft.llm_mm.method:LanguagePrompt",
    ("pocket", "autoencoder"): "graft.studio.pocket.pretrain.autoencoder:Autoencoder",
    ("pocket", "clip"): "graft.studio.pocket.pretrain.clip:Clip",
    ("pocket", "llava"): "graft.studio.pocket.pretrain.llava:Llava",
    ("pocket", "vit"): "graft.studio.pocket.pretrain.vit:Vit",
    ("pocket", "unet"): "graft.studio.pocket.pretrain.unet:Unet",
    ("vision", "adapter_plus"): "graft.vision.adapter_plus:AdapterPlus",
    ("vision", "adaptformer"): "graft.vision.adaptformer:AdaptFormer",
    ("vision", "bitfit"): "graft.vision.scales:VisionBitFit",
    ("vision", "full"): "graft.vision.full:FullTuning",
    ("vision", "linear"): "graft.vision.probe:LinearProbe",
    ("vision", "lora"): "graft.vision.lora:VisionLoRA",
    ("vision", "ssf"): "graft.vision.scales:VisionSSF",
    ("vision", "vpt"): "graft.vision.vpt:VPT",
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

SITE_METHODS: dict[str, str] = {
    "lora": "graft.studio.methods.lora:LoRA",
    "lora_fa": "graft.studio.methods.lora_fa:LoRAFA",
    "o_lora": "graft.studio.methods.o_lora:OrthogonalLoRA",
    "moslora": "graft.studio.methods.moslora:MoSLoRA",
    "dora": "graft.studio.methods.dora:DoRA",
    "adalora": "graft.studio.methods.adalora:AdaLoRA",
    "sora": "graft.studio.methods.sora:SoRA",
    "dylora": "graft.studio.methods.dylora:DyLoRA",
    "krona": "graft.studio.methods.krona:KronA",
    "lokr": "graft.studio.methods.lokr:LoKr",
    "gated_lora": "graft.studio.methods.gated_lora:GatedLoRA",
    "houlsby": "graft.studio.methods.bottleneck:Houlsby",
    "pfeiffer": "graft.studio.methods.bottleneck:Pfeiffer",
    "parallel": "graft.studio.methods.bottleneck:Parallel",
    "compacter": "graft.studio.methods.compacter:Compacter",
    "ia3": "graft.studio.methods.ia3:IA3",
    "ssf": "graft.studio.methods.ssf:SSF",
    "bitfit": "graft.studio.methods.bitfit:BitFit",
    "fish_mask": "graft.studio.methods.fish_mask:FishMask",
    "diff_pruning": "graft.studio.methods.diff_pruning:DiffPruning",
    "prompt_tuning": "graft.studio.methods.prompt_tuning:PromptTuning",
    "prefix_tuning": "graft.studio.methods.prefix_tuning:PrefixTuning",
    "ladder_side_tuning": "graft.studio.methods.ladder_side_tuning:LadderSideTuning",
}
"""Method -> "module:class": those that act on sites of any torch model, whatever its domain."""

BENCHMARKS: dict[str, str] = {
    "batch": "graft.studio.bench.batch:run",
    "clip-speed": "graft.vlm.bench:speed",
    "concepts": "graft.diffusion.bench:concepts",
    "control": "graft.diffusion.bench:control",
    "controlnet": "graft.diffusion.bench:controlnet",
    "core": "graft.studio.bench.core:run",
    "custom-diffusion-speed": "graft.diffusion.bench:custom_diffusion_speed",
    "few-shot": "graft.vlm.bench:few_shot",
    "ip-adapter": "graft.diffusion.bench:ip_adapter",
    "jobs": "graft.studio.bench.jobs:run",
    "kernels": "graft.studio.bench.kernels:run",
    "kill": "graft.studio.bench.kill:run",
    "lora-speed": "graft.diffusion.bench:lora_speed",
    "many": "graft.diffusion.bench:many",
    "memory": "graft.llm_mm.bench_memory:run",
    "personalization": "graft.diffusion.bench:personalization",
    "slots": "graft.studio.bench.slots:run",
    "textual-inversion": "graft.diffusion.bench:textual_inversion",
    "vision": "graft.vision.bench:run",
    "vqa": "graft.llm_mm.bench:run",
}
"""Benchmark -> "module:function"."""

_TALKING = ("llava", "graft_llava", "llava_next", "smolvlm", "idefics3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# A file that marks a local folder, a key in it, and the values that the key may have (none: any) -> its domain.
_MARKS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("model_index.json", "_class_name", (), "diffusion"),
    ("open_clip_config.json", "model_cfg", (), "vlm"),
    ("config.json", "model_type", ("clip", "siglip"), "vlm"),
    ("config.json", "model_type", _TALKING, "llm_mm"),
    ("config.json", "architecture", (), "vision"),
)
# How the name of a base begins -> its domain; the first that fits counts.
_PREFIXES: dict[str, str | None] = {
    "pocket-sd": "diffusion",
    "pocket-vit": "vision",
    "pocket-clip": "vlm",
    "pocket-llava": "llm_mm",
    "pocket-": None,
    "timm/": "vision",
    "hf-hub:timm/": "vision",
    "hf-hub:": "vlm",
    "local-dir:": "vlm",
    "open_clip:": "vlm",
}


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


def domain_of(method: str, base: str = "") -> str:
    """Return the domain of a method; where several have it, the one that the base belongs to.

    Raises:
        InputError: no domain has it, or several have and the base does not tell.
    """
    found = sorted(domain for domain, name in METHODS if name == method)
    if not found:
        raise _refuse("method", method, sorted({name for _, name in METHODS}))
    told = domain_of_base(base) if len(found) > 1 else None
    if len(found) > 1 and told not in found:
        raise InputError(f"method {method!r}", f"{' and '.join(found)} have it", "Add domain = ... to the job")
    return told or found[0]


def domain_of_base(name: str) -> str | None:
    """Return the domain that a base's name or folder tells of, or None."""
    folder = Path(name).expanduser()
    if name and folder.is_dir() and not name.startswith("pocket-"):
        return next((of for mark, key, kinds, of in _MARKS if _holds(folder / mark, key, kinds)), None)
    for prefix, of in _PREFIXES.items():
        if name.startswith(prefix):
            return of
    # Hub ids do not tell what they are; a name without a slash is none, and may be one of timm's.
    return None if not name or "/" in name or name.startswith((".", "~")) else "vision"


def _domain_on_hub(name: str) -> str | None:
    """The domain of a hub id: by its small files in the local cache, or else by what the hub says of it."""
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        return None
    try:
        from huggingface_hub import HfApi, try_to_load_from_cache

        kept = {mark: try_to_load_from_cache(name, mark) for mark, *_ in _MARKS}
        if any(isinstance(file, str) for file in kept.values()):
            return next((of for mark, key, kinds, of in _MARKS if _holds(Path(str(kept[mark])), key, kinds)), None)
        info = HfApi().model_info(name, timeout=5)
    except Exception:  # not an id, no such model, no network, no client: whoever loads it says so
        return None
    kind = (info.config or {}).get("model_type")
    by_kind = next((of for _, key, kinds, of in _MARKS if key == "model_type" and kind in kinds), None)
    return {"diffusers": "diffusion", "timm": "vision", "open_clip": "vlm"}.get(info.library_name or "", by_kind)


def _holds(file: Path, key: str, kinds: tuple[str, ...]) -> bool:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and key in found and (not kinds or found[key] in kinds)


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


def site_method(name: str) -> Any:
    """Return the class of a method that acts on sites of any torch model.

    Raises:
        InputError: no such method.
    """
    if name not in SITE_METHODS:
        raise _refuse("method", name, sorted(SITE_METHODS))
    return find(SITE_METHODS[name])


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


def load_base(
    name: str, device: str | None = None, dtype: Any = None, domain: str = "", attention: str = "auto"
) -> Any:
    """Return a frozen base, ready to run.

    Args:
        name: an embedded model ("pocket-sd"), a local folder, a hub id, or a name of timm's.
        device: where it runs; None takes the accelerator if there is one.
        dtype: type of its weights; None is float32.
        domain: its domain; without it a hub id is asked for its config, and one that does not tell is taken for a
            diffusion pipeline.
        attention: "auto", "sdpa" or, for a diffusion pipeline on a GPU, "xformers", as in a job's `train.attention`.

    Raises:
        InputError: no such base, it could not be loaded whole, or its attention cannot be computed that way.
    """
    device = device or default_device()
    of = domain or domain_of_base(name) or _domain_on_hub(name)
    if of is None and Path(name).is_dir():
        marks = dict.fromkeys(f"{mark} with {key!r}" for mark, key, _, _ in _MARKS)
        raise InputError(name, f"the folder has none of {', '.join(marks)}", "Give the folder of a saved model")
    return _package(of or "diffusion").load_base(name, device=device, dtype=dtype, attention=attention)


_kept: dict[tuple[object, ...], Any] | None = None


def keep_bases() -> None:
    """From now on a process that trains many jobs loads a base once, and gives each job a copy of it."""
    global _kept
    _kept = {} if _kept is None else _kept


def kept(load: Any, name: str, device: str | None, attention: str) -> Any:
    """Return what `load` returns for these, or a copy of it as it was before anything was attached.

    On an accelerator a base is kept only while it takes less than a third of the memory that is free.
    """
    import torch

    if _kept is None:
        return load(name, device, attention=attention)
    key = (load, name, device, attention)
    if key not in _kept:
        _kept.clear()
        on_gpu = str(device).startswith("cuda")
        before = torch.cuda.memory_allocated() if on_gpu else 0
        base = load(name, device, attention=attention)
        if on_gpu and 3 * (torch.cuda.memory_allocated() - before) > torch.cuda.mem_get_info()[0]:
            return base
        _ = base.hash  # computed once
        _kept[key] = base
    return copy.deepcopy(_kept[key])


def default_device() -> str:
    """Return "cuda", "mps" or "cpu": the fastest that this machine has."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"
