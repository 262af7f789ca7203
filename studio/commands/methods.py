"""`graft methods`."""

from __future__ import annotations

import argparse
import dataclasses
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
    from graft.studio.config import field_docs

    cls: Any = registry.method_class(domain, name)
    docs = field_docs(cls)
    fields = [
        {"name": field.name, "type": str(field.type), "default": _default(field), "meaning": docs.get(field.name, "")}
        for field in dataclasses.fields(cls)
        if field.init
    ]
    summary = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    return {"domain": domain, "name": name, "summary": summary, "settings": fields}


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"


def _text(row: dict[str, Any], full: bool) -> str:
    head = f"{row['name']} ({row['domain']})\n  {row['summary']}"
    if not full:
        return f"{head}\n  settings: {', '.join(field['name'] for field in row['settings'])}"
    lines = [f"  {f['name']} = {f['default']!r}\n      {' '.join(f['meaning'].split())}" for f in row["settings"]]
    return "\n".join([head, *lines])
