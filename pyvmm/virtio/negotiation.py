"""The negotiation between driver and device, and its rules, shared by every transport.

A transport is a view: it maps its registers, capabilities or messages to the methods here, and no
rule of chapters 2 and 3 is written a second time. What then happens to the device, and which locks
are taken when, is in `pyvmm.virtio.lifecycle`.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyvmm.errors import PyvmmError
from pyvmm.host.log import Sink, to_stderr
from pyvmm.host.saved import Saved
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.virtio import features, status
from pyvmm.virtio.defects import as_device_failure
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.lifecycle import Lifecycle, Notifier, Trace
from pyvmm.virtio.queue.build import load_layouts
from pyvmm.virtio.queue.state import QueueConfig, is_valid_size, size_rule

RESERVED_BITS = features.mask(*range(24, 50))  # 2.2 Feature Bits: not a device type's own
SUPPORTED_RESERVED_BITS = features.mask(
    features.VIRTIO_F_INDIRECT_DESC,
    features.VIRTIO_F_EVENT_IDX,
    features.VIRTIO_F_VERSION_1,
    features.VIRTIO_F_RING_PACKED,
    features.VIRTIO_F_IN_ORDER,
    features.VIRTIO_F_RING_RESET,
)
MAX_QUEUES = 65536  # 2.6 Virtqueues
CONFIG_SPACE_SIZE = 0x100  # as much of it as a change is looked for in

_LOW_32 = 0xFFFF_FFFF


class Negotiation(Lifecycle):
    """One device's negotiation state and the rules that move it.

    Methods named `write_…` act for the driver and want `lock` held; those named `read_…` are called
    by any thread without it.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        notifier: Notifier,
        kicks: Sequence[EventFd],
        *,
        log: Sink = to_stderr,
        trace: Trace | None = None,
    ) -> None:
        """`kicks` has one eventfd per queue. Raises ValueError for a device that offers features
        which nothing here implements, or has too many queues."""
        unsupported = device.features & RESERVED_BITS & ~SUPPORTED_RESERVED_BITS
        if unsupported:
            names = " ".join(features.describe(unsupported))
            raise ValueError(f"{device.name} offers {names}, which this monitor does not implement")
        resettable = features.has(device.features, features.VIRTIO_F_RING_RESET)
        if resettable and type(device).reset_queue is VirtioDevice.reset_queue:
            raise ValueError(f"{device.name} offers VIRTIO_F_RING_RESET, but has no reset_queue")
        if len(device.queue_sizes) > MAX_QUEUES:
            raise ValueError(f"{device.name} has more than {MAX_QUEUES} queues")
        super().__init__(device, memory, notifier, kicks, log=log, trace=trace)
        self.offered = device.features | features.mask(features.VIRTIO_F_VERSION_1)
        self._config_seen: bytes | None = None
        load_layouts(self.offered)

    # --- features: 2.2 Feature Bits -----------------------------------------------------------

    def write_device_features_select(self, value: int) -> None:
        """Select which 32 of the offered bits are read."""
        self.state.device_features_select = value

    def read_device_features(self) -> int:
        """The 32 offered bits that were selected; 0 for those past bit 63."""
        return self.offered >> 32 * self.state.device_features_select & _LOW_32

    def write_driver_features_select(self, value: int) -> None:
        """Select which 32 of the accepted bits are written."""
        self.state.driver_features_select = value

    def write_driver_features(self, value: int) -> None:
        """The driver accepts `value` of the 32 bits that it selected."""
        select = self.state.driver_features_select
        if select >= 2:
            if value:
                self.warn(f"driver accepts features {value:#x} in word {select}, ignored")
            return
        shift = 32 * select
        kept = self.state.driver_features & ~(_LOW_32 << shift)
        self.state.driver_features = kept | value << shift

    def _features_refusal(self) -> str | None:
        accepted = self.state.driver_features
        unoffered = accepted & ~self.offered
        if unoffered:
            return f"accepts {' '.join(features.describe(unoffered))}, which is not offered"
        if not features.has(accepted, features.VIRTIO_F_VERSION_1):
            # 6.2 Device Requirements: Reserved Feature Bits
            return "refuses VIRTIO_F_VERSION_1, and there is no legacy interface"
        return None

    # --- status: 2.1 Device Status Field ------------------------------------------------------

    def read_status(self) -> int:
        """The device status field."""
        return self.state.status

    def write_status(self, written: int) -> None:
        """The driver writes the status field: a reset, a legal step, or nothing at all."""
        current = self.state.status
        if written == 0:
            self.reset()
        elif (wanted := status.next_status(current, written)) is None:
            self.warn(f"status {written:#x} ignored: {status.explain_refusal(current, written)}")
        else:
            self._take_step(wanted & ~current)

    def _take_step(self, added: int) -> None:
        if added & status.FEATURES_OK:
            refusal = self._features_refusal()
            if refusal is not None:
                self.warn(f"FEATURES_OK stays clear: the driver {refusal}")
                return
            try:
                self.device.accept_features(self.state.driver_features)
            except Exception as error:
                self.fail(as_device_failure(self.device.name, error))
                return
        if added:
            self.add_status(added)
        if added & status.DRIVER_OK:
            self.activate()

    # --- shared memory: 2.10 Shared Memory Regions ---------------------------------------------

    def write_shm_select(self, value: int) -> None:
        """Select the region that the other methods on shared memory are about."""
        self.state.shm_select = value

    def read_shm_length(self, shift: int) -> int:
        """32 bits, from bit `shift` on, of the region's length in bytes; all ones for none."""
        region = self.device.shared_memory.get(self.state.shm_select)
        return _LOW_32 if region is None else region.size >> shift & _LOW_32

    def read_shm_base(self, shift: int) -> int:
        """The same of its guest-physical address."""
        region = self.device.shared_memory.get(self.state.shm_select)
        return _LOW_32 if region is None else region.base >> shift & _LOW_32

    # --- queues: 2.6 Virtqueues, 2.7 Split Virtqueues -----------------------------------------

    def write_queue_select(self, value: int) -> None:
        """Select the queue that the other methods on queues are about; there need not be one."""
        self.state.queue_select = value

    def _selected(self) -> QueueConfig | None:
        index = self.state.queue_select
        return self.state.queues[index] if index < len(self.state.queues) else None

    def read_queue_size_max(self) -> int:
        """The largest size of the selected queue; 0 if there is no such queue."""
        config = self._selected()
        return config.max_size if config is not None else 0

    def read_queue_size(self) -> int:
        """The size that the selected queue was given; 0 if none was."""
        config = self._selected()
        return config.size if config is not None else 0

    def write_queue_size(self, value: int) -> None:
        """Set the selected queue's size; refused unless within its maximum, and for a split queue
        a power of two."""
        config = self._configurable("size")
        if config is None:
            return
        packed = self._accepted(features.VIRTIO_F_RING_PACKED)
        if is_valid_size(value, config.max_size, packed=packed):
            config.size = value
        else:
            self.warn(
                f"queue {self.state.queue_select}: size {value:#x} refused: not"
                f" {size_rule(config.max_size, packed=packed)}"
            )

    def read_queue_address(self, part: str, shift: int) -> int:
        """32 bits, `shift` 0 or 32, of the address that a part of the selected queue was given."""
        config = self._selected()
        address: int = getattr(config, part) if config is not None else 0
        return address >> shift & _LOW_32

    def write_queue_address(self, part: str, shift: int, value: int) -> None:
        """Set 32 bits, `shift` 0 or 32, of the address of a part of the selected queue: one of
        ``"desc_addr"``, ``"avail_addr"`` and ``"used_addr"``."""
        config = self._configurable(part)
        if config is not None:
            kept = getattr(config, part) & ~(_LOW_32 << shift)
            setattr(config, part, kept | value << shift)

    def _configurable(self, what: str) -> QueueConfig | None:
        config = self._selected()
        if config is None:
            why = "no such queue"
        elif config.ready:
            why = "the queue is ready"
        else:
            wrong_time = self._setup_refusal(config)
            if wrong_time is None:
                return config
            why = wrong_time
        self.warn(f"queue {self.state.queue_select}: {what} ignored: {why}")
        return None

    def _setup_refusal(self, config: QueueConfig) -> str | None:
        """The reason why a queue cannot be set up now; once the device is live only one that was
        reset can."""
        now = self.state.status
        gate = status.QUEUE_CHANGE_GATE if config.was_reset else status.QUEUE_SETUP_GATE
        return None if gate.open(now) else f"only {gate.when}, the status is {status.describe(now)}"

    def _accepted(self, bit: int) -> bool:
        return features.has(self.state.driver_features, bit)

    def read_queue_ready(self) -> int:
        """1 if the driver enabled the selected queue, else 0."""
        config = self._selected()
        return int(config is not None and config.ready)

    def write_queue_ready(self, value: int) -> None:
        """Enable (1) or stop (0) the selected queue; reads back 0 where enabling was refused."""
        config = self._selected()
        index = self.state.queue_select
        if config is None or value not in (0, 1):
            self.warn(f"queue {index}: ready {value:#x} ignored: no such queue or no such value")
        elif value == 0:
            self.stop_queue(index)
        elif not config.ready:
            self._enable_queue(index, config)

    def _enable_queue(self, index: int, config: QueueConfig) -> None:
        refusal = self._setup_refusal(config)
        if refusal is None:
            try:
                packed = self._accepted(features.VIRTIO_F_RING_PACKED)
                config.validate(self.memory, packed=packed)
            except PyvmmError as error:
                refusal = str(error)
        if refusal is not None:
            self.warn(f"queue {index}: not enabled: {refusal}")
            return
        config.ready = True
        if config.was_reset:
            self.start_queue(index)

    def read_queue_reset(self) -> int:
        """1 while the reset of the selected queue goes on, else 0 (2.6.1.1 Virtqueue Reset)."""
        config = self._selected()
        return int(config is not None and config.resetting)

    def write_queue_reset(self, value: int) -> None:
        """Reset (1) the selected queue alone, if VIRTIO_F_RING_RESET was negotiated. The transport
        sees to `status.QUEUE_RESET_GATE`."""
        index = self.state.queue_select
        if not self._accepted(features.VIRTIO_F_RING_RESET):
            refusal = "VIRTIO_F_RING_RESET is not negotiated"
        elif self._selected() is None or value != 1:
            refusal = "no such queue or no such value"
        else:
            self.reset_queue(index)
            return
        self.warn(f"queue {index}: reset {value:#x} ignored: {refusal}")

    # --- saved and restored ---------------------------------------------------------------------

    def restore(self, saved: Saved, of_device: Saved) -> None:
        """See Lifecycle. The features must be ones that a driver of this device could have."""
        accepted, agreed = saved.bits("driver_features", 64), saved.bits("status", 8)
        if agreed & status.FEATURES_OK:
            self.state.driver_features = accepted
            if (refusal := self._features_refusal()) is not None:
                raise saved.wrong(f"the driver {refusal}")
        super().restore(saved, of_device)

    # --- configuration: 2.5 Device Configuration Space ----------------------------------------

    def read_config(self, offset: int, length: int) -> int:
        """`length` bytes of the configuration space as a little-endian number, 0 past its end."""
        return int.from_bytes(self._config_bytes(offset, length)[:length], "little")

    def _config_bytes(self, offset: int, length: int) -> bytes:
        try:
            return bytes(memoryview(self.device.read_config(offset, length)))
        except Exception as error:
            self.fail(as_device_failure(self.device.name, error))
            return bytes(length)

    def write_config(self, offset: int, length: int, value: int) -> None:
        """The driver writes `length` bytes of the configuration space."""
        data = (value & (1 << 8 * length) - 1).to_bytes(length, "little")
        try:
            self.device.write_config(offset, data)
        except Exception as error:
            self.fail(as_device_failure(self.device.name, error))

    def read_config_generation(self) -> int:
        """A number that differs from the last one read if the configuration may have changed.

        A device changes its configuration and then signals it. A driver may read in between, so
        the contents are compared as well as the signals counted.
        """
        contents = self._config_bytes(0, CONFIG_SPACE_SIZE)
        with self._events:
            if self._config_seen is not None and contents != self._config_seen:
                self._raise_generation()
            self._config_seen = contents
            return self.state.generation
