"""`pyvmm run` without click, for command lines that leave no question open.

click and what it imports are a third of a start. So a plain command line is read here, and whatever
is not plain (help, a rarer option, a missing or odd value) is left to click, which alone
explains and complains. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyvmm.kinds import registry
from pyvmm.spec.options import ARGUMENT, FLAG, OPTIONAL, Option

IMAGE, COMMAND = "image", "command"
_RARE = ("config", "allow_code", "print_config", "debug")  # which need what only click's way has


def split_command(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The words for `pyvmm run` and, behind the first ``--``, those that run in the guest."""
    words = list(argv)
    if "--" not in words:
        return words, ()
    place = words.index("--")
    return words[:place], tuple(words[place + 1 :])


def parse_run(argv: Sequence[str]) -> dict[str, Any] | None:
    """The parameters of `run` that `argv` gives, or None if click should look at it."""
    if argv[:1] != ["run"]:
        return None
    words, command = split_command(argv[1:])
    rows = registry.usual_options()
    values = _read(words, rows)
    if values is None:
        return None
    return {**{row.name: row.typed_default for row in rows}, **values, COMMAND: command}


def _read(words: list[str], rows: Sequence[Option]) -> dict[str, Any] | None:
    """The values in `words`, by the options' names; None for what is not plain."""
    by_flag = {
        word: row for row in rows if row.shape != ARGUMENT for word in (row.flag, row.also) if word
    }
    given: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        if word and not word.startswith("-") and IMAGE not in given:
            given[IMAGE] = word
            continue
        flag, equals, text = word.partition("=")
        row = by_flag.get(flag)
        if row is None or row.name in _RARE or row.shape == OPTIONAL:
            return None
        if row.shape == FLAG:
            if equals:
                return None
            given[row.name] = True
            continue
        if not equals:
            text = next(rest, "-")
            if text.startswith("-"):
                return None
        value = _value(row, text)
        if value is None:
            return None
        given[row.name] = (*given.get(row.name, ()), value) if row.repeats else value
    return given


def _value(row: Option, text: str) -> str | int | None:
    """`text` as a value of the option; None where click should say what is wrong."""
    if not text:
        return None
    if row.type is int:
        return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
    if row.type is float:
        return None
    return text if not row.choices or text in row.choices else None


def run_quickly(argv: Sequence[str]) -> Callable[[], int] | None:
    """The function that carries out `argv`, or None if click should."""
    values = parse_run(argv)
    if values is None:
        return None
    for name in ("log_format", *_RARE):  # the former was looked at before all others
        del values[name]
    from pyvmm.monitor.start import start

    return lambda: start(**values)
