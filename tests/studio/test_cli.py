"""The command line: one answer on standard output, exit codes, messages that name what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from graft.studio import registry
from graft.studio.cli import build_parser, main
from graft.studio.config import field_docs
from graft.studio.job import Job
from graft.studio.runs import Run, RunLock
from graft.studio.training import train

Make = Callable[..., dict[str, Any]]
GRAFT = str(Path(sysconfig.get_path("scripts")) / "graft")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    """Runs a command with `--json`; returns the exit code and the document."""

    def run(*argv: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = main([*argv, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def job_file(make_job: Make, tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(Job.load(make_job()).to_toml())
    return path


Answer = Callable[..., tuple[int, Any]]


def test_train_and_look_at_the_run(answer: Answer, job_file: Path, tmp_path: Path) -> None:
    code, done = answer("train", "job.toml", "--set", "train.steps=4", "--run-dir", "mine")
    assert (code, done["status"], done["step"], done["folder"]) == (0, "finished", 4, str(tmp_path / "mine"))
    assert done["metrics"]["loss"] > 0
    code, shown = answer("runs", "show", "mine")
    assert (code, shown["job"]["train"]["steps"], shown["state"]["attempt"]) == (0, 4, 1)
    code, card = answer("adapters", "inspect", "mine")
    assert (code, card["method"], card["parameters"]) == (0, "regression", 4 * 16 + 16 + 16 + 1)
    assert answer("runs", "resume", "mine")[1]["attempt"] == 1
    assert answer("runs", "logs", "mine")[0] == 0


def test_runs_are_listed_with_their_status(answer: Answer, job_file: Path) -> None:
    assert answer("runs", "list") == (0, [])
    answer("train", "job.toml", "--set", "train.steps=2")
    interrupted = Run(Path(answer("train", "job.toml", "--set", "name=mine")[1]["folder"]))
    interrupted.write_state(status="running")
    rows = answer("runs", "list")[1]
    assert {row["id"].split("-", 3)[3]: row["status"] for row in rows} == {
        "regression": "finished",
        "mine": "interrupted",
    }
    assert [row["run"] for row in answer("adapters", "list")[1]] == [row["id"] for row in rows]


def test_stop_and_resume(answer: Answer, make_job: Make) -> None:
    run = train(make_job(), "mine")
    assert answer("runs", "stop", "mine")[1]["status"] == "finished"
    run.write_state(status="running")
    with RunLock(run.folder):
        assert answer("runs", "stop", "mine", "--no-wait")[0] == 0
        assert run.take_request("stop")
        code, error = answer("runs", "resume", "mine")
    assert (code, error["error"]["type"]) == (2, "RunError")
    assert answer("runs", "resume", "mine")[1]["status"] == "finished"


def test_several_jobs_are_trained_together(answer: Answer, job_file: Path) -> None:
    (job_file.with_name("other.toml")).write_text(job_file.read_text())
    code, runs = answer("train", "job.toml", "other.toml")
    assert (code, [run["status"] for run in runs]) == (0, ["finished", "finished"])
    assert len(Run(Path(runs[0]["folder"])).group) == 2


BAD = [
    (["train", "nothing.toml"], "nothing.toml: no such file"),
    (["train", "job.toml", "--set", "method.widht=3"], "method.widht: no such key. Did you mean 'width'?"),
    (["train", "job.toml", "--set", "train.stepz=3"], "train.stepz: no such key. Did you mean 'steps'?"),
    (["train", "job.toml", "--set", "method.name=regresion"], "Did you mean 'regression'?"),
    (["train", "job.toml", "--set", "domain=toys"], "Did you mean 'toy'?"),
    (["train", "job.toml", "--set", "method.width=-1"], "width -1: must be at least 1"),
    (["train", "job.toml", "--set", "train.steps=many"], "train.steps = 'many'"),
    (["train", "job.toml", "--set", "train.keep_checkpoints=1000000000000000", "--run-dir", "mine"], "MB are needed"),
    (["train", "job.toml", "--run-dir", "full"], "it is not an empty folder"),
    (["runs", "show", "nothing"], "there is no such run in runs"),
    (["runs", "resume", "full"], "there is no such run in runs"),
    (["preview", "nothing"], "there is no such run in runs"),
    (["eval", "full"], "there is no adapter here"),
    (["adapters", "verify", "full"], "there is no adapter here"),
    (["adapters", "convert", "nothing", "out"], "there is no such run in runs"),
    (["bench", "kil"], "Did you mean 'kill'?"),
    (["methods", "loraa"], "Did you mean 'lora'?"),
    (["pocket", "export", "pocket-sdd", "out"], "no embedded model has this name"),
    (["pocket", "export", "pocket-sd", "full"], "not an empty folder"),
    (["trian", "job.toml"], "Did you mean 'train'?"),
    (["train"], "required: JOB.toml"),
    (["runs", "logs", "x", "--lines", "y"], "invalid int value: 'y'"),
]


@pytest.mark.parametrize(
    ("argv", "message"), BAD, ids=[" ".join(argv[:2]) + f" {i}" for i, (argv, _) in enumerate(BAD)]
)
def test_bad_input_is_told_in_one_line_with_code_2(
    argv: list[str], message: str, answer: Answer, job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(argv) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith("graft: ")
    assert message in told.err
    code, document = answer(*argv)
    assert (code, list(document)) == (2, ["error"])
    assert document["error"]["message"] == told.err.strip().removeprefix("graft: ")
    assert {"given", "reason", "remedy"} <= set(document["error"])
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


def test_a_failed_training_is_code_1(answer: Answer, job_file: Path) -> None:
    code, document = answer("train", "job.toml", "--set", "method.breaks_at=1")
    assert code == 1
    assert "diverged" in document["error"]["message"]


def test_no_space_while_training_is_code_2(
    answer: Answer, job_file: Path, files_limited_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    with files_limited_to(6000):
        code, document = answer("train", "job.toml", "--set", "method.width=400", "--run-dir", "mine")
    assert (code, document["error"]["type"]) == (2, "DiskFullError")
    assert "no space left" in document["error"]["message"]
    assert Run(Path("mine")).status == "failed"
    assert not list(Path("mine/checkpoints").iterdir())
    assert answer("runs", "resume", "mine")[1]["status"] == "finished"


def test_methods_and_their_settings(answer: Answer) -> None:
    names = [row["name"] for row in answer("methods")[1]]
    assert {"lora", "textual_inversion"} <= set(names)
    lora, *others = answer("methods", "lora")[1]
    assert [lora["domain"], *(other["domain"] for other in others)] == ["diffusion", "llm_mm", "vision"]
    rank = next(field for field in lora["settings"] if field["name"] == "rank")
    assert rank["default"] == 8
    assert "width" in rank["meaning"]


def test_methods_reads_the_classes_without_importing_them(answer: Answer) -> None:
    for row in answer("methods")[1]:
        cls = registry.method_class(row["domain"], row["name"])
        assert row["summary"] == " ".join(str(cls.__doc__).split("\n\n")[0].split())
        assert row["settings"] == json.loads(json.dumps([
            {"name": f.name, "type": f.type, "default": f.default, "meaning": field_docs(cls)[f.name]}
            for f in dataclasses.fields(cls)
        ]))  # fmt: skip
    code = "import sys; from graft.studio.cli import main; main(['methods']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_doctor_names_what_is_missing_and_the_remedy(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    from graft.studio.pocket import models

    monkeypatch.setattr(models, "WEIGHTS", Path("nowhere"))
    code, found = answer("doctor")
    assert (code, found["ok"]) == (1, False)
    assert {"what": "pocket-sd has no weights", "remedy": "Install the package again, or graft pocket train"} in found[
        "problems"
    ]
    assert found["threads"] >= 1
    assert found["libraries"]["torch"]


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    def leaves(parser: Any, path: list[str]) -> list[list[str]]:
        groups = [
            action for action in parser._actions if hasattr(action, "choices") and isinstance(action.choices, dict)
        ]
        if not groups:
            return [path]
        return [leaf for name, inner in groups[0].choices.items() for leaf in leaves(inner, [*path, name])]

    found = leaves(build_parser(), [])
    assert len(found) > 20
    for path in found:
        with pytest.raises(SystemExit) as ended:
            main([*path, "--help"])
        assert ended.value.code == 0
        assert "--json" in capsys.readouterr().out, f"{path} has no --json"


def test_the_program_itself_keeps_standard_output_clean(make_job: Make, tmp_path: Path) -> None:
    """A real process: the answer alone on standard output, progress and errors on the other."""
    done = subprocess.run([GRAFT, "runs", "show", "x", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["type"] == "RunError"
    assert done.stderr == "graft: run 'x': there is no such run in runs. Known: none\n"
    (tmp_path / "job.toml").write_text(Job.load(make_job()).to_toml())
    code = "import toy_domain, sys; from graft.studio.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", "job.toml", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
    assert "6/6" in done.stderr
