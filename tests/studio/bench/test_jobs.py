"""The benchmark of the queue: its web server is a real one, and it is killed too."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graft.studio import registry
from graft.studio.bench import jobs, line
from graft.studio.bench.server import Server
from graft.studio.job import Job
from graft.studio.runs.folder import create_run, new_folder


def test_a_server_that_ended_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    server = Server(tmp_path / "runs")
    server.process.wait()
    assert not server.events
    with pytest.raises(AssertionError, match="does not answer"):
        server.answers()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere none is looked for")
def test_a_process_that_stays_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LATE", 0.1)
    monkeypatch.setenv("GRAFT_WORKER", "the.worker")
    command = [sys.executable, "-c", "import time; time.sleep(60)", "the.worker"]
    with subprocess.Popen([*command, f"{tmp_path}/a/run"]) as found, subprocess.Popen([*command, "/b/run"]) as other:
        assert jobs._orphans(tmp_path / "a") == 1
        assert found.wait(10) == -signal.SIGKILL
        assert other.poll() is None
        other.kill()


@pytest.mark.alone
def test_the_server_is_a_client_of_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRAFT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("GRAFT_QUIET", "1")  # nobody trains it
    line.register()
    try:
        job = Job.load({"base": "none", "domain": "line", "method": {"name": "fit"}, "data": {}})
        run = create_run(job, new_folder(job, runs=tmp_path / "runs"))
    finally:
        del registry.DOMAINS["line"], registry.METHODS["line", "fit"]
    server = Server(tmp_path / "runs")
    try:
        while not server.answers():
            time.sleep(0.1)
        assert server.listed() == {run.id}
        assert server.put(run)
        assert run.state["status"] == "queued"
        server.kill()
        assert not server.put(run)
        assert not server.listed()
    finally:
        server.kill()


@pytest.mark.alone
def test_all_kinds_are_killed(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    try:
        with jobs._machine() as where:
            found = jobs.torment(where / "kills", 4, random.Random(0))
    finally:
        registry.DOMAINS.pop("line", None)
        registry.METHODS.pop(("line", "fit"), None)
    assert found["kills"]["server"] >= 1
    assert found["server again"] == found["kills"]["server"]
    assert not any(found[key] for key in jobs.WRONG)
