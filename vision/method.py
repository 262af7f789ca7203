"""What all methods of this domain share: sites on a timm model, a new classifier beside them, defaults for training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graft.studio.errors import BaseMismatchError, FormatError, InputError
from graft.studio.method import loaded
from graft.studio.sites import Plan
from graft.vision.base import picture_side, sample_input
from graft.vision.head import Adapted, attach_head

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter, Card


@dataclass(frozen=True)
class VisionMethod:
    """Mixin of the methods. A method on sites has `plan` and `attach`; the linear probe has neither."""

    head_start: Literal["random", "probe"] = field(default="random", kw_only=True)
    """Where the classifier starts in a job: probe solves a linear probe of the training pictures first (Kumar et al.
    2022, arXiv:2202.10054), which no method's own paper does."""

    default_learning_rate: ClassVar[float] = 1e-3
    """Peak of AdamW."""
    train_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 32, "schedule": "cosine", "warmup_steps": 10}
    """What a job's `[train]` says where the user does not."""
    default_weight_decay: ClassVar[float] = 1e-4
    """Of AdamW, on matrices; vectors (biases, scales) are never pulled to zero."""
    head_lr_scale: ClassVar[float] = 1.0
    """Learning rate of the classifier, as a multiple."""
    frozen_features: ClassVar[bool] = False
    """Whether the features never change, so that they are computed once."""
    exports: ClassVar[tuple[str, ...]] = ("timm",)
    """Formats beside the native one."""

    def on(self, model: nn.Module, classes: tuple[str, ...], slots: int = 1, plan: Plan | None = None) -> Adapted:
        """Attaches the method and a classifier for new classes.

        Raises:
            SiteError: the model lacks the sites that the method needs.
            InputError: the model's classifier cannot be replaced.
        """
        attach: Any = getattr(self, "attach", None)
        method = attach(model, slots=slots, plan=plan) if attach is not None else None
        try:
            return Adapted(method, attach_head(model, classes, slots))
        except BaseException:
            if method is not None:
                method.detach()
            raise

    @classmethod
    def attach_to(cls, base: Any, tensors: Mapping[str, Tensor], card: Card) -> Any:
        """Attaches a trained adapter to its base, or to the plain timm model, ready for inference.

        Raises:
            FormatError: the card names no classes, or tensors do not fit.
            BaseMismatchError: the model was built for pictures of another size.
        """
        from graft.studio.config import from_dict

        model = base if isinstance(base, nn.Module) else base.model
        classes = tuple(card.details.get("classes", ()))
        if not classes:
            raise FormatError("adapter.json", "it names no classes", "Export the adapter again")
        side = int(card.details.get("side", picture_side(model)))
        if side != picture_side(model):
            given = f"adapter for pictures of {side} pixels"
            raise BaseMismatchError(given, f"the model takes {picture_side(model)}", f"Build it with img_size={side}")
        return loaded(
            from_dict(cls, card.config, "adapter.json").on(model, classes, plan=Plan.from_list(card.sites)), tensors
        )

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes a timm folder with the adapter in the base's weights and the new classifier in its place.

        Raises:
            InputError: the method is no change of the weights.
        """
        from graft.vision.base import load_base, save_base

        if format not in cls.exports:
            known = ", ".join(("native", *cls.exports))
            raise InputError(f"format {format!r}", f"{cls.__name__} is not written in it", f"Use {known}")
        base = load_base(adapter.card.base, "cpu")
        with adapter.attached(base) as handle:
            handle.merge()
            folder = save_base(base, folder)
        return [folder / "config.json", folder / "model.safetensors"]


@torch.no_grad()
def uncalled(model: nn.Module, names: set[str]) -> set[str]:
    """Returns those modules that a forward pass does not call, though it may read their weights.

    timm's BEiT and EVA with a bias on q and v only do so with `qkv`: an adapter on its output would be dead.
    """
    called: set[str] = set()
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(lambda module, args, name=name: called.add(name))  # type: ignore[misc]
        for name in names
    ]
    try:
        model(sample_input(model))
    finally:
        for hook in hooks:
            hook.remove()
    return names - called
