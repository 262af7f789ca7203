"""The forward of modules that carry slots, and what a merge makes of their parameters.

A module changes class, not identity: ``module.__class__`` becomes a subclass whose forward is the original one with the
slots. So the base keeps its state-dict keys, ``isinstance``, deepcopy and plain checkpoint loading.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.kernels.lora_linear import lora_linear
from graft.studio.attention import attend
from graft.studio.errors import SiteError
from graft.studio.sites import is_dense, weight_names
from graft.studio.slot import OUTER, Base, Slot, first_tensor, wide


class Slotted(nn.Module):
    """Forward of a module that carries slots."""

    graft_arguments: tuple[str, ...]
    """Names of what the original forward takes."""
    graft_slots: list[Slot]
    graft_guests: int
    """Handles with slots inside this module that need it to call what it holds."""

    def graft_base(self, slot: Slot) -> Base:
        """The original parameters that a slot's site covers."""
        whole: Base | None = self.__dict__.get("graft_original")
        if whole is None:
            weight, bias = map(self._parameters.get, weight_names(self))
            packed = weight is not None and not is_dense(weight)
            whole = Base(None, bias, self.graft_product) if packed else Base(weight, bias)
        return whole.part(slot.site.rows)

    def graft_product(self, x: Tensor) -> Tensor:
        """What the original, a linear layer, makes of (m, i) without its bias."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        y: Tensor = super().forward(x.to(weight.dtype) if weight.is_floating_point() else x)
        return y if bias is None else y - bias

    def graft_live(self, outer: bool) -> list[Slot]:
        """The slots that act in forward, around the module or within."""
        live = [slot for slot in self.graft_slots if not slot.weight_mode and slot.merged is None]
        return [slot for slot in live if (slot.site.kind in OUTER) is outer]

    @property
    def weight(self) -> Tensor:
        """The base weight and what slots in weight mode make of it, also for code that reads it without a call."""
        direct = [slot for slot in self.graft_slots if slot.weight_mode and slot.merged is None]
        weight = self._parameters.get("weight")
        if weight is None:
            raise AttributeError("weight")
        if not direct:
            return weight
        now = Base(weight, None)
        for slot in direct:
            now = _fold(now, slot, 0, self.graft_base(slot))
        assert now.weight is not None
        return now.weight.to(weight.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the original does, with the slots inside it and around it."""
        call: Callable[..., Any] = super().forward
        if inner := self.graft_live(outer=False):
            call = partial(self.graft_layer, inner, call)
        for slot in self.graft_live(outer=True):
            slot.check_rows(first_tensor(args, kwargs))
            call = partial(slot.around, self, call)
        return call(*args, **kwargs)

    def graft_layer(self, slots: list[Slot], call: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """A layer of one tensor with its slots.

        Raises:
            SiteError: a quantised product without a gradient: slots before this layer would learn from wrong ones.
        """

        def checked(x: Tensor) -> Tensor:
            y = call(x)
            if x.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
                name, reason = slots[0].site.key, "the quantised layer passes no gradient to its input"
                raise SiteError(name, reason, "quantise the weight only, not the activations")
            return y

        return _through(input, checked, [(slot, slot.site.rows, self.graft_base(slot)) for slot in slots])


class _SlottedLinear(Slotted):
    """A dense linear layer: base product and low-rank terms in one function."""

    bias: Tensor | None

    def graft_layer(self, slots: list[Slot], call: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        weight = self.weight
        if not is_dense(weight):  # a quantised tensor, which knows its own product
            return super().graft_layer(slots, call, input)
        return _linear(input, weight, self.bias, [(slot, slot.site.rows, self.graft_base(slot)) for slot in slots])


class _SlottedAttention(Slotted):
    """torch's MultiheadAttention on products that slots can join: it reads its weights without calling a layer."""

    embed_dim: int

    def graft_project(self, slots: list[Slot], x: Tensor, a: int, b: int) -> Tensor:
        """Rows a to b of the packed projection, with the slots on them."""
        weight, bias = self._parameters["in_proj_weight"], self._parameters["in_proj_bias"]
        assert weight is not None
        placed = []
        for slot in slots:
            start, stop = slot.site.rows or (0, 3 * self.embed_dim)
            if a <= start and stop <= b:
                rows = None if (start, stop) == (a, b) else (start - a, stop - a)
                placed.append((slot, rows, self.graft_base(slot)))
        return _linear(x, weight[a:b], None if bias is None else bias[a:b], placed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = partial(attend, self, partial(self.graft_project, self.graft_live(outer=False)))
        for slot in self.graft_live(outer=True):
            call = partial(slot.around, self, call)
        return call(*args, **kwargs)


class _OwnPath(Slotted):
    """torch's transformer layers: in inference they pass their weights to one function that knows no slots."""

    activation_relu_or_gelu = property(lambda self: 0)  # "not supported": the layer calls its modules
    use_nested_tensor = property(lambda self: False)


PACKED = (nn.MultiheadAttention.forward, _SlottedAttention.forward)

_Placed = tuple[Slot, tuple[int, int] | None, Base]
"""A slot, the output features it acts on, and the original parameters there."""


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, placed: list[_Placed]) -> Tensor:
    """A dense linear layer with slots: in one function if each of them is a term."""
    for slot, _, _ in placed:
        slot.check_rows(x)
    found = [(slot.term(base), rows) for slot, rows, base in placed]
    ready = [term if rows is None else term._replace(rows=rows) for term, rows in found if term is not None]
    # A gain scales the base's product but no other term: it stays alone on its rows.
    where = {rows for _, rows, _ in placed}
    alone = len(placed) == 1 or (len(where) == len(placed) and None not in where)
    if torch.compiler.is_compiling() and any(term.dropout for term in ready):  # its masks come from a seed
        ready = []
    if ready and len(ready) == len(placed) and (alone or all(term.gain is None for term in ready)):
        return lora_linear(x, weight, bias, tuple(ready))
    return _through(x, lambda x: F.linear(x, weight, bias), placed)


def _through(x: Tensor, call: Callable[[Tensor], Tensor], placed: list[_Placed]) -> Tensor:
    """A layer inside its slots: each sees the input that the one after it hands on."""
    inputs = [x]
    for slot, _, _ in reversed(placed):
        slot.check_rows(x)
        inputs.append(slot.enter(inputs[-1]))
    y = call(inputs.pop())
    for slot, rows, base in placed:
        x = inputs.pop()
        if rows is None:
            y = slot(x, y, base)
        else:
            a, b = rows
            y = torch.cat([y[..., :a], slot(x, y[..., a:b], base), y[..., b:]], -1)
    return y


@torch.no_grad()
def dense_weight(layer: nn.Module) -> Tensor:
    """Returns a layer's own weight, (o, i, ...), whole; a quantised one as what the layer makes of the identity."""
    weight: Any = layer._parameters[weight_names(layer)[0]]
    if hasattr(weight, "full_tensor"):  # shared out over processes, which all ask
        weight = weight.full_tensor()
    if is_dense(weight) or not isinstance(layer, nn.Linear):
        return weight.detach()  # type: ignore[no-any-return]
    bare: Any = copy(layer)  # the first call may settle the type that a layer computes in
    bare._parameters = {**layer._parameters, "bias": None}
    if isinstance(layer, Slotted):
        bare.graft_slots = []
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    found: Tensor = bare(torch.eye(layer.in_features, dtype=dtype, device=weight.device)).T
    return found


@cache
def _slotted(original: type[nn.Module]) -> type[nn.Module]:
    mixin = Slotted
    if original.forward is nn.Linear.forward:  # a quantised subclass keeps its own forward
        mixin = _SlottedLinear
    elif original.forward is nn.MultiheadAttention.forward:
        mixin = _SlottedAttention
    elif issubclass(original, nn.TransformerEncoderLayer | nn.TransformerEncoder):
        mixin = _OwnPath
    # transformers keeps what a model can record under the full name of its class.
    told: dict[str, Any] = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    told["graft_arguments"] = tuple(signature(original.forward).parameters)[1:]  # a compiler cannot ask for them
    return type(f"Slotted{original.__name__}", (mixin, original), told)


def arguments(module: Any) -> tuple[str, ...]:
    """Returns the names of what a module's own forward takes, with slots or without."""
    return module.graft_arguments if isinstance(module, Slotted) else tuple(signature(module.forward).parameters)


def enter_module(module: Any) -> Any:
    """Gives a module the forward that knows slots."""
    if not isinstance(module, Slotted):
        module.__class__ = _slotted(module.__class__)
        module.graft_slots, module.graft_guests = [], 0
    return module


def leave_module(module: Any) -> None:
    """Makes a module what it was when nothing is left on it."""
    if isinstance(module, Slotted) and not module.graft_slots and not module.graft_guests:
        del module.graft_slots, module.graft_guests
        module.__class__ = type(module).__bases__[1]  # the original


def refresh(module: Any) -> None:
    """Makes the parameters the originals with the merged slots; forgets the originals when none is merged."""
    merged = [slot for slot in module.graft_slots if slot.merged is not None]
    names = weight_names(module)
    original: Base | None = module.__dict__.get("graft_original")
    if original is None and merged:
        now = Base(*map(module._parameters.get, names))
        original = module.graft_original = now.each(lambda parameter: parameter.detach().clone())
    if original is None:
        return
    now = original
    for slot in merged:
        now = _fold(now, slot, slot.merged, module.graft_base(slot))
    for name, value in zip(names, now[:2], strict=True):
        parameter = module._parameters.get(name)
        if parameter is not None and value is not None:
            parameter.copy_(value)
        elif parameter is not None or value is not None:  # a bias that the layer has only while merged
            weight = module._parameters[names[0]]
            module._parameters[name] = None if value is None else nn.Parameter(value.to(weight.dtype), False)
    if not merged:
        del module.graft_original


def _fold(now: Base, slot: Slot, index: int, base: Base) -> Base:
    """Whole parameters with a slot's change in its rows, at least float32."""
    rows = slot.site.rows
    whole = now.each(wide)
    part = slot.folded(index, whole.part(rows), base)
    if rows is None:
        return part
    a, b = rows
    joined = []
    for old, new in zip(whole[:2], part[:2], strict=True):
        if old is None and new is not None:
            old = new.new_zeros(slot.site.shape[0])
        joined.append(None if old is None or new is None else torch.cat([old[:a], new, old[b:]]))
    return Base(joined[0], joined[1])
