"""The CMOS clock of a PC, read-only, and the port that PCs use to waste time.

A kernel told by ACPI that there is no CMOS clock does not look. One that does look (an old one, or
booted with acpi=off) waits for "update in progress" to clear, some of them without end, and all
ones at an unanswered port say that it never does.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pyvmm.host.saved import Saved

PORTS = 2  # 0x70 index, 0x71 data
CMOS_PORT = 0x70
DELAY_PORT = 0x80

_SECONDS = 0x00
_STATUS_A = 0x0A
_CENTURY = 0x32

_NMI_DISABLE = 0x80  # shares the index port

# Status A: 32.768 kHz divider and the usual rate, no update in progress. B: 24-hour BCD. C: no
# interrupt. D: the clock's battery is good. (Motorola MC146818 data sheet, "Registers".)
_FIXED = {_STATUS_A: 0x26, 0x0B: 0x02, 0x0C: 0x00, 0x0D: 0x80}


def _bcd(number: int) -> int:
    return (number // 10 % 10) << 4 | number % 10


class Cmos:
    """`Handler` of ports 0x70 and 0x71: the time of day, UTC. What the guest sets is ignored.

    `clock` gives seconds since 1970. The time is sampled when the seconds or status A are read, so
    that what is read after them belongs to the same moment.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._index = 0
        self._time = self._sample()

    def read(self, offset: int, size: int) -> int:
        if offset != 1 or size != 1:
            return (1 << 8 * size) - 1
        if self._index in (_SECONDS, _STATUS_A):
            self._time = self._sample()
        return self._time.get(self._index, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self._index = value & 0xFF & ~_NMI_DISABLE

    def save(self) -> dict[str, object]:
        """The register that is selected; the time is always the host's."""
        return {"index": self._index}

    def restore(self, saved: Saved) -> None:
        """Restore what `save` gave. Raises ConfigError."""
        self._index = saved.bits("index", 7)
        self._time = self._sample()

    def _sample(self) -> dict[int, int]:
        now = time.gmtime(self._clock())
        return {
            _SECONDS: _bcd(min(now.tm_sec, 59)),
            0x02: _bcd(now.tm_min),
            0x04: _bcd(now.tm_hour),
            0x06: (now.tm_wday + 1) % 7 + 1,  # Sunday is 1
            0x07: _bcd(now.tm_mday),
            0x08: _bcd(now.tm_mon),
            0x09: _bcd(now.tm_year % 100),
            _CENTURY: _bcd(now.tm_year // 100),
            **_FIXED,
        }


class DelayPort:
    """`Handler` of port 0x80: a write takes the time of an I/O cycle, which is all it is for."""

    def read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        return None

    def save(self) -> dict[str, object]:
        """There is nothing in it."""
        return {}

    def restore(self, saved: Saved) -> None:
        """Likewise."""
