"""SSF and BitFit on a timm model, with a new classifier. The methods themselves are in `graft.studio.methods`.

SSF puts a scale and a shift behind every operation (ViT-B/16: 205,824), BitFit trains all biases (ViT-B/16: 102,912).
Neither can act where a model reads a layer's parameters without calling it, as BEiT and EVA do with `qkv` when q and v
have biases of their own: these layers are left out, and said to be.

Differs from SSF's authors by weight decay on nothing, as theirs comes to; and by the learning rate, which they choose
for each task between 5e-4 and 1e-2.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

from graft.studio.errors import SiteError
from graft.studio.methods.bitfit import BitFit
from graft.studio.methods.ssf import SSF
from graft.studio.sites import Plan
from graft.vision.base import classifiers
from graft.vision.method import VisionMethod, uncalled

log = logging.getLogger(__name__)


def called_only(plan: Plan, model: Any) -> Plan:
    """Returns the plan without classifiers, which are replaced, and without sites whose module is never called.

    Raises:
        SiteError: nothing is left.
    """
    own = classifiers(model)
    unused = uncalled(model, {site.name for site in plan} - set(own))
    kept = tuple(site for site in plan if site.name not in unused and site.name not in own)
    if not kept:
        raise SiteError(", ".join(sorted(unused)), "the model reads these layers without calling them", "Use lora")
    if unused:
        log.warning("left out, since the model reads them without a call: %s", ", ".join(sorted(unused)))
    return Plan(kept)


@dataclass(frozen=True)
class VisionSSF(VisionMethod, SSF):
    """Trained scale and shift after every operation of a timm model."""

    default_learning_rate: ClassVar[float] = 5e-3
    default_weight_decay: ClassVar[float] = 0.0

    def sites(self, model: Any) -> Plan:
        """Returns the layers that the targets name and the model calls."""
        return called_only(super().sites(model), model)


@dataclass(frozen=True)
class VisionBitFit(VisionMethod, BitFit):
    """Trained biases of a timm model."""

    default_learning_rate: ClassVar[float] = 5e-3

    def sites(self, model: Any) -> Plan:
        """Returns the biases that the targets name, of layers that the model calls."""
        return called_only(super().sites(model), model)
