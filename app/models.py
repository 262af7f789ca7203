"""The process that holds the models: started when the first model is needed, ended when nobody has asked for a while.

The server itself never imports torch. It writes one JSON line per request and reads one per answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from graft.studio.errors import GraftError, InputError

IDLE_SECONDS = 600.0
"""After which its memory is given back."""


class Models:
    """The other end of `graft.app.worker`."""

    def __init__(self, runs: Path, idle: float = IDLE_SECONDS):
        self.runs, self.idle = Path(runs), idle
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._timer: threading.Timer | None = None

    def ask(self, what: str, **facts: Any) -> Any:
        """Return the worker's answer; requests wait for each other.

        Raises:
            InputError: what was asked for is at fault.
            GraftError: it failed, or the worker died; the next request starts another.
        """
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            answer = self._exchange(json.dumps({"what": what, **facts}))
            self._timer = threading.Timer(self.idle, self._rest)
            self._timer.daemon = True
            self._timer.start()
        if "error" in answer:
            error = answer["error"]
            raise InputError(*error) if isinstance(error, list) else GraftError(str(error))
        return answer["answer"]

    def close(self) -> None:
        """End the worker, if there is one."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()  # it reads the end of its input and goes
            process.wait(30)

    def _rest(self) -> None:
        with self._lock:
            self.close()

    def _exchange(self, line: str) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            self._process = None
            raise GraftError(f"the process with the models ended (exit code {process.wait(10)}); ask again")
        told: dict[str, Any] = json.loads(answer)
        return told

    def _start(self) -> subprocess.Popen[str]:
        self.runs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "graft.app.worker", str(self.runs)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
