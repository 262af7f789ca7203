"""`graft ui` as a process that may be killed and started again, and what a browser would ask of it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from graft.studio.runs.folder import Run

PATIENCE = 120.0
"""Seconds that a server may take until it answers."""


class Server:
    """The web server of a runs folder, at a free port of the loopback interface."""

    def __init__(self, runs: Path):
        self.runs, self.log = runs, runs.with_name("ui.log")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        """Start it, without waiting until it answers."""
        command = [sys.executable, "-m", "graft", "ui", "--port", str(self.port), "--runs", str(self.runs)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.began, self.events = time.monotonic(), dict[str, int]()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def answers(self) -> bool:
        """Tell whether it is there.

        Raises:
            AssertionError: it ended, or is not there after so many seconds.
        """
        if not self.events and (config := self._ask("config")) is not None:
            label = {part["id"]: part["props"].get("value") for part in config["components"]}
            for event in config["dependencies"]:
                for part, kind in event["targets"]:
                    self.events.setdefault(kind if kind == "tick" else str(label.get(part)), event["id"])
        late = time.monotonic() - self.began > PATIENCE
        if not self.events and (late or self.process.poll() is not None):
            raise AssertionError(f"the server does not answer: {self.log.read_text()[-2000:]}")
        return bool(self.events)

    def listed(self) -> set[str]:
        """The runs on its first page."""
        answer = self._press("tick", "", None)
        return set(re.findall(r'href="/\?run=([\w.-]+)"', answer["data"][0])) if answer else set()

    def put(self, run: Run) -> bool:
        """Press "Resume", which puts a run into the queue; tell whether the server said that it did.

        Raises:
            AssertionError: the server says that it did not.
        """
        return self._press("Resume", run.id) is not None

    def _press(self, event: str, *values: Any) -> Any:
        return self._ask(
            "gradio_api/run/predict", {"fn_index": self.events[event], "data": values, "session_hash": "b"}
        )

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"http://127.0.0.1:{self.port}/{path}", data, {"content-type": "application/json"})
        try:
            with urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read()[:500]!r}") from error
        except (OSError, HTTPException):
            return None  # it is not there, or was killed while it answered
