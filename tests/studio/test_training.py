"""The one loop: what it computes, when it saves, how it stops, that it resumes with the same bits."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.studio import loop
from graft.studio.batches import _begin, batches, step_seed
from graft.studio.disk import write_atomic
from graft.studio.errors import DiskFullError, GraftError, InputError, RunError
from graft.studio.job import Job, TrainConfig
from graft.studio.loop import learning_rate
from graft.studio.runs import Run, RunLock, list_runs
from graft.studio.runs.checkpoints import latest_checkpoint
from graft.studio.runs.folder import create_run
from graft.studio.training import resume, train, train_many

Make = Callable[..., dict[str, Any]]


def weights(run: Run) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in run.adapter().tensors.items()}


def test_the_loop_is_plain_adamw(make_job: Make, toy: Any, tmp_path: Path) -> None:
    """The same numbers from a loop written in ten lines."""
    settings = {"learning_rate": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "schedule": "cosine"}
    job = make_job({"dropout": 0.2}, **settings, warmup_steps=2, gradient_accumulation=2)
    run = train(job, tmp_path / "run")
    task = toy.prepare(run.job)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3, weight_decay=0.1)
    for step in range(6):
        for group in optimizer.param_groups:
            warm, past = (step + 1) / 2, (step - 2) / 4
            group["lr"] = 3e-3 * (warm if step < 2 else (1 + math.cos(math.pi * past)) / 2)
        for micro in range(2):
            seed = step_seed(0, step, micro, 0)
            batch = task.batch(step, torch.Generator().manual_seed(seed))
            torch.manual_seed(seed)
            (task(batch)[0] / 2).backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in run.adapter().tensors.items():
        torch.testing.assert_close(tensor, task.nets[0].state_dict()[name], rtol=1e-6, atol=1e-7)


def test_batches_drawn_ahead_by_other_processes_change_no_bit(make_job: Make, tmp_path: Path) -> None:
    settings = {"gradient_accumulation": 2, "checkpoint_every": 2}
    alone = train(make_job({"dropout": 0.2}, **settings), tmp_path / "alone")
    ahead = train(make_job({"dropout": 0.2}, **settings, workers=2), tmp_path / "ahead")
    assert weights(ahead) == weights(alone)
    assert [row["loss"] for row in ahead.metrics()] == [row["loss"] for row in alone.metrics()]


def test_a_batch_that_fails_in_another_process_says_why(make_job: Make, toy: Any, tmp_path: Path, monkeypatch) -> None:
    def broken(self: Any, step: int, generator: torch.Generator) -> None:
        raise InputError("row 3", "it is empty", "take it out")

    monkeypatch.setattr(toy.Task, "batch", broken)
    with pytest.raises(Exception, match="row 3: it is empty"):
        train(make_job(workers=1), tmp_path / "run")
    assert Run(tmp_path / "run").status == "failed"


class Slow:
    """Its first batch takes a minute; it writes the number of the process that draws it."""

    def __init__(self, file: Path):
        self.file = file

    def batch(self, step: int, generator: torch.Generator) -> None:
        write_atomic(self.file, str(os.getpid()).encode())
        time.sleep(60)


def test_a_data_worker_whose_training_was_killed_does_not_begin() -> None:
    late = multiprocessing.get_context("fork").Process(target=_begin, args=(1, 0))  # its parent is another
    late.start()
    late.join(5)
    assert late.exitcode == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_data_worker_ends_with_its_training(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    job = TrainConfig(steps=1, workers=1)
    training = multiprocessing.get_context("fork").Process(target=lambda: next(batches(Slow(file), [job], 0, 0)))
    training.start()
    for _ in range(500):
        if file.exists():
            break
        time.sleep(0.01)
    status = Path(f"/proc/{file.read_text()}/status")
    assert status.exists()
    training.kill()
    training.join()
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():  # nobody may wait for it
            return
        time.sleep(0.01)
    raise AssertionError("it is still there")


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules(schedule: Any) -> None:
    config = TrainConfig(steps=110, warmup_steps=10, schedule=schedule)
    rates = [learning_rate(config, 2.0, step) for step in range(110)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx({"constant": 2.0, "linear": 1.0, "cosine": 1.0}[schedule])
    assert rates[109] < 0.03 or schedule == "constant"


def test_a_finished_run_says_everything(make_job: Make, tmp_path: Path) -> None:
    run = train(make_job(), tmp_path / "run")
    assert run.status == "finished"
    rows = run.metrics()
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {"loss", "first", "learning_rate", "seconds", "attempt"} <= set(rows[0])
    assert [event["event"] for event in run.events()] == ["started", "checkpoint", "finished"]
    assert run.adapter().card.metrics["loss"] == rows[-1]["loss"]
    assert resume(run) == run


def test_metrics_are_means_over_their_steps(make_job: Make, tmp_path: Path) -> None:
    fine, coarse = (train(make_job(log_every=n), tmp_path / str(n)).metrics() for n in (1, 3))
    for i, row in enumerate(coarse):
        assert row["loss"] == pytest.approx(sum(r["loss"] for r in fine[3 * i : 3 * i + 3]) / 3)


def stopped_at(job: dict[str, Any], folder: Path, toy: Any, step: int) -> Run:
    """A run that someone asks to stop while it is at a step."""
    original = toy.Task.batch

    def batch(self: Any, at: int, generator: torch.Generator) -> Any:
        micro = job["train"].get("gradient_accumulation", 1)
        if at == (step - 1) * micro and not (folder / "asked").exists():
            (folder / "asked").touch()
            Run(folder).request("stop")
        return original(self, at, generator)

    toy.Task.batch = batch
    try:
        return train(job, folder)
    finally:
        toy.Task.batch = original


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_resume_ends_with_the_same_bits(make_job: Make, toy: Any, tmp_path: Path, precision: str) -> None:
    job = make_job(steps=9, schedule="linear", gradient_accumulation=2, mixed_precision=precision)
    whole = train(job, tmp_path / "whole")
    run = stopped_at(job, tmp_path / "run", toy, 4)
    assert (run.status, run.state["step"]) == ("stopped", 4)
    with pytest.raises(RunError, match="stopped and has no result"):
        run.adapter()
    assert resume(run).status == "finished"
    assert weights(run) == weights(whole)
    assert [row["attempt"] for row in run.metrics()] == [1, 1, 2, 2, 2]


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16"), (False, "no")])
def test_auto_is_settled_once(
    make_job: Make, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, precision: str
) -> None:
    """A machine with the other answer goes on with what the run began with, from a checkpoint or from a bare folder."""
    whole = weights(train(make_job(mixed_precision=precision), tmp_path / "whole"))
    monkeypatch.setattr(loop, "fast_bfloat16", lambda device: fast)
    begun = stopped_at(make_job(mixed_precision="auto"), tmp_path / "begun", toy, 3)
    made = create_run(Job.load(make_job(mixed_precision="auto")), tmp_path / "made")
    assert (begun.job.train.mixed_precision, made.job.train.mixed_precision) == (precision, "auto")
    assert weights(resume(made)) == whole
    monkeypatch.setattr(loop, "fast_bfloat16", lambda device: not fast)
    assert weights(resume(begun)) == whole
    assert begun.job == made.job
    assert begun.job.train.mixed_precision == precision


def test_bfloat16_is_fast_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for facts, fast in (({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx512_f": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda facts=facts: facts, raising=False)
        assert loop.fast_bfloat16("cpu") is fast
        assert not loop.fast_bfloat16("mps")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not loop.fast_bfloat16("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert not loop.fast_bfloat16("cuda:0")


def test_a_resumed_run_sees_the_same_data(make_job: Make, toy: Any, tmp_path: Path) -> None:
    run = stopped_at(make_job(), tmp_path / "run", toy, 3)
    seen: list[Any] = []
    original = toy.prepare

    def prepare(job: Any, folder: Path | None = None) -> Any:
        seen.append(original(job))
        return seen[-1]

    toy.prepare = prepare
    try:
        resume(run)
        train(make_job(), tmp_path / "whole")
    finally:
        toy.prepare = original
    resumed, whole = (dict(task.seen) for task in seen)
    assert list(resumed) == [3, 4, 5]
    assert all(torch.equal(resumed[step], whole[step]) for step in resumed)
    assert len({tuple(x.flatten().tolist()) for x in whole.values()}) == 6


def test_a_careless_sample_changes_nothing(make_job: Make, tmp_path: Path) -> None:
    plain = train(make_job(), tmp_path / "plain")
    drawn = train({**make_job(), "sample": {"every": 2}}, tmp_path / "drawn")
    assert [path.name for path in drawn.samples()] == ["000002.png", "000004.png", "000006.png"]
    assert (drawn.folder / "result" / "preview.png").read_bytes() == b"picture"
    assert weights(drawn) == weights(plain)


def test_training_leaves_the_callers_generator_and_threads(make_job: Make, tmp_path: Path) -> None:
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train({**make_job(threads=2), "sample": {"every": 3}}, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_divergence_is_an_error_and_never_saved(make_job: Make, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="the training diverged.*nan.*lower train.learning_rate"):
        train(make_job({"breaks_at": 4}, steps=40, checkpoint_every=1), tmp_path / "run")
    run = Run(tmp_path / "run")
    assert run.status == "failed"
    assert "diverged" in run.state["message"]
    assert "diverged" in (run.folder / "log.txt").read_text()
    found = latest_checkpoint(run.folder / "checkpoints")
    assert found is not None
    assert found.step == 4
    assert all(bool(tensor.isfinite().all()) for tensor in found.model.values())


def test_checkpoints_by_steps_and_by_request(make_job: Make, tmp_path: Path) -> None:
    run = train(make_job(steps=10, checkpoint_every=4), tmp_path / "run")
    assert [e["step"] for e in run.events() if e["event"] == "checkpoint"] == [4, 8, 10]
    run = train(make_job(steps=5, checkpoint_seconds=1e-9), tmp_path / "often")
    assert [e["step"] for e in run.events() if e["event"] == "checkpoint"] == [1, 2, 3, 4, 5]


def test_a_wrong_job_leaves_no_run(make_job: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="width -1"):
        train(make_job({"width": -1}), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_trained_cannot_be_resumed(make_job: Make, toy: Any, tmp_path: Path) -> None:
    run = stopped_at(make_job(), tmp_path / "run", toy, 2)
    with RunLock(run.folder), pytest.raises(RunError, match="is training this run"):
        resume(run)


def test_no_space_stops_the_run_and_leaves_it_whole(
    make_job: Make, tmp_path: Path, files_limited_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    job = make_job({"width": 400}, steps=8, checkpoint_every=3)  # a checkpoint needs 10 kB, the small files do not
    with files_limited_to(6000), pytest.raises(DiskFullError, match="no space left"):
        train(job, tmp_path / "run")
    run = Run(tmp_path / "run")
    assert run.status == "failed"
    assert not list((run.folder / "checkpoints").iterdir())
    assert weights(resume(run)) == weights(train(job, tmp_path / "whole"))


def test_preflight_refuses_before_the_work(make_job: Make, tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(DiskFullError, match="MB are needed"):
        train(make_job(keep_checkpoints=free), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_many_jobs_share_a_batch_and_end_as_if_alone(make_job: Make, tmp_path: Path) -> None:
    """Gradients large enough to be clipped, each job's by its own norm."""
    jobs = [make_job({"dropout": 0.0}, {"scale": scale}, max_grad_norm=0.3) for scale in (1.0, 30.0, -2.0)]
    together = train_many(jobs, tmp_path / "runs")
    assert len({run.folder for run in together}) == 3
    for job, run in zip(jobs, together, strict=True):
        alone = train(job, runs=tmp_path / "alone")
        assert run.status == "finished"
        assert [other.id for other in run.group] == [other.id for other in together]
        for name, tensor in alone.adapter().tensors.items():
            torch.testing.assert_close(run.adapter().tensors[name], tensor, rtol=1e-5, atol=1e-6)
        own = [row["loss"] for row in run.metrics()]
        assert own == pytest.approx([row["loss"] for row in alone.metrics()], rel=1e-5)
        assert run.adapter().card.metrics["loss"] == own[-1]
    first = [[row["first"] for row in run.metrics()] for run in together]
    assert first[0] == first[1] == first[2] == [row["loss"] for row in together[0].metrics()]


def test_jobs_that_cannot_share_are_trained_in_turn(make_job: Make, tmp_path: Path) -> None:
    runs = train_many([make_job({"width": 4}, steps=2), make_job(steps=3)], tmp_path)
    assert [run.state["step"] for run in runs] == [2, 3]
    assert [len(run.group) for run in runs] == [1, 1]


OWN: list[dict[str, Any]] = [
    {"seed": 3, "steps": 5},
    {"learning_rate": 3e-2, "schedule": "cosine", "warmup_steps": 2},
    {"weight_decay": 0.3, "max_grad_norm": 0.0},
    {"steps": 9, "patience": 2, "learning_rate": 3.0},
]


def test_jobs_in_a_batch_keep_their_own_settings(make_job: Make, tmp_path: Path) -> None:
    jobs = [make_job({"dropout": 0.0}, {"scale": 3.0}, **{"max_grad_norm": 0.3, **own}) for own in OWN]
    together = train_many(jobs, tmp_path / "runs")
    assert len(together[0].group) == len(OWN)
    alone = [train(job, runs=tmp_path / "alone") for job in jobs]
    assert [run.state["step"] for run in together] == [run.state["step"] for run in alone]
    assert together[0].state["step"] == 5 and together[1].state["step"] == 6 and 2 < together[3].state["step"] < 9
    for one, other in zip(together, alone, strict=True):
        assert one.metrics()[-1]["learning_rate"] == other.metrics()[-1]["learning_rate"]
        assert [e["step"] for e in one.events() if e["event"] == "early stop"] == [
            e["step"] for e in other.events() if e["event"] == "early stop"
        ]
        for name, tensor in other.adapter().tensors.items():
            torch.testing.assert_close(one.adapter().tensors[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_job_that_diverges_leaves_the_others_alone(make_job: Make, tmp_path: Path) -> None:
    jobs = [make_job({"dropout": 0.0, "breaks_at": at}, seed=seed) for seed, at in enumerate((-1, 3, -1))]
    together = train_many(jobs, tmp_path / "runs")
    assert [run.status for run in together] == ["finished", "failed", "finished"]
    assert "step 4: the training diverged" in together[1].state["message"] and together[1].state["step"] < 6
    assert not (together[1].folder / "result").exists()
    for k in (0, 2):
        alone = train(jobs[k], runs=tmp_path / "alone").adapter().tensors
        for name, tensor in alone.items():
            torch.testing.assert_close(together[k].adapter().tensors[name], tensor, rtol=1e-5, atol=1e-6)
    with pytest.raises(GraftError, match="diverged"):
        train_many([jobs[1]] * 2, tmp_path / "broken")


def test_a_group_resumes_as_a_group(make_job: Make, toy: Any, tmp_path: Path) -> None:
    jobs = [make_job(data={"scale": scale}, steps=8, patience=2, seed=4) for scale in (1.0, 2.0)]
    jobs.append(make_job(steps=1))  # it has left before the others stop
    whole = train_many(jobs, tmp_path / "whole")
    original = toy.Task.batch
    asked: list[Run] = []

    def batch(self: Any, at: int, *generators: torch.Generator) -> Any:
        if at == 2 and not asked:
            asked.append(list_runs(tmp_path / "runs")[0].group[0])
            asked[0].request("stop")
        return original(self, at, *generators)

    toy.Task.batch = batch
    try:
        runs = train_many(jobs, tmp_path / "runs")
    finally:
        toy.Task.batch = original
    assert [run.status for run in runs] == ["stopped"] * 3
    resume(runs[1])
    assert [run.state["step"] for run in runs] == [run.state["step"] for run in whole]
    assert [weights(run) for run in runs] == [weights(run) for run in whole]


def test_ctrl_c_saves_and_stops(make_job: Make, toy: Any, tmp_path: Path) -> None:
    """As from a terminal: a process of its own, at work."""
    code = (
        "import sys, json, toy_domain, graft\n"
        "run = graft.train(json.loads(sys.argv[1]), sys.argv[2])\nprint(run.status, run.state['step'])"
    )
    job = make_job(steps=10**6, log_every=1)
    command = [sys.executable, "-c", code, json.dumps(job), str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not metrics.exists():
            assert process.poll() is None
            threading.Event().wait(0.02)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    status, step = out.split()
    assert (status, process.returncode) == ("stopped", 0)
    found = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.step == int(step) > 0


def test_a_result_that_was_just_written_is_written_again(make_job: Make, tmp_path: Path) -> None:
    """Killed between the result and the word "finished"."""
    run = train(make_job(), tmp_path / "run")
    before = weights(run)
    run.write_state(status="running")
    write_atomic(run.folder / ".result-999" / "adapter.safetensors", b"half")
    assert run.status == "interrupted"
    assert resume(run).status == "finished"
    assert weights(run) == before
    assert not list(run.folder.glob(".result*"))


@pytest.mark.alone
def test_two_processes_train_as_one(make_job: Make, toy: Any, tmp_path: Path) -> None:
    """Started as `accelerate launch` starts GPUs, here with two CPU processes: one run, the mean of their gradients."""
    (tmp_path / "go.py").write_text(
        "import sys, json, toy_domain, graft\ngraft.train(json.loads(sys.argv[1]), sys.argv[2])\n"
    )
    job = make_job({"dropout": 0.0}, learning_rate=1e-2, max_grad_norm=0.0)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(tmp_path / "go.py"), json.dumps(job), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(tmp_path / "run")
    assert run.status == "finished"
    assert len([e for e in run.events() if e["event"] == "started"]) == 1
    task = toy.prepare(run.job)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(6):
        for rank in (0, 1):
            (task(task.batch(step, torch.Generator().manual_seed(step_seed(0, step, 0, rank))))[0] / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in run.adapter().tensors.items():
        torch.testing.assert_close(tensor, task.nets[0].state_dict()[name], rtol=1e-5, atol=1e-6)


def test_what_is_held_out_is_measured_on_the_way(make_job: Make, toy: Any, tmp_path: Path) -> None:
    plain = train(make_job(log_every=3), tmp_path / "plain")
    run = train(make_job(log_every=3, validate_every=2), tmp_path / "run")
    rows = {row["step"]: row for row in run.metrics()}
    assert [step for step, row in rows.items() if "validation_loss" in row] == [2, 4, 6]
    assert [step for step, row in rows.items() if "loss" in row] == [2, 3, 4, 6]
    assert weights(run) == weights(plain)
    task = toy.prepare(run.job)
    task.nets[0].load_state_dict(run.adapter().tensors)
    assert rows[6]["validation_loss"] == task.validate()["validation_loss"][0]


def test_the_best_step_becomes_the_result(make_job: Make, tmp_path: Path) -> None:
    settings = {"steps": 7, "learning_rate": 0.05, "log_every": 1}
    run = train(make_job(**settings, measure_every=2, keep="best"), tmp_path / "run")
    scores = {row["step"]: row["score"] for row in run.metrics() if "score" in row}
    assert list(scores) == [2, 4, 6, 7]
    best = max(scores, key=lambda step: scores[step])
    assert best != 7 and [e["step"] for e in run.events() if e["event"] == "best"][-1] == best
    assert run.adapter().card.metrics == {"steps": best, "score": scores[best]}
    shorter = train(make_job(**settings | {"steps": best}), tmp_path / "shorter")
    assert weights(run) == weights(shorter)
    assert weights(train(make_job(**settings, measure_every=2), tmp_path / "last")) != weights(shorter)
    with pytest.raises(InputError, match="train.keep"):
        make_job(keep="best") and Job.load(make_job(keep="best"))


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_keeps_the_same_best(make_job: Make, toy: Any, tmp_path: Path, stop: int) -> None:
    job = make_job(steps=7, learning_rate=0.05, measure_every=2, keep="best")
    whole = train(job, tmp_path / "whole")
    run = resume(stopped_at(job, tmp_path / "run", toy, stop))
    assert weights(run) == weights(whole) and run.adapter().card.metrics == whole.adapter().card.metrics


def test_a_best_step_from_before_a_kill_is_found_again(make_job: Make, toy: Any, tmp_path: Path) -> None:
    """Killed after `best/` was written and before the checkpoint of its step; an older draft lies about, too."""
    job = make_job(steps=7, learning_rate=0.05, measure_every=2, keep="best", checkpoint_every=1, keep_checkpoints=9)
    run = stopped_at(job, tmp_path / "run", toy, 5)
    checkpoints = run.folder / "checkpoints"
    for step in (4, 5):
        shutil.rmtree(checkpoints / f"{step:08d}")
    (run.folder / ".best-1").mkdir()
    whole = train(job, tmp_path / "whole")
    assert weights(resume(run)) == weights(whole)
    assert run.adapter().card.metrics == whole.adapter().card.metrics


def test_jobs_in_a_batch_keep_their_own_best(make_job: Make, tmp_path: Path) -> None:
    settings = {"steps": 7, "learning_rate": 0.05, "measure_every": 1, "keep": "best"}
    jobs = [make_job({"dropout": 0.0}, **settings, seed=seed) for seed in (0, 1)]
    for seed, run in enumerate(train_many(jobs, tmp_path)):
        alone = train(jobs[seed], tmp_path / f"alone-{seed}").adapter()
        assert run.adapter().card.metrics["steps"] == alone.card.metrics["steps"]
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(run.adapter().tensors[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_domain_that_cannot_measure_says_so(make_job: Make, toy: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delattr(toy.Task, "measure")
    with pytest.raises(InputError, match="nothing to measure"):
        train(make_job(measure_every=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()
