"""A check that the values of a specification from text are of the kinds that its fields have.

JSON has any value anywhere; the checks that follow, and whoever opens the devices, expect a number
where the field is a number, and a text that can be a path where it is a text.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from pyvmm.spec.record import Record, kinds_of

T = TypeVar("T", bound=Record)


def checked(spec: T) -> T:
    """`spec`, a record, and those that its fields have. Raises TypeError that names the field
    which is wrong."""
    for name, text in kinds_of(spec).items():
        value = getattr(spec, name)
        kinds = text.split(" | ")
        if not any(_IS.get(kind, _is_specs)(value) for kind in kinds):
            raise TypeError(f"{name} is {value!r:.60}")
    return spec


def _is_text(value: object) -> bool:
    if type(value) is not str or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


def _is_pairs(value: object) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(one, list | tuple) and len(one) == 2 and _is_texts(one) for one in value
    )


def _is_specs(value: object) -> bool:
    if not isinstance(value, list | tuple) or not all(isinstance(one, Record) for one in value):
        return False
    return all(checked(one) is one for one in value)


_IS: dict[str, Callable[[Any], bool]] = {
    "str": _is_text,
    "int": lambda value: type(value) is int,
    "bool": lambda value: type(value) is bool,
    "None": lambda value: value is None,
    "tuple[str, ...]": _is_texts,
    "tuple[tuple[str, str], ...]": _is_pairs,
}
