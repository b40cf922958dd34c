"""Interrupts, resets and failures that come from several threads at once."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Lock, Thread, current_thread

import pytest
from mmio_harness import (
    INTERRUPT_ACK,
    LIVE,
    NEEDS_RESET,
    QUEUE_NOTIFY,
    QUEUE_READY,
    STATUS,
    Bench,
    Naps,
    RecordingDevice,
    SlowDevice,
    wait_for,
)

from pyvmm.errors import DriverError
from pyvmm.testing.mmio_driver import InterruptLine
from pyvmm.virtio.device import Activation
from pyvmm.virtio.lifecycle import DeviceState

BROKEN_RING = DriverError("available index jumped", section="2.7.6.1")


def finish(*threads: Thread) -> None:
    """All threads end; one that does not is a deadlock."""
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "deadlock"


# --- interrupts -----------------------------------------------------------------------------------


def test_the_interrupt_status_is_set_before_the_edge(device: RecordingDevice) -> None:
    bench = Bench(device)
    seen: list[int] = []
    bench.transport._irq = lambda: seen.append(bench.interrupt_status)
    bench.go_live()
    device.live.interrupt.signal_used(0)
    assert seen == [1]


def test_queues_notified_together_share_an_edge_and_are_counted_each(
    bench: Bench, device: RecordingDevice
) -> None:
    bench.go_live()
    device.live.interrupt.signal_used(0, 1)
    assert (bench.interrupt_status, bench.edges) == (1, 1)
    assert [stats.interrupts for stats in bench.transport.negotiation.queue_stats[:2]] == [1, 1]


@pytest.mark.mmio_only
def test_what_stays_unacknowledged_interrupts_again(bench: Bench, device: RecordingDevice) -> None:
    bench.go_live()
    device.live.interrupt.signal_used(0)
    device.live.interrupt.signal_config_change()
    assert (bench.interrupt_status, bench.edges) == (3, 2)
    bench.write(INTERRUPT_ACK, 1)
    assert (bench.interrupt_status, bench.edges) == (2, 3)
    bench.write(INTERRUPT_ACK, 2)
    assert (bench.interrupt_status, bench.edges) == (0, 3)


def test_a_driver_that_handles_the_interrupt_inside_the_edge_does_not_deadlock(
    device: RecordingDevice,
) -> None:
    bench = Bench(device)
    bench.go_live()
    bench.transport._irq = lambda: bench.write(INTERRUPT_ACK, bench.interrupt_status)
    signaller = Thread(target=device.live.interrupt.signal_used, args=(0,), daemon=True)
    signaller.start()
    finish(signaller)
    assert bench.interrupt_status == 0


def test_no_event_is_lost_between_signalling_and_acknowledging_threads(
    device: RecordingDevice,
) -> None:
    """An edge for each event, and each set bit either acknowledged or followed by an edge.

    The driver's side works as Linux does: read, acknowledge, then look for work.
    """
    line = InterruptLine()
    bench = Bench(device)
    bench.transport._irq = line
    bench.go_live()
    interrupt = device.live.interrupt
    done = [0, 0]
    handled = [0, 0]
    rounds = 3000

    def work(kind: int) -> None:
        for _ in range(rounds):
            done[kind] += 1
            if kind:
                interrupt.signal_config_change()
            else:
                interrupt.signal_used(0)

    workers = [Thread(target=work, args=(kind,), daemon=True) for kind in (0, 1)]
    for worker in workers:
        worker.start()
    seen = 0
    while handled != [rounds, rounds]:
        assert line.wait(seen + 1, 30), f"handled {handled} of {rounds} each: an event was lost"
        seen += 1
        pending = bench.interrupt_status
        bench.write(INTERRUPT_ACK, pending)
        for kind in (0, 1):
            if pending & 1 << kind:
                handled[kind] = done[kind]
    finish(*workers)


@pytest.mark.mmio_only
def test_an_event_in_the_middle_of_an_acknowledgement_is_kept(
    bench: Bench, device: RecordingDevice
) -> None:
    """Reading, masking and writing back the interrupt status must be one step."""
    signallers: list[Thread] = []

    class Racing(DeviceState):
        """Another thread signals just after the interrupt status was read."""

        def __getattribute__(self, name: str) -> object:
            value = super().__getattribute__(name)
            if name == "interrupt_status" and value == 1 and not signallers:
                signal = device.live.interrupt.signal_config_change
                signallers.append(Thread(target=signal, daemon=True))
                signallers[0].start()
                signallers[0].join(0.1)
            return value

    bench.go_live()
    device.live.interrupt.signal_used(0)
    bench.negotiation.state.__class__ = Racing
    bench.write(INTERRUPT_ACK, 1)
    finish(*signallers)
    assert len(signallers) == 1
    assert bench.interrupt_status == 2


def test_after_a_reset_the_last_life_s_interrupt_is_dead(
    bench: Bench, device: RecordingDevice
) -> None:
    bench.go_live()
    old = device.live
    bench.write(STATUS, 0)
    bench.go_live()
    edges = bench.edges
    old.interrupt.signal_used(0)
    old.fail(BROKEN_RING)
    assert (bench.status, bench.interrupt_status, bench.edges) == (LIVE, 0, edges)


# --- threads --------------------------------------------------------------------------------------


class FailingInReset(RecordingDevice):
    """Its reset waits for a worker that is just failing, signalling and changing things."""

    def reset(self) -> None:
        if self.activation is not None:
            worker = Thread(target=self.misbehave, args=(self.activation,), daemon=True)
            worker.start()
            finish(worker)
        super().reset()

    def misbehave(self, activation: Activation) -> None:
        activation.interrupt.signal_used(0)
        activation.interrupt.signal_config_change()
        activation.fail(BROKEN_RING)


def test_row12_a_reset_that_joins_a_failing_worker_ends_and_is_silent() -> None:
    bench = Bench(FailingInReset())
    bench.go_live()
    edges = bench.edges
    reset = Thread(target=bench.write, args=(STATUS, 0), daemon=True)
    reset.start()
    finish(reset)
    assert (bench.status, bench.interrupt_status) == (0, 0)
    assert bench.edges == edges, "row 12: no interrupt from the reset's first moment on"
    assert bench.lines == []


def test_a_worker_may_fail_while_it_holds_its_queue(bench: Bench, device: RecordingDevice) -> None:
    """And a vCPU that stops the queue meanwhile waits, but both come through."""
    bench.go_live()
    queue = device.live.queues[0]
    assert queue is not None
    queue.lock.acquire()
    stop = Thread(target=bench.write, args=(QUEUE_READY, 0), daemon=True)
    stop.start()
    device.live.fail(BROKEN_RING)
    queue.lock.release()
    finish(stop)
    assert bench.status == LIVE | NEEDS_RESET


class Late:
    """A queue's lock that one thread, `late`, gets no sooner than `when`."""

    def __init__(self, when: Callable[[], None]) -> None:
        self.lock = Lock()
        self.when = when
        self.late: Thread | None = None

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if current_thread() is self.late:
            self.when()
        return self.lock.acquire(blocking, timeout)

    def release(self) -> None:
        self.lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def test_a_worker_goes_on_after_the_memory_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended its batch early for that, and sleeps by the time its rings were found anew."""
    naps = Naps(monkeypatch)
    device = SlowDevice()
    bench = Bench(device)
    bench.go_live()
    naps.settle(0)
    [queue] = device.queues_in_use
    lock = queue.lock = Late(lambda: naps.settle(1))
    for position in range(3):
        bench.offer_buffer(position)
    bench.write(QUEUE_NOTIFY, 0)
    assert device.started.wait(30)
    change = lock.late = Thread(target=bench.negotiation.memory_changed, daemon=True)
    change.start()
    wait_for(lambda: queue.halt)
    device.release.set()
    finish(change)
    wait_for(lambda: bench.used_index() == 3)
    bench.transport.close()


class Stuck(RecordingDevice):
    """Its reset does not end before the test allows it."""

    def __init__(self) -> None:
        super().__init__()
        self.in_reset, self.release = Event(), Event()
        self.release.set()

    def reset(self) -> None:
        self.in_reset.set()
        self.release.wait(30)
        super().reset()


def test_other_vcpus_can_acknowledge_and_look_while_one_resets() -> None:
    device = Stuck()
    bench = Bench(device)
    bench.go_live()
    device.live.interrupt.signal_used(0)
    device.in_reset.clear()
    device.release.clear()
    reset = Thread(target=bench.write, args=(STATUS, 0), daemon=True)
    reset.start()
    assert device.in_reset.wait(30)
    assert bench.interrupt_status == 1
    bench.write(INTERRUPT_ACK, 1)
    bench.write(QUEUE_NOTIFY, 0)
    assert (bench.interrupt_status, bench.status) == (0, LIVE)
    device.release.set()
    finish(reset)
    assert bench.status == 0


def test_several_vcpus_reset_and_start_the_same_device_at_once() -> None:
    """Nonsense from the guest, but each activation must be ended by one reset."""
    lock = Lock()
    running: list[int] = [0]

    class Counting(RecordingDevice):
        def activate(self, activation: Activation) -> None:
            with lock:
                running[0] += 1
            assert running[0] == 1, "activated twice"
            super().activate(activation)

        def reset(self) -> None:
            with lock:
                running[0] = 0
            super().reset()

    device = Counting()
    bench = Bench(device)
    failures: list[BaseException] = []

    def vcpu() -> None:
        try:
            for _ in range(200):
                bench.go_live()
        except BaseException as error:
            failures.append(error)

    threads = [Thread(target=vcpu, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    finish(*threads)
    assert not failures
    bench.write(STATUS, 0)
    assert running[0] == 0


def test_a_reset_replaces_the_state_when_no_worker_changes_it(
    bench: Bench, device: RecordingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.go_live()
    negotiation, kept, locked = bench.negotiation, [bench.negotiation.state], []

    def replace(_: object, state: DeviceState) -> None:
        locked.append(negotiation._events.locked())
        kept.append(state)

    watched = property(lambda _: kept[-1], replace)
    monkeypatch.setattr(type(negotiation), "state", watched, raising=False)
    bench.write(STATUS, 0)
    assert bench.status == 0
    assert locked == [True]
