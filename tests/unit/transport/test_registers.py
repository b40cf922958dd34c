"""The register file with another transport's registers: virtio-pci's, one row for each field.

The rows are struct virtio_pci_common_cfg (virtio 1.3, 4.1.4.3 Common configuration structure
layout) with its fields of 1, 2, 4 and 8 bytes, and the windows beside it. They are served by the
same negotiation as virtio-mmio's, with a view of it that has what only PCI has.
"""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from c_claims import assert_in_c, needs_headers
from mmio_harness import (
    ACKNOWLEDGE,
    AGREED,
    AVAIL,
    DESC,
    DEVICE_BIT,
    DRIVEN,
    EVENT_IDX,
    LIVE,
    NEEDS_RESET,
    RAM,
    USED,
    VERSION_1,
    Bench,
    RecordingDevice,
)

from pyvmm.errors import DriverError
from pyvmm.host.log import Sink
from pyvmm.host.saved import Saved
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing.mmio_driver import InterruptLine
from pyvmm.testing.mock_driver import MockSplitDriver
from pyvmm.testing.ring import Arena
from pyvmm.transport.base import Doorbell, Transport
from pyvmm.transport.registers import CONFIG_SPACE, Register, RegisterFile, markdown
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.lifecycle import Trace
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.status import (
    ALWAYS,
    CONFIG_GATE,
    FEATURES_GATE,
    NOTIFY_GATE,
    QUEUE_CHANGE_GATE,
    QUEUE_RESET_GATE,
)
from pyvmm.virtio.worker import QueueDevice

COMMON = (
    Register(
        0x00, "device_feature_select", "RW", ALWAYS, "device_features_select", "DFSELECT",
        "which 32 bits device_feature has",
    ),
    Register(
        0x04, "device_feature", "R", ALWAYS, "device_features", "DF",
        "32 of the bits that the device offers", "device features",
    ),
    Register(
        0x08, "driver_feature_select", "RW", ALWAYS, "driver_features_select", "GFSELECT",
        "which 32 bits driver_feature has",
    ),
    Register(
        0x0C, "driver_feature", "RW", FEATURES_GATE, "driver_features", "GF",
        "32 of the bits that the driver accepts", "driver features",
    ),
    Register(
        0x10, "config_msix_vector", "RW", ALWAYS, "no_vector", "MSIX",
        "the vector of configuration changes", width=2,
    ),
    Register(0x12, "num_queues", "R", ALWAYS, "num_queues", "NUMQ", "how many", width=2),
    Register(
        0x14, "device_status", "RW", ALWAYS, "status", "STATUS", "the device status", "status",
        width=1,
    ),
    Register(
        0x15, "config_generation", "R", ALWAYS, "config_generation", "CFGGENERATION",
        "changes when the configuration space may have", width=1,
    ),
    Register(
        0x16, "queue_select", "RW", ALWAYS, "queue_select", "Q_SELECT",
        "the queue that the fields below are about", width=2,
    ),
    Register(
        0x18, "queue_size", "RW", QUEUE_CHANGE_GATE, "queue_size", "Q_SIZE",
        "its size, at first the largest", width=2,
    ),
    Register(
        0x1A, "queue_msix_vector", "RW", ALWAYS, "no_vector", "Q_MSIX", "its vector", width=2,
    ),
    Register(
        0x1C, "queue_enable", "RW", ALWAYS, "queue_enable", "Q_ENABLE", "1 enables it", width=2,
    ),
    Register(
        0x1E, "queue_notify_off", "R", ALWAYS, "queue_notify_off", "Q_NOFF",
        "where it is notified", width=2,
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
        0x38, "queue_notif_config_data", "R", ALWAYS, "queue_notify_off", "Q_NDATA",
        "what notifies it", width=2,
    ),
    Register(
        0x3A, "queue_reset", "RW", QUEUE_RESET_GATE, "queue_reset", "Q_RESET",
        "1 resets it", width=2,
    ),
)  # fmt: skip
ISR = (
    Register(
        0, "ISR status", "R", ALWAYS, "isr", "", "why the device interrupts; read to clear",
        "interrupt", width=1,
    ),
)  # fmt: skip
CONFIG = (
    Register(
        0, "device configuration", "RW", CONFIG_GATE, "config", "", "the device's",
        width=CONFIG_SPACE,
    ),
)  # fmt: skip
NOTIFY_MULTIPLIER = 4


def notify_rows(count: int) -> tuple[Register, ...]:
    return tuple(
        Register(
            index * NOTIFY_MULTIPLIER, f"queue_notify {index}", "W", NOTIFY_GATE, "queue_notify",
            "", "new buffers", width=2, locked=False,
        )
        for index in range(count)
    )  # fmt: skip


class PciView(Transport):
    """virtio-pci's own fields in its windows. Every MSI-X vector is refused (4.1.5.1.2)."""

    def __init__(self, device: VirtioDevice, memory: GuestMemory, log: Sink, trace: Trace) -> None:
        super().__init__(device, memory, log=log, trace=trace)
        self.common = RegisterFile(COMMON, self, trace=trace)
        self.isr = RegisterFile(ISR, self, trace=trace)
        self.notify = RegisterFile(notify_rows(len(self.kicks)), self, trace=trace)
        self.config = RegisterFile(CONFIG, self, trace=trace)
        self.line = InterruptLine()

    @property
    def doorbells(self) -> list[Doorbell]:
        return [
            Doorbell(kick, index * NOTIFY_MULTIPLIER, 2, index)
            for index, kick in enumerate(self.kicks)
        ]

    def used_buffer(self, *queue_indexes: int) -> None:
        self.line()

    def config_changed(self) -> None:
        self.line()

    def used_eventfd(self, index: int) -> EventFd | None:
        return None

    def _save(self) -> dict[str, Any]:
        return {}

    def _restore(self, saved: Saved) -> None:
        pass

    def read_isr(self) -> int:
        pending = self.negotiation.state.interrupt_status
        self.negotiation.acknowledge(pending)
        return pending

    def read_no_vector(self) -> int:
        return 0xFFFF

    def write_no_vector(self, value: int) -> None:
        """Refused: what is read back says so."""

    def read_num_queues(self) -> int:
        return len(self.kicks)

    def read_queue_notify_off(self) -> int:
        return self.negotiation.state.queue_select

    def read_device_features_select(self) -> int:
        return self.negotiation.state.device_features_select

    def read_driver_features_select(self) -> int:
        return self.negotiation.state.driver_features_select

    def read_driver_features(self) -> int:
        state = self.negotiation.state
        return state.driver_features >> 32 * state.driver_features_select & 0xFFFF_FFFF

    def read_queue_select(self) -> int:
        return self.negotiation.state.queue_select

    def read_queue_size(self) -> int:
        config = self.negotiation._selected()
        return (config.size or config.max_size) if config is not None else 0

    def read_queue_enable(self) -> int:
        return self.negotiation.read_queue_ready()

    def write_queue_enable(self, value: int) -> None:
        if value == 1:
            self.negotiation.write_queue_ready(1)
        else:
            self.negotiation.warn(f"queue_enable {value:#x} ignored")

    def read_queue_address(self, part: str, shift: int) -> int:
        config = self.negotiation._selected()
        return getattr(config, part, 0) >> shift & 0xFFFF_FFFF


FIELDS = {row.name: row for row in COMMON}


class Driver:
    """A hand on the common configuration: fields by name, with the accesses of 4.1.3.1."""

    def __init__(self, device: VirtioDevice) -> None:
        self.memory = GuestMemory([(0, RAM)])
        self.lines: list[str] = []
        self.events: list[object] = []
        self.view = PciView(device, self.memory, self.lines.append, self.events.append)
        self.negotiation = self.view.negotiation
        self.common = self.view.common

    def read(self, name: str) -> int:
        row = FIELDS[name]
        if row.width == 8:
            low, high = (self.common.read(row.offset + at, 4) for at in (0, 4))
            return low | high << 32
        return self.common.read(row.offset, row.width)

    def write(self, name: str, value: int) -> None:
        row = FIELDS[name]
        if row.width == 8:
            self.common.write(row.offset, 4, value & 0xFFFF_FFFF)
            self.common.write(row.offset + 4, 4, value >> 32)
        else:
            self.common.write(row.offset, row.width, value)

    def negotiate(self, features: int = VERSION_1) -> None:
        for status in (0, ACKNOWLEDGE, DRIVEN):
            self.write("device_status", status)
        for word in (0, 1):
            self.write("driver_feature_select", word)
            self.write("driver_feature", features >> 32 * word & 0xFFFF_FFFF)
        self.write("device_status", AGREED)

    def enable_queue(self, index: int, size: int, places: tuple[int, int, int]) -> None:
        self.write("queue_select", index)
        self.write("queue_size", size)
        for name, addr in zip(("queue_desc", "queue_driver", "queue_device"), places, strict=True):
            self.write(name, addr)
        self.write("queue_enable", 1)

    def go_live(self, features: int = VERSION_1) -> None:
        self.negotiate(features)
        self.enable_queue(0, 16, (DESC, AVAIL, USED))
        self.write("device_status", LIVE)


@pytest.fixture
def device() -> RecordingDevice:
    return RecordingDevice()


@pytest.fixture
def driver(device: RecordingDevice) -> Driver:
    return Driver(device)


@needs_headers(["linux/virtio_pci.h"])
def test_the_fields_are_where_the_header_has_them(tmp_path: Path) -> None:
    ends = [row.offset + row.width for row in COMMON]
    assert [row.offset for row in COMMON] == [0, *ends[:-1]]  # no gap, none over another
    claims = [f"VIRTIO_PCI_COMMON_{row.linux} == {row.offset}" for row in COMMON]
    newer = ("VIRTIO_PCI_COMMON_Q_NDATA", "VIRTIO_PCI_COMMON_Q_RESET")
    assert_in_c(tmp_path, ["linux/virtio_pci.h"], claims, newer)


def test_both_transports_come_to_the_same_agreement(driver: Driver) -> None:
    bench = Bench(RecordingDevice())
    bench.go_live(VERSION_1 | EVENT_IDX | DEVICE_BIT)
    driver.go_live(VERSION_1 | EVENT_IDX | DEVICE_BIT)
    assert driver.negotiation.state == bench.negotiation.state
    assert driver.read("device_status") == LIVE
    assert not driver.lines
    for name, value in (
        ("num_queues", 2), ("queue_size", 16), ("queue_enable", 1), ("queue_desc", DESC),
        ("queue_driver", AVAIL), ("queue_device", USED), ("driver_feature", 1),
        ("driver_feature_select", 1), ("queue_msix_vector", 0xFFFF), ("queue_reset", 0),
    ):  # fmt: skip
        assert driver.read(name) == value, name
    driver.write("queue_select", 1)
    assert driver.read("queue_select") == driver.read("queue_notify_off") == 1
    assert (driver.read("queue_size"), driver.read("queue_enable")) == (64, 0)
    driver.write("queue_select", 2)
    assert (driver.read("queue_size"), driver.read("queue_desc")) == (0, 0)


def test_a_field_of_8_bytes_has_two_halves_of_4(driver: Driver) -> None:
    driver.negotiate()
    row = FIELDS["queue_desc"]
    driver.common.write(row.offset + 4, 4, 0x1234_5678)
    assert driver.common.read(row.offset, 8) == 0x1234_5678_0000_0000
    driver.common.write(row.offset, 4, 0x9ABC_DEF0)
    assert driver.negotiation.state.queues[0].desc_addr == 0x1234_5678_9ABC_DEF0
    driver.common.write(row.offset, 8, 0xFFFF_FFFF_0000_0001)
    assert driver.common.read(row.offset, 4) == 1
    assert driver.common.read(row.offset + 4, 4) == 0xFFFF_FFFF
    assert driver.common.read(row.offset, 8) == 0xFFFF_FFFF_0000_0001
    assert not driver.lines


def test_a_handler_of_a_half_gets_that_half(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves: list[tuple[int, int]] = []
    probe = lambda shift, value: halves.append((shift, value))  # noqa: E731
    monkeypatch.setattr(driver.view, "write_probe", probe, raising=False)
    row = Register(0, "probe", "W", ALWAYS, "probe", "", "", width=8)
    RegisterFile([row], driver.view).write(0, 8, 0x1234_5678_9ABC_DEF0)
    assert halves == [(0, 0x9ABC_DEF0), (32, 0x1234_5678)]


def test_writes_happen_one_after_the_other(driver: Driver) -> None:
    """But notifications, which wait for nobody."""
    driver.go_live()
    writing = Thread(target=driver.write, args=("queue_select", 1), daemon=True)
    with driver.negotiation.lock:
        driver.view.notify.write(0, 2, 0)
        assert driver.view.kicks[0].drain() == 1
        writing.start()
        writing.join(0.1)
        assert driver.read("queue_select") == 0
    writing.join(30)
    assert driver.read("queue_select") == 1


def legal(offset: int, size: int) -> Register | None:
    """4.1.3.1 Driver Requirements: PCI Device Layout, written down without the table's own rule."""
    for row in COMMON:
        parts = {(row.offset, row.width)}
        if row.width == 8:
            parts |= {(row.offset, 4), (row.offset + 4, 4)}
        if (offset, size) in parts:
            return row
    return None


@pytest.mark.parametrize("size", range(1, 9))
def test_an_access_of_another_width_or_place_is_refused(device: RecordingDevice, size: int) -> None:
    """Also sizes that no instruction has: KVM cuts an access at the end of a page."""
    driver = Driver(device)
    driver.negotiate()
    for offset in range(0x48):
        row = legal(offset, size)
        if row is None:
            before = repr(driver.negotiation.state)
            driver.lines.clear()
            driver.events.clear()
            assert driver.common.read(offset, size) == 0
            driver.common.write(offset, size, 1)
            assert repr(driver.negotiation.state) == before
            assert [str(event) for event in driver.events] == [
                f"dev0: {size}-byte read at {offset:#x} ignored",
                f"dev0: {size}-byte write of 0x1 at {offset:#x} ignored",
            ]
        else:
            driver.events.clear()
            driver.common.read(offset, size)
            (event,) = driver.events
            assert str(event).startswith(f"dev0: read {row.name_of(offset, size)} ")


def test_warnings_name_the_field_and_its_widths(driver: Driver) -> None:
    driver.common.read(0x14, 2)
    driver.common.write(0x22, 4, 0)
    driver.common.write(0x12, 2, 1)
    driver.common.read(0x3C, 2)
    driver.view.notify.read(0, 2)
    assert driver.lines == [
        "dev0: 2-byte read at 0x14 ignored: device_status takes aligned accesses of 1 byte",
        "dev0: 4-byte write of 0x0 at 0x22 ignored: queue_desc takes aligned accesses of 4 or 8"
        " bytes",
        "dev0: 2-byte write of 0x1 at 0x12 ignored: num_queues is read-only",
        "dev0: 2-byte read at 0x3c ignored: there is no register",
        "dev0: 2-byte read at 0x0 ignored: queue_notify 0 is write-only",
    ]


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("driver_feature", AGREED), ("driver_feature", ACKNOWLEDGE), ("queue_size", DRIVEN),
        ("queue_desc", DRIVEN), ("queue_reset", AGREED), ("queue_enable", DRIVEN),
    ],
)  # fmt: skip
def test_the_gates_are_the_same(driver: Driver, name: str, status: int) -> None:
    driver.negotiate()
    if status != AGREED:
        for step in (0, ACKNOWLEDGE, DRIVEN)[: 2 if status == ACKNOWLEDGE else 3]:
            driver.write("device_status", step)
    assert driver.read("device_status") == status
    before = repr(driver.negotiation.state)
    driver.write(name, 1)
    assert repr(driver.negotiation.state) == before
    assert driver.lines


def test_a_counter_shows_as_much_as_its_field_holds(driver: Driver) -> None:
    driver.negotiation.state.generation = 0x1FF
    assert driver.read("config_generation") == 0xFF
    driver.negotiation.config_changed()
    assert driver.read("config_generation") == 0


def test_a_window_that_is_only_the_configuration_space(
    driver: Driver, device: RecordingDevice
) -> None:
    driver.view.config.write(0, 2, 1)
    assert not device.config_writes
    driver.negotiate()
    driver.view.config.write(6, 2, 0x0201)
    assert device.config_writes == [(6, b"\1\2")]
    assert driver.view.config.read(1, 4) == 0x0504_0302
    assert driver.view.config.read(0, 3) == 0
    device.config_always_writable = True
    always = Driver(device)
    always.view.config.write(0, 1, 7)
    assert device.config_writes[-1] == (0, b"\7")


class Echo(QueueDevice):
    """Copies what it reads of a chain into what it can write."""

    name, device_type, queue_sizes = "echo0", 42, (64,)

    def serve(self, queue: Queue) -> None:
        for chain in queue:
            data = chain.reader().read(min(chain.readable_size, chain.writable_size))
            chain.writer().write(data)
            queue.add_used(chain, len(data))


def test_a_request_from_end_to_end() -> None:
    driver = Driver(Echo())
    driver.negotiate()
    queue = MockSplitDriver(driver.memory, 8, arena=Arena(driver.memory))
    driver.enable_queue(0, 8, (queue.desc_addr, queue.driver_addr, queue.device_addr))
    driver.write("device_status", LIVE)
    chain = queue.add([b"ping"], [4])
    queue.publish()
    (bell,) = driver.view.doorbells
    driver.view.notify.write(bell.offset, bell.size, bell.match)
    assert driver.view.line.wait(1, 30)
    used = queue.pop_used()
    assert used is not None and (used.head, used.written) == (chain.head, 4)
    assert driver.memory.read(chain.writable[0].addr, 4) == b"ping"
    assert driver.view.isr.read(0, 1) == 1
    assert driver.view.isr.read(0, 1) == 0  # 4.1.4.5: reading it acknowledges
    driver.view.close()


def test_a_trace_has_the_fields_by_their_names(driver: Driver, device: RecordingDevice) -> None:
    driver.go_live(VERSION_1 | EVENT_IDX)
    driver.common.read(FIELDS["queue_desc"].offset, 8)
    driver.view.config.read(2, 2)
    driver.view.notify.write(4, 2, 1)
    device.live.fail(DriverError("loop of descriptors", section="2.7.5.2"))
    driver.view.isr.read(0, 1)
    assert driver.read("device_status") == LIVE | NEEDS_RESET
    lines = [str(event) for event in driver.events]
    expected = """
dev0: write device_status 0x0 (RESET)
dev0: reset
dev0: status RESET -> RESET
dev0: write device_status 0x1 (ACKNOWLEDGE)
dev0: status RESET -> ACKNOWLEDGE
dev0: write device_status 0x3 (ACKNOWLEDGE|DRIVER)
dev0: status ACKNOWLEDGE -> ACKNOWLEDGE|DRIVER
dev0: write driver_feature_select 0x0
dev0: write driver_feature 0x20000000 (VIRTIO_F_EVENT_IDX)
dev0: write driver_feature_select 0x1
dev0: write driver_feature 0x1 (VIRTIO_F_VERSION_1)
dev0: write device_status 0xb (ACKNOWLEDGE|DRIVER|FEATURES_OK)
dev0: status ACKNOWLEDGE|DRIVER -> ACKNOWLEDGE|DRIVER|FEATURES_OK
dev0: write queue_select 0x0
dev0: write queue_size 0x10
dev0: write queue_desc[0x0:4] 0x1000
dev0: write queue_desc[0x4:4] 0x0
dev0: write queue_driver[0x0:4] 0x3000
dev0: write queue_driver[0x4:4] 0x0
dev0: write queue_device[0x0:4] 0x4000
dev0: write queue_device[0x4:4] 0x0
dev0: write queue_enable 0x1
dev0: write device_status 0xf (ACKNOWLEDGE|DRIVER|DRIVER_OK|FEATURES_OK)
dev0: status ACKNOWLEDGE|DRIVER|FEATURES_OK -> ACKNOWLEDGE|DRIVER|DRIVER_OK|FEATURES_OK
dev0: active, queue sizes [16, 0], features VIRTIO_F_EVENT_IDX VIRTIO_F_VERSION_1
dev0: read queue_desc 0x1000
dev0: read device configuration[0x2:2] 0x403
dev0: write queue_notify 1 0x1
dev0: needs reset: loop of descriptors (virtio 1.3, 2.7.5.2)
dev0: read ISR status 0x2 (configuration change)
dev0: read device_status 0x4f (ACKNOWLEDGE|DRIVER|DRIVER_OK|FEATURES_OK|DEVICE_NEEDS_RESET)
"""
    assert lines == expected.strip().splitlines()


def test_the_documentation_says_how_wide_a_field_is() -> None:
    lines = markdown(COMMON, "VIRTIO_PCI_COMMON_").splitlines()
    assert "| 0x014 | device_status | RW | 1 | always | the device status | `STATUS` |" in lines
    assert any(line.startswith("| 0x020 | queue_desc | RW | 4, 8 | after") for line in lines)


def test_a_row_without_handlers_is_found_at_once(driver: Driver) -> None:
    row = Register(0, "nothing", "R", ALWAYS, "nothing", "", "")
    with pytest.raises(AttributeError, match="read_nothing"):
        RegisterFile([row], driver.view)
