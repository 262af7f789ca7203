"""The first page: what trains, waits and is done, and one run in full. Everything is read from the run folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from graft.app import launch, page
from graft.app.files import sample_url
from graft.app.handlers import QUIET, changed, current_page, told
from graft.app.place import Place
from graft.studio.runs import Run
from graft.studio.runs.machine import ensure_scheduler
from graft.studio.runs.queue import move, shift, waiting

TICK = 2.0
"""Seconds between two looks at the run folders: half a request per second for each open page."""
LOG_LINES = 60
NOT_CURVES = {"step", "seconds", "attempt", "learning_rate"}
SAMPLES = 48
"""Newest pictures shown."""
SHOWN = 9
"""Things that a look at the run folders may change."""
MOVES: dict[str, Callable[[Run], object]] = {
    "First": lambda run: move(run, first=True),
    "Earlier": lambda run: shift(run, -1),
    "Later": lambda run: shift(run, 1),
    "Last": lambda run: move(run, last=True),
}
"""Changes of a waiting run's place."""


def build(place: Place) -> None:
    """Draw the page."""
    chosen = gr.Textbox(visible="hidden")
    seen = gr.State([""] * SHOWN)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            board = gr.HTML()
            demo = gr.Button("Start the demo", variant="primary", visible=False, elem_id="demo")
        with gr.Column(scale=5, min_width=320):
            head = gr.HTML()
            with gr.Row():
                stop = gr.Button("Stop", interactive=False, size="sm", min_width=80)
                resume = gr.Button("Resume", interactive=False, size="sm", min_width=80)
                clone = gr.Button("Clone", interactive=False, size="sm", min_width=80)
            with gr.Row(visible=False, elem_id="places") as places:
                moves = [gr.Button(word, size="sm", min_width=80) for word in MOVES]
                priority = gr.Number(0, precision=0, label="Priority: higher ones go first", min_width=120)
            body, log = gr.HTML(), gr.HTML()
    shown = [board, head, body, log, stop, resume, demo, places, priority]

    def look(name: str, seen: list[str]) -> list[Any]:
        if any(run.state["status"] == "queued" for run in place.newest()):
            ensure_scheduler()  # it may have been killed
        values, now = changed(view(place, name), seen if len(seen) == SHOWN else [""] * SHOWN)
        return [*values, gr.Button(interactive=bool(name)), now]

    def choose(request: gr.Request) -> list[Any]:
        found = place.newest()
        name = request.query_params.get("run") or (found[0].id if found else "")
        name = name if name in {run.id for run in found} else ""
        return [name, *look(name, [""] * SHOWN)]

    def mover(change: Callable[[Run], object]) -> Any:
        def act(name: str, seen: list[str]) -> list[Any]:
            change(place.run(name))
            return look(name, seen)

        return told(act)

    gr.Timer(TICK).tick(look, [chosen, seen], [*shown, clone, seen], **QUIET)
    stop.click(told(lambda name: launch.stop(place.run(name))), chosen, None, **QUIET)
    resume.click(told(lambda name: launch.go_on(place.run(name))), chosen, None, **QUIET)
    for button, change in zip(moves, MOVES.values(), strict=True):
        button.click(mover(change), [chosen, seen], [*shown, clone, seen], **QUIET)
    ranked = told(lambda name, value: rank(place.run(name), value))
    gr.on([priority.submit, priority.blur], ranked, [chosen, priority], None, **QUIET)
    clone.click(None, chosen, None, js="name => { window.location = '/teach?clone=' + encodeURIComponent(name) }")
    demo.click(told(lambda: begin_demo(place)), None, chosen, api_visibility="private")
    current_page().load(choose, None, [chosen, *shown, clone, seen], **QUIET)


def begin_demo(place: Place) -> str:
    """Start the demo's training and return its run."""
    gr.Info("Five pictures are drawn and the training starts: half a minute.")
    return str(place.models.ask("demo", data=str(place.data)))


def view(place: Place, name: str) -> list[Any]:
    """What the page shows now: list, head, body, log, the buttons stop, resume and demo, the place in the queue."""
    found = place.newest()
    run = next((each for each in found if each.id == name), None)
    demo = gr.Button(visible=not found)
    if run is None:
        off = gr.Button(interactive=False)
        return [board(found, ""), "", "", "", off, off, demo, gr.Row(visible=False), gr.Number(0)]
    status = run.status
    can_resume = status in ("created", "stopped", "failed", "interrupted")
    buttons = [gr.Button(interactive=status in ("running", "queued")), gr.Button(interactive=can_resume), demo]
    priority = int((run.state.get("queue") or {}).get("priority", 0))
    queue = [gr.Row(visible=status == "queued"), gr.Number(priority)]
    return [board(found, name), head(run, status), body(run), log(run), *buttons, *queue]


def rank(run: Run, priority: float | None) -> None:
    """Give a waiting run another priority."""
    if priority is not None and run.state["status"] == "queued" and run.state["queue"]["priority"] != int(priority):
        move(run, priority=int(priority))


def board(found: Sequence[Run], name: str) -> str:
    """The list of runs, each a link to itself: what trains, what waits with the next one first, what is done."""
    if not found:
        return (
            '<div class="graft"><h2>No runs yet</h2><p>Teach the embedded model a hedgehog from five pictures: some '
            'minutes on a laptop, nothing is downloaded. Or <a href="/teach">teach it your own</a>.</p></div>'
        )
    rows = {run.id: {"id": run.id, **run.state, "status": run.status} for run in found}
    line = [str(row["id"]) for row in waiting(rows.values())]
    training = [run.id for run in found if rows[run.id]["status"] == "running"]
    done = [run.id for run in found if run.id not in {*line, *training}]
    parts = []
    for title, ids in (("Training", training), ("Queue, the next one first", line), ("Done", done)):
        shown = "".join(entry(rows[id], id == name, line.index(id) + 1 if id in line else 0) for id in ids)
        parts.append(f"<h3>{title}</h3>{shown}" if shown and (training or line) else shown)
    return f'<nav class="graft runs" aria-label="Runs">{"".join(parts)}</nav>'


def entry(state: Mapping[str, Any], current: bool, place: int = 0) -> str:
    """One line of the list, with its place in the queue."""
    step, steps = int(state.get("step") or 0), int(state.get("steps") or 0)
    bar = f'<progress value="{step}" max="{steps or 1}" aria-label="Progress"></progress>' if step < steps else ""
    mark = ' aria-current="page"' if current else ""
    where = f"place {place}, priority {state['queue']['priority']}" if place else f"{step} of {steps}"
    return (
        f'<a href="/?run={escape(state["id"])}"{mark}><span class="name">{escape(state["id"])}</span>'
        f'<span class="row">{page.status(state["status"])}<small>{where}</small></span>{"" if place else bar}</a>'
    )


def head(run: Run, status: str) -> str:
    """Name, status and newest figures of a run."""
    state, rows = run.state, run.metrics()
    last = rows[-1] if rows else {}
    facts = {"step": f"{state.get('step', 0)} of {state.get('steps', '?')}"}
    facts |= {key: page.text(value) for key, value in last.items() if key not in ("step", "attempt")}
    if status == "running" and (left := remaining(state, last)):
        facts["left"] = left
    message = str(state.get("message") or "")
    notice = f'<p class="notice" role="status">{escape(message)}</p>' if message else ""
    safe = '<p class="soft">You may close this page: the training goes on.</p>' if status == "running" else ""
    title = f'<div class="row"><h2>{escape(run.id)}</h2>{page.status(status)}</div>'
    return f'<div class="graft">{title}{page.figures(facts)}{notice}{safe}</div>'


def remaining(state: dict[str, Any], last: dict[str, Any]) -> str:
    """How long a run will still take, at its pace so far."""
    step, seconds = last.get("step", 0), last.get("seconds", 0)
    if not step or not seconds:
        return ""
    return duration(seconds / step * (int(state.get("steps", 0)) - int(state.get("step", 0))))


def duration(seconds: float) -> str:
    """A time as people say it."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def body(run: Run) -> str:
    """Curves, pictures and the job of a run."""
    rows, samples = run.metrics(), run.samples()[-SAMPLES:]
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in NOT_CURVES]
    series = {key: page.points(rows, key) for key in keys}
    series = {key: found for key, found in series.items() if found}
    losses = {key: found for key, found in series.items() if "loss" in key}
    others = [{key: found} for key, found in series.items() if "loss" not in key]
    charts = "".join(f'<div class="card">{page.curve(each)}</div>' for each in ([losses] if losses else []) + others)
    tiles = "".join(page.picture(path.stem, path, sample_url(run, path)) for path in reversed(samples))
    pictures = f'<h3>Samples</h3><div class="grid">{tiles}</div>' if tiles else ""
    job = escape((run.folder / "job.toml").read_text(encoding="utf-8"))
    links = ""
    if (run.folder / "result").is_dir():
        links = (
            f'<p class="row"><a class="do" href="/preview?adapter={escape(run.id)}">Preview it</a>'
            f'<a class="do" href="/library?adapter={escape(run.id)}">See it in the library</a></p>'
        )
    folded = f"<details><summary>Job file</summary><pre>{job}</pre></details>"
    return f'<div class="graft">{links}{charts or page.curve({})}{pictures}{folded}</div>'


def log(run: Run) -> str:
    """The end of a run's log."""
    file = run.folder / "log.txt"
    if not file.exists():
        return ""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 40_000))
        lines = opened.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
    return f'<div class="graft"><h3>Log</h3><pre tabindex="0">{escape(chr(10).join(lines))}</pre></div>'
