"""The cost of a virtqueue by itself: taking chains, returning them, telling the driver. No device.

    python benchmarks/queues.py [--json FILE] [--rounds 300]

Each row is the tenth percentile over many rounds, in nanoseconds per chain; only the device's side
is timed. A chain is the 16 bytes of a header, as many writable buffers as it takes, and a status.

"Checks" compares with the same modules after each check that finds a broken rule (an `if` that does
nothing but raise a DriverError) was taken out of their source; the two take turns.

"Queues" is a block device on an image in RAM with 1 to 4 queues, and so as many threads: reads from
the kick to the last interrupt.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib.util
import json
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pyvmm.host.files import ImageFile
from pyvmm.host.syscalls import EventFd, create_memfd
from pyvmm.memory import GuestMemory
from pyvmm.testing import Arena, Buffer, MockPackedDriver, MockSplitDriver
from pyvmm.testing.attached import attached
from pyvmm.virtio import features as bits
from pyvmm.virtio.blk.backend import FileBackend
from pyvmm.virtio.blk.device import BlockDevice
from pyvmm.virtio.queue.build import build_queue
from pyvmm.virtio.queue.state import QueueConfig

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


MakeQueue = Callable[..., Any]


class Rig:
    """A driver's and a device's end of the queue of `case`; `make_queue` makes the latter."""

    def __init__(self, case: Case, make_queue: MakeQueue = build_queue) -> None:
        self.case = case
        self.memory = memory = GuestMemory([(0, RAM)])
        self.kick = EventFd()
        make = MockPackedDriver if case.layout == "packed" else MockSplitDriver
        self.driver = driver = make(
            memory, case.size, arena=Arena(memory), event_idx=True, in_order=case.in_order
        )
        features = bits.mask(bits.VIRTIO_F_INDIRECT_DESC, bits.VIRTIO_F_EVENT_IDX)
        features |= case.in_order << bits.VIRTIO_F_IN_ORDER
        features |= (case.layout == "packed") << bits.VIRTIO_F_RING_PACKED
        parts = (driver.desc_addr, driver.driver_addr, driver.device_addr)
        config = QueueConfig(case.size, case.size, *parts, True)
        self.queue = make_queue(memory, config, features, 0, self.kick)
        self.header = Buffer(driver.arena.alloc(16), 16)
        self.data = [Buffer(driver.arena.alloc(512), 512)] * (case.chain - 2)
        self.status = Buffer(driver.arena.alloc(1), 1)
        self.start = driver.arena.next
        self.costs: list[float] = []

    def round(self) -> None:
        """One batch; what it costs the device goes to `costs`."""
        case, driver, queue = self.case, self.driver, self.queue
        driver.arena.next = self.start  # tables of a round before are not needed any more
        for _ in range(case.batch):
            driver.add([self.header], [*self.data, self.status], indirect=case.indirect)
        driver.interrupt_after(case.batch)
        driver.publish()
        clock = time.perf_counter_ns
        begin = clock()
        for chain in queue:
            queue.add_used(chain, chain.writable_size)
        wanted = queue.publish_used()
        self.costs.append((clock() - begin) / case.batch)
        assert wanted, "the driver has asked for an interrupt"
        assert sum(1 for _ in iter(driver.pop_used, None)) == case.batch

    def close(self) -> float:
        """Nanoseconds per chain."""
        self.memory.close()
        self.kick.close()
        return sorted(self.costs)[len(self.costs) // 10]


def measure(case: Case, rounds: int, *makers: MakeQueue) -> list[float]:
    """Nanoseconds per chain of the queues that each of `makers` makes, which take turns."""
    rigs = [Rig(case, make) for make in makers or (build_queue,)]
    gc.disable()
    for _ in range(rounds):
        for rig in rigs:
            rig.round()
    gc.enable()
    return [rig.close() for rig in rigs]


# --- what the checks cost -------------------------------------------------------------------------

MODULES = ("ring", "split", "packed")  # in the order of their imports
CHECKED = [
    *(Case(layout, indirect=indirect) for layout in LAYOUTS for indirect in (True, False)),
    *(Case(layout, chain=64, batch=16) for layout in LAYOUTS),
]


class _WithoutChecks(ast.NodeTransformer):
    """Takes out each `if` that only raises a DriverError, and counts them."""

    removed = 0

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        if len(node.body) == 1 and _is_refusal(node.body[0]):
            self.removed += 1
            return node.orelse or ast.copy_location(ast.Pass(), node)
        return node


def _is_refusal(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Raise) or not isinstance(statement.exc, ast.Call):
        return False
    made_by = statement.exc.func
    name = made_by.id if isinstance(made_by, ast.Name) else getattr(made_by, "attr", "")
    return name in ("DriverError", "_again")


def without_checks() -> tuple[dict[str, MakeQueue], int]:
    """The queues of both layouts without checks, and how many there were."""
    names = [f"pyvmm.virtio.queue.{module}" for module in MODULES]
    kept = {name: sys.modules[name] for name in names if name in sys.modules}
    transformer = _WithoutChecks()
    try:
        for name in names:
            spec = importlib.util.find_spec(name)
            assert spec is not None and spec.origin is not None
            tree = transformer.visit(ast.parse(Path(spec.origin).read_text()))
            stripped = ModuleType(name)
            sys.modules[name] = stripped
            exec(compile(ast.fix_missing_locations(tree), spec.origin, "exec"), vars(stripped))
        makers = {
            "split": sys.modules["pyvmm.virtio.queue.split"].SplitQueue,
            "packed": sys.modules["pyvmm.virtio.queue.packed"].PackedQueue,
        }
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(kept)
    return makers, transformer.removed


# --- several queues -------------------------------------------------------------------------------

IMAGE = 64 << 20
BATCH = 32


def measure_queues(layout: str, queues: int, size: int, rounds: int) -> float:
    """Nanoseconds per read of `size` bytes with `queues` queues at work."""
    image = ImageFile("the image", create_memfd("bench", IMAGE), IMAGE, False)
    features = bits.ring_features(packed=layout == "packed")
    device = BlockDevice(
        FileBackend(image), name="bench", num_queues=queues, ring_features=features
    )
    costs = []
    ring: Any = layout
    with attached(device, ring=ring, ram=RAM) as driver:
        mmio, arena = driver.mmio, driver.mmio.arena
        data, status = Buffer(arena.alloc(size), size), Buffer(arena.alloc(1), 1)
        # Not one after the other on the disk, or they would be one system call.
        headers = [Buffer(arena.alloc(16), 16) for _ in range(BATCH)]
        for number, header in enumerate(headers):
            sector = number * 7 % BATCH * 2 * size // 512
            driver.memory.write(header.addr, struct.pack("<LLQ", 0, 0, sector))
        start = arena.next
        for _ in range(rounds):
            arena.next = start
            for queue in mmio.queues:
                for header in headers:
                    queue.add([header], [data, status], indirect=True)
                queue.interrupt_after(BATCH)
                queue.publish()
            interrupts = driver.irq.count + queues
            begin = time.perf_counter_ns()
            for index in range(queues):
                mmio.kick(index)
            mmio.wait_interrupt(interrupts)
            costs.append((time.perf_counter_ns() - begin) / (queues * BATCH))
            for queue in mmio.queues:
                assert sum(1 for _ in iter(queue.pop_used, None)) == BATCH
    image.close()
    return sorted(costs)[len(costs) // 10]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--rounds", type=int, default=300, help="for each row")
    options = parser.parse_args()
    rows = print_cases(options.rounds) + print_checks(options.rounds) + print_queues(options.rounds)
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "queues", "rows": rows}, indent=2))


def print_cases(rounds: int) -> list[dict[str, object]]:
    """Each of CASES, as a table; its rows."""
    print("layout  table   chain  batch   size  in order   ns per chain")
    rows: list[dict[str, object]] = []
    for case in dict.fromkeys(CASES):
        [cost] = map(round, measure(case, rounds))
        rows.append({**case._asdict(), "ns": cost})
        table = "yes" if case.indirect else "no"
        order = "yes" if case.in_order else "no"
        print(
            f"{case.layout:7} {table:7} {case.chain:5} {case.batch:6} {case.size:6}  {order:8}"
            f" {cost:14,}"
        )
    return rows


def print_checks(rounds: int) -> list[dict[str, object]]:
    """Print the cost of the checks, as a table; return its rows."""
    makers, removed = without_checks()
    print(f"\nChecks: with and without {removed} of them\n")
    print("layout  table   chain  batch   ns per chain  without")
    rows: list[dict[str, object]] = []
    for case in CHECKED:
        costs = measure(case, rounds, build_queue, makers[case.layout])
        checked, unchecked = map(round, costs)
        rows.append({**case._asdict(), "ns": checked, "ns_without_checks": unchecked})
        table = "yes" if case.indirect else "no"
        print(
            f"{case.layout:7} {table:7} {case.chain:5} {case.batch:6} {checked:14,} {unchecked:8,}"
        )
    return rows


def print_queues(rounds: int) -> list[dict[str, object]]:
    """Reads by 1 to 4 queues, as a table; its rows."""
    print("\nQueues: thousands of reads a second\n")
    print("layout    bytes  1 queue  2 queues  3 queues  4 queues")
    rows: list[dict[str, object]] = []
    for layout in LAYOUTS:
        for size in (4096, 128 << 10):
            costs = [measure_queues(layout, count, size, rounds) for count in (1, 2, 3, 4)]
            rows += [
                {"layout": layout, "queues": count, "size": size, "ns": round(cost)}
                for count, cost in enumerate(costs, start=1)
            ]
            rates = "".join(f"{1e6 / cost:10.0f}" for cost in costs)
            print(f"{layout:7} {size:7}{rates[1:]}")
    return rows


if __name__ == "__main__":
    main()
