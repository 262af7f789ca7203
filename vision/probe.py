"""Linear probe: nothing of the model changes; a linear classifier learns on its features.

The baseline that every method has to beat. The features of all pictures are computed once, so a step is one small
matrix product (with augmentation they are computed anew). Starts as He et al., Masked Autoencoders Are Scalable Vision
Learners, 2021, arXiv:2111.06377, do; differs by AdamW in place of LARS, and by having no batch norm before the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graft.vision.method import VisionMethod


@dataclass(frozen=True)
class LinearProbe(VisionMethod):
    """A linear classifier on frozen features."""

    default_learning_rate: ClassVar[float] = 1e-2
    frozen_features: ClassVar[bool] = True
