"""The words of a VM, and how it ended: files beside the control sockets, for `pyvmm logs` and
`pyvmm ps -a`.

    logs/NAME.log, NAME.old     the console and the monitor's messages, the newest last
    logs/NAME.end               how the VM of that name ended last; empty while it runs

All are for their owner only. A log is begun anew when it has `PIECE` bytes, and one old piece is
kept. `MOST_ENDED` VMs that have ended are remembered, for `DAYS` at the most: others are forgotten
when the next one starts. What is in a file may be a guest's who has taken the monitor over, and is
bounded when it is read. A record is a line
``KIND SECONDS LENGTH``, then so many bytes and a newline.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.host import log
from pyvmm.spec.names import SOCKET_SUFFIX

PIECE = 512 << 10  # bytes of a file
MOST_ENDED = 32
DAYS = 7

CONSOLE, MESSAGE = "console", "message"

_LOG, _OLD, _END = ".log", ".old", ".end"
_LOOK_EVERY = 0.1  # seconds
_HEADER_MAX = 64
_READ = 1 << 16
_MOST_TEXT = 4096  # characters of what is told of an end
_MOST_RECORD = 1 << 16  # bytes of it
_TEXTS = ("message", "ending")


class Record(NamedTuple):
    """Something that was said at `time`, in seconds since 1970. `kind` is CONSOLE or MESSAGE."""

    kind: str
    time: float
    data: bytes


class VmLog:
    """The log of the VM called `name`, which runs in this process. Any thread may write; nobody
    waits. If it cannot be written, one line says so, and that is all."""

    def __init__(self, place: str, name: str) -> None:
        """`place` is the directory of the control sockets."""
        self.name = name
        # Where this process no longer can, somebody else does it.
        self.open_by: Callable[[bool], int] = partial(open_log, place, name)
        self._place = place
        self._lock = Lock()
        self._fd = self._end = -1
        self._size = 0
        self._failed = False
        self._rest = b""
        self.last_message = b""
        with suppress(OSError):  # how another of that name has ended
            os.unlink(_path(place, name, _END))

    def keep_open(self) -> None:
        """From now on nothing has to be opened by name until the log is begun anew."""
        self._try(self._open_first)
        with suppress(OSError):  # then nobody remembers how it ended
            self._end = _open_end(self._place, self.name)
        _forget_old(self._place)

    def console(self, data: bytes) -> None:
        """The guest's console has said `data`."""
        self._write(CONSOLE, data)

    def message(self, line: bytes) -> None:
        """The monitor has said `line`."""
        self.last_message = line
        self._write(MESSAGE, line)

    def note(self, text: str) -> None:
        """The monitor says `text` here only, not to whoever has started it."""
        line = log.Line(f"{self.name}: {text}", level=log.INFO)
        self._write(MESSAGE, log.as_written(line).encode(errors="replace"))

    def messages(self, data: bytes) -> None:
        """The monitor has said `data`, lines or parts of them."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_READ:]
        for line in lines:
            self.message(line.rstrip(b"\r"))

    def end(self, exit_code: int | None, **details: object) -> None:
        """The VM has ended so."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd, self._failed = -1, True
            end, self._end = self._end, -1
        if end < 0:
            note_end(self._place, self.name, exit_code, **details)
            return
        with suppress(OSError):
            os.write(end, _end_record(self.name, exit_code, details))
        os.close(end)

    def _write(self, kind: str, data: bytes) -> None:
        header = b"%s %.6f %d\n" % (kind.encode(), time.time(), len(data))
        self._try(partial(self._add, b"%s%s\n" % (header, data)))

    def _try(self, step: Callable[[], None]) -> None:
        with self._lock:
            if self._failed:
                return
            try:
                step()
                return
            except OSError as error:
                self._failed = True
                reason = error.strerror
        log.to_stderr(f"{self.name}: pyvmm logs gets no more of this VM: {reason}")

    def _add(self, record: bytes) -> None:
        if self._fd < 0 or self._size + len(record) > PIECE:
            self._open(rotate=self._fd >= 0)
        os.write(self._fd, record)
        self._size += len(record)

    def _open_first(self) -> None:
        if self._fd < 0:
            self._open(rotate=False)

    def _open(self, *, rotate: bool) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._fd = self.open_by(rotate)
        self._size = os.fstat(self._fd).st_size


def open_log(place: str, name: str, rotate: bool) -> int:
    """The log of the VM `name`, open to be added to. With `rotate`, or if there is enough in it,
    it is begun anew, and what there is becomes the old piece. Raises OSError."""
    path = _path(place, name, _LOG)
    if not rotate:
        with suppress(FileExistsError):
            os.mkdir(_folder(place), 0o700)
        with suppress(FileNotFoundError):
            rotate = os.lstat(path).st_size > PIECE // 2
    if rotate:
        os.replace(path, _path(place, name, _OLD))
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


# --- how VMs ended --------------------------------------------------------------------------------


def note_end(place: str, name: str, exit_code: int | None, **details: object) -> None:
    """Remember how the VM `name` ended; `details` are fit for JSON."""
    record = _end_record(name, exit_code, details)
    with suppress(OSError):  # no room: then nobody remembers
        fd = _open_end(place, name)
        try:
            os.write(fd, record)
        finally:
            os.close(fd)
    _forget_old(place)


def _open_end(place: str, name: str) -> int:
    """Raises OSError."""
    with suppress(FileExistsError):
        os.mkdir(_folder(place), 0o700)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(_path(place, name, _END), flags, 0o600)


def _end_record(name: str, exit_code: int | None, details: Mapping[str, object]) -> bytes:
    import json

    now = round(time.time(), 3)
    bounded = {
        key: value[:_MOST_TEXT] if isinstance(value, str) else value
        for key, value in details.items()
    }
    return json.dumps({"name": name, "exit_code": exit_code, "ended": now, **bounded}).encode()


def note_killed(place: str, name: str) -> None:
    """The monitor of `name` is gone, and may not have said how it ended."""
    if _read_end(_path(place, name, _END)) is None:
        note_end(place, name, None, message="its monitor was killed")


def ended(place: str) -> list[dict[str, Any]]:
    """The ends of VMs, the latest first. Some of the VMs may run again."""
    found = (_read_end(path) for path, _ in _ends(place))
    return [record for record in found if record is not None][:MOST_ENDED]


def _read_end(path: str) -> dict[str, Any] | None:
    """How the VM that has the file `path` ended, if that says so, and nothing else."""
    import json

    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            said = json.loads(os.read(fd, _MOST_RECORD))
        finally:
            os.close(fd)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or type(said.get("exit_code")) not in (int, type(None)):
        return None
    kept = {key: said[key][:_MOST_TEXT] for key in _TEXTS if isinstance(said.get(key), str)}
    when = said.get("ended")
    at = float(when) if isinstance(when, int | float) and 0 <= when < 1 << 40 else 0.0
    return {"name": _name_of(path), "exit_code": said["exit_code"], "ended": at, **kept}


def remove(place: str, name: str) -> bool:
    """Forget what the VM `name`, which does not run, has said; whether there was something."""
    there = False
    for suffix in (_LOG, _OLD, _END):
        with suppress(OSError):
            os.unlink(_path(place, name, suffix))
            there = True
    return there


def _ends(place: str) -> list[tuple[str, float]]:
    """Path and time of each end that is remembered, the latest first."""
    found = []
    with suppress(OSError):
        for entry in os.scandir(_folder(place)):
            if entry.name.endswith(_END):
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    socket = os.path.join(place, _name_of(entry.path) + SOCKET_SUFFIX)
                    if status.st_size:
                        found.append((entry.path, status.st_mtime))
                    elif not os.path.exists(socket):
                        os.unlink(entry.path)  # it was never begun, or has been forgotten
    return sorted(found, key=lambda one: one[1], reverse=True)


def _forget_old(place: str) -> None:
    oldest = time.time() - DAYS * 86400
    for index, (path, at) in enumerate(_ends(place)):
        if index >= MOST_ENDED or at < oldest:
            remove(place, _name_of(path))


def _name_of(path: str) -> str:
    return os.path.basename(path).removesuffix(_END)


def _folder(place: str) -> str:
    return os.path.join(place, "logs")


def _path(place: str, name: str, suffix: str) -> str:
    return os.path.join(_folder(place), name + suffix)


# --- reading --------------------------------------------------------------------------------------


def read(place: str, name: str, process: int | None = None) -> Iterator[Record]:
    """The lines that the VM `name` has said, the oldest first. With `process`, a pidfd of its
    monitor, it goes on until that has ended.

    Raises ConfigError if nothing is known of it.
    """
    path = _path(place, name, _LOG)
    current = _open_or_none(path)
    older = _open_or_none(_path(place, name, _OLD))
    if current is None and older is None and process is None:
        raise ConfigError(
            f"nothing is known of a VM called {name!r}", cure="pyvmm ps -a lists those that are"
        )
    if older is not None:
        # It may have become the old one between the two looks.
        if current is None or not os.path.samestat(os.fstat(older), os.fstat(current)):
            yield from _Reader(older).records()
        os.close(older)
    poll = select.poll()
    if process is not None:
        poll.register(process, select.POLLIN)
    reader = None if current is None else _Reader(current)
    while True:
        running = process is not None and not poll.poll(0)
        if reader is not None:
            yield from reader.records()
            if _has_moved(reader.fd, path):
                yield from reader.records()  # what came just before
                os.close(reader.fd)
                reader = None
        if reader is None:
            fd = _open_or_none(path)
            reader = None if fd is None else _Reader(fd)
            if reader is not None:
                continue
        if not running:
            break
        poll.poll(_LOOK_EVERY * 1000)
    if reader is not None:
        os.close(reader.fd)


def _open_or_none(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None


def _has_moved(fd: int, path: str) -> bool:
    try:
        return not os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False  # It was removed: there is no other.


class _Reader:
    """Takes records out of a file that may grow."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._data = b""

    def records(self) -> Iterator[Record]:
        """Those that are whole by now."""
        while True:
            while (record := self._next()) is not None:
                yield record
            more = os.read(self.fd, _READ)
            if not more:
                return
            self._data += more

    def _next(self) -> Record | None:
        header, newline, rest = self._data.partition(b"\n")
        if not newline:
            if len(self._data) > _HEADER_MAX:
                self._data = b""  # not a log of ours
            return None
        try:
            kind, at, length = header.split(b" ")
            size, when = int(length), float(at)
        except ValueError:
            self._data = rest  # a disk was full in the middle of a record
            return self._next() if rest else None
        if size < 0 or size > PIECE:
            self._data = rest
            return None
        if len(rest) <= size:
            return None
        self._data = rest[size + 1 :]
        return Record(kind.decode(errors="replace"), when, rest[:size])
