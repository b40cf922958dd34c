"""Unix stream sockets, without Python's `socket` module: it would cost every start 5 ms.

All sockets here are non-blocking and closed by exec(2). Failures are HostError.
"""

from __future__ import annotations

import _socket
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pyvmm.errors import HostError

Socket = _socket.socket
SHUT_WR = _socket.SHUT_WR

_LONGEST_PATH = 107  # struct sockaddr_un of <linux/un.h>: 108 bytes with a NUL
_UCRED = struct.Struct("iII")  # struct ucred of unix(7)
_FD = struct.Struct("=i")


class Peer(NamedTuple):
    """The process at the other end, as the kernel knows it (unix(7), SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


def listen(path: str, backlog: int = 128) -> Socket:
    """A socket that listens at `path`, which is made; access for its owner only. Raises
    HostError, EADDRINUSE if there is something at `path`."""
    made = _new()
    try:
        # The file gets the socket's own mode, less the umask (unix(7), net/unix/af_unix.c): so at
        # no moment can others connect, and other threads' files have nothing to do with it.
        os.fchmod(made.fileno(), 0o600)
        with _short(path) as name:
            made.bind(name)
        made.listen(backlog)
    except OSError as error:
        made.close()
        raise _failed(error, f"listen at {path}") from None
    return made


def accept(listener: Socket) -> Socket | None:
    """The next connection that waits, or None. Raises HostError, EMFILE for one."""
    try:
        fd, _ = listener._accept()  # type: ignore[attr-defined]  # socket.socket.accept's too
    except (BlockingIOError, InterruptedError, ConnectionAbortedError):
        return None
    except OSError as error:
        raise _failed(error, "accept") from None
    return adopt(fd)


def connect(path: str) -> Socket:
    """A connection to whoever listens at `path`; it never waits.

    Raises HostError: ENOENT, ECONNREFUSED for a socket without a listener, EAGAIN for a listener
    with as many waiting as it wants.
    """
    return _connect(path)


def connect_here(path: str) -> Socket:
    """The same, whatever `connect_by` was told."""
    made = _new()
    try:
        with _short(path) as name:
            made.connect(name)
    except OSError as error:
        made.close()
        raise _failed(error, f"connect to {path}") from None
    return made


def pair() -> tuple[Socket, Socket]:
    """Two sockets connected to each other. Raises HostError."""
    try:
        one, other = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    except OSError as error:
        raise _failed(error, "socketpair") from None
    one.setblocking(False)
    other.setblocking(False)
    return one, other


def adopt(fd: int) -> Socket:
    """The socket with descriptor `fd`, which it owns from now on."""
    found = _socket.socket(fileno=fd)
    found.setblocking(False)
    return found


def peer(connection: Socket) -> Peer:
    """The process at the other end of `connection`. Raises HostError."""
    try:
        raw = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _UCRED.size)
    except OSError as error:
        raise _failed(error, "SO_PEERCRED") from None
    return Peer(*_UCRED.unpack(raw))


def room_for(descriptors: int) -> int:
    """How many bytes of ancillary data so many `descriptors` take, for recvmsg."""
    return _socket.CMSG_SPACE(descriptors * _FD.size)


def descriptors_in(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a message (unix(7), SCM_RIGHTS), which are the caller's."""
    found: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
            whole = len(content) - len(content) % _FD.size  # where the kernel had to cut it
            found += (fd for (fd,) in _FD.iter_unpack(content[:whole]))
    return found


def is_ours(connection: Socket) -> bool:
    """True if the other end belongs to the user that we run as, or ran as first."""
    return peer(connection).uid == (os.geteuid() if _owner is None else _owner)


_owner: int | None = None


def belong_to(uid: int) -> None:
    """Take others for ours if they are the user `uid`, whatever user we become."""
    global _owner
    _owner = uid


# In an emulated host the machine's sockets are out of reach for connect(2): the relay sets this.
_route: Callable[[str], Socket] | None = None


def set_route(route: Callable[[str], Socket] | None) -> None:
    """Have `reach` ask `route` from now on; None undoes it."""
    global _route
    _route = route


_connect: Callable[[str], Socket] = connect_here


def connect_by(other: Callable[[str], Socket]) -> None:
    """From now on `connect` asks `other`, which can where this process no longer can."""
    global _connect
    _connect = other


def is_routed() -> bool:
    """True if `reach` goes to another machine than `connect`."""
    return _route is not None


def reach(path: str) -> Socket:
    """A connection to whoever listens at `path` on the user's machine, from wherever we run.

    Raises HostError like `connect`. In an emulated host, where it may wait for the other side for
    some milliseconds, only paths are reached that were announced at its start
    (EmulatedHostSpec.sockets_out); others are ECONNREFUSED.
    """
    return connect(path) if _route is None else _route(path)


def _new() -> Socket:
    try:
        made = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    except OSError as error:
        raise _failed(error, "socket") from None
    made.setblocking(False)
    return made


@contextmanager
def _short(path: str) -> Iterator[str]:
    """A name for `path` that fits into a socket address, however long the path is."""
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        yield path
        return
    folder, name = os.path.split(path)
    fd = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def _failed(error: OSError, call: str) -> HostError:
    # Python's own complaints (a path that is too long, with a NUL) have no number.
    import errno

    return HostError(error.errno or errno.ENAMETOOLONG, call)
