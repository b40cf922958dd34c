"""The keyboard controller, as far as anybody still needs it: its line to the CPU's reset pin.

There is no keyboard and no mouse. A kernel that boots with ACPI reads so in the FADT and leaves the
ports alone; one that probes all the same must find out quickly. It empties the output buffer first,
at most 16 bytes in Linux's case (drivers/input/serio/i8042.c, i8042_flush), and gives up on a
buffer that will not empty. A controller that answered "empty" would instead be sent a self test,
and every unanswered command costs a boot half a second.
"""

from __future__ import annotations

from pyvmm.bus import Action
from pyvmm.host.saved import Saved

PORTS = 5  # 0x60 data … 0x64 status and command

DATA = 0
COMMAND = 4

# Output buffer full (for ever), input buffer empty: reboot code waits for the latter before it
# sends its command.
_STATUS = 0x01

_WRITE_OUTPUT_PORT = 0xD1
_PULSE_MASK = 0xF1  # 0xF0…0xFF pulse the output lines whose bit is 0; line 0 is the CPU's reset
_PULSE_RESET = 0xF0
_RESET_LINE = 0x01  # active low


class I8042:
    """`Handler` of the five ports from 0x60. Pulsing the reset line returns `Action.RESET`."""

    def __init__(self) -> None:
        self._output_port_next = False

    def read(self, offset: int, size: int) -> int:
        """The status at offset 4, all ones elsewhere."""
        if offset == COMMAND and size == 1:
            return _STATUS
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> Action | None:
        """A command at offset 4, its parameter at offset 0; anything but a reset is ignored."""
        if size != 1 or offset not in (DATA, COMMAND):
            return None
        if offset == COMMAND:
            self._output_port_next = value == _WRITE_OUTPUT_PORT
            return Action.RESET if value & _PULSE_MASK == _PULSE_RESET else None
        to_output_port, self._output_port_next = self._output_port_next, False
        return Action.RESET if to_output_port and not value & _RESET_LINE else None

    def save(self) -> dict[str, object]:
        """True if the next byte of data is for the output port."""
        return {"output_port_next": self._output_port_next}

    def restore(self, saved: Saved) -> None:
        """Restore what `save` gave. Raises ConfigError."""
        self._output_port_next = saved.flag("output_port_next")
