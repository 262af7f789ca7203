"""The cost of LoRA on a vision transformer, beside the frozen model and beside peft, in one process.

Every variant runs the same step (forward, backward from the same gradient) on the same weights and pictures. Rounds are
interleaved and reversed every other time, so a busy machine hurts all alike; ratios are medians over rounds of paired
process CPU times, on one thread. Saved activations are counted to the byte.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from graft.studio.disk import write_json
from graft.studio.errors import InputError
from graft.studio.methods.lora import LoRA
from graft.studio.slots import Handle

TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
LIMITS = {"step over frozen": 1.20, "saved bytes over peft": 1.0, "dropout over none": 1.10, "8 adapters over 1": 1.15}
"""What the core promises; `run` reports each with its measured value."""

_RANK, _BATCH, _ADAPTERS, _DROPOUT = 8, 16, 8, 0.1


@dataclass
class Variant:
    """One way to take the step."""

    model: nn.Module
    """Called on the pictures."""
    parameters: list[nn.Parameter]
    """Their gradients are part of the step."""
    handle: Handle | None = None
    """Ours, when it is ours."""

    def step(self, x: Tensor, upstream: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns the output and the gradients of the parameters (of the input, without any)."""
        wanted: list[Tensor] = [*self.parameters]
        if not wanted:  # x itself stays as it is: the others must not keep more for its sake
            wanted = [x := x.detach().requires_grad_()]
        y = self.model(x)
        return y.detach(), torch.autograd.grad(y, wanted, upstream)


def run(out: Path | None = None, rounds: int = 7, depth: int = 12, width: int = 384) -> dict[str, Any]:
    """Measures and returns the table; writes ``core.json`` into ``out`` if given.

    Args:
        out: folder of the result.
        rounds: interleaved rounds; about 40 CPU seconds each at the default size.
        depth: transformer blocks.
        width: token width.

    Raises:
        InputError: timm or peft is not installed.
    """
    torch.manual_seed(0)
    variants, x, upstream = _variants(depth, width)
    with _one_thread():
        seconds = _time(variants, x, upstream, rounds)
        saved = {name: _saved_bytes(variants[name], x, upstream) for name in variants}
        agreement = _agreement(variants, x, upstream)
    ratios = {
        "step over frozen": _ratio(seconds, "lora", "frozen"),
        "saved bytes over peft": saved["lora"] / saved["peft"],
        "dropout over none": _ratio(seconds, "lora, dropout", "lora"),
        "8 adapters over 1": _ratio(seconds, "lora, 8 adapters", "lora"),
    }
    beside = {
        "peft step over frozen": _ratio(seconds, "peft", "frozen"),
        "peft step over ours": _ratio(seconds, "peft", "lora"),
        "peft dropout over none, seconds": _ratio(seconds, "peft, dropout", "peft"),
        "peft dropout over none, saved bytes": saved["peft, dropout"] / saved["peft"],
        "our dropout over none, saved bytes": saved["lora, dropout"] / saved["lora"],
    }
    result = {
        "work": f"ViT {depth} x {width}, batch {_BATCH}, LoRA rank {_RANK} on {', '.join(TARGETS)}",
        "how": f"one thread, medians of {rounds} interleaved rounds, CPU seconds",
        "checks": {name: {"value": ratios[name], "limit": limit} for name, limit in LIMITS.items()},
        "passed": all(ratios[name] <= limit for name, limit in LIMITS.items()),
        "beside": beside,
        "cpu_seconds": {name: median(cpu for cpu, _ in times) for name, times in seconds.items()},
        "wall_seconds": {name: median(wall for _, wall in times) for name, times in seconds.items()},
        "saved_mib": {name: count / 2**20 for name, count in saved.items()},
        "largest_difference_to_peft": agreement,
    }
    if out is not None:
        write_json(out / "core.json", result)
    return result


def _variants(depth: int, width: int) -> tuple[dict[str, Variant], Tensor, Tensor]:
    try:
        import peft
        import timm
    except ImportError as error:
        raise InputError("bench core", f"{error.name} is not installed", "pip install 'graft-studio[dev]'") from error
    heads = max(1, width // 64)
    base = timm.create_model(
        "vit_small_patch16_224", depth=depth, embed_dim=width, num_heads=heads, class_token=False, global_pool="avg"
    )
    base = base.requires_grad_(False).eval()

    def ours(dropout: float = 0.0, slots: int = 1) -> Variant:
        model = deepcopy(base)
        handle = LoRA(rank=_RANK, alpha=16, dropout=dropout, targets=TARGETS).attach(model, slots=slots)
        if slots > 1:
            handle.route(torch.arange(_BATCH) % slots)
        return Variant(model, list(handle.bank.parameters()), handle)

    def theirs(dropout: float = 0.0) -> Variant:
        config = peft.LoraConfig(r=_RANK, lora_alpha=16, lora_dropout=dropout, target_modules=r".*\.(qkv|proj|fc1|fc2)")
        config.exclude_modules = r"patch_embed\..*"
        model = peft.get_peft_model(deepcopy(base), config)  # type: ignore[arg-type]
        model.train(dropout > 0)
        return Variant(model, [p for p in model.parameters() if p.requires_grad])

    variants = {
        "frozen": Variant(deepcopy(base), []),
        "lora": ours(),
        "peft": theirs(),
        "lora, dropout": ours(_DROPOUT),
        "peft, dropout": theirs(_DROPOUT),
        "lora, 8 adapters": ours(slots=_ADAPTERS),
    }
    _same_factors(variants)
    return variants, torch.randn(_BATCH, 3, 224, 224), torch.randn(_BATCH, 1000) / _BATCH


def _same_factors(variants: dict[str, Variant]) -> None:
    """Gives every variant, and every slot, the same random factors."""
    handle = variants["lora"].handle
    assert handle is not None
    with torch.no_grad():
        for name, parameter in handle.bank.named_parameters():
            nn.init.normal_(parameter, std=0.02 if name.endswith("B") else 0.05)
    tensors = handle.tensors()
    for variant in variants.values():
        if variant.handle is not None:
            for slot in range(variant.handle.slots):
                variant.handle.load(tensors, slot)
        else:
            with torch.no_grad():
                for name, parameter in variant.model.named_parameters():
                    if "lora_" in name:
                        parameter.copy_(tensors[_our_name(name)])


def _our_name(name: str) -> str:
    site, _, end = name.removeprefix("base_model.model.").partition(".lora_")
    return f"{site}.{end[0]}"


def _time(
    variants: dict[str, Variant], x: Tensor, upstream: Tensor, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """(CPU, wall) seconds of each variant's step in each round; the first round warms up and is dropped."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        order = list(variants) if turn % 2 else list(variants)[::-1]
        for name in order:
            cpu, wall = time.process_time(), time.perf_counter()
            variants[name].step(x, upstream)
            if turn:
                seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return seconds


def _ratio(seconds: dict[str, list[tuple[float, float]]], name: str, over: str) -> float:
    return median(a[0] / b[0] for a, b in zip(seconds[name], seconds[over], strict=True))


def _saved_bytes(variant: Variant, x: Tensor, upstream: Tensor) -> int:
    """Bytes of the distinct storages kept for backward, without those of parameters, buffers and the input."""
    own: list[Tensor] = [x, *variant.model.parameters(), *variant.model.buffers(), *variant.parameters]
    own += variant.handle.bank.buffers() if variant.handle is not None else []
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        variant.step(x, upstream)
    return sum(storage.nbytes() for storage in kept.values())


def _agreement(variants: dict[str, Variant], x: Tensor, upstream: Tensor) -> dict[str, float]:
    """Largest differences to peft, relative to the largest value, of outputs and gradients."""
    expected, gradients = variants["peft"].step(x, upstream)
    names = [_our_name(name) for name, p in variants["peft"].model.named_parameters() if p.requires_grad]
    theirs = dict(zip(names, gradients, strict=True))
    differences = {}
    for name in ("lora", "lora, 8 adapters"):
        variant = variants[name]
        assert variant.handle is not None
        y, ours = variant.step(x, upstream)
        differences[f"{name}: output"] = float((y - expected).abs().max() / expected.abs().max())
        worst = 0.0
        for (key, _), grad in zip(variant.handle.bank.named_parameters(), ours, strict=True):
            # All slots hold the same factors, so their gradients sum to that of one adapter.
            worst = max(worst, float((grad.sum(0) - theirs[key]).abs().max() / theirs[key].abs().max()))
        differences[f"{name}: gradients"] = worst
    return differences


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def table(result: dict[str, Any]) -> str:
    """Returns the result of `run` as text."""
    lines = [result["work"], result["how"], ""]
    for name, check in result["checks"].items():
        verdict = "ok" if check["value"] <= check["limit"] else "MISSED"
        lines.append(f"{name:38} {check['value']:8.3f}  limit {check['limit']:.2f}  {verdict}")
    lines += [f"{name:38} {value:8.3f}" for name, value in result["beside"].items()]
    lines.append("")
    for name, cpu in result["cpu_seconds"].items():
        wall, saved = result["wall_seconds"][name], result["saved_mib"][name]
        lines.append(f"{name:38} {cpu:8.3f} s CPU {wall:8.3f} s wall {saved:8.1f} MiB saved")
    lines += [
        f"{'difference, ' + name:38} {value:8.1e}" for name, value in result["largest_difference_to_peft"].items()
    ]
    return "\n".join(lines)
