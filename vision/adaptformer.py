r"""AdaptFormer: a bottleneck beside the feed-forward part of every block, on the residual stream as it enters.

Shoufa Chen, Chongjian Ge, Zhan Tong, Jiangliu Wang, Yibing Song, Jue Wang, Ping Luo: AdaptFormer: Adapting Vision
Transformers for Scalable Visual Recognition, 2022, arXiv:2205.13535.

    y = x + MLP(LN(x)) + s Up(drop(ReLU(Down x + b))) + s c,    x: (n, D), Down: (r, D), Up: (D, r)

r is `bottleneck`, s is `scale`. x is what comes out of the attention, before the norm. Down starts uniform as a linear
layer's weight (Kaiming, a = sqrt 5), Up, b and c at zero, so y starts as it was. L (2 D r + r + D) parameters.

Differs from the authors' code: q, k and v stay packed; the classifier is a plain linear layer (theirs has a batch norm
before it, which their learning rate needs); AdamW in place of SGD. The branch is added behind the layer scale of models
that have one (DINOv2, DeiT-3, EVA), which would make it a thousandth. In post-norm blocks (Swin v2) x is the input of
the feed-forward part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.studio.method import SiteMethod, check
from graft.studio.sites import Plan, Site
from graft.studio.slots import Slot
from graft.vision.blocks import BottleneckSlot, find_blocks
from graft.vision.method import VisionMethod


@dataclass(frozen=True)
class AdaptFormer(VisionMethod, SiteMethod):
    """A bottleneck beside the feed-forward part of every block.

    Example:
        >>> handle = AdaptFormer(bottleneck=8).attach(timm_model)  # doctest: +SKIP
    """

    kinds: ClassVar[tuple[str, ...]] = ("block",)
    when: ClassVar[str] = "ViTs, when a small cost at inference does not matter"

    bottleneck: int = 64
    """Inner width r; 8 is used for small data sets, 64 in the paper."""
    scale: float = 0.1
    """Factor s of the branch; fixed."""
    dropout: float = 0.1
    """Probability of dropping an inner unit in training."""

    default_learning_rate: ClassVar[float] = 5e-3
    head_lr_scale: ClassVar[float] = 0.4
    exports: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check(
            self,
            bottleneck=(self.bottleneck >= 1, "1 or more"),
            scale=(self.scale > 0, "above 0"),
            dropout=(0 <= self.dropout < 1, "from 0 up to but not 1"),
        )

    def sites(self, model: Any) -> Plan:
        """Returns every block of the model."""
        return Plan(
            tuple(Site(b.name, "block", (b.width, b.width), None, "vision", b.stream) for b in find_blocks(model))
        )

    def count(self, site: Site) -> int:
        """Returns 2 D r + r + D."""
        width = site.shape[0]
        return 2 * width * self.bottleneck + self.bottleneck + width

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the branch of a block."""
        return AdaptFormerSlot(site, slots, self)


class AdaptFormerSlot(BottleneckSlot):
    """The branch of one block."""

    def __init__(self, site: Site, slots: int, method: AdaptFormer):
        """Makes the branch of a block."""
        super().__init__(site, slots, method.bottleneck, method.scale, method.dropout)
        for slot in range(slots):
            self.reset(slot)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws Down on the CPU (the same on every device) and clears the rest."""
        first = torch.empty(self.down.shape[1:])
        nn.init.kaiming_uniform_(first, a=sqrt(5))
        self.down[slot].copy_(first)
        for tensor in (self.down_bias, self.up, self.up_bias):
            tensor[slot].zero_()

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the block's output and the branch's; the site's role names the part whose input the branch reads."""
        stream: list[Tensor] = []
        reads = module.get_submodule(str(self.site.role))
        hook = reads.register_forward_pre_hook(lambda part, inputs: stream.append(inputs[0]))
        try:
            y = call(*args, **kwargs)
        finally:
            hook.remove()
        branch = self.bottleneck(stream[0], F.relu)
        return y + (self.strength(branch) * branch).reshape(y.shape)
