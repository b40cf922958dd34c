"""Whether the values of a specification that comes from text are of the kinds that its fields have.

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
    """`spec`, a record. Raises TypeError that names the field which is wrong; one that
    is a specification in its turn, or several, is whoever made it to check."""
    for name, text in kinds_of(spec).items():
        value = getattr(spec, name)
        kinds = text.split(" | ")
        if not any(_IS.get(kind, _is_anything)(value) for kind in kinds):
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


def _is_anything(value: object) -> bool:
    return True


_IS: dict[str, Callable[[Any], bool]] = {
    "str": _is_text,
    "int": lambda value: type(value) is int,
    "bool": lambda value: type(value) is bool,
    "None": lambda value: value is None,
    "tuple[str, ...]": _is_texts,
    "tuple[tuple[str, str], ...]": _is_pairs,
}
