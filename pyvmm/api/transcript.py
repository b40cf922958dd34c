"""The output of a guest's console: written by one thread, read by any number from anywhere."""

from __future__ import annotations

import os
import time
from threading import Condition

from pyvmm.api.cancellation import check, woken_by
from pyvmm.api.errors import check_owner

_WHAT = "this console"
LIMIT = 4 << 20  # bytes that are kept, at least; older ones are forgotten


class Transcript:
    """A stream of bytes, the last LIMIT of which stay; a position is a number of bytes since the
    beginning."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._forgotten = 0
        self._ended = False
        self._changed = Condition()
        self._owner = os.getpid()

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

    def read(self, position: int, size: int, timeout: float | None) -> tuple[bytes, int]:
        """Up to `size` bytes from `position` on, or from the oldest that there is, and the position
        behind them; b"" at the end. Raises TimeoutError, and VMError in a forked process."""
        check_owner(self._owner, _WHAT)
        deadline = None if timeout is None else time.monotonic() + timeout
        with woken_by(self._wake), self._changed:
            while True:
                position = max(position, self._forgotten)
                start = position - self._forgotten
                if data := bytes(self._data[start : start + size]):
                    return data, position + len(data)
                if self._ended:
                    return b"", position
                check()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError
                self._changed.wait(left)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @property
    def text(self) -> str:
        """All that is kept, with lines that end as they do here. Raises VMError in a forked
        process."""
        check_owner(self._owner, _WHAT)
        with self._changed:
            data = bytes(self._data)
        return data.decode(errors="replace").replace("\r\n", "\n")

    def tail(self, lines: int) -> str:
        """The last lines."""
        return "\n".join(self.text.splitlines()[-lines:])
