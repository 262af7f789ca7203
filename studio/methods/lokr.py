"""LoKr: the change of a frozen weight is a Kronecker product, whose second factor may be a product of two thin ones.

Shih-Ying Yeh, Yu-Guan Hsieh, Zhidong Gao, Bernard B W Yang, Giyeong Oh, Yanmin Gong: Navigating Text-To-Image
Customization: From LyCORIS Fine-Tuning to Model Evaluation, 2023, arXiv:2309.14859.

    y = W x + b + s (W1 (x) W2) x,    W2 or W2 = A B,    s = alpha / rank,  or  1 if no factor is thin

For W (o, i) with o = l k and i = m n, W1 is (l, m) and W2 (k, n): l is the largest divisor of o that is at most its
root and at most ``factor``, m likewise of i. W2 is thin, A (k, r) and B (r, n), where r is below half of its longer
side; with ``decompose_both`` W1 too. A convolution's kernel belongs to W2. As in LyCORIS W1 and A start uniform
(Kaiming, a = sqrt 5), B, or W2 where it is whole, at zero.

Differs from LyCORIS: no dropout of ranks or modules, no Tucker form of a convolution's W2 (one that is read becomes a
whole W2), and the product is never formed in forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt, prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.studio.errors import FormatError, InputError
from graft.studio.method import SiteMethod, check
from graft.studio.methods.krona import kronecker
from graft.studio.sites import Model, Plan, Site, named_modules, weight_shape
from graft.studio.slot import Base, Slot
from graft.studio.slots import Handle, attach

if TYPE_CHECKING:
    from graft.studio.adapter import Adapter

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the tensors of a site: w1, or w1_a and w1_b; w2, or w2_a and w2_b."""


@dataclass(frozen=True)
class LoKr(SiteMethod):
    """A Kronecker product with a thin second factor, on linear layers and convolutions."""

    kinds = ("linear", "packed", "mha", "conv")
    when = "small files for diffusion models; LyCORIS, ComfyUI and peft read them"

    rank: int = 8
    """Inner width of thin factors."""
    alpha: float = 8.0
    """Numerator of the scale."""
    factor: int = -1
    """Largest number of rows and columns of the first factor; -1 takes the roots of the layer's widths."""
    decompose_both: bool = False
    """Make the first factor thin too, where it is large enough."""
    targets: str | tuple[str, ...] = "attention"
    """Sites: roles (q k v o up gate down head), attention, mlp, all-linear, all, or patterns of paths."""
    towers: tuple[str, ...] | None = None
    """Parts of the model to stay in, such as text, vision, unet; all when not given."""

    def __post_init__(self) -> None:
        check(
            self,
            rank=(self.rank >= 1, "at least 1"),
            alpha=(self.alpha > 0, "above 0"),
            factor=(self.factor == -1 or self.factor >= 1, "at least 1, or -1"),
        )

    def shapes(self, site: Site) -> Shapes:
        """Returns the shapes of a site's tensors."""
        out, inside, *kernel = site.covered
        (rows, k), (columns, n) = split(out, self.factor), split(inside, self.factor)
        whole = {"w1": (rows, columns), "w2": (k, n, *kernel)}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in whole.items():
            if (name == "w2" or self.decompose_both) and self.rank < max(shape[:2]) / 2:
                shapes |= {f"{name}_a": (shape[0], self.rank), f"{name}_b": (self.rank, prod(shape[1:]))}
            else:
                shapes[name] = shape
        return shapes

    def count(self, site: Site) -> int:
        """Returns the numbers of all factors."""
        return sum(map(prod, self.shapes(site).values()))

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the factors of a site."""
        return LoKrSlot(site, slots, self, module, self.shapes(site))

    def attach_trained(self, model: Model, plan: Plan, tensors: Mapping[str, Tensor]) -> Handle:
        """Attaches factors of the shapes that a trained adapter has, which another ``factor`` may have made."""
        modules = named_modules(model)
        plan = Plan(tuple(_as_it_is(site, modules.get(site.name)) for site in plan))

        def build(site: Site) -> Slot:
            found = {name: tuple(tensors[key].shape) for name in NAMES if (key := f"{site.key}.{name}") in tensors}
            check_shapes(site, found)
            return LoKrSlot(site, 1, self, modules[site.name], found)

        handle = attach(model, plan, build)
        handle.rule = self
        return handle

    @classmethod
    def export(cls, adapter: Adapter, folder: Path, format: str) -> list[Path]:
        """Writes the adapter for another library: kohya is LyCORIS's file, which ComfyUI reads."""
        from graft.studio.formats import lokr

        if format not in lokr.WRITERS:
            raise InputError(
                f"format {format!r}", "LoKr is not written in it", f"use native, {', '.join(lokr.WRITERS)}"
            )
        return lokr.WRITERS[format](adapter, folder)


NAMES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


def split(number: int, factor: int) -> tuple[int, int]:
    """Returns two divisors whose product a width is: the largest up to its root and a factor (-1: any), and the other.

    As in today's LyCORIS; in earlier ones and in peft a factor above the root that divides the width is taken all the
    same.
    """
    most = isqrt(number) if factor < 0 else min(factor, isqrt(number))
    first = next(each for each in range(most, 0, -1) if number % each == 0)
    return first, number // first


def product(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Returns a factor, of which the tensors may hold the two thin ones."""
    if name in tensors:
        return tensors[name]
    return tensors[f"{name}_a"] @ tensors[f"{name}_b"]


def check_shapes(site: Site, shapes: Shapes) -> None:
    """Raises FormatError if factors of these shapes make no change of a site's weight."""
    out, inside, *kernel = site.covered
    first = shapes.get("w1") or (*shapes.get("w1_a", ())[:1], *shapes.get("w1_b", ())[1:])
    second = shapes.get("w2") or (*shapes.get("w2_a", ())[:1], *shapes.get("w2_b", ())[1:])
    fits = len(first) == 2 and len(second) >= 2 and first[0] * second[0] == out
    if not fits or first[1] * prod(second[1:]) != inside * prod(kernel):
        reason = f"factors {first} and {second} make no change of {site.covered}"
        raise FormatError(site.key, reason, "use the base it was trained on")


def _as_it_is(site: Site, module: nn.Module | None) -> Site:
    """The site of a convolution, whose kernel the thin factors in a file do not tell."""
    shape = () if module is None else weight_shape(module)
    if len(shape) > 2 and site.rows is None and prod(shape) == prod(site.shape):
        return replace(site, kind="conv", shape=shape)
    return site


class LoKrSlot(Slot):
    """Factors of a Kronecker product."""

    def __init__(self, site: Site, slots: int, method: LoKr, module: Any, shapes: Shapes):
        """Makes factors of these shapes; ``module`` tells a convolution's stride, padding and dilation."""
        super().__init__(site, slots, method.alpha / method.rank if set(shapes) & {"w1_a", "w2_a"} else 1.0)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(slots, *shape)))
        self.geometry = (module.stride, module.padding, module.dilation) if site.kind == "conv" else None
        for slot in range(slots):
            self.reset(slot)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws all but the last factor, which is cleared."""
        own = dict(self.named_parameters(recurse=False))
        for parameter in own.values():
            parameter[slot].copy_(nn.init.kaiming_uniform_(torch.empty(parameter.shape[1:]), a=sqrt(5)))
        own["w2" if "w2" in own else "w2_b"][slot].zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns W1 (slots, l, m) and W2 (slots, k, n, kernel...)."""
        own: dict[str, Tensor] = dict(self.named_parameters(recurse=False))
        first, second = product(own, "w1"), product(own, "w2")
        kernel = self.site.covered[2:]
        return first, second.reshape(*second.shape[:2], -1, *kernel) if kernel else second

    def delta(self, slot: int) -> Tensor:
        """Returns s W1 (x) W2."""
        first, second = (factor[slot] for factor in self.factors())
        first = first.view(*first.shape, *[1] * (second.dim() - 2))
        return self.scale[slot] * torch.kron(first.contiguous(), second.contiguous())

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns y + s (W1 (x) W2) x."""
        first, second, strength = self.pick(*self.factors())
        change = self._convolved(x, y, first, second) if self.geometry else kronecker(x, first, second)
        return y + (strength.view(-1, *[1] * (y.dim() - 1)).to(y.dtype) * change.reshape(y.shape).to(y.dtype))

    def _convolved(self, x: Tensor, y: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """(W1 (x) W2) * x for x (b, i, ...): W2 goes over each of m groups of n channels, then W1 mixes the groups."""
        assert self.geometry is not None
        groups, columns, batch = first.shape[0], first.shape[2], x.shape[0]
        parts = x.unflatten(1, (columns, -1)).transpose(0, 1)  # (m, b, n, ...)
        # Rows with their own W2 are groups of channels of one picture.
        parts = parts.reshape(columns * (batch // groups), groups * parts.shape[2], *x.shape[2:])
        convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        hidden = convolve(parts, second.flatten(0, 1).to(x.dtype), None, *self.geometry, groups)
        hidden = hidden.reshape(columns, batch, -1).transpose(0, 1)  # (b, m, k * pixels)
        return (first.to(x.dtype) @ hidden).reshape(y.shape)
