"""Decoded events, one line each, for `--trace`.

Parts that can be traced hold an optional callable; it is None when nobody listens, so that an
untraced machine pays one comparison. An event is any value whose `str()` is one line.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable, Collection
from threading import Lock
from typing import TextIO

from pyvmm.errors import ConfigError
from pyvmm.host import log

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
                raise cannot_write(path, error) from None
        self._stream: TextIO | None = self._file or sys.stderr  # None where that is closed
        # Not for a file, whose buffer saves a system call for each line.
        self._never_waits = self._file is None and not _is_file(sys.stderr)
        # Raw mode on a terminal needs the carriage return; a file does not want it.
        self._end = "\r\n" if self._file is None and _is_terminal(sys.stderr) else "\n"

    def hook(self, kind: str) -> Hook | None:
        """The callable that traces events of `kind`, or None if they are not wanted."""
        if kind not in self._kinds or self._stream is None:
            return None

        def write(event: object) -> None:
            self._write(kind, event)

        return write

    def _write(self, kind: str, event: object) -> None:
        if self._stream is None:
            return
        elapsed = time.monotonic() - self._start
        line = f"[{elapsed:10.6f}] {kind:<9} {event}{self._end}"
        with self._lock:
            if self._stream is None:
                return
            if self._never_waits:
                log.raw_to_stderr(line.rstrip())
                return
            try:
                self._stream.write(line)
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        # A full disk, or a pipe whose reader has gone: it ends the trace, not the guest.
        self._stream = None
        reason = error.strerror if isinstance(error, OSError) else error
        log.to_stderr(f"the trace ends here: {reason}")

    def close(self) -> None:
        """Flush and close the trace's file; later events go nowhere."""
        with self._lock:
            failed = self._stream is None
            self._stream = None
            if self._file is None:
                return
            try:
                self._file.close()
            except OSError as error:
                if not failed:
                    self._give_up(error)


def cannot_write(path: str, error: OSError) -> ConfigError:
    """The error for a trace file that cannot be opened."""
    return ConfigError(
        f"cannot write {path or 'a file without a name'}: {error.strerror}",
        cure="name a file in a writable directory",
        option="--trace-file",
    )


def _is_file(stream: TextIO | None) -> bool:
    try:
        return stream is None or stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # a program's own, which is not a descriptor
        return True


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False
