"""A tap interface of the host as the other end of the cable.

Frames carry the kernel's own struct virtio_net_hdr, so that checksums and segmentation stay
undone for as long as they can.
"""

from __future__ import annotations

import errno
import os
import select

from pyvmm.errors import HostError
from pyvmm.host import tap
from pyvmm.host.files import IOV_MAX
from pyvmm.host.poller import Source
from pyvmm.virtio.features import mask
from pyvmm.virtio.net.backend import LinkLost
from pyvmm.virtio.net.header import HEADER_SIZE
from pyvmm.virtio.net.uapi import (
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO,
)

_readv, _writev = os.readv, os.writev

# Feature of the guest's → what the kernel may then leave undone in the frames it gives us.
_OFFLOADS = {
    VIRTIO_NET_F_GUEST_CSUM: tap.TUN_F_CSUM,
    VIRTIO_NET_F_GUEST_TSO4: tap.TUN_F_TSO4,
    VIRTIO_NET_F_GUEST_TSO6: tap.TUN_F_TSO6,
    VIRTIO_NET_F_GUEST_ECN: tap.TUN_F_TSO_ECN,
    VIRTIO_NET_F_GUEST_UFO: tap.TUN_F_UFO,
    VIRTIO_NET_F_GUEST_USO4: tap.TUN_F_USO4,
    VIRTIO_NET_F_GUEST_USO6: tap.TUN_F_USO6,
}
_ALWAYS = mask(
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_UFO,
)
# The kernel's answer for good, once the interface has gone (drivers/net/tun.c).
_GONE = (errno.EBADFD, errno.EIO, errno.EBADF, errno.ENODEV)
_MOST_UNREADABLE = 1000  # frames in a row
_UNREADABLE = 1  # as a length: the receiver drops what is too short for a header
_MOST_QUEUED = 10_000  # frames; Linux keeps 1000 unless told otherwise (txqueuelen)
_USO = mask(VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6)


class TapChannel:
    """One queue of a tap interface; see `Channel`."""

    unsent = False

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._unreadable = 0  # frames in a row
        self.attached = True  # set before the kernel is told: calls under way may then fail
        self.readable = Source(fd)
        self.writable = Source(fd, select.EPOLLOUT, on_demand=True)

    def receive(self, views: list[memoryview]) -> int:
        """See Channel."""
        try:
            length = _readv(self._fd, views)
        except BlockingIOError:
            return 0
        except OSError as error:
            if not self.attached:
                return 0
            # The kernel cannot put every frame into a virtio header (EINVAL), nor always has the
            # memory for it: that frame is gone from the tap, the next one may be as good as any.
            self._unreadable += 1
            if error.errno not in _GONE and self._unreadable <= _MOST_UNREADABLE:
                return _UNREADABLE
            raise LinkLost(f"the tap gives no more frames: {error.strerror}") from None
        if not length:
            raise LinkLost("the other end of the cable has gone")
        self._unreadable = 0
        return length

    def discard(self) -> None:
        """Lose the frames that are there now. Raises LinkLost."""
        header = [memoryview(bytearray(HEADER_SIZE))]  # the rest of a frame is lost when it is read
        for _ in range(_MOST_QUEUED):
            if not self.receive(header):
                return

    def send(self, header: bytes, frame: list[memoryview], length: int) -> bool:
        """See Channel."""
        if len(frame) >= IOV_MAX:
            frame = [memoryview(b"".join(frame))]
        try:
            _writev(self._fd, [header, *frame])
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EBADFD and self.attached:  # the interface was removed
                raise LinkLost("the tap takes no more frames") from None
            raise HostError(error.errno or 0, "write to the tap") from None
        return True

    def flush(self) -> None:
        """See Channel; a tap takes a frame whole or not at all."""


class TapBackend:
    """An open tap interface of one or more queues; see `Backend`."""

    def __init__(self, fds: list[int], mtu: int) -> None:
        """`fds` as `pyvmm.host.tap.open_tap` made them. Raises HostError."""
        self._fds = fds
        self.mtu = mtu
        self.channels = tuple(TapChannel(fd) for fd in fds)
        self._active = len(fds)
        self.offloads = _ALWAYS
        if tap.has_udp_segmentation(fds[0]):
            self.offloads |= _USO

    def set_offloads(self, features: int) -> None:
        """See Backend."""
        wanted = 0
        for feature, offload in _OFFLOADS.items():
            if features >> feature & 1:
                wanted |= offload
        try:
            tap.set_offload(self._fds[0], wanted)
        except HostError as error:
            if error.errno == errno.EBADFD:
                raise LinkLost("the tap is gone") from None
            raise

    def set_active(self, pairs: int) -> None:
        """See Backend. The kernel steers each flow to the queue that it was last sent from."""
        for index, fd in enumerate(self._fds):
            if (index < pairs) != (index < self._active):
                self.channels[index].attached = index < pairs
                tap.attach_queue(fd, index < pairs)
        self._active = pairs

    def close(self) -> None:
        """See Backend. An interface that is not persistent is gone then."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []
