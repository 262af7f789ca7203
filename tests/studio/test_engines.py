"""Clusters: the same program on the same folders, whoever starts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import graft
from graft.studio import registry
from graft.studio.batch import Batch, engines, prepare_batch, read_manifest, run_batch
from graft.studio.bench import line
from graft.studio.errors import InputError
from graft.studio.runs import Run, RunLock

TRAIN = "steps = 6\ndevice = 'cpu'\nthreads = 1\nmixed_precision = 'no'\nlog_every = 2\ncheckpoint_every = 2"


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    line.register()
    monkeypatch.setenv("GRAFT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("GRAFT_WORKER", "graft.studio.bench.line")
    monkeypatch.setenv("GRAFT_DEVICES", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(Path(graft.__file__).parents[1]))
    yield
    del registry.DOMAINS["line"], registry.METHODS["line", "fit"]


@pytest.fixture
def make_batch(tmp_path: Path) -> Callable[[str], Batch]:
    """A batch of three subjects, one of them without its folder."""

    def make(engine: str) -> Batch:
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "1.txt").write_text(name)
        text = f'base = "none"\ndomain = "line"\n[train]\n{TRAIN}\n[[methods]]\nname = "fit"\n'
        text += "".join(f'[[subjects]]\nname = "{name}"\ndata = "{name}"\n' for name in ("a", "b", "gone"))
        (tmp_path / "m.toml").write_text(text)
        entries = read_manifest(tmp_path / "m.toml")
        return prepare_batch(entries, "g", tmp_path / "runs", workers=2, together=1, engine=engine)

    return make


def status(batch: Batch) -> list[str]:
    return [run.status for run in batch.runs]


class FakeRay(ModuleType):
    """Runs a task when it is asked for; the first one is lost with its node."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.settings: dict[str, Any] = {}
        self.tasks: list[Any] = []
        self.held: list[bool] = []

    def init(self, **settings: Any) -> None:
        self.settings = settings

    def remote(self, **needs: Any) -> Any:
        self.settings["needs"] = needs
        fake = self

        class Task:
            def __init__(self, function: Any):
                self.function = function

            def options(self, **needs: Any) -> Task:
                fake.settings["wide"] = needs
                return self

            def remote(self, *args: Any) -> int:
                fake.tasks.append((self.function, args))
                return len(fake.tasks) - 1

        return Task

    def wait(self, references: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return references[:1], references[1:]

    def get(self, reference: int) -> Any:
        if reference == 0:
            raise RuntimeError("node died")
        function, args = self.tasks[reference]
        return function(*args)

    def shutdown(self) -> None:
        self.settings["down"] = True


def test_ray_owns_nothing(make_batch: Callable[[str], Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(engines, "train_parcel", lambda parcel, lead: finished(parcel, lead))
    batch = make_batch("ray")
    try:
        run_batch(batch, "ray", 2, lambda shown: None)
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    finally:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            os.environ.pop(name, None)
    assert (fake.settings["_node_ip_address"], fake.settings["needs"]["num_gpus"]) == ("127.0.0.1", 0)
    assert fake.settings["down"]
    assert status(batch) == ["failed", "finished", "failed"]
    assert batch.runs[0].state["failure"] == "transient"
    assert "the cluster lost it: node died" in batch.runs[0].state["message"]
    assert (batch.runs[1].folder / "result" / "x").read_bytes() == b"learnt"
    assert not (tmp_path / "evil").exists()
    assert batch.runs[1].job == batch.entries[1].job, "the frozen job is the one of here"
    assert batch.runs[1].state["queue"]["engine"] == "ray"
    again = prepare_batch(batch.entries, "g", tmp_path / "runs", engine="ray")
    assert [run.id for run in again.missing] == ["g-a-fit", "g-gone-fit"]


def finished(parcel: dict[str, bytes], lead: str) -> dict[str, bytes]:
    """What a node might send back, and more than it should."""
    assert parcel["data/0/b/1.txt"] == b"b"
    state = parcel[f"{lead}/state.json"].replace(b'"queued"', b'"finished"')
    more = {f"{lead}/../../evil": b"", f"{lead}/job.toml": b"other", "elsewhere/state.json": b"{}"}
    return {f"{lead}/state.json": state, f"{lead}/result/x": b"learnt", **more}


def test_a_run_that_someone_trains_is_not_shipped(
    make_batch: Callable[[str], Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    batch = make_batch("ray")
    with RunLock(batch.runs[0].folder), RunLock(batch.runs[1].folder):
        run_batch(batch, "ray", 2, lambda shown: None)
    assert not fake.tasks
    assert fake.settings["address"] == "somewhere:6379"


class FakeSlurm(ModuleType):
    """Keeps what is submitted."""

    def __init__(self) -> None:
        super().__init__("submitit")
        self.submitted: list[Any] = []
        self.AutoExecutor = lambda **settings: SimpleNamespace(
            update_parameters=lambda **more: None, batch=nullcontext, submit=self.submit
        )

    def submit(self, *what: Any) -> Any:
        self.submitted.append(what)
        return SimpleNamespace(done=lambda: True)


def test_several_devices_on_a_cluster(make_batch: Callable[[str], Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a node starts is `accelerate launch` with so many processes, and Ray is asked for as many GPUs."""
    commands: list[list[str]] = []

    def launch(command: list[str], **settings: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=-9, stderr=b"killed")

    slurm, fake = FakeSlurm(), FakeRay()
    monkeypatch.setitem(sys.modules, "submitit", slurm)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    batch = make_batch("slurm")
    for run in batch.runs:
        run.write_state(queue={**run.state["queue"], "processes": 2, "device": ""})
    engines.slurm(batch, 1, lambda shown: None)
    monkeypatch.setattr(engines, "subprocess", SimpleNamespace(run=launch, DEVNULL=subprocess.DEVNULL))
    for function, *args in slurm.submitted:
        function(*args)
    engines.ray(batch, 1, lambda shown: None)  # the fake loses the first of two
    assert fake.settings["wide"] == {"num_cpus": 2, "num_gpus": 2}
    assert len(commands) == 2 + 1
    for command in commands:
        assert command[command.index("--num_processes") + 1] == "2"


@pytest.mark.parametrize("engine", ["ray", "slurm"])
def test_what_is_not_installed_is_told(
    make_batch: Callable[[str], Batch], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setitem(sys.modules, {"ray": "ray", "slurm": "submitit"}[engine], None)
    monkeypatch.setenv("RAY_ADDRESS", "x")
    with pytest.raises(InputError, match=r'is not installed. Run: pip install "graft-studio\[cluster\]"'):
        run_batch(make_batch(engine), engine, 1, lambda shown: None)


@pytest.mark.alone
def test_slurm_by_the_debug_executor(make_batch: Callable[[str], Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("GRAFT_SLURM_CLUSTER", "local")
    monkeypatch.setenv("GRAFT_SLURM", "timeout_min = 5")
    batch = make_batch("slurm")
    run_batch(batch, "slurm", 1, lambda shown: None)
    assert status(batch) == ["finished", "finished", "failed"]
    assert not (Path(os.environ["GRAFT_STATE"]) / "lock").exists(), "a node starts no scheduler"


@pytest.mark.alone
def test_ray_on_two_nodes(make_batch: Callable[[str], Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes on the loopback interface, with a token; every run goes out and comes back."""
    if find_spec("ray") is None:  # importing it would read the variables too early
        pytest.skip("ray is not installed")
    program, short = str(Path(sys.executable).parent / "ray"), tempfile.mkdtemp(prefix="gr-")  # it names sockets
    for name, value in {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "RAY_ADDRESS": "127.0.0.1:26379",
        "RAY_TMPDIR": short,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(engines, "SECONDS", 0.5)
    here = ["--block", "--node-ip-address", "127.0.0.1", "--num-cpus", "1", "--object-store-memory", "100000000"]
    head = [program, "start", "--head", "--port", "26379", "--include-dashboard", "false", *here]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    nodes = []
    try:
        for command in (head, [program, "start", "--address", "127.0.0.1:26379", *here]):
            node = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            nodes.append(node)
            assert node.stdout is not None
            assert any("block forever" in line for line in node.stdout), "it did not start"
        batch = make_batch("ray")
        run_batch(batch, "ray", 2, lambda shown: None)
        assert status(batch) == ["finished", "finished", "failed"]
        for run in batch.runs[:2]:
            assert run.adapter().tensors
            assert [event["event"] for event in Run(run.folder).events()][-1] == "finished"
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(90)
        shutil.rmtree(short, ignore_errors=True)
