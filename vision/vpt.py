r"""Visual Prompt Tuning: learnt tokens join the picture's, before the first block (shallow) or before every one (deep).

Menglin Jia, Luming Tang, Bor-Chun Chen, Claire Cardie, Serge Belongie, Bharath Hariharan, Ser-Nam Lim: Visual Prompt
Tuning, 2022, arXiv:2203.12119.

    shallow:  [c, P, E] -> blocks 1 .. L                     P: (num_tokens, D)
    deep:     [c, P_i, E] -> block i -> [c', -, E'],  i = 1 .. L

c are the model's own prefix tokens (class, registers), E the patches. Prompts stand between them, after the position
embedding and without one; in deep, what a block makes of them is thrown away and the next block's own take their place.
They start uniform in +-sqrt(6 / (3 p_h p_w + D)) for patches p_h x p_w. Behind the last block they are taken out, so
models that pool over patches do not see them. P D parameters, deep L P D.

Differs from the authors' code: no projection of prompts; AdamW with a large rate for prompts in place of SGD with rates
up to 50; no prompts inside the windows of a Swin, which is refused. In models with rotary positions (EVA, DINOv3) the
prompts are kept out of the rotation, like the model's own prefix tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.studio.errors import SiteError
from graft.studio.method import SiteMethod, check
from graft.studio.sites import Plan, Site
from graft.studio.slots import Handle, Slot, attach
from graft.vision.blocks import find_blocks
from graft.vision.method import VisionMethod

_OTHERS = "Use adaptformer, adapter_plus, lora or ssf"


@dataclass(frozen=True)
class VPT(VisionMethod, SiteMethod):
    """Learnt tokens beside those of the picture.

    Example:
        >>> handle = VPT(num_tokens=10, deep=True).attach(timm_model)  # doctest: +SKIP
    """

    kinds: ClassVar[tuple[str, ...]] = ("tokens",)
    when: ClassVar[str] = "ViTs, when no weight may be touched; longer sequences cost time"

    num_tokens: int = 10
    """Prompts in a sequence; the paper uses 1 to 200, chosen for each task."""
    deep: bool = True
    """Own prompts for every block, not only for the first."""
    dropout: float | None = None
    """Of the prompts in training; None takes the paper's 0.1 for deep and 0 for shallow."""

    default_learning_rate: ClassVar[float] = 1e-2
    head_lr_scale: ClassVar[float] = 0.5
    exports: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check(
            self,
            num_tokens=(self.num_tokens >= 1, "1 or more"),
            dropout=(self.dropout is None or 0 <= self.dropout < 1, "from 0 up to but not 1"),
        )

    @property
    def dropped(self) -> float:
        """Probability of dropping an element of a prompt."""
        return self.dropout if self.dropout is not None else 0.1 if self.deep else 0.0

    def sites(self, model: Any) -> Plan:
        """Returns every block; in shallow all of them carry the one set of prompts.

        Raises:
            SiteError: the tokens of the model are no one list that runs through all blocks.
        """
        blocks, kind = find_blocks(model), type(model).__name__
        if len({block.shape for block in blocks}) > 1 or not all(block.flat for block in blocks):
            raise SiteError(kind, "its blocks work on windows or on fewer and fewer tokens, not on one list", _OTHERS)
        if any("relative_position_bias_table" in name for name, _ in model.named_parameters()):
            raise SiteError(kind, "its attention knows the place of every token, which prompts do not have", _OTHERS)
        return Plan(tuple(Site(b.name, "tokens", (self.num_tokens, b.width), None, "vision") for b in blocks))

    def plan(self, model: Any) -> Plan:
        """Returns the sites that `attach` will use, with their parameters."""
        sites = self.sites(model).sites
        return Plan(sites, tuple(site.shape[0] * site.shape[1] * (self.deep or not k) for k, site in enumerate(sites)))

    def count(self, site: Site) -> int:
        """Returns P D."""
        return site.shape[0] * site.shape[1]

    def attach(self, model: Any, slots: int = 1, plan: Plan | None = None) -> Handle:
        """Attaches in place, ``slots`` adapters at once.

        Raises:
            SiteError: a model whose tokens are no one list, or a plan of another model.
        """
        plan = plan or self.plan(model)
        made: list[PromptSlot] = []
        bound = sqrt(6 / (3 * _patch_area(model) + plan.sites[0].shape[1]))
        prefix = int(getattr(model, "num_prefix_tokens", 0))

        def build(site: Site) -> Slot:
            shared = None if self.deep or not made else made[0].prompts
            slot = PromptSlot(site, slots, prefix, bound, self.dropped, shared)
            slot.enters = self.deep or site.name == plan.sites[0].name
            slot.leaves = self.deep or site.name == plan.sites[-1].name
            made.append(slot)
            return slot

        return attach(model, plan, build)


def _patch_area(model: Any) -> int:
    """Pixels of a patch."""
    embed = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    size = getattr(embed, "patch_size", 16)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return int(height) * int(width)


class PromptSlot(Slot):
    """The prompts of one block."""

    mergeable = False
    enters = leaves = True

    def __init__(
        self,
        site: Site,
        slots: int,
        prefix: int,
        bound: float,
        dropout: float,
        shared: nn.Parameter | None = None,
    ):
        """Makes prompts, or takes those of another block; ``bound`` is that of the uniform start."""
        super().__init__(site, slots)
        self.prefix, self.bound, self.dropout, self.owner = prefix, bound, dropout, shared is None
        self.prompts = nn.Parameter(torch.empty(slots, *site.shape)) if shared is None else shared
        for slot in range(slots if shared is None else 0):
            self.reset(slot)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws the prompts on the CPU (the same on every device)."""
        if self.owner:
            first = torch.empty(self.prompts.shape[1:])
            self.prompts[slot].copy_(nn.init.uniform_(first, -self.bound, self.bound))

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the block's output for tokens (b, n, d) with the prompts among them."""
        x, *rest = args
        if self.enters:
            x = self._with_prompts(x)
        with self._unrotated(module):
            y = call(x, *rest, **kwargs)
        if self.leaves:
            after = self.prefix + self.prompts.shape[1]
            y = torch.cat([y[:, : self.prefix], y[:, after:]], 1)
        return y

    def _with_prompts(self, x: Tensor) -> Tensor:
        prompts, strength = self.pick(self.prompts)
        if bool((strength != 1).any()):
            given = "rows without prompts, or prompts of another strength"
            raise SiteError(given, "all rows of a batch have equally many tokens", "Route every row to an adapter")
        prompts = F.dropout(prompts.expand(x.shape[0], -1, -1), self.dropout, self.training).to(x.dtype)
        return torch.cat([x[:, : self.prefix], prompts, x[:, self.prefix :]], 1)

    @contextmanager
    def _unrotated(self, block: Any) -> Iterator[None]:
        """Counts the prompts among the tokens that rotary attention leaves as they are."""
        rotary = [block.attn] if hasattr(block.attn, "num_prefix_tokens") else []
        for attention in rotary:
            attention.num_prefix_tokens += self.prompts.shape[1]
        try:
            yield
        finally:
            for attention in rotary:
                attention.num_prefix_tokens -= self.prompts.shape[1]
