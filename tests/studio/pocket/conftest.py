"""A program that knows the libraries and nothing of graft."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

ALONE = '\nassert not any(name.startswith("graft") for name in sys.modules)'


@pytest.fixture(params=["here", pytest.param("alone", marks=pytest.mark.slow)])
def outsider(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs the program with arguments and returns the JSON that it prints; in a process of its own where it is slow."""

    def run(program: str, *arguments: object) -> Any:
        argv = ["-c", *map(str, arguments)]
        if request.param == "here":
            monkeypatch.setattr(sys, "argv", argv)
            capsys.readouterr()
            exec(compile(program, "outsider", "exec"), {"__name__": "__main__"})
            return json.loads(capsys.readouterr().out)
        done = subprocess.run([sys.executable, argv[0], program + ALONE, *argv[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return run
