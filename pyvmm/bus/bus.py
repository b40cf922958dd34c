"""One address space (I/O ports or MMIO): ranges that do not overlap, each with its handler."""

from __future__ import annotations

import enum
from bisect import bisect_right
from typing import Protocol


class Action(enum.Enum):
    """A request of a guest's write to the machine; a handler returns it, nothing calls back up."""

    POWEROFF = "poweroff"
    RESET = "reset"


class Handler(Protocol):
    """Answers the accesses to one range. It sees offsets into its range, never addresses.

    `size` is 1, 2, 4 or 8 bytes; values are little-endian numbers of that size.
    """

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> Action | None: ...


class Bus:
    """Finds the handler of an access. Reads nobody answers are all ones, writes go nowhere."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, Handler]] = []

    def register(self, start: int, size: int, handler: Handler) -> None:
        """Give [start, start + size) to `handler`. Raises ValueError if it overlaps another."""
        place = bisect_right(self._starts, start)
        before = self._ranges[place - 1] if place else None
        after = self._ranges[place] if place < len(self._ranges) else None
        if size <= 0 or (before and before[1] > start) or (after and start + size > after[0]):
            raise ValueError(f"{self.name} range {start:#x} + {size:#x} overlaps another")
        self._starts.insert(place, start)
        self._ranges.insert(place, (start, start + size, handler))

    def find(self, address: int) -> tuple[int, Handler] | None:
        """(start of the range, its handler) that `address` lies in, or None."""
        place = bisect_right(self._starts, address) - 1
        if place >= 0:
            start, end, handler = self._ranges[place]
            if address < end:
                return start, handler
        return None

    def read(self, address: int, size: int) -> int:
        """The `size`-byte value at `address`; all ones where nobody answers or the access straddles
        the end of a range."""
        found = self._within(address, size)
        if found is None:
            return (1 << (8 * size)) - 1
        start, handler = found
        return handler.read(address - start, size)

    def write(self, address: int, size: int, value: int) -> Action | None:
        """Write `value` of `size` bytes at `address`; what it asks of the machine, if anything."""
        found = self._within(address, size)
        if found is None:
            return None
        start, handler = found
        return handler.write(address - start, size, value)

    def _within(self, address: int, size: int) -> tuple[int, Handler] | None:
        place = bisect_right(self._starts, address) - 1
        if place >= 0:
            start, end, handler = self._ranges[place]
            if address + size <= end:
                return start, handler
        return None
