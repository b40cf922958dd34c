"""The cost of a frame for the network device itself, on the machine itself: no KVM, guest or host.

    python benchmarks/net_mock.py [--json FILE] [--rounds 400]

A mock driver fills the rings beforehand, and the cable gives and takes frames for nothing; only
`serve` and `publish_used` are timed, in processor time. Buffers are those of Linux's driver: a page
each for large frames, never at the same place twice.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

from pyvmm.host.poller import Source
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing import Arena, Buffer, MockDriver, MockPackedDriver, MockSplitDriver
from pyvmm.virtio import features as bits
from pyvmm.virtio.net.counters import Counters
from pyvmm.virtio.net.filter import ReceiveFilter
from pyvmm.virtio.net.header import HEADER, HEADER_SIZE, TransmitCheck
from pyvmm.virtio.net.receive import Receiver, Rules
from pyvmm.virtio.net.transmit import Transmitter
from pyvmm.virtio.net.uapi import VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4
from pyvmm.virtio.queue.build import build_queue
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.queue.state import QueueConfig

RAM = 64 << 20
END = 60 << 20
SIZE = 256
LARGE, SMALL = 65000, 78  # bytes of a frame with its header
PAGE_BUFFER, SMALL_BUFFER = 3900, 1536
LAYOUTS = ("split", "packed")


class Cable:
    """Has `left` frames of `length` bytes to give, and takes whatever is sent."""

    unsent = False

    def __init__(self, length: int = 0) -> None:
        self.readable = self.writable = Source(-1)
        self.length = length
        self.left = 0

    def receive(self, views: list[memoryview]) -> int:
        """See Channel."""
        if not self.left:
            return 0
        self.left -= 1
        return self.length

    def send(self, header: bytes, frame: list[memoryview], length: int) -> bool:
        """See Channel."""
        self.left -= 1
        return True

    def flush(self) -> None:
        """See Channel."""


class Places:
    """The places of buffers: one page after the other."""

    def __init__(self, start: int) -> None:
        self.start = self.next = -(-start // 4096) * 4096

    def take(self, length: int) -> Buffer:
        if self.next + length > END:
            self.next = self.start
        found = Buffer(self.next, length)
        self.next += -(-length // 4096) * 4096
        return found


def make(layout: str) -> tuple[MockDriver, Queue]:
    """Both ends of a queue."""
    memory = GuestMemory([(0, RAM)])
    kind = MockPackedDriver if layout == "packed" else MockSplitDriver
    driver = kind(memory, SIZE, arena=Arena(memory), event_idx=True)
    features = bits.mask(bits.VIRTIO_RING_F_INDIRECT_DESC, bits.VIRTIO_RING_F_EVENT_IDX)
    features |= (layout == "packed") << bits.VIRTIO_F_RING_PACKED
    parts = (driver.desc_addr, driver.driver_addr, driver.device_addr)
    return driver, build_queue(
        memory, QueueConfig(SIZE, SIZE, *parts, True), features, 0, EventFd()
    )


def timed(cable: Cable, queue: Queue, serve: Callable[[Queue], object], frames: int) -> float:
    """Nanoseconds per frame until all `frames` are through."""
    cable.left = frames
    begin = time.process_time_ns()
    while cable.left:
        queue.disable_notification()
        serve(queue)
        queue.publish_used()
    return (time.process_time_ns() - begin) / frames


def receive(layout: str, size: int, length: int, frames: int, rounds: int) -> list[float]:
    """Frames of `length` bytes into buffers of `size`."""
    driver, queue = make(layout)
    cable = Cable(length)
    accept = ReceiveFilter(b"RT\0\1\2\3", promisc=True)
    receiver = Receiver(cable, Rules(True, True, 0), lambda: accept, Counters(), None)
    places = Places(driver.arena.next)
    costs = []
    for _ in range(rounds):
        while driver.room:
            driver.add([], [places.take(size)])
        driver.publish()
        costs.append(timed(cable, queue, receiver.serve, frames))
        while driver.has_used():
            driver.pop_used()
    return costs


def send(layout: str, payload: list[int], frames: int, rounds: int) -> list[float]:
    """Frames with a payload in these pieces, behind their headers."""
    driver, queue = make(layout)
    check = TransmitCheck(bits.mask(VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4))
    cable = Cable()
    sender = Transmitter(cable, check, lambda: True, Counters(), None)
    head = driver.arena.alloc(SMALL)
    if payload:
        driver.memory.write(head, HEADER.pack(1, 1, SMALL - HEADER_SIZE, 1448, 34, 16, 0))
    start = driver.arena.next
    places = Places(start + (1 << 20))
    costs = []
    for _ in range(rounds):
        driver.arena.next = start  # indirect tables of the round before are not needed any more
        for _ in range(frames):
            parts = [Buffer(head, SMALL), *(places.take(size) for size in payload)]
            driver.add(parts, indirect=bool(payload))
        driver.publish()
        costs.append(timed(cable, queue, sender.serve, frames))
        while driver.has_used():
            driver.pop_used()
    return costs


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Nanoseconds per frame, the tenth percentile, by what and layout."""
    rows: dict[str, Callable[[str], list[float]]] = {
        "64 KiB received, 17 buffers": lambda it: receive(it, PAGE_BUFFER, LARGE, 3, rounds),
        "66 bytes received, 1 at a time": lambda it: receive(it, SMALL_BUFFER, SMALL, 1, rounds),
        "66 bytes received, 16 at a time": lambda it: receive(it, SMALL_BUFFER, SMALL, 16, rounds),
        "64 KiB sent, 2 pieces": lambda it: send(it, [32500] * 2, 4, rounds),
        "64 KiB sent, 17 pieces": lambda it: send(it, [3820] * 17, 4, rounds),
        "66 bytes sent, 1 at a time": lambda it: send(it, [], 1, rounds),
        "66 bytes sent, 16 at a time": lambda it: send(it, [], 16, rounds),
    }
    gc.disable()
    return {
        name: {layout: sorted(row(layout))[rounds // 10] for layout in LAYOUTS}
        for name, row in rows.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=400)
    options = parser.parse_args()
    found = measure(options.rounds)
    if options.json:
        options.json.write_text(json.dumps(found))
    print("| a frame | split, ns | packed, ns |\n|---|---|---|")
    for name, costs in found.items():
        print(f"| {name} | {costs['split']:,.0f} | {costs['packed']:,.0f} |")


if __name__ == "__main__":
    main()
