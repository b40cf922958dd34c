"""The contents of a container image's files, one behind the other in one temporary file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO

from pyvmm.images.container.refusal import Refused

_CHUNK = 1 << 20


class Spool:
    """Written once, read in pieces. `most` bytes may be written in all; zeros take no room."""

    def __init__(self, path: str, most: int) -> None:
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 - close() closes it
        self._end = 0
        self._most = most

    def write(self, content: IO[bytes], size: int, what: str) -> tuple[int, int]:
        """Append the `size` bytes of `content`: (offset, size).

        Raises Refused if it has fewer, or there are too many, and OSError.
        """
        start = self._end
        if start + size > self._most:
            raise Refused(
                f"its files have more than {self._most >> 20} MiB",
                cure="allow more with --size, if there is room for it",
            )
        while (left := start + size - self._end) > 0:
            data = content.read(min(_CHUNK, left))
            if not data:
                raise Refused(f"{what} is cut short")
            if data.count(0) != len(data):
                _pwrite_all(self._file.fileno(), data, self._end)
            self._end += len(data)
        return start, size

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on."""
        data = os.pread(self._file.fileno(), size, start)
        return data.ljust(size, b"\0")  # zeros at the very end were not written

    def pieces(self, start: int, size: int) -> Iterator[bytes]:
        """The same in pieces."""
        for offset in range(start, start + size, _CHUNK):
            yield self.read(offset, min(_CHUNK, start + size - offset))

    def close(self) -> None:
        self._file.close()


def _pwrite_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
