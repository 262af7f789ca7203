"""The loss on pictures that are not trained on, always with the same noise at the same noise levels.

A training loss jumps with the noise level that each row happens to have; this one does not, so that two steps, two
adapters and two days can be compared. Which pictures are held out depends on their bytes alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.diffusion.data import Dataset, Picture
from graft.diffusion.method import PromptTable, latents
from graft.diffusion.objectives import objective_for
from graft.diffusion.previews import mixed, undisturbed
from graft.diffusion.task import DiffusionTask, Source
from graft.studio.caches import Cache
from graft.studio.errors import InputError

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase

ROWS = 32
"""Rows at once, and at least: of fewer pictures each is measured with several noises."""


def held_out(pictures: Sequence[Picture], share: float) -> list[int]:
    """Places of the pictures that a share holds out, in order: at least one, and not all.

    Raises:
        InputError: one picture cannot be both trained on and held out.
    """
    if len(pictures) < 2:
        reason = "a folder with one picture has none to hold out"
        raise InputError(f"data.validation = {share}", reason, "Give a folder of other pictures, or 0")
    count = min(max(1, round(share * len(pictures))), len(pictures) - 1)
    return sorted(sorted(range(len(pictures)), key=lambda place: pictures[place].digest)[:count])


def part(source: Source, places: Sequence[int]) -> Source:
    """Some pictures of a source."""
    which = torch.tensor(list(places))
    return replace(
        source,
        mean=source.mean[which],
        std=source.std[which],
        prompts=[source.prompts[place] for place in places],
        extras={name: values[which] for name, values in source.extras.items()},
        facts={name: values[which] for name, values in source.facts.items()},
        places=None if source.places is None else source.places[which],
        wording=None if source.wording is None else [source.wording[place] for place in places],
    )


def subset(dataset: Dataset, places: Sequence[int]) -> Dataset:
    """Some pictures of a data set."""
    which = list(places)
    return Dataset(
        [dataset.pictures[k] for k in which],
        dataset.pixels[which],
        [dataset.keys[k] for k in which],
        dataset.sizes[which],
        None if dataset.masks is None else dataset.masks[which],
        None if dataset.wording is None else [dataset.wording[k] for k in which],
    )


def fixed_noise_loss(task: DiffusionTask, source: Source) -> float:
    """Mean loss of a source's pictures, told everything: the same number at every call, as long as nothing learns."""
    count, total = len(source.mean), 0.0
    rounds = max(1, ROWS // count)
    with undisturbed(task.base, task), mixed(task.base):
        for start in range(0, count, ROWS):
            some = part(source, range(start, min(start + ROWS, count)))
            rows = len(some.mean)
            with task.drawing_from([replace(some, rows=rows, weight=1.0, drops=None)]):
                for number in range(rounds):
                    generators = [torch.Generator().manual_seed(1000 * start + number) for _ in range(task.jobs)]
                    total += float(task(task.batch(0, *generators))[0]) * rows / rounds
    return total / count


def drawing_loss(
    base: DiffusionBase, handle: Any, dataset: Dataset, word: str, extras: Mapping[str, Tensor] | None = None
) -> float:
    """`fixed_noise_loss` of what is attached, on pictures with their captions; all noise levels count alike.

    Args:
        base: frozen.
        handle: of the attached adapter; None for the base alone.
        dataset: the pictures; those without a caption are "a photo of" the word.
        word: stands for `{token}`.
        extras: what else the denoiser is told of each picture, as in `Source`.
    """
    table, posterior = PromptTable(), latents(base, dataset, Cache())
    told = [(each.caption or "a photo of {token}").replace("{token}", word) for each in dataset.pictures]
    prompts = [table.rows(0, [text]) for text in told]
    source = Source(posterior["mean"], posterior["std"], prompts, 1, extras=extras or {})
    objective = objective_for(base.pipe.scheduler, None, base.tokens(dataset.pixels.shape[-1]))
    ids = base.tokenize([text for _, text in table.entries])
    handle = handle or SimpleNamespace(bank=nn.Module())
    task = DiffusionTask(base, handle, [source], objective, lambda rows: base.condition(ids[rows]))
    return fixed_noise_loss(task, source)
