"""The training task that a diffusion job hands to the loop: batches from caches, one denoiser call, one loss.

Everything frozen is computed before the first step: pictures are decoded once, latents kept as the VAE's posterior and
drawn anew at every step (so their distribution is that of encoding again), prompts tokenised once, and encoded once
where the text encoder does not change. A batch is a pure function of its generator. Several jobs on one base share a
batch, each with its own rows, noise and slot.

With `data.buckets` every batch is of one shape. A round is as many batches as it takes for every picture to
come equally often with batches that are full: r = b / gcd(b, pictures of each shape) times. In it each shape deals its
pictures out, one shuffled pack of them after the other, and the shapes take turns by lot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graft.diffusion.base import Condition, DiffusionBase
from graft.diffusion.objectives import Objective, weighted_mse
from graft.studio.batches import step_seed


class Drops(NamedTuple):
    """How often a row goes without what it could be told, so that guidance has something to compare with."""

    empty: int
    """Row of the prompt table that stands for no prompt."""
    prompt: float = 0.0
    """Share of rows without their prompt alone."""
    extras: float = 0.0
    """Without their extras alone, which are zeros then."""
    both: float = 0.0
    """Without both."""


@dataclass(frozen=True)
class Source:
    """Where some rows of every batch come from: p pictures in k variants."""

    mean: Tensor
    """(p, k, c, h, w) float32, mean of the latents' posterior."""
    std: Tensor
    """Its standard deviation, same shape."""
    prompts: list[list[int]]
    """Prompts of each picture, as rows of the task's prompt table; one is drawn at a time."""
    rows: int
    """Rows of every batch."""
    weight: float = 1.0
    """What its mean squared error counts in the loss."""
    slot: int = 0
    """Adapter that these rows train."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the denoiser is told of each picture, by name: (p, k, ...)."""
    drops: Drops | None = None
    """How often a row goes without its prompt or its extras; None never."""
    digest: str = ""
    """Digest of pictures that come from another folder than the job's own."""
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    """As extras, but never dropped."""
    places: Tensor | None = None
    """What each place of a latent counts in the loss, (p, k, 1, h, w); None: all the same."""
    wording: list[list[list[int]]] | None = None
    """Prompts of each variant, where these differ: taken in place of `prompts`."""
    shape: int = 0
    """Which of the task's shapes it has. Each shape has sources of the same rows."""
    objective: Objective | None = None
    """Draws its noise levels; None leaves it to the task's."""


class Batch(NamedTuple):
    """b rows drawn from the sources, on the CPU."""

    mean: Tensor
    """(b, c, h, w)."""
    std: Tensor
    """(b, c, h, w)."""
    redraw: Tensor
    """(b, c, h, w), normal: places the latents in their posterior."""
    noise: Tensor
    """(b, c, h, w), normal."""
    levels: Tensor
    """(b,), noise levels of the objective."""
    prompts: Tensor
    """(u,), rows of the prompt table that occur, each once."""
    prompt_of: Tensor
    """(b,), place of each row's prompt among them."""
    extras: dict[str, Tensor]
    """(b, ...) each."""
    places: Tensor | None = None
    """(b, 1, h, w), what each place counts; None: all the same."""


def row_slots(sources: Sequence[Source]) -> Tensor:
    """Slot of every row of a batch, (b,) long."""
    return torch.cat([torch.full((source.rows,), source.slot) for source in sources])


def dealt(counts: tuple[int, ...], rows: int, seed: int, number: int) -> tuple[int, Tensor]:
    """Shape of a batch, and the pictures in it, (rows,) long.

    Args:
        counts: pictures of each shape.
        rows: of a batch.
        seed: names the order.
        number: of the batch, counted over the whole training.
    """
    together = gcd(rows, *counts)
    turn, place = divmod(number, sum(counts) // together)
    turns, packs = _round(counts, together, rows // together, seed, turn)
    shape, before = int(turns[place]), int((turns[:place] == turns[place]).sum())
    return shape, packs[shape][before * rows : (before + 1) * rows]


@lru_cache(maxsize=4)
def _round(
    counts: tuple[int, ...], together: int, often: int, seed: int, turn: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The shape of each batch of a round, and the pictures that each shape deals in it, every one `often` times."""
    generator = torch.Generator().manual_seed(step_seed(seed, turn, 0, -1))  # no process has that rank
    packs = tuple(torch.cat([torch.randperm(n, generator=generator) for _ in range(often)]) for n in counts)
    turns = torch.cat([torch.full((n // together,), shape) for shape, n in enumerate(counts)])
    return turns[torch.randperm(len(turns), generator=generator)], packs


class DiffusionTask(nn.Module):
    """What the loop trains; `parameters()` and the saved state are those of the bank, the only child.

    Args:
        base: frozen, with the adapters attached.
        handle: of the attached adapters; `handle.bank` owns the trainable parameters.
        sources: of all jobs, in the order of the rows.
        objective: what is predicted.
        seed: names the order of pictures in rounds, which several shapes need; None draws each batch by itself.
        encode: rows of the prompt table (u,) -> what the denoiser is told of them, u rows of each tensor.
    """

    base: DiffusionBase
    bank: nn.Module
    shares: Tensor
    slots: Tensor

    def __init__(
        self,
        base: DiffusionBase,
        handle: Any,
        sources: Sequence[Source],
        objective: Objective,
        encode: Callable[[Tensor], Condition],
        seed: int | None = None,
    ):
        super().__init__()
        self.base, self.handle, self.bank = base, handle, handle.bank
        self.sources, self.objective, self.encode, self.seed = list(sources), objective, encode, seed
        self.denoise = getattr(handle, "denoise", base.denoise)
        self._share_out()
        self.jobs = 1 + max(source.slot for source in self.sources)

    def finish(self, slot: int) -> None:
        """Leaves a job's rows out of the batches to come."""
        self.sources = [source for source in self.sources if source.slot != slot]
        self._share_out()
        if hasattr(self.handle, "route"):
            self.handle.route(self.slots)

    @contextmanager
    def drawing_from(self, sources: Sequence[Source]) -> Iterator[None]:
        """Batches come from other sources for a while."""
        own, self.sources = self.sources, list(sources)
        try:
            self._share_out()
            if self.jobs > 1 and hasattr(self.handle, "route"):
                self.handle.route(self.slots)
            yield
        finally:
            self.sources = own
            self._share_out()
            if self.jobs > 1 and hasattr(self.handle, "route"):
                self.handle.route(self.slots)

    def _share_out(self) -> None:
        sources = [source for source in self.sources if source.shape == 0]
        shares = [torch.full((source.rows,), source.weight / source.rows) for source in sources]
        self.register_buffer("shares", torch.cat(shares).to(self.base.device), persistent=False)
        self.register_buffer("slots", row_slots(sources).to(self.base.device), persistent=False)

    def batch(self, step: int, *generators: torch.Generator) -> Batch:
        """Rows of one micro step: a pure function of its number and the states of the generators, one for each job."""
        sources, picks = self.sources, None
        if self.seed is not None:
            shapes = 1 + max(source.shape for source in sources)
            kinds = [[source for source in sources if source.shape == shape] for shape in range(shapes)]
            rows = kinds[0][0].rows  # the first source of a shape is that of the job's own pictures
            shape, picks = dealt(tuple(len(kind[0].mean) for kind in kinds), rows, self.seed, step)
            sources = kinds[shape]
        parts, extras, counts = [], [], []
        for number, source in enumerate(sources):
            row, more, count = self._draw(source, generators[source.slot], picks if number == 0 else None)
            parts.append(row)
            extras.append(more)
            counts.append(count)
        mean, std, redraw, noise, levels, prompts = (torch.cat(column) for column in zip(*parts, strict=True))
        unique, of_rows = prompts.unique(return_inverse=True)
        joined = {name: torch.cat([more[name] for more in extras]) for name in extras[0]}
        places = None
        if any(count is not None for count in counts):
            ones = [torch.ones(len(part[0]), 1, *part[0].shape[2:]) for part in parts]
            places = torch.cat([one if count is None else count for one, count in zip(ones, counts, strict=True)])
        return Batch(mean, std, redraw, noise, levels, unique, of_rows, joined, places)

    def _draw(
        self, source: Source, generator: torch.Generator, picks: Tensor | None
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor], Tensor | None]:
        pictures, variants = source.mean.shape[:2]
        rounds = -(-source.rows // pictures)
        if picks is None:
            # Without replacement as far as the pictures reach: no picture twice before every one came once.
            picks = torch.cat([torch.randperm(pictures, generator=generator) for _ in range(rounds)])[: source.rows]
        variant = torch.randint(variants, (source.rows,), generator=generator)
        # One template for the whole batch: a text encoder that learns has one prompt to encode, not one per row.
        dice = torch.rand((), generator=generator).item()
        choices = [source.prompts[i] for i in picks.tolist()]
        if source.wording is not None:
            choices = [source.wording[i][k] for i, k in zip(picks.tolist(), variant.tolist(), strict=True)]
        prompts = torch.tensor([choice[int(dice * len(choice))] for choice in choices])
        mean, std = source.mean[picks, variant], source.std[picks, variant]
        redraw, noise = torch.randn(2, *mean.shape, generator=generator)
        levels = (source.objective or self.objective).levels(source.rows, generator)
        extras = {name: values[picks, variant] for name, values in source.extras.items()}
        if source.drops is not None:
            empty, prompt, extra, both = source.drops
            luck = torch.rand(source.rows, generator=generator)
            prompts = prompts.masked_fill((luck < prompt) | (luck >= 1 - both), empty)
            kept = (luck < prompt) | (luck >= prompt + extra) & (luck < 1 - both)
            extras = {name: values * kept.view(-1, *[1] * (values.dim() - 1)) for name, values in extras.items()}
        extras |= {name: values[picks, variant] for name, values in source.facts.items()}
        places = None if source.places is None else source.places[picks, variant]
        return (mean, std, redraw, noise, levels, prompts), extras, places

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss: errors by the objective, averaged over the rows of a source and added up over sources.

        Jobs that share the batch also get the figure "loss", (jobs,): each its own part of that sum.
        """
        device = self.shares.device
        mean, std, redraw, noise = (part.to(device, non_blocking=True) for part in batch[:4])
        x0 = mean + std * redraw
        target = self.objective.target(x0, noise, batch.levels)
        told, dtype = self.encode(batch.prompts), self.base.dtype
        condition = {name: part[batch.prompt_of.to(device)].to(dtype) for name, part in told.items()}
        condition |= {name: part.to(device, dtype, non_blocking=True) for name, part in batch.extras.items()}
        noisy = self.objective.noisy(x0, noise, batch.levels).to(dtype)
        prediction = self.denoise(noisy, self.objective.timesteps(batch.levels).to(device), condition)
        places = None if batch.places is None else batch.places.to(device, non_blocking=True)
        errors = weighted_mse(prediction, target, self.objective.weights(batch.levels).to(device), places)
        shares = errors * self.shares
        if self.jobs == 1:
            return shares.sum(), {}
        return shares.sum(), {"loss": shares.detach().new_zeros(self.jobs).index_add(0, self.slots, shares.detach())}
