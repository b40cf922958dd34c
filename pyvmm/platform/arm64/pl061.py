"""A GPIO controller of Arm's machines, PL061 (Arm DDI 0190, chapter 3 "Programmer's Model"), of
whose eight lines one is wired: to the power button.

The button stays down until the guest has looked at it, so that no press is too short to be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from pyvmm.host.saved import Saved

SIZE = 0x1000
BUTTON = 3
"""The number of the line."""

_DATA_END = 0x400  # address bits 9 to 2 say which lines a read or write of the data is about
_DIR, _IS, _IBE, _IEV, _IE = 0x400, 0x404, 0x408, 0x40C, 0x410
_RIS, _MIS, _IC, _AFSEL = 0x414, 0x418, 0x41C, 0x420
_STORED = {"dir": _DIR, "is": _IS, "ibe": _IBE, "iev": _IEV, "ie": _IE, "afsel": _AFSEL}
_IDENTIFICATION = 0xFE0  # GPIOPeriphID0 to 3, GPIOPCellID0 to 3, a byte in each register
_BYTES = (0x61, 0x10, 0x04, 0x00, 0x0D, 0xF0, 0x05, 0xB1)
_PRESSED = 1 << BUTTON
_LINES = 0xFF


class Pl061:
    """`Handler` of its registers, and the machine's power button. Any thread may call it."""

    def __init__(self, interrupt: Callable[[bool], None]) -> None:
        """`interrupt` drives the controller's interrupt line."""
        self._interrupt = interrupt
        self._lock = Lock()
        self._registers = dict.fromkeys(_STORED.values(), 0)
        self._outputs = 0
        self._inputs = 0
        self._edges = 0  # seen, and not cleared by the guest

    # --- the button -------------------------------------------------------------------------------

    def is_watched(self) -> bool:
        """True if a driver has switched the button's interrupt on."""
        return bool(self._registers[_IE] & _PRESSED)

    def press(self) -> None:
        """The button goes down."""
        with self._lock:
            self._set_inputs(self._inputs | _PRESSED)

    # --- registers --------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset >= _IDENTIFICATION and offset % 4 == 0:
            return _BYTES[(offset - _IDENTIFICATION) // 4]
        with self._lock:
            if offset < _DATA_END:
                direction = self._registers[_DIR]
                found = (self._outputs & direction | self._inputs & ~direction) & offset >> 2
                if found & _PRESSED & ~direction:
                    self._set_inputs(self._inputs & ~_PRESSED)
                return found
            if offset == _RIS:
                return self._waiting()
            if offset == _MIS:
                return self._waiting() & self._registers[_IE]
            return self._registers.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        value &= _LINES
        with self._lock:
            if offset < _DATA_END:
                changed = offset >> 2 & self._registers[_DIR]
                self._outputs = self._outputs & ~changed | value & changed
                return
            if offset == _IC:
                self._edges &= ~value
            elif offset in self._registers:
                self._registers[offset] = value
            self._drive()

    def _set_inputs(self, inputs: int) -> None:
        changed, self._inputs = self._inputs ^ inputs, inputs
        registers = self._registers
        wanted = registers[_IBE] | ~(inputs ^ registers[_IEV])
        self._edges |= changed & wanted & ~registers[_IS] & _LINES
        self._drive()

    def _waiting(self) -> int:
        levels = ~(self._inputs ^ self._registers[_IEV])
        return (self._edges | levels & self._registers[_IS]) & ~self._registers[_DIR] & _LINES

    def _drive(self) -> None:
        self._interrupt(bool(self._waiting() & self._registers[_IE]))

    # --- saved and restored -----------------------------------------------------------------------

    def save(self) -> dict[str, int]:
        """All registers by their names."""
        with self._lock:
            lines = {"inputs": self._inputs, "outputs": self._outputs, "edges": self._edges}
            return {name: self._registers[place] for name, place in _STORED.items()} | lines

    def restore(self, saved: Saved) -> None:
        """Restore what `save` gave. Raises ConfigError."""
        registers = {place: saved.bits(name, 8) for name, place in _STORED.items()}
        inputs, outputs, edges = (saved.bits(one, 8) for one in ("inputs", "outputs", "edges"))
        with self._lock:
            self._registers, self._inputs = registers, inputs & _PRESSED
            self._outputs, self._edges = outputs, edges
            self._drive()
