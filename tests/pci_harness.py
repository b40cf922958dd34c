"""A virtio-pci device with nothing behind it, and the hand of mmio_harness: what stands in a
virtio-mmio register is poked where virtio-pci has it."""

from __future__ import annotations

from mmio_harness import CONFIG, Bench

from pyvmm.bus import Handler
from pyvmm.testing.attached import WINDOW, on_a_bus
from pyvmm.testing.mmio_driver import InterruptLine
from pyvmm.testing.pci_driver import CONFIG_VECTOR, DEVICE_CFG, QUEUE_VECTOR, MockLine
from pyvmm.transport.base import Transport
from pyvmm.transport.pci import PciTransport, vectors_for
from pyvmm.virtio.lifecycle import Trace


class PciBench(Bench):
    """See Bench. Its function decodes, is a bus master and has MSI-X on; each event that is given a
    queue gets vector 0, so that one edge counts for all."""

    def _attach(self, trace: Trace | None) -> Transport:
        line = _Line(self)
        self.vectors = [MockLine(line) for _ in range(vectors_for(self.device))]
        transport = PciTransport(
            self.device, self.memory, self.vectors, log=self.lines.append, trace=trace
        )
        self.bus, self.driver = on_a_bus(transport, self.memory, irq=line)
        self.driver.find()
        self.driver.place(WINDOW)
        self.registers: Handler = _Registers(self)
        self.driver.program_vectors()
        return transport


class _Line(InterruptLine):
    """Counts edges of a bench."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self._bench = bench

    def __call__(self) -> None:
        super().__call__()
        self._bench.edge()


class _Registers:
    """The value that virtio-mmio has at an offset, of this device."""

    def __init__(self, bench: PciBench) -> None:
        self._bench = bench

    def read(self, offset: int, size: int) -> int:
        driver = self._bench.driver
        if offset >= CONFIG:
            return driver.registers.read(driver.access(DEVICE_CFG, offset - CONFIG), size)
        assert size == 4, "other widths are another test's"
        return driver.read(offset)

    def write(self, offset: int, size: int, value: int) -> None:
        driver = self._bench.driver
        if offset >= CONFIG:
            driver.registers.write(driver.access(DEVICE_CFG, offset - CONFIG), size, value)
            return
        assert size == 4, "other widths are another test's"
        # A reset forgets them.
        driver.set_field(CONFIG_VECTOR, 0)
        driver.set_field(QUEUE_VECTOR, 0)
        driver.write(offset, value)


OVER = {"mmio": Bench, "pci": PciBench}
