"""Rows of a long measurement in a file, so that one that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def kept_rows(path: Path | None, work: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of an earlier measurement of the same work; none without a file, or of other work.

    Args:
        path: JSON with `work` and `rows`.
        work: JSON-able; whatever makes the rows of two measurements comparable.
    """
    found = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
    rows: list[dict[str, Any]] = found["rows"] if found.get("work") == work else []
    return rows
