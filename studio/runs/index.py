"""A table of the runs in a folder, in SQLite: a copy that makes listing quick, and may be deleted at any time.

The run folders stay the only truth. `refresh` looks at the time stamp of each `state.json` and reads those that have
changed. Trainings never open the index, so it cannot hold them up.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graft.studio.runs.lock import holder
from graft.studio.runs.machine import key_of, machine_folder

_TABLE = "CREATE TABLE IF NOT EXISTS runs (id TEXT PRIMARY KEY, stamp TEXT, status TEXT, state TEXT)"


class Index:
    """The runs of one folder.

    Args:
        runs: the folder.

    `path` is the file of the index; where none can be written, the table is built in memory.
    """

    def __init__(self, runs: str | Path):
        self.runs = Path(runs).resolve()
        self.read: dict[str, tuple[str, dict[str, Any]]] = {}
        self.path: Path = machine_folder() / "index" / f"{key_of(self.runs)}.sqlite"
        self._connect()

    def _connect(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.table = _open(self.path)
        except (OSError, sqlite3.Error):
            for file in self.path.parent.glob(f"{self.path.name}*"):  # damaged: it holds nothing of its own
                file.unlink(missing_ok=True)
            try:
                self.table = _open(self.path)
            except (OSError, sqlite3.Error):
                self.table = _open(":memory:")

    def close(self) -> None:
        """Let go of the file."""
        self.table.close()

    def refresh(self, only: Sequence[str] | None = None) -> None:
        """Bring the table up to what the folders say now.

        Args:
            only: runs that may have changed; None looks at all, and for new ones.
        """
        try:
            self._refresh(only)
        except sqlite3.DatabaseError:
            self.table.close()
            self.path.unlink(missing_ok=True)
            self._connect()
            self._refresh(None)

    def _refresh(self, only: Sequence[str] | None) -> None:
        known = dict(self.table.execute("SELECT id, stamp FROM runs"))
        if only is None:
            found = dict(self._stamps())
        else:
            found = {**known, **{name: stamp for name in only if (stamp := _stamp(f"{self.runs}/{name}"))}}
        changed = [
            (name, stamp, *_state(f"{self.runs}/{name}")) for name, stamp in found.items() if known.get(name) != stamp
        ]
        gone = [(name,) for name in known.keys() - found.keys()]
        if changed or gone:
            with self.table:
                self.table.executemany("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)", changed)
                self.table.executemany("DELETE FROM runs WHERE id = ?", gone)

    def _stamps(self) -> Iterator[tuple[str, str]]:
        try:
            entries = list(os.scandir(self.runs))
        except OSError:
            return
        for entry in entries:
            if not entry.name.startswith(".") and (stamp := _stamp(entry.path)):
                yield entry.name, stamp

    def rows(self, statuses: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Return `id` and state of the runs with one of these statuses on disk, or of all, in order of their ids.

        A run that says running but that nobody holds has the status interrupted, as in `Run.status`.
        """
        where = f"WHERE status IN ({', '.join('?' * len(statuses))})" if statuses else ""
        found = self.table.execute(f"SELECT id, stamp, state FROM runs {where} ORDER BY id", tuple(statuses))
        rows = [{"id": name, **self._parsed(name, stamp, state)} for name, stamp, state in found]
        for row in rows:
            if row["status"] == "running" and holder(self.runs / row["id"]) is None:
                row["status"] = "interrupted"
        return rows

    def names(self, status: str) -> list[str]:
        """Return the ids of the runs with a status on disk."""
        return [name for (name,) in self.table.execute("SELECT id FROM runs WHERE status = ?", (status,))]

    def _parsed(self, name: str, stamp: str, state: str) -> dict[str, Any]:
        """A state, read once as long as it is the same."""
        known = self.read.get(name)
        if known is None or known[0] != stamp:
            known = self.read[name] = (stamp, json.loads(state))
        return known[1]


def _stamp(folder: str) -> str | None:
    """What changes whenever a run's state is written; None for a folder that is no run's."""
    for name in ("state.json", "job.toml"):
        try:
            stat = os.stat(f"{folder}/{name}")  # noqa: PTH116 (twice as quick, thousands of times)
        except OSError:
            continue
        return f"{name[0]}{stat.st_mtime_ns}-{stat.st_ino}"
    return None


def _open(path: Path | str) -> sqlite3.Connection:
    table = sqlite3.connect(path, timeout=10)
    table.execute("PRAGMA journal_mode=WAL")
    table.execute("PRAGMA synchronous=OFF")  # it can be built anew
    table.execute(_TABLE)
    table.execute("SELECT count(stamp), count(status), count(state) FROM runs")
    return table


def _state(folder: str) -> tuple[str, str]:
    """Status and text of a run's state."""
    try:
        with open(f"{folder}/state.json", encoding="utf-8") as file:  # noqa: PTH123 (thousands of times)
            text = file.read()
        return str(json.loads(text)["status"]), text
    except FileNotFoundError:
        return "created", '{"status": "created", "step": 0}'
    except (OSError, ValueError, KeyError, TypeError):
        return "unreadable", '{"status": "unreadable", "step": 0, "message": "state.json cannot be read"}'
