"""Slots: trained adapters put into a frozen model, taken out again bit for bit.

The trainable tensors live in a `Bank`, a separate root that owns them, stacked over slots: a row of the batch picks its
slot by `Handle.route`. A method offers a `Slot` class for its kind of site (`graft.studio.slot`) and calls `attach`,
which gives the sites' modules a forward that knows slots (`graft.studio.slotted`); several handles on one site add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graft.studio.attention import is_plain_attention
from graft.studio.errors import FormatError, InputError, SiteError
from graft.studio.sites import Model, Plan, Site, is_dense, named_modules, nearest, told, weight_names, weight_shape
from graft.studio.slot import OUTER, Slot
from graft.studio.slotted import PACKED, enter_module, leave_module, refresh

S = TypeVar("S", bound=Slot)


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
        return {
            name: tensor[slot].detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in self._stacks().items()
        }

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
                    tensor.data = _longer(tensor.data, slots - self.slots)
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

    @property
    def routed(self) -> Tensor | None:
        """What `route` was told last."""
        return self._slots[0].route

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
        training = self.bank.training
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            self.bank.eval()  # a gate that is drawn shut is not dead
            try:
                out = run()
            finally:
                self.bank.train(training)
            loss = out if out.dim() == 0 else out.float().square().mean()
            if not loss.requires_grad:
                raise SiteError(f"{len(self.plan)} sites", "none takes part in the output", _REMEDY)
            gradients = dict(zip(map(id, flat), torch.autograd.grad(loss, flat, allow_unused=True), strict=True))
        dead = []
        for slot, (site, group) in zip(self._slots, parameters.items(), strict=True):
            found = [g for p in group if (g := gradients[id(p)]) is not None]
            if group and not any(slot.waits or bool(g.count_nonzero()) for g in found):
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
            SiteError: a weight that another module uses too, that is quantised or sharded, or no longer attached.
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
            if not is_dense(weight):
                raise SiteError(name, told(weight), "merge into the base as it was before")
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
            refresh(self._modules[name])

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
            leave_module(module)
        for module in self._callers:
            module.graft_guests -= 1
            leave_module(module)
        self._modules, self._callers = {}, []


def _longer(stack: Tensor, count: int) -> Tensor:
    """A stack with empty slots at its end, as it lies in memory."""
    empty = stack.new_zeros(count, *stack.shape[1:])
    if stack.dim() > 2 and stack.mT.is_contiguous():
        return torch.cat([stack.mT, empty.mT]).mT
    return torch.cat([stack, empty])


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
        enter_module(modules[slot.site.name]).graft_slots.append(slot)
    for module in callers.values():
        enter_module(module).graft_guests += 1
    touched = {site.name: modules[site.name] for site in plan}
    return Handle(touched, plan, slots, _tied(modules), list(callers.values()))


def _built(site: Site, modules: Mapping[str, nn.Module], build: Callable[[Site], Slot]) -> Slot:
    """The slot of a site, on its module's device."""
    if site.name not in modules:
        raise SiteError(site.name, "the model has no such module", nearest(site.name, modules))
    module = modules[site.name]
    if not site.name:
        raise SiteError(type(module).__name__, "the site is the model itself", 'attach to {"model": model}')
    names = weight_names(module)
    covered = getattr(module, names[site.kind == "bias"], None)
    found = None if covered is None else tuple(covered.shape) if site.kind == "bias" else weight_shape(module)
    if site.kind not in OUTER and not (found and _same(site.shape, found)):
        raise SiteError(site.name, f"planned for a weight {site.shape}, the model has {found}", "use its own base")
    anything = covered if covered is not None else next(module.parameters(), torch.empty(0))
    slot = build(site).to(anything.device)
    if slot.weight_mode and not is_dense(anything):
        reason = f"{told(anything)} and cannot be changed itself"
        raise SiteError(site.key, reason, "use a method that acts beside it, such as lora")
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
        packed = isinstance(module, nn.MultiheadAttention) and type(module).forward in PACKED
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
