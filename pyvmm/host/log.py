"""One line per event on standard error, with a bound on what a guest can cause.

A guest can provoke a warning as often as it likes; a `RateLimited` log lets a burst of them through
and then counts, so that a log cannot grow without bound (ROBUSTNESS: "warnings are rate-limited").
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

Sink = Callable[[str], None]


def to_stderr(line: str) -> None:
    """Write one line to standard error, whole, whatever thread calls."""
    stream = sys.stderr
    if stream is None:
        return  # It was closed when the process started.
    try:
        # One write call per line keeps lines of several threads apart; \r because the terminal may
        # be in raw mode.
        end = "\r\n" if stream.isatty() else "\n"
        stream.write(f"pyvmm: {line}{end}")
        stream.flush()
    except (OSError, ValueError):
        pass  # A closed standard error must not end the guest.


class RateLimited:
    """Passes `burst` lines per `period` seconds to `sink`, then says how many were dropped."""

    def __init__(
        self,
        sink: Sink = to_stderr,
        *,
        prefix: str = "",
        burst: int = 10,
        period: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sink = sink
        self._prefix = prefix
        self._burst = burst
        self._period = period
        self._clock = clock
        self._window_start = clock()
        self._count = 0

    def __call__(self, line: str) -> None:
        """Log `line`, or only count it."""
        now = self._clock()
        if now - self._window_start >= self._period:
            dropped = self._count - self._burst
            self._window_start, self._count = now, 0
            if dropped > 0:
                self._sink(f"{self._prefix}{dropped} similar warnings were left out")
        self._count += 1
        if self._count <= self._burst:
            self._sink(self._prefix + line)
