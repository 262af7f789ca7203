"""Clusters: the same program on the same folders, whoever starts it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import graft
from graft.studio import registry
from graft.studio.batch import Batch, cluster, engines, prepare_batch, read_manifest, run_batch
from graft.studio.bench import line
from graft.studio.errors import InputError
from graft.studio.runs import Run, RunLock

RAY = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_TMPDIR", "RAY_USAGE_STATS_ENABLED", *cluster.HERE)
TRAIN = "steps = 6\ndevice = 'cpu'\nthreads = 1\nmixed_precision = 'no'\nlog_every = 2\ncheckpoint_every = 2"


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    line.register()
    monkeypatch.setenv("GRAFT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("GRAFT_WORKER", "graft.studio.bench.line")
    monkeypatch.setenv("GRAFT_DEVICES", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(Path(graft.__file__).parents[1]))
    for name in RAY:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # what is set in a test goes away with it
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
        self.places = [{"Alive": True, "NodeManagerAddress": "10.0.0.5"}, {"Alive": False, "NodeManagerAddress": ""}]

    def nodes(self) -> list[dict[str, Any]]:
        return self.places

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
    monkeypatch.setattr(engines, "train_parcel", lambda parcel, lead: finished(parcel, lead))
    batch = make_batch("ray")
    run_batch(batch, "ray", 2, lambda shown: None)
    assert (os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"])) == ("token", 64)
    assert (os.environ["RAY_USAGE_STATS_ENABLED"], fake.settings["include_dashboard"]) == ("0", False)
    assert (fake.settings["address"], fake.settings["_node_ip_address"]) == ("local", "127.0.0.1")
    assert fake.settings["needs"]["num_gpus"] == 0
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
    there(monkeypatch)
    batch = make_batch("ray")
    with RunLock(batch.runs[0].folder), RunLock(batch.runs[1].folder):
        run_batch(batch, "ray", 2, lambda shown: None)
    assert not fake.tasks
    assert fake.settings["address"] == "10.0.0.5:6379"


def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that demands a token."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    monkeypatch.setattr(cluster, "_check_token", lambda address: None)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("auto", "not the address of a cluster. Give HOST:PORT"),
        ("ray://10.0.0.5:10001", "not the address of a cluster. Give HOST:PORT"),
        ("8.8.8.8:6379", "8.8.8.8 is not a private address: the internet may reach its ports. Start its nodes with"),
        ("[2001:4860:4860::8888]:6379", "is not a private address"),
    ],
)
def test_addresses_that_are_refused(monkeypatch: pytest.MonkeyPatch, address: str, reason: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=re.escape(f"RAY_ADDRESS={address}: ") + ".*" + re.escape(reason)):
        cluster.settle()


def test_a_cluster_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that answers to strangers, one that says something else, one that is not there; and no token mode here."""
    there_is = SimpleNamespace(returncode=0, stdout="Node status", stderr="")
    asked: list[dict[str, str]] = []

    def run(command: list[str], env: dict[str, str], **settings: Any) -> Any:
        asked.append(env)
        return there_is

    monkeypatch.setattr(cluster.subprocess, "run", run)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert cluster.settle() == address
        with pytest.raises(InputError, match="it answers without a token.*RAY_AUTH_MODE=token"):
            cluster.connect(FakeRay(), address, {})
        there_is.returncode, there_is.stderr = 1, "Traceback\nTimed out"
        with pytest.raises(InputError, match="it does not ask for a token, but says: Timed out"):
            cluster.connect(FakeRay(), address, {})
        there_is.stderr = "ray.exceptions.AuthenticationError: no token"
        cluster.connect(FakeRay(), address, {})
    assert {name: asked[0].get(name) for name in RAY[1:3]} == {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": None}
    with pytest.raises(InputError, match="nothing answers there"):
        cluster.connect(FakeRay(), address, {})
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(InputError, match="RAY_AUTH_MODE=disabled: whoever reaches a port"):
        cluster.settle()


def test_a_cluster_with_a_public_node_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    there(monkeypatch)
    fake = FakeRay()
    fake.places[0]["NodeManagerAddress"] = "8.8.8.8"
    with pytest.raises(InputError, match=r"Ray's cluster: 8\.8\.8\.8 is not a private address"):
        cluster.connect(fake, "10.0.0.5:6379", {})
    assert fake.settings["down"]

    def fail(**settings: Any) -> None:
        raise ConnectionError("some words\ncannot find a local Raylet")

    monkeypatch.setattr(fake, "init", fail)
    with pytest.raises(InputError, match="no connection: cannot find a local Raylet. Run this on one of its nodes"):
        cluster.connect(fake, "10.0.0.5:6379", {})


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
    there(monkeypatch)
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
    there(monkeypatch)
    with pytest.raises(InputError, match=r'is not installed. Run: pip install "graft-studio\[cluster\]"'):
        run_batch(make_batch(engine), engine, 1, lambda shown: None)


@pytest.mark.alone
def test_slurm_by_the_debug_executor(make_batch: Callable[[str], Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_SLURM_CLUSTER", "local")
    monkeypatch.setenv("GRAFT_SLURM", "timeout_min = 5")
    batch = make_batch("slurm")
    run_batch(batch, "slurm", 1, lambda shown: None)
    assert status(batch) == ["finished", "finished", "failed"]
    assert not (Path(os.environ["GRAFT_STATE"]) / "lock").exists(), "a node starts no scheduler"


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
node = {"node_ip_address": "127.0.0.1", "num_cpus": 1, "object_store_memory": 10**8, "include_log_monitor": False}
cluster = Cluster(True, head_node_args={**node, "include_dashboard": False, "no_monitor": True})
for _ in range(int(sys.argv[1]) - 1):
    cluster.add_node(**node)
print("at", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextmanager
def nodes(count: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """So many nodes of Ray on the loopback interface, at ports that are free; their process group."""
    short = tempfile.mkdtemp(prefix="gr-")  # it names sockets
    told = {**cluster.HERE, "RAY_TMPDIR": short, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": "0123abcd" * 8}
    program = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(count)],
        env={**os.environ, **told, "RAY_AUTH_MODE": mode},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdin is not None and program.stdout is not None
    try:
        address = next((line.split()[1] for line in program.stdout if line.startswith("at ")), "")
        assert address, "it did not start"
        for name, value in {**told, "RAY_ADDRESS": address}.items():
            monkeypatch.setenv(name, value)
        yield program.pid
    finally:
        with suppress(OSError):
            program.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            program.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.wait()
        shutil.rmtree(short, ignore_errors=True)


def listeners(group: int) -> set[str]:
    """Addresses, in hexadecimal, at which processes of a group wait for others."""
    sockets = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getpgid(int(process.name)) == group:
                sockets |= {str(link.readlink()) for link in process.glob("fd/*")}
    tables = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


@pytest.mark.alone
def test_ray_on_two_nodes(make_batch: Callable[[str], Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes that only this machine reaches, with a token; every run goes out and comes back."""
    monkeypatch.setattr(engines, "SECONDS", 0.1)
    heard: set[str] = set()
    with nodes(2, "token", monkeypatch) as group:
        batch = make_batch("ray")
        run_batch(batch, "ray", 2, lambda shown: heard.update(listeners(group)))
        assert sys.platform != "linux" or heard
        assert all(address.endswith("0100007F") for address in heard), "127.0.0.1, alone or within IPv6"
        assert status(batch) == ["finished", "finished", "failed"]
        for run in batch.runs[:2]:
            assert run.adapter().tensors
            assert [event["event"] for event in Run(run.folder).events()][-1] == "finished"


@pytest.mark.alone
def test_a_ray_cluster_that_anyone_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with nodes(1, "disabled", monkeypatch), pytest.raises(InputError, match="it answers without a token"):
        cluster.connect(FakeRay(), cluster.settle(), {})
