"""Rows 12 to 22 of what a hostile or broken driver must get (docs/robustness.md), over virtio-mmio.

Everywhere: no exception, no activation that was not asked for legally, a warning that says why.
"""

from __future__ import annotations

from threading import Thread

import pytest
from mmio_harness import (
    AGREED,
    AVAIL,
    CONFIG_GENERATION,
    DATA,
    DESC,
    DEVICE_BIT,
    DRIVEN,
    DRIVER_FEATURES,
    INTERRUPT_ACK,
    LIVE,
    QUEUE_NOTIFY,
    QUEUE_READY,
    QUEUE_RESET,
    QUEUE_SEL,
    QUEUE_SIZE,
    QUEUE_SIZE_MAX,
    RAM,
    SHM_BASE_HIGH,
    SHM_BASE_LOW,
    SHM_LEN_HIGH,
    SHM_LEN_LOW,
    SHM_SEL,
    STATUS,
    USED,
    VERSION_1,
    Bench,
    Naps,
    RecordingDevice,
    SlowDevice,
    wait_for,
    workers,
)

# --- 12: reset ------------------------------------------------------------------------------------


def test_row12_reset_waits_for_the_request_in_flight_and_then_nothing_moves(
    slow: tuple[Bench, SlowDevice],
) -> None:
    bench, device = slow
    bench.go_live()
    bench.offer_buffer(0)
    bench.write(QUEUE_NOTIFY, 0)
    assert device.started.wait(30)
    reset = Thread(target=bench.write, args=(STATUS, 0))
    reset.start()
    # The device sits in the middle of a request: another vCPU must not see the reset as done.
    reset.join(0.05)
    assert reset.is_alive()
    assert bench.status == LIVE
    device.release.set()
    reset.join(30)
    assert not reset.is_alive()
    assert (bench.status, bench.interrupt_status, bench.read(QUEUE_READY)) == (0, 0, 0)

    assert bench.used_index() == 1, "what was in flight is completed"
    assert workers(device) == [], "nobody is left who could touch a ring or interrupt"


def test_row12_the_driver_can_start_again_after_a_reset(slow: tuple[Bench, SlowDevice]) -> None:
    bench, device = slow
    device.release.set()
    for _ in range(2):
        bench.memory.write(AVAIL, bytes(USED + 0x1000 - AVAIL))
        bench.go_live()
        bench.offer_buffer(0)
        bench.write(QUEUE_NOTIFY, 0)
        wait_for(lambda: bench.used_index() == 1 and bench.interrupt_status == 1)
        assert bench.memory.read(DATA, 4) == b"done"
        bench.write(STATUS, 0)
        assert bench.interrupt_status == 0


def test_row12_selectors_features_and_queues_start_afresh(
    bench: Bench, device: RecordingDevice
) -> None:
    bench.go_live(VERSION_1 | DEVICE_BIT)
    device.live.interrupt.signal_used(0)
    bench.transport.kicks[0].signal()
    bench.write(QUEUE_SEL, 1)
    bench.write(STATUS, 0)
    assert bench.interrupt_status == 0
    assert bench.read(QUEUE_SIZE_MAX) == 256, "QueueSel is not 0"
    assert bench.read(QUEUE_READY) == 0
    assert bench.transport.kicks[0].drain() == 0, "a kick of the past life is left"
    bench.write(STATUS, DRIVEN)
    bench.write(STATUS, AGREED)
    assert bench.status == DRIVEN, "features of the past life are left"


# --- 13 to 18: queues -----------------------------------------------------------------------------


@pytest.mark.parametrize("index", [2, 3, 0x10000, 0xFFFF_FFFF])
def test_row13_a_queue_that_is_not_there(bench: Bench, device: RecordingDevice, index: int) -> None:
    bench.negotiate()
    bench.enable_queue(index)
    assert bench.read(QUEUE_SIZE_MAX) == 0
    assert bench.read(QUEUE_READY) == 0
    bench.write(STATUS, LIVE)
    assert device.live.queues == (None, None)


@pytest.mark.parametrize("size", [0, 3, 255, 512, 0x1_0008, 0x8000_0000, 0xFFFF_FFFF])
def test_row14_a_bad_size_is_refused_whole(
    bench: Bench, device: RecordingDevice, size: int
) -> None:
    bench.negotiate()
    bench.place_queue(size=16)
    bench.write(QUEUE_SIZE, size)
    assert "refused: not a power of two" in bench.lines[-1]
    bench.write(QUEUE_READY, 1)
    bench.write(STATUS, LIVE)
    queue = device.live.queues[0]
    assert queue is not None and queue.size == 16


@pytest.mark.mmio_only
def test_row14_a_queue_whose_size_was_never_accepted_does_not_become_ready(bench: Bench) -> None:
    bench.negotiate()
    bench.place_queue(size=0x1_0008)
    bench.write(QUEUE_READY, 1)
    assert bench.read(QUEUE_READY) == 0


def test_addresses_that_were_never_written_are_0(bench: Bench) -> None:
    """The address is in RAM, and aligned."""
    bench.negotiate()
    bench.write(QUEUE_SIZE, 16)
    bench.write(QUEUE_READY, 1)
    assert (bench.read(QUEUE_READY), bench.lines) == (1, [])
    [config, _] = bench.negotiation.state.queues
    assert (config.desc_addr, config.avail_addr, config.used_addr) == (0, 0, 0)


def test_row15_size_and_addresses_are_fixed_while_ready(
    bench: Bench, device: RecordingDevice
) -> None:
    bench.negotiate()
    bench.enable_queue(size=16)
    bench.place_queue(size=8, desc=0x9000, avail=0xA000, used=0xB000)
    bench.write(STATUS, LIVE)
    queue = device.live.queues[0]
    assert queue is not None and queue.size == 16
    assert bench.negotiation.state.queues[0].desc_addr == DESC


@pytest.mark.mmio_only
def test_row15_the_size_cannot_change_under_a_live_device(
    bench: Bench, device: RecordingDevice
) -> None:
    """CVE-2026-5747: a size changed after activation reaches past the ring."""
    bench.go_live()
    bench.write(QUEUE_READY, 0)
    bench.place_queue(size=256)
    bench.write(QUEUE_READY, 1)
    queue = device.live.queues[0]
    assert queue is not None and queue.size == 16 and not queue.ready
    assert bench.read(QUEUE_READY) == 0


@pytest.mark.parametrize(
    "wrong", [{"desc": DESC + 8}, {"avail": AVAIL + 1}, {"used": USED + 2}], ids=str
)
def test_row16_a_misaligned_ring_is_refused(bench: Bench, wrong: dict[str, int]) -> None:
    bench.negotiate()
    bench.place_queue(**wrong)
    bench.write(QUEUE_READY, 1)
    assert bench.read(QUEUE_READY) == 0
    assert "is not aligned to" in bench.lines[-1]


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
@pytest.mark.parametrize("addr", [2**64 - 16, RAM, RAM - 16, 0xD000_0000, 1 << 63])
def test_row17_a_ring_that_does_not_lie_in_ram_is_refused(
    bench: Bench, part: str, addr: int
) -> None:
    bench.negotiate()
    bench.place_queue(**{part: addr})
    bench.write(QUEUE_READY, 1)
    assert bench.read(QUEUE_READY) == 0
    assert "is not RAM" in bench.lines[-1]


@pytest.mark.mmio_only
def test_row18_a_stopped_queue_is_left_alone(
    slow: tuple[Bench, SlowDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, device = slow
    naps = Naps(monkeypatch)
    device.release.set()
    bench.go_live()
    naps.settle(0)
    bench.offer_buffer(0)
    bench.write(QUEUE_NOTIFY, 0)
    naps.settle(1)
    assert bench.used_index() == 1
    bench.write(QUEUE_READY, 0)
    assert bench.read(QUEUE_READY) == 0
    device.started.clear()
    bench.offer_buffer(1)
    before = bench.rings()
    bench.write(QUEUE_NOTIFY, 0)
    naps.settle(2)
    assert not device.started.is_set()
    assert bench.rings() == before
    bench.write(QUEUE_READY, 1)
    assert bench.read(QUEUE_READY) == 0, "stays stopped until reset"


@pytest.mark.mmio_only
def test_row18_stopping_a_queue_ends_the_batch_after_the_request_at_hand(
    slow: tuple[Bench, SlowDevice],
) -> None:
    """A driver that goes on offering buffers cannot keep its own stop waiting."""
    bench, device = slow
    bench.go_live()
    for position in range(3):
        bench.offer_buffer(position)
    bench.write(QUEUE_NOTIFY, 0)
    assert device.started.wait(30)
    [queue] = device.queues_in_use
    stop = Thread(target=bench.write, args=(QUEUE_READY, 0), daemon=True)
    stop.start()
    wait_for(lambda: queue.halt)
    device.release.set()
    stop.join(30)
    assert not stop.is_alive()
    assert bench.used_index() == 1


@pytest.mark.mmio_only
def test_row18_stopping_a_queue_waits_for_the_batch_in_progress(
    slow: tuple[Bench, SlowDevice],
) -> None:
    bench, device = slow
    bench.go_live()
    bench.offer_buffer(0)
    bench.write(QUEUE_NOTIFY, 0)
    assert device.started.wait(30)
    stop = Thread(target=bench.write, args=(QUEUE_READY, 0))
    stop.start()
    stop.join(0.05)
    assert stop.is_alive()
    device.release.set()
    stop.join(30)
    assert not stop.is_alive()
    assert bench.used_index() == 1


# --- 19 to 22 -------------------------------------------------------------------------------------


@pytest.mark.mmio_only
@pytest.mark.parametrize("index", [2, 0x1_0000, 0xFFFF_FFFF])
def test_row19_a_kick_of_a_queue_that_is_not_there_is_ignored(bench: Bench, index: int) -> None:
    bench.go_live()
    bench.write(QUEUE_NOTIFY, index)
    assert [kick.drain() for kick in bench.transport.kicks] == [0, 0]
    assert "no such queue" in bench.lines[-1]


@pytest.mark.parametrize("bits", [0xFFFF_FFFC, 0x8000_0000, 4])
def test_row20_undefined_bits_of_an_acknowledgement_are_ignored(
    bench: Bench, device: RecordingDevice, bits: int
) -> None:
    bench.go_live()
    device.live.interrupt.signal_used(0)
    bench.write(INTERRUPT_ACK, bits)
    assert bench.interrupt_status == 1
    bench.write(INTERRUPT_ACK, bits | 1)
    assert bench.interrupt_status == 0


def test_row21_a_kick_storm_on_an_empty_ring_interrupts_nobody(
    slow: tuple[Bench, SlowDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, device = slow
    naps = Naps(monkeypatch)
    bench.go_live()
    for _ in range(5000):
        bench.write(QUEUE_NOTIFY, 0)
    wait_for(lambda: naps.ended > 0)
    bench.write(STATUS, 0)
    assert naps.ended <= 5001, "it woke up for more than the kicks and the reset"
    assert device.passes <= naps.ended + 1, "it looked at the ring without having been woken"
    assert not device.started.is_set()
    assert (bench.edges, bench.interrupt_status) == (0, 0)


@pytest.mark.mmio_only
@pytest.mark.parametrize("region", [0, 1, 0xFF, 0xFFFF_FFFF])
def test_row22_a_shared_memory_region_that_is_not_there(bench: Bench, region: int) -> None:
    bench.write(SHM_SEL, region)
    halves = (SHM_LEN_LOW, SHM_LEN_HIGH, SHM_BASE_LOW, SHM_BASE_HIGH)
    assert [bench.read(half) for half in halves] == [0xFFFF_FFFF] * 4


# --- and always -----------------------------------------------------------------------------------


def test_a_flood_of_bad_accesses_leaves_a_short_log(bench: Bench) -> None:
    for _ in range(10_000):
        bench.write(DRIVER_FEATURES, 1)  # at a wrong time
        bench.write(QUEUE_SIZE, 9)
    assert len(bench.lines) <= 25


def test_queue_reset_is_not_there_unless_negotiated(bench: Bench, device: RecordingDevice) -> None:
    bench.go_live()
    bench.write(QUEUE_RESET, 1)
    assert bench.read(QUEUE_RESET) == 0
    assert bench.read(QUEUE_READY) == 1
    assert bench.read(CONFIG_GENERATION) == 0
