"""The user's side of the guest's serial port: terminal, input and output in one piece."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self

from pyvmm.platform.console_output import ConsoleOutput
from pyvmm.platform.console_pump import ConsolePump, InputPort
from pyvmm.platform.escape import HELP, Command
from pyvmm.platform.terminal import Terminal, is_terminal


def standard_fds() -> tuple[int | None, int | None]:
    """Standard input and output; None for one that was closed when the process started.

    Looking at the numbers 0 and 1 would not do: the next file that is opened gets a free number,
    and the guest's input would be read from a disk image.
    """
    return (0 if sys.stdin is not None else None), (1 if sys.stdout is not None else None)


class Console:
    """Joins file descriptors to a serial port for the length of a ``with`` block.

    `write` is the serial port's sink; `offer` and `watch_room` are for a port that cannot wait
    (ConsoleOutput). `connect` starts the input. If `stdin` is a terminal it is
    raw and `on_quit` is called (in the input's thread) for Ctrl-A x; if not, every byte is the
    guest's. `observer` sees what the guest writes.

    Leaving the block ends the input, writes what is left of the output, and restores the terminal.
    """

    def __init__(
        self,
        stdin: int | None,
        stdout: int | None,
        *,
        on_quit: Callable[[], None],
        observer: Callable[[bytes], None] | None = None,
    ) -> None:
        self._stdin = stdin
        self._stdout = stdout
        self._on_quit = on_quit
        self._terminal = Terminal(stdin)
        self._output = ConsoleOutput(stdout, observer=observer)
        self._pump: ConsolePump | None = None
        self.write = self._output.write
        self.offer = self._output.offer
        self.watch_room = self._output.watch_room

    def __enter__(self) -> Self:
        self._terminal.__enter__()
        self._output.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._pump is not None:
                self._pump.stop()
            self._output.close()
        finally:
            self._terminal.__exit__(kind, value, trace)

    def connect(self, port: InputPort) -> None:
        """Start carrying the input to `port`."""
        keyboard = is_terminal(self._stdin)
        on_command = self._command if keyboard else None
        self._pump = ConsolePump(self._stdin, port, on_command=on_command)
        self._pump.start()

    def watch_size(self, on_size: Callable[[int, int], None]) -> None:
        """Have `on_size(columns, rows)` called, now and whenever it changes, if the output is a
        terminal; from a signal's handler."""
        self._terminal.watch_size(self._stdout, on_size)

    def settle(self) -> None:
        """Return when the observer has seen all that the guest has written so far."""
        self._output.settle()

    @property
    def left_out(self) -> int:
        """The number of bytes of the output that nobody has read in time."""
        return self._output.left_out

    def _command(self, command: Command) -> None:
        if command is Command.QUIT:
            self._on_quit()
        else:
            self._output.offer(b"\r\n" + HELP.replace("\n", "\r\n").encode())
