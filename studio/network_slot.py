"""A slot that is a whole network: each tensor of a module, stacked over slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from graft.studio.sites import Site
from graft.studio.slot import Slot


class NetworkSlot(Slot):
    """Parameters of a network, one for each slot; `run` calls it with those of the rows.

    Args:
        site: where it acts.
        slots: how many there are.
        make: makes the network with the values that training starts from.
    """

    mergeable = False

    def __init__(self, site: Site, slots: int, make: Callable[[], nn.Module]):
        """Draws the initial values of every slot."""
        super().__init__(site, slots)
        self.make = make
        with torch.device("meta"):
            network = make()
        self.network: tuple[Any] = (network,)  # no child: what it computes with are the stacks
        self.names = {name: name.replace(".", "_") for name, _ in network.named_parameters()}
        for name, parameter in network.named_parameters():
            stack = torch.empty(slots, *parameter.shape, dtype=parameter.dtype)
            self.register_parameter(self.names[name], nn.Parameter(stack))
        for slot in range(slots):
            self.reset(slot)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws a network anew."""
        with torch.device("cpu"):
            fresh = dict(self.make().named_parameters())
        for name, flat in self.names.items():
            self.get_parameter(flat)[slot].copy_(fresh[name])

    def run(self, x: Tensor, *rest: Any, owner: Tensor | None = None) -> Tensor:
        """Returns what the rows' networks make of x (b, ...), each with its own; ``rest`` is the same for all.

        Rows without a slot have that of slot 0: the caller leaves it out. ``owner`` (m,) says to which row of the
        batch each row of ``x`` belongs, where they are not the same.
        """
        if self.route is None:
            return self.call(0, x, *rest)
        route = self.route.clamp(min=0)
        route = route if owner is None else route[owner]
        used = [(slot, (route == slot).nonzero()[:, 0]) for slot in route.unique().tolist()]
        parts = [(self.call(slot, x[rows], *rest), rows) for slot, rows in used]
        return torch.cat([y for y, _ in parts])[torch.cat([rows for _, rows in parts]).argsort()]

    def call(self, slot: int, x: Tensor, *rest: Any) -> Tensor:
        """Returns what one slot's network makes of x."""
        self.network[0].train(self.training)
        own = {name: self.get_parameter(flat)[slot].to(x.dtype) for name, flat in self.names.items()}
        y: Tensor = functional_call(self.network[0], own, (x, *rest))
        return y
