"""LoftQ: quantise a base and start LoRA together, so that the factors make up for what the rounding lost.

Yixiao Li, Yifan Yu, Chen Liang, Pengcheng He, Nikos Karampatziakis, Weizhu Chen, Tuo Zhao: LoftQ:
LoRA-Fine-Tuning-Aware Quantization for Large Language Models, 2023, arXiv:2310.08659.

    Q_t = q(W - s B_{t-1} A_{t-1}),    s B_t A_t = SVD_rank(W - Q_t),    t = 1 ... steps,  from B_0 A_0 = 0

(algorithm 1): the best low-rank answer to the rounding, then the best rounding given that answer, in turn; with one
step the base is rounded as without LoftQ. U sqrt(S) / s becomes B, and sqrt(S) V' becomes A. The weights must be there
in full before. The result is an ordinary LoRA, which belongs to the quantised base.

Differs from the authors' code: the factor s of LoRA is divided out, so alpha is free; q, k and v of a packed projection
have factors of their own; any library's quantiser will do, since Q is what its layer makes of the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graft.studio.errors import InputError, SiteError
from graft.studio.methods.lora import LoRA, LowRankSlot
from graft.studio.sites import Model, Site, is_dense, named_modules
from graft.studio.slots import Handle
from graft.studio.slotted import dense_weight

Quantise = Callable[[nn.Linear], nn.Linear]
"""Makes a quantised layer of a dense one, which it may change: `torchao`'s ``quantize_``, a layer of bitsandbytes."""


def loftq(model: Model, method: LoRA, quantise: Quantise, steps: int = 5) -> Handle:
    """Quantises the layers that LoRA's targets name, in the model itself, and attaches LoRA that starts at the loss.

    Example:
        >>> def int4(layer):
        ...     quantize_(layer, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
        ...     return layer
        >>> handle = loftq(model, LoRA(rank=16, targets="all-linear"), int4)

    Args:
        model: the model or its components, in full precision.
        method: plain LoRA, or a domain's own, such as `graft.llm_mm.LanguageLoRA` with its parts of the model.
        quantise: called with a dense copy of a layer, ``steps`` times for each.
        steps: T of the paper, at least 1.

    Raises:
        InputError: no steps, or a method other than LoRA.
        SiteError: a target that is no linear layer, or is quantised already; the model is as it was.
    """
    if steps < 1:
        raise InputError(f"steps {steps}", "must be at least 1", "5 is the paper's")
    if not isinstance(method, LoRA) or type(method).slot is not LoRA.slot:  # a domain's LoRA only chooses sites
        raise InputError(type(method).__name__, "LoftQ starts a plain LoRA", "use LoRA")
    modules: dict[str, Any] = named_modules(model)
    places: dict[str, list[Site]] = {}
    for site in (plan := method.plan(model)):
        if site.kind not in ("linear", "packed") or not is_dense(modules[site.name].weight):
            raise SiteError(site.key, "LoftQ wants a linear layer in full precision", "choose other targets")
        places.setdefault(site.name, []).append(site)
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    for name, sites in places.items():
        parent, _, child = name.rpartition(".")
        layer, factors = start(modules[name], sites, method.rank, quantise, steps)
        setattr(modules[parent], child, layer)
        starts |= factors
    handle = method.attach(model, plan=plan)
    with torch.no_grad():
        for slot in handle.slots_of(LowRankSlot):
            up, down = starts[slot.site.key]
            slot.B[0].copy_(up / slot.scaling)
            slot.A[0].copy_(down)
    return handle


@torch.no_grad()
def start(
    layer: nn.Linear, sites: list[Site], rank: int, quantise: Quantise, steps: int
) -> tuple[nn.Linear, dict[str, tuple[Tensor, Tensor]]]:
    """Returns the quantised layer, and for each of its sites the factors (o, r) and (r, i) whose product it lost."""
    weight = layer.weight.float()
    change, factors = torch.zeros_like(weight), {}
    quantised = layer
    for _ in range(steps):
        quantised = quantise(_dense(layer, weight - change))
        lost = weight - dense_weight(quantised).float()
        for site in sites:
            rows = slice(*(site.rows or (None,)))
            up, down = factors[site.key] = _low_rank(lost[rows], rank)
            change[rows] = up @ down
    return quantised, factors


def _dense(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    """A frozen layer like another one, with another weight."""
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta", layer.weight.dtype)
    made.weight = nn.Parameter(weight.to(layer.weight.dtype), False)
    made.bias = layer.bias if layer.bias is None else nn.Parameter(layer.bias.clone(), False)
    return made.train(layer.training)


def _low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product (o, r) (r, i), its singular values shared by both; ranks that the matrix lacks are zero."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * v[:rank]
    missing = rank - len(root)
    return nn.functional.pad(up, (0, missing)), nn.functional.pad(down, (0, 0, 0, missing))
