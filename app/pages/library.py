"""Library: the adapters that the runs have made. Search, tag, inspect, convert, merge, verify, delete, undo."""

from __future__ import annotations

import json
import secrets
import shutil
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from graft.app import page
from graft.app.files import export_url, sample_url
from graft.app.handlers import QUIET, current_page, told
from graft.app.place import Place
from graft.studio.disk import write_json
from graft.studio.errors import InputError, RunError
from graft.studio.runs import Run, holder, open_run

FORMATS = ("native", "diffusers", "kohya", "peft", "loralib", "timm")
"""What an adapter can be written as; which of them a method knows, it says itself."""
MOST = 4
"""Adapters in one."""


def build(place: Place) -> None:
    """Draw the page."""
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            query = gr.Textbox("", label="Search", info="Name, method, base, trigger or tag.", elem_id="query")
            cards = gr.HTML()
            with gr.Row():
                undo = gr.Button("Undo the last deletion", size="sm", visible=False)
        with gr.Column(scale=4, min_width=320):
            chosen = gr.Textbox(visible="hidden")
            detail = gr.HTML()
            tags = gr.Textbox("", label="Tags, with commas between them", visible=False, max_length=200)
            with gr.Row(visible=False) as actions:
                inspect = gr.Button("Inspect", size="sm", min_width=80)
                verify = gr.Button("Verify", size="sm", min_width=80)
                delete = gr.Button("Delete", size="sm", variant="stop", min_width=80)
            with gr.Row(visible=False, elem_classes="level") as conversion:
                to = gr.Dropdown(list(FORMATS), value="native", label="Format", min_width=120)
                convert = gr.Button("Convert", size="sm")
            with gr.Row(visible=False, elem_classes="level") as merging:
                others = gr.Dropdown([], multiselect=True, max_choices=MOST - 1, allow_custom_value=True, label="With",
                                     info="None: into the weights of its base.", elem_id="others")  # fmt: skip
                weights = gr.Textbox("", label="Weights", info="Such as 0.7, 0.3; empty is 1 for each.", max_length=60)
                merge = gr.Button("Merge", size="sm", elem_id="merge")
            result = gr.HTML()

    def look(query: str, name: str) -> list[Any]:
        there = name in {run.id for run in place.adapters()}
        shown = card(place.run(name)) if there else ""
        tagged = ", ".join(tags_of(place.run(name))) if there else ""
        visible = [gr.Row(visible=there)] * 3
        rest = [gr.Dropdown([run.id for run in place.adapters() if run.id != name], value=[]), undo_button(place)]
        return [listing(place, query, name), shown, gr.Textbox(tagged, visible=there), *visible, *rest]

    def choose(request: gr.Request) -> list[Any]:
        name = request.query_params.get("adapter") or ""
        return [name, *look("", name)]

    view = [cards, detail, tags, actions, conversion, merging, others, undo]
    query.change(lambda query, name: listing(place, query, name), [query, chosen], cards, **QUIET)
    tags.blur(told(lambda name, text: set_tags(place.run(name), text)), [chosen, tags], None, **QUIET)
    inspect.click(told(lambda name: inspected(place, name)), chosen, result, api_visibility="private")
    verify.click(told(lambda name: verified(place, name)), chosen, result, api_visibility="private")
    convert.click(told(lambda name, to: converted(place, name, to)), [chosen, to], result, api_visibility="private")
    merge.click(
        told(lambda *values: merged(place, *values)), [chosen, others, weights], result, api_visibility="private"
    )
    delete.click(told(lambda name: trash(place, name)), chosen, None, **QUIET).success(
        look, [query, chosen], view, **QUIET
    )
    undo.click(told(lambda: restore(place)), None, None, **QUIET).success(look, [query, chosen], view, **QUIET)
    current_page().load(choose, None, [chosen, *view], **QUIET)


def card_of(run: Run) -> dict[str, Any]:
    """The card of a run's adapter, read without loading its tensors."""
    found: dict[str, Any] = json.loads((run.folder / "result" / "adapter.json").read_text(encoding="utf-8"))
    return found


def tags_of(run: Run) -> list[str]:
    """The tags of an adapter."""
    file = run.folder / "tags.json"
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else []


def set_tags(run: Run, text: str) -> None:
    """Replace the tags of an adapter."""
    tags = list(dict.fromkeys(tag.strip()[:40] for tag in text.split(",") if tag.strip()))
    write_json(run.folder / "tags.json", tags[:20])


def listing(place: Place, query: str, current: str) -> str:
    """The adapters that a search finds, each a link to itself."""
    entries = []
    for run in place.adapters():
        found, tags = card_of(run), tags_of(run)
        words = " ".join(
            [run.id, *(str(found.get(key) or "") for key in ("method", "base", "trigger", "domain")), *tags]
        )
        if all(word in words.lower() for word in query.lower().split()):
            entries.append(entry(run, found, tags, run.id == current))
    nothing = "Nothing fits." if place.adapters() else 'No adapters yet. <a href="/teach">Teach one</a>.'
    inside = "".join(entries) or f"<p>{nothing}</p>"
    return f'<nav class="graft runs" aria-label="Adapters">{inside}</nav>'


def entry(run: Run, found: dict[str, Any], tags: list[str], current: bool) -> str:
    """One line of the list."""
    trigger = f"<code>{escape(found['trigger'])}</code>" if found.get("trigger") else ""
    facts = escape(" · ".join([str(found["method"]), str(found["base"]), *tags]))
    mark = ' aria-current="page"' if current else ""
    return (
        f'<a href="/library?adapter={escape(run.id)}"{mark}><span class="name">{escape(run.id)}</span>'
        f'<span class="row">{trigger}<small>{facts}</small></span></a>'
    )


def card(run: Run) -> str:
    """The card of an adapter in full, and its picture."""
    found = card_of(run)
    facts = {key: found.get(key) for key in ("method", "base", "trigger")}
    facts["created"] = str(found.get("created") or "")[:16].replace("T", " ")  # to the minute
    facts |= {"sites": len(found.get("sites", [])), **found.get("metrics", {})}
    settings = page.table([{"setting": key, "value": json.dumps(value)} for key, value in found["config"].items()])
    tiles = "".join(page.picture("", path, sample_url(run, path)) for path in (run.folder / "result").glob("preview.*"))
    preview = f'<p><a class="do" href="/preview?adapter={escape(run.id)}">Preview it</a></p>'
    classes = ", ".join(map(str, found.get("details", {}).get("classes", [])))
    told_classes = f'<p class="soft">Classes: {escape(classes)}</p>' if classes else ""
    return (
        f'<div class="graft"><h2>{escape(run.id)}</h2>{page.figures(facts)}{preview}{told_classes}'
        f'<div class="grid">{tiles}</div><details><summary>Settings</summary>{settings}</details></div>'
    )


def inspected(place: Place, name: str) -> str:
    """The tensors of an adapter."""
    document = place.models.ask("command", argv=["adapters", "inspect", str(place.run(name).folder)])
    rows = [{**row, "shape": " x ".join(map(str, row["shape"]))} for row in document["tensors"]]
    title = f"{document['parameters']:,} parameters in {len(rows)} tensors"
    return f'<div class="graft">{page.table(rows[:200], title)}</div>'


def verified(place: Place, name: str) -> str:
    """Whether an adapter is whole, fits its base, and leaves no trace in it."""
    document = place.models.ask("command", argv=["adapters", "verify", str(place.run(name).folder)])
    whole = document["attaches"] and document["detaches"]
    word = "It is whole and fits its base." if whole else "It leaves a trace in its base."
    return f'<div class="graft"><p role="status">{word}</p>{page.figures(document)}</div>'


def converted(place: Place, name: str, to: str) -> str:
    """An adapter in another format, as files to keep.

    Raises:
        InputError: no such format, or one that cannot express it.
    """
    if to not in FORMATS:
        raise InputError(f"format {to!r}", "there is no such format", f"Choose one of {', '.join(FORMATS)}")
    run = place.run(name)
    folder = place.work / "exports" / run.id / to
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    document = place.models.ask("command", argv=["adapters", "convert", str(run.folder), str(folder), "--to", to])
    links = "".join(
        f'<li><a download href="{export_url(place.work, Path(file))}">{escape(Path(file).name)}</a></li>'
        for file in document["files"]
    )
    return f'<div class="graft"><p role="status">Written as {escape(to)}:</p><ul>{links}</ul></div>'


def merged(place: Place, name: str, others: list[str] | None, weights: str) -> str:
    """Several adapters in one, or a copy of the base with one in its weights, as files to keep.

    Raises:
        InputError: adapters that cannot be joined, or whose base has no place for them.
    """
    names = list(dict.fromkeys([name, *(others or [])]))[:MOST]
    folder = place.work / "exports" / place.run(name).id / f"merged-{secrets.token_hex(4)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    argv = ["adapters", "merge", *(str(place.run(each).folder) for each in names), str(folder)]
    if weights.strip() and len(names) > 1:
        argv += [f"--weights={','.join(f'{weight:g}' for weight in numbers(weights))}"]
    place.models.ask("command", argv=argv)
    links = "".join(
        f'<li><a download href="{export_url(place.work, file)}">{escape(file.relative_to(folder).as_posix())}</a></li>'
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    )
    what = "One adapter for all" if len(names) > 1 else "The base with it"
    return f'<div class="graft"><p role="status">{what}:</p><ul>{links}</ul></div>'


def numbers(text: str) -> list[float]:
    """Weights from a field.

    Raises:
        InputError: something else stands there.
    """
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"Weights {text!r}", "these are no numbers", "Write weights, such as 0.7, 0.3") from None


def trash(place: Place, name: str) -> None:
    """Move a run out of sight; nothing is deleted.

    Raises:
        RunError: a program trains it.
    """
    run = place.run(name)
    if holder(run.folder) is not None:
        raise RunError(name, "it is being trained", "Stop it first")
    bin_ = place.work / "deleted"
    bin_.mkdir(parents=True, exist_ok=True)
    order = max((int(path.name.split("-", 1)[0]) for path in bin_.iterdir()), default=0) + 1
    run.folder.rename(bin_ / f"{order:06d}-{run.id}")


def restore(place: Place) -> None:
    """Bring back what was deleted last.

    Raises:
        RunError: nothing was.
    """
    deleted = sorted((place.work / "deleted").glob("*/job.toml"))
    if not deleted:
        raise RunError("undo", "nothing was deleted", "There is nothing to bring back")
    folder = deleted[-1].parent
    open_run(folder).folder.rename(place.runs / folder.name.split("-", 1)[1])


def undo_button(place: Place) -> gr.Button:
    """The way back, while there is one."""
    return gr.Button(visible=any((place.work / "deleted").glob("*/job.toml")))
