"""`graft bench memory`: what a training step of a language model takes beside its weights, method by method.

`saved` counts the bytes that the forward pass keeps for the backward pass, beside weights and inputs. `peak` is how far
the tensors rise at most in a whole step: these, what the backward pass needs in between, and gradients and AdamW's
moments of what is trained. MeZO, which keeps none, stands beside one forward pass without any gradient. The limits are
what the papers promise. MeZO's is about all memory, so `peak` with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from graft.studio.bench.measure import one_thread, peak_allocated, saved_bytes
from graft.studio.disk import write_json
from graft.studio.method import SiteMethod
from graft.studio.methods.ladder_side_tuning import LadderSideTuning
from graft.studio.methods.lora import LoRA
from graft.studio.methods.lora_fa import LoRAFA
from graft.studio.methods.prompt_tuning import PromptTuning
from graft.studio.mezo import MeZO

METHODS: dict[str, SiteMethod] = {
    "lora": LoRA(targets="all-linear"),
    "lora_fa": LoRAFA(targets="all-linear"),
    "prompt_tuning": PromptTuning(length=20),
    "ladder_side_tuning": LadderSideTuning(),
}
"""Row of the table -> method on a decoder; beside them stand all its weights, MeZO and inference."""
LIMITS = {
    "LoRA-FA saved bytes over LoRA's": ("lora_fa", "saved", ("lora",), 1.0),
    "LST saved bytes over the least of the others'": (
        "ladder_side_tuning", "saved", ("lora", "lora_fa", "prompt_tuning", "full"), 1.0
    ),
    "LST saved bytes over full tuning's": ("ladder_side_tuning", "saved", ("full",), 0.31),
    "MeZO memory over inference's": ("mezo", "total", ("inference",), 1.05),
}  # fmt: skip
"""Promise -> method, figure, other methods, and the ratio to the least of them that it stays below. LST's paper saves
69 % of the memory of full tuning."""


@dataclass(frozen=True)
class Subject:
    """A decoder of transformers and a loss of it."""

    work: str
    """What is measured, for people."""
    decoder: nn.Module
    """Where the methods act, frozen."""
    loss: Callable[[], Tensor]
    """A forward pass."""
    own: tuple[Tensor, ...]
    """Weights, buffers and inputs."""


def run(
    out: Path | None = None, *, base: str = "pocket-llava", batch_size: int = 16, tiny: bool = False
) -> dict[str, Any]:
    """Measures on the language model of a base, and on a larger one of random weights.

    Args:
        out: folder for memory.json.
        base: of this domain.
        batch_size: rows of a step.
        tiny: a random model that is none larger, to see that it works.

    Returns:
        `models`, `checks` and `table`.
    """
    models, checks = dict[str, Any](), dict[str, Any]()
    with one_thread():
        for name, made in ((base, talking(base, batch_size)), ("llama", blocks(tiny, batch_size))):
            models[name] = {"work": made.work, "rows": _rows(made)}
    for promise, (method, figure, others, limit) in LIMITS.items():
        values = {
            name: model["rows"][method][figure] / min(model["rows"][other][figure] for other in others)
            for name, model in models.items()
        }
        checks[promise] = {"values": values, "limit": limit, "ok": max(values.values()) < limit}
    result: dict[str, Any] = {"models": models, "checks": checks, "passed": all(c["ok"] for c in checks.values())}
    if out is not None:
        write_json(out / "memory.json", result)
    return {**result, "table": table(result)}


def talking(base: str, batch_size: int) -> Subject:
    """The language model of a base, asked about pictures whose features are kept, as a job does."""
    from graft.llm_mm.base import load_base
    from graft.llm_mm.data import DataConfig, read_rows
    from graft.llm_mm.task import Reader
    from graft.studio.caches import Cache

    loaded, data = load_base(base, "cpu"), DataConfig(dataset="pocket-questions")
    loaded.model.set_attn_implementation("eager")  # as a job does on a CPU for rows this short
    reader = Reader.of(loaded, data, Cache())
    batch, _ = reader.batch(read_rows(data).train[:batch_size])
    reader.store.features(batch.pictures)
    tensors = (*loaded.model.parameters(), *loaded.model.buffers(), *batch[:3])
    work = f"language model of {base}, {batch_size} rows of {batch.ids.shape[1]} tokens, a picture in each"
    return Subject(work, loaded.model.model.language_model, lambda: cross_entropy(*reader.logits(batch, True)), tensors)


def blocks(tiny: bool, batch_size: int) -> Subject:
    """transformers' Llama of a few blocks with random weights."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    width, layers, tokens = (64, 2, 8) if tiny else (768, 4, 128)
    heads = width // 64
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=8,
    )
    model: Any = LlamaModel(config)
    model.requires_grad_(False).eval()
    x, upstream = torch.randn(2, batch_size, tokens, width)
    work = f"transformers Llama, {layers} blocks of width {width}, random weights, {batch_size} rows of {tokens} tokens"

    def loss() -> Tensor:
        y: Tensor = model(inputs_embeds=x, use_cache=False).last_hidden_state
        return (y * upstream).mean()

    return Subject(work, model, loss, (*model.parameters(), *model.buffers(), x, upstream))


def _rows(subject: Subject) -> dict[str, dict[str, float]]:
    """Figures in bytes by method; `total` adds the weights that are there before."""
    weights = sum(tensor.untyped_storage().nbytes() for tensor in subject.own)
    rows: dict[str, dict[str, float]] = {}

    def tell(name: str, work: Callable[[], object], trained: int, saved: int = 0) -> None:
        peak = peak_allocated(work)
        rows[name] = {"parameters": trained, "saved": saved, "peak": peak, "total": weights + peak}

    def learn(name: str, parameters: Iterable[nn.Parameter], own: Iterable[Tensor]) -> None:
        learnt = list(parameters)
        saved = saved_bytes(subject.loss, [*subject.own, *own])
        tell(name, lambda: _step(subject.loss, learnt), sum(each.numel() for each in learnt), saved)

    for name, method in METHODS.items():
        handle = method.attach({"model": subject.decoder})
        try:
            handle.reset(0, 0)
            bank = handle.bank
            learn(name, bank.parameters(), (*bank.parameters(), *bank.buffers()))
        finally:
            handle.detach()
    whole = list(subject.decoder.parameters())
    subject.decoder.requires_grad_(True)
    learn("full", whole, ())
    tell("mezo", lambda: _mezo_step(subject.loss, whole), sum(each.numel() for each in whole))
    subject.decoder.requires_grad_(False)
    tell("inference", torch.no_grad()(subject.loss), 0)
    return rows


def _step(loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> None:
    """A first step of AdamW, which makes its moments."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    loss().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def _mezo_step(loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> None:
    optimizer = MeZO(parameters, lr=0.0, weight_decay=0.0, eps=1e-3)
    optimizer.measure(0, lambda: (loss(), {}))
    optimizer.step()


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = []
    for name, model in result["models"].items():
        lines += [f"{name}: {model['work']}", f"{'':20} {'parameters':>11} {'saved MiB':>10} {'peak MiB':>9}"]
        for method, row in model["rows"].items():
            saved = f"{row['saved'] / 2**20:10.1f}" if row["saved"] else " " * 10
            lines.append(f"{method:20} {row['parameters']:11,} {saved} {row['peak'] / 2**20:9.1f}")
        lines.append("")
    for name, check in result["checks"].items():
        values = "  ".join(f"{model} {value:.3f}" for model, value in check["values"].items())
        lines.append(f"{name:46} {values}  limit {check['limit']:.2f}  {'ok' if check['ok'] else 'MISSED'}")
    return "\n".join(lines)
