"""What a method puts on one site: stacked parameters, and the hooks through which they act."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from graft.kernels.lora_linear import Term
from graft.studio.errors import SiteError
from graft.studio.sites import Site

OUTER = ("block", "tokens", "kv")
"""Kinds of sites whose slots act around a whole module."""


class Base(NamedTuple):
    """The frozen parameters that a site covers, as they were before anything was merged."""

    weight: Tensor | None
    """(o, i, ...), or None where the site has none or a quantised one."""
    bias: Tensor | None
    """(o,), or None."""
    product: Callable[[Tensor], Tensor] | None = None
    """What a quantised layer makes of (m, i): its product (m, o), without the bias."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Base:
        """Returns what a function makes of weight and bias."""
        return self._replace(
            weight=None if self.weight is None else change(self.weight),
            bias=None if self.bias is None else change(self.bias),
        )

    def part(self, rows: tuple[int, int] | None) -> Base:
        """Returns those of some output rows."""
        if rows is None:
            return self
        whole = self.product
        product = None if whole is None else lambda x: whole(x)[:, slice(*rows)]
        return self.each(lambda parameter: parameter[slice(*rows)])._replace(product=product)


class Slot(nn.Module):
    """What a method puts on one site: its parameters are stacks whose first dimension is the slot.

    Subclasses define `reset` and the hooks that they need: `term` or `forward` on layers, `enter` on a layer's input,
    `around` on whole modules, `delta` or `folded` to be merged. A slot on rows of a layer sees these rows only.
    """

    rank_dims: ClassVar[Mapping[str, int]] = {}
    """For each tensor that has one, the dimension (not counting the slot's) along which zeros change nothing."""
    saved: ClassVar[tuple[str, ...]] = ()
    """Buffers that belong to the trained adapter, beside the parameters."""
    mergeable: bool = True
    """Whether the slot can become part of the base's parameters."""
    fades: ClassVar[bool] = True
    """Whether it can be weakened, down to nothing for rows without a slot."""
    waits: ClassVar[bool] = False
    """Whether it has no gradient before another slot of its handle, a gate, has moved."""
    scale: Tensor
    route: Tensor | None

    def __init__(self, site: Site, slots: int, scaling: float = 1.0, weight_mode: bool = False):
        """Makes an empty slot; ``scaling`` is the method's own factor, times which `Handle.scale` sets the strength."""
        super().__init__()
        self.site, self.slots, self.scaling, self.weight_mode = site, slots, scaling, weight_mode
        self.merged: int | None = None
        self.register_buffer("scale", torch.full((slots,), scaling), persistent=False)
        self.register_buffer("route", None, persistent=False)

    def reset(self, slot: int) -> None:
        """Draws the initial values of one slot from torch's global generator."""
        raise TypeError(f"{type(self).__name__} must define reset")

    def enter(self, x: Tensor) -> Tensor:
        """Returns the input that the layer is to see instead of ``x``."""
        return x

    def term(self, base: Base) -> Term | None:
        """Returns the addition as a low-rank term for the fused kernel, or None to go through `forward`."""
        return None

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns the site's output ``y`` for its input ``x`` with this slot's change."""
        return y

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns what a whole module (sites of kind block, tokens, kv) gives; ``call`` is it without this slot."""
        return call(*args, **kwargs)

    def delta(self, slot: int) -> Tensor:
        """Returns what the slot adds to the covered weight, float32, of shape ``site.covered``."""
        raise TypeError(f"{type(self).__name__} cannot be written as a weight change")

    def folded(self, slot: int, now: Base, base: Base) -> Base:
        """Returns the parameters ``now`` (float32) with the slot's change; ``base`` are the original ones."""
        assert now.weight is not None
        return now._replace(weight=now.weight + self.delta(slot))

    def pick(self, *stacks: Tensor) -> list[Tensor]:
        """Returns for each stack the entries that the rows of the batch chose, and last the strength, (g, ...).

        g is 1 when all rows share slot 0, else the batch; the strength is 0 for rows without a slot.
        """
        if self.route is None:
            return [*(stack[:1] for stack in stacks), self.scale[:1]]
        slot = self.route.clamp(min=0)
        return [*(stack[slot] for stack in stacks), self.scale[slot] * (self.route >= 0)]

    def check_rows(self, x: Tensor) -> None:
        """Raises SiteError when the routed batch is not the one that arrives here."""
        if self.route is not None and len(self.route) != x.shape[0]:
            given = f"route of {len(self.route)} rows"
            raise SiteError(
                given, f"{self.site.key} got a batch of {x.shape[0]}", "route the batch that the model sees"
            )


def spread(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """Returns per-channel values (g, c) in a shape that multiplies ``like`` (b, ..., c at ``dim``, ...)."""
    shape = [values.shape[0], *[1] * (like.dim() - 1)]
    shape[dim] = values.shape[1]
    return values.reshape(shape).to(like.dtype)


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns the input of a module that is called with whatever: the first tensor."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def wide(tensor: Tensor) -> Tensor:
    """Returns a tensor in float32, or wider if it was."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
