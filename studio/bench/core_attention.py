"""LoRA on torch's MultiheadAttention, in the text tower of open_clip, beside peft.

peft 0.21.2 adds the change of ``out_proj`` twice (its merge for the call writes it into the weight and then merges the
layer once more), so its results are a measure only where that change is zero. With it, ours stand beside the formula:
the frozen module on the weights W + s B A.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from graft.studio.bench.core_models import Subject
from graft.studio.bench.core_variants import (
    ALPHA,
    RANK,
    Factors,
    Variant,
    differences,
    draw,
    furthest,
    load,
    lora,
    ours,
    theirs,
)
from graft.studio.bench.measure import interleaved, medians, peak_rise, ratio
from graft.studio.errors import InputError
from graft.studio.sites import Plan

_OWN = "lora, own A for q, k, v"
"""What `LoRA` makes by itself; peft has one A for the three."""


class _Layer(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attn = attention

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]
        return out


class _Tower(nn.Module):
    def __init__(self, tower: Any):
        super().__init__()
        self.transformer = tower

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.transformer(x, attn_mask=mask)
        return out


def subjects(tiny: bool) -> dict[str, Subject]:
    """Returns an attention layer of CLIP ViT-B/32's text tower, one of its image tower, and the whole text tower.

    Raises:
        InputError: open_clip is not installed.
    """
    try:
        from open_clip.transformer import TextTransformer, VisionTransformer
    except ImportError as error:
        raise InputError("bench core", f"{error.name} is not installed", "pip install 'graft-studio[dev]'") from error
    depth, width, tokens = (1, 64, 8) if tiny else (12, 512, 77)
    wide, patches = (64, 4) if tiny else (768, 49)
    text: Any = TextTransformer(tokens, 8, width, width // 64, depth, output_dim=width)
    side = 32 * int(patches**0.5)
    picture: Any = VisionTransformer(side, 32, wide, 1, wide // 64, 4.0, output_dim=width)
    for part in (text, picture):
        part.requires_grad_(False).eval()
    mask = torch.full((tokens, tokens), float("-inf")).triu(1)
    inputs, small = (torch.randn(8, tokens, width), mask), (torch.randn(1, tokens, width), mask)
    seen, one = torch.randn(8, patches + 1, wide), torch.randn(1, patches + 1, wide)
    layer = "one nn.MultiheadAttention of open_clip's"
    said = f"{layer} text tower, width {width}, {tokens} tokens"
    shown = f"{layer} image tower, width {wide}, {patches + 1} tokens"
    whole = f"open_clip's text tower, {depth} such blocks; their two linear layers are adapted too"
    words, pixels = (_Layer(each.transformer.resblocks[0].attn) for each in (text, picture))
    return {
        "mha text": Subject("mha text", said, words, ("attn",), inputs, small),
        "mha image": Subject("mha image", shown, pixels, ("attn",), (seen,), (one,)),
        "mha tower": Subject(
            "mha tower", whole, _Tower(text.transformer), ("attn", "mlp.c_fc", "mlp.c_proj"), inputs, small, False
        ),
    }


def report(subject: Subject, rounds: int) -> dict[str, Any]:
    """Returns times, memory and differences of a training step, and the times of inference on one row.

    The promise is of the layers; the tower around them stands beside.
    """
    variants = {
        "frozen": Variant(subject.model, inside=subject.inside),
        "lora": _ours(subject, packed=True),
        _OWN: _ours(subject, packed=False),
        "peft lora": theirs(subject),
    }
    upstream = torch.randn_like(variants["frozen"].infer(subject.inputs)) / len(subject.inputs[0])
    apart = _differences(subject, variants["lora"], variants["peft lora"], upstream)
    steps = {name: partial(each.step, subject.inputs, upstream) for name, each in variants.items()}
    calls = {name: partial(each.infer, subject.small) for name, each in variants.items()}
    trained, called = interleaved(steps, 3 * rounds if subject.inside else rounds), interleaved(calls, 3 * rounds)
    saved = {name: each.saved(subject.inputs) for name, each in variants.items()}
    ratios = {
        "MHA step over peft's": ratio(trained, "lora", "peft lora"),
        "MHA inference of one row over peft's": ratio(called, "lora", "peft lora"),
    }
    return {
        "work": subject.work,
        "promised": ratios if subject.inside else {},
        "beside": ({} if subject.inside else ratios)
        | {
            "MHA saved bytes over peft's": saved["lora"] / saved["peft lora"],
            "MHA step over peft's, own A for q, k and v": ratio(trained, _OWN, "peft lora"),
            "MHA inference of one row, own A for q, k and v": ratio(called, _OWN, "peft lora"),
            "frozen MHA inference of one row over peft's": ratio(called, "frozen", "peft lora"),
        },
        "step": {
            name: medians(times) | {"saved": saved[name], "peak": peak_rise(steps[name])}
            for name, times in trained.items()
        },
        "inference of one row": {name: medians(times) for name, times in called.items()},
        "differences": apart,
    }


def _ours(subject: Subject, packed: bool) -> Variant:
    """Our adapters on peft's sites: it takes the output layer with the module, and one A for q, k and v."""
    method = replace(lora(subject), targets=(*subject.layers, "attn.out_proj"))
    plan = method.plan(subject.model)
    whole = [replace(site, rows=None, role=None) if site.kind == "mha" else site for site in plan]
    return ours(subject, method, plan=Plan(tuple(dict.fromkeys(whole))) if packed else plan)


def _differences(subject: Subject, mine: Variant, peft: Variant, upstream: Tensor) -> dict[str, dict[str, float]]:
    """How far ours is from peft's without a change of the output layer, and from the formula with it."""
    assert mine.handle is not None
    factors = draw(mine.handle, 0)
    silent = {key: torch.zeros_like(value) if key.endswith("out_proj.B") else value for key, value in factors.items()}
    for variant in (mine, peft):
        load(variant, [silent])
    found = differences(mine, peft, subject.inputs, upstream, leave=("out_proj.A", "out_proj.B"))
    apart = {"out_proj unchanged": found}
    for variant in (mine, peft):
        load(variant, [factors])
    expected = _formula(subject, factors, upstream)
    for name, variant in {"ours": mine, "peft's": peft}.items():
        apart[f"{name} to the formula"] = furthest(variant.step(subject.inputs, upstream), expected)
    return apart


def _formula(subject: Subject, factors: Factors, upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the frozen model on the weights W + s B A."""
    leaves = {key: value.clone().requires_grad_() for key, value in factors.items()}
    first = subject.inputs[0].clone().requires_grad_(subject.inside)
    weights: dict[str, Tensor] = dict(subject.model.named_parameters())
    for site in {key.rpartition(".")[0] for key in leaves}:
        name = f"{site}.weight" if f"{site}.weight" in weights else f"{site}.in_proj_weight"
        weights[name] = weights[name] + ALPHA / RANK * leaves[f"{site}.B"] @ leaves[f"{site}.A"]
    y = functional_call(subject.model, weights, (first, *subject.inputs[1:]))
    wanted = leaves | ({"input": first} if subject.inside else {})
    return y.detach(), dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), upstream), strict=True))
