"""What methods that act on sites share: a plan, attaching in place, attaching a trained adapter to its base.

Such a method is a frozen dataclass with at least ``targets`` and ``towers``; it says what stands on a site (`slot`) and
how many numbers that is (`count`). Methods with a rule of their own for
training add `before_step`, `after_step` or `penalty`, which `Handle` passes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, nn

from graft.studio.errors import InputError, SiteError
from graft.studio.sites import WEIGHTS, Model, Plan, Site, named_modules, plan_sites
from graft.studio.slot import Slot
from graft.studio.slots import Handle, attach

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter, Card


H = TypeVar("H")


def loaded(handle: H, tensors: Mapping[str, Tensor]) -> H:
    """Puts a trained adapter into what was attached for it; it leaves the base again if that fails.

    Raises:
        FormatError: tensors that do not fit.
    """
    attached: Any = handle
    attached.bank.eval().requires_grad_(False)
    try:
        attached.load(tensors)
    except BaseException:
        attached.detach()
        raise
    return handle


class SiteMethod:
    """A method that puts a slot on every site of a plan."""

    kinds: ClassVar[tuple[str, ...]] = WEIGHTS
    """Kinds of sites that it has a slot for."""
    when: ClassVar[str] = ""
    """When to use it, for people who choose."""
    targets: Any
    towers: tuple[str, ...] | None

    def count(self, site: Site) -> int:
        """Returns the trainable parameters of a site."""
        raise TypeError(f"{type(self).__name__} must define count")

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns what stands on a site; ``module`` is the site's own, for what the shape does not say."""
        raise TypeError(f"{type(self).__name__} must define slot")

    def sites(self, model: Model) -> Plan:
        """Returns the sites that the targets name."""
        return plan_sites(model, self.targets, self.kinds, towers=self.towers)

    def plan(self, model: Model) -> Plan:
        """Returns the sites that `attach` will use, with their parameters."""
        sites = self.sites(model).sites
        return Plan(sites, tuple(map(self.count, sites)))

    def attach(self, model: Model, slots: int = 1, plan: Plan | None = None) -> Handle:
        """Attaches in place, ``slots`` adapters at once, to the planned sites.

        Raises:
            SiteError: targets that name nothing, or a plan of another model.
        """
        modules = named_modules(model)

        def build(site: Site) -> Slot:
            if site.kind not in self.kinds:
                reason = f"{type(self).__name__} has nothing for sites of kind {site.kind}"
                raise SiteError(site.name, reason, f"use {', '.join(self.kinds)}")
            return self.slot(site, slots, modules[site.name])

        handle = attach(model, plan or self.plan(model), build)
        handle.rule = self
        return handle

    def attach_trained(self, model: Model, plan: Plan, tensors: Mapping[str, Tensor]) -> Handle:
        """Attaches what a trained adapter's tensors will be loaded into; a method may look at their shapes."""
        return self.attach(model, plan=plan)

    def before_step(self, handle: Handle, step: int, steps: int) -> None:
        """Prepares a step of training, counted from 0."""

    def after_step(self, handle: Handle, step: int, steps: int) -> None:
        """Follows a step of the optimiser; the gradients are still there."""

    def penalty(self, handle: Handle) -> Tensor | None:
        """Returns what is added to the loss, if anything."""
        return None

    @classmethod
    def attach_to(cls, base: Any, tensors: Mapping[str, Tensor], card: Card) -> Handle:
        """Attaches a trained adapter to its base (or to a plain model), ready for inference.

        An adapter that names no base, as those of other libraries, is tried on a base that offers `exercise`.

        Raises:
            SiteError: sites that the base does not have, or whose modules it never calls.
            FormatError: tensors that do not fit.
        """
        from graft.studio.config import from_dict

        method = from_dict(cls, card.config, "adapter.json")
        model = base if isinstance(base, nn.Module) else base.modules
        plan, tensors = _placed(method, model, tensors, card)
        handle = loaded(method.attach_trained(model, plan, tensors), tensors)
        if not card.base_hash and hasattr(base, "exercise"):
            try:
                _check_called(handle, base)
            except BaseException:
                handle.detach()
                raise
        return handle

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes the adapter for another library.

        Raises:
            InputError: a format in which this method is not written.
        """
        raise InputError(f"format {format!r}", f"{cls.__name__} is not written in it", "use native")


def _placed(
    method: SiteMethod, model: Model, tensors: Mapping[str, Tensor], card: Card
) -> tuple[Plan, Mapping[str, Tensor]]:
    """The sites and tensors of an adapter by the names that the model has.

    Files of other libraries may name no site, if there is only one; and they may say ``text_model``, which transformers
    5.6 took out of CLIP's text encoder, or leave out the name that a base's only part has here.
    """
    if not card.sites:
        plan = method.plan(model)
        if len(plan) != 1:
            reason = f"its file names no place, and the model has {len(plan)}"
            raise SiteError(f"a {card.method}", reason, "attach it to one part of the model")
        return plan, {f"{plan.sites[0].key}.{name}": tensor for name, tensor in tensors.items()}
    plan, modules = Plan.from_list(card.sites), named_modules(model)
    alone = f"{next(iter(model))}." if isinstance(model, Mapping) and len(model) == 1 else ""
    missing = [site.name for site in plan if site.name not in modules]
    others = [(name, name.replace("text_encoder.text_model.", "text_encoder.", 1)) for name in missing]
    others += [(name, f"{alone}{name}") for name in missing]
    short = {name: other for name, other in others if other in modules}
    if not short:
        return plan, tensors
    sites = tuple(replace(site, name=short.get(site.name, site.name)) for site in plan)
    keys = {old.key: new.key for old, new in zip(plan, sites, strict=True)}
    parts = {name: name.rpartition(".") for name in tensors}
    return Plan(sites), {f"{keys.get(key, key)}.{end}": tensors[name] for name, (key, _, end) in parts.items()}


def _check_called(handle: Handle, base: Any) -> None:
    if dead := handle.bypassed(base.exercise):
        reason = f"{len(dead)} of {len(handle.plan)} sites are never called by {base.name}: nothing would act there"
        raise SiteError(", ".join(dead), reason, "use the base that the adapter was made for")


def check(method: Any, **allowed: tuple[bool, str]) -> None:
    """Checks settings by name: whether each holds, and what is expected if not.

    Raises:
        InputError: naming the setting, its value and what is expected.
    """
    for name, (holds, expected) in allowed.items():
        if not holds:
            raise InputError(f"{name} {getattr(method, name)}", f"must be {expected}", f"change {name}")
