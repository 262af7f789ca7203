"""The work of `graft bench kernels`: operations on the shapes of real models, with every path that can do them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adamw import adamw

from graft.kernels import bottleneck as adapters
from graft.kernels import class_votes as votes
from graft.kernels import flat_adamw as optimiser
from graft.kernels import gated_attention as attention
from graft.kernels import lora_linear as lora
from graft.kernels.dispatch import LIBRARY

# (model, batch rows, tokens, input width, output width)
LINEARS = (
    ("SD1.5", 8, 4096, 320, 320),
    ("SD1.5", 8, 1024, 640, 640),
    ("SD1.5", 8, 256, 1280, 1280),
    ("SD1.5 ff", 8, 4096, 320, 2560),
    ("SDXL", 4, 4096, 640, 640),
    ("SDXL", 4, 1024, 1280, 1280),
    ("SDXL ff", 4, 1024, 1280, 10240),
    ("FLUX", 1, 4608, 3072, 3072),
    ("FLUX mlp", 1, 4608, 3072, 12288),
    ("ViT-B", 256, 197, 768, 768),
    ("ViT-B mlp", 256, 197, 768, 3072),
    ("ViT-L", 128, 257, 1024, 1024),
    ("ViT-L mlp", 128, 257, 1024, 4096),
    ("CLIP text", 256, 77, 512, 512),
    ("LLaMA-7B", 4, 2048, 4096, 4096),
    ("LLaMA-7B gate", 4, 2048, 4096, 11008),
    ("LLaMA-7B down", 4, 2048, 11008, 4096),
    ("LLaMA-7B decode", 64, 1, 4096, 4096),
)
RANKED = (("SD1.5", 8, 4096, 320, 320), ("SDXL", 4, 1024, 1280, 1280), ("ViT-B", 256, 197, 768, 768))
PACKED = (("ViT-B qkv", 256, 197, 768, 2304), ("ViT-L qkv", 128, 257, 1024, 3072))
# and adapters
GROUPED = (
    ("SDXL", 8, 1024, 1280, 1280, 1),
    ("SDXL", 8, 1024, 1280, 1280, 8),
    ("FLUX", 4, 4608, 3072, 3072, 4),
    ("ViT-B", 64, 197, 768, 768, 2),
    ("ViT-B", 64, 197, 768, 768, 32),
    ("LLaMA-7B decode", 64, 1, 4096, 4096, 64),
)
# (model, batch rows, heads, queries, width of a head, keys of the groups, whether they join another attention)
ATTENTIONS = (
    ("SD1.5", 2, 8, 4096, 40, (77, 4), False),
    ("SDXL", 2, 10, 4096, 64, (77, 16), False),
    ("SDXL", 16, 10, 4096, 64, (77, 4), False),
    ("SDXL", 2, 20, 1024, 64, (77, 257), False),
    ("LLaMA-7B", 4, 32, 2048, 128, (10,), True),
)
# (model, batch rows, tokens, width, inside, norm, adapters)
BOTTLENECKS = (
    ("ViT-B", 256, 197, 768, 8, True, 1),
    ("ViT-B", 256, 197, 768, 64, False, 1),
    ("ViT-B", 256, 197, 768, 64, True, 1),
    ("ViT-B", 64, 197, 768, 64, True, 8),
    ("ViT-L", 128, 257, 1024, 16, False, 1),
    ("LLaMA-7B", 4, 2048, 4096, 64, True, 1),
)
# (queries, keys, width, classes)
CACHES = ((50_000, 16_000, 512, 1000), (50_000, 16_000, 1024, 1000), (256, 1600, 512, 100))
# (model, linear layers, width, rank, adapters)
OPTIMISERS = (("SD1.5", 128, 640, 16, 8), ("LLaMA-7B", 224, 4096, 16, 1), ("ViT-B", 48, 768, 8, 32))
TRITON = "triton"


@dataclass
class Case:
    """One operation on one shape."""

    operation: str
    shape: str
    inputs: tuple[Any, ...]
    """What every path is called with."""
    paths: dict[str, Callable[..., Tensor]]
    """By name; "eager" is the operation in plain torch, "frozen" the layer without adapters."""
    reference: Callable[..., Tensor]
    """The formula."""
    choose: Callable[..., str]
    """The dispatch."""
    wanted: Callable[[tuple[Any, ...]], list[Tensor]] = field(default=lambda inputs: [])
    """Of the inputs, those whose gradients are part of the work."""
    route: Tensor | None = None
    """Slots of the batch rows, if they have any; other slots may be written into it."""

    def __post_init__(self) -> None:
        self.upstream: Tensor | None = None

    def call(self, path: str, backward: bool, inputs: tuple[Any, ...] | None = None) -> list[Tensor]:
        """Returns the output and the gradients of a path."""
        inputs = self.inputs if inputs is None else inputs
        wanted = self.wanted(inputs) if backward else []
        with torch.set_grad_enabled(backward):
            y = self.paths[path](*inputs)
            if not wanted:
                return [y.detach()]
            if self.upstream is None:
                self.upstream = torch.randn_like(y)
            return [y.detach(), *gradients(y, wanted, self.upstream)]


def gradients(y: Tensor, wanted: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Returns the gradients, zeros for what has no part in y."""
    found = torch.autograd.grad(y, wanted, upstream.to(y.dtype), allow_unused=True)
    return [torch.zeros_like(a) if b is None else b for a, b in zip(wanted, found, strict=True)]


def cases(device: torch.device, only: set[str]) -> Iterator[Callable[[], Case]]:
    """Yields what makes each case; on a CPU a sixteenth of the rows, and of each operation the first two shapes."""
    small = device.type == "cpu"
    lines = [(*shape, 16, 1, 1) for shape in LINEARS]
    lines += [(*shape, rank, 1, 1) for shape in RANKED for rank in (4, 64)]
    every: dict[str, list[Callable[[], Case]]] = {
        "lora_linear": [partial(linear, device, *line) for line in lines],
        "packed": [partial(linear, device, *shape, 16, 3, 1) for shape in PACKED],
        "grouped": [partial(linear, device, *shape[:5], 16, 1, shape[5], True) for shape in GROUPED],
        "gated_attention": [partial(attend, device, *shape) for shape in ATTENTIONS],
        "bottleneck": [partial(adapt, device, *shape) for shape in BOTTLENECKS],
        "class_votes": [partial(vote, device, *shape) for shape in CACHES],
        "flat_adamw": [partial(optimise, device, *shape) for shape in OPTIMISERS],
    }
    for name, makers in every.items():
        if not only or name in only:
            yield from makers[:2] if small else makers


def drawer(device: torch.device) -> Callable[..., Tensor]:
    """Returns what draws normal numbers: bfloat16 on a GPU, float32 on a CPU."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def draw(*shape: int, scale: float = 1.0, grad: bool = True, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_(grad)

    return draw


def rows(device: torch.device, count: int) -> int:
    """Returns the rows that a device can do in a reasonable time."""
    return max(1, count // 16) if device.type == "cpu" else count


def linear(
    device: torch.device,
    model: str,
    b: int,
    n: int,
    i: int,
    o: int,
    rank: int,
    bands: int,
    slots: int,
    routed: bool = False,
) -> Case:
    """A LoRA linear layer."""
    draw, b = drawer(device), rows(device, b)
    x, weight, bias = draw(b, n, i), draw(o, i, scale=i**-0.5, grad=False), draw(o, grad=False)
    route = torch.arange(b, device=device) % slots if routed else None
    members = [torch.arange(slot, b, slots, device=device) for slot in range(min(slots, b))]
    terms = []
    for band in range(bands):
        down = draw(slots, rank, i, scale=i**-0.5, dtype=torch.float32)
        up = draw(slots, o // bands, rank, dtype=torch.float32)
        where = None if bands == 1 else (band * o // bands, (band + 1) * o // bands)
        terms.append(lora.Term(down, up, torch.ones(slots, device=device), route, where))

    def eager(x: Tensor, weight: Tensor, bias: Tensor, terms: tuple[lora.Term, ...]) -> Tensor:
        parts = list(F.linear(x, weight, bias).chunk(bands, -1))
        for band, (down, up, scale, *_) in enumerate(terms):
            down, up = down.to(x.dtype), up.to(x.dtype)
            if route is None:
                parts[band] = parts[band] + x @ down[0].T @ up[0].T * scale[0].to(x.dtype)
                continue
            for slot, mine in enumerate(members):
                delta = x.index_select(0, mine) @ down[slot].T @ up[slot].T * scale[slot].to(x.dtype)
                parts[band] = parts[band].index_add(0, mine, delta)
        return torch.cat(parts, -1) if bands > 1 else parts[0]

    inputs = (x, weight, bias, tuple(terms))
    paths: dict[str, Callable[..., Tensor]] = {
        "frozen": lambda x, weight, bias, terms: F.linear(x, weight, bias),
        "eager": eager,
        LIBRARY: partial(lora.lora_linear, path=LIBRARY),
    }
    if not lora.supports(*inputs):
        paths |= {path: partial(lora.lora_linear, path=path) for path in lora.paths(x, o, rank, bands)[1:]}
    adapters = f", {slots} adapters" if routed else f", {bands} terms" if bands > 1 else ""
    return Case(
        "lora_linear",
        f"{model} {b * n} x {i} -> {o}, rank {rank}{adapters}",
        inputs,
        paths,
        lora.reference,
        lora.choose,
        lambda inputs: [inputs[0], *(factor for term in inputs[3] for factor in term[:2])],
        route,
    )


def attend(
    device: torch.device, model: str, b: int, h: int, n: int, d: int, lengths: tuple[int, ...], joins: bool
) -> Case:
    """Attention over groups of keys."""
    draw, b = drawer(device), rows(device, b)
    groups = tuple(attention.Group(draw(b, h, m, d), draw(b, h, m, d), torch.ones((), device=device)) for m in lengths)
    groups = (*groups[:-1], groups[-1]._replace(gate=torch.rand(h, device=device).requires_grad_()))

    def eager(query: Tensor, groups: tuple[attention.Group, ...], main: Tensor | None) -> Tensor:
        y = main
        for key, value, gate in groups:
            assert gate is not None
            part = F.scaled_dot_product_attention(query, key, value)
            part = part * gate.to(part.dtype).view(-1, 1, 1)
            y = part if y is None else y + part
        assert y is not None
        return y

    inputs = (draw(b, h, n, d), groups, draw(b, h, n, d) if joins else None)
    return Case(
        "gated_attention",
        f"{model} {b} x {h} x {n} x {d}, {' + '.join(map(str, lengths))} keys{' onto another' if joins else ''}",
        inputs,
        _paths(eager, attention.gated_attention, attention.supports(*inputs)),
        attention.reference,
        attention.choose,
        lambda inputs: [inputs[0], *(t for group in inputs[1] for t in group if t.requires_grad)],
    )


def adapt(device: torch.device, model: str, b: int, n: int, d: int, h: int, normed: bool, slots: int) -> Case:
    """A bottleneck adapter behind a layer."""
    draw, b = drawer(device), rows(device, b)
    route = torch.arange(b, device=device) % slots if slots > 1 else None
    wide = {"dtype": torch.float32}
    layers = adapters.Layers(
        draw(slots, h, d, scale=d**-0.5, **wide),
        draw(slots, h, **wide),
        draw(slots, d, h, scale=h**-0.5, **wide),
        draw(slots, d, **wide),
        torch.ones(slots, device=device),
        route,
    )
    norm = adapters.Norm(draw(d, grad=False), draw(d, grad=False)) if normed else None
    x = draw(b, n, d)

    def eager(x: Tensor, layers: adapters.Layers, kind: str, norm: adapters.Norm | None, onto: Tensor) -> Tensor:
        inside = x if norm is None else F.layer_norm(x, (d,), norm.weight, norm.bias, norm.eps)
        slot = torch.zeros(1, dtype=torch.long, device=device) if layers.route is None else layers.route.clamp(min=0)
        down, start, up, end, scale = (stack[slot].to(x.dtype) for stack in layers[:5])
        if layers.route is not None:
            scale = scale * (layers.route >= 0)
        y = F.gelu(inside @ down.mT + start[:, None]) @ up.mT + end[:, None]
        return onto + scale[:, None, None] * y

    inputs = (x, layers, "gelu", norm, x)
    mixed = f", {slots} adapters" if slots > 1 else ""
    return Case(
        "bottleneck",
        f"{model} {b * n} x {d}, inside {h}{', norm' if normed else ''}{mixed}",
        inputs,
        _paths(eager, adapters.bottleneck, adapters.supports(x, layers, norm, x)),
        adapters.reference,
        adapters.choose,
        lambda inputs: [inputs[0], *inputs[1][:4]],
        route,
    )


def vote(device: torch.device, m: int, n: int, width: int, count: int) -> Case:
    """Votes of a cache; on small batches with the gradient of the keys."""
    draw, m = drawer(device), rows(device, rows(device, m))
    labels = torch.arange(count, device=device).repeat_interleave(n // count)
    features, keys = (F.normalize(draw(size, width, grad=False).float(), dim=-1) for size in (m, len(labels)))
    trained = m <= 256
    features, keys = features.to(draw(1).dtype), keys.to(draw(1).dtype).requires_grad_(trained)
    labels = labels[torch.randperm(len(labels), device=device)]
    once = F.one_hot(labels, count).to(keys.dtype)

    def eager(features: Tensor, keys: Tensor, classes: votes.Classes, beta: float) -> Tensor:
        return torch.exp(-beta * (1 - features @ keys.T)) @ once

    inputs = (features, keys, votes.by_class(labels, count), 5.5)
    return Case(
        "class_votes",
        f"{m} x {len(labels)} x {width}, {count} classes",
        inputs,
        _paths(eager, votes.class_votes, votes.supports(*inputs[:3])),
        votes.reference,
        votes.choose,
        lambda inputs: [inputs[1]] if trained else [],
    )


def optimise(device: torch.device, model: str, layers: int, width: int, rank: int, count: int) -> Case:
    """A step of AdamW for several adapters."""
    draw, layers = drawer(device), rows(device, layers)
    pieces = [(rank * width, adapter) for _ in range(2 * layers) for adapter in range(count)]
    where = optimiser.layout(pieces, device)
    each = torch.ones(count, device=device)
    settings = optimiser.Settings(1e-3 * each, 0.01 * each, each)
    size = sum(size for size, _ in pieces)
    parameters, slopes = (draw(size, grad=False, dtype=torch.float32) for _ in range(2))

    def eager(
        parameters: Tensor,
        slopes: Tensor,
        past: optimiser.State,
        where: optimiser.Layout,
        settings: optimiser.Settings,
    ) -> Tensor:
        for owner in range(count):
            mine = [slice(a, b) for a, b, other in where.pieces if other == owner]
            lists = [[flat[piece] for piece in mine] for flat in (parameters, slopes, past.first, past.second)]
            norm = torch.nn.utils.get_total_norm(lists[1])
            torch._foreach_mul_(lists[1], (settings.limit[owner] / (norm + 1e-6)).clamp(max=1.0))
            taken = [past.steps[owner].clone() for _ in mine]
            options: dict[str, Any] = {"foreach": True, "capturable": device.type == "cuda", "amsgrad": False}
            options |= {"beta1": 0.9, "beta2": 0.999, "lr": 1e-3, "weight_decay": 0.01, "eps": 1e-8, "maximize": False}
            adamw(lists[0], lists[1], lists[2], lists[3], [], taken, **options)
            past.steps[owner] += 1
        return parameters

    def ours(path: str, *given: Any) -> Tensor:
        optimiser.step(*given[:5], path=path)  # type: ignore[misc]
        return given[0]

    inputs = (parameters, slopes, optimiser.state(parameters, settings), where, settings)
    paths: dict[str, Callable[..., Tensor]] = {"eager": eager, LIBRARY: partial(ours, LIBRARY)}
    if not optimiser.supports(*inputs):
        paths[TRITON] = partial(ours, TRITON)
    shape = f"{model} {len(pieces)} tensors, {size} numbers, {count} adapters"
    return Case("flat_adamw", shape, inputs, paths, optimiser.reference, optimiser.choose)


def _paths(
    eager: Callable[..., Tensor], ours: Callable[..., Tensor], refusals: list[str]
) -> dict[str, Callable[..., Tensor]]:
    names = [LIBRARY] if refusals else [LIBRARY, TRITON]
    return {"eager": eager, **{name: partial(ours, path=name) for name in names}}
