"""A guest on a terminal of its own: keys are typed, and the terminal's settings are looked at."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
import time
from dataclasses import dataclass
from typing import Any

from guest import HANG_SECONDS, Guest, GuestResult, pump_into


@dataclass(eq=False)
class TerminalGuest(Guest):
    """Its standard input and output are a pseudo-terminal of `size`, (columns, rows) if it has one;
    standard error is not."""

    size: tuple[int, int] = (0, 0)

    def _open(self) -> None:
        self._keyboard, self._terminal = pty.openpty()
        self._set_size()
        self.before = self.settings()
        self.process = subprocess.Popen(
            self._argv,
            env=self.environment,
            stdin=self._terminal,
            stdout=self._terminal,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stderr is not None
        self._pumps = [pump_into(self.stderr, self.process.stderr.fileno())]
        self._screen = pump_into(self.console, self._keyboard)

    def settings(self) -> list[Any]:
        """The terminal's settings now, as termios.tcgetattr has them."""
        return termios.tcgetattr(self._terminal)

    def type(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        self.size = columns, rows
        self._set_size()
        # The terminal is not this guest's controlling one, so nobody else sends the signal.
        self.send_signal(signal.SIGWINCH)

    def _set_size(self) -> None:
        columns, rows = self.size
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _hear_out(self) -> None:
        super()._hear_out()
        time.sleep(1)  # for the screen, which does not end while we have the terminal open

    def _finish(self) -> GuestResult:
        self.after = self.settings()
        os.close(self._terminal)  # the last one: the screen ends
        self._screen.join(HANG_SECONDS)
        assert not self._screen.is_alive(), "somebody still has the terminal"
        os.close(self._keyboard)
        return super()._finish()
