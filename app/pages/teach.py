"""Teach: pictures, a name, what it is to become, on which base, how thoroughly. The rest has defaults.

The page makes a job file and starts what `graft train` would: both are shown, so the page teaches the command line.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Mapping
from html import escape
from typing import Any

import gradio as gr

from graft.app import check, desk, forms, questions, uploads
from graft.app.files import thumb_url
from graft.app.goals import BASE, GOALS, domain_of
from graft.app.handlers import QUIET, current_page, note, told
from graft.app.pages.runs import duration
from graft.app.place import Place
from graft.app.uploads import pictures as find_pictures
from graft.studio import registry
from graft.studio.config import write_toml
from graft.studio.errors import InputError

QUALITY = {"Quick look": 100, "Usual": 300, "Thorough": 1000}
"""Steps."""
SHOWN = 24
"""Pictures listed with their captions."""


def build(place: Place) -> None:
    """Draw the page."""
    # What the page knows stands in the page: a server that was started again knows no sessions.
    data_set, clone = gr.Textbox(visible="hidden"), gr.Textbox(visible="hidden")
    version, settings = gr.Number(0, visible="hidden"), gr.Textbox("{}", visible="hidden")
    opened = gr.Number(0, visible="hidden")  # not each upload: what is being typed would be drawn over
    kept = gr.BrowserState("", storage_key="graft-data-set", secret="the name of a data set is no secret")
    goals = [name for name, goal in GOALS.items() if goal.domains]
    with gr.Row():
        with gr.Column(min_width=320):
            name = gr.Textbox("", label="Name", info="One word for it, as you will call it in prompts.", max_length=40)
            goal = gr.Dropdown(goals, value=goals[0], label="What it is")
            label = gr.Textbox("", label="Class of the pictures that you add next", visible=False, max_length=60)
            drop = gr.File(
                label="Pictures, or a .zip of them (in folders by class, for a classifier)",
                file_count="multiple", file_types=["image", ".zip", *questions.TABLES], elem_id="drop",
            )  # fmt: skip
            base = gr.Dropdown(["pocket-sd"], value="pocket-sd", allow_custom_value=True, label="Base",
                               info="Embedded, or a name on a hub that you have.")  # fmt: skip
            quality = gr.Radio(list(QUALITY), value="Usual", label="Quality")
            start = gr.Button("Start", variant="primary", elem_id="start")
            estimate = gr.HTML()
            look_first = gr.Button("Check before the start", size="sm", elem_id="check")
            wanted, findings = gr.Number(0, visible="hidden"), gr.HTML()
        with gr.Column(min_width=320):
            listing = gr.HTML()
            with gr.Column(visible=False) as asking:  # for the goal that has a table of questions
                gr.HTML(note(questions.HOW_TO))
                look = gr.Button("Show what is learnt", size="sm", elem_id="look")
                rows = gr.HTML()

            @gr.render(inputs=[data_set, version], triggers=[version.change])
            def captions(name: str, _: float) -> None:
                caption_fields(place, name)

            desk.build(place, data_set, version, goal, lambda goal: "diffusion" in GOALS[goal].methods)
            with gr.Accordion("Advanced", open=False):
                method = gr.Dropdown(["lora"], value="lora", allow_custom_value=True, label="Method")

                @gr.render(
                    inputs=[base, goal, method, settings],
                    triggers=[each.change for each in (base, goal, method, opened)],
                )
                def advanced(base: str, goal: str, method: str, values: str) -> None:
                    setting_fields(domain_of(goal, base), method, json.loads(values), settings)

            job = gr.Code(label="The job, and how to start it in a terminal", language=None, interactive=False)
    form = [data_set, clone, name, goal, base, quality, method, settings]

    def refresh(*values: Any) -> list[Any]:
        written = write_toml(job_of(place, *values))
        shown = f"{written}\n# graft train job.toml --runs {place.runs.name}"
        return [shown, listing_of(place, values[0]), expected(place, *values)]

    def add(files: list[str] | None, name: str, label: str, goal: str) -> list[Any]:
        if GOALS[goal].classes and not label.strip() and not any(str(file).endswith(".zip") for file in files or []):
            raise InputError("Class of the pictures", "it is empty", "Name the class, then drop its pictures again")
        try:
            folder = place.data_set(name)
        except InputError:
            name = place.new_set()
            folder = place.data_set(name)
        if GOALS[goal].questions:
            refused = questions.add_files(folder, files or [])
        else:
            refused = uploads.add_files(folder, files or [], label if GOALS[goal].classes else "")
        if refused:
            gr.Warning(escape("\n".join(refused[:8])), title=f"{len(refused)} refused")
        return [name, name, time.time(), gr.File(value=None), ""]

    def begin(*values: Any) -> str:
        checked(place, *values)
        gr.Info("The job is checked and started.")
        return str(place.models.ask("start", job=job_of(place, *values)))

    def look_at_rows(*values: Any) -> str:
        checked(place, *values[:2], values[2] or "unnamed", *values[3:])
        return questions.shown(place, job_of(place, *values))

    def open_page(kept: str, request: gr.Request) -> list[Any]:
        wanted = request.query_params.get("clone") or ""
        found = cloned(place, wanted) if wanted else None
        if found is None:
            return [kept or gr.skip(), "", time.time(), time.time(), gr.skip(), *goal_of(place, kept), gr.skip()]
        return [
            "",
            wanted,
            time.time(),
            time.time(),
            found["name"],
            found["goal"],
            found["base"],
            found["method"],
            json.dumps(found["settings"]),
        ]

    drop.upload(told(add), [drop, data_set, label, goal], [data_set, kept, version, drop, label],
                queue=False, api_visibility="private")  # fmt: skip
    goal.input(bases_of, goal, [base, method, label], **QUIET)
    goal.change(lambda goal: gr.Column(visible=GOALS[goal].questions), goal, asking, **QUIET)
    gr.on([version.change, base.change, settings.change], lambda: "", None, rows, **QUIET)  # they were of other data
    look.click(told(look_at_rows), form, rows, concurrency_id="models", concurrency_limit=1, api_visibility="private")
    base.input(lambda goal, base: methods_of(domain_of(goal, base), goal), [goal, base], method, **QUIET)
    method.input(lambda: "{}", None, settings, **QUIET)
    started = gr.Textbox(visible="hidden")
    start.click(told(begin), form, started, api_visibility="private").success(
        None, started, None, js="id => { window.location = '/?run=' + encodeURIComponent(id) }"
    )
    look_first.click(told(lambda *values: check_wanted(place, *values)), form, [wanted, findings], **QUIET)
    # A picture came, not the page, which sets both; a base of a hub is large, and its check waits for the button.
    gr.on([version.change, base.input, method.input], lambda version, opened, *values: (
        check_wanted(place, *values) if version - opened > 0.01 and can_check(place, *values) else [gr.skip()] * 2
    ), [version, opened, *form], [wanted, findings], **QUIET)  # fmt: skip
    at_rest: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 1}
    wanted.change(
        lambda *values: check.findings(place, job_of(place, *values)), form, findings, concurrency_id="models",
        trigger_mode="always_last", **at_rest,
    ).then(lambda *values: check.estimate(place, job_of(place, *values)), form, estimate, **at_rest)  # fmt: skip
    changes = [each.change for each in (name, goal, base, quality, method, settings, version)]
    gr.on(changes, told(refresh), form, [job, listing, estimate], **QUIET, trigger_mode="always_last")
    current_page().load(told(open_page), kept, [data_set, clone, version, opened, name, goal, base, method, settings],
                        **QUIET)  # fmt: skip


def bases_of(goal: str) -> list[Any]:
    """What changes with the goal: bases, methods, and whether pictures have a class."""
    bases = GOALS[goal].bases
    methods = methods_of(domain_of(goal, bases[0]), goal)
    return [gr.Dropdown(list(bases), value=bases[0]), methods, gr.Textbox(visible=GOALS[goal].classes)]


def goal_of(place: Place, kept: str) -> list[Any]:
    """Goal, base and method for a data set that the page still has: its kind may say what it is for."""
    try:
        asked = questions.table_of(place.data_set(str(kept or ""))) is not None
    except InputError:
        asked = False
    if not asked:
        return [gr.skip()] * 3
    goal = next(key for key, each in GOALS.items() if each.questions)
    return [goal, *bases_of(goal)[:2]]


def methods_of(domain: str, goal: str) -> gr.Dropdown:
    """The methods of a goal in a domain."""
    known = GOALS[goal].known(domain)
    return gr.Dropdown(known, value=known[0])


def word_of(name: str) -> str:
    """A name as a word for prompts."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "concept"


def checked(place: Place, data_set: str, clone: str, name: str, goal: str, base: str, *rest: Any) -> None:
    """Refuse what can be refused before the worker looks.

    Raises:
        InputError: no name, no pictures, or a base that no browser may name.
    """
    if not name.strip():
        raise InputError("Name", "it is empty", "Give it one word")
    if goal not in GOALS:
        raise InputError(f"goal {goal!r}", "there is no such goal", f"Choose one of {', '.join(GOALS)}")
    if not BASE.fullmatch(base) or ".." in base:
        raise InputError(f"base {base!r}", "a browser names no folders", "Name an embedded model or one of a hub")
    if clone and not data_set:
        return
    if GOALS[goal].questions:
        questions.checked(place.data_set(data_set))
    elif not find_pictures(place.data_set(data_set)):
        raise InputError("Pictures", "there are none", "Drop some, or a .zip of them")


def check_wanted(place: Place, *values: Any) -> list[Any]:
    """Now, for whoever waits for it, and a word meanwhile.

    Raises:
        InputError: as `checked`; a name may come later.
    """
    checked(place, *values[:2], values[2] or "unnamed", *values[3:])
    return [time.time(), check.WORKING]


def can_check(place: Place, *values: Any) -> bool:
    """Whether a form can be checked unasked: there are pictures, and its base is embedded."""
    try:
        checked(place, *values[:2], values[2] or "unnamed", *values[3:])
    except InputError:
        return False
    return str(values[4]).startswith("pocket-")


def job_of(
    place: Place, data_set: str, clone: str, name: str, goal: str, base: str, quality: str, method: str,
    settings: str,
) -> dict[str, Any]:  # fmt: skip
    """The job that the form describes."""
    wanted, domain = GOALS[goal], domain_of(goal, base)
    if (domain, method) not in registry.METHODS:
        method = wanted.methods[domain][0]
    known = {row["name"]: row for row in forms.sections(domain, method)["method"]}
    word = word_of(name)
    own: dict[str, Any] = {key: value for key, value in wanted.method.items() if key in known}
    for key in ("token", "trigger"):
        if key in known:
            own[key] = f"<{word}>" if str(known[key]["default"]).startswith("<") else word
    path = str(place.data_set(data_set)) if data_set else "pictures"
    if clone and not data_set:
        path = str(read_job(place, clone)["data"].get("path", ""))
    job: dict[str, Any] = {
        "base": base,
        "domain": domain,
        "name": word,
        "method": {"name": method, **own},
        "data": {"path": path, **(wanted.data if domain == "diffusion" else {})},
        "train": {"steps": QUALITY.get(quality, 300)},
    }
    for section, values in forms.changed(domain, method, settings).items():
        job[section] |= values
    if domain == "diffusion" or wanted.questions:
        job["sample"] = {"every": max(3, job["train"]["steps"] // 6)}
    return job


def listing_of(place: Place, name: str) -> str:
    """How many pictures there are, or what to do."""
    try:
        folder = place.data_set(name)
    except InputError:
        return note("Your pictures will stand here, cropped as the training sees them.")
    if questions.table_of(folder):
        return questions.listing(folder)
    found = find_pictures(folder)
    classes = sorted({path.parent.name for path in found if path.parent != folder})
    told_classes = f" in {len(classes)} classes: {escape(', '.join(classes))}" if classes else ""
    return f'<div class="graft"><p>{len(found)} pictures{told_classes}.</p></div>'


def caption_fields(place: Place, name: str) -> None:
    """A square, a caption and a way out for each picture."""
    try:
        folder = place.data_set(name)
    except InputError:
        return
    if questions.table_of(folder):
        return  # it has questions, no captions
    found = find_pictures(folder)
    for path in found[:SHOWN]:
        key = path.relative_to(folder).as_posix()
        with gr.Row(equal_height=True):
            gr.HTML(
                f'<div class="graft"><img class="small" src="{thumb_url(name, key, path)}" alt="{escape(key)}" '
                'style="max-width:6rem"></div>', min_width=100,
            )  # fmt: skip
            text = gr.Textbox(
                uploads.caption_of(path),
                label=f"Caption of {key}",
                info="May be left empty; {token} stands for the name.",
                interactive=True,
                scale=3,
                min_width=180,
            )
            text.change(lambda value, path=path: uploads.set_caption(path, value), text, None, **QUIET)
    if len(found) > SHOWN:
        gr.HTML(note(f"And {len(found) - SHOWN} more."))


def setting_fields(domain: str, method: str, values: Mapping[str, Any], settings: gr.Textbox) -> None:
    """A field for each setting that applies to the method."""
    if (domain, method) not in registry.METHODS:
        return
    for section, rows in forms.sections(domain, method).items():
        with gr.Accordion(f"[{section}]", open=section == "method"):
            for row in rows:
                key = f"{section}.{row['name']}"
                if row["default"] == "required":
                    continue
                shown = forms.field(row, values.get(key, row["default"]))
                shown.change(None, [shown, settings], settings, js=forms.noted(key), **QUIET)


def expected(place: Place, *values: Any) -> str:
    """What the training of a form takes: as measured, else by earlier runs."""
    job = job_of(place, *values)
    found = check.known(place, job)
    return check.told_estimate(place, job, found) if found else estimate_of(place, values[4], values[6], values[5])


def estimate_of(place: Place, base: str, method: str, quality: str) -> str:
    """How long it may take, from earlier runs of this method on this base in the same folder."""
    paces, sizes = [], []
    for run in place.newest()[:50]:
        rows = run.metrics()
        text = (run.folder / "job.toml").read_text(encoding="utf-8")
        if rows and rows[-1].get("seconds") and f'base = "{base}"' in text and f'name = "{method}"' in text:
            paces.append(rows[-1]["seconds"] / rows[-1]["step"])
            sizes.append(sum(file.stat().st_size for file in run.folder.rglob("*") if file.is_file()))
    if not paces:
        return note("No earlier run of this kind here tells how long it takes.")
    how_long = duration(statistics.median(paces) * QUALITY.get(quality, 300))
    size = statistics.median(sizes) / 1e6
    told_by = f"{len(paces)} earlier run{'s' * (len(paces) > 1)}"
    return note(f"About {how_long} and {size:.0f} MB on disk, by {told_by} here.")


def cloned(place: Place, name: str) -> dict[str, Any]:
    """The form of a run's job.

    Raises:
        InputError: there is no such run.
    """
    job = read_job(place, name)
    domain, method = str(job["domain"]), dict(job["method"])
    goal = next((key for key, each in GOALS.items() if method["name"] in each.methods.get(domain, ())), None)
    if goal is None:
        raise InputError(name, "no goal of this page has its method", "Train its job file again with graft train")
    known = forms.sections(domain, str(method["name"]))
    values = {
        f"{section}.{row['name']}": job[section][row["name"]]
        for section, rows in known.items()
        for row in rows
        if row["name"] in job.get(section, {}) and forms.parsed(row, job[section][row["name"]]) is not None
    }
    shown = {key: value for key, value in values.items() if key.split(".")[1] not in ("token", "trigger")}
    return {"name": job.get("name") or method["name"], "goal": goal, "base": job["base"],
            "method": method["name"], "settings": shown}  # fmt: skip


def read_job(place: Place, name: str) -> dict[str, Any]:
    """A run's job file, as it stands there.

    Raises:
        InputError: there is no such run.
    """
    from graft.studio.config import read_toml

    return read_toml(place.run(name).folder / "job.toml")
