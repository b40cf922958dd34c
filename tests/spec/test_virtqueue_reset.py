"""Each MUST of virtio 1.3, 2.6.1 Virtqueue Reset, and of 4.2.2.1 about QueueReset, that binds the
device: one test with the sentence in short."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread

import pytest
from mmio_harness import (
    AVAIL,
    DATA,
    DESC,
    LIVE,
    QUEUE_NOTIFY,
    QUEUE_READY,
    QUEUE_RESET,
    QUEUE_SEL,
    STATUS,
    USED,
    VERSION_1,
    Bench,
    SlowDevice,
    wait_for,
    workers,
)

RING_RESET = 1 << 40
AGREED_ON = VERSION_1 | RING_RESET


class Device(SlowDevice):
    features = RING_RESET
    queue_sizes = (256, 64)


@pytest.fixture
def slow() -> Iterator[tuple[Bench, Device]]:
    device = Device()
    bench = Bench(device)
    yield bench, device
    device.release.set()
    bench.transport.close()
    bench.memory.close()


@pytest.fixture
def bench(slow: tuple[Bench, Device]) -> Bench:
    """The same with a device that never waits, and queue 0 live."""
    bench, device = slow
    device.release.set()
    bench.go_live(AGREED_ON)
    return bench


def serve_one(bench: Bench, position: int) -> None:
    bench.offer_buffer(position)
    bench.write(QUEUE_NOTIFY, 0)
    wait_for(lambda: bench.used_index() == position + 1)


def test_no_request_is_executed_after_a_reset(slow: tuple[Bench, Device], bench: Bench) -> None:
    """2.6.1.1.1 Device Requirements: Virtqueue Reset: after it MUST NOT execute any requests from
    that virtqueue."""
    serve_one(bench, 0)
    bench.write(QUEUE_RESET, 1)
    before = bench.rings()
    bench.offer_buffer(1)
    offered = bench.rings()
    bench.write(QUEUE_NOTIFY, 0)
    assert workers(slow[1]) == []
    assert bench.rings() == offered != before


def test_no_notification_after_a_reset(slow: tuple[Bench, Device]) -> None:
    """2.6.1.1.1 Device Requirements: Virtqueue Reset: … or notify the driver for it."""
    bench, device = slow
    bench.go_live(AGREED_ON)
    bench.offer_buffer(0)
    bench.write(QUEUE_NOTIFY, 0)
    assert device.started.wait(30)
    reset = Thread(target=bench.write, args=(QUEUE_RESET, 1))
    reset.start()
    device.release.set()
    reset.join(30)
    assert bench.read(QUEUE_RESET) == 0
    edges = bench.edges
    bench.write(QUEUE_NOTIFY, 0)
    assert workers(device) == [], "nobody is left who could notify"
    assert bench.edges == edges


def test_all_state_of_the_queue_is_reset(bench: Bench) -> None:
    """2.6.1.1.1 Device Requirements: Virtqueue Reset: MUST reset any state of a virtqueue to the
    default state, including the available state and the used state."""
    for position in range(3):
        serve_one(bench, position)
    bench.write(QUEUE_RESET, 1)
    bench.memory.write(AVAIL, bytes(USED + 0x1000 - AVAIL))
    bench.enable_queue()
    # Were it not at 0 again, it would take an index of 1 for one that went backwards.
    serve_one(bench, 0)
    assert bench.status == LIVE


def test_what_the_driver_configured_anew_is_observed(bench: Bench) -> None:
    """2.6.1.2.1 Device Requirements: Virtqueue Re-enable: MUST observe any queue configuration that
    may have been changed."""
    bench.write(QUEUE_RESET, 1)
    there = 0x2_0000
    bench.memory.write(DESC + there, DATA.to_bytes(8, "little") + b"\4\0\0\0\2\0\0\0")
    bench.memory.write(AVAIL + there, b"\0\0\1\0")
    bench.place_queue(0, 2, DESC + there, AVAIL + there, USED + there)
    bench.write(QUEUE_READY, 1)
    wait_for(lambda: bench.memory.read(USED + there + 2, 2) == b"\1\0")
    assert bench.memory.read(DATA, 4) == b"done"


def test_queue_reset_is_0_on_reset(bench: Bench) -> None:
    """4.2.2.1 Device Requirements: MUST present a 0 in QueueReset on reset."""
    bench.write(STATUS, 0)
    for index in (0, 1):
        bench.write(QUEUE_SEL, index)
        assert bench.read(QUEUE_RESET) == 0


def test_queue_reset_is_0_after_the_queue_is_enabled(bench: Bench) -> None:
    """4.2.2.1 Device Requirements: MUST present a 0 in QueueReset after the virtqueue is enabled
    with QueueReady."""
    assert (bench.read(QUEUE_RESET), bench.read(QUEUE_READY)) == (0, 1)
    bench.write(QUEUE_RESET, 1)
    bench.enable_queue()
    assert (bench.read(QUEUE_RESET), bench.read(QUEUE_READY)) == (0, 1)


def test_queue_reset_is_1_as_long_as_the_reset_goes_on(slow: tuple[Bench, Device]) -> None:
    """4.2.2.1 Device Requirements: MUST reset the queue when 1 is written to QueueReset, and MUST
    continue to present 1 as long as the reset is ongoing."""
    bench, device = slow
    bench.go_live(AGREED_ON)
    bench.offer_buffer(0)
    bench.write(QUEUE_NOTIFY, 0)
    assert device.started.wait(30)
    reset = Thread(target=bench.write, args=(QUEUE_RESET, 1))
    reset.start()
    wait_for(lambda: bench.read(QUEUE_RESET) == 1)
    reset.join(0.05)
    assert reset.is_alive() and bench.read(QUEUE_RESET) == 1
    device.release.set()
    reset.join(30)
    assert workers(device) == []


def test_queue_reset_and_queue_ready_are_0_when_it_has_completed(bench: Bench) -> None:
    """4.2.2.1 Device Requirements: MUST present 0 in both QueueReset and QueueReady when queue
    reset has completed."""
    bench.write(QUEUE_RESET, 1)
    assert (bench.read(QUEUE_RESET), bench.read(QUEUE_READY)) == (0, 0)
