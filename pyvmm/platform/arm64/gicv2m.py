"""GICv2m: a page of registers by which messages reach a GICv2, which has no place for them itself.
Each message is the number of a shared interrupt (Arm DEN 0029, Server Base System Architecture,
appendix "GICv2m Architecture").

What PCI devices of ours write to the doorbell KVM turns into interrupts; here are the writes of the
guest's processors.
"""

from __future__ import annotations

from collections.abc import Callable

SIZE = 0x1000
DOORBELL = 0x040
"""MSI_SETSPI_NS, to which messages are written: its offset."""

_TYPER, _IIDR = 0x008, 0xFCC
_BASE_SHIFT = 16  # of MSI_TYPER: the first interrupt's number; how many there are is below
_PRODUCT = ord("p") << 20  # of MSI_IIDR: a frame of nobody's that drivers know flaws of


class Gicv2m:
    """`Handler` of its registers. It has no state. Any thread may call it."""

    def __init__(self, interrupts: range, send: Callable[[int], None]) -> None:
        """`interrupts` are the GIC's numbers of those that are messages; `send` has one of them
        happen, as an edge."""
        self._interrupts = interrupts
        self._send = send

    def read(self, offset: int, size: int) -> int:
        if offset == _TYPER:
            return self._interrupts.start << _BASE_SHIFT | len(self._interrupts)
        return _PRODUCT if offset == _IIDR else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == DOORBELL and size == 4 and value in self._interrupts:
            self._send(value)
