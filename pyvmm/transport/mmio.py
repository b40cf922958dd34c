"""Virtio-mmio: a device's registers in guest-physical memory (virtio 1.3, 4.2 Virtio Over MMIO).

`REGISTERS` is Table 4.1 of 4.2.2 MMIO Device Register Layout, a row for each register. A row names
its handler: ``status`` stands for the methods ``read_status`` and ``write_status``. They are in
`MmioTransport` below where virtio-mmio has the rule; where chapters 2 and 3 have it for every
transport, in `pyvmm.virtio.negotiation`.

The device's interrupt is one edge-triggered line; docs/decisions/0030-interrupts.md says why
nothing gets lost.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from pyvmm.errors import HostError
from pyvmm.host.log import Sink, to_stderr
from pyvmm.host.saved import Saved
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.transport.base import Doorbell, Transport
from pyvmm.transport.registers import CONFIG_SPACE, Register, RegisterFile
from pyvmm.virtio import constants
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.lifecycle import Trace
from pyvmm.virtio.status import (
    ALWAYS,
    CONFIG_GATE,
    FEATURES_GATE,
    NOTIFY_GATE,
    QUEUE_CHANGE_GATE,
    QUEUE_RESET_GATE,
)

CONFIG = 0x100
QUEUE_NOTIFY = 0x050


REGISTERS = (
    Register(0x000, "MagicValue", "R", ALWAYS, "magic", "MAGIC_VALUE", '"virt"'),
    Register(0x004, "Version", "R", ALWAYS, "version", "VERSION", "2"),
    Register(0x008, "DeviceID", "R", ALWAYS, "device_id", "DEVICE_ID", "device type, chapter 5"),
    Register(0x00C, "VendorID", "R", ALWAYS, "vendor_id", "VENDOR_ID", '"PVMM"'),
    Register(
        0x010, "DeviceFeatures", "R", ALWAYS, "device_features", "DEVICE_FEATURES",
        "32 of the bits that the device offers", "device features",
    ),
    Register(
        0x014, "DeviceFeaturesSel", "W", ALWAYS, "device_features_select", "DEVICE_FEATURES_SEL",
        "which 32 of them",
    ),
    Register(
        0x020, "DriverFeatures", "W", FEATURES_GATE, "driver_features", "DRIVER_FEATURES",
        "32 of the bits that the driver accepts", "driver features",
    ),
    Register(
        0x024, "DriverFeaturesSel", "W", ALWAYS, "driver_features_select", "DRIVER_FEATURES_SEL",
        "which 32 of them",
    ),
    Register(
        0x030, "QueueSel", "W", ALWAYS, "queue_select", "QUEUE_SEL",
        "the queue that the other Queue… registers are about",
    ),
    Register(
        0x034, "QueueSizeMax", "R", ALWAYS, "queue_size_max", "QUEUE_NUM_MAX",
        "its largest size; 0: no such queue",
    ),
    Register(
        0x038, "QueueSize", "W", QUEUE_CHANGE_GATE, "queue_size", "QUEUE_NUM",
        "its size; in a split ring a power of two",
    ),
    Register(
        0x044, "QueueReady", "RW", ALWAYS, "queue_ready", "QUEUE_READY",
        "1 enables it, where QueueSize could be written; 0 stops it, at any time",
    ),
    Register(
        QUEUE_NOTIFY, "QueueNotify", "W", NOTIFY_GATE, "queue_notify", "QUEUE_NOTIFY",
        "the queue that has new buffers; KVM takes it as an ioeventfd", locked=False,
    ),
    Register(
        0x060, "InterruptStatus", "R", ALWAYS, "interrupt_status", "INTERRUPT_STATUS",
        "why the device interrupts", "interrupt",
    ),
    Register(
        0x064, "InterruptACK", "W", ALWAYS, "interrupt_ack", "INTERRUPT_ACK",
        "what of it the driver has handled", "interrupt", locked=False,
    ),
    Register(
        0x070, "Status", "RW", ALWAYS, "status", "STATUS",
        "the device status; legal steps only; 0 resets", "status",
    ),
    Register(
        0x080, "QueueDescLow", "W", QUEUE_CHANGE_GATE, "queue_address", "QUEUE_DESC_LOW",
        "descriptor table", arguments=("desc_addr", 0),
    ),
    Register(
        0x084, "QueueDescHigh", "W", QUEUE_CHANGE_GATE, "queue_address", "QUEUE_DESC_HIGH",
        "descriptor table", arguments=("desc_addr", 32),
    ),
    Register(
        0x090, "QueueDriverLow", "W", QUEUE_CHANGE_GATE, "queue_address", "QUEUE_AVAIL_LOW",
        "available ring", arguments=("avail_addr", 0),
    ),
    Register(
        0x094, "QueueDriverHigh", "W", QUEUE_CHANGE_GATE, "queue_address", "QUEUE_AVAIL_HIGH",
        "available ring", arguments=("avail_addr", 32),
    ),
    Register(
        0x0A0, "QueueDeviceLow", "W", QUEUE_CHANGE_GATE, "queue_address", "QUEUE_USED_LOW",
        "used ring", arguments=("used_addr", 0),
    ),
    Register(
        0x0A4, "QueueDeviceHigh", "W", QUEUE_CHANGE_GATE, "queue_address", "QUEUE_USED_HIGH",
        "used ring", arguments=("used_addr", 32),
    ),
    Register(
        0x0AC, "SHMSel", "W", ALWAYS, "shm_select", "SHM_SEL",
        "the shared memory region that the other SHM… registers are about",
    ),
    Register(
        0x0B0, "SHMLenLow", "R", ALWAYS, "shm_length", "SHM_LEN_LOW",
        "its bytes; -1: no such region", arguments=(0,),
    ),
    Register(
        0x0B4, "SHMLenHigh", "R", ALWAYS, "shm_length", "SHM_LEN_HIGH",
        "its bytes; -1: no such region", arguments=(32,),
    ),
    Register(
        0x0B8, "SHMBaseLow", "R", ALWAYS, "shm_base", "SHM_BASE_LOW",
        "its guest-physical address; -1: no such region", arguments=(0,),
    ),
    Register(
        0x0BC, "SHMBaseHigh", "R", ALWAYS, "shm_base", "SHM_BASE_HIGH",
        "its guest-physical address; -1: no such region", arguments=(32,),
    ),
    Register(
        0x0C0, "QueueReset", "RW", QUEUE_RESET_GATE, "queue_reset", "",
        "1 resets the queue, with VIRTIO_F_RING_RESET, and is read as long as that goes on",
    ),
    Register(
        0x0FC, "ConfigGeneration", "R", ALWAYS, "config_generation", "CONFIG_GENERATION",
        "changes when the configuration space may have",
    ),
    Register(
        CONFIG, "Config", "RW", CONFIG_GATE, "config", "CONFIG",
        "the device's configuration space, accessed by 1, 2, 4 or 8 bytes", width=CONFIG_SPACE,
    ),
)  # fmt: skip
"""All registers in the order of their offsets."""


class MmioTransport(Transport):
    """One virtio-mmio device as the guest sees it. `registers` is its window, for a bus."""

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
        self.registers = RegisterFile(REGISTERS, self, trace=trace)
        self.read, self.write = self.registers.read, self.registers.write

    # --- the device's identity: MagicValue, Version, DeviceID, VendorID -------------------------

    def read_magic(self) -> int:
        return constants.VIRTIO_MMIO_MAGIC

    def read_version(self) -> int:
        return constants.VIRTIO_MMIO_VERSION_MODERN

    def read_device_id(self) -> int:
        return self.device.device_type

    def read_vendor_id(self) -> int:
        return constants.VIRTIO_MMIO_VENDOR_PYVMM

    # --- QueueNotify: 4.2.3.3 Available Buffer Notifications ------------------------------------

    @property
    def doorbells(self) -> list[Doorbell]:
        """Without VIRTIO_F_NOTIFICATION_DATA, which is not offered, the value is the queue's
        index."""
        return [Doorbell(kick, QUEUE_NOTIFY, 4, index) for index, kick in enumerate(self.kicks)]

    # --- saved and restored ---------------------------------------------------------------------

    def _save(self) -> dict[str, Any]:
        """All registers are views of the negotiation."""
        return {}

    def _restore(self, saved: Saved) -> None:
        """Likewise."""

    # --- InterruptStatus, InterruptACK: 4.2.3.4 Notifications From The Device -------------------

    def used_buffer(self, *queue_indexes: int) -> None:
        """The interrupt status has its bit, one for all queues: an edge for the driver to look at
        it."""
        self._irq()

    def config_changed(self) -> None:
        """Likewise."""
        self._irq()

    def used_eventfd(self, index: int) -> EventFd | None:
        """One for all queues, as they have one line."""
        if self._irq_eventfd is None:
            raise HostError(errno.EOPNOTSUPP, "an eventfd for interrupts")
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
