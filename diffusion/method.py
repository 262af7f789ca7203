"""What a diffusion method tells the task that trains it: its prompts, its rows of the batch, and what it attaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from graft.diffusion.base import Condition, DiffusionBase
from graft.diffusion.data import DataConfig, Dataset, Picture, loss_weights
from graft.diffusion.objectives import Objective, objective_for
from graft.diffusion.task import Source
from graft.studio.caches import Cache, content_key

if TYPE_CHECKING:
    from graft.studio.job import Job

Encode = Callable[[Tensor], Condition]
"""Rows of the prompt table (u,) -> what the denoiser is told of them, u rows of each tensor."""


@dataclass(frozen=True)
class Subject:
    """One job, read and checked."""

    job: Job
    """As given."""
    method: Any
    """Its method section."""
    data: DataConfig
    """Its data section."""
    datasets: Sequence[Dataset]
    """Its pictures, a set for each shape, that with most of them first."""
    shape: int = 0
    """Which of the sets is `dataset`."""

    @property
    def dataset(self) -> Dataset:
        """The pictures of one shape."""
        return self.datasets[self.shape]

    @property
    def pictures(self) -> list[Picture]:
        """All pictures."""
        return [picture for dataset in self.datasets for picture in dataset.pictures]

    def share(self, count: int) -> int:
        """How many of `count` further pictures `dataset` gets, as large is its part of the job's own; at least one."""
        return -(-count * len(self.dataset.pictures) // len(self.pictures))

    @property
    def digest(self) -> str:
        """Of all its data."""
        digests = [dataset.digest for dataset in self.datasets]
        return digests[0] if len(digests) == 1 else content_key(digests)


class PromptTable:
    """All prompts of a task by slot, each once; tokenised once, when it is complete."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, str]] = []
        self._places: dict[tuple[int, str], int] = {}

    def rows(self, slot: int, prompts: Sequence[str]) -> list[int]:
        """Rows of a slot's prompts; new ones are added."""
        for prompt in prompts:
            if (slot, prompt) not in self._places:
                self._places[slot, prompt] = len(self.entries)
                self.entries.append((slot, prompt))
        return [self._places[slot, prompt] for prompt in prompts]


class Work(NamedTuple):
    """All that jobs in one batch are trained from."""

    base: DiffusionBase
    """Frozen; nothing is attached yet."""
    subjects: Sequence[Subject]
    """One per slot."""
    table: PromptTable
    """Every prompt that occurs."""
    sources: Sequence[Source]
    """Of all rows."""
    cache: Cache
    """Of what is frozen."""


class DiffusionMethod:
    """What every method of this domain has; a method is also the frozen dataclass of its settings."""

    own: ClassVar[frozenset[str]] = frozenset({"trigger"})
    """Settings in which jobs that share a batch may differ."""
    default_learning_rate: ClassVar[float]
    """Peak learning rate where the job names none."""
    weight_decay: ClassVar[float] = 0.0
    """Of AdamW. It would pull a word's rows to the origin."""
    trigger: str
    """The word that calls the concept."""
    snr_gamma: float | None
    """Min-SNR's gamma; None weights all noise levels equally."""

    @property
    def rescales(self) -> bool:
        """Whether the variants of a picture are shown smaller and larger."""
        return False

    def prompts(self, caption: str | None) -> list[str]:
        """Training prompts of a picture with this caption, of which each step draws one."""
        raise TypeError(f"{type(self).__name__} must define prompts")

    def sample_prompts(self, dataset: Dataset) -> list[str]:
        """What is drawn on the way when the job does not say."""
        return self.prompts(None)[:2]

    def sources(
        self, base: DiffusionBase, subject: Subject, slot: int, table: PromptTable, cache: Cache
    ) -> Iterator[Source]:
        """Yields where the rows of a job's batch come from: the pictures of `subject.dataset` first, then what a method
        adds. It is called for each shape of pictures, and what it adds is of that shape too."""
        prompts = [table.rows(slot, self.prompts(picture.caption)) for picture in subject.dataset.pictures]
        posterior = latents(base, subject.dataset, cache)
        yield Source(posterior["mean"], posterior["std"], prompts, subject.job.train.batch_size, slot=slot)

    def objective(self, scheduler: Any, tokens: int) -> Objective:
        """What is predicted, as the base's scheduler was trained, on pictures of so many tokens."""
        return objective_for(scheduler, self.snr_gamma, tokens)

    @classmethod
    def attach_jobs(cls, work: Work) -> tuple[Any, Encode]:
        """Attaches what all jobs train, a slot each, and returns its handle and the way from prompts to conditions.

        A handle has `bank`, `tensors(slot)`, `probe`, `detach`, and `denoise(noisy, timesteps, condition)` if the
        denoiser is to be called in another way than `DiffusionBase.denoise`. It may have `param_groups()` and
        `owned()` for the loop, `details` for the card, `tiles(prompts, seeds)`, what samples of so many show beside
        pictures, or `samples(prompts, seeds, config)`, which draws these.
        """
        raise TypeError(f"{cls.__name__} must define attach_jobs")


def all_sources(base: DiffusionBase, subject: Subject, slot: int, table: PromptTable, cache: Cache) -> Iterator[Source]:
    """Yields the method's sources for every shape of pictures, with what the data say of them."""
    for shape, dataset in enumerate(subject.datasets):
        own, *others = subject.method.sources(base, replace(subject, shape=shape), slot, table, cache)
        h, w = dataset.pixels.shape[-2:]
        facts = {"sizes": dataset.sizes} if base.told_sizes else {}
        places = None
        if dataset.masks is not None:
            latent = (own.mean.shape[-2], own.mean.shape[-1])
            places = loss_weights(dataset.masks, latent, subject.data.mask_outside)
        levels = subject.method.objective(base.pipe.scheduler, tokens(base, h, w))
        yield replace(own, shape=shape, facts=facts, places=places, objective=levels)
        whole = torch.tensor([h, w, 0, 0, h, w], dtype=torch.float32)
        for other in others:
            facts = {"sizes": whole.expand(*other.mean.shape[:2], -1)} if base.told_sizes else {}
            yield replace(other, shape=shape, facts=facts, objective=levels)


def tokens(base: DiffusionBase, height: int, width: int) -> int:
    """What a picture is to a transformer; 0 where the noise levels do not depend on it."""
    return base.tokens(base.step) * (height // base.step) * (width // base.step)


def latents(base: DiffusionBase, dataset: Dataset, cache: Cache) -> dict[str, Tensor]:
    """The posterior of every variant, from the cache: `mean` and `std`, each (p, k, c, h, w)."""
    config = base.pipe.vae.config
    vae = [base.part_hashes["vae"], config.get("scaling_factor"), config.get("shift_factor")]
    rows = []
    for keys, pixels in zip(dataset.keys, dataset.pixels, strict=True):
        row = [
            cache.get("latents", content_key("latents-2", key, vae), partial(base.posterior, p[None]))
            for key, p in zip(keys, pixels, strict=True)
        ]
        rows.append({name: torch.cat([entry[name] for entry in row]) for name in ("mean", "std")})
    return {name: torch.stack([row[name] for row in rows]) for name in ("mean", "std")}


@torch.no_grad()
def encoded(base: DiffusionBase, prompts: Sequence[str], cache: Cache) -> Condition:
    """What the denoiser is told of prompts by a text encoder that does not change, from the cache; (u, ...) each."""
    encoders = [value for name, value in base.part_hashes.items() if name.startswith("text_encoder")]
    entries = [
        cache.get("text", content_key("text-2", row.tolist(), encoders), partial(base.condition, row[None]))
        for row in base.tokenize(list(prompts))
    ]
    return {name: torch.cat([entry[name] for entry in entries]).to(base.device) for name in entries[0]}
