"""Writing to terminals and pipes that others share."""

from __future__ import annotations

import os
import select


def write_all(fd: int, data: bytes) -> None:
    """Write `data`, also where whoever shares this terminal or pipe with us has made it
    non-blocking. Raises OSError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()
