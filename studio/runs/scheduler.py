"""The scheduler of a machine: `python -m graft.studio.runs.scheduler`, started by any client, ended when all is done.

It holds a lock of its own, reads the runs that wait from their folders, and starts `graft.studio.runs.worker` on each
when its devices are free. It keeps nothing that cannot be read again: kill it at any moment, and the trainings go on;
the next one, which the next client or the next worker that ends will start, sees who holds which run.

A run whose process was killed, that hung, or that failed for a reason that passes (a network, a busy device) goes back
into the queue, later each time; after `TRIES` of these without a step gained it has failed.
"""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.studio.errors import GraftError, RunError
from graft.studio.runs.failure import SMALLER, Failure, memory_kills
from graft.studio.runs.folder import Run
from graft.studio.runs.index import Index
from graft.studio.runs.lock import RunLock, lock_facts
from graft.studio.runs.machine import devices, inner_environment, known_roots, machine_folder, roots_stamp
from graft.studio.runs.queue import waiting

TRIES = 3
"""Times that a run is tried again without having come further."""
TICK, RESCAN, IDLE = 0.02, 5.0, 10.0
"""Seconds between two looks at what has changed, at all folders, and until a scheduler without work ends."""
HUNG = 3600.0
"""Seconds without a sign of life (a figure, an event, a line of log) after which a run has hung."""

log = logging.getLogger("graft.scheduler")


@dataclass
class Child:
    """A worker that was started here."""

    process: subprocess.Popen[bytes]
    """The program."""
    run: Run
    """What it was started for."""
    use: Mapping[str, float]
    """Device -> share."""
    batch: str
    """Subjects that it belongs to, or none."""
    memory_kills: int
    """Of the machine, when it started."""
    retries: int
    """Of the run, when it started."""


class Scheduler:
    """Starts what waits, on the devices of this machine.

    Args:
        names: its devices; None asks the machine.
    """

    def __init__(self, names: Sequence[str] | None = None):
        self.capacity = Counter(devices() if names is None else names)
        self.indexes: dict[Path, Index] = {}
        self.stamp = -1
        self.stamps: dict[Path, int] = {}
        self.children: dict[str, Child] = {}
        self.stopping: set[Path] = set()
        self.scanned, self.busy_since = 0.0, time.monotonic()

    def serve(self) -> None:
        """Work until there has been nothing to do for a while."""
        folder = machine_folder()
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                with RunLock(folder):
                    self._until_idle()
            except RunError:
                return  # there is one
            self._changed()
            if not self._anything(start=False):  # a client that came in the last moment saw the lock, and relied on it
                return

    def _until_idle(self) -> None:
        self.busy_since = time.monotonic()
        while time.monotonic() - self.busy_since < IDLE:
            try:
                if self.tick():
                    self.busy_since = time.monotonic()
            except (OSError, ValueError, KeyError, GraftError):
                log.exception("a look at the queue failed")
                time.sleep(1.0)
            time.sleep(TICK)

    def tick(self) -> bool:
        """Look once; start and put back what is due. Return whether there is anything to do."""
        changed, ended = self._changed(), self._reap()
        if time.monotonic() - self.scanned >= RESCAN:
            return self._anything()
        if changed or ended:
            return self._anything(changed, ended)
        return bool(self.children)

    def _changed(self) -> set[Path]:
        """Folders in which a client has announced something since the last look."""
        stamp = roots_stamp()
        if stamp == self.stamp:
            return set()
        self.stamp, before, self.stamps = stamp, self.stamps, known_roots()
        for root in self.stamps.keys() - self.indexes.keys():
            self.indexes[root] = Index(root)
        return {root for root, value in self.stamps.items() if before.get(root) != value}

    def _anything(self, changed: Collection[Path] | None = None, ended: Sequence[Run] = (), start: bool = True) -> bool:
        """Look after the runs that ended badly and those that run, and start the next ones.

        Args:
            changed: folders to read anew; None reads all.
            ended: runs to read anew elsewhere.
            start: whether to start what is due.

        Returns:
            Whether there is anything to do.
        """
        rows: list[dict[str, Any]] = []
        for root, index in self.indexes.items():
            running = index.names("running")
            if changed is None or root in changed:
                index.refresh()
            elif running or ended:
                index.refresh([*running, *(run.id for run in ended if run.folder.parent == root)])
            found = index.rows(["queued", "running", "failed"])
            rows += [{**row, "root": root} for row in found if _ours(row)]
        if changed is None:
            self.scanned = time.monotonic()
        for row in rows:
            if row["status"] == "interrupted" or (row["status"] == "failed" and row.get("failure") == "transient"):
                self._try_again(_run(row), ("running", "failed"))
                row.update(_run(row).state)
            elif row["status"] == "running":
                self._watch(_run(row))
        if start:
            self._start_due(rows)
        return bool(self.children) or any(row["status"] in ("queued", "running") for row in rows)

    def _start_due(self, rows: Sequence[Mapping[str, Any]]) -> None:
        line, now = waiting(rows), time.time()
        if not line:
            return
        use, batches = self._in_use(rows)
        taken = {self._unit(child.run.state) for child in self.children.values()}
        refused = set()  # kinds of runs for which there is no room: the line may be long
        for row in line:
            queue = row["queue"]
            kind = tuple(queue.get(key) for key in ("device", "processes", "share", "batch"))
            if kind in refused or queue.get("not_before", 0) > now or (unit := self._unit(row)) in taken:
                continue
            batch, limit = queue.get("batch", ""), queue.get("limit", 0)
            wanted = None if batch and limit and batches[batch] >= limit else self._place(queue, use)
            if wanted is None:
                refused.add(kind)
                continue
            if not _complete(row, now):
                continue
            if (facts := lock_facts(_run(row).folder)) is not None:  # a worker of another scheduler has it already
                use.update(_used(facts))
                continue
            self._launch(_run(row), queue, wanted)
            taken.add(unit)
            use.update(wanted)
            batches[batch] += 1

    def _unit(self, state: Mapping[str, Any]) -> str:
        return str((state.get("queue") or {}).get("together", [""])[0])

    def _in_use(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Counter[str], Counter[str]]:
        """What the workers take of each device, and how many each batch of subjects has; others' workers, too."""
        use: Counter[str] = Counter()
        batches: Counter[str] = Counter()
        for child in self.children.values():
            use.update(child.use)
            batches[child.batch] += 1
        seen = set(self.children)
        for row in rows:
            facts = lock_facts(_run(row).folder) if row["status"] == "running" else None
            launch = (facts or {}).get("launch")
            if not facts or not launch or launch in seen:
                continue
            seen.add(launch)  # one lock for each run that shares the batch
            use.update(_used(facts))
            batches[row["queue"].get("batch", "")] += 1
        return use, batches

    def _place(self, queue: Mapping[str, Any], use: Mapping[str, float]) -> dict[str, float] | None:
        """Devices for a run, the emptiest first, or None while there are not enough."""
        wanted, share, count = queue.get("device") or "", float(queue.get("share", 1.0)), int(queue.get("processes", 1))
        names = [name for name in self.capacity if _suits(name, wanted)] or ["cpu"]
        if not wanted and any(name != "cpu" for name in names):
            names = [name for name in names if name != "cpu"]
        free = {name: max(self.capacity[name], 1) - use.get(name, 0.0) for name in names}
        count = min(count, len(names)) or 1
        fit = sorted((name for name in names if free[name] >= share - 1e-6), key=lambda name: -free[name])
        return dict.fromkeys(fit[:count], share) if len(fit) >= count else None

    def _launch(self, run: Run, queue: Mapping[str, Any], use: Mapping[str, float]) -> None:
        launch = secrets.token_hex(6)
        environment = inner_environment({**worker_variables(use), "GRAFT_LAUNCH": launch})
        with (run.folder / "log.txt").open("ab") as out:
            process = subprocess.Popen(
                worker_command(run.folder, len(use) if int(queue.get("processes", 1)) > 1 else 1),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd=run.folder.parent,
                env=environment,
            )
        self.children[launch] = Child(process, run, use, queue.get("batch", ""), memory_kills(), _retries(run))
        log.info("started %s on %s, process %d", run.id, ", ".join(use), process.pid)

    def _reap(self) -> list[Run]:
        """Forget workers that have ended and return their runs; one that waits or runs still was killed with it."""
        runs = []
        ended = [launch for launch, child in self.children.items() if child.process.poll() is not None]
        for launch in ended:
            child = self.children.pop(launch)
            runs.append(child.run)
            code = child.process.returncode
            log.info("%s: worker ended with %d", child.run.id, code)
            if code != 0:
                starved = memory_kills() > child.memory_kills and code == -9
                unseen = _retries(child.run) == child.retries  # else its free lock told it before
                self._try_again(child.run, ("queued", "running", "failed") if unseen else (), starved)
        return runs

    def _try_again(self, run: Run, ended_as: Sequence[str], starved: bool = False) -> None:
        """Put a run back into the queue, unless it was stopped, or that has helped nothing several times.

        Args:
            run: nobody holds it.
            ended_as: statuses that it may have left; with another one, someone has put it back meanwhile.
            starved: the kernel killed a process for want of memory while it ran.
        """
        with suppress(RunError, OSError), RunLock(run.folder):
            state = run.state
            passing = state["status"] != "failed" or state.get("failure") == "transient"
            if state["status"] not in ended_as or not passing or not state.get("queue"):
                return
            if (run.folder / "control" / "stop").exists():
                run.write_state(status="stopped", message="killed when it did not stop by itself")
                run.write_event("stopped", message="killed")
                return
            why = state.get("message") or "its process was killed"
            if starved:
                memory = f"the kernel killed it for want of memory. Retry with smaller memory: {SMALLER}"
                _give_up(run, Failure("out of memory", memory))
                return
            tries = _tries(run.group[0])  # it has the checkpoints of all
            if tries >= TRIES:
                _give_up(run, Failure("died", f"{why}; tried {tries + 1} times. See graft runs logs {run.id}"))
                return
            queue = {**state["queue"], "not_before": time.time() + (2.0**tries - 1.0)}
            run.write_event("retry", step=state["step"], message=why)
            run.write_state(status="queued", failure="", queue=queue)
            log.info("%s: %s; it will be tried again", run.id, why)

    def _watch(self, run: Run) -> None:
        """End a run that shows no sign of life any more."""
        if run.folder in self.stopping or time.time() - _sign_of_life(run) < float(os.environ.get("GRAFT_HUNG", HUNG)):
            return
        self.stopping.add(run.folder)
        threading.Thread(target=self._end_hung, args=(run,), daemon=True).start()

    def _end_hung(self, run: Run) -> None:
        from graft.studio.runs.stop import end_process

        log.warning("%s hangs", run.id)
        run.write_event("hung", step=run.state["step"])
        with suppress(RunError):
            end_process(run)
        self.stopping.discard(run.folder)


def worker_command(folder: Path, processes: int = 1) -> list[str]:
    """The command that trains a run folder; on several devices, by accelerate."""
    module = os.environ.get("GRAFT_WORKER", "graft.studio.runs.worker")
    if processes == 1:
        return [sys.executable, "-m", module, str(folder)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    launch += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launch, "--main_process_port", "0", "-m", module, str(folder)]


def worker_variables(use: Mapping[str, float]) -> dict[str, str]:
    """Variables that keep a worker on its devices, and on its share of the processor."""
    share = min(use.values())
    told = {"GRAFT_USE": ",".join(use), "GRAFT_SHARE": str(share)}
    numbers = [int(name.partition(":")[2]) for name in use if name.startswith("cuda:")]
    if numbers:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [visible[k] if k < len(visible) and visible[k] else str(k) for k in numbers]
        told["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    if share < 1.0 and "OMP_NUM_THREADS" not in os.environ:
        told["OMP_NUM_THREADS"] = str(max(1, int(len(os.sched_getaffinity(0)) * share)))
    return told


def _used(facts: Mapping[str, Any]) -> dict[str, float]:
    """What a worker takes of each device, as its lock tells."""
    names = [name for name in str(facts.get("use", "")).split(",") if name]
    return {name: float(facts.get("share") or 1.0) for name in names}


def _ours(row: Mapping[str, Any]) -> bool:
    """Whether a run belongs to this scheduler, not to a cluster's and not to someone's shell."""
    return bool(row.get("queue")) and not row["queue"].get("engine")


def _run(row: Mapping[str, Any]) -> Run:
    return Run(row["root"] / row["id"])


def _suits(name: str, wanted: str) -> bool:
    return not wanted or name == wanted or name.partition(":")[0] == wanted


def _complete(row: Mapping[str, Any], now: float) -> bool:
    """Whether all that share a batch are there; they are written one after the other."""
    root = row["root"]
    names = row["queue"].get("together", [])
    return now - row["queue"].get("submitted", 0) > 60 or all((root / name / "state.json").exists() for name in names)


def _tries(run: Run) -> int:
    """How often a run was tried again since it was put into the queue, or came further."""
    tries = 0
    for event in run.events():
        if event["event"] in ("queued", "checkpoint", "sample"):
            tries = 0
        elif event["event"] == "retry":
            tries += 1
    return tries


def _retries(run: Run) -> int:
    return sum(event["event"] == "retry" for event in run.events())


def _give_up(run: Run, failure: Failure) -> None:
    run.write_state(status="failed", message=failure.message, failure=failure.kind)
    run.write_event("failed", message=failure.message)


def _sign_of_life(run: Run) -> float:
    names = ("state.json", "metrics.jsonl", "events.jsonl", "log.txt")
    lead = run.group[0].folder
    files = [folder / name for folder in {run.folder, lead} for name in names]
    return max((file.stat().st_mtime for file in files if file.exists()), default=time.time())


def main() -> int:
    """Serve this machine."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    with suppress(OSError):
        path = machine_folder() / "scheduler.log"
        if path.stat().st_size > 4 << 20:
            os.truncate(path, 0)
    Scheduler().serve()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
