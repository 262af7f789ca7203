"""Manifests: TOML, CSV or JSON lines. Every row is checked before anything starts; all that is wrong is told at once.

A row names a subject, its data and what differs for it; each method makes a job of it. What all rows have in common
stands in the TOML file itself, or in job files given beside a CSV or JSONL file.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.studio.config import parse_value, read_toml, suggest
from graft.studio.errors import InputError
from graft.studio.job import Job, anchor

AT_THE_END = 1_000_000
"""`sample.every` of jobs that do not say one: pictures for the sheet, and none on the way."""
_COMMON = ("base", "domain", "method", "methods", "data", "train", "sample", "subjects", "name")
_OWN = ("name", "data", "set", "base", "method", "methods")


@dataclass(frozen=True)
class Entry:
    """One subject with one method."""

    row: int
    """Where it stands: a line of the file, or a subject's number in a TOML file."""
    subject: str
    """Its name."""
    method: str
    """Of the method, with a label if there are several of that name."""
    job: Job
    """What is trained."""

    def run_id(self, batch: str) -> str:
        """The name of its run: the same whenever the manifest is read."""
        return "-".join(slug(part) for part in (batch, self.subject, self.method))


def slug(name: str) -> str:
    """A name as a part of a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "x"


def read_manifest(path: str | Path, jobs: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> list[Entry]:
    """Return the entries of a manifest, in its order.

    Args:
        path: `.toml`, `.csv` or `.jsonl`.
        jobs: job files, one for each method, that hold what the rows do not say.
        overrides: as of `graft train --set`, for every job.

    Raises:
        InputError: something is wrong; the message names every bad row and why.
    """
    path = Path(path)
    common, rows = _read(path)
    if not rows:
        raise InputError(str(path), "it has no rows", "Write one for each subject")
    templates = [_from_job(Path(job)) for job in jobs] or _templates(common)
    entries, wrong, seen = [], [], dict[str, int]()
    for number, row in rows:
        try:
            name = _check_row(row, seen, number)
            for template in _methods(row, templates):
                entries.append(_entry(number, name, row, template, (path.absolute().parent, overrides)))
        except InputError as error:
            wrong.append(f"row {number}: {error}")
    if wrong:
        shown = "\n  ".join([f"{len(wrong)} of {len(rows)} rows cannot be used", *wrong])
        raise InputError(str(path), shown, "\nNothing was started. Correct these rows")
    return entries


def _read(path: Path) -> tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]:
    kind = path.suffix.lower()
    if kind not in (".toml", ".csv", ".jsonl"):
        raise InputError(str(path), "a manifest is a .toml, .csv or .jsonl file", "Name one of these")
    if kind == ".toml":
        data = read_toml(path)
        for key in data:
            if key not in _COMMON:
                raise InputError(f"{path}: {key}", "no such key", suggest(key, _COMMON))
        subjects = data.pop("subjects", [])
        if not isinstance(subjects, list):
            raise InputError(f"{path}: subjects", "it is not a list of tables", "Write [[subjects]] before each")
        return data, [(k, dict(row) if isinstance(row, Mapping) else {}) for k, row in enumerate(subjects, start=1)]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(str(path), "no such file", "Give the path of a manifest") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"it cannot be read ({error})", "Save it as UTF-8") from None
    return {}, list(_csv(path, text) if kind == ".csv" else _jsonl(path, text))


def _csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(text.splitlines())
    for key in ("name", "data"):
        if key not in (reader.fieldnames or ()):
            raise InputError(str(path), f"its first line has no column {key!r}", "Name the columns there: name,data")
    for row in reader:
        if None in row:
            raise InputError(f"{path}: row {reader.line_num}", "it has more cells than columns", "Quote commas")
        cells = {key: value.strip() for key, value in row.items() if key and value is not None and value.strip()}
        known = {key: value for key, value in cells.items() if key in _OWN and key != "set"}
        if "methods" in known:
            known["methods"] = re.split(r"[\s;]+", known["methods"])
        yield reader.line_num, {**known, "set": {k: parse_value(v) for k, v in cells.items() if k not in _OWN}}


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: row {number}", f"it is no JSON ({error})", "Write one object a line") from None
        yield number, row if isinstance(row, dict) else {}


def _templates(common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One beginning of a job for each method of a TOML manifest; a method's table may have `train` and `sample`."""
    rest = {key: value for key, value in common.items() if key not in ("methods", "method", "name")}
    tables = common.get("methods") or ([common["method"]] if "method" in common else [])
    return [_with_method(rest, table) for table in tables]


def _with_method(rest: Mapping[str, Any], method: Mapping[str, Any] | str) -> dict[str, Any]:
    method = {"name": method} if isinstance(method, str) else dict(method)
    label = str(method.pop("label", method.get("name", "")))
    sections = [key for key in ("train", "sample") if key in method]
    own: dict[str, Any] = {key: {**rest.get(key, {}), **method.pop(key)} for key in sections}
    return {**rest, **own, "method": method, "label": label}


def _from_job(path: Path) -> dict[str, Any]:
    data = read_toml(path)
    anchor(data, path.absolute().parent)
    return {**data, "label": str(data.get("name") or dict(data.get("method", {})).get("name", path.stem))}


def _check_row(row: Mapping[str, Any], seen: dict[str, int], number: int) -> str:
    for key in row:
        if key not in _OWN:
            raise InputError(str(key), "no such key", suggest(str(key), _OWN))
    name = row.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[^\W_][\w .'-]{0,79}", name):
        raise InputError(f"name {name!r}", "it is missing, or no plain name", "Use letters, digits, spaces, - and _")
    if not row.get("data"):
        raise InputError(f"{name}: data", "it is missing", "Name the folder of its pictures")
    if slug(name) in seen:
        raise InputError(f"name {name!r}", f"row {seen[slug(name)]} has it already", "Give every subject its own")
    seen[slug(name)] = number
    return name


def _methods(row: Mapping[str, Any], templates: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The templates that a row takes: all, or those of the methods that it names, or what it brings itself."""
    named = row.get("methods") or ([row["method"]] if "method" in row else [])
    rest = {"base": row["base"]} if "base" in row else {}
    if not named:
        if not templates:
            remedy = "Add a column methods, or give job files with --job"
            raise InputError(str(row["name"]), "nothing says with which method it is trained", remedy)
        return [{**template, **rest} for template in templates]
    known = {str(template["label"]): template for template in templates}
    return [
        {**(known.get(str(name)) or _with_method(dict(templates[0]) if templates else {}, name)), **rest}
        for name in named
    ]


def _entry(
    number: int, name: str, row: Mapping[str, Any], template: Mapping[str, Any], where: tuple[Path, Sequence[str]]
) -> Entry:
    from graft.studio import registry

    folder, overrides = where
    job = {key: dict(value) if isinstance(value, Mapping) else value for key, value in template.items()}
    label = str(job.pop("label"))
    own = row["data"]
    data = {**job.get("data", {}), **(own if isinstance(own, Mapping) else {"path": own})}
    job |= {"data": data, "name": f"{name} {label}"}
    for key, value in (row.get("set") or {}).items():
        _put(job, str(key), value)
    anchor(job, folder)
    made = Job.load(job, overrides)
    if "every" not in job.get("sample", {}) and hasattr(registry.domain(made.domain), "preview"):
        made = Job.load({**job, "sample": {**job.get("sample", {}), "every": AT_THE_END}}, overrides)
    return Entry(number, name, label, made)


def _put(job: dict[str, Any], key: str, value: Any) -> None:
    """Set "train.steps" and the like."""
    *sections, last = key.split(".")
    for section in sections:
        job = job.setdefault(section, {})
        if not isinstance(job, dict):
            raise InputError(key, f"{section!r} is a value, not a section", "Check the key")
    job[last] = value
