"""Virtio-pci: a device as a PCI function (virtio 1.3, 4.1 Virtio Over PCI Bus), without a legacy
interface.

`COMMON` is struct virtio_pci_common_cfg of 4.1.4.3 Common configuration structure layout, one row
for each field. A row's handler is a method of `PciTransport` or, where the rule behind it is in
chapters 2 and 3 and the same on every transport, of `pyvmm.virtio.negotiation`.

All structures lie in BAR 0, each on pages of its own, and the capabilities say where. A region of
shared memory is a BAR of its own, which the machine makes memory. Each queue
has a doorbell address of its own, and a vector of its own if the driver wants it so. There is no
INTx: the function's interrupt pin is 0.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Protocol

from pyvmm.bus import Action, Handler
from pyvmm.host.log import Sink, to_stderr
from pyvmm.host.saved import Saved
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.pci import registers as pci
from pyvmm.pci.function import Bar, Capability, Function
from pyvmm.pci.msix import MAX_VECTORS, MessageLine, Msix
from pyvmm.transport.base import Doorbell, Transport
from pyvmm.transport.registers import CONFIG_SPACE, Register, RegisterFile
from pyvmm.virtio.device import SharedMemory, VirtioDevice
from pyvmm.virtio.lifecycle import Trace
from pyvmm.virtio.status import (
    ALWAYS,
    CONFIG_GATE,
    FEATURES_GATE,
    QUEUE_CHANGE_GATE,
    QUEUE_RESET_GATE,
)

COMMON = (
    Register(
        0x00, "device_feature_select", "RW", ALWAYS, "device_features_select", "DFSELECT",
        "which 32 of the bits that the device offers",
    ),
    Register(
        0x04, "device_feature", "R", ALWAYS, "device_features", "DF",
        "these 32 bits", "device features",
    ),
    Register(
        0x08, "driver_feature_select", "RW", ALWAYS, "driver_features_select", "GFSELECT",
        "which 32 of the bits that the driver accepts",
    ),
    Register(
        0x0C, "driver_feature", "RW", FEATURES_GATE, "driver_features", "GF",
        "these 32 bits", "driver features",
    ),
    Register(
        0x10, "config_msix_vector", "RW", ALWAYS, "config_vector", "MSIX",
        "the vector of configuration changes; 0xffff: none", width=2,
    ),
    Register(
        0x12, "num_queues", "R", ALWAYS, "num_queues", "NUMQ", "how many queues there are", width=2,
    ),
    Register(
        0x14, "device_status", "RW", ALWAYS, "status", "STATUS",
        "the device status; legal steps only; 0 resets", "status", width=1,
    ),
    Register(
        0x15, "config_generation", "R", ALWAYS, "config_generation", "CFGGENERATION",
        "changes when the configuration space may have", width=1,
    ),
    Register(
        0x16, "queue_select", "RW", ALWAYS, "queue_select", "Q_SELECT",
        "the queue that the other queue_… fields are about", width=2,
    ),
    Register(
        0x18, "queue_size", "RW", QUEUE_CHANGE_GATE, "current_queue_size", "Q_SIZE",
        "its size, at first the largest; 0: no such queue", width=2,
    ),
    Register(
        0x1A, "queue_msix_vector", "RW", ALWAYS, "queue_vector", "Q_MSIX",
        "the vector of its used buffers; 0xffff: none", width=2,
    ),
    Register(
        0x1C, "queue_enable", "RW", QUEUE_CHANGE_GATE, "queue_enable", "Q_ENABLE",
        "1 enables it", width=2,
    ),
    Register(
        0x1E, "queue_notify_off", "R", ALWAYS, "queue_notify_off", "Q_NOFF",
        "where its doorbell is, in units of the notify capability's multiplier", width=2,
    ),
    Register(
        0x20, "queue_desc", "RW", QUEUE_CHANGE_GATE, "queue_address", "Q_DESCLO",
        "descriptor table", arguments=("desc_addr",), width=8,
    ),
    Register(
        0x28, "queue_driver", "RW", QUEUE_CHANGE_GATE, "queue_address", "Q_AVAILLO",
        "available ring", arguments=("avail_addr",), width=8,
    ),
    Register(
        0x30, "queue_device", "RW", QUEUE_CHANGE_GATE, "queue_address", "Q_USEDLO",
        "used ring", arguments=("used_addr",), width=8,
    ),
    Register(
        0x38, "queue_notif_config_data", "R", ALWAYS, "zero", "Q_NDATA",
        "0, as VIRTIO_F_NOTIF_CONFIG_DATA is not offered", width=2,
    ),
    Register(
        0x3A, "queue_reset", "RW", QUEUE_RESET_GATE, "queue_reset", "Q_RESET",
        "1 resets the queue, with VIRTIO_F_RING_RESET, and is read as long as that goes on",
        width=2,
    ),
    Register(
        0x3C, "admin_queue_index", "R", ALWAYS, "zero", "ADM_Q_IDX",
        "0, as VIRTIO_F_ADMIN_VQ is not offered", width=2,
    ),
    Register(
        0x3E, "admin_queue_num", "R", ALWAYS, "zero", "ADM_Q_NUM", "likewise", width=2,
    ),
)  # fmt: skip
"""The fields of the common configuration structure in the order of their offsets."""

ISR = (
    Register(
        0, "ISR status", "R", ALWAYS, "isr", "", "why the device interrupts; a read clears it",
        "interrupt", width=1,
    ),
)  # fmt: skip
"""4.1.4.5 ISR status capability."""

CONFIG = (
    Register(
        0, "Config", "RW", CONFIG_GATE, "config", "", "the configuration space", width=CONFIG_SPACE
    ),
)
"""4.1.4.6 Device-specific configuration."""

COMMON_SIZE = 0x40
NOTIFY_MULTIPLIER = 4
NO_VECTOR = 0xFFFF  # VIRTIO_MSI_NO_VECTOR

_PAGE = 4096
_COMMON_AT, _ISR_AT, _CONFIG_AT, _NOTIFY_AT = (page * _PAGE for page in range(4))
_VENDOR_ID = 0x1AF4  # 4.1.2 PCI Device Discovery
_DEVICE_ID_BASE = 0x1040
_REVISION = 1
# 4.1.4 Virtio Structure PCI Capabilities: cfg_type
_COMMON_CFG, _NOTIFY_CFG, _ISR_CFG, _DEVICE_CFG, _PCI_CFG = 1, 2, 3, 4, 5
_SHARED_MEMORY_CFG = 8
_BAR = 0
_MEMORY_BAR = 2

# Class codes of the PCI Code and ID Assignment Specification, by device type (chapter 5).
_CLASSES = {
    **{1: 0x020000, 2: 0x010000, 3: 0x078000, 18: 0x098000, 19: 0x078000},
    **{26: 0x018000, 27: 0x058000},  # mass storage and memory of another kind
}
_OTHER_CLASS = 0xFF0000  # "device does not fit in any defined classes"


class Line(MessageLine, Protocol):
    """The line for the interrupts of one vector: whoever interrupts signals `eventfd`."""

    @property
    def eventfd(self) -> EventFd: ...


class PciTransport(Transport):
    """One virtio device as a PCI function: `function` is for a bus, `bar` holds its registers.

    It is the `Placement` of its function, unless a machine has one that keeps `doorbells` where the
    BAR is and passes the rest on.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        lines: Sequence[Line],
        *,
        shared: Handler | None = None,
        log: Sink = to_stderr,
        trace: Trace | None = None,
    ) -> None:
        """`lines` are its vectors, one for each queue and one more if all are to have their own.
        `shared` answers what is in the device's region of shared memory, where the machine does
        not make it memory.

        Raises HostError without file descriptors, ValueError for a device that offers features
        which do not exist here, or has more than one such region.
        """
        super().__init__(device, memory, log=log, trace=trace)
        self._lines = lines
        self._vector_of_config = NO_VECTOR
        self._vectors = [NO_VECTOR] * len(self.kicks)
        self.msix = Msix(lines, self.negotiation.warn)
        self.negotiation.set_bus_master(False)
        if not device.shared_memory:
            self.negotiation.offered &= ~device.shared_memory_features
        self._memory = _shared_memory(device)
        notify_size = _pages(NOTIFY_MULTIPLIER * len(self.kicks))
        table_at = _NOTIFY_AT + notify_size
        pending_at = table_at + _pages(self.msix.table_size)
        end = pending_at + _pages(self.msix.pending_size)
        common = RegisterFile(COMMON, self, trace=trace)
        regions: list[tuple[int, int, Handler]] = [
            (_COMMON_AT, COMMON_SIZE, common),
            (_ISR_AT, 1, RegisterFile(ISR, self, trace=trace)),
            (_CONFIG_AT, _PAGE, RegisterFile(CONFIG, self, trace=trace)),
            (_NOTIFY_AT, NOTIFY_MULTIPLIER * len(self.kicks), _Notify(self)),
            (table_at, self.msix.table_size, _Table(self.msix)),
            (pending_at, self.msix.pending_size, _Pending(self.msix)),
        ]
        self.bar = Bar(_BAR, 1 << (end - 1).bit_length(), _Regions(regions))
        self.memory_bar: Bar | None = None
        if self._memory is not None:
            size = bar_size(self._memory[1].size)
            self.memory_bar = Bar(_MEMORY_BAR, size, shared or _Nothing(), prefetchable=True)
        self.function = Function(
            vendor_id=_VENDOR_ID,
            device_id=_DEVICE_ID_BASE + device.device_type,
            revision=_REVISION,
            class_code=_CLASSES.get(device.device_type, _OTHER_CLASS),
            subsystem_vendor_id=_VENDOR_ID,
            subsystem_id=_DEVICE_ID_BASE + device.device_type,
            bars=(self.bar,) if self.memory_bar is None else (self.bar, self.memory_bar),
        )
        if self._memory is not None and self.memory_bar is not None:
            shmid, region = self._memory
            self.function.place(self.memory_bar, region.base)
            device.shared_memory_moved(shmid, region.base)
        self._add_capabilities(table_at, pending_at)

    def _add_capabilities(self, table_at: int, pending_at: int) -> None:
        """4.1.4 Virtio Structure PCI Capabilities, and those of PCI itself."""
        add = self.function.add_capability
        notify_size = NOTIFY_MULTIPLIER * len(self.kicks)
        add(_structure(_COMMON_CFG, _COMMON_AT, COMMON_SIZE))
        multiplier = struct.pack("<I", NOTIFY_MULTIPLIER)
        add(_structure(_NOTIFY_CFG, _NOTIFY_AT, notify_size, multiplier))
        add(_structure(_ISR_CFG, _ISR_AT, 1))
        add(_structure(_DEVICE_CFG, _CONFIG_AT, _PAGE))
        _ConfigAccess(self).add()
        if self._memory is not None:
            add(_region(*self._memory))
        self.msix.add_to(self.function, _BAR, table_at, pending_at)
        _Express(self).add()

    # --- on the bus -------------------------------------------------------------------------------

    def bar_moved(self, bar: Bar, address: int | None) -> None:
        """See pyvmm.pci.function.Placement: the registers know no address, a region of shared
        memory does."""
        if bar is self.memory_bar and address is not None and self._memory is not None:
            self.device.shared_memory_moved(self._memory[0], address)

    def bus_master_changed(self, on: bool) -> None:
        """Without bus mastering there is no access to memory, and no message: both wait."""
        with self.negotiation.lock:
            self.negotiation.set_bus_master(on)
        self.msix.bus_master_changed(on)

    def function_reset(self) -> None:
        """A function-level reset is one of the device and of MSI-X."""
        with self.negotiation.lock:
            self.write_status(0)
        self.msix.reset()

    @property
    def doorbells(self) -> list[Doorbell]:
        """4.1.4.4 Notification structure layout: an address for each queue, so that whatever is
        written there means this queue."""
        return [
            Doorbell(kick, _NOTIFY_AT + NOTIFY_MULTIPLIER * index, 0, None)
            for index, kick in enumerate(self.kicks)
        ]

    # --- interrupts: 4.1.5.1.2 MSI-X Vector Configuration, 4.1.5.3 and 4.1.5.4 --------------------

    def used_buffer(self, *queue_indexes: int) -> None:
        """Each vector interrupts once, however many of its queues have used buffers."""
        if len(queue_indexes) == 1:
            self._signal(self._vectors[queue_indexes[0]])
            return
        for vector in {self._vectors[index] for index in queue_indexes}:
            self._signal(vector)

    def config_changed(self) -> None:
        self._signal(self._vector_of_config)

    def used_eventfd(self, index: int) -> EventFd | None:
        """The queue's line; None for a queue without a vector, which the driver polls."""
        vector = self._vectors[index]
        return None if vector == NO_VECTOR else self._lines[vector].eventfd

    def _signal(self, vector: int) -> None:
        # While MSI-X is off there is nothing that a signal could wait for.
        if vector != NO_VECTOR and self.msix.enabled:
            self._lines[vector].eventfd.signal()

    def read_isr(self) -> int:
        """A read clears it."""
        state = self.negotiation.state
        found = state.interrupt_status
        self.negotiation.acknowledge(found)
        return found | state.used_elsewhere

    def read_config_vector(self) -> int:
        return self._vector_of_config

    def write_config_vector(self, value: int) -> None:
        self._vector_of_config = self._vector(value)

    def read_queue_vector(self) -> int:
        index = self.negotiation.state.queue_select
        return self._vectors[index] if index < len(self._vectors) else NO_VECTOR

    def write_queue_vector(self, value: int) -> None:
        index = self.negotiation.state.queue_select
        if index < len(self._vectors):
            self._vectors[index] = self._vector(value)
            self.negotiation.interrupt_moved(index)

    def _vector(self, value: int) -> int:
        """`value`, or what a driver reads back to learn that there is no such vector."""
        if value < len(self._lines):
            return value
        if value != NO_VECTOR:
            self.negotiation.warn(f"vector {value:#x} refused: there are {len(self._lines)}")
        return NO_VECTOR

    # --- saved and restored -----------------------------------------------------------------------

    def _save(self) -> dict[str, Any]:
        """The vectors, and MSI-X. Configuration space is the bus's."""
        return {
            "config_vector": self._vector_of_config,
            "vectors": self._vectors,
            "msix": self.msix.save(),
        }

    def _restore(self, saved: Saved) -> None:
        """Restore what `_save` gave, once the bus is restored."""
        vectors = saved.integers("vectors", len(self._vectors), NO_VECTOR)
        if len(vectors) != len(self._vectors):
            raise saved.wrong(f"there are {len(vectors)} vectors")
        self._vector_of_config = self._vector(saved.integer("config_vector", NO_VECTOR))
        self._vectors = [self._vector(vector) for vector in vectors]
        self.msix.restore(saved.table("msix"))

    # --- fields that other transports do not have, or have otherwise ------------------------------

    def read_device_features_select(self) -> int:
        return self.negotiation.state.device_features_select

    def read_driver_features_select(self) -> int:
        return self.negotiation.state.driver_features_select

    def read_driver_features(self) -> int:
        state = self.negotiation.state
        select = state.driver_features_select
        return state.driver_features >> 32 * select & 0xFFFF_FFFF if select < 2 else 0

    def read_num_queues(self) -> int:
        return len(self.kicks)

    def read_queue_select(self) -> int:
        return self.negotiation.state.queue_select

    def read_zero(self) -> int:
        return 0

    def read_queue_notify_off(self) -> int:
        """The selected queue's index: each has an address of its own."""
        index = self.negotiation.state.queue_select
        return index if index < len(self.kicks) else 0

    def read_current_queue_size(self) -> int:
        """The size that the driver has set; until then, the largest."""
        return self.negotiation.read_queue_size() or self.negotiation.read_queue_size_max()

    def write_current_queue_size(self, value: int) -> None:
        self.negotiation.write_queue_size(value)

    def read_queue_enable(self) -> int:
        return self.negotiation.read_queue_ready()

    def write_queue_enable(self, value: int) -> None:
        """A driver never writes 0 here (4.1.4.3.2 Driver Requirements)."""
        if value != 1:
            self.negotiation.warn(f"queue_enable {value:#x} ignored: only 1 means something")
            return
        if not self.negotiation.read_queue_size() and self.negotiation.read_queue_size_max():
            self.negotiation.write_queue_size(self.negotiation.read_queue_size_max())
        self.negotiation.write_queue_ready(1)

    def write_status(self, value: int) -> None:
        self.negotiation.write_status(value)
        if not self.negotiation.read_status():
            # 4.1.5.1.2.1: reset maps every event to no vector.
            self._vector_of_config = NO_VECTOR
            self._vectors = [NO_VECTOR] * len(self.kicks)

    def write_queue_reset(self, value: int) -> None:
        self.negotiation.write_queue_reset(value)
        index = self.negotiation.state.queue_select
        if index < len(self._vectors) and self.negotiation.state.queues[index].was_reset:
            self._vectors[index] = NO_VECTOR


def vectors_for(device: VirtioDevice) -> int:
    """The number of vectors of `device`: one for each queue, and one for its configuration."""
    return min(len(device.queue_sizes) + 1, MAX_VECTORS)


def bar_size(size: int) -> int:
    """Of a BAR with room for `size` bytes."""
    return max(_PAGE, 1 << (size - 1).bit_length())


def _shared_memory(device: VirtioDevice) -> tuple[int, SharedMemory] | None:
    """The shmid of the device's region, and the region. There is room for one more capability."""
    regions = list(device.shared_memory.items())
    if len(regions) > 1:
        raise ValueError(f"{device.name} has {len(regions)} shared memory regions, PCI has one")
    return regions[0] if regions else None


def _pages(size: int) -> int:
    return -(-max(size, 1) // _PAGE) * _PAGE


def _structure(kind: int, offset: int, length: int, more: bytes = b"") -> Capability:
    """struct virtio_pci_cap, and what follows it."""
    body = struct.pack("<BBBBxxII", 16 + len(more), kind, _BAR, 0, offset, length)
    return Capability(pci.PCI_CAP_ID_VNDR, body + more)


def _region(shmid: int, region: SharedMemory) -> Capability:
    """4.1.4.7 Shared memory capability: struct virtio_pci_cap64, at the start of its BAR."""
    high, low = divmod(region.size, 1 << 32)
    body = struct.pack("<BBBBxxIIII", 24, _SHARED_MEMORY_CFG, _MEMORY_BAR, shmid, 0, low, 0, high)
    return Capability(pci.PCI_CAP_ID_VNDR, body)


# --- what BAR 0 consists of -----------------------------------------------------------------------


class _Regions:
    """Structures at their pages of a BAR; nothing answers between them."""

    def __init__(self, regions: Sequence[tuple[int, int, Handler]]) -> None:
        self._by_page: dict[int, tuple[int, int, Handler]] = {}
        for start, size, handler in regions:
            for page in range(start // _PAGE, (start + _pages(size)) // _PAGE):
                self._by_page[page] = start, start + size, handler

    def read(self, offset: int, size: int) -> int:
        found = self._by_page.get(offset // _PAGE)
        if found is None or offset + size > found[1]:
            return 0
        return found[2].read(offset - found[0], size)

    def write(self, offset: int, size: int, value: int) -> Action | None:
        found = self._by_page.get(offset // _PAGE)
        if found is not None and offset + size <= found[1]:
            found[2].write(offset - found[0], size, value)
        return None


class _Nothing:
    """Answers where nobody does."""

    def read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> Action | None:
        return None


class _Notify:
    """4.1.5.2 Available Buffer Notifications, where KVM has not caught them."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> Action | None:
        self._transport.write_queue_notify(offset // NOTIFY_MULTIPLIER)
        return None


class _Table:
    """The MSI-X table."""

    def __init__(self, msix: Msix) -> None:
        self.read = msix.read_table
        self.write = msix.write_table


class _Pending:
    """The MSI-X pending bits."""

    def __init__(self, msix: Msix) -> None:
        self.read = msix.read_pending

    def write(self, offset: int, size: int, value: int) -> Action | None:
        return None


# --- capabilities that do something ---------------------------------------------------------------


class _ConfigAccess:
    """4.1.4.9 PCI configuration access capability: a window of four bytes to the BARs, for whoever
    cannot reach those."""

    _DATA = 16  # pci_cfg_data, after struct virtio_pci_cap

    def __init__(self, transport: PciTransport) -> None:
        self._function = transport.function
        self._bars = {bar.number: bar for bar in transport.function.bars}

    def add(self) -> None:
        body = _structure(_PCI_CFG, 0, 0, bytes(4)).body
        # bar, offset, length and the data are the driver's; behind ID and next pointer.
        writable = bytes(2) + b"\xff" + bytes(3) + b"\xff" * 12
        capability = Capability(pci.PCI_CAP_ID_VNDR, body, writable)
        self._at = self._function.add_capability(capability, self)

    def _wanted(self) -> tuple[Handler, int, int] | None:
        space, at = self._function.space, self._at
        offset, length = struct.unpack_from("<II", space, at + 8)
        bar = self._bars.get(space[at + 4])
        if bar is None or length not in (1, 2, 4) or offset % length:
            return None
        return (bar.handler, offset, length) if offset + length <= bar.size else None

    def before_read(self, offset: int, size: int) -> None:
        if offset + size > self._DATA and (wanted := self._wanted()) is not None:
            at, (handler, where, length) = self._at + self._DATA, wanted
            found = handler.read(where, length)
            self._function.space[at : at + 4] = found.to_bytes(4, "little")

    def after_write(self, offset: int, size: int) -> None:
        if offset + size > self._DATA and (wanted := self._wanted()) is not None:
            at, (handler, where, length) = self._at + self._DATA, wanted
            value = int.from_bytes(self._function.space[at : at + length], "little")
            handler.write(where, length, value)


class _Express:
    """The PCI Express capability of an endpoint in the root complex: function-level reset."""

    _DEVICE_CONTROL = 8

    def __init__(self, transport: PciTransport) -> None:
        self._transport = transport

    def add(self) -> None:
        version = 2
        body = bytearray(58)
        device = pci.PCI_EXP_DEVCAP_FLR | pci.PCI_EXP_DEVCAP_RBER
        struct.pack_into("<HI", body, 0, pci.PCI_EXP_TYPE_RC_END << 4 | version, device)
        writable = bytes(self._DEVICE_CONTROL - 2) + b"\xff\xff"
        capability = Capability(pci.PCI_CAP_ID_EXP, bytes(body), writable)
        self._at = self._transport.function.add_capability(capability, self)

    def before_read(self, offset: int, size: int) -> None:
        """Nothing changes by itself."""

    def after_write(self, offset: int, size: int) -> None:
        space, at = self._transport.function.space, self._at + self._DEVICE_CONTROL
        (control,) = struct.unpack_from("<H", space, at)
        if control & pci.PCI_EXP_DEVCTL_BCR_FLR:
            struct.pack_into("<H", space, at, 0)
            self._transport.function.wants_reset = True
