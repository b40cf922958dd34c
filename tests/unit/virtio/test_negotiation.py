"""A device and its transport when things change or break."""

from __future__ import annotations

import errno
from collections.abc import Callable
from copy import deepcopy
from threading import Thread
from typing import Any

import pytest
from mmio_harness import (
    AGREED,
    CONFIG,
    CONFIG_GENERATION,
    DRIVEN,
    FAILED,
    LIVE,
    NEEDS_RESET,
    QUEUE_NOTIFY,
    QUEUE_READY,
    QUEUE_RESET,
    QUEUE_SEL,
    SHM_BASE_HIGH,
    SHM_BASE_LOW,
    SHM_LEN_HIGH,
    SHM_LEN_LOW,
    SHM_SEL,
    STATUS,
    VERSION_1,
    Bench,
    RecordingDevice,
)

from pyvmm.errors import DriverError, GuestMemoryError, HostError
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing.mmio_driver import InterruptLine, MmioDriver
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio import defects, features
from pyvmm.virtio.device import SharedMemory
from pyvmm.virtio.negotiation import Negotiation
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.rng.device import EntropyDevice
from pyvmm.virtio.worker import QueueDevice

BROKEN_RING = DriverError("available index jumped", section="2.7.6.1")


# --- needs reset ----------------------------------------------------------------------------------


def test_a_broken_ring_sets_needs_reset_and_tells_the_driver(
    bench: Bench, device: RecordingDevice
) -> None:
    bench.go_live()
    generation = bench.read(CONFIG_GENERATION)
    device.live.fail(BROKEN_RING)
    assert bench.status == LIVE | NEEDS_RESET
    assert (bench.interrupt_status, bench.edges) == (2, 1)
    assert bench.read(CONFIG_GENERATION) != generation
    queue = device.live.queues[0]
    assert queue is not None and not queue.ready
    assert bench.lines == [
        "dev0: needs a reset: available index jumped (virtio 1.3, 2.7.6.1)",
    ]


def test_a_second_failure_says_nothing_new(bench: Bench, device: RecordingDevice) -> None:
    bench.go_live()
    device.live.fail(BROKEN_RING)
    device.live.fail(BROKEN_RING)
    assert (len(bench.lines), bench.edges) == (1, 1)


def test_needs_reset_ends_with_a_reset_only(bench: Bench, device: RecordingDevice) -> None:
    bench.go_live()
    device.live.fail(BROKEN_RING)
    bench.write(STATUS, LIVE)  # a driver that has not seen the bit yet
    assert bench.status == LIVE | NEEDS_RESET
    bench.write(STATUS, LIVE | FAILED)
    assert bench.status == LIVE | NEEDS_RESET | FAILED
    bench.write(QUEUE_NOTIFY, 0)
    assert bench.transport.kicks[0].drain() == 0
    bench.go_live()
    assert (bench.status, device.activations, bench.negotiation.activations) == (LIVE, 2, 2)


def test_a_driver_cannot_set_needs_reset(bench: Bench, device: RecordingDevice) -> None:
    bench.go_live()
    resets = device.resets
    bench.write(STATUS, LIVE | NEEDS_RESET)
    assert bench.status == LIVE
    bench.write(STATUS, NEEDS_RESET)
    assert (bench.status, device.resets) == (LIVE, resets)
    assert bench.lines[-1].startswith(f"dev0: status {NEEDS_RESET:#x} ignored: ")


@pytest.mark.parametrize(
    "error", [BROKEN_RING, HostError(errno.EMFILE, "eventfd")], ids=["driver", "host"]
)
def test_an_activation_that_fails_needs_a_reset(
    bench: Bench, device: RecordingDevice, error: Exception
) -> None:
    device.activate_error = error
    bench.go_live()
    assert bench.status == LIVE | NEEDS_RESET
    assert bench.interrupt_status == 2
    assert str(error) in bench.lines[-1]
    traced = Bench(device, trace=True)
    traced.go_live()
    kinds = [type(event).__name__ for event in traced.events]
    assert "NeedsReset" in kinds and "Activated" not in kinds
    device.activate_error = None
    bench.go_live()
    assert bench.status == LIVE


def test_a_reset_that_fails_does_not_read_as_done(bench: Bench, device: RecordingDevice) -> None:
    bench.go_live()
    device.reset_error = HostError(errno.EIO, "fdatasync")
    bench.write(STATUS, 0)
    assert bench.status == LIVE | NEEDS_RESET
    device.reset_error = None
    bench.write(STATUS, 0)
    assert bench.status == 0


@pytest.mark.parametrize("method", ["activate", "reset", "read_config", "write_config"])
def test_a_defect_of_a_device_that_a_guest_finds_costs_only_the_device(
    bench: Bench, device: RecordingDevice, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(defects, "_report", lines.append)

    def broken(*args: object) -> None:
        raise IndexError("list index out of range")

    bench.go_live()
    with monkeypatch.context() as patched:
        patched.setattr(device, method, broken)
        if method == "activate":
            bench.go_live()
        bench.write(CONFIG, 1)
        bench.read(CONFIG)
        if method == "reset":
            bench.write(STATUS, 0)
        assert bench.status == LIVE | NEEDS_RESET
        assert bench.interrupt_status == 2
    [line] = lines
    assert "failed inside the monitor: IndexError" in line
    assert "test_negotiation.py:" in line
    bench.go_live()
    assert bench.status == LIVE


@pytest.mark.parametrize("found", [None, "text", 5], ids=repr)
def test_a_configuration_that_is_no_bytes_costs_only_the_device(
    bench: Bench, device: RecordingDevice, monkeypatch: pytest.MonkeyPatch, found: object
) -> None:
    monkeypatch.setattr(defects, "_report", lambda line: None)
    bench.go_live()
    monkeypatch.setattr(device, "read_config", lambda offset, length: found)
    assert bench.read(CONFIG) == 0
    assert bench.status == LIVE | NEEDS_RESET


def test_a_defect_of_a_device_that_is_told_of_features_costs_only_the_device(
    bench: Bench, device: RecordingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defects, "_report", lambda line: None)

    def broken(features: int) -> None:
        raise IndexError("list index out of range")

    with monkeypatch.context() as patched:
        patched.setattr(device, "accept_features", broken)
        bench.go_live()
        assert bench.status == DRIVEN | NEEDS_RESET, "FEATURES_OK says that it works with them"
    bench.go_live()
    assert bench.status == LIVE


class _Between:
    """A lock after which, once `condition` holds, something else happens first."""

    def __init__(self, lock: Any, condition: Callable[[], bool], happens: Callable[[], None]):
        self._lock, self._condition, self._happens = lock, condition, happens

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        if self._condition():
            happens, self._happens = self._happens, lambda: None
            happens()


def test_a_failure_touches_no_queue_of_the_next_activation(
    bench: Bench, device: RecordingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vCPU that reads a broken configuration takes no lock; another one resets the device."""
    monkeypatch.setattr(defects, "_report", lambda line: None)
    bench.go_live()
    negotiation = bench.negotiation
    negotiation._events = _Between(  # type: ignore[assignment]
        negotiation._events, lambda: bool(negotiation.state.status & NEEDS_RESET), bench.go_live
    )
    negotiation.fail(BROKEN_RING)
    assert (bench.status, device.activations) == (LIVE, 2)
    [queue, _] = device.live.queues
    assert queue is not None and queue.ready


def test_whoever_takes_a_ring_from_its_worker_for_a_moment_wakes_it_again(
    bench: Bench, device: RecordingDevice
) -> None:
    """It may have ended its batch early because of that, with more in the ring."""
    bench.go_live()
    bench.negotiation.state.used_elsewhere = 2
    with bench.negotiation.lock:
        bench.negotiation.interrupt_moved(0)
    assert bench.transport.kicks[0].drain() == 1


def test_failed_devices_fill_no_log(bench: Bench, device: RecordingDevice) -> None:
    for _ in range(100):
        bench.go_live()
        device.live.fail(BROKEN_RING)
    assert len(bench.lines) == 3  # the others are counted, in the line after the rest


def test_a_flood_of_warnings_does_not_hide_the_failure(
    bench: Bench, device: RecordingDevice
) -> None:
    bench.go_live()
    for _ in range(100):
        bench.write(QUEUE_NOTIFY, 77)
    device.live.fail(BROKEN_RING)
    assert "needs a reset" in bench.lines[-1]


# --- the configuration's generation ---------------------------------------------------------------


def test_the_generation_changes_with_the_configuration(
    bench: Bench, device: RecordingDevice
) -> None:
    bench.go_live()
    before = bench.read(CONFIG_GENERATION)
    assert bench.read(CONFIG_GENERATION) == before
    device.config[0] = 99
    device.live.interrupt.signal_config_change()
    assert bench.read(CONFIG_GENERATION) != before


def test_a_change_between_two_reads_is_seen_before_it_is_signalled(
    bench: Bench, device: RecordingDevice
) -> None:
    """The driver's loop of 2.5.1: the device has changed a field, its signal is still to come."""
    bench.go_live()
    before = bench.read(CONFIG_GENERATION)
    low = bench.read(CONFIG)
    device.config[0:8] = bytes(8)
    high = bench.read(CONFIG + 4)
    assert (low, high) == (0x04030201, 0), "this is the torn value that must be noticed"
    assert bench.read(CONFIG_GENERATION) != before
    for place in (0, len(device.config) - 1):
        before = bench.read(CONFIG_GENERATION)
        device.config[place] ^= 0xFF
        assert bench.read(CONFIG_GENERATION) != before


def test_a_change_before_driver_ok_raises_the_generation_but_interrupts_nobody(
    bench: Bench, device: RecordingDevice
) -> None:
    bench.negotiate()
    before = bench.read(CONFIG_GENERATION)
    bench.negotiation.config_changed()
    assert bench.read(CONFIG_GENERATION) != before
    assert (bench.interrupt_status, bench.edges) == (0, 0)


def test_the_generation_is_not_read_while_it_changes(bench: Bench) -> None:
    reader = Thread(target=bench.read, args=(CONFIG_GENERATION,), daemon=True)
    with bench.negotiation._events:  # as whoever signals a change has it
        reader.start()
        reader.join(0.1)
        assert reader.is_alive()
    reader.join(30)
    assert not reader.is_alive()


def test_no_interrupt_is_told_of_while_a_reset_ends_the_activation(
    bench: Bench, device: RecordingDevice
) -> None:
    bench.go_live()
    signals = Thread(target=device.live.interrupt.signal_used, args=(0,), daemon=True)
    with bench.negotiation._events:  # as the reset has it
        signals.start()
        signals.join(0.1)
        assert signals.is_alive()
    signals.join(30)
    assert bench.interrupt_status == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda negotiation: negotiation.add_status(FAILED),
        lambda negotiation: negotiation.acknowledge(1),
        lambda negotiation: negotiation.config_changed(),
        lambda negotiation: negotiation.fail(BROKEN_RING),
        lambda negotiation: negotiation.reset(),
        lambda negotiation: negotiation._clear(),
    ],
    ids=["status", "acknowledgement", "configuration", "failure", "reset", "last step of a reset"],
)
def test_what_workers_and_drivers_change_is_changed_by_one_thread_at_a_time(
    bench: Bench, device: RecordingDevice, change: Callable[[Negotiation], object]
) -> None:
    bench.go_live()
    device.live.interrupt.signal_used(0)
    before, resets = deepcopy(bench.negotiation.state), device.resets
    changing = Thread(target=change, args=(bench.negotiation,), daemon=True)
    with bench.negotiation._events:
        changing.start()
        changing.join(0.1)
        assert changing.is_alive()
        assert (bench.negotiation.state, device.resets) == (before, resets)
    changing.join(30)
    assert not changing.is_alive()
    assert bench.negotiation.state != before


def test_the_generation_goes_on_over_a_reset(bench: Bench, device: RecordingDevice) -> None:
    bench.go_live()
    device.live.interrupt.signal_config_change()
    before = bench.read(CONFIG_GENERATION)
    bench.write(STATUS, 0)
    assert bench.read(CONFIG_GENERATION) == before


def test_a_driver_error_in_the_configuration_needs_a_reset(
    bench: Bench, device: RecordingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise BROKEN_RING

    bench.go_live()
    monkeypatch.setattr(device, "read_config", refuse)
    assert bench.read(CONFIG) == 0
    assert bench.status == LIVE | NEEDS_RESET
    bench.write(STATUS, 0)
    bench.go_live()
    monkeypatch.setattr(device, "write_config", refuse)
    bench.write(CONFIG, 1)
    assert bench.status == LIVE | NEEDS_RESET


# --- what a device may be -------------------------------------------------------------------------


@pytest.mark.parametrize("bit", [24, 33, 36, 37, 38, 39, 41, 49])
def test_a_device_that_offers_what_is_not_implemented_is_a_bug(bit: int) -> None:
    device = RecordingDevice()
    device.features = 1 << bit
    with pytest.raises(ValueError, match="does not implement"):
        Bench(device)


def test_a_device_has_65536_queues_at_most(bench: Bench) -> None:
    """2.6 Virtqueues."""

    class Wide(RecordingDevice):
        queue_sizes = (1,) * 65536

    class TooWide(RecordingDevice):
        queue_sizes = (1,) * 65537

    Negotiation(Wide(), bench.memory, bench.transport, ())
    with pytest.raises(ValueError, match="more than 65536"):
        Negotiation(TooWide(), bench.memory, bench.transport, ())


class ManyFeatures(RecordingDevice):
    features = (1 << 24) - 1


def test_all_features_of_a_device_are_offered(bench: Bench) -> None:
    other = type(bench)(ManyFeatures())
    assert other.negotiation.offered == ManyFeatures.features | VERSION_1
    other.transport.close()


def test_version_1_is_offered_for_every_device(bench: Bench, device: RecordingDevice) -> None:
    assert bench.offered() == device.features | VERSION_1


def test_queues_that_the_driver_leaves_out_are_none(bench: Bench, device: RecordingDevice) -> None:
    bench.negotiate()
    bench.enable_queue(index=1)
    bench.write(STATUS, LIVE)
    first, second = device.live.queues
    assert first is None
    assert second is not None and second.index == 1


@pytest.mark.parametrize("index", [0, 1])
def test_whoever_changes_the_memory_hears_that_a_ring_is_lost(
    bench: Bench, device: RecordingDevice, index: int
) -> None:
    bench.negotiate()
    bench.enable_queue(index)
    bench.write(STATUS, LIVE)
    bench.memory.regions = ()
    with pytest.raises(GuestMemoryError):
        bench.negotiation.memory_changed()
    assert bench.status == LIVE | NEEDS_RESET


def test_only_1_enables_a_queue_and_0_stops_it_at_any_time(
    bench: Bench, device: RecordingDevice
) -> None:
    bench.negotiate()
    bench.place_queue()
    for value in (2, 3, 0x10001, 0xFFFF_FFFF):
        bench.write(QUEUE_READY, value)
        assert bench.read(QUEUE_READY) == 0
    assert sum("0xffffffff ignored" in line for line in bench.lines) == 1
    bench.write(QUEUE_READY, 1)
    with bench.negotiation.lock:  # PCI has no register for it
        bench.negotiation.write_queue_ready(0)
    assert (bench.read(QUEUE_READY), bench.status) == (0, AGREED)
    bench.write(STATUS, LIVE)
    assert device.live.queues == (None, None)


def test_row18_a_queue_that_is_stopped_without_bus_mastering_stays_stopped(
    bench: Bench, device: RecordingDevice
) -> None:
    bench.go_live()
    [queue] = bench.negotiation.active_queues
    bench.negotiation.set_bus_master(False)
    assert not queue.ready
    bench.negotiation.write_queue_ready(0)
    bench.negotiation.set_bus_master(True)
    assert not queue.ready


@pytest.mark.parametrize("ready", [True, False], ids=["let go", "stopped"])
def test_a_ring_is_stopped_and_let_go_under_its_lock(bench: Bench, ready: bool) -> None:
    bench.go_live()
    [queue] = bench.negotiation.active_queues
    if ready:
        bench.negotiation.set_bus_master(False)
        change = Thread(target=bench.negotiation.set_bus_master, args=(True,), daemon=True)
    else:
        change = Thread(target=bench.negotiation.stop_queue, args=(0,), daemon=True)
    with queue.lock:  # as its worker has it
        change.start()
        change.join(0.1)
        assert change.is_alive() and queue.ready is not ready
    change.join(30)
    assert not change.is_alive() and queue.ready is ready


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_interrupt_that_moves_concerns_only_a_ring_that_is_served_elsewhere(
    bench: Bench, elsewhere: bool
) -> None:
    """Our own worker looks it up each time: its batch is not disturbed."""
    bench.go_live()
    [queue] = bench.negotiation.active_queues
    bench.negotiation.state.used_elsewhere = int(elsewhere)
    moved = Thread(target=bench.negotiation.interrupt_moved, args=(0,), daemon=True)
    with queue.lock:
        moved.start()
        moved.join(0.1 if elsewhere else 30)
        assert (moved.is_alive(), queue.halt) == (elsewhere, elsewhere)
    moved.join(30)
    assert not moved.is_alive()
    assert queue.lock.acquire(timeout=30)
    queue.lock.release()
    bench.negotiation.interrupt_moved(1)  # that is not in use


@pytest.mark.parametrize("word", [2, 3, 0xFFFF_FFFF])
def test_features_past_bit_63_are_neither_offered_nor_accepted(bench: Bench, word: int) -> None:
    negotiation = bench.negotiation
    bench.negotiate()
    negotiation.write_device_features_select(word)
    assert negotiation.read_device_features() == 0
    bench.write(STATUS, 0)
    accepted = negotiation.state.driver_features
    negotiation.write_driver_features_select(word)
    negotiation.write_driver_features(0)
    assert bench.lines == []
    negotiation.write_driver_features(1)
    assert negotiation.state.driver_features == accepted
    [line] = bench.lines
    assert f"features 0x1 in word {word}, ignored" in line


def test_features_are_accepted_word_by_word_and_the_last_writes_count(bench: Bench) -> None:
    negotiation = bench.negotiation
    negotiation.write_driver_features(0x5)  # a driver may leave the selector as it finds it
    assert negotiation.state.driver_features == 0x5
    negotiation.write_driver_features_select(1)
    negotiation.write_driver_features(0x9)
    negotiation.write_driver_features(0x6)
    assert negotiation.state.driver_features == 0x6_0000_0005
    negotiation.write_driver_features_select(0)
    negotiation.write_driver_features(0x2)
    assert negotiation.state.driver_features == 0x6_0000_0002


def test_a_device_hears_of_the_accepted_features_before_it_is_activated(
    bench: Bench, device: RecordingDevice
) -> None:
    """A driver may read and write the configuration then, which can depend on them (3.1.1)."""
    bench.negotiate()
    assert device.accepted == [bench.negotiation.state.driver_features]
    assert device.accepted[0] >> 32 & 1 and not device.activations


def test_a_write_to_the_configuration_has_no_more_bytes_than_it_says(
    bench: Bench, device: RecordingDevice
) -> None:
    bench.go_live()
    bench.negotiation.write_config(3, 2, 0xFF_3456)
    assert device.config_writes == [(3, b"\x56\x34")]


def test_a_device_that_cannot_be_suspended_says_so(bench: Bench, device: RecordingDevice) -> None:
    bench.go_live()
    device.reset_error = HostError(errno.EIO, "fsync")
    with pytest.raises(HostError, match="fsync"), bench.negotiation.lock:
        bench.negotiation.suspend()


def test_bits_have_the_names_of_the_devices_own_features() -> None:
    assert features.describe(1 << 3 | 1 << 5 | 1 << 32, {5: "SIZE"}) == [
        "bit 3",
        "SIZE",
        "VIRTIO_F_VERSION_1",
    ]


def test_after_a_reset_there_are_no_queues(bench: Bench) -> None:
    bench.go_live()
    [queue] = bench.negotiation.active_queues
    bench.write(STATUS, 0)
    assert bench.negotiation.active_queues == []
    assert not queue.ready  # for a thread that has it in its hands still


def test_a_device_without_a_configuration_reads_as_zeros() -> None:
    bench = Bench(EntropyDevice())
    assert [bench.read(CONFIG + at, size) for at, size in ((0, 1), (0, 4), (252, 4))] == [0, 0, 0]
    bench.transport.close()


def test_a_defect_is_told_with_its_innermost_place() -> None:
    with pytest.raises(TypeError) as raised:
        features.has("", 1)  # type: ignore[arg-type]
    file, _, line = defects.raised_at(raised.value).rpartition(":")
    # Files of pytest and of this test are somebody's who wrote a device.
    assert file == __file__ and int(line) > 0
    error = raised.value.with_traceback(raised.value.__traceback__.tb_next)  # type: ignore[union-attr]
    file, _, line = defects.raised_at(error).rpartition(":")
    assert file == features.__file__ and int(line) > 0
    assert defects.raised_at(ValueError("never raised")) == "unknown place"


def test_packed_rings_are_offered_where_they_are_asked_for() -> None:
    assert not features.ring_features() & 1 << 34
    assert features.ring_features(packed=True) == features.ring_features() | 1 << 34


def test_an_activation_has_the_transports_eventfd(device: RecordingDevice) -> None:
    memory = GuestMemory([(0, 1 << 20)])
    with EventFd() as irq:
        transport = MmioTransport(device, memory, lambda: None, irq_eventfd=irq)
        driver = MmioDriver(transport, memory)
        driver.start()
        assert device.live.interrupt.eventfd(0) is irq
        # Who uses buffers then is not us: the driver is told so whenever it asks.
        assert transport.read_interrupt_status() == 1
        transport.close()


def test_closing_waits_for_a_write_of_the_driver(bench: Bench, device: RecordingDevice) -> None:
    bench.go_live()
    closing = Thread(target=bench.transport.close, daemon=True)
    with bench.negotiation.lock:
        resets = device.resets
        closing.start()
        closing.join(0.1)
        assert closing.is_alive()
        assert device.resets == resets
    closing.join(30)
    assert not closing.is_alive()
    assert device.resets == resets + 1


def test_closing_quiesces_the_device(bench: Bench, device: RecordingDevice) -> None:
    bench.go_live()
    resets = device.resets
    bench.transport.close()
    assert device.resets == resets + 1
    assert bench.status == 0


@pytest.mark.mmio_only
def test_shared_memory_is_shown_by_its_number(bench: Bench, device: RecordingDevice) -> None:
    """2.10 Shared Memory Regions; at any time, and none is selected for good."""
    device.shared_memory = {7: SharedMemory(0x12_3456_7000, 0x9_8765_4000)}

    state = bench.negotiation.state
    assert (state.shm_select, state.device_features_select) == (0, 0)

    def shown() -> list[int]:
        return [bench.read(at) for at in (SHM_LEN_LOW, SHM_LEN_HIGH, SHM_BASE_LOW, SHM_BASE_HIGH)]

    assert shown() == [0xFFFF_FFFF] * 4
    bench.write(SHM_SEL, 7)
    assert shown() == [0x8765_4000, 0x9, 0x3456_7000, 0x12]
    bench.go_live()
    bench.write(SHM_SEL, 7)
    assert shown() == [0x8765_4000, 0x9, 0x3456_7000, 0x12]
    for other in (0, 8, 0x107, 0xFFFF_FFFF):
        bench.write(SHM_SEL, other)
        assert shown() == [0xFFFF_FFFF] * 4
    bench.write(SHM_SEL, 7)
    bench.write(STATUS, 0)
    assert shown() == [0xFFFF_FFFF] * 4


class Echo(QueueDevice):
    """Copies what it reads of a chain into what it can write."""

    name, device_type, queue_sizes = "echo0", 42, (64, 64)
    features = 1 << 28 | 1 << 29

    def serve(self, queue: Queue) -> None:
        for chain in queue:
            reader, writer = chain.reader(), chain.writer()
            data = reader.read(min(chain.readable_size, chain.writable_size))
            writer.write(data)
            queue.add_used(chain, len(data))


def test_a_driver_from_end_to_end(bench: Bench) -> None:
    """The public mock driver, a device with two workers, real eventfds: many requests, and again
    after a reset."""
    line = InterruptLine()
    transport = MmioTransport(Echo(), bench.memory, line)
    driver = MmioDriver(transport, bench.memory, irq=line)
    for _ in range(3):
        driver.start()
        assert driver.status == LIVE
        for number in range(100):
            text = b"request %d" % number
            assert driver.request(number % 2, [text], [64])[1].startswith(text)
        assert driver.acknowledge() == 1
        driver.reset()
    transport.close()
    assert driver.status != AGREED


class ThreeEchoes(Echo):
    queue_sizes = (64, 64, 64)
    features = Echo.features | 1 << features.VIRTIO_F_RING_RESET


def test_a_queue_that_is_reset_alone_leaves_the_others_their_places(bench: Bench) -> None:
    line = InterruptLine()
    transport = MmioTransport(ThreeEchoes(), bench.memory, line)
    driver = MmioDriver(transport, bench.memory, irq=line)
    driver.start()
    first, second, third = transport.negotiation.active_queues
    driver.write(QUEUE_SEL, 0)
    driver.write(QUEUE_RESET, 1)
    assert transport.negotiation.active_queues == [second, third]
    driver.reset_queue(0)
    assert transport.negotiation.active_queues[1:] == [second, third]
    assert transport.negotiation.active_queues[0] is not first
    transport.close()
