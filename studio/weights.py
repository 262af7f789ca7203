"""Weights of a model that are trained themselves, with the way back: what `graft.studio.slots` is for slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from graft.studio.errors import FormatError, InputError, SiteError
from graft.studio.sites import Plan


class WeightsHandle:
    """Trained weights of a model, with the way back; has what `graft.studio.slots.Handle` has."""

    stacked = False
    """Whether tensors have a first dimension for the slot."""

    def __init__(self, model: nn.Module, plan: Plan):
        own = dict(model.named_parameters())
        for site in plan:
            if site.name not in own or tuple(own[site.name].shape) != site.shape:
                raise SiteError(site.name, f"the model has no weight of shape {site.shape} there", "Use its own base")
        self.plan, self.slots, self.bank = plan, 1, nn.Module()
        self._weights = {site.name: own[site.name] for site in plan}
        self._before = {name: weight.detach().clone() for name, weight in self._weights.items()}
        for name, weight in self._weights.items():
            weight.requires_grad_(True)
            _place(self.bank, name, weight)

    def tensors(self, slot: int = 0) -> dict[str, Tensor]:
        """Returns a copy of the trained weights by name."""
        return {name: weight.detach().float().clone() for name, weight in self.bank.named_parameters()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], slot: int = 0) -> None:
        """Puts weights in.

        Raises:
            FormatError: a name missing or unknown, or a shape that does not fit.
        """
        for name in sorted(set(tensors) ^ set(self._weights)):
            reason = "missing from the adapter" if name in self._weights else "not part of the attached method"
            raise FormatError(name, reason, "Attach with its own card")
        for name, tensor in tensors.items():
            if tensor.shape != self._weights[name].shape:
                raise FormatError(name, f"shape {tuple(tensor.shape)}", f"Expected {tuple(self._weights[name].shape)}")
            self._weights[name].copy_(tensor)

    @torch.no_grad()
    def reset(self, slot: int, seed: int) -> None:
        """Starts from the base's weights again."""
        for name, weight in self._weights.items():
            weight.copy_(self._before[name])

    def route(self, rows: Tensor | None) -> None:
        """Takes no rows: there is one set of weights.

        Raises:
            InputError: rows were given.
        """
        if rows is not None:
            raise InputError("route", "with full fine-tuning rows cannot differ", "Use route(None)")

    @torch.no_grad()
    def scale(self, slot: int, value: float) -> None:
        """Refuses: the weights are what they are.

        Raises:
            InputError: always, but for a strength of 1.
        """
        if value != 1:
            raise InputError(f"scale {value}", "full fine-tuning has no strength", "Use LoRA")

    def probe(self, run: Callable[[], Tensor]) -> None:
        """Runs the model once and checks that every weight gets a gradient.

        Raises:
            SiteError: naming those that do not.
        """
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            out = run()
            loss = out if out.dim() == 0 else out.float().square().mean()
            gradients = torch.autograd.grad(loss, list(self._weights.values()), allow_unused=True)
        dead = [name for name, grad in zip(self._weights, gradients, strict=True) if grad is None]
        if len(dead) == len(self._weights):
            raise SiteError(f"{len(dead)} weights", "none takes part in the output", "Use another model")

    def merge(self, slot: int = 0) -> None:
        """Does nothing: the weights are in the model already."""

    def unmerge(self) -> None:
        """Does nothing: see `merge`."""

    @torch.no_grad()
    def detach(self) -> None:
        """Restores the weights bit for bit. The bank keeps the trained ones. A second time does nothing."""
        for name, weight in self._weights.items():
            _place(self.bank, name, nn.Parameter(weight.detach().clone(), weight.requires_grad))
            weight.requires_grad_(False)
            weight.grad = None
            weight.copy_(self._before[name])
        self._weights, self._before = {}, {}


def _place(root: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Registers a parameter in a tree of the names' parts."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    root.register_parameter(last, weight)
