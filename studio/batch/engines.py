"""Who trains a batch: this machine's scheduler, a Ray cluster, or Slurm. The run folders say what is done.

`local`  the scheduler of this machine; the batch goes on when the command that waits for it is gone.
`ray`    tasks on a cluster without a shared disk: a run's folder and data go out, its folder comes back. Ray knows
         nothing that matters: while it works, this process holds the runs' locks, so runs whose command or cluster was
         killed are interrupted, and the batch, started again, trains them anew.
`slurm`  one submission of Slurm for each group of runs, on a shared disk, by submitit.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.studio.batch.cluster import connect, settle
from graft.studio.disk import write_atomic
from graft.studio.errors import InputError, RunError
from graft.studio.job import PATHS
from graft.studio.runs.folder import Run
from graft.studio.runs.lock import RunLock
from graft.studio.runs.machine import QUIET, announce, ensure_scheduler
from graft.studio.runs.queue import is_over
from graft.studio.runs.scheduler import worker_command
from graft.studio.runs.worker import together

if TYPE_CHECKING:
    from graft.studio.batch.plan import Batch

Show = Callable[["Batch"], None]
SECONDS = 0.5
"""Between two looks."""


def local(batch: Batch, workers: int, show: Show) -> None:
    """Wait for the scheduler, and start another one should it be killed."""
    announce(batch.runs[0].folder.parent)
    while not all(is_over({**run.state, "status": run.status}) for run in batch.runs):
        ensure_scheduler()
        show(batch)
        time.sleep(SECONDS)


def slurm(batch: Batch, workers: int, show: Show) -> None:
    """Submit a worker for each group of runs and wait for them all.

    `GRAFT_SLURM_CLUSTER` chooses another of submitit's executors, "local" or "debug"; `GRAFT_SLURM` holds parameters of
    `submitit.AutoExecutor.update_parameters`, as TOML: `slurm_partition = "gpu"`, `gpus_per_node = 1`.

    Raises:
        InputError: submitit is not installed, or there is no Slurm.
    """
    import tomllib

    submitit = _library("submitit")
    folder = batch.folder / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    cluster = os.environ.get("GRAFT_SLURM_CLUSTER") or "slurm"
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except RuntimeError as error:
        raise InputError(f"--engine slurm ({cluster})", str(error), "Run it where sbatch is, or use local") from error
    parameters = {"timeout_min": 24 * 60, **tomllib.loads(os.environ.get("GRAFT_SLURM", ""))}
    parameters |= {"slurm_array_parallelism": workers} if cluster == "slurm" else {}
    executor.update_parameters(name=batch.name, **parameters)
    with executor.batch():  # an array
        started = [executor.submit(run_worker, str(lead.folder), _processes(lead)) for lead, _ in _groups(batch)]
    while not all(job.done() for job in started):
        show(batch)
        time.sleep(SECONDS)


def run_worker(folder: str, processes: int = 1) -> int:
    """What a node does: the program that trains a run folder, as everywhere; on several of its devices if asked."""
    environment = {**os.environ, QUIET: "1"}
    command = worker_command(Path(folder), processes)
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode


def ray(batch: Batch, workers: int, show: Show) -> None:
    """Ship groups of runs to a Ray cluster, `workers` at a time, and bring back what becomes of them.

    `RAY_ADDRESS` names the cluster, which must demand a token and have private addresses. Without one, a small one is
    started here: on the loopback interface, with a token.

    Raises:
        InputError: Ray is not installed, or strangers may reach the cluster.
    """
    address = settle()  # before Ray is imported
    library = _library("ray")
    connect(library, address, {name: os.environ[name] for name in _CARRIED if name in os.environ})
    try:
        waiting = _groups(batch)
        flying: dict[Any, tuple[ExitStack, list[Run]]] = {}
        task = library.remote(num_cpus=1, num_gpus=_gpus(batch), max_retries=2)(train_parcel)
        while waiting or flying:
            while waiting and len(flying) < workers:
                lead, members = waiting.pop(0)
                stack = ExitStack()
                try:
                    for run in members:
                        stack.enter_context(RunLock(run.folder))
                except RunError:
                    stack.close()
                    continue  # another command trains it
                count = _processes(lead)
                wide = task.options(num_cpus=count, num_gpus=count) if count > 1 else task
                flying[wide.remote(pack(members), lead.id)] = (stack, members)
            done, _ = library.wait(list(flying), timeout=SECONDS)
            for reference in done:
                stack, members = flying.pop(reference)
                with stack:
                    _receive(library, reference, members)
            show(batch)
    finally:
        library.shutdown()


_CARRIED = ("PYTHONPATH", "GRAFT_WORKER", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
ENGINES: dict[str, Callable[[Batch, int, Show], None]] = {"local": local, "ray": ray, "slurm": slurm}


def _receive(library: Any, reference: Any, members: Sequence[Run]) -> None:
    from graft.studio.runs.attempt import fail

    try:
        parcel = library.get(reference)
    except Exception as error:  # the node is gone, or nothing could be run there
        fail(members, ConnectionError(f"the cluster lost it: {str(error).splitlines()[-1]}"))
        return
    root = members[0].folder.parent
    for name, data in sorted(parcel.items(), key=lambda item: item[0].endswith("/state.json")):  # the state at last
        run, _, rest = name.partition("/")
        if run not in {member.id for member in members} or rest == "job.toml" or ".." in Path(rest).parts:
            continue
        if rest == "state.json":
            data = json.dumps({**json.loads(data), "queue": Run(root / run).state.get("queue")}, indent=1).encode()
        write_atomic(root / run / rest, data)


def pack(runs: Sequence[Run]) -> dict[str, bytes]:
    """Run folders and the data of their jobs as files by name: `RUN/job.toml`, `data/0/a.png`."""
    parcel: dict[str, bytes] = {}
    places: dict[str, str] = {}
    for run in runs:
        job = run.job
        sections = {"data": dict(job.data), "method": dict(job.method), "eval": dict(job.eval)}
        for section, key in PATHS:
            path = sections[section].get(key)
            if not isinstance(path, str) or not path or not Path(path).exists():
                continue
            place = places.setdefault(path, f"data/{len(places)}/{Path(path).name}")
            sections[section][key] = f"../{place}"  # seen from the run's folder
            parcel |= _files(Path(path), place)
        moved = replace(job, method=sections["method"], data=sections["data"], eval=sections["eval"])
        parcel |= {f"{run.id}/{name}": data for name, data in _run_files(run).items()}
        parcel[f"{run.id}/job.toml"] = moved.to_toml().encode()
    return parcel


def train_parcel(parcel: Mapping[str, bytes], lead: str) -> dict[str, bytes]:
    """What a node of the cluster does: unpack, run the worker, pack again."""
    with tempfile.TemporaryDirectory(prefix="graft-") as folder:
        root = Path(folder)
        for name, data in parcel.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        runs = [Run(path.parent) for path in sorted(root.glob("*/job.toml"))]
        for run in runs:
            state = run.state
            run.write_state(queue={**state["queue"], "cwd": folder, "batch": ""}, status="queued")
        environment = {**os.environ, "GRAFT_STATE": str(root / ".state"), QUIET: "1"}
        command = worker_command(root / lead, _processes(Run(root / lead)))
        done = subprocess.run(command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True)
        if done.returncode < 0 or any(run.state["status"] == "queued" for run in runs):
            raise RuntimeError(
                f"the worker ended with {done.returncode}: {done.stderr.decode(errors='replace')[-500:]}"
            )
        return {f"{run.id}/{name}": data for run in runs for name, data in _run_files(run).items()}


def _run_files(run: Run) -> dict[str, bytes]:
    skipped = ("lock", "control")
    files = [path for path in run.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    named = {path.relative_to(run.folder).as_posix(): path for path in files}
    return {
        name: path.read_bytes()
        for name, path in named.items()
        if name.partition("/")[0] not in skipped and not name.partition("/")[0].startswith(".")
    }


def _files(path: Path, place: str) -> dict[str, bytes]:
    if path.is_file():
        return {place: path.read_bytes()}
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {f"{place}/{file.relative_to(path).as_posix()}": file.read_bytes() for file in files}


def _groups(batch: Batch) -> list[tuple[Run, list[Run]]]:
    """What waits: a run of each group, and the group."""
    found: dict[frozenset[str], tuple[Run, list[Run]]] = {}
    for run in batch.missing:
        if run.state["status"] == "queued":
            members = together(run)
            found.setdefault(frozenset(member.id for member in members), (run, members))
    return list(found.values())


def _processes(run: Run) -> int:
    """Devices that train a run together; the processor is one."""
    queue = run.state.get("queue") or {}
    return 1 if str(queue.get("device", "")).startswith("cpu") else int(queue.get("processes", 1))


def _gpus(batch: Batch) -> int:
    from graft.studio.runs.machine import devices

    wanted = batch.entries[0].job.train.device
    return int(wanted.startswith("cuda") if wanted else any(name != "cpu" for name in devices()))


def _library(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        remedy = 'Run: pip install "graft-studio[cluster]"'
        raise InputError(f"--engine {name}", f"the library {name!r} is not installed", remedy) from error
