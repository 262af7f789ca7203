"""O-LoRA: LoRA for one task after another, each in directions that the earlier ones left free.

Xiao Wang, Tianze Chen, Qiming Ge, Han Xia, Rong Bao, Rui Zheng, Qi Zhang, Tao Gui, Xuanjing Huang: Orthogonal Subspace
Learning for Language Model Continual Learning, 2023, arXiv:2310.14152.

    y = W x + b + s (sum over i < t of B_i A_i + B_t A_t) drop(x),    penalty = l1 sum_i |A_i A_t'| + l2 (|A_t| + |B_t|)

The earlier factors, frozen, act beside the new ones (A_t, B_t): rank * (in + out) parameters, as LoRA. l1 is
``orthogonality``, a sum of absolute values, l2 is ``shrink``, of Frobenius norms; both as in the authors' code. The
result holds all factors and needs no file of the earlier tasks: it merges, and is one LoRA of the ranks' sum to other
libraries. Which task an input belongs to need not be known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from graft.kernels.lora_linear import Term
from graft.studio.errors import InputError
from graft.studio.method import check
from graft.studio.methods.lora import LoRA, LowRankSlot
from graft.studio.sites import Model, Plan, Site
from graft.studio.slot import Slot
from graft.studio.slots import Handle

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter


@dataclass(frozen=True)
class OrthogonalLoRA(LoRA):
    """LoRA orthogonal to earlier ones, which stay in it."""

    kinds = ("linear", "packed", "mha")
    when = "tasks that come one after another, without forgetting the first"

    earlier: tuple[str, ...] = ()
    """Runs or adapters of the tasks before, oldest first; of the last one alone if that was trained so too."""
    orthogonality: float = 0.5
    """Weight of the overlap with their first factors."""
    shrink: float = 0.0
    """Weight of the new factors' length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self,
            orthogonality=(self.orthogonality >= 0, "0 or more"),
            shrink=(self.shrink >= 0, "0 or more"),
        )

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the new factors of a site, with room for the earlier ones."""
        return LaterSlot(site, slots, self, module)

    def attach(self, model: Model, slots: int = 1, plan: Plan | None = None) -> Handle:
        """Attaches as every method, with the adapters of ``earlier`` in every slot.

        Raises:
            InputError: one of them is no LoRA, or acts where this one has no site.
        """
        past = [factors(path) for path in self.earlier]
        handle = super().attach(model, slots, plan)
        try:
            here = {slot.site.key: slot for slot in handle.slots_of(LaterSlot)}
            for path, found in zip(self.earlier, past, strict=True):
                if missing := sorted(set(found) - set(here)):
                    reason = f"it acts on {missing[0]}, where this method has no site"
                    raise InputError(f"earlier {path}", reason, "take the targets of the first task")
                for key, (down, up) in found.items():
                    here[key].remember(down, up / self.scaling)
        except BaseException:
            handle.detach()
            raise
        return handle

    def attach_trained(self, model: Model, plan: Plan, tensors: Mapping[str, Tensor]) -> Handle:
        """Attaches with room for the earlier factors that the file holds."""
        handle = replace(self, earlier=()).attach(model, plan=plan)
        for slot in handle.slots_of(LaterSlot):
            down, up = (tensors.get(f"{slot.site.key}.{name}") for name in slot.saved)
            if down is not None and up is not None:
                slot.remember(down, up)
        return handle

    def penalty(self, handle: Handle) -> Tensor | None:
        """Returns the overlap with the earlier factors and the length of the new ones, weighted."""
        slots = handle.slots_of(LaterSlot)
        total = self.orthogonality * torch.stack([slot.overlap() for slot in slots]).sum()
        if self.shrink:
            total = total + self.shrink * torch.stack([slot.A.norm() + slot.B.norm() for slot in slots]).sum()
        return total

    @classmethod
    def as_lora(cls, adapter: Adapter) -> Adapter:
        """Returns all factors side by side, with the scale that they have."""
        tensors = dict(adapter.tensors)
        for name in [name for name in tensors if name.endswith(".A_past")]:
            key = name.removesuffix("A_past")
            tensors[f"{key}A"] = torch.cat([tensors.pop(name), tensors[f"{key}A"]])
            tensors[f"{key}B"] = torch.cat([tensors.pop(f"{key}B_past"), tensors[f"{key}B"]], 1)
        ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith(".A")}
        most, config = max(ranks), adapter.card.config
        for name, tensor in tensors.items():  # layers that earlier tasks left alone have fewer
            short = most - tensor.shape[name.endswith(".B")]
            pad = (0, short) if name.endswith(".B") else (0, 0, 0, short)
            tensors[name] = nn.functional.pad(tensor, pad)
        plain = {**config, "rank": most, "alpha": _scaling(config) * most, "rslora": False}
        plain = {key: value for key, value in plain.items() if key not in ("earlier", "orthogonality", "shrink")}
        return replace(adapter, tensors=tensors, card=replace(adapter.card, method="lora", config=plain))


def factors(path: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns A and s B of every site of an adapter, or of a run's.

    Raises:
        InputError: its method is no LoRA.
    """
    from graft.studio import registry
    from graft.studio.adapter import load_adapter

    folder = Path(path) / "result" if (Path(path) / "result").is_dir() else Path(path)
    adapter = load_adapter(folder)
    card = adapter.card
    cls: Any = registry.method_class(card.domain, card.method) if card.domain else registry.site_method(card.method)
    if not issubclass(cls, LoRA):
        raise InputError(f"earlier {path}", f"a {card.method} is no LoRA", "give adapters of lora or o_lora")
    plain = cls.as_lora(adapter)
    scaling = _scaling(plain.card.config)
    keys = [name.removesuffix(".A") for name in plain.tensors if name.endswith(".A")]
    return {key: (plain.tensors[f"{key}.A"], scaling * plain.tensors[f"{key}.B"]) for key in keys}


def _scaling(config: Mapping[str, Any]) -> float:
    return LoRA(config["rank"], config["alpha"], rslora=config.get("rslora", False)).scaling


class LaterSlot(LowRankSlot):
    """New factors beside frozen ones of earlier tasks."""

    saved: ClassVar[tuple[str, ...]] = ("A_past", "B_past")
    rank_dims: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1, "A_past": 0, "B_past": 1}
    A_past: Tensor
    B_past: Tensor

    def extend(self, method: Any, module: nn.Module) -> None:
        """Adds the earlier factors, none at first."""
        super().extend(method, module)
        down, up = self.shapes(0)
        self.register_buffer("A_past", torch.empty(self.slots, *down))
        self.register_buffer("B_past", torch.empty(self.slots, *up))

    def remember(self, down: Tensor, up: Tensor) -> None:
        """Puts a task's factors (r, i) and (o, r) behind those that are there, in every slot."""
        wide = [x.to(self.A_past).expand(self.slots, -1, -1) for x in (down, up)]
        self.A_past = torch.cat([self.A_past, wide[0]], 1)
        self.B_past = torch.cat([self.B_past, wide[1]], 2)

    def overlap(self) -> Tensor:
        """Returns the sum of |A_past A'|."""
        return (self.A_past @ self.A.mT).abs().sum()

    def fused(self, up: Tensor) -> Term:
        """Returns all factors as one term."""
        term = super().fused(up)
        return term._replace(down=torch.cat([self.A_past, self.A], 1), up=torch.cat([self.B_past, up], 2))

    def delta(self, slot: int) -> Tensor:
        """Returns s times the sum of all products."""
        return super().delta(slot) + self.scale[slot] * self.B_past[slot] @ self.A_past[slot]
