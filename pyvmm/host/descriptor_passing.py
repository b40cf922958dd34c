"""Bytes on a Unix stream socket that come and go with file descriptors (unix(7), SCM_RIGHTS)."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Sequence

from pyvmm.errors import HostError
from pyvmm.host import unix_sockets


class TooManyFds(Exception):
    """More file descriptors came with the bytes than were asked for; the kernel closed the rest."""


def receive(
    connection: socket.socket,
    size: int,
    fds: list[int],
    max_fds: int,
    *,
    until: float | None = None,
) -> bytes:
    """`size` bytes, or fewer where the peer closes the connection first.

    File descriptors that come along are appended to `fds`, which then owns them, `max_fds` in all
    at the most. Raises TooManyFds, HostError: ETIMEDOUT if the bytes are not there at the time
    `until` of time.monotonic, to which the socket's timeout is changed.
    """
    room = unix_sockets.room_for(max_fds)
    data = b""
    while len(data) < size:
        try:
            if until is not None:
                # Not 0, which would be not to wait at all, for another error.
                connection.settimeout(max(until - time.monotonic(), 0.001))
            part, ancillary, flags, _ = connection.recvmsg(
                size - len(data), room, socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            raise HostError(errno.ETIMEDOUT, "recvmsg") from None
        except OSError as error:
            if error.errno in (errno.ECONNRESET, errno.EPIPE):
                return data
            raise HostError(error.errno or 0, "recvmsg") from None
        fds += unix_sockets.descriptors_in(ancillary)
        if flags & socket.MSG_CTRUNC or len(fds) > max_fds:
            raise TooManyFds
        if not part:
            return data
        data += part
    return data


def send(connection: socket.socket, data: bytes, fds: Sequence[int] = ()) -> bool:
    """Send all of `data`, with `fds`; False if the peer has gone. Raises HostError: ETIMEDOUT if
    the socket has a timeout and the peer does not read."""
    try:
        if fds:
            sent = socket.send_fds(connection, [data], list(fds))
            data = data[sent:]
        connection.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        return False
    except TimeoutError:
        raise HostError(errno.ETIMEDOUT, "sendmsg") from None
    except OSError as error:
        raise HostError(error.errno or 0, "sendmsg") from None
    return True
