"""Compare: runs side by side, by curves, newest samples, settings and figures; a blind vote; one file to pass on."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from graft.app import page
from graft.app.files import export_url, sample_url
from graft.app.handlers import QUIET, current_page, note, told
from graft.app.pages.runs import NOT_CURVES
from graft.app.place import Place
from graft.app.report import write_report
from graft.studio.config import read_toml
from graft.studio.disk import append_line, read_lines
from graft.studio.errors import InputError
from graft.studio.runs import Run

MOST = 6
"""Runs at once: as many as there are colours."""


def build(place: Place) -> None:
    """Draw the page."""
    chosen = gr.Dropdown([], multiselect=True, max_choices=MOST, allow_custom_value=True, label="Runs", elem_id="runs")
    board = gr.HTML()
    with gr.Accordion("Blind vote", open=False):
        ballot, hidden = gr.HTML(), gr.State([])
        with gr.Row():
            votes = [gr.Button(text, size="sm") for text in ("Left is better", "Right is better", "No difference")]
        tally = gr.HTML()
    export = gr.Button("Export as one HTML file", size="sm")
    exported = gr.HTML()

    def look(names: list[str]) -> list[Any]:
        runs = some(place, names)
        return [comparison(runs), *pair_of(runs), tally_of(place)]

    def choose(request: gr.Request) -> list[Any]:
        known = [run.id for run in place.newest()]
        wanted = [name for name in request.query_params.getlist("run") if name in known] or known[:2]
        return [gr.Dropdown(known, value=wanted), *look(wanted)]

    def vote(word: str) -> Any:
        def cast(names: list[str], pair: list[str]) -> list[Any]:
            if len(pair) == 2:
                place.work.mkdir(parents=True, exist_ok=True)
                won = {"left": pair[0], "right": pair[1]}.get(word)
                append_line(place.work / "votes.jsonl", {"runs": pair, "won": won})
            return [*pair_of(some(place, names)), tally_of(place)]

        return told(cast)

    shown = [board, ballot, hidden, tally]
    chosen.change(told(look), chosen, shown, **QUIET)
    for button, word in zip(votes, ("left", "right", "none"), strict=True):
        button.click(vote(word), [chosen, hidden], [ballot, hidden, tally], **QUIET)
    export.click(told(lambda names: written(place, some(place, names))), chosen, exported, **QUIET)
    current_page().load(choose, None, [chosen, *shown], **QUIET)


def some(place: Place, names: Sequence[str] | None) -> list[Run]:
    """The chosen runs.

    Raises:
        InputError: one is not there.
    """
    return [place.run(name) for name in (names or [])[:MOST]]


def comparison(runs: Sequence[Run]) -> str:
    """Curves, pictures, settings that differ, figures."""
    if not runs:
        return note("Choose runs. Those that share a base and pictures compare best.")
    rows = {run.id: run.metrics() for run in runs}
    keys = dict.fromkeys(key for found in rows.values() for row in found for key in row if key not in NOT_CURVES)
    charts = "".join(
        f'<h3>{escape(key)}</h3><div class="card">'
        f"{page.curve({name: page.points(found, key) for name, found in rows.items()})}</div>"
        for key in keys
    )
    tiles = [(run, path) for run in runs for path in newest_pictures(run)]
    pictures = "".join(page.picture(f"{run.id}: {path.stem}", path, sample_url(run, path)) for run, path in tiles)
    return (
        f'<div class="graft">{charts}<h3>Newest samples</h3><div class="grid sheets">{pictures}</div>'
        f"<h3>Settings that differ</h3>{page.table(differences(runs))}<h3>Figures</h3>{page.table(figures(runs))}</div>"
    )


def newest_pictures(run: Run) -> list[Path]:
    """What a run drew last."""
    return run.samples()[-1:] or list((run.folder / "result").glob("preview.*"))


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for every setting that is not the same in all jobs."""
    jobs = {run.id: flat(read_toml(run.folder / "job.toml")) for run in runs}
    keys = dict.fromkeys(key for job in jobs.values() for key in job)
    rows = [{"setting": key, **{name: str(job.get(key, "")) for name, job in jobs.items()}} for key in keys]
    return [row for row in rows if len({row[name] for name in jobs}) > 1] or [{"setting": "none"}]


def flat(job: dict[str, Any], before: str = "") -> dict[str, Any]:
    """A job as "section.setting" -> value."""
    found: dict[str, Any] = {}
    for key, value in job.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return found


def figures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row of newest and measured figures for each run."""
    rows = []
    for run in runs:
        logged = run.metrics()
        last = {key: value for key, value in (logged[-1] if logged else {}).items() if key != "attempt"}
        evaluated = [event["figures"] for event in run.events() if event["event"] == "evaluated"]
        measured = {
            key: value for key, value in (evaluated[-1] if evaluated else {}).items() if not isinstance(value, dict)
        }
        rows.append({"run": run.id, "status": run.status, **last, **measured})
    return rows


def pair_of(runs: Sequence[Run]) -> list[Any]:
    """Two runs' pictures in an order that the page does not know, and, for the server, which they are."""
    able = [run for run in runs if newest_pictures(run)]
    if len(able) < 2:
        return [note("Two runs with samples are needed."), []]
    pair = secrets.SystemRandom().sample(able, 2)
    tiles = "".join(
        page.picture(side, newest_pictures(run)[-1]) for side, run in zip(("Left", "Right"), pair, strict=True)
    )
    return [f'<div class="graft"><div class="grid sheets">{tiles}</div></div>', [run.id for run in pair]]


def tally_of(place: Place) -> str:
    """Who won how often."""
    votes = read_lines(place.work / "votes.jsonl")
    won = Counter(vote["won"] or "no difference" for vote in votes)
    met = Counter(name for vote in votes for name in vote["runs"])
    rows = [{"run": name, "votes": won[name], "met": met[name]} for name in sorted(met)]
    title = f"{len(votes)} votes, {won['no difference']} without a difference"
    return f'<div class="graft">{page.table(rows, title)}</div>'


def written(place: Place, runs: Sequence[Run]) -> str:
    """One HTML file with everything, to keep and pass on.

    Raises:
        InputError: no run is chosen.
    """
    if not runs:
        raise InputError("Runs", "none is chosen", "Choose some")
    pictures = [(f"{run.id}: {path.stem}", path) for run in runs for path in newest_pictures(run)]
    tables = [("Figures", figures(runs)), ("Settings that differ", differences(runs))]
    file = place.work / "exports" / f"comparison-{secrets.token_hex(4)}.html"
    write_report(runs, file, "Comparison of runs", pictures, tables)
    link = f'<a download href="{export_url(place.work, file)}">{file.name}</a>'
    return f'<div class="graft"><p role="status">{link}</p></div>'
