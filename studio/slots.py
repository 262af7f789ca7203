"""Slots: trained adapters put into a frozen model, taken out again bit for bit.

A site's module changes class, not identity: ``module.__class__`` becomes a subclass whose forward is the original one
plus the slots. So the base keeps its state-dict keys, ``isinstance``, deepcopy and plain checkpoint loading. The
trainable tensors live in a `Bank`, a separate root that owns them, stacked over slots: a row of the batch picks its
slot by `Handle.route`.

A method offers a `Slot` class for its kind of site and calls `attach`; several handles on one site add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.kernels.lora_linear import Term, lora_linear
from graft.studio.attention import attend, is_plain_attention
from graft.studio.errors import FormatError, InputError, SiteError
from graft.studio.sites import Model, Plan, Site, named_modules, nearest, weight_names


class Base(NamedTuple):
    """The frozen parameters that a site covers, as they were before anything was merged."""

    weight: Tensor | None
    """(o, i, ...), or None where the site has none."""
    bias: Tensor | None
    """(o,), or None."""

    def part(self, rows: tuple[int, int] | None) -> Base:
        """Returns those of some output rows."""
        if rows is None:
            return self
        return Base(*(None if each is None else each[slice(*rows)] for each in self))


S = TypeVar("S", bound="Slot")


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


OUTER = ("block", "tokens", "kv")
"""Kinds of sites whose slots act around a whole module."""


class _Slotted(nn.Module):
    """Forward of a module that carries slots."""

    graft_slots: list[Slot]
    graft_guests: int
    """Handles with slots inside this module that need it to call what it holds."""

    def graft_base(self, slot: Slot) -> Base:
        """The original parameters that a slot's site covers."""
        whole: Base | None = self.__dict__.get("graft_original")
        whole = whole or Base(*map(self._parameters.get, weight_names(self)))
        return whole.part(slot.site.rows)

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
        now = Base(weight, None)
        for slot in direct:
            now = _fold(now, slot, 0, self.graft_base(slot))
        assert now.weight is not None
        return now.weight.to(weight.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = super().forward
        if inner := self.graft_live(outer=False):
            call = partial(self.graft_layer, inner, call)
        for slot in self.graft_live(outer=True):
            slot.check_rows(first_tensor(args, kwargs))
            call = partial(slot.around, self, call)
        return call(*args, **kwargs)

    def graft_layer(self, slots: list[Slot], call: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """A layer of one tensor with its slots."""
        return _through(input, call, [(slot, slot.site.rows, self.graft_base(slot)) for slot in slots])


class _SlottedLinear(_Slotted):
    """A dense linear layer: base product and low-rank terms in one function."""

    bias: Tensor | None

    def graft_layer(self, slots: list[Slot], call: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        placed = [(slot, slot.site.rows, self.graft_base(slot)) for slot in slots]
        return _linear(input, self.weight, self.bias, placed)


class _SlottedAttention(_Slotted):
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


class _OwnPath(_Slotted):
    """torch's transformer layers: in inference they pass their weights to one function that knows no slots."""

    activation_relu_or_gelu = property(lambda self: 0)  # "not supported": the layer calls its modules
    use_nested_tensor = property(lambda self: False)


_PACKED = (nn.MultiheadAttention.forward, _SlottedAttention.forward)

Placed = tuple[Slot, tuple[int, int] | None, Base]
"""A slot, the output features it acts on, and the original parameters there."""


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, placed: list[Placed]) -> Tensor:
    """A dense linear layer with slots: in one function if each of them is a term."""
    for slot, _, _ in placed:
        slot.check_rows(x)
    terms = [slot.term(base) for slot, _, base in placed]
    # A gain scales the base's product but no other term: it stays alone on its rows.
    where = {rows for _, rows, _ in placed}
    alone = len(where) == len(placed) and (len(placed) == 1 or None not in where)
    ready = [term._replace(rows=rows) for term, (_, rows, _) in zip(terms, placed, strict=True) if term is not None]
    if ready and len(ready) == len(placed) and (alone or all(term.gain is None for term in ready)):
        return lora_linear(x, weight, bias, tuple(ready))
    return _through(x, lambda x: F.linear(x, weight, bias), placed)


def _through(x: Tensor, call: Callable[[Tensor], Tensor], placed: list[Placed]) -> Tensor:
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


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns the input of a module that is called with whatever: the first tensor."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


@cache
def _slotted(original: type[nn.Module]) -> type[nn.Module]:
    mixin = _Slotted
    if original.forward is nn.Linear.forward:  # a quantised subclass keeps its own forward
        mixin = _SlottedLinear
    elif original.forward is nn.MultiheadAttention.forward:
        mixin = _SlottedAttention
    elif issubclass(original, nn.TransformerEncoderLayer | nn.TransformerEncoder):
        mixin = _OwnPath
    return type(f"Slotted{original.__name__}", (mixin, original), {})


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

    def __init__(
        self,
        modules: dict[str, nn.Module],
        plan: Plan,
        slots: list[Slot],
        tied: Mapping[str, str],
        callers: list[nn.Module],
    ):
        self.plan = plan
        self.bank = Bank(slots)
        self._modules = modules
        self._tied = tied
        self._callers = callers
        self._slots = slots
        self._free: list[int] = []
        self.rule: Any = None
        self.slots = slots[0].slots

    def _stacks(self) -> dict[str, Tensor]:
        """What a trained adapter consists of, for all slots; a tensor that sites share appears once."""
        stacks: dict[str, Tensor] = dict(self.bank.named_parameters())
        for each in self._slots:
            stacks |= {f"{each.site.key}.{name}": each.get_buffer(name) for name in each.saved}
        return stacks

    def slots_of(self, kind: type[S]) -> list[S]:
        """Returns the slots of a class, for a method's rules of training."""
        return [slot for slot in self._slots if isinstance(slot, kind)]

    def before_step(self, step: int, steps: int) -> None:
        """Lets the method prepare a step of training, counted from 0; call it before the forward."""
        if self.rule is not None:
            self.rule.before_step(self, step, steps)

    def after_step(self, step: int, steps: int) -> None:
        """Lets the method follow a step; call it after the optimiser's, while the gradients are there."""
        if self.rule is not None:
            self.rule.after_step(self, step, steps)

    def penalty(self) -> Tensor | None:
        """Returns what the method adds to the loss, if anything."""
        return None if self.rule is None else self.rule.penalty(self)

    def tensors(self, slot: int = 0) -> dict[str, Tensor]:
        """Returns a copy of one slot's tensors, named ``<site>.<tensor>``."""
        return {name: tensor[slot].detach().clone() for name, tensor in self._stacks().items()}

    def add(self, tensors: Mapping[str, Tensor]) -> int:
        """Loads an adapter into a free slot and returns its number; stacks double when they are full.

        For inference: optimisers do not follow stacks that grow.

        Raises:
            FormatError: as `load`.
        """
        if not self._free:
            self._free = list(range(2 * self.slots - 1, self.slots - 1, -1))
            self._grow(2 * self.slots)
        self.load(tensors, self._free[-1])
        slot = self._free.pop()
        self.scale(slot, 1.0)
        return slot

    def remove(self, slot: int) -> None:
        """Frees a slot for the next `add`; rows that are still routed to it get the base's output."""
        if all(each.fades for each in self._slots):
            self.scale(slot, 0.0)
        self._free.append(slot)

    @torch.no_grad()
    def _grow(self, slots: int) -> None:
        grown: set[int] = set()
        for each in self._slots:
            for tensor in (*each.parameters(recurse=False), each.scale, *map(each.get_buffer, each.saved)):
                if id(tensor) not in grown:  # sites may share one
                    tensor.data = torch.cat([tensor.data, tensor.data.new_zeros(slots - self.slots, *tensor.shape[1:])])
                    grown.add(id(tensor))
            each.slots = slots
        self.slots = slots

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], slot: int = 0) -> None:
        """Puts tensors into a slot. A smaller rank is padded with zeros, which changes nothing.

        Raises:
            FormatError: a name missing or unknown, or a shape that does not fit.
        """
        own = self._stacks()
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
            if bool((rows < 0).any()) and not all(slot.fades for slot in self._slots):
                raise InputError(f"route {rows}", "rows cannot go without this method", "give every row a slot")
            for slot in self._slots:
                if slot.weight_mode:
                    raise InputError(
                        slot.site.key, "in weight mode rows cannot differ", "route(None), or leave this site out"
                    )
        placed = {slot.scale.device: None if rows is None else rows.to(slot.scale.device) for slot in self._slots}
        for slot in self._slots:
            slot.route = placed[slot.scale.device]

    def scale(self, slot: int, value: float) -> None:
        """Sets the strength of a slot: 1 as trained, 0 off.

        Raises:
            InputError: a method that is there or not, without a between.
        """
        if value != 1 and not all(each.fades for each in self._slots):
            raise InputError(f"scale {value}", "this method has no strength", "detach it to turn it off")
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
        own = [list(slot.parameters(recurse=False)) for slot in self._slots]  # in the bank a bias is below its layer
        users = Counter(id(p) for group in own for p in group)
        parameters = {
            # A shared one says little about its sites; it has to do where a site has none of its own.
            site: [p for p in group if users[id(p)] == 1] or group
            for site, group in zip(self.plan, own, strict=True)
        }
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
        for each in self._slots:
            name = each.site.name
            if not each.mergeable or each.site.kind in OUTER:
                remedy = "leave the adapter attached"
                raise SiteError(each.site.key, f"a {type(each).__name__} cannot be part of the base's weights", remedy)
            if name in self._tied:
                reason = f"its weight is that of {self._tied[name]} too, which a merge would change"
                raise SiteError(name, reason, "leave the adapter attached, or untie them")
            weight: Any = self._modules[name]._parameters[weight_names(self._modules[name])[0]]
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
            _leave(module)
        for module in self._callers:
            module.graft_guests -= 1
            _leave(module)
        self._modules, self._callers = {}, []


def _enter(module: Any) -> Any:
    """Gives a module the forward that knows slots."""
    if not isinstance(module, _Slotted):
        module.__class__ = _slotted(module.__class__)
        module.graft_slots, module.graft_guests = [], 0
    return module


def _leave(module: Any) -> None:
    """Makes a module what it was when nothing is left on it."""
    if isinstance(module, _Slotted) and not module.graft_slots and not module.graft_guests:
        del module.graft_slots, module.graft_guests
        module.__class__ = type(module).__bases__[1]  # the original


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
    callers = {id(module): module for slot in slots for module in _callers(slot, modules)}
    for slot in slots:
        _enter(modules[slot.site.name]).graft_slots.append(slot)
    for module in callers.values():
        _enter(module).graft_guests += 1
    touched = {site.name: modules[site.name] for site in plan}
    return Handle(touched, plan, slots, _tied(modules), list(callers.values()))


def _built(site: Site, modules: Mapping[str, nn.Module], build: Callable[[Site], Slot]) -> Slot:
    """The slot of a site, on its module's device."""
    if site.name not in modules:
        raise SiteError(site.name, "the model has no such module", nearest(site.name, modules))
    module = modules[site.name]
    names = weight_names(module)
    covered = getattr(module, names[site.kind == "bias"], None)
    found = None if covered is None else tuple(covered.shape)
    if site.kind not in OUTER and not (found and _same(site.shape, found)):
        raise SiteError(site.name, f"planned for a weight {site.shape}, the model has {found}", "use its own base")
    anything = covered if covered is not None else next(module.parameters(), torch.empty(0))
    slot = build(site).to(anything.device)
    if site.kind == "mha" and slot.weight_mode:
        raise SiteError(site.name, "needs no weight mode: its products are computed with the slots", "leave it out")
    return slot


def _same(planned: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Whether shapes agree; 0 stands for what the plan, from another library's file, does not know."""
    return len(planned) == len(found) and all(a in (0, b) for a, b in zip(planned, found, strict=True))


def _callers(slot: Slot, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The modules of torch around a site that would use its weights without calling it.

    Raises:
        SiteError: one that cannot be made to call it.
    """
    if slot.weight_mode:
        return []
    found: list[nn.Module] = []
    parts = slot.site.name.split(".")
    for depth in range(len(parts) + 1):
        module = modules.get(".".join(parts[:depth]))
        packed = isinstance(module, nn.MultiheadAttention) and type(module).forward in _PACKED
        if packed and depth < len(parts) and not is_plain_attention(module):
            raise SiteError(slot.site.name, "torch's MultiheadAttention reads its weight without calling it", _REMEDY)
        if packed or isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            assert module is not None
            found.append(module)
    return found


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
    """Makes the parameters the originals with the merged slots; forgets the originals when none is merged."""
    merged = [slot for slot in module.graft_slots if slot.merged is not None]
    names = weight_names(module)
    original: Base | None = module.__dict__.get("graft_original")
    if original is None and merged:
        kept = (module._parameters.get(name) for name in names)
        original = module.graft_original = Base(*(None if each is None else each.detach().clone() for each in kept))
    if original is None:
        return
    now = original
    for slot in merged:
        now = _fold(now, slot, slot.merged, module.graft_base(slot))
    for name, value in zip(names, now, strict=True):
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
    whole = Base(*(None if each is None else wide(each) for each in now))
    part = slot.folded(index, whole.part(rows), base)
    if rows is None:
        return part
    a, b = rows
    joined = []
    for old, new in zip(whole, part, strict=True):
        if old is None and new is not None:
            old = new.new_zeros(slot.site.shape[0])
        joined.append(None if old is None or new is None else torch.cat([old[:a], new, old[b:]]))
    return Base(*joined)


def wide(tensor: Tensor) -> Tensor:
    """Returns a tensor in float32, or wider if it was."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
