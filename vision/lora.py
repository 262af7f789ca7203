"""LoRA on a timm model: thin trained factors beside its linear layers. The method is `graft.studio.methods.lora`.

On ViTs the default adapts q, k, v and the output projection of every attention. Where a model reads the weight of its
packed projection without calling it (BEiT, EVA with separate biases), the weight itself is changed, which is the same
function; it was found by a forward pass, not by the model's name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from graft.studio.errors import InputError
from graft.studio.methods.lora import LoRA
from graft.studio.sites import Plan
from graft.studio.slots import Handle
from graft.vision.base import classifiers
from graft.vision.method import VisionMethod, uncalled


@dataclass(frozen=True)
class VisionLoRA(VisionMethod, LoRA):
    """LoRA on a timm model, with a new classifier.

    Example:
        >>> handle = VisionLoRA(rank=4).attach(timm_model)  # doctest: +SKIP
    """

    default_learning_rate: ClassVar[float] = 2e-3

    def plan(self, model: Any) -> Plan:
        """Returns the sites that `attach` will use, with their parameters; the classifier, which is replaced, is none.

        Raises:
            InputError: nothing but the classifier was named.
        """
        heads = classifiers(model)
        kept = tuple(site for site in super().plan(model) if site.name not in heads)
        if not kept:
            raise InputError(", ".join(heads), "the classifier is trained anyway", "Choose other method.targets")
        return Plan(kept, tuple(map(self.count, kept)))

    def attach(self, model: Any, slots: int = 1, plan: Plan | None = None) -> Handle:
        """Attaches in place; projections whose weight is read directly get weight mode.

        Raises:
            SiteError: targets that name nothing, or a plan of another model.
            InputError: dropout on a projection that has no input of its own.
        """
        plan = plan or self.plan(model)
        modules = dict(model.named_modules())
        direct = uncalled(model, {site.name for site in plan if isinstance(modules.get(site.name), nn.Module)})
        named = tuple(sorted({*self.weight_mode, *(name.replace(".", r"\.") for name in direct)}))
        return LoRA.attach(replace(self, weight_mode=named), model, slots, plan)
