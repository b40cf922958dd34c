"""One stream between a port of the guest and a Unix socket of the host.

It knows its two ends, how much each may still send, and who has said to be done. It knows neither
rings nor the other streams.
"""

from __future__ import annotations

import _socket
import os
from enum import Enum

from pyvmm.errors import DriverError
from pyvmm.host.unix_sockets import Socket
from pyvmm.virtio.vsock.packet import Header
from pyvmm.virtio.vsock.uapi import (
    SHUTDOWN_BOTH,
    VIRTIO_VSOCK_SHUTDOWN_RCV,
    VIRTIO_VSOCK_SHUTDOWN_SEND,
)

# What the guest may have sent us that the host's socket has not taken yet (buf_alloc). Each stream
# may cost the host as much memory as this.
BUF_ALLOC = 256 << 10
# The guest hears of room in our buffer when so much has come free since it last heard.
_UPDATE_AFTER = BUF_ALLOC // 4
_U32 = 0xFFFF_FFFF


class State(Enum):
    """The states of a stream's life (5.10.6.5 Stream Sockets)."""

    REQUESTED = "the guest has not answered our REQUEST yet"
    CONNECTED = "both ends know each other"
    ENDING = "we have sent SHUTDOWN for both directions and wait for RST"
    LINGERING = "the guest is done; what it sent goes out to the host yet"
    CLOSED = "the socket is closed"


class Stream:
    """`host_port` and `guest_port` are the ports; `sock` is the host's end, non-blocking.

    `readable` and `writable` say whether `sock` may have or take something: they are set by events,
    which come once, and cleared when an attempt fails.
    """

    __slots__ = (
        "_asked_for_credit",
        "_fd",
        "_fwd_cnt",
        "_fwd_cnt_told",
        "_peer_buf_alloc",
        "_peer_fwd_cnt",
        "_tx_cnt",
        "buffer",
        "deadline",
        "fills_buffers",
        "guest_done",
        "guest_port",
        "host_done",
        "host_port",
        "hung_up",
        "opening",
        "queued",
        "readable",
        "sock",
        "state",
        "told_done",
        "writable",
    )

    def __init__(self, sock: Socket, host_port: int, guest_port: int, state: State) -> None:
        self.sock = sock
        self._fd = sock.fileno()
        self.host_port = host_port
        self.guest_port = guest_port
        self.state = state
        self.opening = True  # our REQUEST or RESPONSE has yet to go out
        self.queued = False  # in the list of those that may have something for the guest
        self.readable = self.writable = True
        self.fills_buffers = False  # the last data for the guest was as much as there was room for
        self.hung_up = False
        self.buffer = bytearray()  # from the guest, for the host; at most BUF_ALLOC
        self.guest_done = 0  # the flags of all SHUTDOWNs from the guest; they are permanent
        self.host_done = 0  # those that the guest should hear
        self.told_done = 0  # those that it has heard
        self.deadline = 0.0  # by when the guest must have answered
        self._peer_buf_alloc = 0
        self._peer_fwd_cnt = 0
        self._tx_cnt = 0  # bytes sent to the guest, modulo 2^32 like all of these
        self._fwd_cnt = 0  # bytes from the guest that are out of our hands
        self._fwd_cnt_told = 0
        self._asked_for_credit = False

    # --- 5.10.6.3 Buffer Space Management --------------------------------------------------------

    def hear_credit(self, header: Header) -> None:
        """Take the guest's word for its buffer: any numbers; only this stream depends on them."""
        self._peer_buf_alloc = header.buf_alloc
        self._peer_fwd_cnt = header.fwd_cnt
        self._asked_for_credit = False

    @property
    def credit(self) -> int:
        """The number of bytes that the guest has room for."""
        in_flight = (self._tx_cnt - self._peer_fwd_cnt) & _U32
        return max(0, self._peer_buf_alloc - in_flight)

    def take_credit_request(self) -> bool:
        """True if the guest is to be asked for its credit: once, until it has spoken."""
        asked, self._asked_for_credit = self._asked_for_credit, True
        return not asked

    @property
    def owes_update(self) -> bool:
        """True if the guest should hear that there is room again."""
        return (self._fwd_cnt - self._fwd_cnt_told) & _U32 >= _UPDATE_AFTER

    def force_update(self) -> None:
        """The guest has asked for our credit: let `owes_update` hold."""
        self._fwd_cnt_told = (self._fwd_cnt - _UPDATE_AFTER) & _U32

    def credit_fields(self) -> tuple[int, int]:
        """(buf_alloc, fwd_cnt) for a packet that goes out now: the guest will know them."""
        self._fwd_cnt_told = self._fwd_cnt
        return BUF_ALLOC, self._fwd_cnt

    def sent(self, size: int) -> None:
        """`size` bytes of payload went to the guest."""
        self._tx_cnt = (self._tx_cnt + size) & _U32

    # --- from the guest to the host --------------------------------------------------------------

    def take(self, views: list[memoryview], size: int) -> None:
        """Pass `size` bytes of the guest's on to the host, or keep them until it takes them.

        Raises DriverError if the guest had no credit for them.
        """
        if size > BUF_ALLOC - len(self.buffer):
            raise DriverError(
                f"{size} bytes where there is room for {BUF_ALLOC - len(self.buffer)}",
                section="5.10.6.3.1 Driver Requirements: Buffer Space Management",
            )
        done = 0
        if self.writable and not self.buffer and size:
            done = self._send(views)
        if done < size and self.host_done & VIRTIO_VSOCK_SHUTDOWN_RCV:
            self._forward(size - done)  # it goes nowhere
        elif done < size:
            for view in views:
                self.buffer += view[done:]
                done -= min(done, len(view))

    def flush(self) -> None:
        """Write what is kept, as far as the host takes it, and pass on that the guest is done."""
        while self.buffer and self.writable:
            with memoryview(self.buffer) as view:  # a buffer that is looked at cannot shrink
                count = self._send([view])
            if self.host_done & VIRTIO_VSOCK_SHUTDOWN_RCV:
                self._forward(len(self.buffer))
                count = len(self.buffer)
            del self.buffer[:count]
        if not self.buffer and self.guest_done & VIRTIO_VSOCK_SHUTDOWN_SEND:
            self._shut(_socket.SHUT_WR)

    def hear_shutdown(self, flags: int) -> None:
        """The guest will receive or send no more."""
        self.guest_done |= flags & SHUTDOWN_BOTH
        if self.guest_done & VIRTIO_VSOCK_SHUTDOWN_RCV:
            self._shut(_socket.SHUT_RD)
        self.flush()

    def answer(self, data: bytes) -> None:
        """Tell the client on the host a few bytes before anything from the guest."""
        self._send([memoryview(data)])
        self._fwd_cnt = 0  # they were not the guest's

    def _send(self, views: list[memoryview]) -> int:
        try:
            count = self.sock.sendmsg(views, (), _socket.MSG_NOSIGNAL)
        except BlockingIOError:
            self.writable = False
            return 0
        except OSError:  # EPIPE, ECONNRESET: nobody there will read any more
            self.host_done |= VIRTIO_VSOCK_SHUTDOWN_RCV
            return 0
        self._forward(count)
        return count

    def _forward(self, count: int) -> None:
        self._fwd_cnt = (self._fwd_cnt + count) & _U32

    def _shut(self, how: int) -> None:
        try:
            self.sock.shutdown(how)
        except OSError:  # ENOTCONN: the other end is gone, which its events tell
            return

    # --- from the host to the guest --------------------------------------------------------------

    def receive(self, views: list[memoryview]) -> int:
        """Read what the host has sent into `views`; how much, 0 if there is nothing now.

        At the end of it the guest is owed a SHUTDOWN (`host_done`).
        """
        try:
            count = os.readv(self._fd, views)
        except BlockingIOError:
            self.readable = False
            return 0
        except OSError:  # ECONNRESET: it closed without reading all we had for it
            count = 0
            self.hung_up = True
        if not count:
            self._end()
        return count

    def has_data(self) -> bool:
        """True if the host has sent something that was not read; notes the end like `receive`."""
        try:
            if self.sock.recv(1, _socket.MSG_PEEK):
                return True
        except BlockingIOError:
            self.readable = False
            return False
        except OSError:
            self.hung_up = True
        self._end()
        return False

    def _end(self) -> None:
        self.readable = False
        self.host_done |= SHUTDOWN_BOTH if self.hung_up else VIRTIO_VSOCK_SHUTDOWN_SEND

    def note_hang_up(self) -> None:
        """Both directions have ended on the host's side."""
        self.hung_up = True
        if self.host_done & VIRTIO_VSOCK_SHUTDOWN_SEND:
            self.host_done = SHUTDOWN_BOTH

    def close(self) -> None:
        """Close the host's end; what is kept is lost."""
        self.state = State.CLOSED
        self._fd = -1
        self.sock.close()
