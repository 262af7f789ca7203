"""The classifier for new classes, trained beside every method and saved with it; the model's own comes back on detach.

A slot on the model's classifier answers in its place. So `model(x)` gives logits of the new classes as long as an
adapter is attached, whatever the model's own classes were, and rows of a batch may use different adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.studio.errors import InputError
from graft.studio.sites import Plan, Site
from graft.studio.slots import Handle, Slot, attach
from graft.vision.base import classifiers, feature_width


class HeadSlot(Slot):
    """A linear classifier: logits = features weight' + bias, (b, d) -> (b, c).

    Starts at weight ~ truncated normal of deviation 0.01 and bias 0 (He et al., Masked Autoencoders Are Scalable Vision
    Learners, 2021, arXiv:2111.06377): near 1/c for every class, and never a gradient of zero for what lies below.
    """

    mergeable = False

    def __init__(self, site: Site, slots: int, width: int, classes: Sequence[str]):
        """Makes the classifiers of all slots for features of ``width``."""
        super().__init__(site, slots)
        self.classes = tuple(classes)
        self.weight = nn.Parameter(torch.empty(slots, len(classes), width))
        self.bias = nn.Parameter(torch.empty(slots, len(classes)))
        for slot in range(slots):
            self.reset(slot)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws the weight on the CPU (the same on every device) and clears the bias."""
        first = torch.empty(self.weight.shape[1:])
        nn.init.trunc_normal_(first, std=0.01)
        self.weight[slot].copy_(first)
        self.bias[slot].zero_()

    def logits(self, x: Tensor) -> Tensor:
        """Returns the logits of features (b, d); rows without a slot get zeros."""
        x = x.to(self.weight.dtype) if not torch.is_autocast_enabled(x.device.type) else x
        if self.route is None:
            return nn.functional.linear(x, self.weight[0], self.bias[0])
        slot = self.route.clamp(min=0)
        logits = (self.weight[slot] @ x.unsqueeze(-1)).squeeze(-1) + self.bias[slot]
        return logits * (self.route >= 0).to(logits.dtype)[:, None]

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the logits; the model's own classifier is not called."""
        return self.logits(args[0])


def attach_head(model: nn.Module, classes: Sequence[str], slots: int = 1) -> Handle:
    """Puts a new classifier in the place of a timm model's own, or both of a distilled one.

    Raises:
        InputError: the model has no classifier that can be replaced, or an adapter has already done so.
    """
    heads = classifiers(model)
    if any(isinstance(slot, HeadSlot) for head in heads.values() for slot in getattr(head, "graft_slots", ())):
        raise InputError(type(model).__name__, "another adapter's classifier is attached", "Detach that adapter first")
    widths = {name: feature_width(model, head) for name, head in heads.items()}
    plan = Plan(
        tuple(Site(name, "block", (len(classes), width), None, "vision", "head") for name, width in widths.items())
    )
    device = next(model.parameters()).device
    return attach(model, plan, lambda site: HeadSlot(site, slots, widths[site.name], classes).to(device))


def new_classifier(model: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns the attached classifier as entries of the model's state dict, and its classes; nothing if there is none.

    Raises:
        InputError: something is attached to the model that is no part of its weights.
    """
    tensors: dict[str, Tensor] = {}
    classes: tuple[str, ...] = ()
    for name, module in model.named_modules():
        for slot in getattr(module, "graft_slots", ()):
            if isinstance(slot, HeadSlot):
                tensors[f"{name}.weight"] = slot.weight[0].detach().cpu().contiguous()
                tensors[f"{name}.bias"] = slot.bias[0].detach().cpu().contiguous()
                classes = slot.classes
            elif slot.merged is None:
                raise InputError(name, f"a {type(slot).__name__} is attached and not merged", "Merge it first")
    return tensors, classes


class Adapted:
    """A method and a classifier on one model, as one handle.

    Args:
        method: handle of the method; None for a linear probe, which has only the classifier.
        head: handle of the classifier.
    """

    def __init__(self, method: Any, head: Handle):
        self.method, self.head = method, head
        self.bank = nn.ModuleDict({"head": head.bank} if method is None else {"method": method.bank, "head": head.bank})
        self.slots = head.slots

    @property
    def parts(self) -> list[Any]:
        """The handles."""
        return [self.head] if self.method is None else [self.method, self.head]

    @property
    def plan(self) -> Plan:
        """The method's sites."""
        return Plan(()) if self.method is None else self.method.plan

    def tensors(self, slot: int = 0) -> dict[str, Tensor]:
        """Returns a copy of one slot's tensors, named ``<site>.<tensor>``."""
        return {name: tensor for part in self.parts for name, tensor in part.tensors(slot).items()}

    def load(self, tensors: Mapping[str, Tensor], slot: int = 0) -> None:
        """Puts tensors into a slot.

        Raises:
            FormatError: a name missing or unknown, or a shape that does not fit.
        """
        own = set(self.head.tensors(slot))
        self.head.load({name: tensor for name, tensor in tensors.items() if name in own}, slot)
        rest = {name: tensor for name, tensor in tensors.items() if name not in own}
        if self.method is not None:
            self.method.load(rest, slot)

    def reset(self, slot: int, seed: int) -> None:
        """Starts a slot anew from a seed."""
        for part in self.parts:
            part.reset(slot, seed)

    def route(self, rows: Tensor | None) -> None:
        """Sets the adapter of each row of the batch; None sends every row to slot 0."""
        for part in self.parts:
            part.route(rows)

    def scale(self, slot: int, value: float) -> None:
        """Sets the strength of the method in a slot: 1 as trained, 0 off. The classifier stays."""
        if self.method is not None:
            self.method.scale(slot, value)

    def probe(self, run: Callable[[], Tensor]) -> None:
        """Checks that every site takes part.

        Raises:
            SiteError: names the sites that do not.
        """
        for part in self.parts:
            part.probe(run)

    def merge(self, slot: int = 0) -> None:
        """Adds the method into the base's weights; the classifier goes with them into `save_base`.

        Raises:
            SiteError: what the method learns is no change of the weights.
        """
        if self.method is not None:
            self.method.merge(slot)

    def unmerge(self) -> None:
        """Restores the base weights bit for bit."""
        if self.method is not None:
            self.method.unmerge()

    def detach(self) -> None:
        """Takes both off: the model is what it was."""
        for part in self.parts:
            part.detach()
