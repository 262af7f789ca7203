"""Slots: trained adapters put into a frozen model, taken out again bit for bit.

A site's module changes class, not identity: ``module.__class__`` becomes a subclass whose forward is the original one
plus the slots. So the base keeps its state-dict keys, ``isinstance``, deepcopy and plain checkpoint loading. The
trainable tensors live in a `Bank`, a separate root that owns them, stacked over slots: a row of the batch picks its
slot by `Handle.route`.

A method offers a `Slot` class for its kind of site and calls `attach`; several handles on one site add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.kernels.lora_linear import Term, lora_linear
from graft.studio.errors import FormatError, InputError, SiteError
from graft.studio.sites import Model, Plan, Site, named_modules, nearest


class Slot(nn.Module):
    """What a method puts on one site: its parameters are stacks whose first dimension is the slot.

    Subclasses define `reset`, `delta` and either `term` (linear sites) or `forward`.
    """

    rank_dims: ClassVar[Mapping[str, int]] = {}
    """For each tensor that has one, the dimension (not counting the slot's) along which zeros change nothing."""
    scale: Tensor
    route: Tensor | None

    def __init__(self, site: Site, slots: int, scaling: float, weight_mode: bool = False):
        """Makes an empty slot; ``scaling`` is the method's own factor, times which `Handle.scale` sets the strength."""
        super().__init__()
        self.site, self.slots, self.scaling, self.weight_mode = site, slots, scaling, weight_mode
        self.merged: int | None = None
        self.register_buffer("scale", torch.full((slots,), scaling), persistent=False)
        self.register_buffer("route", None, persistent=False)

    def reset(self, slot: int) -> None:
        """Draws the initial values of one slot from torch's global generator."""
        raise TypeError(f"{type(self).__name__} must define reset")

    def delta(self, slot: int) -> Tensor:
        """Returns what the slot adds to the covered weight, float32, of shape ``site.covered``."""
        raise TypeError(f"{type(self).__name__} cannot be written as a weight change")

    def term(self) -> Term | None:
        """Returns the addition as a low-rank term for the fused kernel, or None to go through `forward`."""
        return None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the site's output ``y`` for its input ``x`` with this slot's addition."""
        raise TypeError(f"{type(self).__name__} must define forward")

    def weight_delta(self, slot: int) -> Tensor:
        """Returns `delta` as a change of the module's whole weight: zero outside the site's rows."""
        delta, rows = self.delta(slot), self.site.rows
        if rows is None:
            return delta
        return F.pad(delta, (0, 0) * (delta.dim() - 1) + (rows[0], self.site.shape[0] - rows[1]))

    def check_rows(self, x: Tensor) -> None:
        """Raises SiteError when the routed batch is not the one that arrives here."""
        if self.route is not None and len(self.route) != x.shape[0]:
            given = f"route of {len(self.route)} rows"
            raise SiteError(
                given, f"{self.site.key} got a batch of {x.shape[0]}", "route the batch that the model sees"
            )


class _Slotted(nn.Module):
    """Forward of a module that carries slots."""

    graft_slots: list[Slot]

    @property
    def weight(self) -> Tensor:
        """The base weight and what slots in weight mode add, also for code that reads it without calling the module."""
        weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        for slot in self.graft_slots:
            if slot.weight_mode and slot.merged is None:
                weight = weight + slot.weight_delta(0).to(weight.dtype)
        return weight

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = super().forward(input)  # type: ignore[misc]
        for slot in self.graft_slots:
            if not slot.weight_mode and slot.merged is None:
                slot.check_rows(input)
                y = slot(input, y)
        return y


class _SlottedLinear(_Slotted):
    """A dense linear layer: base product and low-rank terms in one function."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        terms = []
        for slot in self.graft_slots:
            if not slot.weight_mode and slot.merged is None:
                slot.check_rows(input)
                terms.append(slot.term())
        if not terms or None in terms:
            return super().forward(input)
        return lora_linear(input, self.weight, self.bias, tuple(terms))  # type: ignore[arg-type]


@cache
def _slotted(original: type[nn.Module]) -> type[nn.Module]:
    # A quantised subclass of Linear keeps its own forward, and the slots add to what it returns.
    dense = original.forward is nn.Linear.forward
    return type(f"Slotted{original.__name__}", (_SlottedLinear if dense else _Slotted, original), {})


class Bank(nn.Module):
    """Owns the slots of one handle in a tree of the sites' names; its state dict has keys ``<site>.<tensor>``."""

    def __init__(self, slots: list[Slot]):
        super().__init__()
        for slot in sorted(slots, key=lambda slot: slot.site.key):  # a parent before its children
            *path, last = slot.site.key.split(".")
            node: nn.Module = self
            for part in path:
                if part not in node._modules:
                    node.add_module(part, nn.Module())
                node = node._modules[part]  # type: ignore[assignment]
            node.add_module(last, slot)


class Handle:
    """An attached adapter: its parameters, its routing, and the way back.

    Example:
        >>> handle = LoRA(rank=4, targets="all-linear").attach(model)
        >>> optimizer = torch.optim.AdamW(handle.bank.parameters())
        >>> handle.detach()
    """

    def __init__(self, modules: dict[str, nn.Module], plan: Plan, slots: list[Slot], tied: Mapping[str, str]):
        self.plan = plan
        self.bank = Bank(slots)
        self._modules = modules
        self._tied = tied
        self._slots = slots
        self.slots = slots[0].slots

    def tensors(self, slot: int = 0) -> dict[str, Tensor]:
        """Returns a copy of one slot's tensors, named ``<site>.<tensor>``."""
        return {name: tensor[slot].detach().clone() for name, tensor in self.bank.named_parameters()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], slot: int = 0) -> None:
        """Puts tensors into a slot. A smaller rank is padded with zeros, which changes nothing.

        Raises:
            FormatError: a name missing or unknown, or a shape that does not fit.
        """
        own = dict(self.bank.named_parameters())
        for name in sorted(set(own) ^ set(tensors)):
            reason = "missing from the adapter" if name in own else "not part of the attached method"
            raise FormatError(name, reason, nearest(name, tensors if name in own else own))
        rank_dims = {f"{each.site.key}.{name}": dim for each in self._slots for name, dim in each.rank_dims.items()}
        for name, tensor in tensors.items():
            have, room = tuple(tensor.shape), tuple(own[name][slot].shape)
            if not _fits(have, room, rank_dims.get(name)):
                raise FormatError(name, f"shape {have} for {room}", "attach with its config")
        for name, tensor in tensors.items():
            values = own[name][slot]
            values.zero_()
            values[tuple(slice(size) for size in tensor.shape)].copy_(tensor)

    @torch.no_grad()
    def reset(self, slot: int, seed: int) -> None:
        """Starts a slot anew from a seed, whatever the other slots hold and whatever the global generator's state."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for each in self._slots:
                each.reset(slot)

    def route(self, rows: Tensor | None) -> None:
        """Sets the slot of each batch row, (b,) long with -1 for none; None sends every row to slot 0.

        Raises:
            InputError: a slot that does not exist, or a site in weight mode, which has one weight for all rows.
        """
        if rows is not None:
            if rows.dtype != torch.long or rows.dim() != 1 or bool(((rows < -1) | (rows >= self.slots)).any()):
                raise InputError(
                    f"route {rows}", f"wants a 1-d long tensor from -1 to {self.slots - 1}", "attach more slots"
                )
            for slot in self._slots:
                if slot.weight_mode:
                    raise InputError(
                        slot.site.key, "in weight mode rows cannot differ", "route(None), or leave this site out"
                    )
        placed = {slot.scale.device: None if rows is None else rows.to(slot.scale.device) for slot in self._slots}
        for slot in self._slots:
            slot.route = placed[slot.scale.device]

    def scale(self, slot: int, value: float) -> None:
        """Sets the strength of a slot: 1 as trained, 0 off."""
        for each in self._slots:
            each.scale[slot] = each.scaling * value
        if self._modules and self._slots[0].merged == slot:
            self._set_merged(slot)

    def probe(self, run: Callable[[], Tensor]) -> None:
        """Runs the model once, forward and backward, and checks that every site takes part.

        Args:
            run: calls the model on a tiny input and returns an output or loss; gradients and generators are kept.

        Raises:
            SiteError: names the sites that were bypassed, or whose output does not reach the result.
        """
        parameters = {site: list(slot.parameters()) for site, slot in zip(self.plan, self._slots, strict=True)}
        flat = [p for group in parameters.values() for p in group]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            out = run()
            loss = out if out.dim() == 0 else out.float().square().mean()
            if not loss.requires_grad:
                raise SiteError(f"{len(self.plan)} sites", "none takes part in the output", _REMEDY)
            gradients = dict(zip(map(id, flat), torch.autograd.grad(loss, flat, allow_unused=True), strict=True))
        dead = []
        for site, group in parameters.items():
            found = [g for p in group if (g := gradients[id(p)]) is not None]
            if not any(bool(g.count_nonzero()) for g in found):
                dead.append(site.key)
        if dead:
            reason = f"{len(dead)} of {len(self.plan)} sites get no gradient (bypassed, or the weight is read directly)"
            raise SiteError(", ".join(dead), reason, _REMEDY)

    @torch.no_grad()
    def bypassed(self, run: Callable[[], object]) -> list[str]:
        """Runs the model once, forward, and returns the sites whose module it never calls: nothing acts there.

        Unlike `probe` this needs no gradient and does not mind sites that are called without effect on the result.
        """
        called: set[str] = set()
        hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name: called.add(name))  # type: ignore[misc]
            for name, module in self._modules.items()
        ]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        sites = zip(self.plan, self._slots, strict=True)
        return [site.key for site, slot in sites if site.name not in called and not slot.weight_mode]

    def merge(self, slot: int = 0) -> None:
        """Adds a slot into the base weights, whose exact originals are kept for `unmerge`.

        Raises:
            SiteError: a weight that another module uses too, that is quantised, or that is no longer attached.
        """
        if not self._modules:
            raise SiteError("the adapter", "it was detached", "attach it again")
        for name, module in self._modules.items():
            if name in self._tied:
                reason = f"its weight is that of {self._tied[name]} too, which a merge would change"
                raise SiteError(name, reason, "leave the adapter attached, or untie them")
            weight: Any = module._parameters["weight"]
            if not weight.is_floating_point():
                reason = f"its weight is quantised ({weight.dtype})"
                raise SiteError(name, reason, "merge into the base as it was before quantisation")
        self._set_merged(slot)

    def unmerge(self) -> None:
        """Restores the base weights bit for bit."""
        if self._modules:
            self._set_merged(None)

    @torch.no_grad()
    def _set_merged(self, slot: int | None) -> None:
        for each in self._slots:
            each.merged = slot
        for name in {site.name for site in self.plan}:
            _refresh(self._modules[name])

    def detach(self) -> None:
        """Takes the slots out: classes, keys and weights are what they were. The bank keeps its tensors.

        A second time does nothing.
        """
        self.unmerge()
        if not self._modules:
            return
        for site, slot in zip(self.plan, self._slots, strict=True):
            module: Any = self._modules[site.name]
            module.graft_slots = [other for other in module.graft_slots if other is not slot]
            if not module.graft_slots:
                del module.graft_slots
                module.__class__ = type(module).__bases__[1]  # the original
        self._modules = {}


def _fits(have: tuple[int, ...], room: tuple[int, ...], rank_dim: int | None) -> bool:
    """Whether a tensor fills its room, or all of it but some ranks."""
    if len(have) != len(room):
        return False
    return all(a == b or (dim == rank_dim and a < b) for dim, (a, b) in enumerate(zip(have, room, strict=True)))


_REMEDY = "leave them out of the targets, or declare weight_mode for modules whose weight is read directly"


def attach(model: Model, plan: Plan, build: Callable[[Site], Slot]) -> Handle:
    """Puts a slot on every site of a plan.

    Args:
        model: the model or its components; freeze it with ``requires_grad_(False)`` if it is to stay as it is.
        plan: the sites.
        build: makes the slot of a site.

    Raises:
        SiteError: no sites, or a site that the model does not have in this shape.
    """
    if not len(plan):
        raise SiteError("an empty plan", "there is nothing to attach to", "choose other targets")
    modules = named_modules(model)
    slots = [_built(site, modules, build) for site in plan]  # all of them, before the first module is touched
    for site, slot in zip(plan, slots, strict=True):
        module: Any = modules[site.name]
        if not isinstance(module, _Slotted):
            module.__class__ = _slotted(module.__class__)
            module.graft_slots = []
        module.graft_slots.append(slot)
    return Handle({site.name: modules[site.name] for site in plan}, plan, slots, _tied(modules))


def _built(site: Site, modules: Mapping[str, nn.Module], build: Callable[[Site], Slot]) -> Slot:
    """The slot of a site, on its module's device."""
    if site.name not in modules:
        raise SiteError(site.name, "the model has no such module", nearest(site.name, modules))
    weight = getattr(modules[site.name], "weight", torch.empty(0))
    if tuple(weight.shape) != site.shape:
        reason = f"planned for a weight {site.shape}, the model has {tuple(weight.shape)}"
        raise SiteError(site.name, reason, "use its own base")
    slot = build(site).to(weight.device)
    parent = modules.get(site.name.rpartition(".")[0])
    raw = isinstance(parent, nn.MultiheadAttention) and type(parent).forward is nn.MultiheadAttention.forward
    if raw and not slot.weight_mode:
        raise SiteError(site.name, "torch's MultiheadAttention reads its weight without calling it", _REMEDY)
    return slot


def _tied(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Modules whose weight another one uses too, with that one's name."""
    users: dict[Tensor, list[str]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(parameter, []).append(name)  # tensors hash by identity
    pairs = (pair for names in users.values() for pair in zip(names, names[1:] + names[:1], strict=True))
    return {name: other for name, other in pairs if name != other}


def _refresh(module: Any) -> None:
    """Makes the weight the original plus the merged slots; forgets the original when none is merged."""
    merged = [slot for slot in module.graft_slots if slot.merged is not None]
    weight = module._parameters["weight"]
    original = module.__dict__.get("graft_original")
    if original is None and merged:
        original = module.graft_original = weight.detach().clone()
    if original is None:
        return
    total = original.to(torch.promote_types(original.dtype, torch.float32))
    for slot in merged:
        total = total + slot.weight_delta(slot.merged)
    weight.copy_(total if merged else original)
    if not merged:
        del module.graft_original
