"""The cost of a packet for the socket device itself, on the machine itself: no KVM, no guest.

    python benchmarks/vsock_mock.py [--json FILE] [--rounds 400]

A mock driver fills the rings, a Unix socket is the host's program; only the device's side is timed,
in processor time, the system calls on that socket included. Receive buffers are those of Linux 6.1:
a header and 4 KiB; what it sends comes 64 KiB at a time.
"""

from __future__ import annotations

import argparse
import gc
import json
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from pyvmm.host import unix_sockets
from pyvmm.host.poller import Poller
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing import Arena, Buffer, MockSplitDriver
from pyvmm.virtio import features as bits
from pyvmm.virtio.queue.build import build_queue
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.queue.state import QueueConfig
from pyvmm.virtio.vsock.device import give_packets
from pyvmm.virtio.vsock.host_side import HostSide
from pyvmm.virtio.vsock.packet import HEADER, HEADER_BYTES, Counters, Header
from pyvmm.virtio.vsock.switch import Switch
from pyvmm.virtio.vsock.uapi import (
    VIRTIO_VSOCK_OP_CREDIT_UPDATE,
    VIRTIO_VSOCK_OP_REQUEST,
    VIRTIO_VSOCK_OP_RW,
    VMADDR_CID_HOST,
)

RAM = 16 << 20
SIZE = 256
CID, GUEST_PORT, HOST_PORT = 3, 1000, 52
PAGE, PACKET = 4096, 64 << 10
BATCH = 15  # pages, at most, that the host's program sends at a time


class Device:
    """One stream through a switch, its rings and the host's end, as the device's loop drives it."""

    def __init__(self, folder: str) -> None:
        self.memory = GuestMemory([(0, RAM)])
        arena = Arena(self.memory)
        self.receive, self.receive_queue = self._make(arena)
        self.transmit, self.transmit_queue = self._make(arena)
        self._head = arena.alloc(HEADER_BYTES)
        self._payload = arena.alloc(PACKET, 4096)
        self._pages = arena.alloc(SIZE * PAGE, 4096)
        self._heads = arena.alloc(SIZE * HEADER_BYTES)
        self._received = 0
        path = f"{folder}/vsock"
        self._poller = Poller()
        host = HostSide(unix_sockets.listen(path), path, self._poller, deque())
        self.switch = Switch(CID, host, self._poller, counters=Counters(), warn=print)
        listener = unix_sockets.listen(f"{path}_{HOST_PORT}")
        self.offer(8)
        self.send(VIRTIO_VSOCK_OP_REQUEST)
        self.work()
        program = unix_sockets.accept(listener)
        assert program is not None, "the switch has not connected"
        self.program = program
        self.program.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.settle()

    def _make(self, arena: Arena) -> tuple[MockSplitDriver, Queue]:
        driver = MockSplitDriver(self.memory, SIZE, arena=arena, event_idx=True)
        features = bits.mask(bits.VIRTIO_RING_F_INDIRECT_DESC, bits.VIRTIO_RING_F_EVENT_IDX)
        parts = (driver.desc_addr, driver.driver_addr, driver.device_addr)
        config = QueueConfig(SIZE, SIZE, *parts, True)
        return driver, build_queue(self.memory, config, features, 0, EventFd())

    # --- the driver ------------------------------------------------------------------------------

    def offer(self, count: int) -> None:
        """Give the device receive buffers."""
        for place in range(count):
            head = Buffer(self._heads + place * HEADER_BYTES, HEADER_BYTES)
            self.receive.add([], [head, Buffer(self._pages + place * PAGE, PAGE)])
        self.receive.publish()

    def send(self, op: int, size: int = 0) -> None:
        """Put a packet with `size` bytes of payload into the transmit ring."""
        header = Header(
            *(CID, VMADDR_CID_HOST, GUEST_PORT, HOST_PORT, size),
            op=op,
            buf_alloc=1 << 30,
            fwd_cnt=self._received & 0xFFFF_FFFF,
        )
        self.memory.write(self._head, header.pack())
        payload = [Buffer(self._payload, size)] if size else []
        self.transmit.add([Buffer(self._head, HEADER_BYTES), *payload])
        self.transmit.publish()

    def settle(self) -> None:
        """Take back all that the device has used, and tell it that there is room again."""
        while self.receive.has_used():
            used = self.receive.pop_used()
            assert used is not None
            self._received += used.written - HEADER_BYTES
        self.offer(self.receive.room // 2 - 8)
        self.send(VIRTIO_VSOCK_OP_CREDIT_UPDATE)
        self.work()
        while self.transmit.has_used():
            self.transmit.pop_used()

    # --- the device's side -----------------------------------------------------------------------

    def work(self) -> None:
        """One turn of the device's loop."""
        switch = self.switch
        self._poller.wait(0)
        switch.attend()
        for chain in self.transmit_queue:
            reader = chain.reader()
            switch.take_packet(Header._make(reader.unpack(HEADER)), reader)
            self.transmit_queue.add_used(chain, 0)
        self.transmit_queue.publish_used()
        give_packets(switch, self.receive_queue, print)
        self.receive_queue.publish_used()


def to_guest(device: Device) -> float:
    """Nanoseconds per 4 KiB from the host's program."""
    sent = device.program.send(bytes(BATCH * PAGE))
    begin = time.process_time_ns()
    device.work()
    return (time.process_time_ns() - begin) / (sent / PAGE)


def from_guest(device: Device) -> float:
    """Nanoseconds per packet of 64 KiB."""
    device.send(VIRTIO_VSOCK_OP_RW, PACKET)
    begin = time.process_time_ns()
    device.work()
    cost = time.process_time_ns() - begin
    left = PACKET
    while left:
        left -= len(device.program.recv(left))
    return cost


def there_and_back(device: Device) -> float:
    """Nanoseconds for 64 bytes from the guest and the same back, without the program between."""
    device.send(VIRTIO_VSOCK_OP_RW, 64)
    begin = time.process_time_ns()
    device.work()
    cost = time.process_time_ns() - begin
    device.program.send(device.program.recv(64))
    begin = time.process_time_ns()
    device.work()
    return cost + time.process_time_ns() - begin


ROWS: dict[str, Callable[[Device], float]] = {
    "4 KiB to the guest": to_guest,
    "64 KiB from the guest": from_guest,
    "64 bytes from the guest and back": there_and_back,
}


def measure(rounds: int) -> dict[str, float]:
    """Nanoseconds of each row, the tenth percentile."""
    found = {}
    gc.disable()
    with tempfile.TemporaryDirectory() as folder:
        device = Device(folder)
        for name, row in ROWS.items():
            costs = []
            for _ in range(rounds):
                costs.append(row(device))
                device.settle()
            found[name] = sorted(costs)[rounds // 10]
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=400)
    options = parser.parse_args()
    found = measure(options.rounds)
    if options.json:
        options.json.write_text(json.dumps(found))
    print("| vsock | ns |\n|---|---|")
    for name, cost in found.items():
        print(f"| {name} | {cost:,.0f} |")


if __name__ == "__main__":
    main()
