"""From jobs to the task that the loop trains: load the base, read the data, fill the caches, attach, probe."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.diffusion.base import load_base
from graft.diffusion.data import DataConfig, load_dataset
from graft.diffusion.method import PromptTable, Subject, Work
from graft.diffusion.precision import narrow
from graft.diffusion.previews import PreviewConfig, draw, grid, mixed, save_png, undisturbed
from graft.diffusion.task import DiffusionTask, row_slots
from graft.diffusion.textual_inversion import Concepts
from graft.studio.adapter import Adapter, Card
from graft.studio.caches import Cache
from graft.studio.config import from_dict, to_dict
from graft.studio.errors import InputError
from graft.studio.registry import method_class

if TYPE_CHECKING:
    from graft.studio.job import Job

log = logging.getLogger(__name__)


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
        own = getattr(self.handle, "details", {})
        return {"base": self.base.name, "base_hash": self.base.hash, "data_digest": data, **own}

    def param_groups(self) -> list[dict[str, Any]]:
        """One group, or those of the method, with the method's weight decay."""
        groups = self.handle.param_groups() if hasattr(self.handle, "param_groups") else [{}]
        usual = {"params": list(self.bank.parameters()), "weight_decay": self.subjects[0].method.weight_decay}
        return [usual | group for group in groups]

    def owned(self) -> list[tuple[nn.Parameter, int | None]]:
        """As the handle says; else all are stacks over the jobs."""
        if hasattr(self.handle, "owned"):
            return self.handle.owned()  # type: ignore[no-any-return]
        return [(parameter, None) for parameter in self.bank.parameters()]

    def sample(self, step: int, folder: Path) -> list[Path]:
        """Draws every job's prompts as they are now; modes, generators and routes stay as they were."""
        files = []
        for slot, subject in enumerate(self.subjects):
            prompts, seeds, config = sample_settings(subject)
            with undisturbed(self.base, self), self._alone(slot):
                if hasattr(self.handle, "samples"):
                    blocks = self.handle.samples(prompts, seeds, config)
                else:
                    drawn = draw(self.base, [self._inner(slot, prompt) for prompt in prompts], seeds, config)
                    shown = self.handle.tiles(len(prompts)) if hasattr(self.handle, "tiles") else {}
                    blocks = {**shown, f"step {step}": drawn}
                picture = grid(blocks, prompts, seeds)
            name = f"step-{step:06d}" + (f"-{slot}" if len(self.subjects) > 1 else "")
            files.append(save_png(Path(folder) / f"{name}.png", picture))
        return files

    def _inner(self, slot: int, prompt: str) -> str:
        """The prompt with the word that the job's concept has inside a shared task."""
        if hasattr(self.handle, "spoken"):
            return str(self.handle.spoken(slot, prompt))
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
            details=getattr(self.handle, "details", {}),
        )
        return Adapter(self.handle.tensors(slot), card)


def sample_settings(subject: Subject) -> tuple[list[str], list[int], PreviewConfig]:
    """Prompts, seeds and settings of a job's samples; the method's first prompt when it names none."""
    sample = subject.job.sample
    prompts = list(sample.prompts) or subject.method.sample_prompts(subject.dataset)
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
        jobs: of one base, and one method with equal hyper-parameters.

    Raises:
        InputError: jobs that cannot share a batch, or anything wrong with base, data or method.
    """
    methods = [_method(job) for job in jobs]
    _check_sharing(jobs, methods)
    base = load_base(jobs[0].base, jobs[0].train.device, attention=jobs[0].train.attention)
    cache = Cache()
    subjects = []
    for job, method in zip(jobs, methods, strict=True):
        data = from_dict(DataConfig, dict(job.data), "data")
        subjects.append(Subject(job, method, data, load_dataset(data, base.side(data.resolution), cache)))
    tokens = base.tokens(subjects[0].dataset.pixels.shape[-1])
    objective = methods[0].objective(base.pipe.scheduler, tokens)
    table = PromptTable()
    sources = [
        source
        for slot, subject in enumerate(subjects)
        for source in subject.method.sources(base, subject, slot, table, cache)
    ]
    handle, encode = methods[0].attach_jobs(Work(base, subjects, table, sources, cache))
    if "unet" in base.modules:  # half of its work is convolutions, a twentieth faster so
        nn.Module.to(base.denoiser, memory_format=torch.channels_last)
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
        return task(task.batch(0, *(torch.Generator().manual_seed(0) for _ in task.subjects)))[0]


def _method(job: Job) -> Any:
    section = dict(job.method)
    name = str(section.pop("name"))
    return from_dict(method_class("diffusion", name), section, "method")


def _check_sharing(jobs: Sequence[Job], methods: Sequence[Any]) -> None:
    """Refuses jobs that would need different computations in one batch."""
    needs = [
        {
            "base": job.base,
            "data.resolution": job.data.get("resolution", 0),
            "sample.every": job.sample.every,
            "method": (type(method), {k: v for k, v in to_dict(method).items() if k not in method.own}),
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
