"""Strict configuration: one frozen dataclass feeds Python, TOML, the command line and the saved card.

A section of a job is read into the dataclass of its owner by pydantic, in strict mode: an unknown key, a wrong type or
a missing value is an `InputError` that names the key, and the nearest one that exists. Where pydantic is not installed,
which the core can do without, types are not checked.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from graft.studio.errors import InputError

T = TypeVar("T")


def from_dict(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """A dataclass from plain values, as TOML or JSON hold them.

    Args:
        cls: a dataclass whose fields are plain values, paths, tuples or other such dataclasses.
        data: its fields by name.
        where: name of the section, for messages.

    Raises:
        InputError: an unknown key, a missing key, a value of a wrong type, or one that the dataclass refuses.
    """
    if not isinstance(data, Mapping):
        raise InputError(where, f"expected a table, got {data!r}", "write its fields as key = value")
    check_keys(cls, data, where)
    try:
        from pydantic import ValidationError
    except ModuleNotFoundError:
        return _unchecked(cls, data, where)
    try:
        text = json.dumps(dict(data), default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(where, f"a value is of a kind that no setting has ({error})", "correct it") from None
    try:
        # JSON mode: strict about types, and still reads a list as a tuple and a string as a path, as TOML needs.
        return _adapter(typing.cast(Any, cls)).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([where, *(str(part) for part in first["loc"])])
        if first["type"].startswith("missing"):
            raise InputError(key, "is required", f'add {first["loc"][-1]} = ... to "{where}"') from None
        raise InputError(f"{key} = {first['input']!r}", first["msg"], "correct its value") from None


def _unchecked(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """A dataclass from plain values by what it checks itself; lists where it has tuples become such."""
    hints = typing.get_type_hints(cls)

    def plain(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            return _unchecked(typing.cast(Any, hints[name]), value, f"{where}.{name}")
        return tuple(value) if isinstance(value, list) and "tuple" in str(hints[name]) else value

    try:
        return cls(**{name: plain(name, value) for name, value in data.items()})
    except TypeError as error:
        raise InputError(where, f"a value is missing or of another kind ({error})", "correct it") from None


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Refuses a setting that is out of its range.

    Raises:
        InputError: it does not hold.
    """
    if not holds:
        raise InputError(f"{name} = {value!r}", f"expected {expected}", "Correct the value")


def check_keys(cls: type, data: Mapping[str, Any], where: str) -> None:
    """Refuses keys that are no fields, in nested sections too.

    Raises:
        InputError: naming the nearest field.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    for key, value in data.items():
        if key not in names:
            raise InputError(f"{where}.{key}", "no such key", suggest(key, names))
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            check_keys(hints[key], value, f"{where}.{key}")


def suggest(name: str, known: Iterable[str]) -> str:
    """A remedy for a misspelt name: the nearest one that exists, and the others."""
    known = list(known)
    near = get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}? Known: {', '.join(known)}" if near else f"Known: {', '.join(known) or 'none'}"


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`: plain values that JSON and TOML can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=_plain))


@cache
def field_docs(cls: type) -> dict[str, str]:
    """What each field of a dataclass means: the docstring under it. Fields of parent classes come first."""
    docs: dict[str, str] = {}
    for owner in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        docs |= {name: doc for name, _, doc in documented(typing.cast(ast.ClassDef, tree))}
    return docs


def documented(tree: ast.ClassDef) -> Iterator[tuple[str, ast.AnnAssign, str]]:
    """Name, annotated assignment and meaning of each field with a docstring under it."""
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                yield name, field, inspect.cleandoc(doc)


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as a dictionary.

    Raises:
        InputError: there is no such file, or it is no TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(str(path), "no such file", "give the path of a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"cannot be read: {error}", "give the path of a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(str(path), f"is not valid TOML: {error}", "correct that line") from None
    except RecursionError:
        raise InputError(str(path), "its values lie too deep in each other", "write them flat") from None


def write_toml(data: Mapping[str, Any]) -> str:
    """A dictionary as TOML; keys whose value is None, which TOML lacks, are left out."""
    import tomli_w

    return tomli_w.dumps(_without_none(data))


def parse_value(text: str) -> Any:
    """The value of `--set key=value`: TOML if it is, else the text itself, so that words need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} cannot be written as JSON or TOML")


@cache
def _adapter(cls: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)
