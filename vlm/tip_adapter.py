r"""Tip-Adapter: a cache of the shots' features votes beside zero-shot CLIP, without training or with its keys trained.

Renrui Zhang, Rongyao Fang, Wei Zhang, Peng Gao, Kunchang Li, Jifeng Dai, Yu Qiao, Hongsheng Li: Tip-Adapter:
Training-free Adaption of CLIP for Few-shot Classification, 2022, arXiv:2207.09519.

    logits = s f W' + alpha (s / 100) exp(-beta (1 - f F')) L

f is the unit feature of a picture, W the zero-shot weights, s the base's logit scale (100 for CLIP), F (n, e) the keys:
the mean over crops of each shot's features, at unit length; L (n, c) its one-hot label. Tip-Adapter-F trains F.

Differs from the authors' code: alpha and beta are searched once on pictures kept from the shots or, without any, by
leaving each shot out in turn, and never on test pictures; the last step's keys are taken, not the best on the test set;
where classes have unequal shots, L is divided by their number (times its mean); alpha is in units of s / 100, so that
it means the same for bases with another scale. The search computes the affinity once: all alphas of a beta come from
one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.kernels.class_votes import by_class, class_sums, class_votes
from graft.vlm.head import Head, HeadMethod, Setting, Shots


@dataclass(frozen=True)
class TipAdapter(HeadMethod):
    """A vote of the nearest shots beside zero-shot; nothing is trained."""

    alpha: float = 5.0
    """Weight of the vote beside zero-shot, where it is not searched."""
    beta: float = 5.5
    """How fast the vote of a shot falls with its distance, where it is not searched."""
    search: bool = True
    """Search both, on pictures kept from the shots; with one shot per class there is nothing to search by."""
    alpha_max: float = 50.0
    """Largest alpha of the search."""
    beta_max: float = 20.0
    """Largest beta of the search."""
    alphas: int = 20
    """Values of alpha in the search, from 0.1 up in equal ratios."""
    betas: int = 200
    """Values of beta in the search, from 0.1 up in equal steps."""

    bound: ClassVar[bool] = True
    trains_keys: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            self._check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
            top = getattr(self, f"{name}_max")
            self._check(f"{name}_max", top, top > 0.1, "above 0.1")
            steps = getattr(self, f"{name}s")
            self._check(f"{name}s", steps, 1 <= steps <= 10_000, "1 to 10,000")

    def build(self, setting: Setting, tensors: Mapping[str, Tensor] | None = None) -> Head:
        """An empty cache; `start` fills it."""
        rows = 0 if tensors is None else len(tensors["keys"])
        return Cache(setting, self, rows)


@dataclass(frozen=True)
class TipAdapterF(TipAdapter):
    """Tip-Adapter whose keys are trained, starting from the shots' features."""

    default_learning_rate: ClassVar[float] = 1e-3
    train_defaults: ClassVar[Mapping[str, Any]] = {**HeadMethod.train_defaults, "steps": 200, "batch_size": 256}
    trains_keys: ClassVar[bool] = True


class Cache(Head):
    """Keys, their labels, and the two strengths."""

    keys: Tensor
    labels: Tensor
    shares: Tensor
    strengths: Tensor

    def __init__(self, setting: Setting, method: TipAdapter, rows: int):
        super().__init__(setting)
        self.method = method
        self.register_buffer("labels", torch.zeros(rows, dtype=torch.long))
        self.register_buffer("shares", torch.ones(len(setting.names)))
        self.register_buffer("strengths", torch.tensor([method.alpha, method.beta]))
        self._set_keys(torch.zeros(rows, setting.weights.shape[1]))

    def _set_keys(self, keys: Tensor) -> None:
        if self.method.trains_keys:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)

    @torch.no_grad()
    def start(self, shots: Shots) -> None:
        """Fills the cache, and searches the strengths."""
        base = self.setting.base
        self._set_keys(F.normalize(base.project(shots.crops.to(base.device)).mean(1), dim=-1))
        self.labels = shots.labels.to(base.device)
        self.shares = class_shares(self.labels, len(self.setting.names))
        if self.method.search:
            self._search(shots, left_out=len(shots.held_labels) == 0)

    def finish(self, shots: Shots) -> dict[str, Any]:
        """Searches again with the trained keys, if pictures were kept back: trained keys know the others."""
        if self.method.trains_keys and self.method.search and len(shots.held_labels):
            self._search(shots, left_out=False)
        alpha, beta = self.strengths.tolist()
        return {"alpha": alpha, "beta": beta}

    @torch.no_grad()
    def _search(self, shots: Shots, left_out: bool) -> None:
        base, counts = self.setting.base, torch.bincount(self.labels, minlength=len(self.setting.names))
        if left_out and int(counts.min()) < 2:
            return
        pooled, labels = (shots.pooled[:, 0], shots.labels) if left_out else (shots.held_pooled, shots.held_labels)
        features, labels = base.project(pooled.to(base.device)), labels.to(base.device)
        affinity = F.normalize(features, dim=-1) @ self.keys.T
        if left_out:
            affinity.fill_diagonal_(-float("inf"))  # its vote is exp(-inf) = 0
        bonus = counts[labels] / (counts[labels] - 1) if left_out else None
        method = self.method
        alphas = torch.logspace(-1, float(torch.tensor(method.alpha_max).log10()), method.alphas)
        betas = torch.linspace(0.1, method.beta_max, method.betas)
        table = search(
            self.setting.zero_shot(features),
            affinity,
            self.labels,
            self.shares * self._unit,
            labels,
            alphas,
            betas,
            bonus,
        )
        row, column = middle_of_best(table)
        self.strengths = torch.stack([alphas[column], betas[row]]).to(base.device)

    @property
    def _unit(self) -> Tensor:
        return self.setting.scale / 100

    def forward(self, features: Tensor) -> Tensor:
        """Zero-shot logits and the vote: (b, e) -> (b, c)."""
        alpha, beta = self.strengths.tolist()
        classes = by_class(self.labels, len(self.shares))
        votes = class_votes(F.normalize(features, dim=-1), self.keys, classes, beta)
        return self.setting.zero_shot(features) + alpha * self._unit * votes * self.shares


def class_shares(labels: Tensor, classes: int) -> Tensor:
    """What a vote counts by class, (c,): 1 where all classes have equally many shots."""
    counts = torch.bincount(labels, minlength=classes).float()
    return counts.mean() / counts.clamp(min=1)


@torch.no_grad()
def search(
    zero_shot: Tensor,
    affinity: Tensor,
    labels: Tensor,
    shares: Tensor,
    wanted: Tensor,
    alphas: Tensor,
    betas: Tensor,
    bonus: Tensor | None = None,
) -> Tensor:
    """Accuracy of every pair of strengths, in one pass over the betas.

    Args:
        zero_shot: (m, c) logits.
        affinity: (m, n) cosines to the keys.
        labels: (n,) of the keys.
        shares: (c,), what a vote counts by class.
        wanted: (m,), the right classes.
        alphas: (a,).
        betas: (b,).
        bonus: (m,), factor of the right class's votes, for what was left out of them.

    Returns:
        (b, a), shares of right answers.
    """
    near, classes = affinity.T.contiguous(), by_class(labels, len(shares))
    room = torch.empty_like(near)
    plain, rows = zero_shot.T.contiguous(), torch.arange(len(wanted))  # classes first: one row operation per key
    table, logits = torch.empty(len(betas), len(alphas)), torch.empty_like(plain)
    for b, beta in enumerate(betas.tolist()):
        vote = class_sums(near, classes, beta, room) * shares[:, None]
        if bonus is not None:
            vote[wanted, rows] *= bonus
        for a, alpha in enumerate(alphas.tolist()):
            torch.add(plain, vote, alpha=alpha, out=logits)
            table[b, a] = (logits[wanted, rows] == logits.amax(0)).float().mean()
    return table


def middle_of_best(table: Tensor) -> tuple[int, int]:
    """Place of the best value; of several, the one nearest to their middle, since few pictures leave wide ties."""
    places = (table == table.max()).nonzero().float()
    steps = torch.tensor(table.shape)
    nearest = ((places - places.mean(0)) / steps).square().sum(1).argmin()
    row, column = places[nearest].long().tolist()
    return row, column
