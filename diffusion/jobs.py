"""From jobs to the task that the loop trains: load the base, read the data, fill the caches, attach, probe."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.diffusion.base import load_base
from graft.diffusion.data import DataConfig, Dataset, load_buckets
from graft.diffusion.evaluation import EvaluationConfig, FollowerYardstick, measured_on
from graft.diffusion.map_networks import MapMethod
from graft.diffusion.method import PromptTable, Subject, Work, all_sources
from graft.diffusion.objectives import objective_for
from graft.diffusion.pair import Yardstick
from graft.diffusion.precision import narrow
from graft.diffusion.previews import (
    Pictures,
    PreviewConfig,
    draw,
    fader,
    grid,
    grow_sheet,
    mixed,
    save_png,
    undisturbed,
)
from graft.diffusion.task import DiffusionTask, Source, row_slots
from graft.diffusion.textual_inversion import Concepts
from graft.diffusion.validation import fixed_noise_loss, held_out, part, subset
from graft.studio.adapter import Adapter, Card
from graft.studio.caches import Cache, content_key
from graft.studio.config import from_dict, to_dict
from graft.studio.errors import InputError
from graft.studio.registry import kept, method_class

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase
    from graft.studio.job import Job

log = logging.getLogger(__name__)


class ConceptTask(DiffusionTask):
    """A task that knows its jobs: it draws their samples and makes their adapters."""

    subjects: list[Subject]
    """One per slot."""
    digests: list[str]
    """Of the pictures that each job learns from, those of classes too."""
    validation: list[Source]
    """Held-out pictures of each, or nothing."""
    plain: list[dict[str, Pictures]]
    """What the base draws for the samples of each, to be shown beside them."""
    yardsticks: list[Yardstick | FollowerYardstick]
    """What the pair of each is measured by, or nothing."""

    @property
    def default_learning_rate(self) -> float:
        """The method's own."""
        return float(self.subjects[0].method.default_learning_rate)

    def origin(self) -> dict[str, str]:
        """Digests of the base and of each job's pictures and captions."""
        data = ",".join(self.digests)
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
                shown = self.handle.tiles(len(prompts), len(seeds)) if hasattr(self.handle, "tiles") else {}
                blocks = {**shown, **self.plain[slot], **self._by_strength(slot, step, prompts, seeds, config)}
                picture = grid(blocks, prompts, seeds)
            ending = f"-{slot}" if len(self.subjects) > 1 else ""
            files.append(save_png(Path(folder) / f"step-{step:06d}{ending}.png", picture))
            grow_sheet(Path(folder), ending)
        return files

    def _by_strength(
        self, slot: int, step: int, prompts: Sequence[str], seeds: Sequence[int], config: PreviewConfig
    ) -> dict[str, Pictures]:
        blocks, fade = {}, fader(self.handle, slot)
        try:
            for strength in self.subjects[slot].job.sample.strengths:
                fade(strength)
                name = f"step {step}" + (f" x {strength:g}" if strength != 1 else "")
                blocks[name] = self._drawn(slot, prompts, seeds, config)
        finally:
            fade(1.0)
        return blocks

    def validate(self) -> dict[str, list[float]]:
        """The loss of every job's held-out pictures, always at the same noise."""
        told = []
        for slot in range(len(self.subjects)):
            own = [source for source in self.validation if source.slot == slot]
            losses = [fixed_noise_loss(self, source) * len(source.mean) for source in own]
            told.append(sum(losses) / sum(len(source.mean) for source in own))
        return {"validation_loss": told}

    def measure(self) -> dict[str, list[float]]:
        """Fidelity, alignment and their score for every job, as it is now."""
        rows = []
        for slot, (subject, yardstick) in enumerate(zip(self.subjects, self.yardsticks, strict=True)):
            with undisturbed(self.base, self), self._alone(slot):
                if isinstance(yardstick, FollowerYardstick):
                    rows.append(yardstick.score(self.handle))
                else:
                    drawing = partial(self._drawn, slot, config=yardstick.drawing)
                    rows.append(yardstick.score(subject.method.trigger, drawing))
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _drawn(self, slot: int, prompts: Sequence[str], seeds: Sequence[int], config: PreviewConfig) -> Pictures:
        if hasattr(self.handle, "samples"):
            drawn: Pictures = self.handle.samples(prompts, seeds, config)
            return drawn
        return draw(self.base, [self._inner(slot, prompt) for prompt in prompts], seeds, config)

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
            data_digest=self.digests[slot],
            trigger=subject.method.trigger,
            details=({"architecture": family} if (family := self.base.architecture) else {})
            | ({"resolution": side} if (side := subject.data.resolution) else {})
            | getattr(self.handle, "details", {}),
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
    base = kept(load_base, jobs[0].base, jobs[0].train.device, jobs[0].train.attention)
    cache = Cache()
    subjects = []
    for job, method in zip(jobs, methods, strict=True):
        data = from_dict(DataConfig, dict(job.data), "data")
        side, multiple = base.side(data.resolution), base.multiple
        subjects.append(Subject(job, method, data, load_buckets(data, side, multiple, cache, method.rescales)))
    table = PromptTable()
    sources: list[Source] = []
    validation: list[Source] = []
    trained: list[Subject] = []
    for slot, subject in enumerate(subjects):
        subject, own, apart = _apart(base, subject, slot, table, cache)
        sources, validation, trained = [*sources, *own], [*validation, *apart], [*trained, subject]
    subjects, yardsticks = trained, [_yardstick(base, each) for each in trained if each.job.train.measure_every]
    plain = [_plain(base, subject) for subject in subjects]
    objective = sources[0].objective or objective_for(base.pipe.scheduler)
    handle, encode = methods[0].attach_jobs(Work(base, subjects, table, sources, cache))
    if "unet" in base.modules:  # half of its work is convolutions, a twentieth faster so
        nn.Module.to(base.denoiser, memory_format=torch.channels_last)
    narrow(base, jobs[0].train.mixed_precision)
    seed = jobs[0].train.seed if subjects[0].data.buckets else None
    task = ConceptTask(base, handle, sources, objective, encode, seed)
    task.subjects, task.validation, task.yardsticks, task.plain = subjects, validation, yardsticks, plain
    task.digests = [_digest(subject, slot, sources) for slot, subject in enumerate(subjects)]
    log.info("cache: %s", cache)
    try:
        handle.probe(partial(_first_loss, task))
    except InputError:
        handle.detach()
        raise
    return task


def _digest(subject: Subject, slot: int, sources: Sequence[Source]) -> str:
    """Digest of a job's pictures and, where a folder gives those of the classes, of these."""
    others = [source.digest for source in sources if source.slot == slot and source.digest]
    return content_key([subject.digest, *others]) if others else subject.digest


def _apart(
    base: DiffusionBase, subject: Subject, slot: int, table: PromptTable, cache: Cache
) -> tuple[Subject, list[Source], list[Source]]:
    """A job with the pictures to train on, its sources, and the pictures to validate with, a source for each shape.

    Raises:
        InputError: none are held out, and the job asks for it.
    """
    sources, share = list(all_sources(base, subject, slot, table, cache)), subject.data.validation
    if not share:
        if subject.job.train.validate_every:
            given = f"train.validate_every = {subject.job.train.validate_every}"
            raise InputError(
                given, "no picture is held out", "Set data.validation to a share, such as 0.2, or a folder"
            )
        return subject, sources, []
    if isinstance(share, str):
        data = replace(subject.data, path=share, validation=0.0)
        other = replace(
            subject, data=data, datasets=load_buckets(data, base.side(data.resolution), base.multiple, cache)
        )
        return subject, sources, _pictures_of(all_sources(base, other, slot, table, cache))
    held, start = held_out(subject.pictures, share), 0
    kept: list[Source] = []
    apart: list[Source] = []
    datasets: list[Dataset] = []
    for shape, (dataset, own) in enumerate(zip(subject.datasets, _pictures_of(sources), strict=True)):
        places = range(len(dataset.pictures))
        out = [place for place in places if start + place in held]
        rest = [place for place in places if place not in out]
        start += len(places)
        if rest:
            others = [source for source in sources if source.shape == shape][1:]
            kept += [replace(each, shape=len(datasets)) for each in (part(own, rest), *others)]
            datasets.append(subset(dataset, rest))
        apart += [part(own, out)] if out else []
    return replace(subject, datasets=datasets), kept, apart


def _pictures_of(sources: Iterable[Source]) -> list[Source]:
    """The source of each shape that holds the job's own pictures: its first."""
    first: dict[int, Source] = {}
    for source in sources:
        first.setdefault(source.shape, source)
    return [replace(source, shape=0) for source in first.values()]


def _plain(base: DiffusionBase, subject: Subject) -> dict[str, Pictures]:
    """The base's own pictures for the job's samples, if it will draw any.

    Raises:
        InputError: other strengths of what has none.
    """
    sample = subject.job.sample
    if sample.strengths != (1.0,) and subject.job.method["name"] == "textual_inversion":
        given = f"sample.strengths = {list(sample.strengths)}"
        raise InputError(given, "a word has no strength: it is there or not", "Leave it out")
    return {"without": draw(base, *sample_settings(subject))} if sample.every else {}


def _yardstick(base: DiffusionBase, subject: Subject) -> Yardstick | FollowerYardstick:
    """What a job is measured by on the way: by default its held-out pictures, or else those it is trained on."""
    settings = from_dict(EvaluationConfig, measured_on(subject.job), "eval")
    if isinstance(subject.method, MapMethod):
        return FollowerYardstick(base, replace(settings, condition=subject.method.condition))
    if subject.job.method["name"] == "ip_adapter":
        return FollowerYardstick(base, settings)
    return Yardstick(base, settings)


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
    if len(jobs) > 1 and any(job.data.get("buckets") for job in jobs):
        raise InputError("data.buckets = true", "a shared batch is of one shape", "train the jobs alone")
    dropout = to_dict(methods[0]).get("dropout", 0)
    if len(jobs) > 1 and dropout:
        raise InputError(f"dropout = {dropout}", "a shared batch has other masks", "train the jobs alone")
    for job, need in zip(jobs, needs, strict=True):
        for name, value in need.items():
            if value != needs[0][name]:
                raise InputError(f"job {job.name}", f"its {name} differs from the first job's", "train it alone")
