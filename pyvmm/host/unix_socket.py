"""Unix stream sockets: listening at a path, and reading bytes that come with file descriptors."""

from __future__ import annotations

import array
import errno
import os
import socket
import stat
import struct
from collections.abc import Sequence

from pyvmm.errors import ConfigError, HostError


class TooManyFds(Exception):
    """More file descriptors came with the bytes than were asked for; the kernel closed the rest."""


def listen(path: str, *, option: str = "") -> socket.socket:
    """A listening socket at `path`, in place of one that nobody listens at any more.

    Raises ConfigError, about `option`, where it cannot be had.
    """
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            _remove_if_dead(path, option)
        else:
            raise ConfigError(
                f"{path} is there and is no socket", cure="name another", option=option
            )
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _cannot_listen(path, error, option) from None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise _cannot_listen(path, error, option) from None
    return listener


def _remove_if_dead(path: str, option: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # its backlog is full
            pass
    raise ConfigError(
        f"somebody listens at {path} already", cure="stop it or name another path", option=option
    )


def _cannot_listen(path: str, error: OSError, option: str) -> ConfigError:
    # Python has its own word for a path longer than a struct sockaddr_un holds, without a number.
    reason = os.strerror(error.errno) if error.errno else str(error)
    return ConfigError(
        f"cannot listen at {path}: {reason}", cure="name another path", option=option
    )


def peer_pid(connection: socket.socket) -> int:
    """The process that connected; 0 where the kernel does not say."""
    size = struct.calcsize("3i")  # struct ucred: pid, uid, gid
    try:
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    except OSError:
        return 0
    pid: int = struct.unpack("3i", data)[0]
    return pid


def receive(connection: socket.socket, size: int, fds: list[int], max_fds: int) -> bytes:
    """`size` bytes, or fewer where the peer closes the connection first.

    File descriptors that come along are appended to `fds`, which then owns them, `max_fds` in all
    at the most. Raises TooManyFds, HostError.
    """
    room = socket.CMSG_SPACE(max_fds * array.array("i").itemsize)
    data = b""
    while len(data) < size:
        try:
            part, ancillary, flags, _ = connection.recvmsg(
                size - len(data), room, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            if error.errno in (errno.ECONNRESET, errno.EPIPE):
                return data
            raise HostError(error.errno or 0, "recvmsg") from None
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                came = array.array("i")
                came.frombytes(content[: len(content) - len(content) % came.itemsize])
                fds += came
        if flags & socket.MSG_CTRUNC or len(fds) > max_fds:
            raise TooManyFds
        if not part:
            return data
        data += part
    return data


def send(connection: socket.socket, data: bytes, fds: Sequence[int] = ()) -> bool:
    """Send all of `data`, with `fds`; False if the peer has gone. Raises HostError."""
    try:
        if fds:
            sent = socket.send_fds(connection, [data], list(fds))
            data = data[sent:]
        connection.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        return False
    except OSError as error:
        raise HostError(error.errno or 0, "sendmsg") from None
    return True
