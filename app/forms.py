"""Forms drawn from a config class: a field for each setting, with its type, its default, and its docstring as help.

The class is read from its file, not imported: the server has no torch. A form sends only what differs from the default.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

import gradio as gr

from graft.studio import registry
from graft.studio.commands.methods import settings_of
from graft.studio.errors import InputError

TRAIN = "graft.studio.job:TrainConfig"
DATA = {
    "diffusion": "graft.diffusion.data:DataConfig",
    "llm_mm": "graft.llm_mm.data:DataConfig",
    "vision": "graft.vision.data:DataConfig",
    "vlm": "graft.vlm.data:DataConfig",
}
"""Domain -> its data section."""
PATHS = {"path", "split", "names", "dataset", "folders", "images", "replay_path", "class_path", "init", "start"}
"""Settings that name files of this machine: a browser has no say in them."""
OF_MACHINE = {"device", "threads", "workers", "processes", "track"}
"""Settings of `[train]` that the machine decides."""


def sections(domain: str, method: str) -> dict[str, list[dict[str, Any]]]:
    """The settings that apply to a method, by section of the job."""
    places = {"method": registry.METHODS[domain, method], "train": TRAIN}
    if domain in DATA:
        places["data"] = DATA[domain]
    hidden = PATHS | OF_MACHINE
    found = {section: settings_of(place) for section, place in places.items()}
    # A default that is a long constant stands there by its name.
    return {
        section: [row for row in rows if row["name"] not in hidden and not str(row["default"]).isupper()]
        for section, rows in found.items()
    }


def field(row: Mapping[str, Any], value: Any) -> gr.components.Component:
    """The field of one setting."""
    label, info, kind = row["name"], " ".join(row["meaning"].split()), row["type"]
    if kind.startswith("Literal["):
        choices = ast.literal_eval(f"({kind[8:-1]},)")
        return gr.Dropdown(list(choices), value=value, label=label, info=info, interactive=True)
    if kind == "bool":
        return gr.Checkbox(bool(value), label=label, info=info, interactive=True)
    if kind in ("int", "int | None"):
        return gr.Number(value, label=label, info=info, interactive=True, precision=0)
    if kind in ("float", "float | None", "float | str"):  # a share; a folder is no choice of a browser's
        return gr.Number(value, label=label, info=info, interactive=True)
    shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else "" if value is None else str(value)
    return gr.Textbox(shown, label=label, info=info, interactive=True)


def parsed(row: Mapping[str, Any], value: Any) -> Any:
    """What a field says, as TOML has it; None where it says what the default says."""
    kind, default = row["type"], row["default"]
    if isinstance(value, str) and "tuple" in kind:
        parts = [part.strip() for part in value.split(",") if part.strip()]
        numbers = "int" in kind or "float" in kind
        listed: list[Any] = [ast.literal_eval(part) if numbers else part for part in parts]
        value = listed[0] if "str |" in kind and len(listed) == 1 else listed
    if kind.startswith("float") and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    plain = list(default) if isinstance(default, tuple) else default
    return None if value in (plain, "", None, []) else value


def noted(key: str) -> str:
    """Browser code that notes a field's value among those of all fields, a JSON object.

    There and not on the server, where two fields that are filled one right after the other would each start from what
    the page held before, and one of them be lost.
    """
    return f"(value, all) => JSON.stringify({{...JSON.parse(all), {json.dumps(key)}: value}})"


def changed(domain: str, method: str, all_fields: str) -> dict[str, dict[str, Any]]:
    """What `noted` gathered, as a job has it: section -> setting -> value, without what the defaults say.

    What is no field of this method is left out: a page may still hold those of another, and a browser has no say in
    the rest of a job.

    Raises:
        InputError: a value that cannot be read.
    """
    try:
        values = dict(json.loads(all_fields))
    except (ValueError, TypeError):
        raise InputError("Advanced", "the page sent no settings", "Load the page again") from None
    found: dict[str, dict[str, Any]] = {}
    for section, rows in sections(domain, method).items():
        for row in rows:
            if (key := f"{section}.{row['name']}") in values:
                try:
                    said = parsed(row, values[key])
                except (ValueError, SyntaxError):
                    given = f"{key} = {values[key]!r}"
                    raise InputError(given, "it is no list of numbers", "Write them with commas between") from None
                if said is not None:
                    found.setdefault(section, {})[row["name"]] = said
    return found
