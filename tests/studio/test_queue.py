"""The queue: order, devices, retries, stop; nothing that is not in a run folder can be lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.studio.bench.errand import errand
from graft.studio.cli import main
from graft.studio.errors import DiskFullError, InputError, RunError
from graft.studio.job import Job
from graft.studio.runs import Run, RunLock, holder
from graft.studio.runs import scheduler as scheduling
from graft.studio.runs.failure import classify
from graft.studio.runs.index import Index
from graft.studio.runs.lock import start_time
from graft.studio.runs.machine import announce, devices, inner_environment, machine_folder, outer_environment
from graft.studio.runs.queue import cancel, move, requeue, shift, smaller, wait, waiting
from graft.studio.runs.scheduler import Scheduler, worker_command, worker_variables
from graft.studio.runs.stop import stop_run
from graft.studio.runs.worker import Taken, claimed, together


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAFT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("GRAFT_WORKER", "graft.studio.bench.errand")
    monkeypatch.setenv("GRAFT_DEVICES", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(Path(graft.__file__).parents[1]))  # for processes that a test starts


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def scheduler(runs: Path) -> Iterator[Scheduler]:
    """One in this process, which knows the folder; its workers end with the test."""
    with RunLock(machine_folder_made()):  # so that nobody starts another
        announce(runs)
        made = Scheduler(["cpu"])
        yield made
    for child in made.children.values():
        child.process.kill()
        child.process.wait()


def machine_folder_made() -> Path:
    machine_folder().mkdir(parents=True, exist_ok=True)
    return machine_folder()


def work(scheduler: Scheduler, until: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "it takes too long"
        scheduler.scanned = 0.0
        scheduler.tick()
        time.sleep(0.01)


def line(runs: Path) -> list[str]:
    index = Index(runs)
    index.refresh()
    return [row["id"] for row in waiting(index.rows())]


def events(run: Run) -> list[str]:
    return [event["event"] for event in run.events()]


def test_higher_priorities_first_then_the_order_of_coming(runs: Path) -> None:
    a, b, c, d = (errand(runs, priority, order=k) for k, priority in enumerate((0, 0, 5, -1)))
    assert line(runs) == [c.id, a.id, b.id, d.id]
    with RunLock(machine_folder_made()):
        move(b, first=True)
        assert line(runs) == [c.id, b.id, a.id, d.id]
        move(d, priority=7)
        assert line(runs)[0] == d.id
        move(b, last=True)
        assert line(runs) == [d.id, c.id, a.id, b.id]
    assert cancel(a)
    assert (a.status, cancel(a)) == ("stopped", False)
    with pytest.raises(RunError, match="it is stopped, not queued"):
        move(a, first=True)


def test_one_place_ahead_or_back(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c, d = (errand(runs, priority, order=k) for k, priority in enumerate((5, 0, 0, 0)))
    with RunLock(machine_folder_made()):
        assert line(runs) == [a.id, b.id, c.id, d.id]
        shift(d, -1)
        assert line(runs) == [a.id, b.id, d.id, c.id]
        shift(d, -2)
        assert line(runs) == [d.id, a.id, b.id, c.id]
        assert d.state["queue"]["priority"] == 5, "it passed one of priority 5"
        shift(d, 9)
        assert line(runs) == [a.id, b.id, c.id, d.id]
        assert d.state["queue"]["priority"] == 0
        before = d.state
        shift(d, 1)
        assert d.state["queue"] == before["queue"], "it is the last"
        assert main(["runs", "order", d.id, "--up", "--runs", str(runs)]) == 0
        assert main(["runs", "order", a.id, "--down", "--runs", str(runs)]) == 0
        assert line(runs) == [b.id, a.id, d.id, c.id]
        assert main(["runs", "order", a.id, "--up", "--first", "--runs", str(runs)]) == 2
    cancel(a)
    with pytest.raises(RunError, match="it is stopped, not queued"):
        shift(a, 1)


def test_places_can_be_changed_among_runs_that_came_at_once(runs: Path) -> None:
    made = {run.id: run for run in (errand(runs, order=7.0) for _ in range(4))}
    with RunLock(machine_folder_made()):
        expected = line(runs)
        for name, places in ((expected[3], -1), (expected[0], 2), (expected[1], -1), (expected[2], 1)):
            shift(made[name], places)
            old = expected.index(name)
            expected.insert(max(0, old + places), expected.pop(old))
            assert line(runs) == expected


def test_one_device_one_run_at_a_time(runs: Path, scheduler: Scheduler) -> None:
    first, second = errand(runs, order=1, seconds=0.05), errand(runs, order=2)
    work(scheduler, lambda: "finished" in events(second))
    assert events(first) == events(second) == ["queued", "started", "finished"]
    assert first.events()[-1]["time"] < second.events()[1]["time"]


def test_a_killed_run_is_tried_again_and_a_poisoned_one_given_up(
    runs: Path, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "TRIES", 1)
    once, always = errand(runs, order=1, dies=1), errand(runs, order=2, dies=9)
    work(scheduler, lambda: once.status == "finished" and always.status == "failed")
    assert events(once) == ["queued", "started", "retry", "started", "finished"]
    assert events(always) == ["queued", "started", "retry", "started", "failed"]
    assert "tried 2 times. See graft runs logs" in always.state["message"]


def test_steps_gained_forgive_earlier_deaths(runs: Path, scheduler: Scheduler) -> None:
    run = errand(runs)
    for word in (*["retry"] * scheduling.TRIES, "checkpoint", "retry"):
        run.write_event(word)
    run.write_state(status="running")
    scheduler._changed()
    scheduler._anything(start=False)
    assert run.status != "failed"
    assert events(run).count("retry") == scheduling.TRIES + 2


def test_only_what_passes_is_tried_again(runs: Path, scheduler: Scheduler) -> None:
    passing, lasting = errand(runs, order=1), errand(runs, order=2)
    passing.write_state(status="failed", failure="transient", message="connection reset")
    lasting.write_state(status="failed", failure="error", message="a bug")
    work(scheduler, lambda: passing.status == "finished")
    assert lasting.status == "failed"
    assert [e["message"] for e in passing.events() if e["event"] == "retry"] == ["connection reset"]


def test_stopped_means_stopped_even_if_it_had_to_be_killed(runs: Path, scheduler: Scheduler) -> None:
    run = errand(runs, seconds=60)
    work(scheduler, lambda: run.status == "running")
    (child,) = scheduler.children.values()
    assert holder(run.folder) == child.process.pid
    assert stop_run(run, ask=0.1, terminate=0.5) == "stopped"
    child.process.wait()
    scheduler._anything()
    scheduler.tick()
    assert run.status == "stopped"
    assert "retry" not in events(run)
    requeue(run)
    assert run.status == "queued"


def test_a_run_that_hangs_is_ended_and_tried_again(
    runs: Path, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = errand(runs, seconds=60)
    work(scheduler, lambda: "started" in events(run))
    monkeypatch.setenv("GRAFT_HUNG", "0")
    scheduler._anything()
    monkeypatch.delenv("GRAFT_HUNG")
    work(scheduler, lambda: "retry" in events(run))
    assert events(run)[:4] == ["queued", "started", "hung", "retry"]


def test_a_scheduler_that_comes_later_sees_who_works(runs: Path, scheduler: Scheduler) -> None:
    running, next_one = errand(runs, order=1, seconds=60), errand(runs, order=2)
    work(scheduler, lambda: running.status == "running")
    other = Scheduler(["cpu"])  # as after kill -9 of the first
    other.tick()
    assert not other.children
    assert next_one.status == "queued"


def test_a_run_that_another_worker_prepares_is_left_alone(runs: Path, scheduler: Scheduler) -> None:
    """It says queued until its first step; its lock tells who has it, and which device is taken."""
    taken, next_one = errand(runs, order=1), errand(runs, order=2)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom graft.studio.runs.lock import RunLock\n"
        "with RunLock(Path(sys.argv[1]), launch='other', use='cpu', share='1.0'): print(flush=True), time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(taken.folder)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        scheduler.tick()
        assert not scheduler.children and taken.status == next_one.status == "queued"
        other.kill()
    work(scheduler, lambda: next_one.status == "finished")
    assert taken.status == "finished"


def test_of_two_workers_one_goes_away(runs: Path) -> None:
    run = errand(runs)
    code = "import sys, time; from graft.studio.runs.worker import claimed; from graft.studio.runs import Run\n"
    code += "from pathlib import Path\nwith claimed(Run(Path(sys.argv[1]))): print('mine', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(run.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        with pytest.raises(Taken), claimed(run):
            pass
        process.kill()
    with claimed(run) as members:
        assert members == [run]
    cancel(run)
    with pytest.raises(Taken), claimed(run):
        pass


def test_a_batch_not_yet_begun_is_of_those_that_wait(runs: Path) -> None:
    a, b, c = (errand(runs) for _ in range(3))
    for run in (a, b, c):
        run.write_state(queue={**run.state["queue"], "together": [a.id, b.id, c.id, "gone"]})
    cancel(b)
    assert together(c) == [a, c]
    c.write_state(attempt=1)
    assert together(c) == [c], "it was begun alone"


@pytest.mark.alone
def test_kill_9_of_the_scheduler_loses_nothing(runs: Path) -> None:
    made = [errand(runs, order=k, seconds=0.1) for k in range(3)]
    announce(runs)
    deadline = time.monotonic() + 20
    while made[0].status == "queued" and time.monotonic() < deadline:
        time.sleep(0.01)
    pid = holder(machine_folder())
    assert pid
    os.kill(pid, signal.SIGKILL)
    wait(made, 30)
    assert [run.status for run in made] == ["finished"] * 3
    assert [events(run).count("started") for run in made] == [1, 1, 1]
    assert holder(machine_folder()) not in (None, pid)
    os.kill(holder(machine_folder()) or 0, signal.SIGKILL)


def test_devices_shares_and_limits(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = Scheduler(["cuda:0", "cuda:1", "cpu"])
    assert two._place({}, {}) == {"cuda:0": 1.0}
    assert two._place({}, {"cuda:0": 1.0}) == {"cuda:1": 1.0}
    assert two._place({}, {"cuda:0": 1.0, "cuda:1": 1.0}) is None, "not on the processor unasked"
    assert two._place({"device": "cpu"}, {"cuda:0": 1.0}) == {"cpu": 1.0}
    assert two._place({"device": "cuda:1"}, {"cuda:1": 0.5}) is None
    assert two._place({"share": 0.5}, {"cuda:0": 1.0, "cuda:1": 0.5}) == {"cuda:1": 0.5}
    assert two._place({"processes": 2}, {"cuda:0": 0.5}) is None
    assert two._place({"processes": 2}, {}) == {"cuda:0": 1.0, "cuda:1": 1.0}
    monkeypatch.setenv("GRAFT_DEVICES", "cpu,cpu")
    assert devices() == ["cpu", "cpu"]
    assert Scheduler()._place({}, {"cpu": 1.0}) == {"cpu": 1.0}


def test_several_devices_are_launched_by_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFT_WORKER")
    assert worker_command(Path("/r")) == [sys.executable, "-m", "graft.studio.runs.worker", "/r"]
    command = worker_command(Path("/r"), 4)
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args(command[3:])
    assert (args.multi_gpu, args.num_processes, args.num_machines, args.module) == (True, 4, 1, True)
    assert (args.training_script, args.training_script_args) == ("graft.studio.runs.worker", ["/r"])


def test_a_worker_keeps_to_its_devices_and_its_children_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    told = worker_variables({"cuda:1": 0.5, "cuda:2": 0.5})
    assert told["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert int(told["OMP_NUM_THREADS"]) >= 1
    for name, value in inner_environment(told).items():
        monkeypatch.setenv(name, value)
    outer = outer_environment()
    assert outer["CUDA_VISIBLE_DEVICES"] == "4,6,7"
    assert not {"OMP_NUM_THREADS", "GRAFT_OUTER", "GRAFT_USE"} & set(outer)


def test_the_index_is_a_copy(runs: Path) -> None:
    made = sorted((errand(runs) for _ in range(3)), key=lambda run: run.id)
    made[0].write_state(status="running")
    index = Index(runs)
    index.refresh()
    rows = index.rows()
    assert [row["status"] for row in rows] == ["interrupted", "queued", "queued"]
    for damage in (Path.unlink, lambda path: path.write_bytes(b"x" * 5000)):
        index.close()
        for side in index.path.parent.glob("*-*"):
            side.unlink()
        damage(index.path)
        index = Index(runs)
        index.refresh()
        assert index.rows() == rows
    made[1].write_state(status="stopped", message="because")
    made[2].folder.rename(runs / ".gone")
    index.refresh()
    assert [(row["id"], row["message"]) for row in index.rows(["stopped"])] == [(made[1].id, "because")]
    assert len(index.rows()) == 2


class ConnectError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (InputError("x", "is wrong", "Correct it"), "input", "Correct it"),
        (DiskFullError("d", "no space", "Free some space"), "disk full", "Free some space"),
        (OSError(28, "No space left on device"), "disk full", "graft runs resume"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory", "--smaller-memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory", "smaller memory"),
        (MemoryError(), "out of memory", "graft runs clone"),
        (ConnectError("refused"), "transient", "refused"),
        (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), "transient", "busy"),
        (ZeroDivisionError("division by zero"), "error", "division"),
    ],
)  # fmt: skip
def test_failures_are_told_apart(error: Exception, kind: str, told: str) -> None:
    failure = classify(error)
    assert failure.kind == kind
    assert told in failure.message
    assert failure.transient == (kind == "transient")


def test_a_cause_counts_too() -> None:
    try:
        try:
            raise ConnectionResetError("reset")
        except OSError as error:
            raise InputError("hub/x", "cannot be loaded", "Check the connection") from error
    except InputError as error:
        assert classify(error).transient


def test_smaller_memory_is_the_same_step(make_job: Callable[..., dict[str, Any]]) -> None:
    job = smaller(Job.load(make_job(batch_size=8, gradient_accumulation=2)))
    assert (job.train.batch_size, job.train.gradient_accumulation) == (4, 4)
    with pytest.raises(RunError, match="one row already"):
        smaller(Job.load(make_job(batch_size=1)))


def test_the_commands(
    make_job: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_QUIET", "1")  # nobody trains
    (tmp_path / "job.toml").write_text(Job.load(make_job(batch_size=4)).to_toml())

    def answer(*argv: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main([*argv, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    first, second = answer("train", "job.toml", "job.toml", "--queue")
    third = answer("train", "job.toml", "--queue", "--priority", "3", "--set", "train.steps=9")
    assert third["steps"] == 9
    assert not (Path(third["folder"]) / "env.json").exists(), "what trains it writes that"

    def places() -> dict[str, int]:
        return {row["id"]: row["place"] for row in answer("runs", "list", "--status", "queued")}

    assert places() == {third["id"]: 1, first["id"]: 2, second["id"]: 3}
    assert answer("runs", "order", second["id"], "--first")["queue"]["priority"] == 0
    assert places()[second["id"]] == 2
    assert answer("runs", "stop", third["id"], "--no-wait")["status"] == "stopped"
    assert "is stopped, not queued" in answer("runs", "order", third["id"], "--first", code=2)["error"]["message"]
    assert answer("runs", "resume", third["id"], "--queue", "--priority", "-1")["status"] == "queued"
    assert places()[third["id"]] == 3
    clone = answer("runs", "clone", first["id"], "--queue", "--smaller-memory", "--set", "train.steps=5")
    assert clone["id"] != first["id"]
    job = Run(Path(clone["folder"])).job.train
    assert (job.steps, job.batch_size, job.gradient_accumulation) == (5, 2, 2)
    assert "Add --queue" in answer("train", "job.toml", "--first", code=2)["error"]["message"]
    done = answer("runs", "resume", first["id"])
    assert done["status"] == "finished"
    assert (Path(first["folder"]) / "env.json").exists()
    assert "it is finished" in answer("runs", "resume", first["id"], "--queue", code=2)["error"]["message"]


def test_the_lock_tells_a_process_from_a_later_one_of_its_number(runs: Path) -> None:
    run = errand(runs)
    with RunLock(run.folder):
        facts = json.loads((run.folder / "state.json").read_text())
        assert facts["status"] == "queued"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        first = start_time(process.pid)
        assert first is not None
        assert first == start_time(process.pid)
        assert first != start_time(os.getpid())
        process.kill()
