"""Tap interfaces: network interfaces whose other end is a file descriptor (<linux/if_tun.h>).

Documentation/networking/tuntap.rst. An interface that nobody made persistent vanishes with the
last descriptor of it. A test compares the numbers with the system's header.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack, suppress
from struct import Struct

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import syscalls

IFNAMSIZ = 16  # <linux/if.h>
_IFREQ = Struct(f"={IFNAMSIZ}sH22x")  # struct ifreq: ifr_name, ifr_flags
_IFREQ_MTU = Struct(f"={IFNAMSIZ}si20x")  # struct ifreq: ifr_name, ifr_mtu
_INT = Struct("=i")
_OPTION = "--net"

# <linux/if_tun.h>
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
TUNSETQUEUE = 0x400454D9
TUNGETIFF = 0x800454D2
IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_ATTACH_QUEUE = 0x0200
IFF_DETACH_QUEUE = 0x0400
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_TUN_EXCL = 0x8000
TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08
TUN_F_UFO = 0x10
TUN_F_USO4 = 0x20
TUN_F_USO6 = 0x40

# <linux/sockios.h>, <linux/if.h>
SIOCGIFFLAGS = 0x8913
SIOCGIFMTU = 0x8921
IFF_UP = 0x1

RTMGRP_LINK = 1  # <linux/rtnetlink.h>

_VNET_HEADER = 12  # struct virtio_net_hdr_v1
DEVICE = "/dev/net/tun"


def device_usable() -> bool:
    """True if this process may ask for taps at all."""
    return os.access(DEVICE, os.R_OK | os.W_OK)


def exists(name: str) -> bool:
    """True if there is a network interface of that name, of whatever kind."""
    with suppress(OSError):
        return socket.if_nametoindex(name) > 0
    return False


def open_tap(name: str, queues: int = 1, *, create: bool = False) -> tuple[list[int], str]:
    """Attach to the tap interface `name`, once for each of `queues`; the descriptors, which do not
    block, and its name.

    With `create` it must not be there yet, and lives as long as its descriptors; a name with
    ``%d`` in it is completed by the kernel. Raises ConfigError for what the user can mend.
    """
    if not create and not exists(name):
        raise ConfigError(
            f"there is no tap {name}",
            cure=f"`ip tuntap add {name} mode tap user $USER` makes it, "
            f"or write --net tap={name},create",
            option=_OPTION,
        )
    fds: list[int] = []
    try:
        for _ in range(queues):
            fd = _open_device()
            fds.append(fd)
            name = _attach(fd, name, queues > 1, create and len(fds) == 1)
            header = bytearray(_INT.pack(_VNET_HEADER))
            syscalls.ioctl(fd, TUNSETVNETHDRSZ, header, "TUNSETVNETHDRSZ")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds, name


def _open_device() -> int:
    try:
        return syscalls.open_file(DEVICE, os.O_RDWR | os.O_NONBLOCK)
    except HostError as error:
        cure = {
            errno.ENOENT: "`modprobe tun` may help",
            errno.ENODEV: "`modprobe tun` may help",
        }.get(error.errno, "check its permissions")
        raise ConfigError(f"no taps: {error}", cure=cure, option=_OPTION) from None


def _attach(fd: int, name: str, many: bool, create: bool) -> str:
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    flags |= IFF_MULTI_QUEUE if many else 0
    flags |= IFF_TUN_EXCL if create else 0
    request = bytearray(_IFREQ.pack(name.encode(), flags))
    try:
        syscalls.ioctl(fd, TUNSETIFF, request, "TUNSETIFF")
    except HostError as error:
        raise _cannot_attach(name, error, many, create) from None
    return str(_IFREQ.unpack(request)[0].rstrip(b"\0").decode())


def _cannot_attach(name: str, error: HostError, many: bool, create: bool) -> ConfigError:
    if error.errno == errno.EPERM and create:
        what, cure = (
            f"a tap can only be made with CAP_NET_ADMIN ({name})",
            "have root make one: `ip tuntap add tap0 mode tap user $USER`; or use --net user",
        )
    elif error.errno in (errno.EPERM, errno.EACCES):
        what, cure = f"the tap {name} belongs to another user", "run as its owner, or as root"
    elif error.errno == errno.EBUSY and create:
        what, cure = f"there is already an interface {name}", "leave out create, or rename it"
    elif error.errno == errno.EBUSY:
        what, cure = f"the tap {name} is in use", "stop the other VM, or give each its own"
    elif error.errno == errno.EINVAL:
        mode = "with" if many else "without"
        what = f"{name} is not a tap interface, or not one {mode} multi_queue"
        cure = "see `ip -d link`; queues=N goes with `ip tuntap add … multi_queue` only"
    else:
        what, cure = f"cannot use the tap {name}: {error}", ""
    return ConfigError(what, cure=cure, option=_OPTION)


def has_udp_segmentation(fd: int) -> bool:
    """True if this kernel's taps know UDP segmentation (Linux 6.2). Turns all offloads off."""
    known = True
    try:
        set_offload(fd, TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6)
    except HostError:
        known = False
    set_offload(fd, 0)
    return known


def set_offload(fd: int, offloads: int) -> None:
    """Set the offloads of incoming frames: TUN_F_* bits, for all queues. Raises HostError."""
    syscalls.ioctl(fd, TUNSETOFFLOAD, offloads, "TUNSETOFFLOAD")


def attach_queue(fd: int, attach: bool) -> None:
    """Let frames come through this queue of a tap, or no more. Raises HostError."""
    flags = IFF_ATTACH_QUEUE if attach else IFF_DETACH_QUEUE
    syscalls.ioctl(fd, TUNSETQUEUE, bytearray(_IFREQ.pack(b"", flags)), "TUNSETQUEUE")


def mtu_of(name: str) -> int:
    """The MTU of an interface, in bytes. Raises HostError."""
    request = bytearray(_IFREQ_MTU.pack(name.encode(), 0))
    _ask(SIOCGIFMTU, request, "SIOCGIFMTU")
    return int(_IFREQ_MTU.unpack(request)[1])


def is_up(name: str) -> bool:
    """True if an interface is up (``ip link set NAME up``). Raises HostError."""
    request = bytearray(_IFREQ.pack(name.encode(), 0))
    _ask(SIOCGIFFLAGS, request, "SIOCGIFFLAGS")
    return bool(_IFREQ.unpack(request)[1] & IFF_UP)


class Interface:
    """What this machine tells of the interface called `name`."""

    def __init__(self, name: str, counts: int = -1, changes: int = -1) -> None:
        """Where this process is in another network: `counts` is what `open_counts` gives to another
        one, and `changes` what `interface_changes` does; they stay the caller's."""
        self.name = name
        self._counts, self._changes = counts, changes

    def counters(self) -> dict[str, int]:
        """Its counters: frames and bytes to and from the guest, and the frames to it that were
        dropped (proc_pid_net(5), /proc/net/dev). Raises HostError if it is gone."""
        for line in self._all_counters().splitlines():
            interface, _, numbers = line.strip().partition(":")
            if interface == self.name:
                # bytes, packets, errs, drop, …: 8 numbers received, then 8 sent
                row = [int(number) for number in numbers.split()]
                return {
                    "frames_to_guest": row[9],
                    "bytes_to_guest": row[8],
                    "frames_from_guest": row[1],
                    "bytes_from_guest": row[0],
                    "dropped_to_guest": row[11],
                }
        raise HostError(errno.ENODEV, f"counters of {self.name}")

    def _all_counters(self) -> str:
        try:
            fd = self._counts if self._counts >= 0 else open_counts()
            try:
                data = b""
                # The kernel gives a page of it at a time, which has some thirty interfaces.
                while len(data) < _MOST_COUNTS and (more := os.pread(fd, _MOST_COUNTS, len(data))):
                    data += more
                return data.decode(errors="replace")
            finally:
                if fd != self._counts:
                    os.close(fd)
        except OSError as error:
            raise HostError(error.errno or 0, f"counters of {self.name}") from None

    def changes(self) -> socket.socket:
        """Readable after any interface has changed or gone, and the caller's. Where another process
        has opened it, all that this returns tell of a change once together. Raises HostError."""
        if self._changes < 0:
            return interface_changes()
        try:
            return socket.socket(fileno=os.dup(self._changes))
        except OSError as error:
            raise HostError(error.errno or 0, "rtnetlink") from None


_MOST_COUNTS = 8 << 20  # bytes; an interface has 120


def open_counts() -> int:
    """The counters of all interfaces of the network that this thread is in. Raises OSError."""
    return os.open("/proc/thread-self/net/dev", os.O_RDONLY | os.O_CLOEXEC)


def interface_changes() -> socket.socket:
    """Readable after any interface of this network has changed or gone (rtnetlink(7)). Raises
    HostError."""
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
    with ExitStack() as opened:
        try:
            changes = opened.enter_context(
                socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
            )
            changes.bind((0, RTMGRP_LINK))
        except OSError as error:
            raise HostError(error.errno or 0, "rtnetlink") from None
        opened.pop_all()
    return changes


def drain_changes(changes: socket.socket) -> bool:
    """Forget what `interface_changes` has to tell; whether there was anything."""
    told = False
    while True:
        try:
            changes.recv(1)
        except BlockingIOError:
            return told
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # more than it could keep
                return told
        told = True


def is_attached(fd: int) -> bool:
    """True if there is still an interface behind this queue of a tap, and it is attached."""
    try:
        syscalls.ioctl(fd, TUNGETIFF, bytearray(_IFREQ.size), "TUNGETIFF")
    except HostError:
        return False
    return True


def is_queue(fd: int) -> bool:
    """True if this is a queue of a tap as `open_tap` makes them."""
    request = bytearray(_IFREQ.size)
    try:
        syscalls.ioctl(fd, TUNGETIFF, request, "TUNGETIFF")
    except HostError:
        return False
    wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    return bool(_IFREQ.unpack(request)[1] & wanted == wanted)


def _ask(request: int, buffer: bytearray, call: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        syscalls.ioctl(any_socket.fileno(), request, buffer, call)
