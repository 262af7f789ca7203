"""The transformer blocks of a timm model, found by one forward pass and not by the model's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.studio.errors import SiteError
from graft.studio.sites import Site
from graft.studio.slots import Slot
from graft.vision.base import sample_input


@dataclass(frozen=True)
class Block:
    """A block with attention and a feed-forward part."""

    name: str
    """Path in the model."""
    stream: str
    """Its module whose input is the residual stream before the feed-forward part: norm2, or mlp in post-norm blocks."""
    width: int
    """Of the residual stream."""
    shape: tuple[int, ...]
    """Of what the block gives for the sample picture."""
    flat: bool
    """Whether it takes and gives tokens (b, n, d), as many as it got."""


@torch.no_grad()
def find_blocks(model: nn.Module) -> list[Block]:
    """Returns the blocks of a model in order.

    Raises:
        SiteError: it has none with attention, a second norm and a feed-forward part.
    """
    found: list[Block] = []
    candidates = {
        name: module
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, part, None), nn.Module) for part in ("attn", "norm2", "mlp"))
    }
    with _noting(candidates) as notes:
        model(sample_input(model))
    for name in candidates:
        seen = notes.get(name, {})
        if not {"norm2.in", "norm2.out", "mlp.in", "mlp.out", "out", "in"} <= seen.keys():
            continue
        before = seen["mlp.in"] is seen["norm2.out"]
        if not before and seen["norm2.in"] is not seen["mlp.out"]:
            continue  # neither norm, then mlp, nor mlp, then norm
        stream, out = seen["norm2.in" if before else "mlp.in"], seen["out"]
        if out.shape[-1] == stream.shape[-1] and out.numel() == stream.numel():
            flat = out.dim() == 3 and out.shape == seen["in"].shape
            where = "norm2" if before else "mlp"
            found.append(Block(name, where, int(stream.shape[-1]), tuple(out.shape), flat))
    if not found:
        reason = "it has no transformer blocks with attention, norm and feed-forward part"
        raise SiteError(type(model).__name__, reason, "Use lora, ssf or bitfit, which act on layers")
    return found


@contextmanager
def _noting(modules: dict[str, nn.Module]) -> Iterator[dict[str, dict[str, Tensor]]]:
    """What goes into and out of blocks, their second norm and their feed-forward part, by block."""
    notes: dict[str, dict[str, Tensor]] = {}
    hooks = []

    def note(block: str, part: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                notes.setdefault(block, {}).update({f"{part}in": args[0], f"{part}out": out})

        return hook

    for name, module in modules.items():
        hooks.append(module.register_forward_hook(note(name, "")))
        hooks += [getattr(module, part).register_forward_hook(note(name, f"{part}.")) for part in ("norm2", "mlp")]
    try:
        yield notes
    finally:
        for hook in hooks:
            hook.remove()


class BottleneckSlot(Slot):
    """Two thin matrices with something bent between them: up act(down x + b) + c. Subclasses say where and how.

    Tensors: `down` (r, d), `down_bias` (r,), `up` (d, r), `up_bias` (d,): 2 d r + r + d parameters.
    """

    mergeable = False

    def __init__(self, site: Site, slots: int, size: int, scaling: float, dropout: float):
        """Makes the matrices for a stream of the site's width; ``size`` is r."""
        super().__init__(site, slots, scaling)
        width, self.dropout = site.shape[0], dropout
        self.down = nn.Parameter(torch.empty(slots, size, width))
        self.down_bias = nn.Parameter(torch.zeros(slots, size))
        self.up = nn.Parameter(torch.empty(slots, width, size))
        self.up_bias = nn.Parameter(torch.zeros(slots, width))

    def bottleneck(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns up drop(act(down x + b)) + c, without the strength: (b, ..., d) -> (b, n, d)."""
        down, down_bias, up, up_bias, _ = self.pick(self.down, self.down_bias, self.up, self.up_bias)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        down, down_bias, up, up_bias = (part.to(x.dtype) for part in (down, down_bias, up, up_bias))
        hidden = F.dropout(act(tokens @ down.mT + down_bias[:, None]), self.dropout, self.training)
        return hidden @ up.mT + up_bias[:, None]

    def strength(self, like: Tensor) -> Tensor:
        """Returns the strength of each row, to multiply (b, n, d)."""
        (strength,) = self.pick()
        return strength.view(-1, 1, 1).to(like.dtype)
