"""`graft bench jobs`: can a job be lost, and what does the queue cost.

`kills`: trainings of a small regression wait in the queue; at random moments the scheduler, a training, one of its data
workers or the web server, while it is asked to put a run into the queue, gets SIGKILL. The server is started again and
must show every run. At the end every run must be finished, with the bits of one that was left in peace. `lost`: not
finished; `double`: two attempts at one time, told by the attempts' numbers in its events; `corrupt`: a checkpoint that
does not match its hashes; `inexact`: other bits; `unlisted`: not shown by a server that was started again; `orphaned`:
a process that outlived its training. The rest is measured with errands, which train nothing. Without gradio no server
is started, nor killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from graft.studio.bench.errand import errand
from graft.studio.bench.server import Server
from graft.studio.errors import FormatError
from graft.studio.job import Job
from graft.studio.runs.folder import Run, create_run, list_runs, new_folder
from graft.studio.runs.index import Index
from graft.studio.runs.lock import holder
from graft.studio.runs.machine import announce, ensure_scheduler, machine_folder
from graft.studio.runs.queue import requeue, submit, wait
from graft.studio.runs.scheduler import Scheduler

LIMITS = {"overhead ms": 50.0, "list s": 0.5, "index s": 1.0}
"""What is promised: the scheduler's work for a job, `graft runs list` of the waiting jobs, the index made anew."""
WRONG = ("lost", "double", "corrupt", "inexact", "unlisted", "orphaned")
"""What may become of a run."""
LATE = 10.0
"""Seconds that are waited for something to kill, before something else is killed; and for the last to end by itself."""


def run(
    out: Path | None = None,
    kills: int = 100,
    waiting: int = 1000,
    folders: int = 5000,
    started: int = 30,
    clients: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Kill, count and measure.

    Args:
        out: folder for `jobs.json`; None writes nothing.
        kills: in all.
        waiting: runs in the queue while the scheduler is measured.
        folders: runs whose index is made anew.
        started: errands that the measured scheduler starts.
        clients: processes that submit at once.
        seed: of the moments and targets of the kills.
    """
    result: dict[str, Any] = {"waiting": waiting, "folders": folders}
    with _machine() as where:
        for part in (
            lambda: measure(where / "queue", waiting, started),
            lambda: measure_index(where / "many", folders),
            lambda: crowd(where / "crowd", clients),
            lambda: torment(where / "kills", kills, random.Random(seed)),
        ):
            result |= part()
            print("  ".join(f"{key} {value}" for key, value in result.items()), file=sys.stderr, flush=True)
    lost = (*WRONG, "crowd lost", "crowd double")
    result["passed"] = all(result[key] <= most for key, most in LIMITS.items()) and not any(map(result.get, lost))
    result["table"] = _table(result)
    if out is not None:
        from graft.studio.disk import write_json

        write_json(out / "jobs.json", result)
    return result


@contextmanager
def _machine() -> Iterator[Path]:
    """A place where no other scheduler of this machine looks."""
    changed = {"GRAFT_WORKER": "graft.studio.bench.errand", "GRAFT_DEVICES": "cpu", "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in (*changed, "GRAFT_STATE")}
    with tempfile.TemporaryDirectory(prefix="graft-jobs-") as folder:
        os.environ.update(changed, GRAFT_STATE=str(Path(folder) / "state"))
        try:
            yield Path(folder)
        finally:
            _kill(holder(machine_folder()))
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def measure(root: Path, waiting: int, started: int) -> dict[str, Any]:
    """What the scheduler's own work for a job takes, with so many waiting; and `graft runs list` of them."""
    _fill(root, waiting, "queued")
    os.environ["GRAFT_QUIET"] = "1"  # this process is the scheduler
    announce(root)
    del os.environ["GRAFT_QUIET"]
    scheduler = Scheduler(["cpu"])
    scheduler.tick()  # it has read all that is there
    busy, cpu = [0.0], time.process_time()
    while len(busy) <= started:
        before, known = time.perf_counter(), set(scheduler.children)
        scheduler.tick()
        busy[-1] += time.perf_counter() - before
        if set(scheduler.children) - known:
            busy.append(0.0)
        time.sleep(0.02)
    cpu = time.process_time() - cpu
    for child in scheduler.children.values():
        child.process.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    lists = [_list(root) for _ in range(5)]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(root)
    return {
        "overhead ms": 1000 * statistics.median(busy[:-1]),
        "overhead CPU ms": 1000 * cpu / started,
        "list s": min(lists),  # the others measure what else the machine was doing
        "list CPU s": (after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime) / len(lists),
    }


def _list(root: Path) -> float:
    command = [sys.executable, "-m", "graft", "runs", "list", "--runs", str(root), "--json"]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "GRAFT_QUIET": "1"})
    return time.perf_counter() - began


def measure_index(root: Path, folders: int) -> dict[str, Any]:
    """How long an index that was deleted takes to be made again."""
    _fill(root, folders, "finished")
    seconds, cpu = [], []
    for _ in range(3):
        index = Index(root)
        index.close()
        index.path.unlink()
        began, used = time.perf_counter(), time.process_time()
        index = Index(root)
        index.refresh()
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
        if len(index.rows()) != folders:
            raise AssertionError("the index lacks runs")
        index.close()
    shutil.rmtree(root)
    return {"index s": min(seconds), "index CPU s": min(cpu)}


def _fill(root: Path, count: int, status: str) -> None:
    """Write run folders as errands have them, without waiting for the disk."""
    root.mkdir(parents=True)
    first = errand(root)
    job, state = (first.folder / "job.toml").read_bytes(), first.state
    for k in range(1, count):
        name = f"20260101-{k:06d}-{secrets.token_hex(4)}-errand"
        folder = root / name
        (folder / "control").mkdir(parents=True)
        (folder / "job.toml").write_bytes(job)
        queue = {**state["queue"], "order": float(k), "together": [name]}
        (folder / "state.json").write_text(json.dumps({**state, "status": status, "queue": queue}))


def crowd(root: Path, clients: int, each: int = 2) -> dict[str, Any]:
    """Processes that submit at the same time."""
    from graft.studio.bench.line import register

    register()
    root.mkdir()
    job = {"base": "none", "domain": "line", "method": {"name": "fit"}, "data": {}, "train": {"device": "cpu"}}
    submit(job, root)  # imports what is needed, before the others are forked off
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(clients)
    processes = [context.Process(target=_client, args=(gate, job, root, each)) for _ in range(clients)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    runs = list_runs(root)
    wait(runs, 300)
    done = sum(run.status == "finished" for run in runs)
    double = sum(_starts(run) > 1 for run in runs)
    return {"crowd": clients * each + 1, "crowd lost": clients * each + 1 - done, "crowd double": double}


def _client(gate: Any, job: dict[str, Any], root: Path, each: int) -> None:
    gate.wait()
    for _ in range(each):
        submit(job, root)


def _starts(run: Run) -> int:
    return sum(event["event"] == "started" for event in run.events())


def torment(root: Path, kills: int, moments: random.Random) -> dict[str, Any]:
    """Kill until so many kills are done, let the queue end, and look at every run."""
    from graft.studio.bench.line import register

    register()
    os.environ["GRAFT_WORKER"] = "graft.studio.bench.line"
    _kill(holder(machine_folder()))  # the next one has this worker
    train = {"steps": 40, "checkpoint_every": 4, "log_every": 2, "device": "cpu", "threads": 1, "workers": 1}
    train |= {"schedule": "cosine", "mixed_precision": "no"}
    job = {"base": "none", "domain": "line", "method": {"name": "fit", "pause": 0.02}, "data": {}, "train": train}
    root.mkdir()
    peace = submit(job, root)
    wait([peace], 300)
    server = Server(root) if find_spec("gradio") else None
    try:
        found, made = _kill_at_random(job, root, kills, moments, server)
    finally:
        if server is not None:
            server.kill()
    return {**found, **_verdict(made, _bits(peace)), "orphaned": _orphans(root)}


def _kill_at_random(
    job: Mapping[str, Any], root: Path, kills: int, moments: random.Random, server: Server | None
) -> tuple[dict[str, Any], list[Run]]:
    """Keep two runs in the queue, and kill what has been killed least when it is there."""
    made: list[Run] = []
    left: list[Run] = []  # those that are not finished
    asked: list[Run] = []  # the server was killed before it answered
    shown: list[int] = []  # runs that each server lacked, when it was there again
    hits = dict.fromkeys([*(["server"] if server else []), "scheduler", "job", "data worker"], 0)
    given_up, missed = 0, ""

    def new() -> Run:
        made.append(create_run(Job.load(job), new_folder(Job.load(job), runs=root)))
        return made[-1]

    def put(run: Run) -> None:
        if server is None or not server.events:
            requeue(run)
        elif not server.put(run):
            asked.append(run)

    def target(kind: str) -> int | None:
        pid = _target(kind, left)  # the server has a run's lock while it writes
        return None if server is not None and pid == server.process.pid else pid

    def look() -> bool:
        if server is None or server.events or not server.answers():
            return server is not None and bool(server.events)
        shown.append(len({run.id for run in made} - server.listed()))
        return True

    while sum(hits.values()) < kills:
        look()
        for _ in range(len(asked)):
            if (run := asked.pop(0)).status == "created":
                put(run)
        for run in (run for run in made if run.status == "failed"):  # poisoned, the queue says: it was us
            given_up += 1
            requeue(run)
        left = [run for run in made if run.status != "finished"]
        if len(left) < 2:
            put(new())
        ensure_scheduler()
        kinds = [kind for kind in hits if kind != missed]
        kind = moments.choice([kind for kind in kinds if hits[kind] == min(hits[each] for each in kinds)])
        missed = ""
        time.sleep(moments.expovariate(1.2))
        late = time.monotonic() + LATE
        while not (there := look() if kind == "server" else target(kind)) and time.monotonic() < late:
            time.sleep(0.02)
        if not there:
            missed = kind
            continue
        moment = moments.uniform(0, 0.2)
        if kind == "server" and server is not None:
            killer = threading.Timer(moment / 4, server.kill)  # about as long as its answer takes
            run = new()
            killer.start()
            put(run)
            killer.join()
            server.start()
        else:
            time.sleep(moment)
            if not _kill(target(kind)):
                continue
        hits[kind] += 1
        print(f"{sum(hits.values())} kills  {hits}  {len(made)} runs", file=sys.stderr)
    while server is not None and not look():
        time.sleep(0.1)
    for run in asked:
        if run.status == "created":
            requeue(run)
    for _ in range(5):
        wait(made, 300)
        for run in (run for run in made if run.status == "failed"):
            given_up += 1
            requeue(run)
    again = {"unlisted": sum(shown), "server again": max(len(shown) - 1, 0)}
    return {"kills": hits, "runs": len(made), "given up": given_up, **again}, made


def _verdict(made: list[Run], expected: Mapping[str, bytes]) -> dict[str, int]:
    from graft.studio.runs.checkpoints import read_checkpoint

    found = {"lost": 0, "double": 0, "corrupt": 0, "inexact": 0}
    for run in made:
        numbers = [event["attempt"] for event in run.events() if event["event"] == "started"]
        # One killed between the two writes leaves a number out; two at one time would have the same.
        found["double"] += sorted(set(numbers)) != numbers
        if numbers != list(range(1, len(numbers) + 1)):
            print(run.id, run.events(), file=sys.stderr)
        if run.status != "finished":
            found["lost"] += 1
            continue
        try:
            for path in run.folder.glob("checkpoints/[0-9]*"):
                read_checkpoint(path)
            found["inexact"] += _bits(run) != expected
        except FormatError:
            found["corrupt"] += 1
    return found


def _orphans(root: Path) -> int:
    """Processes of trainings that are still there some seconds after all have ended; none stays."""
    program, pids, late = f"{os.environ['GRAFT_WORKER']}\0{root}/".encode(), [0], time.monotonic() + LATE
    while pids and time.monotonic() < late:
        time.sleep(0.1)
        pids = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended
                pids += [int(path.parent.name)] * (program in path.read_bytes())
    return sum(_kill(pid) for pid in pids)


def _bits(run: Run) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in run.adapter().tensors.items()}


def _target(kind: str, runs: list[Run]) -> int | None:
    if kind == "scheduler":
        return holder(machine_folder())
    pids = [pid for run in runs if run.status == "running" or run.status == "queued" if (pid := holder(run.folder))]
    if kind == "job" or not pids:
        return pids[0] if pids and kind == "job" else None
    with suppress(OSError):
        children = Path(f"/proc/{pids[0]}/task/{pids[0]}/children").read_text().split()
        return int(children[-1]) if children else None
    return None


def _kill(pid: int | None) -> bool:
    if not pid or pid == os.getpid():
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _table(result: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{number} of a {kind}" for kind, number in result["kills"].items())
    found = ", ".join(f"{result[key]} {key}" for key in WRONG)
    overhead, listing, index = (f"(limit {limit:g} {key[-2:].strip()})" for key, limit in LIMITS.items())
    queue = f"{result['waiting']} waiting"
    return "\n".join(
        [
            f"{sum(result['kills'].values())} kills ({kinds}) in {result['runs']} runs: {found}; "
            f"{result['given up']} times one was given up and put back",
            f"the web server answered again {result['server again']} times",
            f"{result['crowd']} submissions by clients at once: {result['crowd lost']} lost, "
            f"{result['crowd double']} started twice",
            f"scheduler, a job, {queue:14}{result['overhead ms']:8.1f} ms, "
            f"CPU {result['overhead CPU ms']:.1f} ms  {overhead}",
            f"graft runs list,  {queue:14}{result['list s']:8.3f} s,  CPU {result['list CPU s']:.3f} s  {listing}",
            f"index of {result['folders']} made anew   {result['index s']:12.3f} s,  "
            f"CPU {result['index CPU s']:.3f} s  {index}",
        ]
    )
