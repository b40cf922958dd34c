"""vhost-net: the kernel serves a network card's queues itself (<linux/vhost.h>).

One `VhostNet` is one pair of queues with a kernel thread of its own, which moves frames between
guest memory and a tap. A test compares the numbers and structures with the system's header.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from struct import Struct
from typing import NamedTuple

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import syscalls
from pyvmm.host.syscalls import Closable, EventFd

DEVICE = "/dev/vhost-net"

VHOST_GET_FEATURES = 0x8008AF00
VHOST_SET_FEATURES = 0x4008AF00
VHOST_SET_OWNER = 0xAF01
VHOST_SET_MEM_TABLE = 0x4008AF03
VHOST_SET_VRING_NUM = 0x4008AF10
VHOST_SET_VRING_ADDR = 0x4028AF11
VHOST_SET_VRING_BASE = 0x4008AF12
VHOST_SET_VRING_KICK = 0x4008AF20
VHOST_SET_VRING_CALL = 0x4008AF21
VHOST_SET_VRING_ERR = 0x4008AF22
VHOST_NET_SET_BACKEND = 0x4008AF30

FEATURES = Struct("=Q")
MEMORY = Struct("=II")  # struct vhost_memory: nregions, padding
MEMORY_REGION = Struct("=QQQQ")  # guest_phys_addr, memory_size, userspace_addr, flags_padding
VRING_STATE = Struct("=II")  # struct vhost_vring_state: index, num
VRING_FILE = Struct("=Ii")  # struct vhost_vring_file: index, fd
VRING_ADDR = Struct("=IIQQQQ")  # index, flags, then user addresses: desc, used, avail, log
_NO_FILE = -1

RECEIVE, SEND = 0, 1  # the two queues of a pair (Documentation of VHOST_NET_SET_BACKEND)


class MappedRegion(NamedTuple):
    """Guest RAM as the kernel is to find it: guest-physical address, bytes, our own address."""

    guest_addr: int
    size: int
    host_addr: int


class Ring(NamedTuple):
    """A split virtqueue: its size, the index of the next available chain, and our own addresses of
    its three parts."""

    size: int
    next_avail: int
    desc: int
    avail: int
    used: int


class VhostNet(Closable):
    """A pair of queues that the kernel can serve, for this process' memory."""

    def __init__(self, fd: int) -> None:
        """Take over `fd`, an open /dev/vhost-net. Raises HostError."""
        self.fd = fd
        self._ioctl(VHOST_SET_OWNER, 0, "VHOST_SET_OWNER")
        answer = bytearray(FEATURES.size)
        self._ioctl(VHOST_GET_FEATURES, answer, "VHOST_GET_FEATURES")
        [self.features] = FEATURES.unpack(answer)

    def _ioctl(self, request: int, arg: int | bytearray, call: str) -> None:
        syscalls.ioctl(self.fd, request, arg, call)

    def negotiate(self, features: int) -> None:
        """Serve as a driver that accepted `features`, a part of ours, expects. Raises HostError."""
        self._ioctl(VHOST_SET_FEATURES, bytearray(FEATURES.pack(features)), "VHOST_SET_FEATURES")

    def set_memory(self, regions: Iterable[MappedRegion]) -> None:
        """Set the memory that the kernel can reach, by guest-physical address. Raises HostError."""
        rows = [MEMORY_REGION.pack(*region, 0) for region in regions]
        table = bytearray(MEMORY.pack(len(rows), 0) + b"".join(rows))
        self._ioctl(VHOST_SET_MEM_TABLE, table, "VHOST_SET_MEM_TABLE")

    def start(
        self,
        index: int,
        ring: Ring,
        tap: int,
        *,
        kick: EventFd,
        call: EventFd | None,
        error: EventFd,
    ) -> None:
        """Serve queue `index`, RECEIVE or SEND, with frames of `tap`, from `ring.next_avail` on.

        The kernel waits for `kick`, signals `call`, if there is one, for what the driver is to be
        interrupted for, and `error` when the ring is broken. Raises HostError; the queue is not
        served then.
        """
        self._state(VHOST_SET_VRING_NUM, index, ring.size, "VHOST_SET_VRING_NUM")
        self._state(VHOST_SET_VRING_BASE, index, ring.next_avail, "VHOST_SET_VRING_BASE")
        addresses = VRING_ADDR.pack(index, 0, ring.desc, ring.used, ring.avail, 0)
        self._ioctl(VHOST_SET_VRING_ADDR, bytearray(addresses), "VHOST_SET_VRING_ADDR")
        self._file(VHOST_SET_VRING_ERR, index, error.fd, "VHOST_SET_VRING_ERR")
        signalled = _NO_FILE if call is None else call.fd
        self._file(VHOST_SET_VRING_CALL, index, signalled, "VHOST_SET_VRING_CALL")
        self._file(VHOST_SET_VRING_KICK, index, kick.fd, "VHOST_SET_VRING_KICK")
        self._file(VHOST_NET_SET_BACKEND, index, tap, "VHOST_NET_SET_BACKEND")

    def stop(self, index: int) -> None:
        """Serve queue `index` no more: its ring is not touched any longer. Raises HostError."""
        self._file(VHOST_NET_SET_BACKEND, index, _NO_FILE, "VHOST_NET_SET_BACKEND")
        self._file(VHOST_SET_VRING_KICK, index, _NO_FILE, "VHOST_SET_VRING_KICK")
        self._file(VHOST_SET_VRING_CALL, index, _NO_FILE, "VHOST_SET_VRING_CALL")

    def _state(self, request: int, index: int, number: int, call: str) -> None:
        self._ioctl(request, bytearray(VRING_STATE.pack(index, number)), call)

    def _file(self, request: int, index: int, fd: int, call: str) -> None:
        self._ioctl(request, bytearray(VRING_FILE.pack(index, fd)), call)

    def close(self) -> None:
        """Give it up; the kernel stops serving."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_net(option: str) -> VhostNet:
    """Open /dev/vhost-net. Raises ConfigError that names `option`."""
    return take_net(open_device(option))


def open_device(option: str) -> int:
    """/dev/vhost-net, which is nobody's yet. Raises ConfigError that names `option`."""
    try:
        return syscalls.open_file(DEVICE, os.O_RDWR)
    except HostError as error:
        missing = error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO)
        cure = "`modprobe vhost_net` may help" if missing else "check its permissions"
        raise ConfigError(
            f"no vhost: {error}", cure=f"{cure}, or leave out vhost", option=option
        ) from None


def take_net(fd: int) -> VhostNet:
    """`fd`, what `open_device` gives, for this process. Raises HostError, and closes it then."""
    try:
        return VhostNet(fd)
    except BaseException:
        os.close(fd)
        raise
