"""`graft bench slots`: adapters put one after the other onto a model that has one, beside peft.

Here `Handle.add` copies random factors into a free slot, there `add_adapter` makes modules that draw theirs; in the end
the last one of peft's is added here too, and must give the same output. The stacks double when they are full, so a few
additions copy everything that is there: they stand apart as ``slowest``, and count in ``mean``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median
from time import process_time
from typing import Any

import torch
from torch import Tensor

from graft.studio.disk import write_json
from graft.studio.errors import InputError
from graft.studio.methods.lora import LoRA

LIMITS = {"200th over 2nd": 2.0, "ms of the 200th": 5.0}
TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_RANK = 8
_SPAN = 3


def run(out: Path | None = None, adapters: int = 202, depth: int = 12, width: int = 384) -> dict[str, Any]:
    """Add adapters to a ViT and return the milliseconds that each took.

    Args:
        out: folder for `slots.json`; None writes nothing.
        adapters: how many in the end, 36 or more; peft takes longer for each, about a minute for 202.
        depth: blocks of the ViT, of four sites each.
        width: of the ViT.

    Raises:
        InputError: too few, or peft and timm are not installed.
    """
    if adapters < 36:
        raise InputError(f"adapters = {adapters}", "too few for the 33rd and those after it", "Take 36 or more")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds, sites, difference = _additions(adapters, depth, width)
    finally:
        torch.set_num_threads(threads)
    result = _result(seconds, sites, difference)
    result["table"] = table(result)
    if out is not None:
        write_json(out / "slots.json", result)
    return result


def _additions(adapters: int, depth: int, width: int) -> tuple[dict[str, list[float]], int, float]:
    """Seconds of the additions on each side, the number of sites, and how far an adapter's outputs differ.

    One side after the other: what many modules cost the interpreter is not to be paid by who has none.
    """
    model, theirs = _models(depth, width)
    handle = LoRA(rank=_RANK, alpha=float(_RANK), targets=TARGETS).attach(model)  # peft has the same scale, 1
    first = {name: torch.randn_like(tensor) for name, tensor in handle.tensors().items()}
    ours = [_timed(lambda: handle.add(first)) for _ in range(2, adapters + 1)]
    peft = [_timed(partial(theirs.add_adapter, str(number), _settings())) for number in range(2, adapters + 1)]
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        handle.route(torch.full((2,), handle.add(_factors(theirs, str(adapters)))))
        theirs.set_adapter(str(adapters))
        expected, found = theirs(x), model(x)
    return {"graft": ours, "peft": peft}, len(handle.plan), float((found - expected).abs().max() / expected.abs().max())


def _timed(add: Callable[[], Any]) -> float:
    begun = process_time()
    add()
    return process_time() - begun


def _models(depth: int, width: int) -> tuple[Any, Any]:
    """The same ViT twice, one of them with a first adapter of peft."""
    try:
        import peft
        import timm
    except ImportError as error:
        raise InputError("bench slots", f"{error.name} is not installed", "pip install 'graft-studio[dev]'") from error
    settings = {"depth": depth, "embed_dim": width, "num_heads": max(1, width // 64), "num_classes": 0}
    model, twin = (timm.create_model("vit_small_patch16_224", **settings).requires_grad_(False).eval() for _ in "ab")
    twin.load_state_dict(model.state_dict())
    return model, peft.get_peft_model(twin, _settings(), adapter_name="1").eval()


def _settings() -> Any:
    import peft

    return peft.LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=list(TARGETS), init_lora_weights=False)


def _factors(theirs: Any, adapter: str) -> dict[str, Tensor]:
    """One adapter of peft under our names."""
    return {
        f"{name.removeprefix('base_model.model.')}.{end[-1]}": getattr(module, end)[adapter].weight.detach()
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
        for end in ("lora_A", "lora_B")
    }


def _result(seconds: dict[str, list[float]], sites: int, difference: float) -> dict[str, Any]:
    """Milliseconds of some additions, each the median of itself and those next to it."""
    count = len(seconds["peft"]) + 1
    places = [place for place in (2, 33, 200) if place + _SPAN - 1 <= count]
    rows: list[dict[str, Any]] = []
    for place in places:
        near = slice(place - 2, place - 2 + _SPAN)
        rows.append({"adapter": str(place), **{name: 1e3 * median(all_[near]) for name, all_ in seconds.items()}})
    for name, of in (("mean", mean), ("slowest", max)):
        rows.append({"adapter": name, **{side: 1e3 * of(all_) for side, all_ in seconds.items()}})
    last, first = rows[len(places) - 1]["graft"], rows[0]["graft"]
    values = {"200th over 2nd": last / first, "ms of the 200th": last} if 200 in places else {}
    return {
        "work": f"LoRA rank {_RANK} on {sites} sites of a ViT, {count} adapters",
        "how": f"one thread, CPU milliseconds of an addition; 2, 33, 200: median of it and the {_SPAN - 1} after it",
        "rows": rows,
        "checks": {name: {"value": value, "limit": LIMITS[name]} for name, value in values.items()},
        "passed": all(value <= LIMITS[name] for name, value in values.items()),
        "difference to peft": difference,
    }


def table(result: dict[str, Any]) -> str:
    """Returns the result of `run` as text."""
    lines = [result["work"], result["how"], "", f"{'adapter':10}{'graft':>10}{'peft':>10}{'peft / graft':>14}"]
    for row in result["rows"]:
        ratio = row["peft"] / row["graft"]
        lines.append(f"{row['adapter']:10}{row['graft']:10.2f}{row['peft']:10.2f}{ratio:14.1f}")
    lines.append("")
    for name, check in result["checks"].items():
        verdict = "ok" if check["value"] <= check["limit"] else "MISSED"
        lines.append(f"{name:26}{check['value']:8.2f}  limit {check['limit']:.2f}  {verdict}")
    lines.append(f"{'largest difference to peft':26}{result['difference to peft']:8.1e}")
    return "\n".join(lines)
