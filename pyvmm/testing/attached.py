"""A device on a real transport with a mock driver in front: no KVM, no guest.

    with attached(MyDevice()) as driver:
        assert driver.request([b"question"], [64]).data == b"answer"

This module alone joins the two sides; the drivers know nothing of the code that they test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

from pyvmm.memory import GuestMemory
from pyvmm.pci.bus import PciBus
from pyvmm.pci.function import Placement
from pyvmm.testing.mmio_driver import Doorbell, InterruptLine, IrqFd, MmioDriver, Ring
from pyvmm.testing.pci_driver import MockLine, PciDriver
from pyvmm.testing.ring import Buffer, MockDriver
from pyvmm.transport.base import Transport
from pyvmm.transport.mmio import MmioTransport
from pyvmm.transport.pci import PciTransport, vectors_for
from pyvmm.virtio.device import VirtioDevice

MIB = 1 << 20
WINDOW, WINDOW_SIZE = 0xC000_0000, 0x1000_0000  # where BARs go, on a mock driver's bus
SLOT = 1

Over = Literal["mmio", "pci"]


def on_a_bus(
    transport: PciTransport,
    memory: GuestMemory,
    *,
    placement: Placement | None = None,
    irq: InterruptLine | None = None,
    kicks: Sequence[Doorbell] = (),
    ring: Ring = "split",
) -> tuple[PciBus, PciDriver]:
    """A bus with the function of `transport` at `SLOT`, and a driver that has yet to find it. The
    transport itself learns of the function's BARs, unless there is another `placement`."""
    bus = PciBus(WINDOW, WINDOW_SIZE)
    transport.function.placement = placement or transport
    bus.add(SLOT, transport.function)
    return bus, PciDriver(
        *(bus.ecam, bus.window, WINDOW, SLOT, memory), irq=irq, kicks=kicks, ring=ring
    )


class Answer(NamedTuple):
    """The result of a request: `data` is what the device wrote, `written` its length as the
    used element has it, `buffers` all of the writable buffers, joined."""

    data: bytes
    written: int
    buffers: bytes


class AttachedDriver:
    """A driver that has brought a device up.

    `log` holds the lines that the device's transport logged, `memory` is the guest's, `irq` counts
    its interrupts; `mmio` is the driver underneath, for registers and rings.
    """

    def __init__(
        self, device: VirtioDevice, ring: Ring, ram: int, *, irqfd: bool, over: Over = "mmio"
    ) -> None:
        self.device = device
        self.memory = GuestMemory([(0, ram)])
        self.log: list[str] = []
        self.irq = InterruptLine()
        self._irqfd = IrqFd(self.irq) if irqfd else None
        self.transport: Transport
        self.mmio: MmioDriver
        if over == "pci":
            self._attach_pci(ring)
        else:
            self._attach_mmio(ring)

    def _attach_mmio(self, ring: Ring) -> None:
        self.transport = MmioTransport(
            self.device,
            self.memory,
            self.irq,
            irq_eventfd=None if self._irqfd is None else self._irqfd.eventfd,
            log=self.log.append,
        )
        self.mmio = MmioDriver(self.transport.registers, self.memory, irq=self.irq, ring=ring)

    def _attach_pci(self, ring: Ring) -> None:
        lines = [MockLine(self.irq) for _ in range(vectors_for(self.device))]
        transport = PciTransport(self.device, self.memory, lines, log=self.log.append)
        self.transport = transport
        _, driver = on_a_bus(transport, self.memory, irq=self.irq, ring=ring)
        driver.find()
        driver.place(WINDOW)
        self.mmio = driver

    def request(
        self,
        readable: Sequence[bytes | Buffer] = (),
        writable: Sequence[int | Buffer] = (),
        *,
        queue: int = 0,
        indirect: bool = False,
    ) -> Answer:
        """Give the device one chain of buffers, and wait until it returns it.

        `readable` are the contents of those that it may read, `writable` the lengths of those that
        it may write. Raises DriverTimeout, an AssertionError, if the device does not answer or asks
        for a reset.
        """
        written, buffers = self.mmio.request(queue, readable, writable, indirect=indirect)
        return Answer(buffers[:written], written, buffers)

    def config(self, offset: int, length: int) -> bytes:
        """Bytes of the device's configuration space."""
        return self.mmio.config(offset, length)

    @property
    def features(self) -> int:
        """The feature bits that were negotiated."""
        return self.mmio.features

    @property
    def needs_reset(self) -> bool:
        """True if the device has asked for a reset; `log` says why."""
        return self.mmio.needs_reset

    @property
    def queues(self) -> list[MockDriver]:
        """The driver's ends of the device's queues: for chains of your own making."""
        return self.mmio.queues

    def kick(self, queue: int = 0) -> None:
        """Notify the device of a queue."""
        self.mmio.kick(queue)

    def restart(self, *, features: int | None = None) -> None:
        """Reset the device and bring it up again, as a driver does that is loaded anew. Memory
        that was allocated before is not used again."""
        self.mmio.start(features=features)

    def close(self) -> None:
        """Reset the device and give everything back."""
        self.transport.close()
        self.mmio.queues = []
        if self._irqfd is not None:
            self._irqfd.close()
        self.memory.close()


@contextmanager
def attached(
    device: VirtioDevice,
    *,
    ring: Ring = "split",
    features: int | None = None,
    queue_sizes: Sequence[int] | None = None,
    start: bool = True,
    ram: int = MIB,
    irqfd: bool = False,
    over: Over = "mmio",
) -> Iterator[AttachedDriver]:
    """Attach `device` to a transport and bring it up with a driver; it is reset at the end.

    `ring` is ``"split"`` or ``"packed"``, `features` the bits to accept (all that are offered
    unless given), `queue_sizes` one size for each queue (the largest unless given, 0 for a queue to
    leave alone), `ram` bytes of guest memory. Without `start` the device is left as after reset.
    With `irqfd` it can be interrupted by an eventfd too, for a device that the kernel serves.
    `over` is the transport, ``"mmio"`` or ``"pci"``; the latter always has eventfds.
    """
    driver = AttachedDriver(device, ring, ram, irqfd=irqfd, over=over)
    try:
        if start:
            driver.mmio.start(features=features, queue_sizes=queue_sizes)
        yield driver
    finally:
        driver.close()
