"""The ways into a training: `train`, `train_many`, `resume`. Each ends in the one loop, on run folders."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graft.studio import registry
from graft.studio.adapter import Adapter
from graft.studio.disk import require_space, write_atomic, write_json
from graft.studio.errors import InputError, RunError
from graft.studio.estimate import STEPS, Estimate, free_memory, resident
from graft.studio.job import Job, TrainConfig
from graft.studio.loop import Loop, make_accelerator, seeds_kept, set_threads, settled
from graft.studio.runs.attempt import attempt, fail
from graft.studio.runs.failure import classify
from graft.studio.runs.folder import Run, create_run, new_folder, open_run
from graft.studio.runs.lock import RunLock
from graft.studio.runs.results import save_adapter
from graft.studio.runs.track import check

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("graft")
Source = Job | Mapping[str, Any] | str | Path
"""A job, its mapping, or the path of its TOML file."""


def train(job: Source, run_dir: str | Path | None = None, runs: str | Path | None = None) -> Run:
    """Train one adapter and return its finished run (or stopped, if someone asked for it).

    Args:
        job: a `Job`, a mapping, or the path of a TOML file.
        run_dir: the run's folder; None names one below `runs`.
        runs: None is `runs` in the current folder.

    Raises:
        InputError: anything wrong with the job; nothing has been written then.
        GraftError: the training failed; the run says so and can be resumed.
    """
    job = settled(Job.load(job))
    folder = new_folder(job, run_dir, runs)
    with _threads(job.train.threads) as threads:
        accelerator = make_accelerator(job.train)
        task = _prepared([job], accelerator)
        made = _create([job], [folder], task, threads, accelerator)
        return _fit(task, made, threads, accelerator)[0]


def train_many(jobs: Sequence[Source], runs: str | Path | None = None) -> list[Run]:
    """Train several adapters and return their runs, in order.

    Jobs that the domain can put into one batch (same base, method and shapes) are trained together, each as if alone:
    with its own data, seed, length, learning rate and schedule, decay, clipping, and early stop. A job that diverges
    fails by itself; one that is done leaves the batch. Jobs that differ in more are trained one after the other.
    """
    loaded = [settled(Job.load(job)) for job in jobs]
    if len(loaded) < 2 or len({job.domain for job in loaded}) > 1:
        return [train(job, runs=runs) for job in loaded]
    first = loaded[0]
    with _threads(first.train.threads) as threads:
        accelerator = make_accelerator(first.train)
        try:
            task = _prepared(loaded, accelerator)
        except InputError as error:  # they cannot share a batch, or one is wrong and will say so again
            log.info("trained one by one: %s", error)
            return [train(job, runs=runs) for job in loaded]
        folders = [new_folder(job, runs=runs) for job in loaded]
        made = _create(loaded, folders, task, threads, accelerator)
        return _fit(task, made, threads, accelerator)


def estimate(job: Source) -> Estimate:
    """Return what a training will take, from a few steps of it in a folder that goes away.

    On a processor the memory is that of this process at its highest: ask in a fresh one, as the command does.

    Raises:
        InputError: as `train`; also a device with too little memory.
        GraftError: the training would fail.
    """
    job = settled(Job.load(job))
    began = time.monotonic()
    with _threads(job.train.threads) as threads, tempfile.TemporaryDirectory() as root:
        accelerator = make_accelerator(job.train)
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        try:
            task = _prepared([job], accelerator)
            (run,) = _create([job], [Path(root) / "run"], task, threads, accelerator)
            return _rehearsed(task, run, accelerator, time.monotonic() - began)
        except (RuntimeError, MemoryError) as error:
            if (failure := classify(error)).kind != "out of memory":
                raise
            reason = f"{accelerator.device} has too little memory ({failure.message.splitlines()[0]})"
            remedy = "Set a smaller train.batch_size, with train.gradient_accumulation"
            raise InputError(f"train.batch_size = {job.train.batch_size}", reason, remedy) from error


def _rehearsed(task: Any, run: Run, accelerator: Accelerator, prepare: float) -> Estimate:
    job, device = run.job, accelerator.device
    loaded, sample, measurement, times = _memory(device)[0], 0.0, 0.0, [0.0]
    if any(p.requires_grad for p in task.parameters()):
        loop = Rehearsal(task, [run], accelerator)
        loop.fit()
        loop.save()
        times = loop.times
        if job.sample.every:
            sample = _timed(lambda: task.sample(loop.step, run.folder / "samples"))
        if job.train.validate_every or job.train.measure_every:
            measurement = _timed(lambda: loop._measure(ending=True))
    save_adapter(run.folder / "result", task.adapter({"steps": STEPS}))
    pictures = [path for path in run.samples() if path.name != "sheet.png"]
    peak, memory = _memory(device)[1:]
    return Estimate(
        device=str(device),
        trained=sum(p.numel() for p in task.parameters() if p.requires_grad),
        prepare=round(prepare, 3),
        step=sorted(times[1:] or times)[len(times[1:]) // 2],
        sample=sample,
        measurement=measurement,
        loaded=loaded,
        peak=peak,
        memory=memory,
        checkpoint=max((_size(path) for path in (run.folder / "checkpoints").glob("[0-9]*")), default=0),
        adapter=_size(run.folder / "result"),
        picture=sum(path.stat().st_size for path in pictures),
    )


class Rehearsal(Loop):
    """The first steps of a training; `times` has the seconds of each."""

    times: list[float]

    def _train_step(self) -> dict[str, torch.Tensor]:
        self.times = getattr(self, "times", [])
        began = time.monotonic()
        figures = super()._train_step()
        figures["loss"].item()  # a GPU has done the step only now
        self.times.append(round(time.monotonic() - began, 4))
        if len(self.times) == STEPS:
            self.stopping.set()
        return figures


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return round(time.monotonic() - began, 3)


def _memory(device: torch.device) -> tuple[int, int, int]:
    """Bytes that are in use on a device, that were at the highest, and that there are."""
    if device.type == "cuda":
        in_use, highest = torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)
        return in_use, highest, torch.cuda.mem_get_info(device)[0] + in_use
    now, highest = resident()
    return now, highest, free_memory() + now


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def resume(run: Run | str | Path) -> Run:
    """Go on with a run that is not finished; a finished one is returned as it is.

    Raises:
        RunError: not a run, or another program trains it.
    """
    run = run if isinstance(run, Run) else open_run(run)
    if run.status == "finished":
        return run
    members = run.group
    with ExitStack() as stack:
        if os.environ.get("RANK", "0") == "0":
            for member in members:  # fail before the work, not after it
                stack.enter_context(RunLock(member.folder))
                member.take_request("stop")  # one that came too late for the attempt before
                if member.state.get("queue"):
                    member.write_state(queue=None)  # it is in our hands now
        go_on(members)
    return run


def go_on(runs: Sequence[Run]) -> None:
    """Train runs together in their folders, from their newest checkpoint or from the start.

    Args:
        runs: all of a batch that they share; this process holds their locks.

    Raises:
        GraftError: as `train`.
    """
    for run in runs:  # "auto" is settled by the first machine that trains it
        run.freeze(settled(run.job))
    jobs, state = [run.job for run in runs], runs[0].state
    fresh = not any(run.state.get("attempt", 0) for run in runs)
    # Sums depend on the number of threads: equal bits need the same again.
    with _threads(jobs[0].train.threads or int(state.get("threads", 0))) as threads:
        accelerator = make_accelerator(jobs[0].train)
        task = _prepared(jobs, accelerator)
        if not fresh:
            _check_origin(runs[0], _origin(task))
        elif accelerator.is_main_process:
            _check_space(runs[0].folder, jobs[0], task)
            for run in runs:
                run.write_env(_facts(task, threads, accelerator))
            _begin(runs, task)
        _fit(task, list(runs), threads, accelerator, locked=True)


def go_on_apart(runs: Sequence[Run]) -> list[BaseException]:
    """Train runs in one batch where the domain can; what is wrong with one of them stays with that one.

    Returns:
        What went wrong; the runs tell it, too.
    """
    try:
        go_on(runs)
        return []
    except Exception as error:
        begun = any(run.state.get("attempt", 0) for run in runs)
        if len(runs) == 1 or begun or not isinstance(error, InputError):
            waiting = [run for run in runs if run.state["status"] != "failed"]
            fail(waiting, error)
            log.error("%s failed", ", ".join(run.id for run in runs), exc_info=error)
            return [error]
        log.info("looking for the run that is wrong: %s", error)
    errors = {run.id: wrong for run in runs if (wrong := _wrong(run)) is not None}
    for run in runs:
        if run.id in errors:
            fail([run], errors[run.id])
    sound = [run for run in runs if run.id not in errors]
    if errors and len(sound) > 1:
        return [*errors.values(), *go_on_apart(sound)]
    return [*errors.values(), *(each for run in sound for each in go_on_apart([run]))]


def _wrong(run: Run) -> Exception | None:
    """What keeps a run from being prepared alone."""
    job = settled(run.job)
    try:
        with _threads(job.train.threads):
            _prepared([job], make_accelerator(job.train))
    except Exception as error:
        return error
    return None


def _origin(task: Any) -> dict[str, str]:
    origin: dict[str, str] = task.origin() if hasattr(task, "origin") else {}
    return origin


def _check_origin(run: Run, found: dict[str, str]) -> None:
    """Compare what a run was started from with what there is now.

    Raises:
        RunError: it differs; going on would train something else under the same name.
    """
    begun = json.loads((run.folder / "env.json").read_text(encoding="utf-8"))
    for name, value in found.items():
        if begun.get(name, value) != value:
            reason = f"its {name} was {begun[name]} at the start and is {value} now"
            raise RunError(str(run.folder), reason, "Bring the old one back, or start a new run")


def _prepared(jobs: Sequence[Job], accelerator: Accelerator) -> Any:
    """The task of one job, or of several in one batch, on the accelerator's device.

    Raises:
        InputError: anything wrong with a job, or the domain cannot train these together.
    """
    check(jobs[0].train.track)
    device = str(accelerator.device)
    placed = [replace(job, train=replace(job.train, device=device)) for job in jobs]
    domain = registry.domain(jobs[0].domain)
    if len(jobs) == 1:
        return _able(domain.prepare(placed[0], None), jobs[0])
    if not hasattr(domain, "prepare_together"):
        raise InputError(f"{len(jobs)} jobs", f"{jobs[0].domain} trains one at a time", "Train them one by one")
    if jobs[0].train.optimiser != "adamw":
        raise InputError("train.optimiser", "jobs that share a batch are trained by AdamW", "Train them one by one")
    for job in jobs:
        for name in sorted({field.name for field in fields(TrainConfig)} - TrainConfig.own):
            if getattr(job.train, name) != getattr(jobs[0].train, name):
                raise InputError(f"job {job.name}", f"its train.{name} differs from the first job's", "Train it alone")
    return _able(domain.prepare_together(placed), jobs[0])


def _able(task: Any, job: Job) -> Any:
    """The task, if it can measure what the job asks for."""
    for name, what in (("validate_every", "validate"), ("measure_every", "measure")):
        if getattr(job.train, name) and not hasattr(task, what):
            reason = f"{job.domain} has nothing to {what} on the way"
            raise InputError(f"train.{name} = {getattr(job.train, name)}", reason, "Leave it at 0, and use graft eval")
    return task


def _create(
    jobs: Sequence[Job], folders: Sequence[Path], task: Any, threads: int, accelerator: Accelerator
) -> list[Run]:
    """Make the runs, in the first process; the others learn where they are.

    Raises:
        DiskFullError: there is no space for the checkpoints.
    """
    where = [str(folder) for folder in folders]
    if accelerator.is_main_process:
        _check_space(folders[0], jobs[0], task)
        facts = _facts(task, threads, accelerator)
        _begin([create_run(job, folder, facts) for job, folder in zip(jobs, folders, strict=True)], task)
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        where = broadcast_object_list(where)
    return [Run(Path(folder)) for folder in where]


def _check_space(folder: Path, job: Job, task: Any) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
        DiskFullError: there is no space for the checkpoints.
    """
    weights = sum(p.numel() * p.element_size() for p in task.parameters())
    # A checkpoint is the weights and two moments; one more is written before the oldest goes.
    require_space(folder, 3 * weights * (job.train.keep_checkpoints + 1) + 2 * weights + (16 << 20))


def _facts(task: Any, threads: int, accelerator: Accelerator) -> dict[str, Any]:
    where = {"threads": threads, "device": str(accelerator.device), "processes": accelerator.num_processes}
    return {**where, **_origin(task)}


def _begin(runs: Sequence[Run], task: Any) -> None:
    """Put into new runs what the task has for them, and who shares a batch with whom."""
    for name, text in task.files().items() if hasattr(task, "files") else ():
        for run in runs:
            write_atomic(run.folder / name, text.encode())
    for run in runs:
        (run.folder / "group.json").unlink(missing_ok=True)
        if len(runs) > 1:
            write_json(run.folder / "group.json", [other.id for other in runs])


def _fit(task: Any, runs: list[Run], threads: int, accelerator: Accelerator, locked: bool = False) -> list[Run]:
    """Train a task in its runs and save what each has learnt."""
    main = accelerator.is_main_process
    with attempt(runs if main else [], threads, locked) as this:
        # What needs no training was finished when it was prepared.
        loop = Loop(task, runs, accelerator, this.number) if any(p.requires_grad for p in task.parameters()) else None
        whole = loop is None or loop.fit()
        this.failures = loop.failures if loop is not None else {}
        if not whole:
            this.status = "stopped"
        elif main:
            for slot, run in enumerate(runs):
                if slot in this.failures:
                    continue
                if run.job.train.keep == "best" and (run.folder / "best").exists():
                    adapter = Adapter.load(run.folder / "best")
                    pictures = _samples(runs[0], adapter.card.metrics["steps"])
                else:
                    adapter = task.adapter(_final(run)) if len(runs) == 1 else task.adapter(_final(run), slot=slot)
                    pictures = _samples(runs[0])
                shown = pictures if len(runs) == 1 else pictures[slot : slot + 1]
                save_adapter(run.folder / "result", adapter, shown)
    return runs


@contextmanager
def _threads(wanted: int) -> Iterator[int]:
    """Run with a number of CPU threads; leave it, and the global generators, as they were."""
    before = torch.get_num_threads()
    try:
        with seeds_kept():
            yield set_threads(wanted)
    finally:
        torch.set_num_threads(before)


def _final(run: Run) -> dict[str, Any]:
    rows = run.metrics()
    return {"steps": run.state["step"], **{k: rows[-1][k] for k in ("loss", "seconds") if rows and k in rows[-1]}}


def _samples(run: Run, step: int | None = None) -> list[Path]:
    """What was drawn last, or at a step: one picture per slot of the task."""
    events = [event for event in run.events() if event["event"] == "sample" and step in (None, event["step"])]
    return [run.folder / "samples" / name for name in (events[-1]["files"] if events else [])]
