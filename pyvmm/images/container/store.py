"""The files of a saved image by name: those in an archive, or in a directory of the OCI layout.

A name that comes out of a manifest is only ever looked up among these; it is not a path of this
machine.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import tarfile
from collections.abc import Callable
from typing import IO, Any

from pyvmm.images.container import members
from pyvmm.images.container.refusal import Refused, explained, shown

_MOST_FILES = 20_000
_MOST_LINKS = 8  # `docker save` links a layer that two images share
_JSON_LIMIT = 4 << 20  # bytes of one file
_MOST_JSON = 64 << 20  # bytes of all, each as often as it is looked at
_LEAST_JSON = 32 << 10  # that one counts for: to look at many small ones takes its time as well
_MOST_VALUES = 200_000  # in one file; an empty list takes two bytes there, and 64 in memory


class _Missing(Refused):
    """There is no such file."""


class Store:
    """`where` is how messages call it."""

    where = ""
    _json_left = _MOST_JSON

    def open(self, name: str) -> IO[bytes]:
        """The file called `name`, to be closed. Raises Refused if there is none."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        try:
            self.open(name).close()
        except _Missing:
            return False
        return True

    def json(self, name: str, check: Callable[[bytes], None] | None = None) -> Any:
        """The value in the JSON file called `name`; `check` sees its bytes first. Raises
        Refused."""
        with self.open(name) as file:
            data = file.read(_JSON_LIMIT + 1)
        if len(data) > _JSON_LIMIT:
            raise Refused(f"{self.where}: {shown(name)} has more than {_JSON_LIMIT >> 20} MiB")
        self._json_left -= max(len(data), _LEAST_JSON)
        values = sum(map(data.count, (b"[", b"{", b",")))
        if self._json_left < 0 or values > _MOST_VALUES:
            raise Refused(f"{self.where}: {shown(name)} says more than any image has to")
        if check is not None:
            check(data)
        with explained(f"{self.where}: {shown(name)}"):
            return json.loads(data)

    def close(self) -> None:
        """Give up what is open."""


class TarStore(Store):
    """The members of an archive that is not compressed."""

    def __init__(self, where: str, path: str) -> None:
        self.where = where
        self._path = path
        with explained(where), open(path, "rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            self._members = members.index(file, _MOST_FILES)

    def open(self, name: str) -> IO[bytes]:
        """See Store."""
        member = self._members.get(name)
        for _ in range(_MOST_LINKS):
            if member is None or member.kind not in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                break
            target = members.plain(member.link)
            if member.kind == tarfile.SYMTYPE:
                target = os.path.normpath(os.path.join(os.path.dirname(name), target))
            name, member = target, self._members.get(target)
        if member is None or not member.is_file or member.pieces is not None:
            raise _Missing(f"{self.where} has no {shown(name)}", cure="save the image again")
        if member.offset + member.size > self._size:
            raise Refused(f"{self.where} is cut short", cure="save the image again")
        file = open(self._path, "rb")  # noqa: SIM115 - _Part closes it
        return io.BufferedReader(_Part(file, member.offset, member.size))


class DirStore(Store):
    """The files of a directory. No symbolic link in it is followed: whoever made the image chose
    where it leads."""

    def __init__(self, where: str, path: str) -> None:
        self.where, self._path = where, path

    def open(self, name: str) -> IO[bytes]:
        """See Store. `name` is one of ours, or holds a digest that was checked."""
        try:
            fd = self._open(name)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise Refused(
                    f"{self.where}: {shown(name)} is a symbolic link, or lies behind one",
                    cure="copy the directory with cp -rL, if you trust it",
                ) from None
            raise _Missing(f"{self.where} has no {shown(name)}", cure="save the image again") from (
                None
            )
        return os.fdopen(fd, "rb")

    def _open(self, name: str) -> int:
        *folders, file = name.split("/")
        flags = os.O_RDONLY | os.O_CLOEXEC
        fd = os.open(self._path, flags | os.O_DIRECTORY)
        for part, kind in (*((part, os.O_DIRECTORY) for part in folders), (file, os.O_NONBLOCK)):
            # O_NONBLOCK: a FIFO has nobody at its other end.
            try:
                opened = os.open(part, flags | os.O_NOFOLLOW | kind, dir_fd=fd)
            finally:
                os.close(fd)
            fd = opened
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise FileNotFoundError
        return fd


class _Part(io.RawIOBase):
    """A range of a file, read from its start to its end."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._left = file, size
        file.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
