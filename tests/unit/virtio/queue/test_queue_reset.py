"""A single queue reset and set up anew (virtio 1.3, 2.6.1 Virtqueue Reset) over virtio-mmio."""

from __future__ import annotations

import gc
import select
from collections.abc import Iterator
from threading import Thread

import pytest
from mmio_harness import (
    AGREED,
    AVAIL,
    DATA,
    DESC,
    EVENT_IDX,
    LIVE,
    NEEDS_RESET,
    QUEUE_NOTIFY,
    QUEUE_READY,
    QUEUE_RESET,
    QUEUE_SEL,
    QUEUE_SIZE,
    STATUS,
    USED,
    VERSION_1,
    Bench,
    RecordingDevice,
    SlowDevice,
    wait_for,
    workers,
)
from rings import RINGS, offering

from pyvmm.errors import HostError
from pyvmm.testing import MockPackedDriver, MockSplitDriver, attached
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio.events import QueueStarted
from pyvmm.virtio.features import RING_FEATURES
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.worker import QueueDevice

RING_RESET = 1 << 40
ELSEWHERE = 0x1_0000  # what is added to all addresses of a queue


class Resettable(SlowDevice):
    """A device with two queues that answers a request when the test lets it."""

    features = RING_RESET
    queue_sizes = (256, 64)


class Recorder(RecordingDevice):
    """Remembers which queues were reset and started."""

    features = RING_RESET | EVENT_IDX

    def __init__(self) -> None:
        super().__init__()
        self.queue_resets: list[int] = []
        self.started: list[Queue] = []
        self.queue_error: Exception | None = None

    def reset_queue(self, index: int) -> None:
        self.queue_resets.append(index)
        if self.queue_error is not None:
            raise self.queue_error

    def start_queue(self, queue: Queue) -> None:
        self.started.append(queue)
        if self.queue_error is not None:
            raise self.queue_error


@pytest.fixture
def resettable() -> Iterator[tuple[Bench, Resettable]]:
    device = Resettable()
    bench = Bench(device, trace=True)
    yield bench, device
    device.release.set()
    bench.transport.close()
    bench.memory.close()


@pytest.fixture
def recorder() -> Iterator[tuple[Bench, Recorder]]:
    device = Recorder()
    bench = Bench(device, trace=True)
    yield bench, device
    device.queue_error = None
    bench.transport.close()
    bench.memory.close()


def test_a_reset_waits_for_the_request_in_flight(
    resettable: tuple[Bench, Resettable],
) -> None:
    bench, device = resettable
    bench.go_live(VERSION_1 | RING_RESET)
    bench.offer_buffer(0)
    bench.write(QUEUE_NOTIFY, 0)
    assert device.started.wait(30)
    reset = Thread(target=bench.write, args=(QUEUE_RESET, 1))
    reset.start()
    wait_for(lambda: bench.read(QUEUE_RESET) == 1)
    reset.join(0.05)
    assert reset.is_alive()
    assert bench.read(QUEUE_RESET) == 1, "it still goes on"
    device.release.set()
    reset.join(30)
    assert not reset.is_alive()
    assert (bench.read(QUEUE_RESET), bench.read(QUEUE_READY)) == (0, 0)
    assert bench.used_index() == 1, "what was in flight is completed"
    assert workers(device) == []
    assert bench.status == LIVE


def test_after_a_reset_no_request_is_executed(resettable: tuple[Bench, Resettable]) -> None:
    bench, device = resettable
    device.release.set()
    bench.go_live(VERSION_1 | RING_RESET)
    bench.write(QUEUE_RESET, 1)
    device.started.clear()
    edges = bench.edges
    bench.offer_buffer(0)
    before = bench.rings()
    bench.write(QUEUE_NOTIFY, 0)
    assert workers(device) == []
    assert bench.rings() == before
    assert (bench.edges, device.started.is_set()) == (edges, False)


def test_a_kick_from_before_a_reset_is_forgotten(recorder: tuple[Bench, Recorder]) -> None:
    bench, device = recorder
    bench.go_live(VERSION_1 | RING_RESET)
    bench.write(QUEUE_NOTIFY, 0)
    bench.write(QUEUE_RESET, 1)
    bench.enable_queue()
    [queue] = device.started
    kicked = select.poll()
    kicked.register(queue.kick.fd, select.POLLIN)
    assert kicked.poll(0) == []
    bench.write(QUEUE_NOTIFY, 0)
    assert len(kicked.poll(0)) == 1


def test_a_queue_may_lie_elsewhere_and_be_smaller_afterwards(
    resettable: tuple[Bench, Resettable],
) -> None:
    bench, device = resettable
    device.release.set()
    bench.go_live(VERSION_1 | RING_RESET)
    bench.offer_buffer(0)
    bench.write(QUEUE_NOTIFY, 0)
    wait_for(lambda: bench.used_index() == 1)
    bench.write(QUEUE_RESET, 1)
    rings = bench.rings()
    # The driver starts at 0 again, in other memory.
    bench.memory.write(DESC + ELSEWHERE, DATA.to_bytes(8, "little") + b"\4\0\0\0\2\0\0\0")
    bench.memory.write(AVAIL + ELSEWHERE, b"\0\0\1\0")
    bench.place_queue(0, 8, DESC + ELSEWHERE, AVAIL + ELSEWHERE, USED + ELSEWHERE)
    assert bench.read(QUEUE_READY) == 0
    bench.write(QUEUE_READY, 1)
    assert (bench.read(QUEUE_READY), bench.read(QUEUE_RESET)) == (1, 0)
    wait_for(lambda: bench.memory.read(USED + ELSEWHERE + 2, 2) == b"\1\0")
    assert bench.memory.read(DATA, 4) == b"done"
    assert bench.rings()[: USED - DESC] == rings[: USED - DESC]
    told = [str(event) for event in bench.events]
    assert "slow0: queue 0 reset" in told
    assert "slow0: queue 0 started again, size 8" in told


def test_the_other_queue_goes_on(resettable: tuple[Bench, Resettable]) -> None:
    bench, device = resettable
    device.release.set()
    bench.negotiate(VERSION_1 | RING_RESET)
    bench.enable_queue(0)
    bench.place_queue(1, 16, DESC + ELSEWHERE, AVAIL + ELSEWHERE, USED + ELSEWHERE)
    bench.write(QUEUE_READY, 1)
    bench.write(STATUS, LIVE)
    bench.write(QUEUE_RESET, 1)
    assert workers(device) == ["slow0-q0"]
    bench.offer_buffer(0)
    bench.write(QUEUE_NOTIFY, 0)
    wait_for(lambda: bench.used_index() == 1)
    bench.write(QUEUE_SEL, 0)
    assert bench.read(QUEUE_READY) == 1


def test_a_queue_that_was_never_enabled_can_be_reset_and_then_set_up(
    recorder: tuple[Bench, Recorder],
) -> None:
    bench, device = recorder
    bench.go_live(VERSION_1 | RING_RESET)
    bench.place_queue(1, 16)
    bench.write(QUEUE_READY, 1)
    assert bench.read(QUEUE_READY) == 0, "the device is live"
    bench.write(QUEUE_RESET, 1)
    bench.place_queue(1, 16, DESC + ELSEWHERE, AVAIL + ELSEWHERE, USED + ELSEWHERE)
    bench.write(QUEUE_READY, 1)
    assert bench.read(QUEUE_READY) == 1
    assert device.queue_resets == [1]
    assert [(queue.index, queue.size) for queue in device.started] == [(1, 16)]
    bench.write(QUEUE_RESET, 1)
    bench.enable_queue(1)
    assert [queue.index for queue in bench.negotiation.active_queues] == [0, 1]


@pytest.mark.parametrize("value", [0, 2, 0xFFFF_FFFF])
def test_a_value_that_means_nothing_resets_nothing(
    recorder: tuple[Bench, Recorder], value: int
) -> None:
    bench, device = recorder
    bench.go_live(VERSION_1 | RING_RESET)
    bench.write(QUEUE_RESET, value)
    assert (bench.read(QUEUE_READY), device.queue_resets) == (1, [])
    assert "no such value" in bench.lines[-1]


@pytest.mark.parametrize("index", [2, 0xFFFF_FFFF])
def test_row13_a_queue_that_is_not_there_is_not_reset(
    recorder: tuple[Bench, Recorder], index: int
) -> None:
    bench, device = recorder
    bench.go_live(VERSION_1 | RING_RESET)
    bench.write(QUEUE_SEL, index)
    bench.write(QUEUE_RESET, 1)
    assert (bench.read(QUEUE_RESET), device.queue_resets) == (0, [])


def test_before_driver_ok_and_after_a_failure_no_queue_is_reset(
    recorder: tuple[Bench, Recorder],
) -> None:
    bench, device = recorder
    bench.negotiate(VERSION_1 | RING_RESET)
    bench.enable_queue()
    bench.write(QUEUE_RESET, 1)
    assert bench.status == AGREED
    assert bench.read(QUEUE_READY) == 1
    bench.write(STATUS, LIVE)
    bench.negotiation.fail(HostError(5, "test"))
    bench.write(QUEUE_RESET, 1)
    assert device.queue_resets == []


def test_a_driver_that_did_not_accept_it_resets_no_queue(recorder: tuple[Bench, Recorder]) -> None:
    bench, device = recorder
    bench.go_live()
    bench.write(QUEUE_RESET, 1)
    assert (bench.read(QUEUE_READY), device.queue_resets) == (1, [])
    assert "not negotiated" in bench.lines[-1]


def test_row15_only_a_queue_that_was_reset_can_be_set_up_again(
    recorder: tuple[Bench, Recorder],
) -> None:
    """CVE-2026-5747: a size changed after activation reaches past the ring."""
    bench, device = recorder
    bench.go_live(VERSION_1 | RING_RESET)
    bench.write(QUEUE_READY, 0)
    bench.place_queue(0, 256)
    bench.write(QUEUE_READY, 1)
    assert bench.read(QUEUE_READY) == 0
    assert "only after FEATURES_OK, before DRIVER_OK" in bench.lines[-1]
    bench.write(QUEUE_RESET, 1)
    bench.enable_queue(0, 8)
    assert bench.read(QUEUE_READY) == 1
    bench.write(QUEUE_SIZE, 16)
    assert "the queue is ready" in bench.lines[-1]
    # Stopped once more without a reset, it stays stopped.
    bench.write(QUEUE_READY, 0)
    bench.write(QUEUE_READY, 1)
    assert bench.read(QUEUE_READY) == 0
    assert [queue.size for queue in device.started] == [8]


def test_row17_a_queue_that_was_reset_is_checked_like_any_other(
    recorder: tuple[Bench, Recorder],
) -> None:
    bench, device = recorder
    bench.go_live(VERSION_1 | RING_RESET)
    bench.write(QUEUE_RESET, 1)
    bench.write(QUEUE_READY, 1)
    assert bench.read(QUEUE_READY) == 0, "nothing of the queue of before is left"
    bench.place_queue(0, 16, desc=1 << 40)
    bench.write(QUEUE_READY, 1)
    assert (bench.read(QUEUE_READY), device.started) == (0, [])
    bench.enable_queue(0, 16)
    assert bench.read(QUEUE_READY) == 1


def test_a_reset_that_fails_is_not_shown_as_done(recorder: tuple[Bench, Recorder]) -> None:
    bench, device = recorder
    bench.go_live(VERSION_1 | RING_RESET)
    device.queue_error = HostError(5, "test")
    bench.write(QUEUE_RESET, 1)
    assert bench.status & NEEDS_RESET
    assert (bench.read(QUEUE_RESET), bench.read(QUEUE_READY)) == (1, 0)
    device.queue_error = None
    bench.write(STATUS, 0)
    assert (bench.status, bench.read(QUEUE_RESET)) == (0, 0)


def test_a_queue_that_cannot_be_started_breaks_the_device(
    recorder: tuple[Bench, Recorder],
) -> None:
    bench, device = recorder
    bench.go_live(VERSION_1 | RING_RESET)
    bench.write(QUEUE_RESET, 1)
    device.queue_error = HostError(11, "thread")
    bench.enable_queue(0)
    assert bench.status & NEEDS_RESET
    assert not any(queue.ready for queue in device.started)
    assert not any(isinstance(event, QueueStarted) for event in bench.events)


def test_a_reset_of_the_device_ends_a_queue_that_was_started_again(
    resettable: tuple[Bench, Resettable],
) -> None:
    bench, device = resettable
    device.release.set()
    bench.go_live(VERSION_1 | RING_RESET)
    bench.write(QUEUE_RESET, 1)
    bench.enable_queue(0)
    assert workers(device) == ["slow0-q0"]
    bench.write(STATUS, 0)
    assert workers(device) == []
    assert bench.read(QUEUE_READY) == 0


@pytest.mark.parametrize("alone", [True, False], ids=["queue", "device"])
def test_queues_that_were_reset_wait_for_no_bus_mastering(
    recorder: tuple[Bench, Recorder], alone: bool
) -> None:
    """However often a driver resets a queue, or the device, meanwhile."""
    bench, device = recorder
    bench.go_live(VERSION_1 | RING_RESET)
    with bench.negotiation.lock:
        bench.negotiation.set_bus_master(False)
    kinds = {type(queue) for queue in bench.negotiation.active_queues}
    for _ in range(20):
        if alone:
            bench.write(QUEUE_RESET, 1)
            bench.enable_queue()
        else:
            bench.go_live(VERSION_1 | RING_RESET)
    device.started.clear()
    device.activation = None
    gc.collect()
    kick = bench.transport.kicks[0]
    kept = [one for one in gc.get_objects() if type(one) in kinds and one.kick is kick]
    assert kept == bench.negotiation.active_queues
    with bench.negotiation.lock:
        bench.negotiation.set_bus_master(True)
    assert kept[0].ready


def test_a_device_that_fails_as_bus_mastering_comes_touches_no_ring(
    recorder: tuple[Bench, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker of the first queue may fail before the second is let go."""
    bench, _ = recorder
    bench.negotiate(VERSION_1 | RING_RESET)
    bench.enable_queue(0)
    bench.enable_queue(1)
    bench.write(STATUS, LIVE)
    first, second = bench.negotiation.active_queues
    failure = HostError(5, "the first queue's worker")
    with bench.negotiation.lock:
        bench.negotiation.set_bus_master(False)
        monkeypatch.setattr(first.kick, "signal", lambda: bench.negotiation.fail(failure))
        bench.negotiation.set_bus_master(True)
    assert bench.status & NEEDS_RESET
    assert (first.ready, second.ready) == (False, False)


def test_who_offers_it_can_do_it() -> None:
    class Cannot(RecordingDevice):
        features = RING_RESET

    bench = Bench(RecordingDevice())
    with pytest.raises(ValueError, match="no reset_queue"):
        MmioTransport(Cannot(), bench.memory, bench.edge)
    bench.transport.close()


class Echo(QueueDevice):
    name, device_type, queue_sizes, features = "echo", 42, (16,), RING_FEATURES

    def serve(self, queue: Queue) -> None:
        for chain in queue:
            writer = chain.writer()
            writer.write(chain.reader().read(chain.readable_size))
            queue.add_used(chain, writer.written)


@pytest.mark.parametrize("ring", RINGS)
def test_either_ring_starts_from_its_beginning_after_a_reset(ring: str) -> None:
    make = MockPackedDriver if ring == "packed" else MockSplitDriver
    with attached(offering(ring, Echo()), ring=ring) as driver:
        for turn in range(4):
            for n in range(5 + turn):  # ends at another place each time
                assert driver.request([b"%d" % n], [1]).data == b"%d" % n
            driver.mmio.write(QUEUE_SEL, 0)
            driver.mmio.write(QUEUE_RESET, 1)
            assert driver.mmio.read(QUEUE_RESET) == 0
            queue = make(driver.memory, 4 << turn % 3, arena=driver.mmio.arena, event_idx=True)
            driver.mmio.queues[0] = queue
            places = (queue.desc_addr, queue.driver_addr, queue.device_addr)
            assert driver.mmio.place_queue(0, queue.size, *places)
        assert driver.log == []
