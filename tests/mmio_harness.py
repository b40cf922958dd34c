"""A virtio-mmio device with nothing behind it, and a hand that pokes its registers.

Offsets and bits are typed here a second time, on purpose: what is under test must not be measured
with its own table.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from threading import Event

import pytest

from pyvmm.bus import Handler
from pyvmm.errors import PyvmmError
from pyvmm.host.poller import Poller
from pyvmm.memory import GuestMemory
from pyvmm.transport.base import Transport
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio.device import Activation, VirtioDevice
from pyvmm.virtio.lifecycle import Trace
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.worker import QueueDevice

MAGIC, VERSION, DEVICE_ID, VENDOR_ID = 0x00, 0x04, 0x08, 0x0C
DEVICE_FEATURES, DEVICE_FEATURES_SEL = 0x10, 0x14
DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x20, 0x24
QUEUE_SEL, QUEUE_SIZE_MAX, QUEUE_SIZE, QUEUE_READY, QUEUE_NOTIFY = 0x30, 0x34, 0x38, 0x44, 0x50
INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x60, 0x64, 0x70
DESC_LOW, DESC_HIGH, DRIVER_LOW, DRIVER_HIGH, DEVICE_LOW, DEVICE_HIGH = (
    0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4,
)  # fmt: skip
SHM_SEL, SHM_LEN_LOW, SHM_LEN_HIGH, SHM_BASE_LOW, SHM_BASE_HIGH = 0xAC, 0xB0, 0xB4, 0xB8, 0xBC
QUEUE_RESET, CONFIG_GENERATION, CONFIG = 0xC0, 0xFC, 0x100

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
DRIVEN, AGREED, LIVE = 3, 11, 15

DEVICE_BIT = 1 << 5  # a feature of the device type's own
EVENT_IDX = 1 << 29
VERSION_1 = 1 << 32

RAM = 1 << 20
DESC, AVAIL, USED, DATA = 0x1000, 0x3000, 0x4000, 0x8000


class RecordingDevice(VirtioDevice):
    """Remembers what the transport asked of it."""

    name = "dev0"
    device_type = 2
    queue_sizes = (256, 64)
    features = DEVICE_BIT | EVENT_IDX

    def __init__(self) -> None:
        self.config = bytearray(range(1, 17))
        self.activation: Activation | None = None
        self.activations = 0
        self.resets = 0
        self.config_writes: list[tuple[int, bytes]] = []
        self.accepted: list[int] = []
        self.activate_error: Exception | None = None
        self.reset_error: PyvmmError | None = None

    @property
    def live(self) -> Activation:
        """The activation; fails the test if there is none."""
        assert self.activation is not None
        return self.activation

    def read_config(self, offset: int, length: int) -> bytes:
        return bytes(self.config[offset : offset + length]).ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        self.config_writes.append((offset, data))

    def accept_features(self, features: int) -> None:
        self.accepted.append(features)

    def activate(self, activation: Activation) -> None:
        self.activations += 1
        self.activation = activation
        if self.activate_error is not None:
            raise self.activate_error

    def reset(self) -> None:
        self.resets += 1
        if self.reset_error is not None:
            raise self.reset_error
        self.activation = None


class SlowDevice(QueueDevice):
    """Serves one request at a time, and not before the test lets it; then writes 4 bytes of it."""

    name = "slow0"
    device_type = 2
    queue_sizes = (256,)

    def __init__(self) -> None:
        self.started = Event()
        self.release = Event()
        self.passes = 0

    def serve(self, queue: Queue) -> None:
        self.passes += 1
        for chain in queue:
            self.started.set()
            self.release.wait(60)
            writer = chain.writer()
            writer.write(b"done")
            queue.add_used(chain, 4)


class Bench:
    """A device on its transport, with RAM, an interrupt line that counts edges, and a log."""

    def __init__(self, device: VirtioDevice, *, trace: bool = False) -> None:
        self.memory = GuestMemory([(0, RAM)])
        self.device = device
        self.edges = 0
        self.at_edge: Callable[[], object] = lambda: None
        self.lines: list[str] = []
        self.events: list[object] = []
        self.transport = self._attach(self.events.append if trace else None)
        self.negotiation = self.transport.negotiation

    def _attach(self, trace: Trace | None) -> Transport:
        transport = MmioTransport(
            self.device, self.memory, self.edge, log=self.lines.append, trace=trace
        )
        self.registers: Handler = transport.registers
        return transport

    def edge(self) -> None:
        self.edges += 1
        self.at_edge()

    def read(self, offset: int, size: int = 4) -> int:
        return self.registers.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        assert self.registers.write(offset, size, value) is None

    @property
    def status(self) -> int:
        return self.read(STATUS)

    @property
    def interrupt_status(self) -> int:
        return self.read(INTERRUPT_STATUS)

    def accept(self, features: int) -> None:
        """Write both halves of the driver's features."""
        for word in (0, 1):
            self.write(DRIVER_FEATURES_SEL, word)
            self.write(DRIVER_FEATURES, features >> 32 * word & 0xFFFF_FFFF)

    def offered(self) -> int:
        """Read both halves of the device's features."""
        found = 0
        for word in (0, 1):
            self.write(DEVICE_FEATURES_SEL, word)
            found |= self.read(DEVICE_FEATURES) << 32 * word
        return found

    def negotiate(self, features: int = VERSION_1) -> None:
        """Steps 1 to 6 of 3.1.1."""
        self.write(STATUS, 0)
        self.write(STATUS, ACKNOWLEDGE)
        self.write(STATUS, DRIVEN)
        self.accept(features)
        self.write(STATUS, AGREED)

    def place_queue(
        self, index: int = 0, size: int = 16, desc: int = DESC, avail: int = AVAIL, used: int = USED
    ) -> None:
        """Write a queue's size and addresses."""
        self.write(QUEUE_SEL, index)
        self.write(QUEUE_SIZE, size)
        for low, high, addr in (
            (DESC_LOW, DESC_HIGH, desc),
            (DRIVER_LOW, DRIVER_HIGH, avail),
            (DEVICE_LOW, DEVICE_HIGH, used),
        ):
            self.write(low, addr & 0xFFFF_FFFF)
            self.write(high, addr >> 32)

    def enable_queue(self, index: int = 0, size: int = 16) -> None:
        self.place_queue(index, size)
        self.write(QUEUE_READY, 1)

    def go_live(self, features: int = VERSION_1) -> None:
        """All of 3.1.1, with queue 0 enabled."""
        self.negotiate(features)
        self.enable_queue()
        self.write(STATUS, LIVE)

    # --- the driver's side of queue 0, just enough of it -----------------------------------------

    def offer_buffer(self, position: int) -> None:
        """Make a writable buffer of 4 bytes available, the `position`-th since the queue began."""
        head = position % 16
        self.memory.write(DESC + 16 * head, struct.pack("<QIHH", DATA + 4 * head, 4, 2, 0))
        self.memory.write(AVAIL + 4 + 2 * head, struct.pack("<H", head))
        self.memory.write(AVAIL + 2, struct.pack("<H", position + 1))

    def used_index(self) -> int:
        index: int = struct.unpack("<H", self.memory.read(USED + 2, 2))[0]
        return index

    def rings(self) -> bytes:
        """Everything a device could change of queue 0 and its buffers."""
        return self.memory.read(DESC, DATA + 64 - DESC)


def workers(device: VirtioDevice) -> list[str]:
    """The threads that serve the device's queues now. Without one, nobody touches a ring."""
    names = (thread.name for thread in threading.enumerate())
    return [name for name in names if name.startswith(f"{device.name}-q")]


class Naps:
    """Counts how often workers went to sleep and woke up, for tests in which nothing may happen.

    After `settle(n)` a worker has looked at what the n-th wake-up was for, and sleeps again.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        self.ended = 0
        wait = Poller.wait

        def counted(poller: Poller, seconds: float | None = None) -> None:
            self.begun += 1
            wait(poller, seconds)
            self.ended += 1

        monkeypatch.setattr(Poller, "wait", counted)

    def settle(self, wake_ups: int) -> None:
        """Wait until the one worker there is has woken up so often, and sleeps."""
        wait_for(lambda: self.ended == wake_ups and self.begun == wake_ups + 1)


def wait_for(condition: Callable[[], bool]) -> None:
    """Until `condition` holds; a test that waits for ever fails by its assertion instead."""
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()
