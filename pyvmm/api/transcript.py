"""What a guest has said on its console: written by one thread, read by any number from anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Condition

LIMIT = 4 << 20  # bytes that are kept, at least; older ones are forgotten


class Cancelled(Exception):
    """Whoever waited was told to stop."""


class Cancellation:
    """Has another thread give up what it waits for, by what that has asked to be called."""

    def __init__(self) -> None:
        self.cancelled = False
        self._wakers: list[Callable[[], None]] = []

    def on_cancel(self, wake: Callable[[], None]) -> None:
        """Call `wake` when it is cancelled; at once if it has been."""
        self._wakers.append(wake)
        if self.cancelled:
            wake()

    def cancel(self) -> None:
        self.cancelled = True
        for wake in list(self._wakers):
            wake()


class Transcript:
    """A stream of bytes, the last LIMIT of which stay; a position is a number of bytes since the
    beginning."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._forgotten = 0
        self._ended = False
        self._changed = Condition()

    def append(self, data: bytes) -> None:
        with self._changed:
            self._data += data
            if len(self._data) > 2 * LIMIT:
                excess = len(self._data) - LIMIT
                del self._data[:excess]
                self._forgotten += excess
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wake(self) -> None:
        """Have readers look whether they are cancelled."""
        with self._changed:
            self._changed.notify_all()

    def read(
        self,
        position: int,
        size: int,
        timeout: float | None,
        cancellation: Cancellation | None = None,
    ) -> tuple[bytes, int]:
        """Up to `size` bytes from `position` on, or from the oldest that there is, and the position
        behind them; b"" at the end. Raises TimeoutError or Cancelled."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                position = max(position, self._forgotten)
                start = position - self._forgotten
                if data := bytes(self._data[start : start + size]):
                    return data, position + len(data)
                if self._ended:
                    return b"", position
                if cancellation is not None and cancellation.cancelled:
                    raise Cancelled
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError
                self._changed.wait(left)

    @property
    def text(self) -> str:
        """All that is kept, with lines that end as they do here."""
        with self._changed:
            data = bytes(self._data)
        return data.decode(errors="replace").replace("\r\n", "\n")

    def tail(self, lines: int) -> str:
        """The last lines."""
        return "\n".join(self.text.splitlines()[-lines:])
