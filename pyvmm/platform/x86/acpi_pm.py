"""Power off and reset for a hardware-reduced ACPI machine: three byte-wide I/O ports.

ACPI 6.5, 4.8.3.7 Sleep Control and Status Registers, and 4.8.3.6 Reset Register. The FADT tells
the guest where they are and what value resets; the DSDT's \\_S5 which sleep type powers off.
"""

from __future__ import annotations

from pyvmm.bus import Action
from pyvmm.host.saved import Saved

PORTS = 3  # sleep control, sleep status, reset

SLEEP_CONTROL, SLEEP_STATUS, RESET = range(PORTS)

SLEEP_TYPE_S5 = 5  # what the guest writes to SLP_TYP to power off
RESET_VALUE = 1  # what it writes to the reset register

_SLP_TYP_SHIFT = 2
_SLP_TYP_MASK = 0x7
_SLP_EN = 0x20


class AcpiPm:
    """`Handler` of the three ports.

    The sleep status register reads 0, "nothing woke this machine", for it never sleeps.
    """

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> Action | None:
        """POWEROFF for S5 with SLP_EN, RESET for the reset value, None for anything else."""
        if size != 1:
            return None
        if offset == SLEEP_CONTROL:
            sleep_type = value >> _SLP_TYP_SHIFT & _SLP_TYP_MASK
            off = value & _SLP_EN and sleep_type == SLEEP_TYPE_S5
            return Action.POWEROFF if off else None
        return Action.RESET if offset == RESET and value == RESET_VALUE else None

    def save(self) -> dict[str, object]:
        """It keeps nothing from one access to the next."""
        return {}

    def restore(self, saved: Saved) -> None:
        """Likewise."""
