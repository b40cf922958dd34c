"""The cost of a 4 KiB read for the block device, on the machine itself: no KVM, no guest.

    python benchmarks/blk_mock.py [--json FILE] [--seconds 2]

"device only" calls the device's serve function on a ring that is filled beforehand and counts
nothing else. "driver process" has a mock driver in another process, with shared memory, an eventfd
for the kick and one for the interrupt, as a guest has: there the wake-ups count as well. "polls" is
the same with a device that looks at its ring before it sleeps, as a VM's disk does where there is a
processor for it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pyvmm.host.files import open_image
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing import Chain, MmioDriver, MockSplitDriver
from pyvmm.testing.blk_driver import IN, header
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio.blk.backend import FileBackend
from pyvmm.virtio.blk.device import BlockDevice
from pyvmm.virtio.queue.split import SplitQueue
from pyvmm.virtio.queue.state import QueueConfig

BLOCK = 4096
IMAGE_MIB = 64
RAM = 64 << 20
QUEUE = 256
EVENT_IDX = 1 << 29
POLL_NS = 200_000
DRIVER_OK = 4


class Bench:
    """A disk on tmpfs behind the real transport, with its rings laid out but not yet live."""

    def __init__(self, path: str, *, read_only: bool = False) -> None:
        self.memory = GuestMemory([(0, RAM)])
        self.image = open_image(path, read_only=read_only)
        self.device = BlockDevice(FileBackend(self.image), name="bench", queue_size=QUEUE)
        self.interrupt = EventFd()
        self.transport = MmioTransport(self.device, self.memory, self.interrupt.signal)
        self.driver = MmioDriver(self.transport, self.memory, kicks=self.transport.kicks)
        self.driver.negotiate()
        self.driver.setup_queues()
        queue = self.driver.queues[0]
        assert isinstance(queue, MockSplitDriver)
        self.queue = queue

    def chains(self, depth: int) -> list[Chain]:
        """`depth` reads of random blocks, in the ring already but not published."""
        rng = random.Random(depth)
        blocks = (IMAGE_MIB << 20) // BLOCK
        return [
            self.queue.add([header(IN, rng.randrange(blocks) * BLOCK // 512)], [BLOCK, 1])
            for _ in range(depth)
        ]

    def close(self) -> None:
        self.device.reset()
        self.transport.close()
        self.interrupt.close()
        self.image.close()
        self.memory.close()


def count_completions(bench: Bench, depth: int, seconds: float) -> Iterator[float]:
    """Keep `depth` reads in flight for `seconds`, sleeping for each interrupt, again and again;
    reads a second."""
    queue = bench.queue
    heads = [chain.head for chain in bench.chains(depth)]
    waiter = select.poll()
    waiter.register(bench.interrupt.fd, select.POLLIN)
    position = 0
    while True:
        done = 0
        start = now = time.perf_counter()
        while now - start < seconds:
            position = (position + depth) & 0xFFFF
            queue.used_event = (position - 1) & 0xFFFF
            if queue.publish():
                bench.driver.kick()
            while queue.used_idx != position:
                waiter.poll()
                bench.interrupt.drain()
            done += depth
            now = time.perf_counter()
            for head in heads:
                queue.offer(head)
        yield done / (now - start)


def device_only(path: str, depth: int, seconds: float) -> float:
    """Requests a second that `serve` and `publish_used` handle by themselves."""
    bench = Bench(path)
    try:
        rings = bench.queue
        addresses = (rings.desc_addr, rings.avail_addr, rings.used_addr)
        config = QueueConfig(QUEUE, QUEUE, *addresses, True)
        queue = SplitQueue(bench.memory, config, EVENT_IDX, 0, bench.transport.kicks[0])
        heads = [chain.head for chain in bench.chains(depth)]
        busy = done = 0
        clock = time.perf_counter_ns
        deadline = clock() + int(seconds * 1e9)
        while clock() < deadline:
            rings.publish()
            start = clock()
            bench.device.serve(queue)
            queue.publish_used()
            busy += clock() - start
            done += depth
            for head in heads:
                rings.offer(head)
        return done / busy * 1e9
    finally:
        bench.close()


def driver_process(path: str, depth: int, seconds: float, poll_ns: int = 0) -> float:
    """Requests a second that a driver in another process gets answered."""
    bench = Bench(path)
    bench.device.poll_ns = poll_ns
    go_read, go_write = os.pipe()
    result_read, result_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go_write)
        if os.read(go_read, 1):
            os.write(
                result_write, struct.pack("<d", next(count_completions(bench, depth, seconds)))
            )
        os._exit(0)
    try:
        bench.driver.add_status(DRIVER_OK)
        os.write(go_write, b"g")
        (rate,) = struct.unpack("<d", os.read(result_read, 8))
        os.waitpid(child, 0)
        return float(rate)
    finally:
        for fd in (go_read, go_write, result_read, result_write):
            os.close(fd)
        bench.close()


def preadv_alone(path: str, seconds: float) -> float:
    """preadv(2) calls a second of the same size, as Python makes them."""
    fd = os.open(path, os.O_RDONLY)
    views = [memoryview(bytearray(BLOCK))]
    rng = random.Random(1)
    offsets = [rng.randrange((IMAGE_MIB << 20) // BLOCK) * BLOCK for _ in range(1000)]
    done = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for offset in offsets:
            os.preadv(fd, views, offset)
        done += len(offsets)
    rate = done / (time.perf_counter() - start)
    os.close(fd)
    return rate


@contextlib.contextmanager
def image_on_tmpfs() -> Iterator[str]:
    directory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.NamedTemporaryFile(dir=directory, prefix="pyvmm-bench-") as file:
        for _ in range(IMAGE_MIB):
            file.write(os.urandom(1 << 20))
        file.flush()
        yield file.name


def measure(seconds: float) -> list[dict[str, object]]:
    """All rows: what, queue depth, requests a second, nanoseconds per request."""
    with image_on_tmpfs() as path:
        rates = [("preadv alone", 1, preadv_alone(path, seconds))]
        for depth in (1, 32):
            rates.append(("device only", depth, device_only(path, depth, seconds)))
        for depth in (1, 32):
            rates.append(("driver process", depth, driver_process(path, depth, seconds)))
            polling = driver_process(path, depth, seconds, POLL_NS)
            rates.append(("driver process, polls", depth, polling))
    return [
        {"what": what, "queue_depth": depth, "per_second": round(rate), "ns": round(1e9 / rate)}
        for what, depth, rate in rates
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    options = parser.parse_args()
    rows = measure(options.seconds)
    print(f"{'4 KiB reads, tmpfs':22} {'depth':>5} {'per second':>12} {'ns each':>9}")
    for row in rows:
        print(f"{row['what']:22} {row['queue_depth']:>5} {row['per_second']:>12,} {row['ns']:>9,}")
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "blk_mock", "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
