"""Virtio-pci: what differs from other transports, on a bus with a driver in front."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from c_claims import assert_in_c, needs_headers
from mmio_harness import RecordingDevice, SlowDevice, wait_for

from pyvmm.memory import GuestMemory
from pyvmm.pci import registers as pci
from pyvmm.pci.function import Bar, Function
from pyvmm.testing import mmio_driver as mmio
from pyvmm.testing.attached import SLOT, WINDOW, on_a_bus
from pyvmm.testing.mmio_driver import InterruptLine
from pyvmm.testing.pci_driver import (
    BAR0,
    BUS_MASTER,
    CAP_EXPRESS,
    COMMAND,
    COMMON_CFG,
    CONFIG_VECTOR,
    DEVICE_CFG,
    ISR_CFG,
    MEMORY,
    MSIX_ENABLE,
    NO_VECTOR,
    NOTIFY_CFG,
    NOTIFY_OFF,
    NUM_QUEUES,
    PCI_CFG,
    QUEUE_VECTOR,
    MockLine,
)
from pyvmm.transport.pci import COMMON, COMMON_SIZE, PciTransport, vectors_for
from pyvmm.virtio.device import Activation, SharedMemory, VirtioDevice
from pyvmm.virtio.offload import OffloadLock
from pyvmm.virtio.rng.device import EntropyDevice

RAM = 1 << 20
Q_SIZE, Q_ENABLE, Q_RESET = (0x18, 2), (0x1C, 2), (0x3A, 2)


class Bench:
    """A function on a bus, and a driver that knows both."""

    def __init__(self, device: VirtioDevice) -> None:
        self.memory = GuestMemory([(0, RAM)])
        self.irq = InterruptLine()
        self.said: list[str] = []
        self.lines = [MockLine(self.irq) for _ in range(vectors_for(device))]
        self.transport = PciTransport(device, self.memory, self.lines, log=self.said.append)
        self.places: list[int | None] = []
        self.bus, self.driver = on_a_bus(self.transport, self.memory, placement=self, irq=self.irq)

    def bar_moved(self, bar: Bar, address: int | None) -> None:
        self.places.append(address)

    def bus_master_changed(self, on: bool) -> None:
        self.transport.bus_master_changed(on)

    def function_reset(self) -> None:
        self.transport.function_reset()

    def command(self, value: int) -> None:
        self.driver.write_config(COMMAND, 2, value)

    def sent(self) -> list[list[int]]:
        return [line.sent for line in self.lines]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> VirtioDevice:
    """One of the test's own, of the class that `of_class` names."""
    kind: type[VirtioDevice] = getattr(request, "param", EntropyDevice)
    return kind()


@pytest.fixture
def bench(device: VirtioDevice) -> Iterator[Bench]:
    made = Bench(device)
    yield made
    made.transport.close()


def of_class(kind: type[VirtioDevice]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("device", [kind], ids=[kind.__name__], indirect=True)


recording = of_class(RecordingDevice)


def ask(bench: Bench) -> None:
    written, data = bench.driver.request(0, [], [64])
    assert written == 64 and any(data)


def ask_and_hear(bench: Bench, heard: Callable[[], bool] | None = None) -> None:
    """The same, but the driver looks once it `heard` of it: one that has looked already needs no
    interrupt."""
    before = bench.irq.count
    chain = bench.driver.submit(0, [], [64])
    wait_for(heard or (lambda: bench.irq.count > before))
    assert bench.driver.wait_used(0, chain).written == 64


# --- finding it: 4.1.2, 4.1.4 ---------------------------------------------------------------------


def test_a_request_and_its_message(bench: Bench) -> None:
    bench.driver.start()
    ask_and_hear(bench)
    assert bench.sent() == [[], [1]]
    assert bench.said == []


def test_the_function_is_a_modern_one(bench: Bench) -> None:
    read = bench.driver.read_config
    assert (read(0, 2), read(2, 2), read(8, 1)) == (0x1AF4, 0x1044, 1)
    assert read(0x2E, 2) >= 0x40  # the subsystem's ID, 4.1.2.1
    assert read(pci.PCI_INTERRUPT_PIN, 1) == 0  # no INTx
    bench.driver.find()
    assert set(bench.driver.structures) == {COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG}
    assert bench.driver.structures[COMMON_CFG].length == COMMON_SIZE
    assert bench.driver.structures[ISR_CFG].length == 1
    assert bench.driver.structures[PCI_CFG][1:] == (0, 0, 0)
    for kind, one in bench.driver.structures.items():
        # cap_len with what follows struct virtio_pci_cap; then id and padding.
        assert read(one.at + 2, 1) == (20 if kind in (NOTIFY_CFG, PCI_CFG) else 16)
        assert read(one.at + 4, 4) == 0


def test_what_is_written_to_capabilities_reaches_no_other(bench: Bench) -> None:
    before = bench.driver.capabilities()
    for at in range(0x40, 0x100, 4):
        bench.driver.write_config(at, 4, 0xFFFF_FFFF)
        bench.driver.read_config(at, 4)
    assert bench.driver.capabilities() == before
    assert len(bench.transport.function.space) == pci.PCI_CFG_SPACE_EXP_SIZE


@pytest.mark.parametrize(
    ("kind", "code"),
    [(1, 0x020000), (2, 0x010000), (3, 0x078000), (4, 0xFF0000), (18, 0x098000), (19, 0x078000)],
)
def test_class_codes(kind: int, code: int) -> None:
    device = RecordingDevice()
    device.device_type = kind
    bench = Bench(device)
    assert bench.driver.read_config(8, 4) >> 8 == code
    bench.transport.close()


@needs_headers(["linux/virtio_pci.h"])
def test_the_common_structure_is_the_headers(tmp_path: Path) -> None:
    claims = [
        f"VIRTIO_PCI_COMMON_{row.linux} == {row.offset:#x}"
        for row in COMMON
        if row.linux not in ("Q_NDATA", "Q_RESET", "ADM_Q_IDX", "ADM_Q_NUM")  # of newer headers
    ]
    claims += [
        "sizeof(struct virtio_pci_cap) == 16",
        "sizeof(struct virtio_pci_common_cfg) == 0x38",
    ]
    assert_in_c(tmp_path, ["linux/types.h", "linux/virtio_pci.h"], claims)


def test_every_structure_lies_in_the_bar(bench: Bench) -> None:
    bench.driver.find()
    places = [*bench.driver.structures.values(), bench.driver.msix]
    spans = sorted((one.offset, one.offset + one.length) for one in places if one.length)
    assert all(one.bar == 0 for one in places)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= bench.transport.bar.size


def assert_as_small_as_can_be(bench: Bench) -> None:
    """The structures lie side by side in a BAR of the next power of two."""
    pending = bench.driver.read_config(bench.driver.msix.at + 8, 4)
    size = -(-bench.driver.vectors // 64) * 8
    spans = [(one.offset, one.length) for one in bench.driver.structures.values() if one.length]
    spans += [(bench.driver.msix.offset, bench.driver.msix.length), (pending, size)]
    pages = [page for at, length in spans for page in range(at >> 12, (at + length + 4095) >> 12)]
    assert sorted(pages) == list(range(len(pages)))
    assert bench.transport.bar.size // 2 < 4096 * len(pages) <= bench.transport.bar.size


@pytest.mark.parametrize("queues", [1, 2, 64, 600, 1024, 2047, 2048, 5000])
def test_devices_of_many_queues(queues: int) -> None:
    device = RecordingDevice()
    device.queue_sizes = (8,) * queues
    bench = Bench(device)
    bench.driver.find()
    bench.driver.place(WINDOW)
    assert bench.driver.field(NUM_QUEUES) == queues
    assert bench.driver.vectors == min(queues + 1, 2048)
    assert bench.driver.structures[NOTIFY_CFG].length == 4 * queues
    assert_as_small_as_can_be(bench)
    bench.driver.set_field((0x16, 2), queues - 1)
    assert bench.driver.field(NOTIFY_OFF) == queues - 1
    offset = bench.driver.structures[NOTIFY_CFG].offset + 4 * (queues - 1)
    assert bench.transport.doorbells[-1].offset == offset
    bench.transport.close()


# --- the common configuration structure -----------------------------------------------------------


@recording
def test_features_for_shared_memory_are_not_offered(device: RecordingDevice) -> None:
    device.shared_memory_features = 1 << 5
    bench = Bench(device)
    assert device.features & 1 << 5
    bench.driver.find()
    bench.driver.place(WINDOW)
    assert not bench.driver.offered_features() & 1 << 5
    bench.transport.close()


class Shared(RecordingDevice):
    """Has 5 GiB and 1 MiB of shared memory, as region 7."""

    shared_memory_features = 1 << 5

    def __init__(self) -> None:
        super().__init__()
        self.features |= 1 << 5
        self.shared_memory = {7: SharedMemory(1 << 40, (5 << 30) + (1 << 20))}
        self.moves: list[tuple[int, int]] = []

    def shared_memory_moved(self, shmid: int, base: int) -> None:
        self.moves.append((shmid, base))


def test_shared_memory_is_a_bar_of_its_own() -> None:
    device = Shared()
    bench = Bench(device)
    read, write = bench.driver.read_config, bench.driver.write_config
    assert read(0x18, 8) == 1 << 40 | 0xC  # where it is at first; of 64 bits, prefetchable
    write(0x18, 8, (1 << 64) - 1)
    assert read(0x18, 8) == (1 << 64) - (8 << 30) | 0xC
    places = [at for kind, at in bench.driver.capabilities() if kind == pci.PCI_CAP_ID_VNDR]
    [at] = [at for at in places if read(at + 3, 1) == 8]
    assert [read(at + where, 1) for where in (2, 4, 5)] == [24, 2, 7]
    words = [read(at + where, 4) for where in (8, 12, 16, 20)]  # offset, length, then their highs
    assert words == [0, 0x4010_0000, 0, 1]
    bench.driver.find()
    bench.driver.place(WINDOW)
    assert bench.driver.offered_features() & 1 << 5
    memory = bench.transport.memory_bar
    assert memory is not None
    for address in (WINDOW, None, 3 << 40):
        bench.transport.bar_moved(memory, address)
        bench.transport.bar_moved(bench.transport.bar, WINDOW)
    assert device.moves == [(7, 1 << 40), (7, WINDOW), (7, 3 << 40)]
    bench.transport.close()


def test_there_is_room_for_one_region() -> None:
    device = Shared()
    device.shared_memory = {**device.shared_memory, 8: SharedMemory(0, 4096)}
    with pytest.raises(ValueError, match="2 shared memory regions"):
        Bench(device)


def test_shared_memory_that_no_machine_has_answers_nothing() -> None:
    bench = Bench(Shared())
    assert bench.transport.memory_bar is not None
    handler = bench.transport.memory_bar.handler
    handler.write(0, 4, 1)
    assert handler.read(0, 4) == 0xFFFF_FFFF
    bench.transport.close()


@recording
def test_row13_queue_fields_read_back_and_those_of_no_queue_are_0(bench: Bench) -> None:
    driver = bench.driver
    driver.negotiate()
    driver.set_field((0x16, 2), 1)
    assert driver.field(Q_SIZE) == 64
    driver.set_field(Q_SIZE, 16)
    for at in (0x20, 0x28, 0x30):
        driver.set_field((at, 8), 0x1_2345_6000 + at)
        assert driver.field((at, 8)) == 0x1_2345_6000 + at
        assert (driver.field((at, 4)), driver.field((at + 4, 4))) == (0x2345_6000 + at, 1)
    assert driver.field(Q_SIZE) == 16
    driver.set_field((0x16, 2), 7)
    assert driver.field((0x16, 2)) == 7
    assert [driver.field(place) for place in (Q_SIZE, Q_ENABLE, NOTIFY_OFF)] == [0, 0, 0]
    assert driver.field(QUEUE_VECTOR) == NO_VECTOR
    assert driver.field((0x20, 8)) == 0
    count = driver.field(NUM_QUEUES)
    driver.set_field((0x16, 2), count)  # the first one that is not there
    driver.set_field(Q_RESET, 1)
    driver.set_field(QUEUE_VECTOR, 0)
    assert driver.field(QUEUE_VECTOR) == NO_VECTOR
    assert [driver.field(place) for place in (Q_SIZE, Q_ENABLE, NOTIFY_OFF)] == [0, 0, 0]
    for select in (0, 1, 7):
        driver.set_field((0, 4), select)
        assert driver.field((0, 4)) == select


@recording
def test_features_that_were_accepted_read_back(bench: Bench, device: RecordingDevice) -> None:
    driver = bench.driver
    driver.negotiate()
    for select, expected in (
        (0, driver.features & 0xFFFF_FFFF),
        (1, driver.features >> 32),
        (2, 0),
    ):
        driver.set_field((8, 4), select)
        assert driver.field((8, 4)) == select
        assert driver.field((0x0C, 4)) == expected


@recording
def test_a_queue_without_a_size_has_the_largest(bench: Bench, device: RecordingDevice) -> None:
    """4.1.4.3: at a reset queue_size is the largest, and a driver need not write it."""
    driver = bench.driver
    driver.negotiate()
    driver.set_field((0x16, 2), 0)
    for at, address in ((0x20, 0x1000), (0x28, 0x3000), (0x30, 0x4000)):
        driver.set_field((at, 8), address)
    driver.set_field(Q_ENABLE, 1)
    assert driver.field(Q_ENABLE) == 1
    driver.add_status(mmio.DRIVER_OK)
    queue = device.live.queues[0]
    assert queue is not None and queue.size == 256


@recording
def test_row14_queue_enable_with_size_0_or_twice_or_0(bench: Bench) -> None:
    driver = bench.driver
    driver.negotiate()
    assert driver.place_queue(0, 16, 0x1000, 0x3000, 0x4000)
    driver.set_field(Q_ENABLE, 1)  # once more
    driver.set_field(Q_ENABLE, 0)  # what no driver does
    driver.set_field(Q_SIZE, 0)
    assert (driver.field(Q_ENABLE), driver.field(Q_SIZE)) == (1, 16)
    driver.set_field((0x16, 2), 1)
    driver.set_field(Q_SIZE, 0)
    assert driver.field(Q_SIZE) == 64
    for value in (0, 2, 0xFFFF):
        driver.set_field(Q_ENABLE, value)
        assert driver.field(Q_ENABLE) == 0
    driver.set_field((0x16, 2), 9)
    driver.set_field(Q_ENABLE, 1)
    assert driver.field(Q_ENABLE) == 0
    assert any("queue_enable 0x0 ignored" in line for line in bench.said)


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0x14, 4), (0x00, 2), (0x01, 4), (0x12, 1), (0x16, 4), (0x20, 2), (0x24, 8)],
)
def test_row01_accesses_of_other_widths(bench: Bench, offset: int, size: int) -> None:
    """4.1.3.1 Driver Requirements: each field by its own width, those of 64 bits by halves too."""
    bench.driver.start()
    before = bench.memory.read(0, RAM), bench.driver.status
    bench.driver.set_field((offset, size), (1 << 8 * size) - 1)
    assert bench.driver.field((offset, size)) == 0
    assert (bench.memory.read(0, RAM), bench.driver.status) == before
    ask(bench)


@pytest.mark.parametrize("offset", [0x04, 0x12, 0x15, 0x1E, 0x38, 0x3C, 0x3E])
def test_row02_what_is_read_only(bench: Bench, offset: int) -> None:
    bench.driver.negotiate()
    [width] = [row.width for row in COMMON if row.offset == offset]
    before = bench.driver.field((offset, width))
    bench.driver.set_field((offset, width), (1 << 8 * width) - 1)
    assert bench.driver.field((offset, width)) == before


def test_accesses_between_and_over_structures(bench: Bench) -> None:
    bench.driver.start()
    window, size = bench.bus.window, bench.transport.bar.size
    for at in (COMMON_SIZE, 0x1001, size - 8):
        window.write(at, 4, 0xFFFF_FFFF)
        assert window.read(at, 4) == 0
    assert window.read(COMMON_SIZE - 2, 4) == 0
    window.write(COMMON_SIZE - 2, 4, 0)
    ask(bench)
    bench.driver.find()
    pending = bench.driver.read_config(bench.driver.msix.at + 8, 4)
    ends = [(one.offset, one.length) for one in bench.driver.structures.values() if one.length]
    ends += [(bench.driver.msix.offset, bench.driver.msix.length), (pending, 8)]
    for start, length in ends:
        for at in range(start + length - 8, start + length + 64):
            for width in (1, 2, 4, 8):
                if at + width > start + length and at + width <= start + 4096:
                    assert window.read(at, width) == 0
                    window.write(at, width, (1 << 8 * width) - 1)
    ask(bench)


# --- vectors --------------------------------------------------------------------------------------


def test_row64_vectors_that_are_not_there_read_back_as_none(bench: Bench) -> None:
    driver = bench.driver
    driver.negotiate()
    for place in (CONFIG_VECTOR, QUEUE_VECTOR):
        for vector, found in ((0, 0), (1, 1), (2, NO_VECTOR), (1, 1), (NO_VECTOR, NO_VECTOR)):
            driver.set_field(place, vector)
            assert driver.field(place) == found
    assert sum("vector 0x2 refused" in line for line in bench.said) == 2


def test_row64_a_queue_without_a_vector_interrupts_nobody(bench: Bench) -> None:
    bench.driver.start()
    bench.driver.set_field((0x16, 2), 0)
    bench.driver.set_field(QUEUE_VECTOR, NO_VECTOR)
    ask(bench)
    assert bench.sent() == [[], []]
    assert not any(line.pending for line in bench.lines)
    assert bench.transport.used_eventfd(0) is None


class Served(RecordingDevice):
    """Its queue is served elsewhere, by somebody who asks once what to signal."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[object] = []
        self.features &= ~(1 << 34)

    def queue_lock(self) -> OffloadLock:
        return OffloadLock()

    def activate(self, activation: Activation) -> None:
        super().activate(activation)
        queue = activation.queues[0]
        assert queue is not None and isinstance(queue.lock, OffloadLock)
        queue.lock.serve_by(self)

    def hand_over(self) -> None:
        self.calls.append(self.live.interrupt.eventfd(0))

    def take_back(self) -> None:
        self.calls.append("back")


def test_who_serves_a_queue_elsewhere_learns_of_its_vector() -> None:
    device = Served()
    bench = Bench(device)
    bench.driver.start()
    assert device.calls == [bench.lines[1]]
    bench.driver.set_field((0x16, 2), 0)
    for vector, line in ((2, bench.lines[2]), (NO_VECTOR, None), (1, bench.lines[1])):
        device.calls.clear()
        bench.driver.set_field(QUEUE_VECTOR, vector)
        assert device.calls == ["back", line]
    # Without a vector the driver polls: it is told of used buffers whenever it asks.
    assert bench.driver.read(mmio.INTERRUPT_STATUS) & mmio.USED_BUFFER
    bench.transport.close()


@recording
def test_vectors_that_are_shared(bench: Bench, device: RecordingDevice) -> None:
    bench.driver.start()
    for index in (0, 1):
        bench.driver.set_field((0x16, 2), index)
        bench.driver.set_field(QUEUE_VECTOR, 2)
    bench.transport.used_buffer(0, 1)
    bench.transport.used_buffer(1)
    device.live.interrupt.signal_config_change()
    assert bench.sent() == [[0], [], [2, 2]]


@recording
def test_queues_with_vectors_of_their_own_each_interrupt(bench: Bench) -> None:
    bench.driver.start()
    bench.transport.used_buffer(0, 1)
    assert [len(sent) for sent in bench.sent()] == [0, 1, 1]
    for index in (0, 1):
        assert bench.transport.used_eventfd(index) is bench.lines[index + 1]
    bench.driver.set_field((0x16, 2), 1)
    bench.driver.set_field(QUEUE_VECTOR, NO_VECTOR)
    assert bench.transport.used_eventfd(1) is None
    bench.transport.used_buffer(0, 1)
    assert [len(sent) for sent in bench.sent()] == [0, 2, 1]


def test_a_queue_that_is_not_reset_keeps_its_vector(bench: Bench) -> None:
    bench.driver.start()
    bench.driver.set_field((0x16, 2), 0)
    bench.driver.set_field(Q_RESET, 0)
    assert bench.driver.field(QUEUE_VECTOR) == 1
    bench.driver.set_field((0x16, 2), bench.driver.field(NUM_QUEUES))
    bench.driver.set_field(Q_RESET, 1)
    ask(bench)


@pytest.mark.parametrize("what", ["bus mastering", "reset"])
def test_what_the_function_does_waits_for_a_register_that_is_being_written(
    bench: Bench, what: str
) -> None:
    change = {
        "bus mastering": lambda: bench.transport.bus_master_changed(True),
        "reset": bench.transport.function_reset,
    }[what]
    changing = threading.Thread(target=change)
    with bench.transport.negotiation.lock:
        changing.start()
        changing.join(0.2)
        assert changing.is_alive()
    changing.join(60)
    assert not changing.is_alive()


def test_row12_a_reset_forgets_the_vectors(bench: Bench) -> None:
    bench.driver.start()
    bench.driver.reset()
    bench.driver.set_field((0x16, 2), 0)
    assert bench.driver.field(CONFIG_VECTOR) == bench.driver.field(QUEUE_VECTOR) == NO_VECTOR


def test_a_queue_reset_forgets_its_vector(bench: Bench) -> None:
    bench.driver.start()
    bench.driver.set_field((0x16, 2), 0)
    assert bench.driver.field(QUEUE_VECTOR) == 1
    bench.driver.set_field(Q_RESET, 1)
    assert (bench.driver.field(Q_RESET), bench.driver.field(QUEUE_VECTOR)) == (0, NO_VECTOR)
    bench.driver.reset_queue(0)
    ask_and_hear(bench)


def test_row65_masked_while_a_buffer_is_used(bench: Bench) -> None:
    bench.driver.start()
    bench.driver.program(1, 1, control=1)
    ask_and_hear(bench, lambda: bench.lines[1].pending)
    assert bench.sent() == [[], []]
    bench.driver.program(1, 1)
    assert bench.sent() == [[], [1]]


def test_row65_masking_races_with_completions(bench: Bench) -> None:
    """A driver that unmasks after the last completion has the interrupt for it."""
    bench.driver.start()
    stop = threading.Event()

    def toggle() -> None:
        while not stop.is_set():
            bench.driver.program(1, 1, control=1)
            bench.driver.program(1, 1)

    toggling = threading.Thread(target=toggle)
    toggling.start()
    try:
        for count in range(1, 200):
            ask_and_hear(bench)
            assert bench.irq.count <= count, "an interrupt that nobody sent"
    finally:
        stop.set()
        toggling.join()


def test_msix_off_leaves_nothing_behind(bench: Bench) -> None:
    bench.driver.start()
    bench.driver.write_config(bench.driver.msix.at + 2, 2, 0)
    ask_and_hear(bench, lambda: bool(bench.driver.read(mmio.INTERRUPT_STATUS)))
    bench.driver.write_config(bench.driver.msix.at + 2, 2, MSIX_ENABLE)
    assert bench.sent() == [[], []]


def test_a_read_of_the_isr_clears_it(bench: Bench) -> None:
    bench.driver.start()
    ask_and_hear(bench)
    where = bench.driver.access(ISR_CFG, 0)
    assert [bench.bus.window.read(where, 1) for _ in range(2)] == [mmio.USED_BUFFER, 0]


# --- notifications --------------------------------------------------------------------------------


def test_row19_a_notification_of_a_queue_that_is_not_there(bench: Bench) -> None:
    bench.driver.start()
    bench.bus.window.write(bench.driver.access(NOTIFY_CFG, 4), 2, 1)
    bench.bus.window.write(bench.driver.access(NOTIFY_CFG, 4 * 1023), 2, 1)
    ask(bench)


def test_row11_a_notification_before_driver_ok(bench: Bench) -> None:
    bench.driver.negotiate()
    bench.driver.setup_queues()
    bench.driver.notify(0)
    assert any("ignored before DRIVER_OK" in line for line in bench.said)


@pytest.mark.parametrize(("offset", "size"), [(0, 2), (0, 4), (0, 1), (2, 2)])
def test_every_write_to_a_queues_address_notifies_it(bench: Bench, offset: int, size: int) -> None:
    """As KVM sees it, whose ioeventfd is there for writes of any value and width."""
    bench.driver.start()
    queue = bench.driver.queues[0]
    queue.add([], [64])
    queue.publish()
    bench.bus.window.write(bench.driver.access(NOTIFY_CFG, offset), size, 0)
    wait_for(queue.has_used)
    assert bench.bus.window.read(bench.driver.access(NOTIFY_CFG, 0), 4) == 0


# --- bus mastering, BARs --------------------------------------------------------------------------


def test_row63_without_bus_mastering_nothing_is_read_or_written(bench: Bench) -> None:
    bench.driver.start()
    ask_and_hear(bench)
    bench.command(MEMORY)
    queue = bench.driver.queues[0]
    queue.add([], [64])
    queue.publish()
    before = bench.memory.read(0, RAM)
    bench.driver.kick(0)
    time.sleep(0.1)  # in which nothing happens
    assert bench.memory.read(0, RAM) == before
    bench.command(MEMORY | BUS_MASTER)
    wait_for(queue.has_used)
    wait_for(lambda: bench.sent() == [[], [1, 1]])


def test_row63_a_device_that_starts_without_bus_mastering_waits_for_it(bench: Bench) -> None:
    bench.driver.place(WINDOW, MEMORY)
    bench.driver.start()
    queue = bench.driver.queues[0]
    queue.add([], [64])
    queue.publish()
    bench.driver.kick(0)
    time.sleep(0.1)  # in which nothing happens
    assert not queue.has_used()
    bench.command(MEMORY | BUS_MASTER)
    wait_for(queue.has_used)


def test_row63_a_reset_without_bus_mastering(bench: Bench) -> None:
    bench.driver.start()
    bench.command(MEMORY)
    bench.driver.reset()
    bench.command(MEMORY | BUS_MASTER)
    bench.driver.start()
    ask(bench)


@of_class(SlowDevice)
def test_row63_turning_it_off_waits_for_the_request_in_flight(
    bench: Bench, device: SlowDevice
) -> None:
    bench.driver.start()
    queue = bench.driver.queues[0]
    bench.driver.submit(0, [], [4])
    assert device.started.wait(30)
    turning = threading.Thread(target=bench.command, args=(MEMORY,))
    turning.start()
    turning.join(0.1)
    assert turning.is_alive()
    device.release.set()
    turning.join(30)
    assert queue.has_used()
    # Its message was sent when there was no bus master any more, or before.
    bench.command(MEMORY | BUS_MASTER)
    wait_for(lambda: bench.sent() == [[], [1]])


@of_class(SlowDevice)
def test_row63_a_request_in_flight_holds_up_no_other_function(
    bench: Bench, device: SlowDevice
) -> None:
    other = Function(1, 2, 0)
    bench.bus.add(SLOT + 1, other)
    device.started.clear()
    device.release.clear()
    bench.driver.start()
    bench.driver.submit(0, [], [4])
    assert device.started.wait(30)
    turning = threading.Thread(target=bench.command, args=(MEMORY,))
    turning.start()
    turning.join(0.1)
    assert turning.is_alive()
    writing = threading.Thread(
        target=bench.bus.write, args=(SLOT + 1, 0, COMMAND, 2, MEMORY), daemon=True
    )
    writing.start()
    writing.join(30)  # less than the device waits
    assert other.decodes_memory
    device.release.set()
    turning.join(30)


def test_row62_the_doorbells_follow_the_bar(bench: Bench) -> None:
    bench.driver.start()
    bench.driver.place(WINDOW + 0x10_0000)
    assert bench.places[-2:] == [None, WINDOW + 0x10_0000]
    ask(bench)
    bench.command(BUS_MASTER)
    assert bench.places[-1] is None
    assert bench.bus.window.read(0x10_0000, 4) == 0xFFFF_FFFF


# --- PCI_CFG: 4.1.4.9 -----------------------------------------------------------------------------


def by_config(bench: Bench, offset: int, length: int, value: int | None = None, bar: int = 0):
    at = bench.driver.structures[PCI_CFG].at
    bench.driver.write_config(at + 4, 1, bar)
    bench.driver.write_config(at + 8, 4, offset)
    bench.driver.write_config(at + 12, 4, length)
    if value is not None:
        bench.driver.write_config(at + 16, length if length in (1, 2, 4) else 4, value)
    return bench.driver.read_config(at + 16, 4)


def test_row67_the_status_and_features_through_pci_cfg(bench: Bench) -> None:
    """Nothing is decoded: not even the status register."""
    bench.driver.find()
    assert by_config(bench, 0x14, 1) == 0
    for status in (1, 3):
        by_config(bench, 0x14, 1, status)
        assert by_config(bench, 0x14, 1) == status
    assert by_config(bench, 0x12, 2) == 1
    by_config(bench, 0x08, 4, 1)
    by_config(bench, 0x0C, 4, 1)
    by_config(bench, 0x14, 1, 11)
    assert by_config(bench, 0x14, 1) == 11
    by_config(bench, 0x14, 1, 0)
    assert by_config(bench, 0x14, 1) == 0
    assert len(bench.transport.function.space) == pci.PCI_CFG_SPACE_EXP_SIZE


def test_row12_a_reset_through_pci_cfg_waits_for_the_request_in_flight() -> None:
    device = SlowDevice()
    bench = Bench(device)
    bench.driver.start()
    bench.driver.submit(0, [], [4])
    assert device.started.wait(30)
    resetting = threading.Thread(target=by_config, args=(bench, 0x14, 1, 0))
    resetting.start()
    resetting.join(0.1)
    assert resetting.is_alive(), "it waits for the request"
    device.release.set()
    resetting.join(30)
    assert bench.driver.queues[0].has_used()
    assert by_config(bench, 0x14, 1) == 0
    bench.transport.close()


@pytest.mark.parametrize(
    ("bar", "offset", "length"),
    [
        *[(bar, 0x14, 1) for bar in (1, 2, 5, 6, 255)],
        *[(0, 0x14, length) for length in (0, 3, 5, 8, 0xFFFF_FFFF)],
        *[(0, 1, 2), (0, 2, 4), (0, 0x15, 2), (0, 0x13, 2)],
        *[(0, 1 << 31, 1), (0, 0xFFFF_FFFC, 4), (0, 0xFFFF_FFFF, 1)],
    ],
)
def test_row67_a_window_to_nowhere(bench: Bench, bar: int, offset: int, length: int) -> None:
    bench.driver.start()
    before = bench.driver.status
    by_config(bench, offset, length, 0, bar)
    assert bench.driver.status == before
    ask(bench)


@recording
def test_row67_an_access_that_is_not_aligned_notifies_nobody(bench: Bench) -> None:
    bench.driver.start()
    notify = bench.driver.structures[NOTIFY_CFG].offset
    by_config(bench, notify + 1, 2, 0)
    assert not bench.transport.kicks[0].is_signalled
    by_config(bench, notify, 2, 0)
    assert bench.transport.kicks[0].is_signalled


def test_row67_only_the_data_is_an_access(bench: Bench) -> None:
    """Not the fields that say where it goes."""
    bench.driver.start()
    at = bench.driver.structures[PCI_CFG].at
    assert by_config(bench, bench.driver.structures[ISR_CFG].offset, 1) == 0
    bench.transport.negotiation.config_changed()
    for offset, size in ((0, 4), (4, 1), (8, 4), (12, 4), (8, 8)):
        bench.driver.read_config(at + offset, size)
    assert bench.driver.read_config(at + 16, 1) == 2
    before = bench.driver.status
    bench.driver.write_config(at + 16, 4, 0)
    assert by_config(bench, 0x14, 1) == before
    bench.driver.write_config(at + 8, 4, 0x12)
    bench.driver.write_config(at + 16, 1, 0)  # of a register that is read-only
    bench.driver.write_config(at + 8, 4, 0x14)
    bench.driver.write_config(at + 4, 1, 0)
    assert bench.driver.status == before
    ask(bench)


def test_row67_the_end_of_the_bar(bench: Bench) -> None:
    bench.driver.find()
    size = bench.transport.bar.size
    assert by_config(bench, size - 4, 4, 1) == 0
    at = bench.driver.structures[PCI_CFG].at
    by_config(bench, size, 4, 0x1234)
    assert bench.driver.read_config(at + 16, 4) == 0x1234  # what was written there, no more


# --- function-level reset -------------------------------------------------------------------------


def express(bench: Bench) -> int:
    return dict(bench.driver.capabilities())[CAP_EXPRESS]


def test_the_express_capability(bench: Bench) -> None:
    at = express(bench)
    assert bench.driver.read_config(at + 2, 2) == pci.PCI_EXP_TYPE_RC_END << 4 | 2
    assert bench.driver.read_config(at + 4, 4) & pci.PCI_EXP_DEVCAP_FLR
    assert bench.driver.read_config(0x100, 4) == 0  # no extended capabilities


def test_row68_a_function_reset_with_a_request_in_flight() -> None:
    device = SlowDevice()
    bench = Bench(device)
    bench.driver.start()
    bench.driver.submit(0, [], [4])
    assert device.started.wait(30)
    at = express(bench)
    resetting = threading.Thread(
        target=bench.driver.write_config, args=(at + 8, 2, pci.PCI_EXP_DEVCTL_BCR_FLR)
    )
    resetting.start()
    resetting.join(0.1)
    assert resetting.is_alive(), "it waits for the request"
    device.release.set()
    resetting.join(30)
    assert bench.driver.read_config(COMMAND, 2) == 0
    assert bench.driver.read_config(at + 8, 2) == 0
    assert bench.driver.read_config(BAR0, 4) & ~0xF == 0
    assert bench.places[-1] is None
    assert not bench.driver.read_config(bench.driver.msix.at + 2, 2) & MSIX_ENABLE
    assert bench.transport.negotiation.state.status == 0
    device.started.clear()
    bench.driver.place(WINDOW)
    bench.driver.start()
    bench.driver.request(0, [], [4])
    bench.transport.close()


def test_row68_a_function_reset_forgets_what_was_written_to_capabilities(bench: Bench) -> None:
    before = bytes(bench.transport.function.space)
    bench.driver.start()
    by_config(bench, 0x10, 2, 0x5A5A)
    for at in range(0x40, pci.PCI_CFG_SPACE_SIZE, 4):
        if at != express(bench) + 8:
            bench.driver.write_config(at, 4, 0xFFFF_FFFF)
    bench.driver.write_config(express(bench) + 8, 2, pci.PCI_EXP_DEVCTL_BCR_FLR | 0x7FFF)
    assert bench.transport.function.space == before


def reset_function(bench: Bench) -> threading.Thread:
    """A vCPU that resets the function, and may have to wait."""
    at = express(bench) + 8
    flags = pci.PCI_EXP_DEVCTL_BCR_FLR
    started = threading.Thread(target=bench.driver.write_config, args=(at, 2, flags))
    started.start()
    return started


def test_row68_no_write_reaches_a_function_that_is_being_reset(bench: Bench) -> None:
    bench.driver.start()
    with bench.transport.negotiation.lock:
        resetting = reset_function(bench)
        wait_for(lambda: bench.places[-1:] == [None])
        status, table = bench.driver.access(COMMON_CFG, 0x14), bench.driver.msix.offset
        bench.bus.window.write(status, 1, 1)
        bench.bus.window.write(table + 8, 4, 0x1234)
    resetting.join(30)
    assert bench.transport.negotiation.state.status == 0
    assert bench.transport.msix.read_table(8, 4) == 0


def test_row68_a_write_that_is_under_way_is_before_the_reset(bench: Bench) -> None:
    bench.driver.negotiate()
    bench.driver.reset()
    where = bench.driver.access(COMMON_CFG, 0x14)
    with bench.transport.negotiation.lock:
        writing = threading.Thread(target=bench.bus.window.write, args=(where, 1, 1))
        writing.start()
        writing.join(0.1)
        resetting = reset_function(bench)
        resetting.join(0.1)
        assert writing.is_alive() and resetting.is_alive()
    writing.join(30)
    resetting.join(30)
    assert bench.transport.negotiation.state.status == 0


def test_row68_a_function_that_is_removed_with_a_request_in_flight() -> None:
    device = SlowDevice()
    bench = Bench(device)
    bench.driver.start()
    bench.driver.submit(0, [], [4])
    assert device.started.wait(30)
    device.release.set()
    bench.bus.remove(SLOT, bench.bus.functions[SLOT])
    bench.transport.close()
    assert bench.driver.read_config(0, 4) == 0xFFFF_FFFF
    assert struct.unpack("<B", bench.memory.read(0, 1))
