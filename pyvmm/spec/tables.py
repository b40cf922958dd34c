"""Specifications as tables of plain values, as configuration files have them, and back.

A table's keys are the names of the specification's fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from pyvmm.errors import ConfigError
from pyvmm.spec import rates
from pyvmm.spec.options import nearest
from pyvmm.spec.sizes import parse_memory, write_memory

T = TypeVar("T")

PAIRS = "tuple[tuple[str, str], ...]"
"""The type of a field that is a table of its own."""
SIZES = ("size",)
"""The fields that are numbers of bytes."""


class UnknownKey(ConfigError):
    """An unknown key, `key`. `nearest` is the one that was probably meant, or ""; `cure` says what
    to do, where a better cure than that is known."""

    def __init__(self, key: str, known: list[str], where: str, *, cure: str = "") -> None:
        self.key = key
        self.nearest = nearest(key, known)
        if not cure and self.nearest:
            cure = f"did you mean {self.nearest}?"
        cure = cure or f"there are {', '.join(known)}"
        super().__init__(f"unknown key {key!r:.100}{f' in {where}' if where else ''}", cure=cure)


def keys(cls: type) -> list[str]:
    """The keys of a table for `cls`, a dataclass."""
    return [field.name for field in _fields(cls)]


def read(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """The `cls`, a dataclass, that `table` describes; `where` is its name in messages.

    Sizes and rates may be texts such as "20M". Raises ConfigError.
    """
    known = {field.name: field for field in _fields(cls)}
    for key in table:
        if key not in known:
            raise UnknownKey(key, list(known), where)
    for field in known.values():
        if field.default is MISSING and field.name not in table:
            raise ConfigError(f"{where} without {field.name}", cure=f'{field.name} = "…"')
    return cls(**{key: _value(known[key], value, where) for key, value in table.items()})


def write(spec: Any) -> dict[str, Any]:
    """The table that `read` makes an equal `spec` from, without what is as by default."""
    table = {}
    for field in _fields(type(spec)):
        value = getattr(spec, field.name)
        if field.default is MISSING or value != field.default:
            table[field.name] = _plain(field, value)
    return table


def _fields(cls: Any) -> list[Field[Any]]:
    return [field for field in fields(cls) if not field.metadata.get("internal")]


def _value(field: Field[Any], value: Any, where: str) -> Any:
    kind = str(field.type)
    what = f"{where}.{field.name}"
    if kind == "int" and isinstance(value, str):
        if field.name in rates.FIELDS:
            return rates.parse_rate(field.name, value, what)
        if field.name in SIZES:
            return parse_memory(value, option=what)
    if kind == "tuple[str, ...]":
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise _wrong(what, value, "a list of texts")
    if kind == PAIRS:
        if isinstance(value, Mapping):
            return tuple((name, _option_text(item)) for name, item in value.items())
        raise _wrong(what, value, "a table")
    plain = kind.removesuffix(" | None")
    wanted, name = {"int": (int, "a number"), "bool": (bool, "true or false")}.get(
        plain, (str, "a text")
    )
    if type(value) is not wanted:
        raise _wrong(what, value, name)
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{what} has a NUL in it")
    return value


def _option_text(value: object) -> str:
    """The arguments of a class of the user's: texts, as on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plain(field: Field[Any], value: Any) -> Any:
    if str(field.type) == PAIRS:
        return dict(value)
    if field.name in SIZES:
        return write_memory(value)
    return list(value) if isinstance(value, tuple) else value


def _wrong(what: str, value: object, wanted: str) -> ConfigError:
    return ConfigError(f"{what} is to be {wanted}, not {value!r:.100}")
