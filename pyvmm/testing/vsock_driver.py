"""A virtio-vsock driver for tests: packets as a guest sends and receives them.

The header is that of virtio 1.3, 5.10.6 Device Operation, written down here a second time on
purpose.

    guest = VsockDriver(mmio_driver, cid=3)
    guest.offer(8)                                 # receive buffers
    guest.send(Packet(op=REQUEST, src_port=1000, dst_port=52))
    assert guest.receive().op == RESPONSE
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyvmm.testing.mmio_driver import MmioDriver
from pyvmm.testing.mock_driver import Buffer, Chain

HOST_CID = 2
RX, TX, EVENT = range(3)
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
SHUTDOWN_RECEIVE, SHUTDOWN_SEND = 1, 2
STREAM, SEQPACKET = 1, 2
HEADER = struct.Struct("<QQLLLHHLLL")
RX_BYTES = 4096  # of payload in a receive buffer


@dataclass(frozen=True)
class Packet:
    """One packet; fields as in struct virtio_vsock_hdr. `len` is that of `data` unless given."""

    op: int
    src_port: int = 0
    dst_port: int = 0
    data: bytes = b""
    flags: int = 0
    buf_alloc: int = 1 << 18
    fwd_cnt: int = 0
    type: int = STREAM
    src_cid: int | None = None  # the guest's, unless given
    dst_cid: int = HOST_CID
    len: int | None = None

    def pack_header(self, cid: int) -> bytes:
        """The header, from the guest with `cid`."""
        return HEADER.pack(
            cid if self.src_cid is None else self.src_cid,
            self.dst_cid,
            self.src_port,
            self.dst_port,
            len(self.data) if self.len is None else self.len,
            self.type,
            self.op,
            self.flags,
            self.buf_alloc,
            self.fwd_cnt,
        )

    @classmethod
    def unpack(cls, raw: bytes) -> Packet:
        """The packet in `raw`, header and payload."""
        src, dst, sport, dport, size, kind, op, flags, alloc, fwd = HEADER.unpack_from(raw)
        data = raw[HEADER.size :]
        return cls(op, sport, dport, data, flags, alloc, fwd, kind, src, dst, size)


class VsockDriver:
    """Sends packets to a socket device and receives its own, in order."""

    def __init__(self, driver: MmioDriver, cid: int = 3) -> None:
        self.driver = driver
        self.cid = cid
        self._offered: deque[Chain] = deque()

    def offer(self, count: int = 1, size: int = RX_BYTES) -> None:
        """Give the device `count` receive buffers, with room for `size` bytes of payload each."""
        for _ in range(count):
            self._offered.append(self.driver.submit(RX, [], [HEADER.size, size]))

    def offer_raw(self, writable: Sequence[int | Buffer]) -> Chain:
        """Give the device a receive buffer that may be wrong; `wait_used` tells when it is back.

        It is not one that `receive` looks at.
        """
        return self.driver.submit(RX, [], writable)

    def send(self, packet: Packet) -> None:
        """Send `packet` and wait until the device has taken it."""
        parts = [packet.pack_header(self.cid), *([packet.data] if packet.data else [])]
        self.send_raw(parts)

    def send_raw(self, readable: Sequence[bytes | Buffer]) -> int:
        """Send a buffer as it is; the used length."""
        return self.driver.request(TX, readable)[0]

    def receive(self) -> Packet:
        """The device's next packet. Its buffer is given back to the device anew."""
        packet = self.receive_and_keep()
        self.offer()
        return packet

    def receive_and_keep(self) -> Packet:
        """The device's next packet, without a new receive buffer for it."""
        chain = self._offered.popleft()
        used = self.driver.wait_used(RX, chain)
        return Packet.unpack(self.driver.queues[RX].contents(chain)[: used.written])

    def forget(self) -> None:
        """The device was reset: no buffer is out any more."""
        self._offered.clear()

    def has_packet(self) -> bool:
        """True if the device has used a receive buffer that was not looked at."""
        return self.driver.queues[RX].has_used()

    def answer(self, to: Packet, op: int, **fields: object) -> None:
        """Send a packet of the stream that `to`, one from the device, belongs to."""
        reply = Packet(op, src_port=to.dst_port, dst_port=to.src_port)
        self.send(replace(reply, **fields))  # type: ignore[arg-type]
