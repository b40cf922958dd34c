"""Saved state as plain data that nobody vouches for: each value is checked when it is taken out.

What saves itself returns a dict of numbers, texts, lists and dicts, fit for JSON; bytes are texts
of hexadecimal digits. What restores itself gets it as `Saved`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyvmm.errors import ConfigError

CURE = "take a new snapshot"
_SHOWN = 60  # characters of a wrong value in a message


class Saved:
    """One dict of a saved state; `place` says in messages where it is from."""

    def __init__(self, values: object, place: str) -> None:
        """Raises ConfigError for what is not a dict."""
        self.place = place
        if not isinstance(values, dict):
            raise self.wrong(f"{_shown(values)} is not a table")
        self._values: dict[str, Any] = values

    def wrong(self, what: str) -> ConfigError:
        """The error for state that cannot be."""
        return ConfigError(f"the saved state of {self.place} cannot be: {what}", cure=CURE)

    def has(self, name: str) -> bool:
        """True if there is a value of that name."""
        return name in self._values

    def get(self, name: str) -> Any:
        """A value that is not checked yet. Raises ConfigError if it is not there."""
        if name not in self._values:
            raise self.wrong(f"{name} is missing")
        return self._values[name]

    def integer(self, name: str, most: int, least: int = 0) -> int:
        """A number from `least` to `most`. Raises ConfigError, as all that follow."""
        value = self.get(name)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(f"{name} is {_shown(value)}")
        return value

    def bits(self, name: str, count: int) -> int:
        """A number of `count` bits."""
        return self.integer(name, (1 << count) - 1)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.get(name)
        if type(value) is not bool:
            raise self.wrong(f"{name} is {_shown(value)}")
        return value

    def text(self, name: str, most: int = 4096) -> str:
        """A text of `most` characters at most."""
        value = self.get(name)
        if not isinstance(value, str) or len(value) > most:
            raise self.wrong(f"{name} is {_shown(value)}")
        return value

    def data(self, name: str, size: int | None = None, most: int = 1 << 20) -> bytes:
        """Bytes: `size` of them, or `most` at most."""
        value = self.get(name)
        try:
            found = bytes.fromhex(value)
        except (TypeError, ValueError):
            raise self.wrong(f"{name} is {_shown(value)}") from None
        if len(found) > most or (size is not None and len(found) != size):
            raise self.wrong(f"{name} has {len(found)} bytes")
        return found

    def items(self, name: str, most: int) -> list[Any]:
        """A list of `most` values at most, which are not checked yet."""
        value = self.get(name)
        if not isinstance(value, list) or len(value) > most:
            raise self.wrong(f"{name} is {_shown(value)}")
        return value

    def integers(self, name: str, most_items: int, most: int) -> list[int]:
        """A list of numbers from 0 to `most`."""
        values = self.items(name, most_items)
        for value in values:
            if type(value) is not int or not 0 <= value <= most:
                raise self.wrong(f"{name} has {_shown(value)} in it")
        return values

    def table(self, name: str) -> Saved:
        """A dict."""
        return Saved(self.get(name), f"{self.place}, {name}")

    def tables(self, name: str, most: int) -> Iterator[Saved]:
        """A list of dicts."""
        for index, value in enumerate(self.items(name, most)):
            yield Saved(value, f"{self.place}, {name} {index}")

    def named(self) -> Iterator[tuple[str, Any]]:
        """All names and values, which are not checked yet."""
        for name, value in self._values.items():
            if not isinstance(name, str):
                raise self.wrong(f"{_shown(name)} is not a name")
            yield name, value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
