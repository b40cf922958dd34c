"""Frames over a byte stream, each after its length in 4 bytes, most significant first.

passt(1) and QEMU's ``-netdev stream`` speak that. There is no header for offloads, so whoever sends
a frame has finished its checksums.

passt (of 2023) loses its place in the stream where a frame reaches it in more than two pieces, or
its length alone. A Unix socket makes pieces of at least 32 KiB, and so do we, therefore.
"""

from __future__ import annotations

import errno
import os
import select
from struct import Struct

from pyvmm.errors import HostError
from pyvmm.host.files import IOV_MAX
from pyvmm.host.poller import Source
from pyvmm.virtio.net.backend import LinkLost
from pyvmm.virtio.net.header import HEADER_SIZE, LARGEST_FRAME, PLAIN

LENGTH = Struct(">I")
LARGEST = 65535  # ETH_MAX_MTU, what passt takes; it sends longer ones (a UDP datagram and headers)
# Nobody means so much as one frame: what was read as a length is not one, and the place where
# the next one begins cannot be known.
NO_LENGTH = 1 << 20
# The most that a virtio-serial port takes at once (Linux, drivers/char/virtio_console.c)
PORT_WRITE = 32 << 10
LARGEST_THROUGH_PORT = PORT_WRITE - LENGTH.size
# Read at once: as much as a socket holds; whole frames beside it cost no further system call.
_CHUNK = 256 << 10


class StreamChannel:
    """One stream; see `Channel`. `fd` is a connected socket or a virtio-serial port, not blocking;
    frames longer than `largest` bytes are not sent."""

    def __init__(self, fd: int, largest: int) -> None:
        self._fd = fd
        self.readable = Source(fd)
        self.writable = Source(fd, select.EPOLLOUT, on_demand=True)
        self._in = memoryview(bytearray(_CHUNK))
        self._start = self._end = 0  # of what was read and not yet handed on
        self._skipping = self._to_skip = 0  # a frame that is too long, and what is left of it
        self._largest = largest
        # A port makes a transfer of each piece that it is given.
        self._join = largest <= LARGEST_THROUGH_PORT
        self._out = memoryview(b"")  # the rest of a frame that was sent in part
        self.unsent = False

    # --- receiving -------------------------------------------------------------------------------

    def receive(self, views: list[memoryview]) -> int:
        """See Channel."""
        while True:
            have = self._end - self._start
            if self._to_skip:
                gone = min(have, self._to_skip)
                self._start += gone
                self._to_skip -= gone
                if not self._to_skip:
                    return HEADER_SIZE + self._skipping
            elif have >= LENGTH.size:
                [length] = LENGTH.unpack_from(self._in, self._start)
                start = self._start + LENGTH.size
                if length > LARGEST_FRAME:
                    if length > NO_LENGTH:
                        raise LinkLost(f"a frame of {length} bytes came, which cannot be")
                    self._start = start
                    self._skipping = self._to_skip = length
                    continue
                if have >= LENGTH.size + length:
                    self._start = start + length
                    return _scatter(views, self._in[start : start + length])
            if not self._read_more():
                return 0

    def _read_more(self) -> bool:
        if self._start:
            have = self._end - self._start
            self._in[:have] = self._in[self._start : self._end]
            self._start, self._end = 0, have
        try:
            count = os.readv(self._fd, [self._in[self._end :]])
        except BlockingIOError:
            return False
        except OSError as error:
            raise LinkLost(f"the stream of frames broke: {error.strerror}") from None
        if not count:
            raise LinkLost("the other end of the cable has gone")
        self._end += count
        return True

    # --- sending ---------------------------------------------------------------------------------

    def send(self, header: bytes, frame: list[memoryview], length: int) -> bool:
        """See Channel. A frame that the stream takes in part is kept and counts as sent."""
        if length > self._largest:
            raise HostError(errno.EMSGSIZE, f"a frame of {length} bytes")
        if self.unsent:
            self.flush()
            if self.unsent:
                return False
        pieces: list[bytes | memoryview] = [LENGTH.pack(length), *frame]
        if self._join or len(pieces) > IOV_MAX:
            pieces = [b"".join(pieces)]
        done = self._write(pieces)
        if not done:
            return False
        if done < LENGTH.size + length:
            self._out = memoryview(b"".join(pieces))[done:]
            self.unsent = True
            self.flush()
        return True

    def flush(self) -> None:
        """See Channel."""
        while len(self._out):
            done = self._write([self._out])
            if not done:
                return
            self._out = self._out[done:]
        self.unsent = False

    def _write(self, pieces: list[bytes | memoryview]) -> int:
        try:
            return os.writev(self._fd, pieces)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._out, self.unsent = memoryview(b""), False  # nobody will take the rest
            raise LinkLost(f"the other end of the cable has gone: {error.strerror}") from None


class StreamBackend:
    """A stream, and nothing but frames in it; see `Backend`."""

    offloads = 0

    def __init__(self, fd: int, mtu: int, largest: int = LARGEST) -> None:
        """Takes over `fd`; `largest` is the longest frame to send, in bytes."""
        os.set_blocking(fd, False)
        self._fd = fd
        self.mtu = mtu
        self.channels = (StreamChannel(fd, largest),)

    def set_offloads(self, features: int) -> None:
        """See Backend; there are none."""

    def set_active(self, pairs: int) -> None:
        """See Backend; there is one."""

    def close(self) -> None:
        """See Backend."""
        os.close(self._fd)


def _scatter(views: list[memoryview], frame: memoryview) -> int:
    """A plain header and `frame` into `views`, as far as they go; how long that is."""
    first = views[0]
    length = HEADER_SIZE + len(frame)
    if len(first) >= length:
        first[:HEADER_SIZE] = PLAIN
        first[HEADER_SIZE:length] = frame
        return length
    done = 0
    for piece in (memoryview(PLAIN), frame):
        at = 0
        for view in views:
            end = at + len(view)
            if at <= done < end:
                part = piece[: end - done]
                view[done - at : done - at + len(part)] = part
                piece = piece[len(part) :]
                done += len(part)
                if not piece:
                    break
            at = end
    return done
