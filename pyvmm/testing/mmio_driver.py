"""A virtio-mmio driver for tests: initialises a device through its registers and uses its queues.

It follows virtio 1.3, 4.2.3.1 Device Initialization and 3.1.1 Driver Requirements: Device
Initialization, against anything with `read(offset, size)` and `write(offset, size, value)`:

    irq = InterruptLine()
    transport = MmioTransport(device, memory, irq)
    driver = MmioDriver(transport, memory, irq=irq)
    driver.start()
    written, data = driver.request(0, [header], [512, 1])
    driver.reset()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from select import POLLIN, poll
from threading import Condition, Thread
from typing import Literal, Protocol

from pyvmm.host.syscalls import Closable, EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing.mock_driver import MockSplitDriver
from pyvmm.testing.packed_driver import MockPackedDriver
from pyvmm.testing.queue_user import QueueUser
from pyvmm.testing.ring import Arena, MockDriver

MAGIC_VALUE, VERSION, DEVICE_ID = 0x000, 0x004, 0x008
DEVICE_FEATURES, DEVICE_FEATURES_SEL = 0x010, 0x014
DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x020, 0x024
QUEUE_SEL, QUEUE_SIZE_MAX, QUEUE_SIZE, QUEUE_READY = 0x030, 0x034, 0x038, 0x044
QUEUE_NOTIFY, INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x050, 0x060, 0x064, 0x070
QUEUE_RESET, CONFIG_GENERATION = 0x0C0, 0x0FC
QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 0x080, 0x090, 0x0A0  # low half; the high one is at + 4
CONFIG = 0x100

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64
F_INDIRECT_DESC, F_EVENT_IDX, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32
F_RING_PACKED, F_IN_ORDER, F_RING_RESET = 1 << 34, 1 << 35, 1 << 40
Ring = Literal["split", "packed"]
USED_BUFFER, CONFIG_CHANGED = 1, 2  # bits of InterruptStatus

# Long enough for a loaded machine under emulation: reaching it means that something hangs.
SAFETY_TIMEOUT = 60.0


class Registers(Protocol):
    """The device's register window, little-endian."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> object: ...


class Doorbell(Protocol):
    """A stand-in for a write to QueueNotify, as an ioeventfd is one."""

    def signal(self) -> None: ...


class DriverTimeout(AssertionError):
    """The device did not answer; the message shows registers and rings."""


class InterruptLine:
    """Takes the device's interrupts: call it to raise one, `wait` for them, count them."""

    def __init__(self) -> None:
        self._condition = Condition()
        self.count = 0

    def __call__(self) -> None:
        with self._condition:
            self.count += 1
            self._condition.notify_all()

    def wait(self, count: int, timeout: float) -> bool:
        """Wait until there were `count` interrupts in all; False if there were not in time."""
        with self._condition:
            return self._condition.wait_for(lambda: self.count >= count, timeout)


class IrqFd(Closable):
    """A stand-in for KVM's irqfd: each signal of `eventfd` raises an interrupt."""

    def __init__(self, irq: InterruptLine) -> None:
        self.eventfd = EventFd()
        self._irq = irq
        self._stopping = False
        self._thread = Thread(target=self._relay, name="irqfd", daemon=True)
        self._thread.start()

    def _relay(self) -> None:
        waiting = poll()
        waiting.register(self.eventfd, POLLIN)
        while True:
            waiting.poll()
            if self._stopping:
                return
            if self.eventfd.drain():
                self._irq()

    def close(self) -> None:
        """Nobody may signal it any more."""
        self._stopping = True
        self.eventfd.signal()
        self._thread.join()
        self.eventfd.close()


class MmioDriver(QueueUser):
    """Drives one virtio-mmio device. `queues` are its virtqueues once `start` was called."""

    def __init__(
        self,
        registers: Registers,
        memory: GuestMemory,
        *,
        irq: InterruptLine | None = None,
        kicks: Sequence[Doorbell] = (),
        arena: Arena | None = None,
        ring: Ring = "split",
    ) -> None:
        """Without `kicks`, one per queue, kicks are writes to QueueNotify. `ring` is the layout to
        negotiate where `start` is not told which features to accept."""
        self.registers = registers
        self.memory = memory
        self.irq = irq
        self.kicks = kicks
        self.arena = Arena(memory) if arena is None else arena
        self.ring = ring
        super().__init__()
        self.features = 0

    # --- registers -------------------------------------------------------------------------------

    def read(self, offset: int) -> int:
        """A 32-bit register."""
        return self.registers.read(offset, 4)

    def write(self, offset: int, value: int) -> None:
        """Write a 32-bit register."""
        self.registers.write(offset, 4, value)

    @property
    def status(self) -> int:
        """The device status field."""
        return self.read(STATUS)

    @property
    def needs_reset(self) -> bool:
        """True if the device has set DEVICE_NEEDS_RESET."""
        return bool(self.status & NEEDS_RESET)

    def add_status(self, bit: int) -> None:
        """Set one more bit of the device status field."""
        self.write(STATUS, self.status | bit)

    def config(self, offset: int, length: int) -> bytes:
        """Bytes of the configuration space, read one at a time (4.2.2.2 allows it for u8)."""
        return bytes(self.registers.read(CONFIG + offset + i, 1) for i in range(length))

    def offered_features(self) -> int:
        """The 64 feature bits that the device offers."""
        features = 0
        for select in (0, 1):
            self.write(DEVICE_FEATURES_SEL, select)
            features |= self.read(DEVICE_FEATURES) << 32 * select
        return features

    def accept_features(self, features: int) -> None:
        """Write the feature bits that the driver accepts."""
        for select in (0, 1):
            self.write(DRIVER_FEATURES_SEL, select)
            self.write(DRIVER_FEATURES, features >> 32 * select & 0xFFFF_FFFF)

    # --- initialisation --------------------------------------------------------------------------

    def start(
        self, *, features: int | None = None, queue_sizes: Sequence[int] | None = None
    ) -> list[MockDriver]:
        """Initialise the device up to DRIVER_OK; its queues.

        `features` are the bits to accept. Unless given they are all that are offered, but
        VIRTIO_F_IN_ORDER, and VIRTIO_F_RING_PACKED only as `ring` says. `queue_sizes` has one for
        each queue, the largest possible unless given, 0 for a queue to leave alone.
        """
        self.negotiate(features)
        self.setup_queues(queue_sizes)
        self.add_status(DRIVER_OK)
        assert self.status & DRIVER_OK, f"the device refused DRIVER_OK\n{self.dump()}"
        return self.queues

    def negotiate(self, features: int | None = None) -> None:
        """Reset, find, and agree with the device on features (3.1.1, steps 1 to 6)."""
        assert self.read(MAGIC_VALUE) == 0x74726976, "no virtio-mmio device here"
        assert self.read(VERSION) == 2, "not a device of virtio 1.x"
        self.reset()
        self.agree(features)

    def agree(self, features: int | None = None) -> None:
        """3.1.1, steps 2 to 6: with a device that was just reset."""
        self.add_status(ACKNOWLEDGE)
        self.add_status(DRIVER)
        self.features = self._usual_features() if features is None else features
        self.accept_features(self.features)
        self.add_status(FEATURES_OK)
        assert self.status & FEATURES_OK, f"features {self.features:#x} refused\n{self.dump()}"

    def _usual_features(self) -> int:
        features = self.offered_features() & ~F_IN_ORDER
        if self.ring == "split":
            return features & ~F_RING_PACKED
        assert features & F_RING_PACKED, "the device does not offer VIRTIO_F_RING_PACKED"
        return features

    def setup_queues(self, queue_sizes: Sequence[int] | None = None) -> None:
        """Lay out and enable the queues (3.1.1, step 7, and 4.2.3.2 Virtqueue Configuration)."""
        sizes = self._largest_sizes() if queue_sizes is None else queue_sizes
        for index, size in enumerate(sizes):
            queue = self._make_queue(max(size, 1))
            self.queues.append(queue)
            if size:
                self._enable(index, queue)

    def _make_queue(self, size: int) -> MockDriver:
        make = MockPackedDriver if self.features & F_RING_PACKED else MockSplitDriver
        return make(
            self.memory,
            size,
            arena=self.arena,
            event_idx=bool(self.features & F_EVENT_IDX),
            in_order=bool(self.features & F_IN_ORDER),
        )

    def _largest_sizes(self) -> Iterable[int]:
        index = 0
        while True:
            self.write(QUEUE_SEL, index)
            size = self.read(QUEUE_SIZE_MAX)
            if not size:
                return
            yield size
            index += 1

    def _enable(self, index: int, queue: MockDriver) -> None:
        places = queue.desc_addr, queue.driver_addr, queue.device_addr
        assert self.place_queue(index, queue.size, *places), (
            f"queue {index} was refused\n{self.dump()}"
        )

    def place_queue(self, index: int, size: int, desc: int, driver: int, device: int) -> bool:
        """Give queue `index` its size and the addresses of its areas, and enable it: whether the
        device took them (4.2.3.2 Virtqueue Configuration)."""
        self.write(QUEUE_SEL, index)
        assert self.read(QUEUE_READY) == 0, f"queue {index} is in use"
        self.write(QUEUE_SIZE, size)
        for register, addr in ((QUEUE_DESC, desc), (QUEUE_DRIVER, driver), (QUEUE_DEVICE, device)):
            self.write(register, addr & 0xFFFF_FFFF)
            self.write(register + 4, addr >> 32)
        self.write(QUEUE_READY, 1)
        return self.read(QUEUE_READY) == 1

    def reset_queue(self, index: int, size: int | None = None) -> MockDriver:
        """Reset queue `index` alone, and set it up anew in other memory: the new queue, of `size`
        or as large as the old one (2.6.1 Virtqueue Reset). Needs VIRTIO_F_RING_RESET."""
        self.write(QUEUE_SEL, index)
        self.write(QUEUE_RESET, 1)

        def done() -> bool:
            self.write(QUEUE_SEL, index)
            return not self.read(QUEUE_RESET) | self.read(QUEUE_READY)

        self._wait(done, f"the reset of queue {index} to end", from_live_device=True)
        for key in [key for key in self._early if key[0] == index]:
            del self._early[key]
        queue = self._make_queue(self.queues[index].size if size is None else size)
        self.queues[index] = queue
        self._enable(index, queue)
        return queue

    def reset(self) -> None:
        """Reset the device and forget its queues (4.2.3.1: waits until the status reads 0)."""
        self.write(STATUS, 0)
        self._wait(lambda: self.status == 0, "the reset to end")
        self.queues = []
        self._early.clear()

    # --- using it --------------------------------------------------------------------------------

    def kick(self, index: int = 0) -> None:
        """Notify the device that queue `index` has new buffers."""
        if self.kicks:
            self.kicks[index].signal()
        else:
            self.notify(index)

    def notify(self, index: int) -> None:
        """Notify it by a register."""
        self.write(QUEUE_NOTIFY, index)

    def _wait_for_buffer(self, index: int) -> None:
        has_used = self.queues[index].has_used
        self._wait(has_used, f"queue {index} to return a buffer", from_live_device=True)

    def wait_needs_reset(self) -> None:
        """Wait until the device has set DEVICE_NEEDS_RESET."""
        self._wait(lambda: self.needs_reset, "DEVICE_NEEDS_RESET")

    def wait_interrupt(self, count: int = 1) -> None:
        """Wait until there were `count` interrupts since the line was made."""
        assert self.irq is not None, "this driver was given no interrupt line"
        if not self.irq.wait(count, SAFETY_TIMEOUT):
            raise DriverTimeout(f"waited for interrupt {count}\n{self.dump()}")

    def acknowledge(self) -> int:
        """Read and acknowledge the interrupt status; what it was (4.2.3.5 Notifications)."""
        pending = self.read(INTERRUPT_STATUS)
        self.write(INTERRUPT_ACK, pending)
        return pending

    def _wait(
        self, condition: Callable[[], bool], what: str, *, from_live_device: bool = False
    ) -> None:
        deadline = time.monotonic() + SAFETY_TIMEOUT
        polls = 0
        while not condition():
            polls += 1
            # Seldom: a register access is an exit, and may be traced.
            broken = from_live_device and polls % 50 == 0 and self.needs_reset
            if broken and not condition():
                raise DriverTimeout(f"the device needs a reset\n{self.dump()}")
            if time.monotonic() > deadline:
                raise DriverTimeout(f"waited for {what}\n{self.dump()}")
            time.sleep(0.0002)

    def dump(self) -> str:
        """Status, interrupts and all queues, one line each."""
        lines = [
            f"status {self.status:#x}, interrupt status {self.read(INTERRUPT_STATUS):#x},"
            f" interrupts so far {self.irq.count if self.irq else 'unknown'}"
        ]
        return "\n".join(lines + [queue.dump() for queue in self.queues])
