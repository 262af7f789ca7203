"""The text engine, the store and the search beside plain implementations that do what the authors' code does.

Both sides have the same weights (a CLIP of ViT-B/16's size, drawn at random: speed does not depend on their values) and
the same inputs, in one process, in CPU seconds; what they compute is compared. Saved bytes are what autograd keeps for
the backward pass.

- CoOp, plain: encodes the batch's pictures, and all 77 positions of every class.
- CoCoOp, plain: encodes each picture alone and, behind it, all classes at 77 positions.
- Tip-Adapter's search, plain: affinity, vote and accuracy anew for every pair of strengths. A part of the pairs is
  timed, and the time of all is taken in proportion.
- An epoch of CLIP-Adapter or Tip-Adapter-F, plain: encodes the pictures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.studio.disk import write_json
from graft.studio.pocket.atlas import Atlas
from graft.vlm.base import ClipBase, Preprocess
from graft.vlm.clip_adapter import ClipAdapter
from graft.vlm.cocoop import CoCoOp
from graft.vlm.coop import CoOp
from graft.vlm.families import from_transformers, open_clip_words
from graft.vlm.head import Setting, Shots
from graft.vlm.tip_adapter import TipAdapterF, search

LIMITS = {
    "coop step": 8.0,
    "cocoop step": 6.0,
    "tip search": 100.0,
    "clip_adapter epoch": 20.0,
    "tip_adapter_f epoch": 20.0,
}
"""How many times faster each promises to be."""


def speed(
    out: Path | None = None, rounds: int = 1, batch: int = 32, classes: int = 100, layers: int = 12, part: str = "all"
) -> dict[str, Any]:
    """Measures and returns the figures; writes `clip-speed.json` into `out` if given.

    Args:
        out: folder of the result.
        rounds: timings of each side, of which the median counts; the plain sides take about a CPU minute each.
        batch: pictures of a CoOp step.
        classes: of CoOp and of the search; CoCoOp has half as many.
        layers: of both towers; 12 is ViT-B/16.
        part: `coop`, `cocoop`, `tip` or `epochs`; or all.
    """
    torch.manual_seed(0)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "coop": lambda: {"coop step": _coop(large(layers), classes, batch, rounds)},
        "cocoop": lambda: {"cocoop step": _cocoop(large(layers), classes // 2, rounds)},
        "tip": lambda: {"tip search": _tip(classes, rounds)},
        "epochs": lambda: _epochs(large(layers), classes, batch, rounds),
    }
    found: dict[str, Any] = {}
    for name in parts if part == "all" else [part]:
        found |= parts[name]()
    for name, row in found.items():
        row["ratio"], row["limit"] = row["plain_seconds"] / row["seconds"], LIMITS[name]
    passed = all(row["ratio"] >= row["limit"] for row in found.values())
    result = {"threads": torch.get_num_threads(), "rounds": rounds, "parts": found, "passed": passed}
    if out is not None:
        write_json(Path(out) / "clip-speed.json", result)
    return result


def large(layers: int = 12) -> ClipBase:
    """A CLIP of ViT-B/16's widths, with weights drawn at random."""
    from open_clip import SimpleTokenizer
    from transformers import CLIPConfig, CLIPModel

    text = {"num_hidden_layers": layers, "eos_token_id": 49407, "bos_token_id": 49406}
    config = CLIPConfig(text_config=text, vision_config={"num_hidden_layers": layers, "patch_size": 16})
    preprocess = Preprocess(224, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    return from_transformers("ViT-B/16", CLIPModel(config), open_clip_words(SimpleTokenizer()), preprocess)


def _setting(base: ClipBase, classes: int) -> Setting:
    return Setting(base, Atlas.load().names[:classes], ("a photo of a {}.",))


def plain_texts(setting: Setting, context: Tensor) -> Tensor:
    """Unit features of all classes at all positions, context (m, d) in place of words: (c, e)."""
    base, text = setting.base, setting.base.model.text_model
    filled = base.words([" ".join(["x"] * len(context)) + f" {name}." for name in setting.names])
    rows = text.embeddings.token_embedding(filled)
    start, behind = rows[:, :1], rows[:, 1 + len(context) :]
    x = torch.cat([start, context.expand(len(rows), -1, -1), behind], dim=1) + text.embeddings.position_embedding.weight
    mask = x.new_full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
    x = text.final_layer_norm(text.encoder(inputs_embeds=x, attention_mask=mask).last_hidden_state)
    return F.normalize(base.model.text_projection(x[torch.arange(len(x)), filled.argmax(-1)]), dim=-1)


def _coop(base: ClipBase, classes: int, batch: int, rounds: int) -> dict[str, Any]:
    setting, labels = _setting(base, classes), torch.arange(batch) % classes
    head = CoOp().build(setting)
    context, pixels = head.get_parameter("context"), _pixels(batch)
    features = _encoded(base, pixels)

    def plain() -> tuple[Tensor, ...]:
        seen = F.normalize(_encoded(base, pixels), dim=-1)
        loss = F.cross_entropy(setting.scale * seen @ plain_texts(setting, context).T, labels)
        return loss.detach(), *torch.autograd.grad(loss, [context])

    def ours() -> tuple[Tensor, ...]:
        loss, _ = head.loss(features, labels)
        return loss.detach(), *torch.autograd.grad(loss, [context])

    return _beside(plain, ours, rounds)


def _cocoop(base: ClipBase, classes: int, rounds: int, batch: int = 2) -> dict[str, Any]:
    setting, labels, pixels = _setting(base, classes), torch.arange(batch), _pixels(batch)
    head: Any = CoCoOp().build(setting)
    parameters, features = list(head.parameters()), _encoded(base, pixels)

    def plain() -> tuple[Tensor, ...]:
        total, sums = torch.zeros(()), [torch.zeros_like(p) for p in parameters]
        for picture, label in zip(pixels.split(1), labels.split(1), strict=True):
            seen = F.normalize(_encoded(base, picture), dim=-1)
            texts = plain_texts(setting, head.context + head.meta(seen))
            loss = F.cross_entropy(setting.scale * seen @ texts.T, label) / batch
            total += loss.detach()
            torch._foreach_add_(sums, list(torch.autograd.grad(loss, parameters)))
        return total, *sums

    def ours() -> tuple[Tensor, ...]:
        loss, _ = head.loss(features, labels)
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    return _beside(plain, ours, rounds)


def _tip(classes: int, rounds: int, timed: int = 40) -> dict[str, Any]:
    """16 shots, and 4 pictures of each class to search by: 200 betas and 20 alphas."""
    draw = torch.Generator().manual_seed(0)
    labels, wanted = torch.arange(classes).repeat(16), torch.arange(classes).repeat(4)
    centres = torch.randn(classes, 512, generator=draw)
    keys, queries = (
        F.normalize(centres[own] + 2 * torch.randn(len(own), 512, generator=draw), dim=-1) for own in (labels, wanted)
    )
    weights = F.normalize(centres + 3 * torch.randn(classes, 512, generator=draw), dim=-1)
    values, betas, alphas = F.one_hot(labels).float(), torch.linspace(0.1, 7, 200), torch.linspace(0.1, 3, 20)
    pairs = [(int(k) // 20, int(k) % 20) for k in torch.linspace(0, 3999, timed).round()]

    def plain() -> tuple[Tensor, ...]:
        rows = []
        for b, a in pairs:
            affinity = queries @ keys.T
            votes = (-betas[b] * (1 - affinity)).exp() @ values
            logits = 100.0 * queries @ weights.T + alphas[a] * votes
            rows.append((logits.argmax(1) == wanted).float().mean())
        return (torch.stack(rows),)

    def ours() -> tuple[Tensor, ...]:
        plain_logits, affinity = 100.0 * queries @ weights.T, queries @ keys.T
        table = search(plain_logits, affinity, labels, torch.ones(classes), wanted, alphas, betas)
        return (torch.stack([table[pair] for pair in pairs]),)

    row = _beside(plain, ours, rounds)
    row["plain_seconds"] *= len(betas) * len(alphas) / timed
    return row


def _epochs(base: ClipBase, classes: int, batch: int, rounds: int) -> dict[str, Any]:
    """One batch of an epoch: encoded in the step, against read from the store."""
    setting, labels, pixels = _setting(base, classes), torch.arange(batch) % classes, _pixels(batch)
    pooled = _pooled(base, pixels)
    empty = torch.empty(0, pooled.shape[1]), torch.empty(0, dtype=torch.long)
    shots = Shots(pooled[:, None].clone(), labels, *empty)
    found = {}
    for name, method in {"clip_adapter epoch": ClipAdapter(), "tip_adapter_f epoch": TipAdapterF(search=False)}.items():
        head = method.build(setting)
        head.start(shots)
        found[name] = _beside(
            lambda head=head: _gradients(head, _encoded(base, pixels), labels),  # type: ignore[misc]
            lambda head=head: _gradients(head, base.project(pooled), labels),  # type: ignore[misc]
            rounds,
        )
    return found


def _gradients(head: Any, features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    loss, _ = head.loss(features, labels)
    return loss.detach(), *torch.autograd.grad(loss, list(head.parameters()))


def _pixels(batch: int) -> Tensor:
    return torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _pooled(base: ClipBase, pixels: Tensor) -> Tensor:
    return base.pool(base.preprocess.normalise(pixels))


@torch.no_grad()
def _encoded(base: ClipBase, pixels: Tensor) -> Tensor:
    return base.project(_pooled(base, pixels))


def _beside(
    plain: Callable[[], tuple[Tensor, ...]], ours: Callable[[], tuple[Tensor, ...]], rounds: int
) -> dict[str, Any]:
    """CPU seconds, saved bytes and the largest relative difference of both sides."""
    ours()  # first calls set things up
    results, bytes_kept, seconds = {}, {}, {}
    for name, run in (("plain_", plain), ("", ours)):
        runs = [_timed(run) for _ in range(rounds)]
        results[name], bytes_kept[name] = runs[0][:2]
        seconds[name] = median(run[2] for run in runs)
    pairs = zip(results[""], results["plain_"], strict=True)
    return {
        **{f"{side}seconds": value for side, value in seconds.items()},
        **{f"{side}saved_mib": value / 2**20 for side, value in bytes_kept.items()},
        "largest_difference": max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs),
    }


def _timed(run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], int, float]:
    """The result, the bytes that autograd kept (no storage twice), and CPU seconds."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    start = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    return result, sum(kept.values()), time.process_time() - start
