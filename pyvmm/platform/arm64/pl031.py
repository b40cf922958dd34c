"""The real-time clock of Arm's machines, PL031 (Arm DDI 0224, chapter 3 "Programmer's Model").

It has no interrupt, and the device tree promises none: a guest cannot set an alarm.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pyvmm.host.saved import Saved

SIZE = 0x1000

_DATA, _MATCH, _LOAD, _CONTROL, _MASK = 0x00, 0x04, 0x08, 0x0C, 0x10
_STARTED = 1  # and it cannot be stopped
_IDENTIFICATION = 0xFE0  # RTCPeriphID0 to 3, RTCPCellID0 to 3, a byte in each register
_BYTES = (0x31, 0x10, 0x04, 0x00, 0x0D, 0xF0, 0x05, 0xB1)
_WORD = (1 << 32) - 1


class Pl031:
    """`Handler` of its registers: seconds since 1970, UTC, until the guest sets something else.

    `clock` gives the host's.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._offset = 0
        self._registers = {_MATCH: 0, _LOAD: 0, _MASK: 0}

    def read(self, offset: int, size: int) -> int:
        if size != 4:
            return (1 << 8 * size) - 1
        if offset == _DATA:
            return int(self._clock()) + self._offset & _WORD
        if offset == _CONTROL:
            return _STARTED
        if offset >= _IDENTIFICATION and offset % 4 == 0:
            return _BYTES[(offset - _IDENTIFICATION) // 4]
        return self._registers.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4 or offset not in self._registers:
            return
        self._registers[offset] = value & 1 if offset == _MASK else value
        if offset == _LOAD:
            self._offset = value - int(self._clock())

    def save(self) -> dict[str, object]:
        """Its difference from the host's clock, and the registers that can be written."""
        match, load, mask = (self._registers[one] for one in (_MATCH, _LOAD, _MASK))
        return {"offset": self._offset, "match": match, "load": load, "mask": mask}

    def restore(self, saved: Saved) -> None:
        """Restore what `save` gave. Raises ConfigError."""
        self._offset = saved.integer("offset", 1 << 40, -(1 << 40))
        self._registers = {
            _MATCH: saved.bits("match", 32),
            _LOAD: saved.bits("load", 32),
            _MASK: saved.bits("mask", 1),
        }
