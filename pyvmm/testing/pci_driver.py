"""A virtio-pci driver for tests: it finds a device by configuration space, places its BAR, programs
MSI-X and uses its queues (virtio 1.3, 4.1.5 PCI-specific Initialization And Device Operation).

    bus = PciBus(0xC000_0000, 0x1000_0000)
    bus.add(1, transport.function)
    driver = PciDriver(bus.ecam, bus.window, 0xC000_0000, 1, memory, irqs=lines)
    driver.start()
    written, data = driver.request(0, [header], [512, 1])

What differs from virtio-mmio is where a register is; so registers go by the names, which are the
offsets, of `pyvmm.testing.mmio_driver`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing import mmio_driver as mmio
from pyvmm.testing.mmio_driver import Doorbell, InterruptLine, MmioDriver, Registers, Ring
from pyvmm.testing.ring import Arena, MockDriver

VENDOR = 0x1AF4
COMMAND, CLASS, BAR0, CAPABILITIES = 0x04, 0x08, 0x10, 0x34
MEMORY, BUS_MASTER = 2, 4  # bits of the command register
CAP_VENDOR, CAP_EXPRESS, CAP_MSIX = 0x09, 0x10, 0x11
COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = 1, 2, 3, 4, 5
NO_VECTOR = 0xFFFF
MSIX_ENABLE, MSIX_MASKALL = 0x8000, 0x4000
ADDRESS = 0xFEE0_0000  # of the messages that this driver asks for

# virtio-mmio's register → the field of struct virtio_pci_common_cfg and its width.
_FIELDS = {
    mmio.DEVICE_FEATURES_SEL: (0x00, 4),
    mmio.DEVICE_FEATURES: (0x04, 4),
    mmio.DRIVER_FEATURES_SEL: (0x08, 4),
    mmio.DRIVER_FEATURES: (0x0C, 4),
    mmio.STATUS: (0x14, 1),
    mmio.CONFIG_GENERATION: (0x15, 1),
    mmio.QUEUE_SEL: (0x16, 2),
    mmio.QUEUE_SIZE_MAX: (0x18, 2),
    mmio.QUEUE_SIZE: (0x18, 2),
    mmio.QUEUE_READY: (0x1C, 2),
    mmio.QUEUE_DESC: (0x20, 4),
    mmio.QUEUE_DESC + 4: (0x24, 4),
    mmio.QUEUE_DRIVER: (0x28, 4),
    mmio.QUEUE_DRIVER + 4: (0x2C, 4),
    mmio.QUEUE_DEVICE: (0x30, 4),
    mmio.QUEUE_DEVICE + 4: (0x34, 4),
    mmio.QUEUE_RESET: (0x3A, 2),
}
CONFIG_VECTOR, NUM_QUEUES, QUEUE_VECTOR, NOTIFY_OFF = (0x10, 2), (0x12, 2), (0x1A, 2), (0x1E, 2)


class Structure(NamedTuple):
    """The place that a capability gives for a structure: `offset` into BAR `bar`, `length`
    bytes."""

    at: int
    bar: int
    offset: int
    length: int


class PciDriver(MmioDriver):
    """Drives the function at device number `device`; its BAR goes to guest-physical `address`."""

    def __init__(
        self,
        config: Registers,
        window: Registers,
        window_base: int,
        device: int,
        memory: GuestMemory,
        *,
        address: int | None = None,
        irq: InterruptLine | None = None,
        kicks: Sequence[Doorbell] = (),
        arena: Arena | None = None,
        ring: Ring = "split",
    ) -> None:
        """`config` is the bus's ECAM, `window` where BARs answer, from `window_base` on. Without
        `kicks` it writes to the notification structure."""
        super().__init__(window, memory, irq=irq, kicks=kicks, arena=arena, ring=ring)
        self._config = config
        self._device = device
        self._base = window_base
        self.address = window_base if address is None else address
        self.structures: dict[int, Structure] = {}
        self.msix = Structure(0, 0, 0, 0)
        self.multiplier = 0
        self._isr = 0

    # --- configuration space ---------------------------------------------------------------------

    def read_config(self, offset: int, size: int) -> int:
        """A field of the function's configuration space."""
        return self._config.read(self._device << 15 | offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write a field of the function's configuration space."""
        self._config.write(self._device << 15 | offset, size, value)

    def capabilities(self) -> list[tuple[int, int]]:
        """The ID and place of each capability, in the list's order."""
        found: list[tuple[int, int]] = []
        at = self.read_config(CAPABILITIES, 1)
        while at:
            assert at % 4 == 0 and at >= 0x40 and len(found) < 48, "a broken list"
            found.append((self.read_config(at, 1), at))
            at = self.read_config(at + 1, 1)
        return found

    def find(self) -> None:
        """Look the function over, as 4.1.4 Virtio Structure PCI Capabilities tells."""
        assert self.read_config(0, 2) == VENDOR, "no virtio-pci device here"
        assert self.read_config(2, 2) >= 0x1040 and self.read_config(CLASS, 1) >= 1
        for kind, at in self.capabilities():
            if kind == CAP_VENDOR:
                places = [self.read_config(at + 4, 1)]
                places += [self.read_config(at + where, 4) for where in (8, 12)]
                self.structures.setdefault(self.read_config(at + 3, 1), Structure(at, *places))
            elif kind == CAP_MSIX:
                table = self.read_config(at + 4, 4)
                count = (self.read_config(at + 2, 2) & 0x7FF) + 1
                self.msix = Structure(at, table & 7, table & ~7, 16 * count)
        self.multiplier = self.read_config(self.structures[NOTIFY_CFG].at + 16, 4)

    def place(self, address: int, command: int = MEMORY | BUS_MASTER) -> None:
        """Give BAR 0 an address, and turn on what `command` says."""
        self.address = address
        self.write_config(COMMAND, 2, 0)
        self.write_config(BAR0, 4, address & 0xFFFF_FFFF)
        self.write_config(BAR0 + 4, 4, address >> 32)
        self.write_config(COMMAND, 2, command)

    # --- registers -------------------------------------------------------------------------------

    def access(self, kind: int, offset: int) -> int:
        """The place, in the window, of byte `offset` of a structure."""
        return self.address - self._base + self.structures[kind].offset + offset

    def field(self, place: tuple[int, int]) -> int:
        """A field of the common configuration structure."""
        return self.registers.read(self.access(COMMON_CFG, place[0]), place[1])

    def set_field(self, place: tuple[int, int], value: int) -> None:
        """Write a field of the common configuration structure."""
        self.registers.write(self.access(COMMON_CFG, place[0]), place[1], value)

    def read(self, offset: int) -> int:
        if offset == mmio.INTERRUPT_STATUS:
            # A read clears it; what is not acknowledged yet must not be lost to the caller.
            self._isr |= self.registers.read(self.access(ISR_CFG, 0), 1)
            return self._isr
        if offset == mmio.QUEUE_SIZE_MAX and self.field((0x1C, 2)):
            raise AssertionError("the largest size can be read of a fresh queue only")
        return self.field(_FIELDS[offset])

    def write(self, offset: int, value: int) -> None:
        if offset == mmio.INTERRUPT_ACK:
            self._isr &= ~value
        elif offset == mmio.QUEUE_NOTIFY:
            self.notify(value)
        else:
            if offset == mmio.STATUS and not value:
                self._isr = 0
            self.set_field(_FIELDS[offset], value)

    def notify(self, index: int) -> None:
        """4.1.5.2 Available Buffer Notifications."""
        self.set_field(_FIELDS[mmio.QUEUE_SEL], index)
        offset = self.field(NOTIFY_OFF) * self.multiplier
        self.registers.write(self.access(NOTIFY_CFG, offset), 2, index)

    def config(self, offset: int, length: int) -> bytes:
        at = self.access(DEVICE_CFG, offset)
        return bytes(self.registers.read(at + i, 1) for i in range(length))

    # --- initialisation --------------------------------------------------------------------------

    def negotiate(self, features: int | None = None) -> None:
        self.find()
        if not self.read_config(COMMAND, 2) & MEMORY:
            self.place(self.address)
        self.reset()
        self.agree(features)
        self.program_vectors()

    def program_vectors(self) -> None:
        """4.1.5.1.2 MSI-X Vector Configuration: a message for each vector, and the first one for
        changes of the configuration."""
        self.write_config(self.msix.at + 2, 2, MSIX_ENABLE | MSIX_MASKALL)
        for vector in range(self.vectors):
            self.program(vector, vector)
        self.write_config(self.msix.at + 2, 2, MSIX_ENABLE)
        self.set_field(CONFIG_VECTOR, 0)

    @property
    def vectors(self) -> int:
        """The number of vectors."""
        return self.msix.length // 16

    def _enable(self, index: int, queue: MockDriver) -> None:
        self.set_field(_FIELDS[mmio.QUEUE_SEL], index)
        # One of its own, if there are enough.
        self.set_field(QUEUE_VECTOR, index + 1 if index + 1 < self.vectors else 0)
        super()._enable(index, queue)

    def program(self, vector: int, data: int, control: int = 0) -> None:
        """Fill in an entry of the MSI-X table."""
        at = self.address - self._base + self.msix.offset + 16 * vector
        for word, value in ((12, 1), (0, ADDRESS), (4, 0), (8, data), (12, control)):
            self.registers.write(at + word, 4, value)


class MockLine(EventFd):
    """The machine's line for a vector: signals interrupt `irq` once the line is connected."""

    def __init__(self, irq: InterruptLine) -> None:
        super().__init__()
        self._irq = irq
        self.message: tuple[int, int] | None = None
        self.sent: list[int] = []

    @property
    def eventfd(self) -> EventFd:
        """Itself."""
        return self

    @property
    def pending(self) -> bool:
        """True if a signal waits."""
        return self.is_signalled

    def wait(self) -> None:
        """Have a signal wait."""
        self.signal()

    def connect(self, address: int, data: int) -> None:
        """Send `data` for each signal from now on, and once for those that wait."""
        assert address == ADDRESS, f"a message to {address:#x}"
        self.message = address, data
        if self.drain():
            self._send(data)

    def disconnect(self) -> None:
        """Signals wait from now on."""
        self.message = None

    def signal(self) -> None:
        """The device interrupts."""
        message = self.message
        if message is None:
            super().signal()
        else:
            self._send(message[1])

    def _send(self, data: int) -> None:
        self.sent.append(data)
        self._irq()
