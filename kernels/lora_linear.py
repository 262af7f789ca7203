"""A linear layer with low-rank terms: ``y = x W' + b + sum_k s_k drop(x) A_k' B_k'``, forward and backward.

Why one function and not three matmuls: autograd would keep a scaled copy and a dropped copy of ``x`` and add two
gradients of the size of ``x``. Here only ``x`` and the rank-sized ``A x`` are kept, terms are added in place onto the
base product, and dropout masks are drawn again in backward from their seed. With a gain (DoRA) the base's product is
needed once more in backward: a part of it is kept where x is wide, the rest computed again.

Layout: every product puts the rank first, ``A @ x'`` -> (g, r, m). On CPU this is two to three times faster than
``x @ A'``, where the thin dimension is innermost. ``g`` is 1 when all rows share a slot, and the batch when rows choose
(``route``), so one adapter and a mixed batch run the same lines.

On a GPU the file beside this one has a faster path for frozen bases without dropout; `supports` says for what, and
`graft.kernels.dispatch` measures for which shapes.

Letters: b batch rows, n tokens, i input width, o output width, r rank, k slots in a stack.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from graft.kernels.dispatch import LIBRARY, autocast, fastest, refusals

_CHUNK = 2**17
"""Elements of a dropout mask drawn at once on CPU: temporaries stay in cache (twice as fast as one large mask)."""

_KEPT = 384
"""Width of x from which the product of a gain is kept, for as many features as twice that width: each of its numbers
would take so many multiplications to compute again."""


_Order = tuple[list[int], Tensor, Tensor | None]
"""What `_sorted` returns."""


class Term(NamedTuple):
    """One low-rank addition; the stacks hold k slots."""

    down: Tensor
    """A, (k, r, i)."""
    up: Tensor
    """B, (k, o, r), fastest where r comes first in memory; with ``rows`` o is their number."""
    scale: Tensor
    """(k,) float, factor of each slot."""
    route: Tensor | None = None
    """(b,) long, slot of each batch row, -1 for none; None sends every row to slot 0."""
    rows: tuple[int, int] | None = None
    """Output features that the term adds to; None for all."""
    dropout: float = 0.0
    """Probability of dropping an input element, taken to the nearest 1/256 (the scale makes up for exactly that)."""
    seed: int = 0
    """Seed of the dropout mask."""
    gain: Tensor | None = None
    """(k, o) factor on the base's product ``x W'`` in the term's features; terms with a gain must not overlap."""


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, terms: tuple[Term, ...]) -> Tensor:
    """Returns the formula in plain torch, without dropout; the yardstick of `lora_linear`, with its shapes."""
    y = F.linear(x, weight, bias)
    for term in terms:
        route = torch.zeros(x.shape[0], dtype=torch.long) if term.route is None else term.route
        parts = []
        product = F.linear(x, weight)
        for row, through, slot in zip(x, product, route.tolist(), strict=True):
            delta = row @ term.down[slot].T @ term.up[slot].T * (term.scale[slot] if slot >= 0 else 0)
            a, b = term.rows or (0, y.shape[-1])
            if term.gain is not None and slot >= 0:
                delta = delta + (term.gain[slot] - 1) * through[..., a:b]
            parts.append(F.pad(delta, (a, y.shape[-1] - b)))
        y = y + torch.stack(parts)
    return y


def lora_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, terms: tuple[Term, ...], path: str | None = None
) -> Tensor:
    """Returns the linear layer's output with its low-rank terms added.

    Args:
        x: (b, ..., i), any float type; under autocast it is cast as ``F.linear`` would. Factors are cast to its type.
        weight: (o, i) base weight; None gives the sum of the terms alone (for bases that are not dense).
        bias: (o,) or None.
        terms: at least one.
        path: one of `paths`; None takes the fastest.

    Returns:
        (b, ..., o).
    """
    x, weight, bias = autocast(x, weight, bias)
    path = path or choose(x, weight, bias, terms)
    if path != LIBRARY and weight is not None:
        from graft.kernels.lora_linear_triton import packed

        return packed(x, weight, bias, terms, bands(terms, weight.shape[0]), path)
    if weight is not None and not torch.is_grad_enabled() and all(map(_plain, terms)):
        return _added(x, weight, bias, terms)
    routes: list[Tensor] = []  # each once: terms share theirs, and the compiler takes no tensor twice
    plan = tuple((term.rows, term.dropout, term.seed, _place(term.route, routes)) for term in terms)
    tensors = [tensor for term in terms for tensor in (term.down, term.up, term.scale, term.gain)]
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, plan, [*tensors, *routes])[0]
    y: Tensor = _LoRALinear.apply(x, weight, bias, plan, *tensors, *routes)
    return y


def _place(route: Tensor | None, routes: list[Tensor]) -> int | None:
    """Where a route is among the routes; it is put there if need be."""
    if route is None:
        return None
    for place, other in enumerate(routes):
        if other is route:
            return place
    routes.append(route)
    return len(routes) - 1


def supports(x: Tensor, weight: Tensor | None, bias: Tensor | None, terms: tuple[Term, ...]) -> list[str]:
    """Returns why the Triton path cannot do this; nothing if it can."""
    reasons = refusals(x, weight, bias, *(tensor for term in terms for tensor in (term.down, term.up, term.route)))
    first = terms[0]
    if weight is None or not weight.is_floating_point():
        return [*reasons, "no dense base weight"]
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        reasons.append("the base is trained")
    if weight.dtype != x.dtype:
        reasons.append(f"base of {weight.dtype} under {x.dtype}")
    if any(term.gain is not None for term in terms):
        reasons.append("gains")
    if any(_threshold(term.dropout) for term in terms):
        reasons.append("dropout")
    if first.down.shape[1] > 128:
        reasons.append(f"rank {first.down.shape[1]} above 128")
    if x.dtype == torch.float32 and first.down.shape[1] > 32:
        reasons.append("float32 above rank 32")  # would not fit into the registers
    if any(term.route is not first.route or term.down.shape != first.down.shape for term in terms):
        reasons.append("terms of different routes or shapes")
    count = bands(terms, weight.shape[0])
    if count == 0:
        reasons.append("terms on overlapping or unequal rows")
    if count > 1 and first.down.shape[1] > 64:
        reasons.append("several bands above rank 64")  # likewise
    return reasons


def paths(x: Tensor, out: int, rank: int, count: int) -> list[str]:
    """Returns the names of the paths worth measuring; what is left out would not fit into the registers."""
    if x.dtype == torch.float32 or x.numel() // x.shape[-1] < 64:
        tiles = [2]
    else:
        tiles = [0, 1] if out >= 256 and rank <= 64 and count == 1 else [0]
    return [LIBRARY, *(f"{mode} {tile}" for tile in tiles for mode in ("split", "inline"))]


def choose(x: Tensor, weight: Tensor | None, bias: Tensor | None, terms: tuple[Term, ...]) -> str:
    """Returns the path that was fastest for this shape, measured with its backward if there will be one."""
    if not x.is_cuda or supports(x, weight, bias, terms):
        return LIBRARY
    assert weight is not None
    factors = [factor for term in terms for factor in (term.down, term.up)]
    wanted = [tensor for tensor in (x, *factors) if tensor.requires_grad and torch.is_grad_enabled()]

    def run(path: str) -> list[Tensor]:
        with torch.set_grad_enabled(bool(wanted)):
            y = lora_linear(x, weight, bias, terms, path)
            return [y, *torch.autograd.grad(y, wanted, y.detach())] if wanted else [y]

    tokens, groups = x.numel() // x.shape[-1], 1 if terms[0].route is None else x.shape[0]
    # Row counts within an eighth of a power of two share a choice: batches of text never have the same length.
    (out, width), rank, count = weight.shape, terms[0].up.shape[-1], bands(terms, weight.shape[0])
    shape = (_rounded(tokens), groups, width, out, count, rank)
    key = ("lora_linear", x.dtype, *shape, x.requires_grad and bool(wanted), len(wanted) > x.requires_grad)
    return fastest(key, {path: partial(run, path) for path in paths(x, out, rank, count)}, x.device)


def _rounded(count: int) -> int:
    step = max(1, 1 << (count.bit_length() - 4))
    return -(-count // step) * step


def bands(terms: tuple[Term, ...], width: int) -> int:
    """Returns into how many equal bands, at most 4, the features fall, each with one term or none; 0 if they do not."""
    if len(terms) == 1 and terms[0].rows in (None, (0, width)):
        return 1
    rows = [term.rows or (0, width) for term in terms]
    size = rows[0][1] - rows[0][0]
    fits = width % size == 0 and width <= 4 * size and all(b - a == size and a % size == 0 for a, b in rows)
    return width // size if fits and len(set(rows)) == len(rows) else 0


def _plain(term: Term) -> bool:
    """Whether a term is slot 0 for every row, and no more."""
    return term.route is None and term.gain is None and not _threshold(term.dropout)


def _added(x: Tensor, weight: Tensor, bias: Tensor | None, terms: tuple[Term, ...]) -> Tensor:
    """The output without a backward pass and with plain terms: matrices, which take less than batches of one."""
    y = F.linear(x, weight, bias).contiguous()
    flat, rows = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for term in terms:
        down, up = term.down[0], term.up[0]
        if down.dtype != x.dtype:
            down, up = down.to(x.dtype), up.to(x.dtype)
        hidden = F.linear(down, flat).mul_(term.scale[0])  # (r, m)
        _columns(rows, term.rows).addmm_(hidden.mT, up.mT)
    return y


def _forward(
    x: Tensor, weight: Any, bias: Any, plan: tuple, tensors: Any, wanted: tuple[bool, ...] | None = None
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """The output, and what backward needs: A drop(x)' of each term, and the products of gains that are kept.

    ``wanted`` says of each term whether its gain needs a gradient; None that there will be no backward pass.
    """
    width = tensors[1].shape[1] if weight is None else weight.shape[0]
    y = x.new_zeros(*x.shape[:-1], width) if weight is None else F.linear(x, weight, bias).contiguous()
    hiddens: list[Tensor] = []
    products: list[Tensor | None] = []
    for k, ((rows, *_), (_, _, _, route, gain)) in enumerate(zip(plan, _unpacked(plan, tensors), strict=True)):
        products.append(None)
        if gain is not None:
            part, gain = _columns(_grouped(y, route), rows), _gains(gain, route)
            offset = bias if bias is None or rows is None else bias[slice(*rows)]
            if wanted and wanted[k] and x.shape[-1] >= _KEPT:
                kept = part[..., : 2 * x.shape[-1]]
                products[k] = kept.clone() if offset is None else kept - offset[: kept.shape[-1]]
            # The gain is not for the bias; so written, a gain of 1 changes no bit.
            if offset is not None and rows is None:
                y = torch.addcmul(offset * (1 - gain), part, gain).to(y.dtype).view(y.shape)
            else:
                part.mul_(gain)
                if offset is not None:
                    part.add_(offset * (1 - gain))
    for (rows, dropout, seed, _), (down, up, scale, route, _) in zip(plan, _unpacked(plan, tensors), strict=True):
        x3, part = _grouped(x, route), _columns(_grouped(y, route), rows)
        if wanted is None and (order := _order(x3, down, route, dropout)):
            _by_slot(x3, part, down, up, scale, order)
            continue
        down, up, scale = _pick(down, up, scale, route, x.dtype, dropout)
        hidden = _through(x3, down, dropout, seed)
        part.baddbmm_((hidden * scale).mT, up.mT)
        hiddens.append(hidden)
    return y, hiddens, products


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, plan: tuple, *tensors: Any) -> Tensor:
        wanted = ctx.needs_input_grad[7::4]
        y, hiddens, products = _forward(x, weight, bias, plan, tensors, wanted)
        ctx.plan = plan
        # x is the only tensor of its size that is kept, and only for the gradients that need it.
        keep_x = any(ctx.needs_input_grad[4::4]) or any(ctx.needs_input_grad[7::4]) or ctx.needs_input_grad[1]
        ctx.shape = x.shape
        ctx.save_for_backward(x if keep_x else None, weight, *hiddens, *products, *tensors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        needs = ctx.needs_input_grad
        x, weight, *rest = ctx.saved_tensors
        count = len(ctx.plan)
        hiddens, products, tensors = rest[:count], rest[count : 2 * count], rest[2 * count :]
        through, grad_gains = _through_gains(grad, x, weight, products, ctx.plan, tensors, needs)
        grad_x = None
        if needs[0]:
            grad_x = grad.new_zeros(ctx.shape) if weight is None else (through @ weight).contiguous()
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weight = through.reshape(flat.shape).T @ x.reshape(-1, x.shape[-1]) if needs[1] else None
        grad_bias = flat.sum(0) if needs[2] else None
        grads: list[Tensor | None] = []
        for (rows, dropout, seed, _), hidden, (down, up, scale, route, _), grad_gain in zip(
            ctx.plan, hiddens, _unpacked(ctx.plan, tensors), grad_gains, strict=True
        ):
            part_down, part_up, factor = _pick(down, up, scale, route, grad.dtype, dropout)
            part = _columns(_grouped(grad, route), rows)
            grad_hidden = (part_up.mT @ part.mT) * factor  # (g, r, m)
            grad_up = ((hidden * factor) @ part).mT  # (g, o, r)
            grad_down = None if x is None else torch.zeros_like(part_down)
            x3 = None if x is None else _grouped(x, route)
            into = None if grad_x is None else _grouped(grad_x, route)
            _into_input(grad_hidden, x3, part_down, grad_down, into, dropout, seed)
            grads += [_spread(grad_down, down, route), _spread(grad_up, up, route), None, grad_gain]
        return grad_x, grad_weight, grad_bias, None, *grads, *[None] * (len(tensors) - len(grads))


def _through_gains(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    products: list[Tensor | None],
    plan: tuple,
    tensors: Any,
    needs: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradient of the base's product, and those of the gains, for which it is computed again unless kept."""
    grads: list[Tensor | None] = []
    through = grad
    for k, ((rows, *_), (_, _, _, route, gain)) in enumerate(zip(plan, _unpacked(plan, tensors), strict=True)):
        grads.append(None)
        if gain is None:
            continue
        assert weight is not None
        if needs[7 + 4 * k] and x is not None:
            part, kept = _columns(_grouped(grad, route), rows), products[k]
            at, end = rows or (0, weight.shape[0])
            sums = []
            if kept is not None:
                sums.append((part[..., : kept.shape[-1]] * kept).sum(1, dtype=gain.dtype))
                at += kept.shape[-1]
            if at < end:
                product = _grouped(F.linear(x, weight[at:end]), route)
                sums.append(product.mul_(part[..., at - end :]).sum(1, dtype=gain.dtype))
            total = torch.cat(sums, -1)
            grads[k] = _spread(total if route is None else total * (route >= 0)[:, None], gain, route)
        if rows is None:
            through = (_grouped(through, route) * _gains(gain, route)).to(grad.dtype).reshape(grad.shape)
        else:
            through = grad.clone(memory_format=torch.contiguous_format) if through is grad else through
            _columns(_grouped(through, route), rows).mul_(_gains(gain, route))
    return through, grads


def _gains(gain: Tensor, route: Tensor | None) -> Tensor:
    """Gains of each group, (g, 1, o), 1 for rows without a slot; never rounded to the activations' type."""
    if route is None:
        return gain[:1, None]
    return torch.where((route >= 0)[:, None], gain[route.clamp(min=0)], 1.0)[:, None]


def _order(x: Tensor, down: Tensor, route: Tensor | None, dropout: float) -> _Order | None:
    """How to sort the rows of x (b, n, i) by slot, where that moves less than a copy of the factors for each row."""
    if route is None or x.device.type != "cpu" or is_compiling() or _threshold(dropout) or x.shape[1] > down.shape[1]:
        return None
    return _sorted(tuple(route.tolist()))


@lru_cache(64)
def _sorted(route: tuple[int, ...]) -> _Order | None:
    """The slots in use, their rows (g m) padded to equal numbers, and 1 for what is no padding (g, m, 1), if any is."""
    slots = sorted(set(route) - {-1})
    rows = [[row for row, slot in enumerate(route) if slot == each] for each in slots]
    most = max(map(len, rows), default=0)
    if not most or most * len(slots) > 2 * len(route):
        return None
    padded = torch.tensor([each + each[:1] * (most - len(each)) for each in rows])
    real = torch.tensor([[1.0] * len(each) + [0.0] * (most - len(each)) for each in rows])
    return slots, padded.flatten(), None if bool(real.all()) else real[..., None]


def _by_slot(x: Tensor, y: Tensor, down: Tensor, up: Tensor, scale: Tensor, order: _Order) -> None:
    """Adds ``s B A x`` to y (b, n, o) in place, all rows of a slot in one product."""
    slots, rows, real = order
    if len(slots) < len(down):
        down, up, scale = _taken(torch.tensor(slots), down, up, scale)
    n = x.shape[1]
    sorted_x = x.index_select(0, rows).view(len(slots), -1, x.shape[-1])
    hidden = torch.bmm(sorted_x, down.to(x.dtype).mT)  # (g, m n, r)
    factor = scale.to(x.dtype).view(-1, 1, 1)
    if real is not None:
        factor = factor * real.to(x.dtype).repeat_interleave(n, 1)
    y.index_add_(0, rows, torch.bmm(hidden.mul_(factor), up.to(x.dtype).mT).view(len(rows), n, y.shape[-1]))


def _through(x: Tensor, down: Tensor, dropout: float, seed: int) -> Tensor:
    """Returns ``A drop(x)'``, (g, r, m): rank first."""
    if not _threshold(dropout):
        return down @ x.mT
    hidden = x.new_empty(x.shape[0], down.shape[1], x.shape[1])
    for at, mask in _masks(tuple(x.shape), dropout, seed, like=x):
        hidden[at[0], :, at[1]] = down[at[0]] @ mask.mul_(x[at]).mT
    return hidden


def _into_input(
    grad_hidden: Tensor,
    x: Tensor | None,
    down: Tensor,
    grad_down: Tensor | None,
    grad_x: Tensor | None,
    dropout: float,
    seed: int,
) -> None:
    """Adds ``grad_hidden @ drop(x)`` to grad_down and ``drop(grad_hidden' @ A)`` to grad_x, in place, where wanted."""
    groups, _, rows = grad_hidden.shape
    for at, mask in _masks((groups, rows, down.shape[-1]), dropout, seed, like=down):
        part = grad_hidden[at[0], :, at[1]]
        if grad_x is not None and mask is None:
            grad_x.baddbmm_(part.mT, down)
        elif grad_x is not None:
            grad_x[at].addcmul_(part.mT @ down[at[0]], mask)
        if grad_down is not None and x is not None:
            grad_down[at[0]].baddbmm_(part, x[at] if mask is None else mask.mul_(x[at]))


def _unpacked(plan: tuple, tensors: Any) -> Iterator[tuple[Any, ...]]:
    """Down, up, scale, route and gain of each term."""
    routes = tensors[4 * len(plan) :]
    for k, (*_, place) in enumerate(plan):
        down, up, scale, gain = tensors[4 * k : 4 * k + 4]
        yield down, up, scale, None if place is None else routes[place], gain


def _grouped(x: Tensor, route: Tensor | None) -> Tensor:
    """(b, ..., i) -> (g, m, i): one group for all rows, or a group per batch row."""
    if route is None:
        return x.reshape(1, -1, x.shape[-1])
    return x.flatten(1, -2) if x.dim() > 2 else x[:, None]


def _columns(y: Tensor, rows: tuple[int, int] | None) -> Tensor:
    return y if rows is None else y[..., rows[0] : rows[1]]


def _pick(
    down: Tensor, up: Tensor, scale: Tensor, route: Tensor | None, dtype: torch.dtype, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of each group in the activations' type, and the scale (g, 1, 1), 0 for rows without a slot."""
    if route is None:
        down, up, scale = down[:1], up[:1], scale[:1]
    else:
        slot = route.clamp(min=0)
        down, up, scale = _taken(slot, down, up, scale)
        scale = scale * (route >= 0)
    if dropped := _threshold(dropout):
        scale = scale * (256 / (256 - dropped))
    return down.to(dtype), up.to(dtype), scale.to(dtype).view(-1, 1, 1)


def _taken(slots: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of some slots, B as it lies in memory; indexing by a tensor is three times slower on CPU."""
    return down.index_select(0, slots), up.mT.index_select(0, slots).mT, scale.index_select(0, slots)


def _spread(grad: Tensor | None, stack: Tensor, route: Tensor | None) -> Tensor | None:
    """Gradients of groups, (g, ...), summed into those of the stack, (k, ...)."""
    if grad is None:
        return None
    if route is None and stack.shape[0] == 1:
        return grad.to(stack.dtype)
    if route is not None and grad.is_cuda:  # where index_add_ has no fixed order
        chosen = route == torch.arange(len(stack), device=route.device)[:, None]
        return (chosen.to(stack.dtype) @ grad.flatten(1).to(stack.dtype)).view(stack.shape)
    slot = grad.new_zeros(1, dtype=torch.long) if route is None else route.clamp(min=0)
    return torch.zeros_like(stack).index_add_(0, slot, grad.to(stack.dtype))


def _threshold(dropout: float) -> int:
    """How many of the 256 bytes drop their element; never all."""
    return min(round(dropout * 256), 255)


def _masks(
    shape: tuple[int, ...], dropout: float, seed: int, like: Tensor
) -> Iterator[tuple[tuple[slice, slice], Any]]:
    """Yields slices over (g, m) and their masks (0 dropped, 1 kept): the same for the same seed and shape."""
    everything = slice(None)
    if not _threshold(dropout):
        yield (everything, everything), None
        return
    generator = torch.Generator(like.device).manual_seed(seed)  # its own: threads may train at the same time
    groups, rows, width = shape
    count = groups if groups != 1 else rows
    step = max(1, _CHUNK // max(1, width if groups == 1 else rows * width)) if like.device.type == "cpu" else count
    for start in range(0, count, step):
        at = slice(start, min(start + step, count))
        size = at.stop - at.start
        part = (size, rows, width) if groups != 1 else (1, size, width)
        yield ((at, everything) if groups != 1 else (everything, at)), _mask(part, dropout, generator).to(like.dtype)


def _mask(shape: tuple[int, int, int], dropout: float, generator: torch.Generator) -> Tensor:
    """Random bytes clamped around a threshold: on CPU ``bernoulli_`` is ten times slower."""
    count = shape[0] * shape[1] * shape[2]
    words = torch.empty((count + 7) // 8, dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    last_dropped = _threshold(dropout) - 129
    bits = words.view(torch.int8)[:count].clamp_(last_dropped, last_dropped + 1).sub_(last_dropped)
    return bits.view(shape)
