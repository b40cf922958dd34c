"""A guest on a terminal of its own: keys are typed, and the terminal's settings are looked at."""

from __future__ import annotations

import os
import pty
import subprocess
import termios
from dataclasses import dataclass
from typing import Any

from guest import Guest, GuestResult, pump_into


@dataclass(eq=False)
class TerminalGuest(Guest):
    """Its standard input and output are a pseudo-terminal; standard error is not."""

    def _open(self) -> None:
        self._keyboard, self._terminal = pty.openpty()
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

    def _finish(self) -> GuestResult:
        self.after = self.settings()
        os.close(self._terminal)  # the last one: the screen ends
        self._screen.join()
        os.close(self._keyboard)
        return super()._finish()
