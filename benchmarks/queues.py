"""What a virtqueue costs by itself: taking chains, returning them, telling the driver. No device.

    python benchmarks/queues.py [--json FILE] [--rounds 300]

Each row is the tenth percentile over many rounds, in nanoseconds per chain; only the device's side
is timed. A chain is the 16 bytes of a header, as many writable buffers as it takes, and a status.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import NamedTuple

from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing import Arena, Buffer, MockPackedDriver, MockSplitDriver
from pyvmm.virtio import features as bits
from pyvmm.virtio.queue import build_queue
from pyvmm.virtio.queue_state import QueueConfig

RAM = 16 << 20
LAYOUTS = ("split", "packed")


class Case(NamedTuple):
    """`chain` is descriptors in a chain, `batch` chains in a round, `size` that of the queue."""

    layout: str
    indirect: bool = True
    chain: int = 3
    batch: int = 64
    size: int = 256
    in_order: bool = False


CASES = [
    *(Case(layout, chain=3, batch=batch) for layout in LAYOUTS for batch in (1, 8, 64)),
    *(Case(layout, indirect=False) for layout in LAYOUTS),
    *(Case(layout, chain=chain, batch=16) for layout in LAYOUTS for chain in (3, 16, 64)),
    *(Case(layout, size=size) for layout in LAYOUTS for size in (64, 4096, 32768)),
    *(Case(layout, batch=batch, in_order=True) for layout in LAYOUTS for batch in (1, 64)),
]


def measure(case: Case, rounds: int) -> float:
    """Nanoseconds per chain."""
    memory = GuestMemory([(0, RAM)])
    with EventFd() as kick:
        make = MockPackedDriver if case.layout == "packed" else MockSplitDriver
        driver = make(
            memory, case.size, arena=Arena(memory), event_idx=True, in_order=case.in_order
        )
        features = bits.mask(bits.VIRTIO_F_INDIRECT_DESC, bits.VIRTIO_F_EVENT_IDX)
        features |= case.in_order << bits.VIRTIO_F_IN_ORDER
        features |= (case.layout == "packed") << bits.VIRTIO_F_RING_PACKED
        parts = (driver.desc_addr, driver.driver_addr, driver.device_addr)
        config = QueueConfig(case.size, case.size, *parts, True)
        queue = build_queue(memory, config, features, 0, kick)
        header = Buffer(driver.arena.alloc(16), 16)
        data = [Buffer(driver.arena.alloc(512), 512)] * (case.chain - 2)
        status = Buffer(driver.arena.alloc(1), 1)
        start = driver.arena.next
        costs = []
        clock = time.perf_counter_ns
        gc.disable()
        for _ in range(rounds):
            driver.arena.next = start  # tables of a round before are not needed any more
            for _ in range(case.batch):
                driver.add([header], [*data, status], indirect=case.indirect)
            driver.interrupt_after(case.batch)
            driver.publish()
            begin = clock()
            for chain in queue:
                queue.add_used(chain, chain.writable_size)
            wanted = queue.publish_used()
            costs.append((clock() - begin) / case.batch)
            assert wanted, "the driver has asked for an interrupt"
            assert sum(1 for _ in iter(driver.pop_used, None)) == case.batch
        gc.enable()
    memory.close()
    return sorted(costs)[rounds // 10]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--rounds", type=int, default=300, help="for each row")
    options = parser.parse_args()
    print("layout  table   chain  batch   size  in order   ns per chain")
    rows = []
    for case in dict.fromkeys(CASES):
        cost = round(measure(case, options.rounds))
        rows.append({**case._asdict(), "ns": cost})
        table = "yes" if case.indirect else "no"
        order = "yes" if case.in_order else "no"
        print(
            f"{case.layout:7} {table:7} {case.chain:5} {case.batch:6} {case.size:6}  {order:8}"
            f" {cost:14,}"
        )
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "queues", "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
