"""A balloon device on the real transport with a mock driver in front."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pyvmm.memory import GuestMemory
from pyvmm.testing import Arena, Buffer, InterruptLine, MmioDriver
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio.balloon.device import BalloonDevice

MIB = 1 << 20
PAGE = 4096
RAM_END = 8 * MIB  # where the hole begins
HIGH = 1 << 32
INFLATE, DEFLATE, STATS, HINT, REPORTING = range(5)
STAT = struct.Struct("<HQ")


@dataclass
class Rig:
    """A running balloon; `lines` are what it logged."""

    device: BalloonDevice
    memory: GuestMemory
    driver: MmioDriver
    irq: InterruptLine
    lines: list[str] = field(default_factory=list)

    def fill(self, addr: int, size: int) -> None:
        """Put something there that is not zero, in memory of the host's."""
        self.memory.write(addr, b"\xa5" * size)

    def is_gone(self, addr: int, size: int) -> bool:
        """True if all of it reads as zero."""
        return not any(self.memory.read(addr, size))

    def blocks(self) -> int:
        """Bytes that the host has given to guest memory, as the file system counts them."""
        assert self.memory.resident == os.fstat(self.memory.fd).st_blocks * 512
        return self.memory.resident

    def pages(self, queue: int, numbers: list[int]) -> None:
        """Inflate or deflate by these page numbers."""
        assert self.driver.request(queue, [struct.pack(f"<{len(numbers)}L", *numbers)])[0] == 0

    def report(self, *ranges: Buffer) -> None:
        """Report free memory, wherever it is said to be."""
        chain = self.driver.submit(REPORTING, [], ranges)
        assert self.driver.wait_used(REPORTING, chain).written == 0

    def said(self) -> dict[str, int]:
        """The statistics that the device has, without asking the driver for new ones."""
        return self.device._statistics

    def config(self) -> tuple[int, ...]:
        """num_pages, actual, free_page_hint_cmd_id, poison_val."""
        return struct.unpack("<LLLL", self.driver.config(0, 16))

    def write_config(self, offset: int, value: int) -> None:
        self.driver.registers.write(0x100 + offset, 4, value)


@contextmanager
def running(
    *,
    target: int = 0,
    reporting: bool = True,
    deflate_on_oom: bool = False,
    features: int | None = None,
    start: bool = True,
) -> Iterator[Rig]:
    """A balloon brought up by a driver, whose rings and buffers lie in the first MiB."""
    memory = GuestMemory([(0, RAM_END), (HIGH, 4 * MIB)])
    lines: list[str] = []
    device = BalloonDevice(
        target=target, reporting=reporting, deflate_on_oom=deflate_on_oom, log=lines.append
    )
    irq = InterruptLine()
    transport = MmioTransport(device, memory, irq, log=lines.append)
    driver = MmioDriver(transport, memory, irq=irq, arena=Arena(memory, end=2 * MIB))
    rig = Rig(device, memory, driver, irq, lines)
    try:
        if start:
            driver.start(features=features)
        yield rig
    finally:
        device.reset()
        transport.close()
        memory.close()
