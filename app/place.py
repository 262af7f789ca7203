"""Where the studio's things are; an id that a browser sends becomes one of them by looking, never by joining."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from graft.studio.errors import InputError
from graft.studio.runs import Run, list_runs

if TYPE_CHECKING:
    from graft.app.models import Models

DATA_SET = re.compile(r"\d{8}-[0-9a-f]{12}")
"""Name of an uploaded data set."""


@dataclass(frozen=True)
class Place:
    """The folders of one studio, and the process that holds its models."""

    runs: Path
    """The runs."""
    data: Path
    """Uploaded pictures, a folder for each data set."""
    models: Models = field(repr=False)
    """Draws previews, checks jobs."""

    @property
    def work(self) -> Path:
        """What the studio itself keeps: previews, exports, votes, what was deleted. No run begins with a dot."""
        return self.runs / ".studio"

    def run(self, name: str) -> Run:
        """Return the run of that id, looked up among the runs that are there.

        Raises:
            InputError: there is none.
        """
        found = next((run for run in list_runs(self.runs) if run.id == name), None)
        if found is None:
            raise InputError(f"run {name!r}", "there is no such run", "Choose one of the list")
        return found

    def newest(self) -> list[Run]:
        """Return all runs, the newest first."""
        return sorted(list_runs(self.runs), key=lambda run: run.id, reverse=True)

    def adapters(self) -> list[Run]:
        """Return the runs that have a result, the newest first."""
        return [run for run in self.newest() if (run.folder / "result" / "adapter.json").is_file()]

    def new_set(self) -> str:
        """Make a folder for uploaded pictures and return its name."""
        name = f"{datetime.now(UTC):%Y%m%d}-{secrets.token_hex(6)}"
        (self.data / name).mkdir(parents=True)
        return name

    def data_set(self, name: str) -> Path:
        """Return the folder of a data set.

        Raises:
            InputError: there is none.
        """
        if not DATA_SET.fullmatch(name) or not (self.data / name).is_dir():
            raise InputError(f"data set {name!r}", "there is no such data set", "Add pictures first")
        return self.data / name
