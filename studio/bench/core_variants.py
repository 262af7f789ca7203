"""A model with our adapters and with peft's, holding the same factors, and how far their results are apart."""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graft.studio.bench.core_models import Subject
from graft.studio.bench.measure import saved_bytes
from graft.studio.errors import InputError
from graft.studio.methods.dora import DoRA
from graft.studio.methods.lora import LoRA
from graft.studio.sites import Plan
from graft.studio.slots import Handle

RANK, ALPHA, ADAPTERS, DROPOUT = 8, 16, 8, 0.1

Factors = dict[str, Tensor]
"""An adapter as ``<site>.<tensor>``, as `Handle.tensors` gives it."""


@dataclass
class Variant:
    """One way to take the step."""

    model: nn.Module
    """Called on the inputs."""
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    """Their gradients are part of the step."""
    handle: Handle | None = None
    """Ours, when it is ours."""
    inside: bool = False
    """Whether the gradient of the first input is part of the step; it is without parameters."""

    def step(self, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the output and the gradients by name, "input" that of the first input."""
        wanted: dict[str, Tensor] = {**self.parameters}
        first, *others = inputs
        if self.inside or not wanted:
            wanted["input"] = first = first.detach().requires_grad_()
        y = self.model(first, *others)
        gradients = torch.autograd.grad(y, list(wanted.values()), upstream)
        return y.detach(), dict(zip(wanted, gradients, strict=True))

    def saved(self, inputs: tuple[Tensor, ...]) -> int:
        """Returns the bytes that a forward pass keeps for the backward pass."""
        first, *others = inputs
        if self.inside or not self.parameters:
            first = first.detach().requires_grad_()
        own = [first, *others, *self.model.parameters(), *self.model.buffers(), *self.parameters.values()]
        own += [] if self.handle is None else list(self.handle.bank.buffers())
        return saved_bytes(lambda: self.model(first, *others), own)

    @torch.no_grad()
    def infer(self, inputs: tuple[Tensor, ...], **kwargs: Any) -> Tensor:
        """Returns the output alone."""
        y: Tensor = self.model(*inputs, **kwargs)
        return y


def ours(
    subject: Subject, method: LoRA, slots: int = 1, dtype: torch.dtype = torch.float32, plan: Plan | None = None
) -> Variant:
    """Returns a copy of the model with our adapters."""
    model = deepcopy(subject.model).to(dtype)
    handle = method.attach(model, slots, plan)
    return Variant(model, dict(handle.bank.named_parameters()), handle, subject.inside)


def theirs(subject: Subject, adapters: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> Variant:
    """Returns a copy of the model with peft's adapters, ``default``, ``1``, ``2`` ...

    Raises:
        InputError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError("bench core", "peft is not installed", "pip install 'graft-studio[dev]'") from error
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(subject.layers), **options)
    with warnings.catch_warnings():  # about dropout with DoRA, and the like
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(deepcopy(subject.model).to(dtype), config)  # type: ignore[arg-type]
        for name in names(adapters)[1:]:
            model.add_adapter(name, config)
    model.train("lora_dropout" in options)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Variant(model, parameters, None, subject.inside)


def names(adapters: int) -> list[str]:
    """Returns what peft's adapters are called."""
    return ["default", *map(str, range(1, adapters))]


def lora(subject: Subject, dropout: float = 0.0) -> LoRA:
    """Returns the method for the model's layers."""
    return LoRA(rank=RANK, alpha=ALPHA, dropout=dropout, targets=subject.layers)


def dora(subject: Subject) -> DoRA:
    """Returns the method for the model's layers."""
    return DoRA(rank=RANK, alpha=ALPHA, targets=subject.layers)


def draw(handle: Handle, seed: int) -> Factors:
    """Returns random factors, lengths (of DoRA) near those of the rows."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, tensor in handle.tensors().items():
        noise = torch.randn(tensor.shape, generator=generator)
        drawn[name] = tensor * (1 + 0.1 * noise) if name.endswith(".m") else noise * (0.02 if name[-1] == "B" else 0.05)
    return drawn


@torch.no_grad()
def load(variant: Variant, adapters: list[Factors]) -> None:
    """Gives our slots, or peft's adapters, their factors."""
    if variant.handle is not None:
        for slot, factors in enumerate(adapters):
            variant.handle.load(factors, slot)
        return
    for name, factors in zip(names(len(adapters)), adapters, strict=True):
        for key, parameter in variant.model.named_parameters():
            if ".lora_" in key and f".{name}." in key.partition(".lora_")[2]:
                parameter.copy_(factors[our_name(key)])


def our_name(key: str) -> str:
    """Returns the name of one of peft's parameters among ours."""
    site, _, end = key.removeprefix("base_model.model.").replace("base_layer.", "").partition(".lora_")
    return f"{site}.{'m' if end.startswith('magnitude') else end[0]}" if end else key


def apart(value: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, relative to the largest value."""
    return float((value.float() - expected.float()).abs().max() / expected.float().abs().max())


Step = tuple[Tensor, dict[str, Tensor]]
"""What `Variant.step` returns."""


def furthest(step: Step, expected: Step, leave: tuple[str, ...] = ()) -> dict[str, float]:
    """Returns how far outputs and gradients of a step are apart at most, but for gradients whose name ends so."""
    mine = {our_name(key): value for key, value in step[1].items()}
    gradients = {our_name(key): value for key, value in expected[1].items() if not our_name(key).endswith(leave)}
    # Ours are those of a stack of one slot.
    worst = max(apart(mine[key].view(value.shape), value) for key, value in gradients.items())
    return {"output": apart(step[0], expected[0]), "gradients": worst}


def differences(
    mine: Variant, peft: Variant, inputs: tuple[Tensor, ...], upstream: Tensor, leave: tuple[str, ...] = ()
) -> dict[str, float]:
    """Returns `furthest` of ours and peft's."""
    return furthest(mine.step(inputs, upstream), peft.step(inputs, upstream), leave)


def mixed_differences(
    mine: Variant, peft: Variant, inputs: tuple[Tensor, ...], upstream: Tensor, route: Tensor
) -> dict[str, float]:
    """Returns the same for a batch whose rows pick their adapter; peft, which cannot train one, takes them in turn."""
    model: Any = peft.model
    called = names(ADAPTERS)
    y, found = mine.step(inputs, upstream)
    output = apart(y, peft.infer(inputs, adapter_names=[called[slot] for slot in route.tolist()]))
    worst = 0.0
    for slot, name in enumerate(called):
        model.set_adapter(name)
        rows = route == slot
        wanted = {key: p for key, p in model.named_parameters() if p.requires_grad}
        _, gradients = Variant(model, wanted).step(tuple(x[rows] for x in inputs), upstream[rows])
        worst = max(worst, *(apart(found[our_name(key)][slot], value) for key, value in gradients.items()))
    model.set_adapter("default")
    return {"output": output, "gradients": worst}
