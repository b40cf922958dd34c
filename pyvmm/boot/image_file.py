"""Kernel and initrd files: opened, sized and read straight into guest memory, or refused."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress

from pyvmm.errors import ConfigError, HostError, how_many
from pyvmm.host import syscalls

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}
_CURES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EACCES: "check its permissions (on some systems /boot/vmlinuz* is for root only)",
    errno.EPERM: "check its permissions",
}


_kept: dict[str, int] = {}


def keep_open(path: str) -> None:
    """Open the file at `path` for all that read it later under this name, as whom it may be. What
    cannot be opened is theirs to tell."""
    if path not in _kept:
        with suppress(HostError):
            _kept[path] = _open(path)


def _open(path: str) -> int:
    """Raises HostError."""
    if path in _kept:
        try:
            return os.dup(_kept[path])  # reads say where
        except OSError as error:
            raise HostError(error.errno or 0, f"open {path}") from None
    # O_NONBLOCK: opening a FIFO must not wait for its writer.
    return syscalls.open_file(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)


class ImageFile(syscalls.Closable):
    """A regular, non-empty file open for reading; `size` in bytes.

    `option` is the command line option that named it, for error messages.
    """

    def __init__(self, path: str, option: str) -> None:
        """Open `path`. Raises ConfigError for what is missing, unreadable, empty or not a file."""
        self.path = path
        self.option = option
        self.fd = -1
        if not path or "\0" in path:
            raise self.error("the path is empty or has a NUL in it")
        try:
            self.fd = _open(path)
        except HostError as error:
            reason = os.strerror(error.errno)
            cure = _CURES.get(error.errno, "")
            raise self.error(f"cannot open {path}: {reason}", cure) from None
        try:
            self.size = self._checked_size()
        except BaseException:
            self.close()
            raise

    def _checked_size(self) -> int:
        status = os.fstat(self.fd)
        kind = stat.S_IFMT(status.st_mode)
        if kind != stat.S_IFREG:
            what = _KINDS.get(kind, "not a regular file")
            raise self.error(f"{self.path} is {what}", "name a file")
        if status.st_size == 0:
            raise self.error(f"{self.path} is empty", "was its download or build cut short?")
        return status.st_size

    def error(self, message: str, cure: str = "") -> ConfigError:
        """A ConfigError about this file."""
        return ConfigError(message, cure=cure, option=self.option)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; fewer where the file ends. Raises ConfigError."""
        try:
            return os.pread(self.fd, length, offset)
        except (OSError, OverflowError) as error:
            raise self.error(f"cannot read {self.path}: {error}") from None

    def pieces(self, length: int, most: int) -> Iterator[bytes]:
        """The file's first `most` bytes, `length` at a time. Raises ConfigError."""
        for offset in range(0, min(self.size, most), length):
            yield self.read(offset, length)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` on, with no copy. Raises ConfigError if the file ends first."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.fd, [view[done:]], offset + done)
            except (OSError, OverflowError) as error:
                raise self.error(f"cannot read {self.path}: {error}") from None
            if count == 0:
                raise self.error(
                    f"{self.path} ends after {how_many(offset + done, 'byte')}, "
                    f"{offset + len(view)} were expected",
                    "it is truncated: copy or build it again",
                )
            done += count

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def write_whole(output: str, pieces: Iterable[bytes]) -> None:
    """Write `pieces` to the file `output`, which appears when all of them were written. Raises
    ConfigError, and what the pieces raise."""
    # In a folder of many users nobody is to guess it, and put a link there.
    partial = f"{output}.{os.urandom(8).hex()}.part"
    try:
        with open(partial, "xb") as file:
            for piece in pieces:
                file.write(piece)
        os.replace(partial, output)
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {os.strerror(error.errno or 0)}") from None
    finally:
        if os.path.exists(partial):
            os.unlink(partial)
