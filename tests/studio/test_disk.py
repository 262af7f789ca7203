"""Whole or absent: files, lines, and a disk that is full."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from graft.studio.disk import append_line, read_lines, require_empty, require_space, write_atomic, write_json
from graft.studio.errors import DiskFullError, InputError, RunError

Limit = Callable[[int], AbstractContextManager[None]]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, files_limited_to: Limit) -> None:
    path = write_atomic(tmp_path / "file", b"old")
    with files_limited_to(1000), pytest.raises(DiskFullError, match="no space left.*Free some space"):
        write_atomic(path, b"new" * 1000)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, files_limited_to: Limit) -> None:
    path = tmp_path / "lines.jsonl"
    with files_limited_to(1000), pytest.raises(DiskFullError):
        for i in range(1000):
            append_line(path, {"i": i, "text": "x" * 50})
    assert path.read_bytes().endswith(b"}\n")
    assert [row["i"] for row in read_lines(path)] == list(range(len(read_lines(path))))
    append_line(path, {"i": "after"})
    assert read_lines(path)[-1] == {"i": "after"}


def test_a_torn_line_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"i": 1}\n{"i": 2, "te')
    assert read_lines(path) == [{"i": 1}]
    append_line(path, {"i": 3, "text": "a\u2028b"})
    assert read_lines(path) == [{"i": 1}, {"i": 3, "text": "a\u2028b"}]


def test_space_is_asked_for_before_the_work(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1000)
    with pytest.raises(DiskFullError, match="MB are needed"):
        require_space(tmp_path / "not" / "yet", 10**18)
    assert not (tmp_path / "not").exists()


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    require_empty(tmp_path / "absent")
    require_empty(tmp_path)
    (tmp_path / "note").touch()
    for full in (tmp_path, tmp_path / "note"):
        with pytest.raises(InputError, match="not an empty folder. Name a new folder"):
            require_empty(full)
    with pytest.raises(RunError, match="Resume it"):
        require_empty(tmp_path, RunError, "Resume it")


def test_readers_see_the_old_or_the_new_file(tmp_path: Path) -> None:
    """A process replaces a file all the time; whatever is read meanwhile is whole."""
    path = write_json(tmp_path / "state.json", ["0" * 5000])
    code = (
        "import sys, pathlib\nfrom graft.studio.disk import write_json\n"
        "for i in range(10**9): write_json(pathlib.Path(sys.argv[1]), [str(i % 10) * 5000])"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)]) as writer:
        try:
            seen: set[str] = set()
            while len(seen) < 4:
                text = path.read_text()
                assert len(text.strip('[]\n "')) == 5000
                seen.add(text)
                assert writer.poll() is None
        finally:
            writer.kill()


def test_the_error_of_a_full_device() -> None:
    with pytest.raises(DiskFullError, match="/dev/full: there is no space left .No space left on device"):
        append_line(Path("/dev/full"), {"i": 1})
