"""A block device on the real transport with a mock driver in front: what its tests start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rings import offering

from pyvmm.host.files import open_image
from pyvmm.memory import GuestMemory
from pyvmm.testing import InterruptLine, MmioDriver
from pyvmm.testing.blk_driver import OK, BlockDriver
from pyvmm.testing.mmio_driver import F_RING_PACKED, Ring
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio.blk.backend import Backend, FileBackend
from pyvmm.virtio.blk.device import BlockDevice

MIB = 1 << 20
RAM_END = 4 * MIB  # where the hole begins
HIGH = 1 << 32


@dataclass
class Rig:
    """A running disk; `lines` and `events` are what it logged and traced."""

    device: BlockDevice
    transport: MmioTransport
    memory: GuestMemory
    driver: MmioDriver
    disk: BlockDriver
    lines: list[str] = field(default_factory=list)
    events: list[object] = field(default_factory=list)

    def ram(self) -> list[bytes]:
        """All of guest memory, copied."""
        return [bytes(region.view) for region in self.memory.regions]

    def assert_alive(self) -> None:
        """The device still reads, and did not ask for a reset."""
        assert not self.driver.needs_reset
        assert self.disk.read(0, 512).status == OK


def file_backend(path: object, *, read_only: bool = False) -> FileBackend:
    return FileBackend(open_image(str(path), read_only))


ring: Ring = "split"  # over which `running` runs; tests set it
traced = True  # whether `events` are kept; without, usual requests go the short way


@contextmanager
def running(
    backend: Backend, *, features: int | None = None, start: bool = True, **options: object
) -> Iterator[Rig]:
    """A device in front of `backend`, brought up by a driver that accepts `features` (all)."""
    memory = GuestMemory([(0, RAM_END), (HIGH, MIB)])
    lines: list[str] = []
    events: list[object] = []
    arguments = {"name": "vda", "log": lines.append, **options}
    if traced:
        arguments.setdefault("trace", events.append)
    device = BlockDevice(backend, **arguments)  # type: ignore[arg-type]
    offering(ring, device)
    irq = InterruptLine()
    transport = MmioTransport(device, memory, irq, log=lines.append)
    if features is not None and ring == "packed":
        features |= F_RING_PACKED
    driver = MmioDriver(transport, memory, irq=irq, ring=ring)
    rig = Rig(device, transport, memory, driver, BlockDriver(driver), lines, events)
    try:
        if start:
            driver.start(features=features)
        yield rig
    finally:
        device.reset()
        transport.close()
        backend.close()
        memory.close()
