"""A listening Unix socket that a user has named: made, guarded against a second one, removed."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import suppress

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import unix_sockets
from pyvmm.host.syscalls import Closable
from pyvmm.host.unix_sockets import Socket

_note: Callable[[str], None] | None = None


Identity = tuple[int, int]
"""The device of a file, and its inode."""


def remove(path: str, identity: Identity | None = None) -> None:
    """Remove the file at `path`, with `identity` only if it is that one. Raises OSError."""
    _remove(path, identity)


def remove_here(path: str, identity: Identity | None) -> None:
    """The same, whatever `remove_by` was told."""
    if identity in (None, _identity(os.lstat(path))):
        os.unlink(path)


_remove: Callable[[str, Identity | None], None] = remove_here


def remove_by(remover: Callable[[str, Identity | None], None]) -> None:
    """From now on `remover` removes files, and looks at them before: it can where this process no
    longer can."""
    global _remove
    _remove = remover


def note_by(note: Callable[[str], None]) -> None:
    """From now on `note` is told the path of each socket that is made: who kills this process with
    SIGKILL leaves it there."""
    global _note
    _note = note


class NamedListener(Closable):
    """Listens at `path`, for its owner only; closing it removes the file.

    A socket that a dead process has left there is replaced; whatever else is there stays.
    """

    def __init__(self, path: str, *, option: str = "") -> None:
        """Raises ConfigError, with `option` in front, if that cannot be."""
        self.path = path
        self._option = option
        if not path or "\0" in path:
            raise ConfigError(
                f"{path!r} cannot be the name of a socket", cure="use another", option=option
            )
        try:
            self.socket = self._listen()
        except HostError as error:
            raise self._cannot(error.errno) from None
        except OSError as error:
            raise self._cannot(error.errno or 0) from None
        self._identity = _identity(os.lstat(path))
        if _note is not None:
            _note(path)

    def _cannot(self, number: int) -> ConfigError:
        return ConfigError(
            f"cannot listen at {self.path}: {os.strerror(number)}",
            cure="shorten its path"
            if number == errno.ENAMETOOLONG
            else "name a socket in a directory of yours",
            option=self._option,
        )

    def _listen(self) -> Socket:
        folder = os.open(os.path.dirname(self.path) or ".", os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Two that start at the same moment must not each take the other's for a dead one's.
            with suppress(OSError):  # a file system without locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            self._make_room(folder)
            return unix_sockets.listen(self.path)
        finally:
            os.close(folder)

    def _make_room(self, folder: int) -> None:
        # In that folder, whatever its path leads to by now: it may be another user's.
        name = os.path.basename(self.path)
        try:
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise ConfigError(
                f"{self.path} is there already and is not a socket",
                cure="remove it or name another",
                option=self._option,
            )
        if _is_alive(self.path):
            raise ConfigError(
                f"{self.path} is in use by a process that listens there",
                cure="stop it or name another socket",
                option=self._option,
            )
        os.unlink(name, dir_fd=folder)

    def close(self) -> None:
        if self.socket.fileno() < 0:
            return
        self.socket.close()
        with suppress(OSError):  # somebody has removed it, or put something else there
            remove(self.path, self._identity)


def _is_alive(path: str) -> bool:
    try:
        unix_sockets.connect(path).close()
    except HostError as error:
        return error.errno not in (errno.ECONNREFUSED, errno.ENOENT)
    return True


def _identity(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino
