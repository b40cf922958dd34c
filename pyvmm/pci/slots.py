"""Slots of a bus that devices come to and go from while a guest runs: what the ACPI methods of its
DSDT read and write.

Three registers of 32 bits, in which bit N is device number N; a write of ones clears them:

    0    arrived    a device has come
    4    leaving    the guest is asked to give the device up
    8    eject      (written only) the guest has given it up: _EJ0

An interrupt tells of new bits. This module does not know which device is in a slot; the owner of
the bus ejects devices.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from pyvmm.bus import Action
from pyvmm.host.saved import Saved

SIZE = 12  # bytes of I/O ports
ARRIVED, LEAVING, EJECT = 0, 4, 8


class Slots:
    """The registers: a bus's Handler. Any thread may call it."""

    def __init__(self, interrupt: Callable[[], None], eject: Callable[[int], None]) -> None:
        """`eject` hears of each device number that the guest gives up, in the vCPU's thread."""
        self._interrupt = interrupt
        self._eject = eject
        self._lock = Lock()
        self._bits = {ARRIVED: 0, LEAVING: 0}

    def tell(self, register: int, device: int) -> None:
        """Have the guest learn, by ARRIVED or LEAVING, of what is with `device`."""
        with self._lock:
            self._bits[register] |= 1 << device
        self._interrupt()

    def withdraw(self, device: int) -> None:
        """Take back the news of `device` that the guest has not read yet."""
        with self._lock:
            for register in self._bits:
                self._bits[register] &= ~(1 << device)

    def remind(self) -> None:
        """Interrupt again if there is something that the guest has not looked at: it may have had
        no driver for the interrupt when that came."""
        if any(self._bits.values()):
            self._interrupt()

    def save(self) -> dict[str, int]:
        """The news that the guest has not read."""
        with self._lock:
            return {"arrived": self._bits[ARRIVED], "leaving": self._bits[LEAVING]}

    def restore(self, saved: Saved) -> None:
        """Restore what `save` gave. Raises ConfigError."""
        bits = {ARRIVED: saved.bits("arrived", 32), LEAVING: saved.bits("leaving", 32)}
        with self._lock:
            self._bits = bits

    def read(self, offset: int, size: int) -> int:
        """See pyvmm.bus.Handler; 0 but for whole registers."""
        return self._bits.get(offset, 0) if size == 4 else 0

    def write(self, offset: int, size: int, value: int) -> Action | None:
        """See pyvmm.bus.Handler."""
        if size != 4:
            return None
        if offset in self._bits:
            with self._lock:
                self._bits[offset] &= ~value
        elif offset == EJECT:
            for device in range(32):
                if value >> device & 1:
                    self._eject(device)
        return None
