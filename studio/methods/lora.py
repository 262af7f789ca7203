"""LoRA: the change of a frozen weight is a product of two thin trained matrices, added to the layer's output.

Edward Hu, Yelong Shen, Phillip Wallis, Zeyuan Allen-Zhu, Yuanzhi Li, Shean Wang, Lu Wang, Weizhu Chen: LoRA: Low-Rank
Adaptation of Large Language Models, 2021, arXiv:2106.09685. With ``rslora``: Damjan Kalajdzievski: A Rank Stabilization
Scaling Factor for Fine-Tuning with LoRA, 2023, arXiv:2312.03732.

    y = W x + b + s B A drop(x),    s = alpha / rank,  or  alpha / sqrt(rank) with rslora

A (rank, in) starts uniform as a linear layer's weight (Kaiming, a = sqrt 5), B (out, rank) at zero, so y starts as it
was. A convolution has A (rank, in, kernel) and a 1 x 1 B; an embedding, whose input is one-hot, has A at zero and B
normal. Each takes rank * (in * kernel + out) parameters.

Differs from the authors' code: q, k and v packed in one projection are separate sites with their own A; factors are
float32 whatever the base and are cast to the activations; dropout masks are replayed from a seed instead of stored
(linear sites).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from graft.kernels.lora_linear import Term, lora_linear
from graft.studio.errors import InputError
from graft.studio.method import SiteMethod
from graft.studio.sites import Model, Plan, Site, ends, plan_sites
from graft.studio.slot import Base, Slot
from graft.studio.slots import Handle

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter


@dataclass(frozen=True)
class LoRA(SiteMethod):
    """Low-rank adaptation of linear layers, packed projections, convolutions and embeddings.

    Example:
        >>> handle = LoRA(rank=4, targets=("q", "v")).attach(model.requires_grad_(False))
        >>> optimizer = torch.optim.AdamW(handle.bank.parameters(), lr=1e-3)
    """

    when = "first choice: cheap, mergeable, read by every other library"

    rank: int = 8
    """Inner width of the change; parameters grow in proportion."""
    alpha: float = 8.0
    """Numerator of the scale; raise it with the rank to keep the scale."""
    dropout: float = 0.0
    """Probability of dropping an input element of the low-rank path in training, from 0 up to but not 1."""
    rslora: bool = False
    """Divide alpha by the root of the rank, which keeps high ranks learning."""
    targets: str | tuple[str, ...] = "attention"
    """Sites: roles (q k v o up gate down head), attention, mlp, all-linear, all, embedding, or patterns of paths."""
    towers: tuple[str, ...] | None = None
    """Parts of the model to stay in, such as text, vision, unet; all when not given."""
    weight_mode: tuple[str, ...] = ()
    """Patterns of sites whose module is bypassed and whose weight is read directly: the weight itself is changed."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank {self.rank}", "must be at least 1", "4 to 32 is usual")
        if not self.alpha > 0:
            raise InputError(f"alpha {self.alpha}", "must be above 0", "the rank is a good value")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout {self.dropout}", "must be from 0 up to but not 1", "0.1 is usual")
        if self.dropout and self.weight_mode:
            raise InputError("dropout with weight_mode", "a weight has no input to drop", "set dropout = 0")

    @property
    def scaling(self) -> float:
        """The factor s."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)

    def count(self, site: Site) -> int:
        """Returns rank times both widths."""
        return self.rank * (site.covered[0] + prod(site.covered[1:]))

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the factors of a site."""
        return SLOTS[site.kind](site, slots, self, module)

    def reads(self, site: Site) -> bool:
        """Whether ``weight_mode`` names a site's module."""
        return any(ends(site.name, pattern) for pattern in self.weight_mode)

    def attach(self, model: Model, slots: int = 1, plan: Plan | None = None) -> Handle:
        """Attaches as every method; a pattern of ``weight_mode`` that names nothing is refused."""
        for pattern in self.weight_mode:
            plan_sites(model, pattern)
        return super().attach(model, slots, plan)

    @classmethod
    def as_lora(cls, adapter: Adapter) -> Adapter:
        """Returns the adapter as plain factors, for methods whose result is such a product.

        Raises:
            InputError: a method whose result is none.
        """
        return adapter

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes the adapter for another library."""
        from graft.studio.formats import diffusers, kohya, loralib, peft, torchtune

        writers = {
            "peft": peft.export,
            "diffusers": diffusers.export,
            "kohya": kohya.export,
            "loralib": loralib.export,
            "torchtune": torchtune.export,
        }
        if format not in writers:
            raise InputError(f"format {format!r}", "LoRA is not written in it", f"use native, {', '.join(writers)}")
        return writers[format](cls.as_lora(adapter), folder)


class LowRankSlot(Slot):
    """LoRA on a linear layer or on rows of a packed one."""

    rank_dims: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1}

    def __init__(self, site: Site, slots: int, method: Any, module: nn.Module):
        """Makes the factors of a site; ``module`` is the site's own, for what the shape does not say."""
        super().__init__(site, slots, method.scaling, method.reads(site))
        self.dropout = method.dropout
        down, up = self.shapes(method.rank)
        self.A = nn.Parameter(torch.empty(slots, *down))
        cpu = next(module.parameters(), torch.empty(0)).device.type == "cpu"  # there, rank first is read fastest
        self.B = nn.Parameter(torch.empty(slots, *reversed(up)).mT if cpu else torch.empty(slots, *up))
        self.extend(method, module)
        for slot in range(slots):
            self.reset(slot)

    def extend(self, method: Any, module: nn.Module) -> None:
        """Adds what a variant has beside the factors, before the first `reset`."""

    def shapes(self, rank: int) -> tuple[Sequence[int], Sequence[int]]:
        """Returns the shapes of A and B."""
        out, *inside = self.site.covered
        return (rank, *inside), (out, rank)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws A on the CPU (the same on every device) and clears B."""
        first = torch.empty(self.A.shape[1:])
        nn.init.kaiming_uniform_(first, a=sqrt(5))
        self.A[slot].copy_(first)
        self.B[slot].zero_()

    def up(self, base: Base) -> Tensor:
        """Returns B of all slots, with what a variant makes of it."""
        return self.B

    def delta(self, slot: int) -> Tensor:
        """Returns s B A in the shape of the covered weight."""
        up = self.up(Base(None, None))[slot]
        return (self.scale[slot] * up @ self.A[slot].flatten(1)).view(self.site.covered)

    def term(self, base: Base) -> Term | None:
        """Returns the factors for the fused kernel."""
        return self.fused(self.up(base))

    def fused(self, up: Tensor) -> Term:
        """Returns A with another B as a term, with a mask of its own for dropout."""
        dropout = self.dropout if self.training else 0.0
        seed = int(torch.empty((), dtype=torch.int64).random_()) if dropout and not is_compiling() else 0
        return Term(self.A, up, self.scale, self.route, None, dropout, seed)

    def low_rank(self, x: Tensor, y: Tensor, up: Tensor) -> Tensor:
        """Returns s B A drop(x) alone, in the shape of y."""
        term = self.fused(up)
        if term.dropout and is_compiling():  # which cannot draw a seed, and recomputes masks by itself
            x, term = F.dropout(x, term.dropout), term._replace(dropout=0.0)
        return lora_linear(x, None, None, (term,))

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns y + s B A drop(x), where the product with the base is not to be had in one function."""
        return y + self.low_rank(x, y, self.up(base)).to(y.dtype)


class ConvSlot(LowRankSlot):
    """LoRA on a convolution: a convolution to ``rank`` channels, then a 1 x 1."""

    def extend(self, method: Any, module: Any) -> None:
        """Takes stride, padding and dilation from the module."""
        super().extend(method, module)
        self.geometry = (module.stride, module.padding, module.dilation)

    def term(self, base: Base) -> Term | None:
        """Returns None: a convolution is no low-rank term."""
        return None

    def low_rank(self, x: Tensor, y: Tensor, up: Tensor) -> Tensor:
        """Returns s B (A * drop(x)) for x (b, i, ...) and y (b, o, ...)."""
        down, up, scale = self.pick(self.A, up)
        x = F.dropout(x, self.dropout, self.training)
        groups = down.shape[0]
        convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        # Rows with their own A are groups of channels of one picture.
        grouped = x.reshape(x.shape[0] // groups, groups * x.shape[1], *x.shape[2:])
        hidden = convolve(grouped, down.flatten(0, 1).to(x.dtype), None, *self.geometry, groups)
        hidden = hidden.reshape(x.shape[0], -1, y.shape[2:].numel())  # (b, r, pixels)
        return ((scale.view(-1, 1, 1) * up).to(hidden.dtype) @ hidden).view(y.shape)


class EmbeddingSlot(LowRankSlot):
    """LoRA on an embedding table (vocabulary, width): a rank-sized table, then a linear map."""

    def shapes(self, rank: int) -> tuple[Sequence[int], Sequence[int]]:
        """Returns (rank, vocabulary) and (width, rank)."""
        vocabulary, width = self.site.shape
        return (rank, vocabulary), (width, rank)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Clears A and draws B normal: the one-hot input selects columns of A, which must start at nothing."""
        self.A[slot].zero_()
        self.B[slot].copy_(torch.randn(self.B.shape[1:]))

    def delta(self, slot: int) -> Tensor:
        """Returns s (B A)', (vocabulary, width)."""
        return (self.scale[slot] * self.up(Base(None, None))[slot] @ self.A[slot]).T

    def term(self, base: Base) -> Term | None:
        """Returns None: the input is not a vector."""
        return None

    def low_rank(self, x: Tensor, y: Tensor, up: Tensor) -> Tensor:
        """Returns s B A[:, x] for ids x (b, ...) and y (b, ..., d)."""
        down, up, scale = self.pick(self.A, up)
        ids = x.reshape(down.shape[0], -1)
        hidden = down.gather(2, ids[:, None].expand(-1, down.shape[1], -1))  # (g, r, m)
        return ((scale.view(-1, 1, 1) * up) @ hidden).mT.reshape(y.shape)


SLOTS: dict[str, type[LowRankSlot]] = {
    "linear": LowRankSlot,
    "packed": LowRankSlot,
    "mha": LowRankSlot,
    "conv": ConvSlot,
    "embedding": EmbeddingSlot,
}
