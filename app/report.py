"""One page that tells what runs did: curves, pictures, tables, the job. A single file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.app import page

if TYPE_CHECKING:
    from graft.studio.runs import Run

Rows = Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class RunView:
    """What a page shows of a run."""

    name: str
    """Heading."""
    status: str = "finished"
    """One word, as in the run's `state.json`."""
    job: str = ""
    """The job file, as text."""
    metrics: Rows = ()
    """One mapping per logged step, each with `step`."""
    summary: Mapping[str, object] = field(default_factory=dict)
    """Final figures: name -> value."""

    @classmethod
    def of(cls, run: Run | RunView | Mapping[str, Any]) -> RunView:
        """The view of a run, or of a mapping with these fields (only `name` must be there).

        Raises:
            TypeError: the mapping has a key that is no field.
        """
        if isinstance(run, RunView):
            return run
        if isinstance(run, Mapping):
            return cls(**run)
        job = run.folder / "job.toml"
        return cls(run.folder.name, run.status, job.read_text() if job.exists() else "", run.metrics())

    def series(self, key: str = "loss") -> list[page.Point]:
        """(step, value) of every logged step that has the key."""
        return [(float(row["step"]), float(row[key])) for row in self.metrics if row.get(key) is not None]  # type: ignore[arg-type]


def write_report(
    runs: Sequence[Run | RunView | Mapping[str, Any]],
    out: Path,
    title: str,
    pictures: Sequence[tuple[str, Path]] = (),
    tables: Sequence[tuple[str, Rows]] = (),
) -> Path:
    """Writes a self-contained HTML page and returns its path.

    Args:
        runs: runs, or mappings with the fields of `RunView`.
        out: the file to write; its folder is made.
        title: heading of the page.
        pictures: (caption, path) in reading order; the files' bytes go into the page.
        tables: (caption, rows); a row is a mapping from column to value.
    """
    views = [RunView.of(run) for run in runs]
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{datetime.now(UTC):%d %B %Y, %H:%M} UTC</p>']
    if pictures:
        parts += ["<h2>Pictures</h2>", page.pictures(pictures)]
    if tables:
        parts += ["<h2>Measured</h2>", *(page.table(rows, caption) for caption, rows in tables)]
    series = {view.name: view.series() for view in views if view.metrics}
    if series:
        parts += ["<h2>Loss</h2>", f'<div class="card">{page.curve(series)}</div>']
    if views:
        parts += ["<h2>Runs</h2>", *(run_card(view) for view in views)]
    parts.append("<footer>Written by Graft Studio. This file needs no other file and no network.</footer>")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page.document(title, "".join(parts)), encoding="utf-8")
    return out


def run_card(view: RunView) -> str:
    """A run's name, status, final figures and, folded away, its job file."""
    summary = page.figures(view.summary) if view.summary else ""
    job = f"<details><summary>Job file</summary><pre>{escape(view.job)}</pre></details>" if view.job else ""
    head = f'<div class="row"><h3>{escape(view.name)}</h3>{page.status(view.status)}</div>'
    return f'<section class="card">{head}{summary}{job}</section>'
