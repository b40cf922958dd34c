"""Messages on a vhost-user connection: framing, and who owns the file descriptors.

Both ends use it: a back end for the front end's requests and a front end for its own, and each of
them for those that a back end makes (`VHOST_USER_PROTOCOL_F_BACKEND_REQ`).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from types import TracebackType

from pyvmm.host import descriptor_passing
from pyvmm.vhost_user.protocol import (
    HEADER,
    MAX_FDS,
    MAX_PAYLOAD,
    NEED_REPLY,
    REPLY,
    VERSION,
    VERSION_MASK,
    FrontEndError,
    PeerError,
)


class Message:
    """One request or reply with the file descriptors that came along; a ``with`` block closes those
    that nobody took."""

    __slots__ = ("_fds", "flags", "payload", "request")

    def __init__(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        self.request = request
        self.flags = flags
        self.payload = payload
        self._fds = fds

    @property
    def fds(self) -> tuple[int, ...]:
        """The file descriptors, which stay the message's."""
        return tuple(self._fds)

    @property
    def needs_reply(self) -> bool:
        """True if its sender wants to know how it went, if REPLY_ACK was negotiated."""
        return bool(self.flags & NEED_REPLY)

    def take_fd(self) -> int:
        """The first file descriptor, which is the caller's from now on."""
        return self._fds.pop(0)

    def __enter__(self) -> Message:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _close(self._fds)


class Channel:
    """Our end of a connection. `fault` is the error for what the other end does wrong."""

    def __init__(self, connection: socket.socket, fault: type[PeerError] = FrontEndError) -> None:
        self._connection = connection
        self._fault = fault

    def receive(self, *, replies: bool = False, until: float | None = None) -> Message | None:
        """The next request, or with `replies` the next reply; None once the other end has closed
        the connection between two.

        Raises a `fault` for what is not such a message, after which nothing more can be understood;
        HostError, ETIMEDOUT if it has not come by the time `until` of time.monotonic.
        """
        fds: list[int] = []
        try:
            return self._receive(fds, REPLY if replies else 0, until)
        except descriptor_passing.TooManyFds:
            _close(fds)
            raise self._fault(f"a message with more than {MAX_FDS} file descriptors") from None
        except BaseException:
            _close(fds)
            raise

    def _receive(self, fds: list[int], kind: int, until: float | None) -> Message | None:
        connection, most = self._connection, MAX_FDS
        header = descriptor_passing.receive(connection, HEADER.size, fds, most, until=until)
        if not header:
            return None
        if len(header) < HEADER.size:
            raise self._fault(f"a message that ends after {len(header)} bytes")
        request, flags, size = HEADER.unpack(header)
        what = f"{'reply to ' if kind else ''}request {request}"
        if flags & VERSION_MASK != VERSION or flags & REPLY != kind:
            raise self._fault(f"{what} with flags {flags:#x}")
        if size > MAX_PAYLOAD:
            raise self._fault(f"{what} with a payload of {size} bytes")
        payload = descriptor_passing.receive(connection, size, fds, most, until=until)
        if len(payload) < size:
            raise self._fault(f"{what} that ends after {len(payload)} of {size} bytes")
        return Message(request, flags, payload, fds)

    def reply(self, request: int, payload: bytes, fds: Sequence[int] = ()) -> bool:
        """Answer `request`; False if the other end has gone. Raises HostError."""
        return self._send(request, VERSION | REPLY, payload, fds)

    def send(
        self, request: int, payload: bytes, fds: Sequence[int] = (), *, acknowledged: bool = False
    ) -> bool:
        """Make a request, that its success be `acknowledged`; False if the other end has gone.
        Raises HostError."""
        flags = VERSION | NEED_REPLY if acknowledged else VERSION
        return self._send(request, flags, payload, fds)

    def _send(self, request: int, flags: int, payload: bytes, fds: Sequence[int]) -> bool:
        header = HEADER.pack(request, flags, len(payload))
        return descriptor_passing.send(self._connection, header + payload, fds)


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
