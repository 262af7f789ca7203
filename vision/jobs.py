"""From a job to the task that the loop trains: load the base, read the split, open the pictures, attach, probe."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.studio.caches import Cache
from graft.studio.config import from_dict
from graft.studio.labelled.sources import open_source
from graft.studio.labelled.splits import make_split, refuse_contradictions
from graft.studio.registry import kept, method_class
from graft.vision.base import VisionBase, attend_fused, load_base
from graft.vision.data import DataConfig, load_part
from graft.vision.task import Batch, FitData, VisionTask

if TYPE_CHECKING:
    from graft.studio.job import Job

log = logging.getLogger(__name__)
PLAIN_TOKENS = 360
"""Patches up to which attention is plain on a CPU in 16 bits."""


def fit_data(config: DataConfig, base: VisionBase, cache: Cache) -> FitData:
    """Opens the training and validation pictures of a config, as the base wants them. Test pictures stay closed.

    Raises:
        DataError: anything wrong with the data.
    """
    source = open_source(config)
    split = make_split(source, config)
    opened = {
        part: load_part(
            source, split.part(part), split.classes, base.pixels, base.preprocessing, cache, config.background
        )
        for part in ("train", "val")
    }
    for part in opened.values():
        split = split.with_digests(part.names, part.digests)
    refuse_contradictions(split, source.where)
    return FitData(split, opened["train"], opened["val"], config.augment)


def prepare(job: Job, run_folder: Path | None = None) -> VisionTask:
    """The task of one job, ready for its first step.

    Raises:
        InputError: anything wrong with base, data or method; nothing has been trained then.
    """
    section = dict(job.method)
    name = str(section.pop("name"))
    method: Any = from_dict(method_class("vision", name), section, "method")
    base, cache = kept(load_base, job.base, job.train.device, job.train.attention), Cache()
    _ = base.hash  # before anything is attached
    data = fit_data(from_dict(DataConfig, dict(job.data), "data"), base, cache)
    narrow = base.device.type == "cpu" and job.train.mixed_precision in ("bf16", "fp16")
    if narrow and job.train.attention == "auto":
        attend_plainly(base)
    handle = method.on(base.model, data.classes)
    try:
        handle.reset(0, job.train.seed)
        task = VisionTask(base, handle, method, data, job.train.batch_size, job.train.weight_decay)
        task.name = name
        if method.head_start == "probe":
            task.start_head()
        handle.probe(partial(_first_loss, task))
    except BaseException:
        handle.detach()
        raise
    trained = sum(parameter.numel() for parameter in task.parameters())
    log.info(
        "%d classes, %d pictures to train on and %d to validate on, %s parameters; cache: %s",
        len(data.classes), len(data.train), len(data.val), f"{trained:,}", cache,
    )  # fmt: skip
    return task


def attend_plainly(base: VisionBase) -> None:
    """Takes plain products for short sequences of tokens: on a CPU the fused kernel is slow in 16 bits.

    Forward and backward of `pocket-vit` (65 tokens) with LoRA, batch 32, bfloat16, one thread of a Xeon with AMX: fused
    0.35 s, plain 0.19 s. In float32 there is no difference.
    """
    patches = int(getattr(getattr(base.model, "patch_embed", None), "num_patches", PLAIN_TOKENS + 1))
    if patches <= PLAIN_TOKENS:
        attend_fused(base, False)


def _first_loss(task: VisionTask) -> Tensor:
    """The loss of a few rows; of a frozen model's features if these are what is trained on."""
    batch = task.batch(0, torch.Generator().manual_seed(0))
    return task(Batch(batch.inputs[:4], batch.labels[:4]))[0]
