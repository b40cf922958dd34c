"""Decoded events, one line each, for `--trace`.

Parts that can be traced hold an optional callable; it is None when nobody listens, so that an
untraced machine pays one comparison. An event is any value whose `str()` is one line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection
from threading import Lock
from typing import TextIO

from pyvmm.errors import ConfigError

Hook = Callable[[object], None]


class Trace:
    """Writes the events of the chosen kinds, with seconds since the start in front."""

    def __init__(self, kinds: Collection[str], path: str | None = None) -> None:
        """Trace `kinds` to the file at `path`, or to standard error. Raises ConfigError."""
        self._kinds = frozenset(kinds)
        self._start = time.monotonic()
        self._lock = Lock()
        self._file: TextIO | None = None
        if path is not None and self._kinds:
            try:
                self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115
            except OSError as error:
                raise ConfigError(
                    f"cannot write {path}: {error.strerror}",
                    cure="name a file in a writable directory",
                    option="--trace-file",
                ) from None
        # Raw mode on a terminal needs the carriage return; a file does not want it.
        self._end = "\r\n" if self._file is None and sys.stderr.isatty() else "\n"

    def hook(self, kind: str) -> Hook | None:
        """The callable that traces events of `kind`, or None if they are not wanted."""
        if kind not in self._kinds:
            return None

        def write(event: object) -> None:
            self._write(kind, event)

        return write

    def _write(self, kind: str, event: object) -> None:
        elapsed = time.monotonic() - self._start
        line = f"[{elapsed:10.6f}] {kind:<9} {event}{self._end}"
        with self._lock:
            try:
                (self._file or sys.stderr).write(line)
            except (OSError, ValueError):
                self._kinds = frozenset()  # A full disk ends the trace, not the guest.

    def close(self) -> None:
        """Flush and close the trace's file."""
        if self._file is not None:
            self._file.close()  # A straggler's event then raises ValueError, caught in _write.
