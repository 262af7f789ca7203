"""`graft methods`."""

from __future__ import annotations

import argparse
import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from graft.studio.commands import Answer, command


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(commands, "methods", methods, "list the methods, or the settings of one")
    parser.add_argument("name", nargs="?", metavar="METHOD", help="show the settings of this one")


def methods(args: argparse.Namespace) -> Answer:
    """Name, domain, first sentence and settings of the methods."""
    from graft.studio import registry

    if args.name and not any(name == args.name for _, name in registry.METHODS):
        registry.domain_of(args.name)  # says which there are
    # The domain "pocket" pretrains the embedded models: `graft pocket train`.
    known = [(domain, name) for domain, name in sorted(registry.METHODS) if domain != "pocket"]
    rows = [_row(domain, name) for domain, name in known if args.name in (None, name)]
    return Answer(rows, "\n\n".join(_text(row, bool(args.name)) for row in rows))


def _row(domain: str, name: str) -> dict[str, Any]:
    from graft.studio import registry

    place = registry.METHODS[domain, name]
    (tree, *_) = _sources(*place.split(":"))
    summary = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    return {"domain": domain, "name": name, "summary": summary, "settings": settings_of(place)}


@cache
def settings_of(place: str) -> list[dict[str, Any]]:
    """Return name, type, default and meaning of the fields of a dataclass, "module:class", without importing it."""
    settings: dict[str, dict[str, Any]] = {}
    for cls in reversed(_sources(*place.split(":"))):
        settings |= _settings(cls)
    return list(settings.values())


def _sources(module: str, name: str) -> list[ast.ClassDef]:
    """A class and those it inherits from, as their files have them: importing them would take seconds."""
    spec = find_spec(module)
    tree = ast.parse(Path(str(spec and spec.origin)).read_text(encoding="utf-8"))
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    places = {alias.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    bases = [base.id for base in found.bases if isinstance(base, ast.Name)]
    return [found, *(cls for base in bases for cls in _sources(places.get(base) or module, base))]


def _settings(cls: ast.ClassDef) -> dict[str, dict[str, Any]]:
    from graft.studio.config import documented

    rows: dict[str, dict[str, Any]] = {}
    if not any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list):
        return rows  # what it annotates are no fields
    for name, field, meaning in documented(cls):
        kind = ast.unparse(field.annotation)
        if not kind.startswith("ClassVar"):
            default = _default(field.value) if field.value else "required"
            rows[name] = {"name": name, "type": kind, "default": default, "meaning": meaning}
    return rows


def _default(value: ast.expr) -> Any:
    """A default as it stands there: a value, in `field(default=...)` or by itself, or the name of a constant."""
    if isinstance(value, ast.Call):
        (value,) = [keyword.value for keyword in value.keywords if keyword.arg == "default"]
    return value.id if isinstance(value, ast.Name) else ast.literal_eval(value)


def _text(row: dict[str, Any], full: bool) -> str:
    head = f"{row['name']} ({row['domain']})\n  {row['summary']}"
    if not full:
        return f"{head}\n  settings: {', '.join(field['name'] for field in row['settings'])}"
    lines = [f"  {f['name']} = {f['default']!r}\n      {' '.join(f['meaning'].split())}" for f in row["settings"]]
    return "\n".join([head, *lines])
