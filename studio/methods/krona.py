"""KronA: the change of a frozen weight is a Kronecker product of two trained matrices.

Ali Edalati, Marzieh Tahaei, Ivan Kobyzev, Vahid Partovi Nia, James J. Clark, Mehdi Rezagholizadeh: KronA: Parameter
Efficient Tuning with Kronecker Adapter, 2022, arXiv:2212.10650.

    y = W x + b + s (A (x) B) x,    (A (x) B) x = rows of  A X B'  for x read as a matrix X

A has (a1, a2) numbers and B (out / a1, in / a2), a1 and a2 near ``size``: the rank of the product is that of A times
that of B, far above LoRA's at equal size. The product is never formed in forward. As in the paper one factor starts
normal and one at zero: B, with Kaiming's deviation for a linear layer (a = sqrt 5), and A: a1 a2 + out in / (a1 a2)
parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from graft.studio.method import SiteMethod, check
from graft.studio.sites import Site
from graft.studio.slot import Base, Slot


@dataclass(frozen=True)
class KronA(SiteMethod):
    """A Kronecker product beside linear layers."""

    kinds = ("linear", "packed", "mha")
    when = "a change of high rank from few numbers"

    size: int | None = None
    """Rows and columns of A, rounded to divisors of the layer's widths; none takes their roots, the fewest numbers."""
    scale: float = 1.0
    """Factor s of the change."""
    targets: str | tuple[str, ...] = "attention"
    """Sites: roles (q k v o up gate down head), attention, mlp, all-linear, or patterns of paths."""
    towers: tuple[str, ...] | None = None
    """Parts of the model to stay in, such as text, vision, unet; all when not given."""

    def __post_init__(self) -> None:
        check(self, size=(self.size is None or self.size >= 1, "at least 1"), scale=(self.scale > 0, "above 0"))

    def shapes(self, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns the shapes of A and B."""
        out, inside = site.covered
        rows, columns = nearest_divisor(out, self.size or sqrt(out)), nearest_divisor(inside, self.size or sqrt(inside))
        return (rows, columns), (out // rows, inside // columns)

    def count(self, site: Site) -> int:
        """Returns the numbers of A and of B."""
        (a, b), (c, d) = self.shapes(site)
        return a * b + c * d

    def slot(self, site: Site, slots: int, module: nn.Module) -> Slot:
        """Returns the factors of a site."""
        return KroneckerSlot(site, slots, self)


class KroneckerSlot(Slot):
    """Two factors of a Kronecker product."""

    def __init__(self, site: Site, slots: int, method: KronA):
        """Makes the factors."""
        super().__init__(site, slots, method.scale)
        first, second = method.shapes(site)
        self.A, self.B = nn.Parameter(torch.empty(slots, *first)), nn.Parameter(torch.empty(slots, *second))
        for slot in range(slots):
            self.reset(slot)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Draws B, clears A."""
        self.A[slot].zero_()
        self.B[slot].copy_(nn.init.kaiming_normal_(torch.empty(self.B.shape[1:]), a=sqrt(5)))

    def delta(self, slot: int) -> Tensor:
        """Returns s A (x) B."""
        return self.scale[slot] * torch.kron(self.A[slot], self.B[slot])

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Returns y + s (A (x) B) x."""
        first, second, strength = self.pick(self.A, self.B)
        return y + kronecker(x, strength.view(-1, 1, 1) * first, second).reshape(y.shape).to(y.dtype)


def kronecker(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Returns (A (x) B) x without forming the product.

    Args:
        x: (b, ..., a2 * b2).
        first: A of each row or of all, (g, a1, a2) with g = b or 1.
        second: B, (g, b1, b2).

    Returns:
        (g, m, a1, b1), in the order of x's rows.
    """
    square = x.reshape(first.shape[0], -1, first.shape[2], second.shape[2])  # (g, m, a2, b2)
    inner = square @ second.mT[:, None].to(x.dtype)  # (g, m, a2, b1)
    return first[:, None].to(x.dtype) @ inner


def nearest_divisor(number: int, wanted: float) -> int:
    """Returns the divisor of a number that is nearest to a wanted one, the smaller of two."""
    return min((each for each in range(1, number + 1) if number % each == 0), key=lambda each: abs(each - wanted))
