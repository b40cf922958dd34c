"""The Ctrl-A keys: what the monitor takes out of what the user types for the guest."""

from __future__ import annotations

import enum

CTRL_A = 0x01

HELP = """\
Ctrl-A h       this help
Ctrl-A x       end the guest at once, as if its power were cut
Ctrl-A a       send Ctrl-A to the guest (so does Ctrl-A Ctrl-A)
"""

CONSOLE_HELP = "Ctrl-A d       leave the console; the VM runs on\n" + HELP


class Command(enum.Enum):
    """A request of the user to the monitor."""

    QUIT = "quit"
    HELP = "help"
    DETACH = "detach"


_COMMANDS = {ord("x"): Command.QUIT, ord("h"): Command.HELP, ord("?"): Command.HELP}
_LITERAL = (CTRL_A, ord("a"))


class EscapeParser:
    """Splits keyboard input into bytes for the guest and commands for the monitor.

    A sequence may be cut anywhere between two calls. Ctrl-A before a key that means nothing here
    goes to the guest with that key: in a shell it moves to the start of the line.
    """

    def __init__(self, *, detach: bool = False) -> None:
        """With `detach`, Ctrl-A d is a command too."""
        self._commands = {**_COMMANDS, ord("d"): Command.DETACH} if detach else _COMMANDS
        self._after_ctrl_a = False

    def feed(self, data: bytes) -> tuple[bytes, list[Command]]:
        """(bytes for the guest, commands in the order they were typed)."""
        if not self._after_ctrl_a and CTRL_A not in data:
            return data, []
        to_guest = bytearray()
        commands: list[Command] = []
        for key in data:
            if not self._after_ctrl_a:
                if key == CTRL_A:
                    self._after_ctrl_a = True
                else:
                    to_guest.append(key)
                continue
            self._after_ctrl_a = False
            if key in self._commands:
                commands.append(self._commands[key])
            elif key in _LITERAL:
                to_guest.append(CTRL_A)
            else:
                to_guest += bytes((CTRL_A, key))
        return bytes(to_guest), commands
