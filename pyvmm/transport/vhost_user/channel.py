"""Messages on a vhost-user connection: framing, and who owns the file descriptors."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from types import TracebackType

from pyvmm.host import descriptor_passing
from pyvmm.transport.vhost_user.protocol import (
    HEADER,
    MAX_FDS,
    MAX_PAYLOAD,
    NEED_REPLY,
    REPLY,
    VERSION,
    VERSION_MASK,
    FrontEndError,
)


class Message:
    """One request with the file descriptors that came along; a ``with`` block closes those that
    nobody took."""

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
        """Whether the front end wants to know how it went, if REPLY_ACK was negotiated."""
        return bool(self.flags & NEED_REPLY)

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
    """The back end's end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def receive(self) -> Message | None:
        """The next request; None once the front end has closed the connection between two.

        Raises FrontEndError for what is no message, after which nothing more can be understood;
        HostError.
        """
        fds: list[int] = []
        try:
            return self._receive(fds)
        except descriptor_passing.TooManyFds:
            _close(fds)
            raise FrontEndError(f"a message with more than {MAX_FDS} file descriptors") from None
        except BaseException:
            _close(fds)
            raise

    def _receive(self, fds: list[int]) -> Message | None:
        header = descriptor_passing.receive(self._connection, HEADER.size, fds, MAX_FDS)
        if not header:
            return None
        if len(header) < HEADER.size:
            raise FrontEndError(f"a message that ends after {len(header)} bytes")
        request, flags, size = HEADER.unpack(header)
        if flags & VERSION_MASK != VERSION or flags & REPLY:
            raise FrontEndError(f"request {request} with flags {flags:#x}")
        if size > MAX_PAYLOAD:
            raise FrontEndError(f"request {request} with a payload of {size} bytes")
        payload = descriptor_passing.receive(self._connection, size, fds, MAX_FDS)
        if len(payload) < size:
            raise FrontEndError(f"request {request} that ends after {len(payload)} of {size} bytes")
        return Message(request, flags, payload, fds)

    def reply(self, request: int, payload: bytes, fds: Sequence[int] = ()) -> bool:
        """Answer `request`; False if the front end has gone. Raises HostError."""
        header = HEADER.pack(request, VERSION | REPLY, len(payload))
        return descriptor_passing.send(self._connection, header + payload, fds)


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
