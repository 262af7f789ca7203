"""Votes of a cache by class: Tip-Adapter's affinities, summed over the keys of each class.

    votes[m, c] = sum over the keys n of class c of exp(-beta (1 - f_m . k_n))

The paper multiplies the affinities by one-hot labels, m n c operations; here they are added up, m n. The Triton path
never writes the affinities: its tiles hold whole classes. A search over beta keeps ``f . k`` and calls `class_sums`.

Letters: m features, n keys, e width, c classes.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.kernels.dispatch import LIBRARY, fastest, refusals

TRITON = "triton"


class Classes(NamedTuple):
    """Which keys are of which class; made by `by_class`."""

    labels: Tensor
    """(n,) long."""
    number: int
    """Of classes, c."""
    order: Tensor
    """(n,) long, the keys by class."""
    starts: Tensor
    """(c + 1,) long, where each class begins in the order, and the end."""
    widest: int
    """Keys of the largest class."""


def by_class(labels: Tensor, number: int) -> Classes:
    """Returns the keys' classes, for labels (n,) from 0 to below ``number``."""
    sizes = torch.bincount(labels, minlength=number)
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return Classes(labels, number, labels.argsort(stable=True), starts, int(sizes.max()))


def reference(features: Tensor, keys: Tensor, classes: Classes, beta: float) -> Tensor:
    """Returns the paper's formula; the yardstick of `class_votes`, with its shapes."""
    affinity = torch.exp(-beta * (1 - features @ keys.T))
    return affinity @ F.one_hot(classes.labels, classes.number).to(affinity.dtype)


def class_votes(features: Tensor, keys: Tensor, classes: Classes, beta: float, path: str | None = None) -> Tensor:
    """Returns the votes for each class, (m, c), at least float32.

    Args:
        features: (m, e), unit vectors.
        keys: (n, e), likewise.
        classes: of the keys.
        beta: how fast a vote falls with the distance.
        path: "library" or "triton"; None takes the fastest.
    """
    path = path or choose(features, keys, classes, beta)
    if path == LIBRARY:
        near = keys @ features.T  # keys first: a sum over a class adds whole rows
        return class_sums(near.to(torch.promote_types(near.dtype, torch.float32)), classes, beta).T
    from graft.kernels.class_votes_triton import fused

    labels, number, order, starts, widest = classes
    y: Tensor = fused(features.contiguous(), keys.contiguous(), labels, order, starts, beta, number, widest)
    return y


def class_sums(near: Tensor, classes: Classes, beta: float, room: Tensor | None = None) -> Tensor:
    """Returns the votes, (c, m), for cosines (n, m) that are known already; ``room`` (n, m) spares fresh memory."""
    if room is None:
        votes = torch.exp(beta * (near - 1))
    else:
        votes = torch.sub(near, 1, out=room).mul_(beta).exp_()
    if near.is_cuda:  # where index_add has no fixed order
        return F.one_hot(classes.labels, classes.number).to(votes.dtype).T @ votes
    return votes.new_zeros(classes.number, near.shape[1]).index_add(0, classes.labels, votes)


def supports(features: Tensor, keys: Tensor, classes: Classes) -> list[str]:
    """Returns why the Triton path cannot do this; nothing if it can."""
    reasons = refusals(features, keys, classes.labels)
    if keys.dtype != features.dtype:
        reasons.append(f"keys of {keys.dtype} for features of {features.dtype}")
    if classes.widest > 128:
        reasons.append(f"{classes.widest} keys in a class, of at most 128")
    return reasons


def choose(features: Tensor, keys: Tensor, classes: Classes, beta: float) -> str:
    """Returns the path that was fastest for this shape, measured with its backward if there will be one."""
    if not features.is_cuda or supports(features, keys, classes):
        return LIBRARY
    wanted = [each for each in (features, keys) if each.requires_grad and torch.is_grad_enabled()]

    def run(path: str) -> list[Tensor]:
        with torch.set_grad_enabled(bool(wanted)):
            y = class_votes(features, keys, classes, beta, path)
            return [y, *torch.autograd.grad(y, wanted, y.detach())] if wanted else [y]

    shape = (len(features), len(keys), features.shape[1], classes.number, classes.widest)
    key = ("class_votes", features.dtype, *shape, len(wanted))
    return fastest(key, {path: partial(run, path) for path in (LIBRARY, TRITON)}, features.device)
