"""A network device on the real transport, a mock driver in front, and its cable in the test's hand.

The cable is a socket pair of sequenced packets: like a tap, it keeps frames apart, takes or gives
one at a time with its header in front, and loses what a reader has no room for.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pyvmm.testing.attached import AttachedDriver, attached
from pyvmm.testing.mmio_driver import SAFETY_TIMEOUT
from pyvmm.testing.ring import Buffer
from pyvmm.virtio.net.device import NetDevice
from pyvmm.virtio.net.tap import TapChannel

MAC = bytes.fromhex("525400123456")
BROADCAST = b"\xff" * 6
GROUP = bytes.fromhex("01005e000001")
OTHER = bytes.fromhex("5254006543ff")
MTU = 1500
HEADER = 12

# Virtio 1.3, 5.1.3 Feature bits
F_CSUM, F_GUEST_CSUM, F_GUEST_OFFLOADS, F_MTU, F_MAC = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5
F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_ECN, F_GUEST_UFO = 1 << 7, 1 << 8, 1 << 9, 1 << 10
F_HOST_TSO4, F_HOST_TSO6, F_HOST_ECN, F_HOST_UFO = 1 << 11, 1 << 12, 1 << 13, 1 << 14
F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_CTRL_RX = 1 << 15, 1 << 16, 1 << 17, 1 << 18
F_CTRL_RX_EXTRA, F_MQ, F_CTRL_MAC_ADDR = 1 << 20, 1 << 22, 1 << 23
F_GUEST_USO4, F_GUEST_USO6, F_HOST_USO = 1 << 54, 1 << 55, 1 << 56
HOST_OFFLOADS = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN | F_HOST_UFO | F_HOST_USO
GUEST_OFFLOADS = (
    F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_GUEST_UFO
    | F_GUEST_USO4 | F_GUEST_USO6
)  # fmt: skip

# 5.1.6 Device Operation
NEEDS_CSUM, GSO_TCPV4, GSO_UDP, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 1, 1, 3, 4, 5, 0x80
OK, ERR = 0, 1


def header(
    flags: int = 0,
    gso_type: int = 0,
    hdr_len: int = 0,
    gso_size: int = 0,
    csum_start: int = 0,
    csum_offset: int = 0,
    num_buffers: int = 0,
) -> bytes:
    """struct virtio_net_hdr."""
    return struct.pack(
        "<BBHHHHH", flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers
    )


def frame(size: int = 60, to: bytes = MAC, fill: int = 0x5A) -> bytes:
    """An Ethernet frame of `size` bytes."""
    return (to + OTHER + b"\x88\xb5").ljust(size, bytes([fill]))


class Cable:
    """A backend whose other ends, one for each pair of queues, are `ends`."""

    def __init__(
        self, pairs: int = 1, mtu: int = MTU, offloads: int = HOST_OFFLOADS | GUEST_OFFLOADS
    ) -> None:
        self.mtu = mtu
        self.offloads = offloads
        self.ends: list[socket.socket] = []
        self.channels: list[TapChannel] = []
        self.ours: list[socket.socket] = []
        self.offloads_set: list[int] = []
        self.active: list[int] = []
        for _ in range(pairs):
            ours, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            end.settimeout(30)
            self.ours.append(ours)
            self.ends.append(end)
            self.channels.append(TapChannel(ours.fileno()))

    def set_offloads(self, features: int) -> None:
        self.offloads_set.append(features)

    def set_active(self, pairs: int) -> None:
        self.active.append(pairs)

    def close(self) -> None:
        for end in (*self.ours, *self.ends):
            end.close()


class NetRig:
    """A running network card; `lines` is what it logged."""

    def __init__(self, driver: AttachedDriver, device: NetDevice, cable: Cable) -> None:
        self.driver = driver
        self.device = device
        self.cable = cable
        self.lines: list[str] = []

    # --- receiving -------------------------------------------------------------------------------

    def offer(self, *sizes: int | Sequence[int], pair: int = 0) -> list[object]:
        """Give the device receive buffers: a size each, or the sizes of its descriptors."""
        queue = self.driver.queues[2 * pair]
        chains = [queue.add([], [size] if isinstance(size, int) else list(size)) for size in sizes]
        if queue.publish():
            self.driver.kick(2 * pair)
        return chains

    def inject(self, data: bytes, head: bytes = b"", pair: int = 0) -> None:
        """A frame comes along the cable."""
        self.cable.ends[pair].send((head or header()) + data)

    def received(self, chain: object, pair: int = 0) -> tuple[int, bytes]:
        """Wait for a receive buffer: its used length, and so many bytes of it."""
        used = self.driver.mmio.wait_used(2 * pair, chain)
        data = self.driver.queues[2 * pair].contents(chain)
        return used.written, data[: used.written]

    def expect(self, data: bytes, head: bytes = b"", *, size: int = 2048) -> bytes:
        """`data` comes along, into a buffer of its own; the header that the driver sees."""
        [chain] = self.offer(size)
        self.inject(data, head)
        written, got = self.received(chain)
        assert written == HEADER + len(data)
        assert got[HEADER:] == data
        return got[:HEADER]

    # --- sending ---------------------------------------------------------------------------------

    def send(self, *parts: bytes | Buffer, pair: int = 0, indirect: bool = False) -> int:
        """One transmit chain of these parts; its used length."""
        return self.driver.request(parts, [], queue=2 * pair + 1, indirect=indirect).written

    def sent(self, pair: int = 0) -> tuple[bytes, bytes]:
        """The next frame at the cable's end: its header and itself."""
        data = self.cable.ends[pair].recv(1 << 17)
        return data[:HEADER], data[HEADER:]

    def nothing_sent(self, pair: int = 0) -> bool:
        end = self.cable.ends[pair]
        end.setblocking(False)
        try:
            end.recv(1)
        except BlockingIOError:
            return True
        finally:
            end.settimeout(30)
        return False

    # --- control ---------------------------------------------------------------------------------

    @property
    def control_queue(self) -> int:
        return len(self.driver.queues) - 1

    def command(self, kind: int, command: int, data: bytes = b"", *, queue: int = -1) -> int:
        """The `ack` that a command is answered with."""
        index = self.control_queue if queue < 0 else queue
        answer = self.driver.request([bytes([kind, command]), data], [1], queue=index)
        assert answer.written == 1
        return answer.data[0]

    def assert_alive(self) -> None:
        """Frames still go both ways, and the device did not ask for a reset."""
        assert not self.driver.needs_reset
        self.send(header() + frame())
        assert self.sent()[1] == frame()
        self.expect(frame(to=BROADCAST, fill=0x77))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SAFETY_TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "the device hangs"
        time.sleep(0.001)


@contextmanager
def running(
    cable: Cable | None = None,
    *,
    features: int | None = None,
    without: int = 0,
    ram: int = 4 << 20,
    queue_size: int = 64,
    **options: object,
) -> Iterator[NetRig]:
    """A card on a cable, brought up with `features`, or all that are offered but `without`."""
    cable = cable or Cable()
    lines: list[str] = []
    device = NetDevice(
        cable, name="net0", mac=MAC, queue_size=queue_size, log=lines.append, **options
    )  # type: ignore[arg-type]
    try:
        with attached(device, start=False, ram=ram) as driver:
            offered = driver.mmio.offered_features()
            driver.mmio.start(features=(offered if features is None else features) & ~without)
            rig = NetRig(driver, device, cable)
            rig.lines = lines
            yield rig
    finally:
        cable.close()
