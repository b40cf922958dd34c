"""The virtio-mmio transport: a device's register window (virtio 1.3, 4.2 Virtio Over MMIO).

`MmioTransport` maps accesses to rows of the register table, and rows to the negotiation state that
all transports share. Its interrupt is one edge-triggered line; docs/decisions/0030-interrupts.md
says why nothing gets lost.

What a driver must not do changes nothing and costs a rate-limited warning: an access to a register
that is not 4 bytes wide and aligned, or not in the table, or against its direction, or at the wrong
time (4.2.2.2 Driver Requirements: MMIO Device Register Layout). Such a read gives 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pyvmm.bus import Action
from pyvmm.host.log import Sink, to_stderr
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.transport import events
from pyvmm.transport.base import Doorbell, Transport
from pyvmm.transport.mmio_registers import BY_OFFSET, CONFIG, QUEUE_NOTIFY, REGISTERS, Register
from pyvmm.virtio import constants, status
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.lifecycle import Trace

_CONFIG_ROW = BY_OFFSET[CONFIG]
_OPEN_CONFIG_ROW = _CONFIG_ROW._replace(gate=status.ALWAYS)
_CONFIG_WIDTHS = (1, 2, 4, 8)
_NO_REGION = 0xFFFF_FFFF  # half of -1


class MmioTransport(Transport):
    """One virtio-mmio device as the guest sees it: a `pyvmm.bus.Handler`, and its doorbells.

    `kicks` has one eventfd per queue, to be made an ioeventfd at QueueNotify with the queue's
    index as its datamatch; without that, a QueueNotify write signals the same eventfd.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        irq: Callable[[], None],
        *,
        irq_eventfd: EventFd | None = None,
        log: Sink = to_stderr,
        trace: Trace | None = None,
    ) -> None:
        """`irq` sends one edge to the device's interrupt line; any thread calls it. So does each
        signal of `irq_eventfd`, for a device that the kernel serves.

        Raises HostError without file descriptors, ValueError for a device that offers features
        which do not exist here.
        """
        super().__init__(device, memory, log=log, trace=trace)
        self._irq = irq
        self._irq_eventfd = irq_eventfd
        self._trace = trace
        self._readers: dict[int, Callable[[], int]] = {}
        self._writers: dict[int, Callable[[int], None]] = {}
        self._unlocked_writers: dict[int, Callable[[int], None]] = {}
        for row in REGISTERS:
            if row.width == 4:
                self._bind(row)

    def _bind(self, row: Register) -> None:
        if "R" in row.access:
            self._readers[row.offset] = getattr(self, f"read_{row.handler}")
        if "W" in row.access:
            method = getattr(self, f"write_{row.handler}")
            writer = method if row.argument is None else partial(method, *row.argument)
            writers = self._writers if row.locked else self._unlocked_writers
            writers[row.offset] = writer

    # --- dispatch -----------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """The value of `size` bytes at `offset`; 0 for what is not a register that can be read."""
        if size == 4:
            reader = self._readers.get(offset)
            if reader is not None:
                value = reader()
                if self._trace is not None:
                    self._trace_access(BY_OFFSET[offset], offset, size, value, write=False)
                return value
        if offset >= CONFIG and size in _CONFIG_WIDTHS:
            value = self.negotiation.read_config(offset - CONFIG, size)
            if self._trace is not None:
                self._trace_access(_CONFIG_ROW, offset, size, value, write=False)
            return value
        self._refuse(offset, size, None)
        return 0

    def write(self, offset: int, size: int, value: int) -> Action | None:
        """Write `size` bytes at `offset`. No register of a virtio device ends the machine."""
        if size == 4:
            unlocked = self._unlocked_writers.get(offset)
            if unlocked is not None:
                if self._trace is not None:
                    self._trace_access(BY_OFFSET[offset], offset, size, value, write=True)
                unlocked(value)
                return None
            writer = self._writers.get(offset)
            if writer is not None:
                self._write_locked(BY_OFFSET[offset], offset, size, value, writer)
                return None
        if offset >= CONFIG and size in _CONFIG_WIDTHS:
            writer = partial(self.negotiation.write_config, offset - CONFIG, size)
            row = _OPEN_CONFIG_ROW if self.device.config_always_writable else _CONFIG_ROW
            self._write_locked(row, offset, size, value, writer)
        else:
            self._refuse(offset, size, value)
        return None

    def _write_locked(
        self, row: Register, offset: int, size: int, value: int, writer: Callable[[int], None]
    ) -> None:
        negotiation = self.negotiation
        with negotiation.lock:
            if self._trace is not None:
                self._trace_access(row, offset, size, value, write=True)
            now = negotiation.state.status
            if row.gate.open(now):
                writer(value)
            else:
                self._warn_closed(row, value, now)

    def _warn_closed(self, row: Register, value: int, now: int) -> None:
        self.negotiation.warn(
            f"write of {value:#x} to {row.name} ignored: only {row.gate.when},"
            f" the status is {status.describe(now)}"
        )

    def _refuse(self, offset: int, size: int, value: int | None) -> None:
        verb = "read" if value is None else f"write of {value:#x}"
        row = BY_OFFSET.get(offset & ~3)
        if row is None:
            why = "there is no register"
        elif size != row.width or offset != row.offset:
            why = f"{row.name} takes aligned accesses of {row.width or '1, 2, 4 or 8'} bytes"
        else:
            why = f"{row.name} is {'write' if value is None else 'read'}-only"
        self.negotiation.warn(f"{size}-byte {verb} at {offset:#x} ignored: {why}")
        if self._trace is not None:
            event = events.BadAccess(self.device.name, value is not None, offset, size, value or 0)
            self._trace(event)

    def _trace_access(
        self, row: Register, offset: int, size: int, value: int, *, write: bool
    ) -> None:
        if self._trace is not None:
            name = events.register_name(row, offset, size)
            names = self.device.feature_names
            meaning = events.decode(row, value, self.negotiation.state, names)
            self._trace(events.RegisterAccess(self.device.name, write, name, value, meaning))

    # --- the interrupt: 4.2.3.4 Notifications From The Device -----------------------------------

    def used_buffer(self, *queue_indexes: int) -> None:
        """The interrupt status has its bit, one for all queues: an edge for the driver to look at
        it."""
        self._irq()

    def config_changed(self) -> None:
        """Likewise."""
        self._irq()

    def used_eventfd(self, index: int) -> EventFd | None:
        """One for all queues, as they have one line."""
        return self._irq_eventfd

    def read_interrupt_status(self) -> int:
        state = self.negotiation.state
        return state.interrupt_status | state.used_elsewhere

    def write_interrupt_ack(self, value: int) -> None:
        # A level-triggered line would stay up as long as a bit is set. An edge has to be sent
        # again, or what the driver left unacknowledged would wait for the next event. Bits that
        # mean nothing are not there to be cleared.
        if self.negotiation.acknowledge(value):
            self._irq()

    @property
    def doorbells(self) -> list[Doorbell]:
        """Writes of a queue's index to QueueNotify (4.2.3.3 Available Buffer Notifications)."""
        return [Doorbell(kick, QUEUE_NOTIFY, 4, index) for index, kick in enumerate(self.kicks)]

    # --- queues -------------------------------------------------------------------------------

    def write_queue_select(self, value: int) -> None:
        self.negotiation.state.queue_select = value

    def read_queue_size_max(self) -> int:
        return self.negotiation.read_queue_size_max()

    def write_queue_size(self, value: int) -> None:
        self.negotiation.write_queue_size(value)

    def write_queue_address(self, part: str, shift: int, value: int) -> None:
        self.negotiation.write_queue_address(part, shift, value)

    def read_queue_ready(self) -> int:
        return self.negotiation.read_queue_ready()

    def write_queue_ready(self, value: int) -> None:
        self.negotiation.write_queue_ready(value)

    def read_queue_reset(self) -> int:
        return self.negotiation.read_queue_reset()

    def write_queue_reset(self, value: int) -> None:
        self.negotiation.write_queue_reset(value)

    # --- status, features, configuration ------------------------------------------------------

    def read_status(self) -> int:
        return self.negotiation.read_status()

    def write_status(self, value: int) -> None:
        self.negotiation.write_status(value)

    def read_device_features(self) -> int:
        return self.negotiation.read_device_features()

    def write_device_features_select(self, value: int) -> None:
        self.negotiation.state.device_features_select = value

    def write_driver_features(self, value: int) -> None:
        self.negotiation.write_driver_features(value)

    def write_driver_features_select(self, value: int) -> None:
        self.negotiation.state.driver_features_select = value

    def read_config_generation(self) -> int:
        return self.negotiation.read_config_generation()

    # --- constants ----------------------------------------------------------------------------

    def read_magic(self) -> int:
        return constants.VIRTIO_MMIO_MAGIC

    def read_version(self) -> int:
        return constants.VIRTIO_MMIO_VERSION_MODERN

    def read_device_id(self) -> int:
        return self.device.device_type

    def read_vendor_id(self) -> int:
        return constants.VIRTIO_MMIO_VENDOR_PYVMM

    def write_shm_select(self, value: int) -> None:
        """No device has a shared memory region, so it makes no difference which is selected."""

    def read_shm(self) -> int:
        return _NO_REGION
