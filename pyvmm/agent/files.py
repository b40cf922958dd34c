"""Copying files and trees between the host and a guest.

A tree comes as directories that are entered and left, with names and never paths. What is written
here has the name that the user has asked for; what is below it is opened relative to its directory,
one name at a time and without following links, whoever has made them. So a guest that lies about
its tree can write nowhere but below that name.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from pyvmm.agent.errors import AgentError
from pyvmm.agent.protocol import (
    MAX_DATA,
    MAX_DEPTH,
    Entry,
    Frame,
    FrameType,
    entry_frame,
    frame,
    parse_entry,
)
from pyvmm.agent.session import NOT_THE_AGENT, Session, check, failure, printable
from pyvmm.errors import ConfigError, HostError
from pyvmm.host.syscalls import umask

Progress = Callable[[int], None]
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_MOST_SKIPPED = 1000
_ROOT = "root"  # what the copy of a whole guest is called
_SPECIAL_BITS = 0o7000  # a guest's set-user-ID files do not become ours
_NEITHER = "is neither a file nor a directory"
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


@dataclass
class Copied:
    """The result of a copy. `skipped` are the names of sockets, devices and the like, and of what
    lies on another file system of the guest's."""

    files: int = 0
    bytes: int = 0
    skipped: list[str] = field(default_factory=list)

    def skip(self, name: str) -> None:
        """Note a name; the first thousand of them."""
        if len(self.skipped) < _MOST_SKIPPED:
            self.skipped.append(name)


def _path(text: str) -> bytes:
    """The bytes of a path, here or in the guest. Raises ConfigError for a text that is not one."""
    try:
        path = text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        path = b""
    if not path or b"\0" in path:
        raise ConfigError(f"{text!r:.200} is not a path")
    return path


def _shown(path: str) -> str:
    return printable(path.encode(errors="replace"))


def push(
    session: Session,
    local: str,
    remote: str,
    progress: Progress | None,
    deadline: float | None = None,
) -> Copied:
    """Send `local` to be put at `remote`. Raises ConfigError for `local`, HostError, AgentError,
    CommandTimeout at `deadline`."""
    path = _path(remote)
    try:
        found = os.stat(local)
    except (OSError, ValueError) as error:
        raise _no_place(local, error) from None
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        cure = "a stream goes through a command: pyvmm exec -i VM -- sh -c 'cat >FILE'"
        raise ConfigError(f"{_shown(local)} {_NEITHER}", cure=cure)
    session.send(FrameType.PUT, path, deadline)
    sender = _Sender(session, progress, deadline)
    try:
        sender.send(local, os.fsencode(_own_name(local)) or b"root", found)
    except OSError as error:
        raise _failed(error, _shown(os.fsdecode(error.filename or local))) from None
    session.send(FrameType.END, b"", deadline)
    session.answer(FrameType.DONE, 0, deadline)
    return sender.copied


def _no_place(path: str, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or str(error)
    return ConfigError(f"{_shown(path)}: {reason}")


def _own_name(path: str) -> str:
    """The name of the file at `path`, also where `path` ends with a dot or two."""
    name = os.path.basename(path.rstrip("/"))
    return name if name not in ("", ".", "..") else os.path.basename(os.path.realpath(path))


def _failed(error: OSError, place: str) -> ConfigError | HostError:
    """The error of whoever is to mend it: a place that cannot be, or a disk."""
    if error.errno in _DISK_TROUBLE:
        return HostError(error.errno or 0, place)
    return ConfigError(f"{place}: {error.strerror}")


class _Sender:
    def __init__(self, session: Session, progress: Progress | None, deadline: float | None) -> None:
        self.copied = Copied()
        self._session = session
        self._progress = progress
        self._deadline = deadline

    def send(self, path: str, name: bytes, found: os.stat_result, depth: int = 0) -> None:
        check(self._deadline)
        for answer in self._session.receive():  # the agent speaks only to refuse
            raise failure(answer) if answer.type == FrameType.FAILED else AgentError(NOT_THE_AGENT)
        entry = Entry(found.st_mode, found.st_mtime_ns, found.st_size, name)
        if stat.S_ISREG(found.st_mode):
            self._send_file(path, entry)
        elif stat.S_ISDIR(found.st_mode):
            self._send_folder(path, entry, depth)
        elif stat.S_ISLNK(found.st_mode):
            linked = entry._replace(target=os.fsencode(os.readlink(path)))
            self._send(entry_frame(FrameType.LINK, linked))
        else:
            self.copied.skip(path)

    def _send(self, data: bytes) -> None:
        self._session.send_bytes(data, self._deadline)

    def _send_file(self, path: str, entry: Entry) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            self._send(entry_frame(FrameType.REGULAR, entry))
            while data := os.read(fd, MAX_DATA):
                self._send(frame(FrameType.DATA, data))
                self.copied.bytes += len(data)
                if self._progress is not None:
                    self._progress(self.copied.bytes)
        finally:
            os.close(fd)
        self._send(frame(FrameType.UP))
        self.copied.files += 1

    def _send_folder(self, path: str, entry: Entry, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise ConfigError(f"{_shown(path)}: directories are nested deeper than {MAX_DEPTH}")
        self._send(entry_frame(FrameType.DIRECTORY, entry))
        for name in sorted(os.listdir(path)):
            inner = os.path.join(path, name)
            with suppress(FileNotFoundError):  # it has just gone
                found = os.lstat(inner)
                self.send(inner, os.fsencode(name), found, depth + 1)
        self._send(frame(FrameType.UP))


def pull(
    session: Session,
    remote: str,
    local: str,
    progress: Progress | None,
    deadline: float | None = None,
) -> Copied:
    """Ask for `remote` and write it to `local`. Raises ConfigError for `local`, HostError,
    AgentError, CommandTimeout at `deadline`."""
    path = _path(remote)
    receiver = _Receiver(local, name_of(remote), progress)
    try:
        session.send(FrameType.GET, path, deadline)
        ended = False
        while not ended:
            check(deadline)
            for one in session.wait_for_frames(deadline):
                ended = receiver.take(one)
                if ended:
                    break
    except OSError as error:
        raise _failed(error, receiver.place) from None
    finally:
        receiver.close()
    if not receiver.topped:
        raise AgentError(f"in the guest: {_shown(remote)} {_NEITHER}")
    return receiver.copied


def name_of(remote: str) -> str:
    """The name in a directory for the copy of the guest's `remote`: the last name of that path,
    as it is written. The guest has no say in it. Without a name, as "/" and "..", it is "root".
    """
    return posixpath.basename(posixpath.normpath("/" + remote.lstrip("/"))) or _ROOT


@dataclass
class _Level:
    fd: int
    path: str  # printable
    entry: Entry | None = None  # of a directory that is new: it gets the mode and time of that


class _Receiver:
    """Writes a tree that comes frame by frame."""

    def __init__(self, local: str, name: str, progress: Progress | None) -> None:
        """It goes to `local`, as `name` if that is a directory. Raises ConfigError if `local` is
        nowhere."""
        self.copied = Copied()
        self.place = _shown(local)  # what is being written, for messages
        self._progress = progress
        self._file = -1
        self._entry: Entry | None = None  # the file's
        self._part = ""
        self._mask = umask() | _SPECIAL_BITS
        self.topped = False
        folder, self._top = local, name
        _path(local)
        if not os.path.isdir(local):
            if local.endswith("/"):
                raise ConfigError(f"{_shown(local)} is not a directory")
            folder, self._top = os.path.split(local)
        try:
            there = os.path.exists(local) and not os.path.isdir(local)
            if there and not os.path.isfile(local):
                raise ConfigError(f"{_shown(local)} {_NEITHER}", cure="name another place")
            self._levels = [_Level(os.open(folder or ".", _FOLDER), _shown(folder))]
        except (OSError, ValueError) as error:
            raise _no_place(folder, error) from None

    def take(self, one: Frame) -> bool:
        """Do what the frame says; whether it was the last. Raises AgentError, OSError."""
        type, payload = one
        if type == FrameType.FAILED:
            raise failure(one)
        if type == FrameType.SKIPPED:
            entry = parse_entry(payload)
            self.copied.skip(printable(entry.name) if entry else "?")
        elif self._file >= 0 and type == FrameType.DATA:
            self._write(payload)
        elif self._file >= 0 and type == FrameType.UP:
            self._finish_file()
        elif self._file < 0 and type == FrameType.UP and len(self._levels) > 1:
            self._leave()
        elif self._file < 0 and type == FrameType.END and len(self._levels) == 1:
            return True
        elif self._file < 0 and (len(self._levels) > 1 or not self.topped):
            self._begin(type, payload)
        else:
            raise AgentError(NOT_THE_AGENT)
        return False

    def _begin(self, type: int, payload: bytes) -> None:
        entry = parse_entry(payload)
        if entry is None or (entry.target and type != FrameType.LINK):
            raise AgentError("the guest's agent sent an invalid name")
        name = os.fsdecode(entry.name)
        if len(self._levels) == 1:
            self.topped = True
            name = self._top
            if type == FrameType.LINK:  # what the user has named is followed, in the guest
                raise AgentError(NOT_THE_AGENT)
        self.place = os.path.join(self._levels[-1].path, printable(os.fsencode(name)))
        parent = self._levels[-1].fd
        self._check_free(name, parent)
        if type == FrameType.DIRECTORY and len(self._levels) <= MAX_DEPTH:
            new: Entry | None = entry
            try:
                os.mkdir(name, 0o700, dir_fd=parent)
            except FileExistsError:
                new = None
            fd = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)
            self._levels.append(_Level(fd, self.place, new))
        elif type == FrameType.REGULAR:
            self._part = _part_name()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.open(self._part, flags, 0o600, dir_fd=parent)
            self._entry = entry._replace(name=os.fsencode(name))
        elif type == FrameType.LINK and entry.target:
            self._make_link(name, entry, parent)
        else:
            raise AgentError(NOT_THE_AGENT)

    def _check_free(self, name: str, parent: int) -> None:
        """Raise for a device of that name, which is not to be lost; all else is replaced."""
        try:
            mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
            raise ConfigError(f"{self.place} {_NEITHER}", cure="name another place")

    def _make_link(self, name: str, entry: Entry, parent: int) -> None:
        self._part = _part_name()
        os.symlink(os.fsdecode(entry.target), self._part, dir_fd=parent)
        self._put_in_place(name, parent)

    def _put_in_place(self, name: str, parent: int) -> None:
        os.rename(self._part, name, src_dir_fd=parent, dst_dir_fd=parent)
        self._part = ""

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        if data.count(0) == len(data):  # what was a hole becomes one again
            os.lseek(self._file, len(data), os.SEEK_CUR)
            view = view[:0]
        while view:
            view = view[os.write(self._file, view) :]
        self.copied.bytes += len(data)
        if self._progress is not None:
            self._progress(self.copied.bytes)

    def _finish_file(self) -> None:
        assert self._entry is not None
        parent = self._levels[-1].fd
        os.ftruncate(self._file, os.lseek(self._file, 0, os.SEEK_CUR))
        _finish(self._file, self._entry, self._mask)
        self._put_in_place(os.fsdecode(self._entry.name), parent)
        self._close_file()
        self.copied.files += 1

    def _leave(self) -> None:
        level = self._levels.pop()
        try:
            if level.entry is not None:
                _finish(level.fd, level.entry, self._mask)
        finally:
            os.close(level.fd)

    def close(self) -> None:
        """Remove what is not whole, and close everything."""
        if self._part:  # an interrupt may come before its descriptor is known
            with suppress(OSError):
                os.unlink(self._part, dir_fd=self._levels[-1].fd)
        if self._file >= 0:
            self._close_file()
        while self._levels:
            os.close(self._levels.pop().fd)

    def _close_file(self) -> None:
        # An interrupt in between leaves it open, and does not have it closed twice.
        fd, self._file = self._file, -1
        os.close(fd)


def _part_name() -> str:
    """A name for a half copy: unused by others, and unknown to the guest."""
    return f".pyvmm-part.{os.urandom(8).hex()}"


def _finish(fd: int, entry: Entry, mask: int) -> None:
    os.fchmod(fd, entry.mode & ~mask)
    with suppress(OSError, OverflowError):  # a time that this file system cannot have
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
