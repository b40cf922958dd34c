"""What a build says while it works: a line for each step, with the seconds it took."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator


class Progress:
    """Writes to standard error. On a terminal a step is shown while it runs."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """`text` says what is being done, such as "kernel-6.1: fetching linux-image-6.1.0-50"."""
        start = time.monotonic()
        if self._live:
            self._write(f"pyvmm: {text} … ")
        try:
            yield
        except BaseException:
            if self._live:
                self._write("\n")
            raise
        seconds = f"{time.monotonic() - start:.1f} s\n"
        self._write(seconds if self._live else f"pyvmm: {text}: {seconds}")

    def notice(self, text: str) -> None:
        self._write(f"pyvmm: {text}\n")

    def waiting(self) -> None:
        """Somebody else holds the cache's lock."""
        self.notice("another build is running; waiting for it")

    def _write(self, text: str) -> None:
        if not self._quiet:
            sys.stderr.write(text)
            sys.stderr.flush()
