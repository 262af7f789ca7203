"""From jobs to the task that the loop trains: load the base, read the data, fill the caches, attach, probe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.diffusion.base import Condition, DiffusionBase, load_base
from graft.diffusion.data import DataConfig, Dataset, load_dataset
from graft.diffusion.lora import class_latents
from graft.diffusion.objectives import objective_for
from graft.diffusion.precision import narrow
from graft.diffusion.previews import PreviewConfig, draw, grid, mixed, save_png, undisturbed
from graft.diffusion.task import DiffusionTask, Source, row_slots
from graft.diffusion.textual_inversion import Concepts, TextualInversion, attach_concepts
from graft.studio.adapter import Adapter, Card
from graft.studio.caches import Cache, content_key
from graft.studio.config import from_dict, to_dict
from graft.studio.errors import InputError
from graft.studio.registry import method_class

if TYPE_CHECKING:
    from graft.studio.job import Job

log = logging.getLogger(__name__)
OWN = frozenset({"token", "trigger", "initializer", "jitter", "vectors", "templates", "class_prompt"})
"""Method fields in which jobs that share a batch may differ."""
Encode = Callable[[Tensor], Condition]


@dataclass(frozen=True)
class Subject:
    """One job, read and checked."""

    job: Job
    """As given."""
    method: Any
    """Its method section."""
    data: DataConfig
    """Its data section."""
    dataset: Dataset
    """Its pictures."""


class PromptTable:
    """All prompts of a task by slot, each once; tokenised once, when it is complete."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, str]] = []

    def rows(self, slot: int, prompts: Sequence[str]) -> list[int]:
        """Rows of a slot's prompts; new ones are added."""
        self.entries += [(slot, p) for p in dict.fromkeys(prompts) if (slot, p) not in self.entries]
        return [self.entries.index((slot, prompt)) for prompt in prompts]


class ConceptTask(DiffusionTask):
    """A task that knows its jobs: it draws their samples and makes their adapters."""

    subjects: list[Subject]
    """One per slot."""

    @property
    def default_learning_rate(self) -> float:
        """The method's own."""
        return float(self.subjects[0].method.default_learning_rate)

    def origin(self) -> dict[str, str]:
        """Digests of the base and of each job's pictures and captions."""
        data = ",".join(subject.dataset.digest for subject in self.subjects)
        return {"base": self.base.name, "base_hash": self.base.hash, "data_digest": data}

    def param_groups(self) -> list[dict[str, Any]]:
        """One group without weight decay, which would pull a word's rows to the origin."""
        return [{"params": list(self.bank.parameters()), "weight_decay": 0.0}]

    def gradients(self) -> list[list[Tensor]]:
        """The gradients of every job, which are clipped each by their own norm."""
        return [_gradients(self.handle, slot) for slot in range(len(self.subjects))]

    def sample(self, step: int, folder: Path) -> list[Path]:
        """Draws every job's prompts as they are now; modes, generators and routes stay as they were."""
        files = []
        for slot, subject in enumerate(self.subjects):
            prompts, seeds, config = sample_settings(subject)
            with undisturbed(self.base, self), self._alone(slot):
                drawn = draw(self.base, [self._inner(slot, prompt) for prompt in prompts], seeds, config)
                picture = grid({f"step {step}": drawn}, prompts, seeds)
            name = f"step-{step:06d}" + (f"-{slot}" if len(self.subjects) > 1 else "")
            files.append(save_png(Path(folder) / f"{name}.png", picture))
        return files

    def _inner(self, slot: int, prompt: str) -> str:
        """The prompt with the word that the job's concept has inside a shared task."""
        if not isinstance(self.handle, Concepts):
            return prompt
        return prompt.replace(self.subjects[slot].method.token, self.handle.methods[slot].token)

    @contextmanager
    def _alone(self, slot: int) -> Iterator[None]:
        """Sends every row to one slot, however many rows the pipeline makes of a prompt."""
        if len(self.subjects) == 1 or isinstance(self.handle, Concepts):
            yield
            return
        hooks = [
            module.register_forward_pre_hook(lambda m, args, kw: self._route_all(slot, args, kw), with_kwargs=True)
            for name, module in self.base.modules.items()
            if module is self.base.denoiser or name.startswith("text_encoder")
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.handle.route(row_slots(self.sources))

    def _route_all(self, slot: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        self.handle.route(torch.full((len(first),), slot))

    def adapter(self, metrics: dict[str, Any], slot: int = 0) -> Adapter:
        """What a job has learnt so far."""
        subject, plan = self.subjects[slot], getattr(self.handle, "plan", None)
        card = Card(
            method=subject.job.method["name"],
            config=to_dict(subject.method),
            domain="diffusion",
            base=self.base.name,
            base_hash=self.base.hash,
            sites=plan.to_list() if plan is not None else [],
            metrics=metrics,
            data_digest=subject.dataset.digest,
            trigger=subject.method.trigger,
        )
        return Adapter(self.handle.tensors(slot), card)


def sample_settings(subject: Subject) -> tuple[list[str], list[int], PreviewConfig]:
    """Prompts, seeds and settings of a job's samples; the method's first prompt when it names none."""
    sample = subject.job.sample
    prompts = list(sample.prompts) or subject.method.prompts(None)[:2]
    config = PreviewConfig(steps=sample.steps, guidance=sample.guidance, resolution=subject.data.resolution)
    return [p.replace("{token}", subject.method.trigger) for p in prompts], list(sample.seeds), config


def prepare(job: Job, run_folder: Path | None = None) -> ConceptTask:
    """The task of one job, ready for its first step.

    Raises:
        InputError: anything wrong with base, data or method; nothing has been trained then.
    """
    return prepare_together([job])


def prepare_together(jobs: Sequence[Job]) -> ConceptTask:
    """One task for several jobs on the same base: every step has each job's own rows, noise and slot.

    Each ends as if it were trained alone, up to the rounding of sums in the type of the forward pass.

    Args:
        jobs: of one base, one method with equal hyper-parameters, and equal training sections.

    Raises:
        InputError: jobs that cannot share a batch, or anything wrong with base, data or method.
    """
    methods = [_method(job) for job in jobs]
    _check_sharing(jobs, methods)
    base = load_base(jobs[0].base, jobs[0].train.device, attention=jobs[0].train.attention)
    objective, cache = objective_for(base.pipe.scheduler, methods[0].snr_gamma), Cache()
    subjects = []
    for job, method in zip(jobs, methods, strict=True):
        data = from_dict(DataConfig, dict(job.data), "data")
        subjects.append(Subject(job, method, data, load_dataset(data, base.side(data.resolution), cache)))
    table = PromptTable()
    attach = _attach_words if isinstance(methods[0], TextualInversion) else _attach_lora
    sources = [
        source for slot, subject in enumerate(subjects) for source in _sources(base, subject, slot, table, cache)
    ]
    handle, encode = attach(base, subjects, table, sources, cache)
    narrow(base, jobs[0].train.mixed_precision)
    task = ConceptTask(base, handle, sources, objective, encode)
    task.subjects = subjects
    log.info("cache: %s", cache)
    try:
        handle.probe(partial(_first_loss, task))
    except InputError:
        handle.detach()
        raise
    return task


def _first_loss(task: ConceptTask) -> Tensor:
    with mixed(task.base):
        return task(task.batch(0, torch.Generator().manual_seed(0)))[0]


def _method(job: Job) -> Any:
    section = dict(job.method)
    name = str(section.pop("name"))
    return from_dict(method_class("diffusion", name), section, "method")


def _check_sharing(jobs: Sequence[Job], methods: Sequence[Any]) -> None:
    """Refuses jobs that would need different computations in one batch."""
    needs = [
        {
            "base": job.base,
            "train": job.train,
            "data.resolution": job.data.get("resolution", 0),
            "sample.every": job.sample.every,
            "method": (type(method), {k: v for k, v in to_dict(method).items() if k not in OWN}),
        }
        for job, method in zip(jobs, methods, strict=True)
    ]
    dropout = to_dict(methods[0]).get("dropout", 0)
    if len(jobs) > 1 and dropout:
        raise InputError(f"dropout = {dropout}", "a shared batch has other masks", "train the jobs alone")
    for job, need in zip(jobs, needs, strict=True):
        for name, value in need.items():
            if value != needs[0][name]:
                raise InputError(f"job {job.name}", f"its {name} differs from the first job's", "train it alone")


def latents(base: DiffusionBase, dataset: Dataset, cache: Cache) -> dict[str, Tensor]:
    """The posterior of every variant, from the cache: `mean` and `std`, each (p, k, c, h, w)."""
    config = base.pipe.vae.config
    vae = [base.part_hashes["vae"], config.scaling_factor, config.get("shift_factor")]
    rows = []
    for keys, pixels in zip(dataset.keys, dataset.pixels, strict=True):
        row = [
            cache.get("latents", content_key("latents-2", key, vae), partial(base.posterior, p[None]))
            for key, p in zip(keys, pixels, strict=True)
        ]
        rows.append({name: torch.cat([entry[name] for entry in row]) for name in ("mean", "std")})
    return {name: torch.stack([row[name] for row in rows]) for name in ("mean", "std")}


def _sources(base: DiffusionBase, subject: Subject, slot: int, table: PromptTable, cache: Cache) -> Iterator[Source]:
    """A job's pictures and, for prior preservation, its class pictures."""
    method, rows = subject.method, subject.job.train.batch_size
    prompts = [table.rows(slot, method.prompts(picture.caption)) for picture in subject.dataset.pictures]
    posterior = latents(base, subject.dataset, cache)
    yield Source(posterior["mean"], posterior["std"], prompts, rows, slot=slot)
    class_prompt = getattr(method, "class_prompt", None)
    if class_prompt is not None:
        side = subject.dataset.pixels.shape[-1]
        prior = class_latents(base, class_prompt, method.class_pictures, side, cache)
        prompts = [table.rows(slot, [class_prompt])] * method.class_pictures
        yield Source(prior["mean"][:, None], prior["std"][:, None], prompts, rows, method.prior_weight, slot)


def _gradients(handle: Any, slot: int) -> list[Tensor]:
    if isinstance(handle, Concepts):  # a parameter per word; elsewhere a stack over slots
        return [grad for grad in (handle.bank.rows[slot].grad,) if grad is not None]
    return [p.grad[slot] for p in handle.bank.parameters() if p.grad is not None]


def _attach_words(
    base: DiffusionBase, subjects: Sequence[Subject], table: PromptTable, sources: Sequence[Source], cache: Cache
) -> tuple[Any, Encode]:
    """Textual Inversion: the text encoder runs at every step, on the few prompts that occur."""
    methods = [subject.method for subject in subjects]
    # Jobs may have chosen the same word: in a shared batch each gets one of its own.
    inner = methods if len(methods) == 1 else [replace(m, token=f"<graft-{i}>") for i, m in enumerate(methods)]
    handle = attach_concepts(base, inner, [subject.job.train.seed for subject in subjects])
    ids = base.tokenize([text.replace(methods[slot].token, inner[slot].token) for slot, text in table.entries])
    known = len(base.tokenizer) - sum(method.vectors for method in methods)
    for (_, text), row in zip(table.entries, ids, strict=True):
        if not bool((row >= known).any()):
            handle.detach()
            reason = f"it is cut off after {ids.shape[1]} tokens, before the word to learn"
            raise InputError(f"caption {text!r}", reason, "Shorten it, or put the word first")
    return handle, lambda rows: base.condition(ids[rows])


def _attach_lora(
    base: DiffusionBase, subjects: Sequence[Subject], table: PromptTable, sources: Sequence[Source], cache: Cache
) -> tuple[Any, Encode]:
    """LoRA: text embeddings come from the cache unless the text encoder is adapted too."""
    method = subjects[0].method
    ids, slots = base.tokenize([text for _, text in table.entries]), torch.tensor([slot for slot, _ in table.entries])
    frozen = None if method.text_encoder else _text(base, ids, cache)
    handle = method.attach(base.modules, slots=len(subjects))
    for slot, subject in enumerate(subjects):
        handle.reset(slot, subject.job.train.seed)
    rows_of_batch = row_slots(sources) if len(subjects) > 1 else None
    handle.route(rows_of_batch)
    if frozen is not None:
        return handle, lambda rows: {name: part[rows.to(part.device)] for name, part in frozen.items()}

    def encode(rows: Tensor) -> Condition:
        """The text encoder sees prompts, the denoiser rows: each gets its own route."""
        if rows_of_batch is None:
            return base.condition(ids[rows])
        handle.route(slots[rows])
        condition = base.condition(ids[rows])
        handle.route(rows_of_batch)
        return condition

    return handle, encode


@torch.no_grad()
def _text(base: DiffusionBase, ids: Tensor, cache: Cache) -> Condition:
    """What the denoiser is told of all prompts."""
    encoders = [value for name, value in base.part_hashes.items() if name.startswith("text_encoder")]
    entries = [
        cache.get("text", content_key("text-2", row.tolist(), encoders), partial(base.condition, row[None]))
        for row in ids
    ]
    return {name: torch.cat([entry[name] for entry in entries]).to(base.device) for name in entries[0]}
