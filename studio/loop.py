"""The one training loop. A domain hands over a `Task`; the loop knows nothing of pictures or text.

Everything random in a step comes from generators seeded by (seed, step, micro step, rank), and the learning rate is a
function of the step. So a training that was killed and resumed from any whole checkpoint ends with the same bits as one
that was not.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from graft.studio import registry
from graft.studio.batches import batches, step_seed
from graft.studio.disk import append_line
from graft.studio.errors import GraftError
from graft.studio.job import Job, TrainConfig
from graft.studio.means import Means, Patience
from graft.studio.mezo import MeZO
from graft.studio.optimiser import JobsAdamW, make
from graft.studio.runs.checkpoints import Checkpoint, latest_checkpoint, write_checkpoint
from graft.studio.runs.folder import Run
from graft.studio.runs.progress import progress
from graft.studio.runs.results import best_score, save_adapter
from graft.studio.runs.track import sinks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from graft.studio.adapter import Adapter

log = logging.getLogger("graft")


class Task(Protocol):
    """What a domain hands to the loop: an `nn.Module` whose parameters are exactly the trainable ones.

    Optional: `param_groups()`, groups for AdamW, where "lr_scale" multiplies the learning rate; `origin()`, digests of
    what it is trained from (base, data), which must be the same when a run goes on; `files()`, texts by name that the
    run folder gets at the start; `before_step(step, steps)` and `after_step(step, steps)`, for methods with a rule of
    their own (the latter sees the gradients).

    A task of several jobs has `owned()`, its parameters and whose they are (see `JobsAdamW`), and `finish(slot)`, which
    leaves a job out of the batches to come.

    `validate()` and `measure()` return figures by name, each a number or one for every job, for metrics.jsonl: the
    first of data that is held out, the second of what is made. `measure`'s "score" is what `train.keep = "best"` goes
    by. Like `sample`, they leave modes and generators alone, and they say the same whenever the weights are the same.
    """

    default_learning_rate: float

    def batch(self, step: int, *generators: torch.Generator) -> Any:
        """Return the data of one micro step: a function of its number and the generators' states, and nothing else that
        changes.

        Micro steps are counted over the whole training and all its processes. There is one generator for each job that
        shares the batch.
        """

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, a scalar, and further figures: scalars, or one entry per run.

        Runs that share a batch log the figure "loss", their own, in place of the sum that is minimised.
        """

    def sample(self, step: int, folder: Path) -> list[Path]:
        """Draw what has been learnt so far; modes, generators and caches stay as they were."""

    def adapter(self, metrics: dict[str, Any]) -> Adapter:
        """Return the trained adapter."""


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


def settled(job: Job) -> Job:
    """Return the job with "auto" replaced by the type of the forward pass that suits the device."""
    if job.train.mixed_precision != "auto":
        return job
    fast = fast_bfloat16(job.train.device or registry.default_device())
    return replace(job, train=replace(job.train, mixed_precision="bf16" if fast else "no"))


def fast_bfloat16(device: str) -> bool:
    """Tell whether a device has instructions that multiply bfloat16; without them it is several times slower."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
    return device == "cpu" and bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator of one training."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # Its state is one per process, and would keep the mixed precision of the training before this one.
    AcceleratorState._reset_state()
    device = config.device or registry.default_device()
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
    )


class Loop:
    """One training, from its newest checkpoint or from the start to its last step.

    Args:
        task: what is trained.
        runs: one per job of the task; the first has the checkpoints.
        accelerator: of `make_accelerator`.
        number: of this attempt.
    """

    failures: dict[int, str]
    """Jobs that went wrong without harm to the others, and how."""

    def __init__(self, task: Any, runs: Sequence[Run], accelerator: Accelerator, number: int = 1):
        self.task, self.runs, self.run, self.accelerator, self.number = task, runs, runs[0], accelerator, number
        self.configs = [run.job.train for run in runs]
        self.config, self.sample_every = self.configs[0], runs[0].job.sample.every
        self.main = accelerator.is_main_process
        self.peaks = [config.learning_rate or task.default_learning_rate for config in self.configs]
        groups: list[dict[str, Any]]
        groups = task.param_groups() if hasattr(task, "param_groups") else [{"params": list(task.parameters())}]
        self.scales = [group.get("lr_scale", 1.0) for group in groups]
        self.decays = [group.get("weight_decay", config.weight_decay) for config in self.configs for group in groups]
        self.joint = _joint(task, groups, len(runs)) if len(runs) > 1 else None
        optimizer = self.joint or make(self.config, groups, self.peaks[0])
        self.mezo = optimizer if isinstance(optimizer, MeZO) else None
        self.module, self.optimizer = accelerator.prepare(task, optimizer)
        self.step, self.seconds, self.failures = 0, 0.0, {}
        self.ends = [config.steps for config in self.configs]
        self.patience = Patience([config.patience for config in self.configs])
        self.best = [best_score(run.folder) for run in runs]
        self.stopping = threading.Event()

    def fit(self) -> bool:
        """Train to the end; return False if it was asked to stop before."""
        self.restore()
        self.task.train()
        means, elapsed = Means(), self.seconds
        self._leave(slot for slot, end in enumerate(self.ends) if end <= self.step)
        saved = began = time.monotonic()
        with ExitStack() as stack:
            stack.enter_context(self._signals())
            self.sinks = [stack.enter_context(sinks(run, self.step)) for run in self.runs] if self.main else []
            show = stack.enter_context(progress(self.run.id, self.step, max(self.ends), self.main))
            while self.step < max(self.ends):
                means.add(self._train_step())
                self.step += 1
                self.seconds = elapsed + time.monotonic() - began
                ending, stop = self._ending(), self._stop_asked()
                due = bool(ending) or stop or self._checkpoint_due(saved)
                measured = self._measure(bool(ending))
                if due or measured or self.step % self.config.log_every == 0:
                    show(self.step, self._log(means.take(), measured))
                    self._leave(ending)
                if due:
                    self.save()
                    saved = time.monotonic()
                last = self.step >= max(self.ends)
                if self._sample_due(last):
                    self._sample()
                if stop and not last:
                    return False
        return True

    def _ending(self) -> list[int]:
        """The jobs whose last step this was, be it that their loss falls no more."""
        if self.step % self.config.log_every == 0:
            for slot in self.patience.stalled(self.step, self.accelerator):
                if self.step < self.ends[slot]:
                    self.ends[slot] = self.step
                    self._tell(slot, "early stop", step=self.step)
        return [slot for slot, end in enumerate(self.ends) if end == self.step]

    def _leave(self, slots: Iterable[int]) -> None:
        """Go on without some jobs, if there are others."""
        if self.step < max(self.ends):
            for slot in slots:
                self.task.finish(slot)
            self.batches = batches(
                self.task, self.configs, self.accelerator.process_index, self.step, self.accelerator.num_processes
            )

    def _tell(self, slot: int, event: str, **facts: Any) -> None:
        if self.main:
            self.runs[slot].write_event(event, **facts)

    def _rates(self, step: int) -> list[float]:
        """Every job's learning rate."""
        jobs = zip(self.configs, self.peaks, self.ends, strict=True)
        return [learning_rate(config, peak, step) if step < end else 0.0 for config, peak, end in jobs]

    def _set_rates(self) -> None:
        rates = self._rates(self.step)
        if self.joint is not None:
            each = [rate * scale for rate in rates for scale in self.scales]
            self.joint.set(each, self.decays, [config.max_grad_norm for config in self.configs])
            return
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = rates[0] * scale

    def _train_step(self) -> dict[str, Tensor]:
        """One optimiser step over all micro steps; returns figures as tensors, without waiting for them."""
        self._set_rates()
        figures: dict[str, Tensor] = {}
        if hasattr(self.task, "before_step"):
            torch.manual_seed(step_seed(self.config.seed, self.step, 0, 0))  # the same draws in every process
            self.task.before_step(self.step, max(self.ends))
        for _ in range(self.config.gradient_accumulation):
            seed, batch = next(self.batches)
            with self.accelerator.accumulate(self.module):
                loss, parts = self._learn(seed, batch)
                if self.accelerator.sync_gradients and not (self.joint or self.mezo) and self.config.max_grad_norm > 0:
                    self._clip(self.config.max_grad_norm)
                self.optimizer.step()
                if self.accelerator.sync_gradients and hasattr(self.task, "after_step"):
                    self.task.after_step(self.step, max(self.ends))
                self.optimizer.zero_grad()
            for name, value in {"loss": loss, **parts}.items():
                share = value.detach() / self.config.gradient_accumulation
                figures[name] = figures[name] + share if name in figures else share
        self.patience.add(figures["loss"])
        return figures

    def _learn(self, seed: int, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and figures of a batch, whose gradients, or slope along a direction, were added to the step's."""

        def run() -> tuple[Tensor, dict[str, Tensor]]:
            torch.manual_seed(seed)  # for dropout
            loss, parts = self.module(batch)
            return loss, parts

        if self.mezo is None:
            loss, parts = run()
            self.accelerator.backward(loss)
            return loss, parts

        def agreed() -> tuple[Tensor, dict[str, Tensor]]:
            loss, parts = run()
            return self.accelerator.reduce(loss, "mean"), parts

        direction = step_seed(self.config.seed, self.step, -1, 0)  # the same in every process, and no batch's
        return self.mezo.measure(direction, agreed, 1 / self.config.gradient_accumulation)

    def _clip(self, limit: float) -> None:
        """Scale gradients down to the limit, without waiting for their norm."""
        self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self.task.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))

    def _measure(self, ending: bool) -> list[dict[str, float]]:
        """What is due to be measured, of each job; the best so far is kept. Before the checkpoint: killed between the
        two, the training comes here again, and finds the same."""
        every = {"validate": self.config.validate_every, "measure": self.config.measure_every}
        due = [what for what, steps in every.items() if steps and (ending or self.step % steps == 0)]
        if not due:
            return []
        found: list[dict[str, float]] = [{} for _ in self.runs]
        for what in due if self.main else ():
            for name, value in getattr(self.task, what)().items():
                for slot, own in enumerate(found):
                    own[name] = value[slot] if isinstance(value, Sequence) else value
        if self.config.keep == "best" and "measure" in due and self.main:
            for slot, own in enumerate(found):
                if self.step <= self.ends[slot] and slot not in self.failures and own["score"] > self.best[slot]:
                    self._keep(slot, own)
        return found

    def _keep(self, slot: int, figures: dict[str, float]) -> None:
        told = {"steps": self.step, **figures}
        adapter = self.task.adapter(told) if len(self.runs) == 1 else self.task.adapter(told, slot=slot)
        save_adapter(self.runs[slot].folder / "best", adapter)
        self.best[slot] = figures["score"]
        self._tell(slot, "best", step=self.step, score=figures["score"])

    def _log(self, means: dict[str, list[float]], measured: Sequence[dict[str, float]] = ()) -> dict[str, float]:
        """Write each run's figures; return them for the progress line, those of several runs as their mean."""
        timing, rates, shown = (
            {"seconds": round(self.seconds, 3), "attempt": self.number},
            self._rates(self.step - 1),
            [],
        )
        for slot, run in enumerate(self.runs):
            if self.step > self.ends[slot]:
                continue
            own = {name: values[slot % len(values)] for name, values in means.items()}  # one for all, or one each
            if not all(map(math.isfinite, own.values())):
                self._diverged(slot, ", ".join(f"{name} {value}" for name, value in own.items()))
                continue
            shown.append({**own, "learning_rate": rates[slot]})
            if self.main:
                further = measured[slot] if measured else {}
                append_line(run.folder / "metrics.jsonl", {"step": self.step, **shown[-1], **further, **timing})
                self.sinks[slot](self.step, shown[-1] | further)
        return {"step": self.step, **{name: sum(own[name] for own in shown) / len(shown) for name in shown[0]}}

    def _diverged(self, slot: int, shown: str) -> None:
        """End a job that has gone wrong; if no other is left, the training."""
        remedy = "lower train.learning_rate, or use train.mixed_precision = 'no'"
        message = f"step {self.step}: the training diverged ({shown}); {remedy}"
        self.failures[slot], self.ends[slot] = message, min(self.step, self.ends[slot])
        if self.joint is None or len(self.failures) == len(self.runs):
            raise GraftError(message)
        log.error("%s: %s", self.runs[slot].id, message)
        self.joint.drop(slot)
        self._leave([slot])

    def _asked(self, what: str) -> bool:
        return self.run.take_request(what) if self.main else False

    def _stop_asked(self) -> bool:
        """Whether to stop here. Several processes agree on it, when they wait for each other's figures anyway."""
        asked = self.stopping.is_set() or (not self.stopping.is_set() and self._asked("stop"))
        if asked:
            self.stopping.set()
        if self.accelerator.num_processes == 1:
            return asked
        if self.step % self.config.log_every:
            return False
        votes = torch.tensor([float(asked)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(votes, "sum").item())

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
        # What it draws from the global generators does no harm: each step seeds them anew.
        files = self.task.sample(self.step, self.run.folder / "samples")
        self.run.write_event("sample", step=self.step, files=[path.name for path in files])

    def save(self) -> None:
        """Write a checkpoint and the state."""
        for slot in self.joint.broken() if self.joint is not None else []:  # the loss tells it one step too late
            self._diverged(slot, "its weights are not finite")
        if not self.main:
            return
        scaler = self.accelerator.scaler
        extra = {"seconds": self.seconds, "scaler": scaler.state_dict() if scaler is not None else None}
        early = [(k, end) for k, end in enumerate(self.ends) if end < self.configs[k].steps]
        extra |= {"early": early, "failures": list(self.failures.items()), "patience": self.patience.state()}
        model = {name: tensor.detach().cpu() for name, tensor in self.task.state_dict().items()}
        broken = [name for name, tensor in model.items() if not bool(tensor.isfinite().all())]
        if broken:
            self._diverged(0, f"{', '.join(broken[:3])} not finite")
        checkpoint = Checkpoint(self.step, model, self.optimizer.state_dict(), extra)
        write_checkpoint(self.run.folder / "checkpoints", checkpoint, self.config.keep_checkpoints)
        for run, end in zip(self.runs, self.ends, strict=True):
            run.write_state(step=min(self.step, end))
        self.run.write_event("checkpoint", step=self.step)

    def restore(self) -> None:
        """Continue from the newest whole checkpoint, if there is one."""
        checkpoint = latest_checkpoint(self.run.folder / "checkpoints")
        if checkpoint is None:
            return
        self.task.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        _lay_out(self.optimizer.state)
        if self.accelerator.scaler is not None and checkpoint.extra["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.extra["scaler"])
        self.step, self.seconds = checkpoint.step, checkpoint.extra["seconds"]
        for slot, end in checkpoint.extra["early"]:
            self.ends[slot] = end
        self.failures = dict(checkpoint.extra["failures"])
        self.patience.restore(checkpoint.extra["patience"])
        log.info("resumed at step %d", self.step)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn SIGTERM and SIGINT into a stop at the next step; a second one acts as ever. Only the main thread may."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)}

        def stop(number: int, frame: object) -> None:
            self.stopping.set()
            signal.signal(number, old[signal.Signals(number)])

        for which in old:
            signal.signal(which, stop)
        try:
            yield
        finally:
            for which, handler in old.items():
                signal.signal(which, handler)


def _lay_out(state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Give moments the memory order of their weights (channels last): the fused step pairs them as they lie there."""
    for weight, moments in state.items():
        for name, value in moments.items():
            if value.shape == weight.shape and value.stride() != weight.stride():
                moments[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def _joint(task: Any, groups: Sequence[Mapping[str, Any]], jobs: int) -> JobsAdamW:
    owners = {id(parameter): owner for parameter, owner in task.owned()}
    return JobsAdamW([[(parameter, owners[id(parameter)]) for parameter in group["params"]] for group in groups], jobs)


@contextmanager
def seeds_kept() -> Iterator[None]:
    """Leave torch's global generators as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
