r"""Adapter+: a small bottleneck behind every block, with a learned scale for each channel. One recipe for all tasks.

Jan-Martin O. Steitz, Stefan Roth: Adapters Strike Back, 2024, arXiv:2406.06820.

    y = h + sigma * drop_path(Up GELU(Down h + b) + c),    h = block(x): (n, D), Down: (r, D), Up: (D, r), sigma: (D,)

r is `bottleneck`. Down and Up start truncated normal of deviation 0.01, cut at two of them (Houlsby et al., 2019,
arXiv:1902.00751), b and c at zero, sigma at one: the start is near the model's output, not at it. L (2 D r + r + 2 D)
parameters. The authors train with AdamW, learning rate 1e-3, weight decay 1e-4, 100 epochs.

Differs from the authors' code: nothing known but the classifier, which starts at a deviation of 0.01.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
class AdapterPlus(VisionMethod, SiteMethod):
    """A small bottleneck behind every block, scaled by channel.

    Example:
        >>> handle = AdapterPlus(bottleneck=8).attach(timm_model)  # doctest: +SKIP
    """

    kinds: ClassVar[tuple[str, ...]] = ("block",)
    when: ClassVar[str] = "ViTs, when you do not want to choose: one recipe for all tasks"

    bottleneck: int = 8
    """Inner width r."""
    drop_path: float = 0.1
    """Probability that the branch is left out for a picture in training."""

    exports: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check(
            self,
            bottleneck=(self.bottleneck >= 1, "1 or more"),
            drop_path=(0 <= self.drop_path < 1, "from 0 up to but not 1"),
        )

    def sites(self, model: Any) -> Plan:
        """Returns every block of the model."""
        return Plan(tuple(Site(b.name, "block", (b.width, b.width), None, "vision") for b in find_blocks(model)))

    def count(self, site: Site) -> int:
        """Returns 2 D r + r + 2 D."""
        width = site.shape[0]
        return 2 * width * self.bottleneck + self.bottleneck + 2 * width

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the branch of a block."""
        return AdapterPlusSlot(site, slots, self)


class AdapterPlusSlot(BottleneckSlot):
    """The branch behind one block."""

    def __init__(self, site: Site, slots: int, method: AdapterPlus):
        """Makes the branch of a block."""
        super().__init__(site, slots, method.bottleneck, 1.0, 0.0)
        self.drop_path = method.drop_path
        self.sigma = nn.Parameter(torch.ones(slots, site.shape[0]))
        for slot in range(slots):
            self.reset(slot)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws Down and Up on the CPU (the same on every device), clears the biases, sets the scales to one."""
        for tensor in (self.down, self.up):
            first = torch.empty(tensor.shape[1:])
            nn.init.trunc_normal_(first, std=0.01, a=-0.02, b=0.02)
            tensor[slot].copy_(first)
        for tensor, value in ((self.down_bias, 0.0), (self.up_bias, 0.0), (self.sigma, 1.0)):
            tensor[slot].fill_(value)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the block's output and the branch's."""
        y = call(*args, **kwargs)
        branch = self._dropped(self.bottleneck(y, F.gelu))
        (sigma, _) = self.pick(self.sigma)
        return y + (self.strength(branch) * sigma[:, None].to(branch.dtype) * branch).reshape(y.shape)

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
        return branch * kept.to(branch.dtype) / (1 - self.drop_path)
