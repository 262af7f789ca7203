"""Strict reading of plain values into dataclasses."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from graft.studio.config import field_docs, from_dict, parse_value, read_toml, require, to_dict, write_toml
from graft.studio.errors import InputError


@dataclass(frozen=True)
class Inner:
    rank: int = 4
    """How wide."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank {self.rank}", "must be at least 1", "4 is usual")


@dataclass(frozen=True)
class Outer(Inner):
    path: str = "x"
    """Where it lies,
    and what it is."""
    rate: float | None = None
    """How fast."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    seeds: tuple[int, ...] = (1, 2)
    """One each."""
    inner: Inner = field(default_factory=Inner)
    """A section."""


@dataclass(frozen=True)
class Required:
    path: str
    """Where."""


GIVEN: dict[str, Any] = {"rate": 1, "seeds": [3], "inner": {"rank": 8}, "kind": "b"}


def test_reads_what_toml_holds() -> None:
    assert from_dict(Outer, GIVEN, "x") == Outer(rate=1.0, seeds=(3,), inner=Inner(8), kind="b")


def test_round_trip_through_toml() -> None:
    config = from_dict(Outer, GIVEN, "x")
    assert from_dict(Outer, tomllib.loads(write_toml(to_dict(config))), "x") == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rnak": 3}, "x.rnak: no such key. Did you mean 'rank'?"),
        ({"inner": {"rnak": 3}}, "x.inner.rnak: no such key. Did you mean 'rank'?"),
        ({"rank": -3}, "rank -3: must be at least 1"),
        ({"inner": {"rank": 0}}, "rank 0: must be at least 1"),
        ({"rank": "8"}, "x.rank = '8'"),
        ({"rank": 1.5}, "x.rank = 1.5"),
        ({"rank": True}, "x.rank = True"),
        ({"kind": "c"}, "'a' or 'b'"),
        ({"inner": 3}, "x.inner"),
    ],
)
def test_refuses_and_says_which_key(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        from_dict(Outer, data, "x")
    assert message in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(InputError, match="data.path: is required"):
        from_dict(Required, {}, "data")


def test_a_value_out_of_range_is_told_with_its_name() -> None:
    require("train.steps", 3, True, "1 or more")
    with pytest.raises(InputError, match="train.steps = 0: expected 1 or more. Correct"):
        require("train.steps", 0, False, "1 or more")


def test_docs_are_the_strings_under_the_fields() -> None:
    docs = field_docs(Outer)
    assert list(docs) == ["rank", "path", "rate", "kind", "seeds", "inner"]
    assert docs["rank"] == "How wide."
    assert docs["path"] == "Where it lies,\nand what it is."


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("1e-3", 1e-3), ("true", True), ("[1, 2]", [1, 2]), ("<sprout>", "<sprout>"), ("", "")],
)
def test_values_of_the_command_line(text: str, value: Any) -> None:
    assert parse_value(text) == value


def test_files_that_are_no_toml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_toml(tmp_path / "job.toml")
    (tmp_path / "job.toml").write_text("base = = 1")
    with pytest.raises(InputError, match="not valid TOML.*line 1"):
        read_toml(tmp_path / "job.toml")
    with pytest.raises(InputError, match="cannot be read"):
        read_toml(tmp_path)
