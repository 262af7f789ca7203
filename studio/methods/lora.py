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
from torch.nn import functional as F

from graft.kernels.lora_linear import Term, lora_linear
from graft.studio.errors import InputError, SiteError
from graft.studio.sites import Model, Plan, Site, named_modules, plan_sites
from graft.studio.slots import Handle, Slot, attach

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter, Card


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation of linear layers, packed projections, convolutions and embeddings.

    Example:
        >>> handle = LoRA(rank=4, targets=("q", "v")).attach(model.requires_grad_(False))
        >>> optimizer = torch.optim.AdamW(handle.bank.parameters(), lr=1e-3)
    """

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
        """Returns the trainable parameters of a site."""
        return self.rank * (site.covered[0] + prod(site.covered[1:]))

    def plan(self, model: Model) -> Plan:
        """Returns the sites that `attach` will use, with their parameters."""
        sites = plan_sites(model, self.targets, towers=self.towers).sites
        return Plan(sites, tuple(map(self.count, sites)))

    def attach(self, model: Model, slots: int = 1, plan: Plan | None = None) -> Handle:
        """Attaches in place, ``slots`` adapters at once, to the planned sites.

        Raises:
            SiteError: targets that name nothing, or a plan of another model.
        """
        modules = named_modules(model)
        direct = {site.key for pattern in self.weight_mode for site in plan_sites(model, pattern)}
        names = {key.partition("[")[0] for key in direct}

        def build(site: Site) -> Slot:
            if site.kind not in _SLOTS:
                raise SiteError(
                    site.name, f"LoRA has nothing for sites of kind {site.kind}", f"use {', '.join(_SLOTS)}"
                )
            return _SLOTS[site.kind](site, slots, self, site.name in names, modules[site.name])

        return attach(model, plan or self.plan(model), build)

    @classmethod
    def attach_to(cls, base: Any, tensors: Mapping[str, Tensor], card: Card) -> Handle:
        """Attaches a trained adapter to its base (or to a plain model), ready for inference.

        An adapter that names no base, as those of other libraries, is tried on a base that offers `exercise`.

        Raises:
            SiteError: sites that the base does not have, or whose modules it never calls.
            FormatError: tensors that do not fit.
        """
        from graft.studio.config import from_dict

        method = from_dict(cls, card.config, "adapter.json")
        model = base if isinstance(base, nn.Module) else base.modules
        handle = method.attach(model, plan=Plan.from_list(card.sites))
        handle.bank.eval().requires_grad_(False)
        try:
            handle.load(tensors)
            if not card.base_hash and hasattr(base, "exercise"):
                _check_called(handle, base)
        except BaseException:
            handle.detach()
            raise
        return handle

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes the adapter for another library: peft or diffusers."""
        from graft.studio.formats import diffusers, peft

        writers = {"peft": peft.export, "diffusers": diffusers.export}
        if format not in writers:
            raise InputError(f"format {format!r}", "LoRA is not written in it", f"use native, {', '.join(writers)}")
        return writers[format](adapter, folder)


def _check_called(handle: Handle, base: Any) -> None:
    if dead := handle.bypassed(base.exercise):
        reason = f"{len(dead)} of {len(handle.plan)} sites are never called by {base.name}: nothing would act there"
        raise SiteError(", ".join(dead), reason, "use the base that the adapter was made for")


class LowRankSlot(Slot):
    """LoRA on a linear layer or on rows of a packed one."""

    rank_dims: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1}

    def __init__(self, site: Site, slots: int, method: LoRA, weight_mode: bool, module: nn.Module):
        """Makes the factors of a site; ``module`` is the site's own, for what the shape does not say."""
        super().__init__(site, slots, method.scaling, weight_mode)
        self.dropout = method.dropout
        down, up = self.shapes(method.rank)
        self.A = nn.Parameter(torch.empty(slots, *down))
        self.B = nn.Parameter(torch.empty(slots, *up))
        for slot in range(slots):
            self.reset(slot)

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

    def delta(self, slot: int) -> Tensor:
        """Returns s B A in the shape of the covered weight."""
        return (self.scale[slot] * self.B[slot] @ self.A[slot].flatten(1)).view(self.site.covered)

    def term(self) -> Term | None:
        """Returns the factors for the fused kernel."""
        dropout = self.dropout if self.training else 0.0
        seed = int(torch.empty((), dtype=torch.int64).random_()) if dropout else 0
        return Term(self.A, self.B, self.scale, self.route, self.site.rows, dropout, seed)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y + s B A drop(x), for bases whose own product is not a dense one."""
        term = self.term()
        assert term is not None
        delta = lora_linear(x, None, None, (term._replace(rows=None),))
        if self.site.rows is not None:
            delta = F.pad(delta, (self.site.rows[0], self.site.shape[0] - self.site.rows[1]))
        return y + delta.to(y.dtype)

    def _picked(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and the scale of each batch row, or of slot 0 with a leading dimension of 1."""
        if self.route is None:
            return self.A[:1], self.B[:1], self.scale[:1]
        slot = self.route.clamp(min=0)
        return self.A[slot], self.B[slot], self.scale[slot] * (self.route >= 0)


class ConvSlot(LowRankSlot):
    """LoRA on a convolution: a convolution to ``rank`` channels, then a 1 x 1."""

    def __init__(self, site: Site, slots: int, method: LoRA, weight_mode: bool, module: Any):
        """Takes stride, padding and dilation from the module."""
        super().__init__(site, slots, method, weight_mode, module)
        self.geometry = (module.stride, module.padding, module.dilation)

    def term(self) -> Term | None:
        """Returns None: a convolution is no low-rank term."""
        return None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y + s B (A * drop(x)) for x (b, i, ...) and y (b, o, ...)."""
        down, up, scale = self._picked()
        x = F.dropout(x, self.dropout, self.training)
        groups = down.shape[0]
        convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        # Rows with their own A are groups of channels of one picture.
        grouped = x.reshape(x.shape[0] // groups, groups * x.shape[1], *x.shape[2:])
        hidden = convolve(grouped, down.flatten(0, 1).to(x.dtype), None, *self.geometry, groups)
        hidden = hidden.reshape(x.shape[0], -1, y.shape[2:].numel())  # (b, r, pixels)
        return y + ((scale.view(-1, 1, 1) * up).to(hidden.dtype) @ hidden).view(y.shape).to(y.dtype)


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
        return (self.scale[slot] * self.B[slot] @ self.A[slot]).T

    def term(self) -> Term | None:
        """Returns None: the input is not a vector."""
        return None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y + s B A[:, x] for ids x (b, ...) and y (b, ..., d)."""
        down, up, scale = self._picked()
        ids = x.reshape(down.shape[0], -1)
        hidden = down.gather(2, ids[:, None].expand(-1, down.shape[1], -1))  # (g, r, m)
        return y + ((scale.view(-1, 1, 1) * up) @ hidden).mT.reshape(y.shape).to(y.dtype)


_SLOTS: dict[str, type[LowRankSlot]] = {
    "linear": LowRankSlot,
    "packed": LowRankSlot,
    "conv": ConvSlot,
    "embedding": EmbeddingSlot,
}
