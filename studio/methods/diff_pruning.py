"""Diff pruning: every weight gets a change and a gate, a penalty closes the gates, and the largest changes are kept.

Demi Guo, Alexander Rush, Yoon Kim: Parameter-Efficient Transfer Learning with Diff Pruning, 2021, arXiv:2012.07463.

    W <- W + z * w,    z = clip(lower + (upper - lower) sigmoid(alpha + log(u / (1 - u))), 0, 1),  u uniform in (0, 1)

and the loss gets ``sparsity`` times the expected number of open gates, the sum of sigmoid(alpha - log(-lower / upper)).
``structured`` multiplies z by a gate of the same form for the whole matrix or bias. The change w starts at zero, the
gates' alpha at 5, almost open: two numbers for each weight and bias, and one for each site. Three steps, as the paper:

    1. train w and the gates, with `Handle.penalty` in the loss and the gates at a high rate of their own (`groups`);
    2. `prune`: of z * w the largest ``density`` of all sites together stay, and only they;
    3. train these further, without gates and penalty.

An adapter file of step 3 holds the changes and their places. The layers use the changed weight itself, so a batch has
one adapter. Differs from the authors' code: outside training and when pruning, the gates are not drawn but at u = 1/2;
step 3 starts from z * w; token tables and heads are left out. As there, the penalty of the matrices' gates is added to
that of the weights', and gates have no temperature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log, prod
from typing import Any

import torch
from torch import Tensor, nn

from graft.studio.errors import InputError
from graft.studio.method import SiteMethod, check
from graft.studio.methods.fish_mask import ChangeSlot, MaskedSlot, attach_at, largest, places_in
from graft.studio.sites import Model, Plan, Site, channel_dim, plan_parameters
from graft.studio.slot import Slot
from graft.studio.slots import Handle


@dataclass(frozen=True)
class DiffPruning(SiteMethod):
    """A change of every weight, pruned to the few that count.

    Example:
        >>> method = DiffPruning(density=0.005)
        >>> handle = method.attach(model.requires_grad_(False))
        >>> optimizer = torch.optim.AdamW(method.groups(handle), lr=1e-5)  # step 1; add handle.penalty() to the loss
        >>> handle = method.prune(handle, model)
        >>> optimizer = torch.optim.AdamW(handle.bank.parameters(), lr=5e-5)  # step 3
    """

    kinds = ("linear", "mha", "conv", "norm", "bias")
    when = "a small file whose few places the training itself finds; it needs more memory than full training"

    density: float = 0.005
    """Share of the weights that `prune` keeps, above 0 and at most 1."""
    sparsity: float = 1.25e-7
    """Weight of the expected number of open gates in the loss; 0 is full training, then pruned by magnitude."""
    structured: bool = True
    """A further gate for each matrix and bias."""
    alpha: float = 5.0
    """Where the gates start; at 0 half of them would be open."""
    lower: float = -1.5
    """Where the stretched gate begins, below 0: the further, the more are closed exactly."""
    upper: float = 1.5
    """Where it ends, above 1: the further, the more are open exactly."""
    gate_rate: float = 0.1
    """Learning rate of the gates in `groups`."""
    targets: str | tuple[str, ...] = "everything"
    """Layers: everything (but heads), norm, all, all-linear, roles (o up gate down), or patterns of paths."""
    towers: tuple[str, ...] | None = None
    """Parts of the model to stay in, such as text, vision, unet; all when not given."""

    def __post_init__(self) -> None:
        check(
            self,
            density=(0 < self.density <= 1, "above 0 and at most 1"),
            sparsity=(self.sparsity >= 0, "0 or more"),
            lower=(self.lower < 0, "below 0"),
            upper=(self.upper > 1, "above 1"),
            gate_rate=(self.gate_rate > 0, "above 0"),
        )

    def sites(self, model: Model) -> Plan:
        """Returns the weights and biases of the layers."""
        return plan_parameters(model, self.targets, self.kinds, self.towers)

    def count(self, site: Site) -> int:
        """Returns a change and a gate for each number, and the site's own gate."""
        return 2 * prod(site.covered) + self.structured

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the gated change of a weight or a bias."""
        return GatedSlot(site, slots, self, channel_dim(module))

    def groups(self, handle: Handle) -> list[dict[str, Any]]:
        """Returns the parameters for an optimiser: changes at its own rate, gates at ``gate_rate`` without decay."""
        slots = handle.slots_of(GatedSlot)
        gates = [gate for slot in slots for gate in slot.gates()]
        return [{"params": [slot.w for slot in slots]}, {"params": gates, "lr": self.gate_rate, "weight_decay": 0.0}]

    def penalty(self, handle: Handle) -> Tensor | None:
        """Returns the weighted, expected number of open gates; None once pruned."""
        shift = log(-self.lower / self.upper)
        gates = [gate for slot in handle.slots_of(GatedSlot) for gate in slot.gates()]
        return self.sparsity * torch.stack([(gate - shift).sigmoid().sum() for gate in gates]).sum() if gates else None

    @torch.no_grad()
    def prune(self, handle: Handle, model: Model) -> Handle:
        """Keeps the largest changes and detaches the rest.

        Args:
            handle: what `attach` gave and was trained, with one slot; it is detached.
            model: what it is attached to.

        Returns:
            The handle of the changes that stay; they start as they were.

        Raises:
            InputError: several slots, or an adapter that is pruned already.
        """
        gated = handle.slots_of(GatedSlot)
        if not gated or handle.slots > 1:
            given = f"{handle.slots} slots" if gated else "a pruned adapter"
            raise InputError(given, "prune wants what attach() gave, with one slot", "attach one for each adapter")
        changes = {slot.site.key: (slot.gate(0, drawn=False) * slot.w[0]).flatten() for slot in gated}
        places = largest({key: change.abs() for key, change in changes.items()}, self.density)
        handle.detach()
        pruned = attach_at(model, handle.plan, places)
        for slot in pruned.slots_of(MaskedSlot):
            slot.D[0].copy_(changes[slot.site.key][slot.places[0]])
        pruned.rule = self
        return pruned

    def attach_trained(self, model: Model, plan: Plan, tensors: Mapping[str, Tensor]) -> Handle:
        """Attaches at the places of a pruned adapter, or gated changes for one that is not."""
        places = places_in(tensors)
        return attach_at(model, plan, places) if places else super().attach_trained(model, plan, tensors)


class GatedSlot(ChangeSlot):
    """A change of each number of a parameter, behind gates."""

    def __init__(self, site: Site, slots: int, method: DiffPruning, dim: int):
        """Makes a change of zero behind gates that are almost open."""
        super().__init__(site, slots, dim)
        self.lower, self.upper, self.start = method.lower, method.upper, method.alpha
        self.w = nn.Parameter(torch.empty(slots, *site.covered))
        self.alpha = nn.Parameter(torch.empty(slots, *site.covered))
        self.group = nn.Parameter(torch.empty(slots)) if method.structured else None
        for slot in range(slots):
            self.reset(slot)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Sets the change to zero and opens the gates."""
        self.w[slot].zero_()
        for gate in self.gates():
            gate[slot].fill_(self.start)

    def gates(self) -> list[nn.Parameter]:
        """Returns the alpha of the numbers, and of the site if it has one."""
        return [self.alpha] if self.group is None else [self.alpha, self.group]

    def gate(self, slot: int, drawn: bool) -> Tensor:
        """Returns z of a slot in the shape of what the site covers, drawn or at its middle."""
        z = self.alpha.new_ones(())
        for gate in self.gates():
            alpha = gate[slot]
            if drawn:
                alpha = alpha + torch.rand_like(alpha).clamp(1e-4, 1 - 1e-4).logit()
            z = z * (self.lower + (self.upper - self.lower) * alpha.sigmoid()).clamp(0, 1)
        return z

    def delta(self, slot: int) -> Tensor:
        """Returns z w; the gates are drawn in training, but not for a merge."""
        return self.scale[slot] * self.gate(slot, self.training and self.merged is None) * self.w[slot]
