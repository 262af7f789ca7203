"""Rows of the same work are taken over, and of no other."""

from __future__ import annotations

import json
from pathlib import Path

from graft.studio.bench.rows import kept_rows


def test_rows_of_the_same_work_are_kept(tmp_path: Path):
    path, rows = tmp_path / "found.json", [{"method": "lora", "accuracy": 0.5}]
    assert kept_rows(None, {"base": "a"}) == [] == kept_rows(path, {"base": "a"})
    path.write_text(json.dumps({"work": {"base": "a"}, "rows": rows, "passed": True}))
    assert kept_rows(path, {"base": "a"}) == rows
    assert kept_rows(path, {"base": "b"}) == []
