"""The one training loop, and the ways into it: `train`, `train_many`, `resume`.

A domain hands over a `Task`; the loop knows nothing of pictures or text. Everything random in a step comes from
generators seeded by (seed, step, micro step, rank), and the learning rate is a function of the step. So a training that
was killed and resumed from any whole checkpoint ends with the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from graft.studio import registry
from graft.studio.errors import GraftError, InputError, RunError
from graft.studio.job import Job, TrainConfig
from graft.studio.runs.checkpoints import Checkpoint, latest_checkpoint, write_checkpoint
from graft.studio.runs.folder import Run, append_line, create_run, open_run
from graft.studio.runs.lock import RunLock
from graft.studio.runs.progress import progress

if TYPE_CHECKING:
    from accelerate import Accelerator

    from graft.studio.adapter import Adapter

log = logging.getLogger("graft")


class Task(Protocol):
    """What a domain hands to the loop: an `nn.Module` whose parameters are exactly the trainable ones.

    Optional: `param_groups()`, groups for AdamW, where "lr_scale" multiplies the learning rate.
    """

    default_learning_rate: float

    def batch(self, step: int, generator: torch.Generator) -> Any:
        """Return the data of one micro step: a function of the generator's state and nothing else that changes."""

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and further figures, all scalars."""

    def sample(self, step: int, folder: Path) -> list[Path]:
        """Draw what has been learnt so far; modes, generators and caches stay as they were."""

    def adapter(self, metrics: dict[str, Any]) -> Adapter:
        """Return the trained adapter."""


def step_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Return the seed of one micro step: 63 bits of a hash."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def learning_rate(config: TrainConfig, peak: float, step: int) -> float:
    """Return the learning rate of a step (counted from 0)."""
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    past = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    shape = {"constant": 1.0, "linear": 1 - past, "cosine": 0.5 * (1 + math.cos(math.pi * past))}
    return peak * shape[config.schedule]


def set_threads(threads: int) -> int:
    """Set the tensor library's CPU threads and return their number; 0 takes the cores that this process may use."""
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = threads or int(os.environ.get("OMP_NUM_THREADS") or free)
    torch.set_num_threads(threads)
    return threads


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator of one training."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # Its state is one per process, and would keep the mixed precision of the training before this one.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=(config.device or registry.default_device()) == "cpu",
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
    )


class Loop:
    """One training in a run folder, from a checkpoint or from the start to its last step."""

    def __init__(self, task: Any, run: Run, config: TrainConfig, sample_every: int = 0):
        self.task, self.run, self.config, self.sample_every = task, run, config, sample_every
        self.accelerator = make_accelerator(config)
        self.main = self.accelerator.is_main_process
        self.peak = config.learning_rate or task.default_learning_rate
        groups = task.param_groups() if hasattr(task, "param_groups") else [{"params": list(task.parameters())}]
        optimizer = torch.optim.AdamW(groups, lr=self.peak, weight_decay=config.weight_decay, fused=_can_fuse(groups))
        self.module, self.optimizer = self.accelerator.prepare(task, optimizer)
        self.step, self.seconds, self.attempt = 0, 0.0, int(run.state.get("attempt", 1))
        self.stopping = threading.Event()

    def fit(self) -> bool:
        """Train to the end; return False if it was asked to stop before."""
        self.restore()
        self.task.train()
        means = _Means()
        saved = began = time.monotonic()
        elapsed = self.seconds
        with _seeds_kept(), self._signals(), progress(self.run.id, self.step, self.config.steps, self.main) as show:
            while self.step < self.config.steps:
                means.add(self._train_step())
                self.step += 1
                self.seconds = elapsed + time.monotonic() - began
                last = self.step == self.config.steps
                if self.step % self.config.log_every == 0 or last:
                    show(self.step, self._log(means.take()))
                stop = self._asked("stop") or self.stopping.is_set()
                if last or stop or self._checkpoint_due(saved):
                    self.save()
                    saved = time.monotonic()
                if self._sample_due(last):
                    self._sample()
                if stop and not last:
                    return False
        return True

    def _train_step(self) -> dict[str, Tensor]:
        """One optimiser step over all micro steps; returns figures as tensors, without waiting for them."""
        rate = learning_rate(self.config, self.peak, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        figures: dict[str, Tensor] = {}
        for micro in range(self.config.gradient_accumulation):
            seed = step_seed(self.config.seed, self.step, micro, self.accelerator.process_index)
            batch = self.task.batch(self.step, torch.Generator().manual_seed(seed))
            torch.manual_seed(seed)  # for dropout
            with self.accelerator.accumulate(self.module):
                loss, parts = self.module(batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and self.config.max_grad_norm > 0:
                    self.accelerator.clip_grad_norm_(self.task.parameters(), self.config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in {"loss": loss, **parts}.items():
                share = value.detach() / self.config.gradient_accumulation
                figures[name] = figures[name] + share if name in figures else share
        return figures

    def _log(self, means: dict[str, float]) -> dict[str, float]:
        if not all(math.isfinite(value) for value in means.values()):
            shown = ", ".join(f"{name} {value}" for name, value in means.items())
            remedy = "lower train.learning_rate, or use train.mixed_precision = 'no'"
            raise GraftError(f"step {self.step}: the training diverged ({shown}); {remedy}")
        row = {"step": self.step, **means, "learning_rate": learning_rate(self.config, self.peak, self.step - 1)}
        if self.main:
            timing = {"seconds": round(self.seconds, 3), "attempt": self.attempt}
            append_line(self.run.folder / "metrics.jsonl", row | timing)
        return row

    def _asked(self, what: str) -> bool:
        return self.run.take_request(what) if self.main else False

    def _checkpoint_due(self, saved: float) -> bool:
        config = self.config
        by_step = config.checkpoint_every > 0 and self.step % config.checkpoint_every == 0
        by_time = config.checkpoint_seconds > 0 and time.monotonic() - saved >= config.checkpoint_seconds
        return by_step or by_time or self._asked("save-now")

    def _sample_due(self, last: bool) -> bool:
        if not self.main:
            return False
        by_step = self.sample_every > 0 and (self.step % self.sample_every == 0 or last)
        return self._asked("sample-now") or by_step

    def _sample(self) -> None:
        with _seeds_kept():
            files = self.task.sample(self.step, self.run.folder / "samples")
        self.run.write_event("sample", step=self.step, files=[path.name for path in files])

    def save(self) -> None:
        """Write a checkpoint and the state."""
        if not self.main:
            return
        scaler = self.accelerator.scaler
        extra = {"seconds": self.seconds, "scaler": scaler.state_dict() if scaler is not None else None}
        model = {name: tensor.detach().cpu() for name, tensor in self.task.state_dict().items()}
        checkpoint = Checkpoint(self.step, model, self.optimizer.state_dict(), extra)
        write_checkpoint(self.run.folder / "checkpoints", checkpoint, self.config.keep_checkpoints)
        self.run.write_state(step=self.step)
        self.run.write_event("checkpoint", step=self.step)

    def restore(self) -> None:
        """Continue from the newest whole checkpoint, if there is one."""
        checkpoint = latest_checkpoint(self.run.folder / "checkpoints")
        if checkpoint is None:
            return
        self.task.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        if self.accelerator.scaler is not None and checkpoint.extra["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.extra["scaler"])
        self.step, self.seconds = checkpoint.step, checkpoint.extra["seconds"]
        log.info("resumed at step %d", self.step)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn SIGTERM and SIGINT into a stop at the next step; only the main thread may."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {which: signal.signal(which, lambda *_: self.stopping.set()) for which in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for which, handler in old.items():
                signal.signal(which, handler)


class _Means:
    """Running means of figures, added up where they are and fetched once."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, figures: Mapping[str, Tensor]) -> None:
        for name, value in figures.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def take(self) -> dict[str, float]:
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


def _can_fuse(groups: Sequence[Mapping[str, Any]]) -> bool:
    kinds = {p.device.type for group in groups for p in group["params"]}
    return kinds <= {"cpu", "cuda"}


@contextmanager
def _seeds_kept() -> Iterator[None]:
    """Leave torch's global generators as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def train(job: Job | Mapping[str, Any] | str | Path, run_dir: str | Path | None = None) -> Run:
    """Train one adapter and return its finished run.

    Args:
        job: a `Job`, a mapping, or the path of a TOML file.
        run_dir: the run's folder; None names one below `runs`.

    Raises:
        InputError: anything wrong with the job, before the first step.
        GraftError: the training failed; the run says so and can be resumed.
    """
    job = Job.load(job)
    return _train_in(_shared_run(job, Path(run_dir) if run_dir else None), job)


def resume(run: Run | str | Path) -> Run:
    """Go on with a stopped, failed or interrupted run; a finished one is returned as it is.

    Raises:
        RunError: not a run, or another program trains it.
    """
    run = run if isinstance(run, Run) else open_run(run)
    return run if run.status == "finished" else _train_in(run, run.job)


def train_many(jobs: Sequence[Job | Mapping[str, Any] | str | Path], runs: str | Path | None = None) -> list[Run]:
    """Train several adapters and return their runs, in order.

    Jobs that the domain can put into one batch (same base, method and settings) are trained together, each as if alone;
    the others one after the other.
    """
    loaded = [Job.load(job) for job in jobs]
    made = [create_run(job, runs=Path(runs) if runs else None) for job in loaded]
    if len(loaded) > 1 and len({job.domain for job in loaded}) == 1:
        together = getattr(registry.domain(loaded[0].domain), "prepare_together", None)
        if together is not None:
            try:
                task = together(loaded)
            except InputError as error:
                log.info("trained one by one: %s", error)
            else:
                return _train_shared(made, loaded, task)
    return [_train_in(run, job) for run, job in zip(made, loaded, strict=True)]


def _shared_run(job: Job, folder: Path | None) -> Run:
    """Make the run in the first process; the others learn where it is."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return create_run(job, folder)
    from accelerate.utils import broadcast_object_list

    accelerator = make_accelerator(job.train)
    where = [str(create_run(job, folder).folder) if accelerator.is_main_process else ""]
    return Run(Path(broadcast_object_list(where)[0]))


def _train_in(run: Run, job: Job) -> Run:
    """Prepare, train and save the result of one run."""
    prepare = registry.domain(job.domain).prepare

    def body() -> bool:
        task = prepare(job, run.folder)
        loop = Loop(task, run, job.train, job.sample.every)
        done = loop.fit()
        if done and loop.main:
            _save_result(run, task.adapter(_final(run)))
        return done

    _attempt([run], job, body)
    return run


def _train_shared(runs: list[Run], jobs: list[Job], task: Any) -> list[Run]:
    """Train one task that holds a slot for each run; the first run's folder has the checkpoints and the curve."""

    def body() -> bool:
        loop = Loop(task, runs[0], jobs[0].train, jobs[0].sample.every)
        done = loop.fit()
        for slot, run in enumerate(runs if done and loop.main else []):
            _save_result(run, task.adapter(_final(runs[0]), slot=slot))
        return done

    _attempt(runs, jobs[0], body)
    return runs


def _attempt(runs: Sequence[Run], job: Job, body: Callable[[], bool]) -> None:
    """Run `body` with the runs locked, their state kept true and their log written."""
    main = int(os.environ.get("RANK", "0")) == 0
    with ExitStack() as stack:
        if main:
            for run in runs:
                stack.enter_context(RunLock(run.folder))
                stack.enter_context(_logged(run.folder / "log.txt"))
        note = _Note(runs if main else [])
        note.started()
        set_threads(job.train.threads)
        try:
            note.ended("finished" if body() else "stopped")
        except BaseException as error:
            log.error("failed", exc_info=True)
            note.ended("failed", str(error) or type(error).__name__)
            raise


class _Note:
    """Writes state and events of an attempt."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs

    def started(self) -> None:
        for run in self.runs:
            run.take_request("stop")  # one that came too late for the attempt before
            attempt = int(run.state.get("attempt", 0)) + 1
            run.write_state(status="running", attempt=attempt, pid=os.getpid(), message="")
            run.write_event("started", attempt=attempt)

    def ended(self, status: str, message: str = "") -> None:
        for run in self.runs:
            run.write_state(status=status, message=message)
            run.write_event(status, message=message)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        handler.close()


def _final(run: Run) -> dict[str, Any]:
    rows = run.metrics()
    return {"steps": run.state["step"], **{k: rows[-1][k] for k in ("loss", "seconds") if rows and k in rows[-1]}}


def _save_result(run: Run, adapter: Adapter) -> None:
    """Put the adapter into `result/` by one rename."""
    draft = run.folder / f".result-{os.getpid()}"
    adapter.save(draft)
    if (run.folder / "result").exists():
        raise RunError(str(run.folder / "result"), "it exists already", "Start a new run")
    draft.rename(run.folder / "result")
