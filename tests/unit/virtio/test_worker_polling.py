"""A worker that looks at its ring for a while before it sleeps."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from time import perf_counter_ns
from types import SimpleNamespace

import pytest
from queue_rig import LAYOUTS, Rig
from worker_rig import Bench, Echo, asleep, quiet, wait_for

from pyvmm.testing.mmio_driver import SAFETY_TIMEOUT
from pyvmm.virtio import polling
from pyvmm.virtio.polling import Polling, Rest
from pyvmm.virtio.queue import ring
from pyvmm.virtio.queue.packed import PackedQueue
from pyvmm.virtio.queue.split import SplitQueue

LONG = 3_600 * 10**9  # nanoseconds; a test that waits for its end hangs


@pytest.fixture(params=LAYOUTS)
def rig(request):
    rig = Rig(layout=request.param)
    yield rig
    rig.close()


def test_new_buffers_end_the_polling(rig):
    rig.driver.add([b"x"])
    rig.driver.publish()
    assert rig.queue.poll(perf_counter_ns() + LONG, LONG)
    assert rig.serve() == 1


def test_buffers_that_come_while_it_polls_end_it(rig):
    def publish():
        rig.driver.add([b"x"])
        rig.driver.publish()

    timer = threading.Timer(0.02, publish)
    timer.start()
    assert rig.queue.poll(perf_counter_ns() + LONG, LONG)
    timer.join()


def test_the_time_ends_it_where_nothing_comes(rig):
    assert not rig.queue.poll(perf_counter_ns() + 1000, LONG)
    rig.driver.add([b"x"])
    rig.driver.publish()
    assert rig.serve() == 1
    rig.queue.publish_used()
    assert not rig.queue.poll(perf_counter_ns() + 1000, LONG), "what was served counts as new"


def test_what_was_seen_and_left_for_the_next_batch_is_not_waited_for(rig):
    """A batch has an end, with large requests soon; the rest may be all there is for a while."""
    for _ in range(2):
        rig.driver.add([bytes(16)], [512, 1])
    rig.driver.publish()
    assert len(rig.queue.peek_usual(16, 1, 512)[0]) == 1
    rig.queue.use_peeked([513])
    rig.queue.publish_used()
    assert rig.queue.poll(perf_counter_ns() + 1000, LONG)
    assert rig.serve() == 1
    rig.queue.publish_used()
    assert not rig.queue.poll(perf_counter_ns() + 1000, LONG)


def test_a_turn_of_another_thread_that_takes_long_ends_it(rig, monkeypatch):
    clock = [0]

    def other_thread():
        clock[0] += 10

    monkeypatch.setattr(ring, "perf_counter_ns", lambda: clock[0])
    monkeypatch.setattr(ring, "sched_yield", other_thread)
    assert not rig.queue.poll(95, 10)
    assert clock[0] == 100
    assert not rig.queue.poll(10**9, 9)
    assert clock[0] == 110


@pytest.mark.parametrize("change", [("halt", True), ("ready", False)], ids=str)
def test_a_stop_ends_it(rig, change):
    timer = threading.Timer(0.02, setattr, (rig.queue, *change))
    timer.start()
    assert not rig.queue.poll(perf_counter_ns() + LONG, LONG)
    timer.join()


def test_it_goes_round_the_ring(rig):
    for _ in range(5 * rig.driver.size):
        rig.driver.add([b"x"])
        rig.driver.publish()
        assert rig.queue.poll(perf_counter_ns() + LONG, LONG)
        assert rig.serve() == 1
        rig.queue.publish_used()
        assert rig.driver.pop_used() is not None


def test_another_thread_gets_its_turn_while_it_polls(rig):
    """One that waits for the interpreter, and would do so for as long as nobody gives it up."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10**6)

    def publish():
        rig.driver.add([b"x"])
        rig.driver.publish()

    other = threading.Timer(0.001, publish)
    other.start()
    try:
        assert rig.queue.poll(perf_counter_ns() + int(SAFETY_TIMEOUT * 1e9), LONG)
    finally:
        sys.setswitchinterval(interval)
        other.join()


# --- when it is done: a clock that the test has, and a ring that answers when it says -------------

LIMIT = 200


class Clock:
    """Time, which passes while a ring is polled or a worker sleeps."""

    def __init__(self, monkeypatch):
        self.now = 10**12
        self.polled = 0
        monkeypatch.setattr(polling, "perf_counter_ns", lambda: self.now)

    def queue(self, answer: int | None, late: int = 0) -> SimpleNamespace:
        """New buffers come after `answer` ns, or not while it is polled, which ends `late`, or
        early if that is less than nothing."""

        def poll(until: int, patience: int) -> bool:
            self.polled += 1
            begun, limit = self.now, until - self.now
            found = answer is not None and answer < limit
            self.now = begun + (answer if found else limit) + late
            return found

        return SimpleNamespace(poll=poll)


def sleep(clock: Clock, worker: Polling, nanoseconds: int) -> None:
    clock.now += nanoseconds
    worker.woke()


def used_to_polling(clock: Clock) -> Polling:
    worker = Polling(LIMIT)
    assert not worker.finds(clock.queue(None))
    sleep(clock, worker, 1)
    return worker


def test_only_a_wait_that_polling_would_have_spared_is_followed_by_it(monkeypatch):
    clock = Clock(monkeypatch)
    worker = Polling(LIMIT)
    polls = []
    for slept in (LIMIT - 1, LIMIT, LIMIT - 1, 10**9, 10, 10):
        assert not worker.finds(clock.queue(None))
        polls.append(clock.polled)
        sleep(clock, worker, slept)
    # After the first one it polls in vain, which counts as a part of the wait.
    assert polls == [0, 1, 1, 2, 2, 3]


def test_it_goes_on_as_long_as_it_finds_something(monkeypatch):
    clock = Clock(monkeypatch)
    worker = used_to_polling(clock)
    for _ in range(10):
        assert worker.finds(clock.queue(LIMIT // 2))
    assert clock.polled == 10
    assert not worker.finds(clock.queue(None))
    sleep(clock, worker, 0)  # at once, and too late all the same
    assert not worker.finds(clock.queue(0))
    assert clock.polled == 11


def test_a_rest_is_short_at_first_and_grows_while_its_reason_comes_again():
    rest = Rest(6400)
    now, lengths = 10**12, []
    for _ in range(5):
        end = rest.end_of_one_from(now)
        lengths.append(end - now)
        now = end + 6399
    assert lengths == [100, 400, 1600, 6400, 6400]
    now = end + 6400
    assert rest.end_of_one_from(now) == now + 100, "what comes now and then costs much"


@pytest.mark.parametrize(
    ("answer", "late", "longest"),
    [
        (1, LIMIT + polling.HELD_UP_NS, polling.LONG_REST_NS),  # another program's time
        (None, polling.HELD_UP_NS + 1, polling.LONG_REST_NS),
        (None, -LIMIT // 2, polling.REST_NS),  # a thread of ours had work
    ],
)
def test_where_others_wanted_to_work_it_rests(monkeypatch, answer, late, longest):
    clock = Clock(monkeypatch)
    worker = used_to_polling(clock)
    for rest in (longest // 64, longest // 16):
        polled = clock.polled
        worker.finds(clock.queue(answer, late))
        sleep(clock, worker, 0)
        for part in (rest // 2, rest // 2 - 2, 1):
            assert not worker.finds(clock.queue(1))
            sleep(clock, worker, 1)
            clock.now += part - 1
        assert not worker.finds(clock.queue(1))
        sleep(clock, worker, 1)
        assert clock.polled == polled + 1
        assert worker.finds(clock.queue(1))


def test_what_is_late_by_less_does_not_make_it_rest(monkeypatch):
    clock = Clock(monkeypatch)
    worker = used_to_polling(clock)
    for _ in range(2):
        assert worker.finds(clock.queue(1, late=polling.HELD_UP_NS))
    assert clock.polled == 2


def test_a_sleep_for_something_else_teaches_nothing(monkeypatch):
    clock = Clock(monkeypatch)
    worker = used_to_polling(clock)
    sleep(clock, worker, 10**9)  # a limit of its speed, say: it was not empty
    assert worker.finds(clock.queue(0))


# --- the threads ----------------------------------------------------------------------------------


def served_without_a_kick(bench) -> Callable[[], bool]:
    """Give it a buffer; whether that has been used."""
    bench.driver.add([b"x"], [1])
    bench.driver.publish()
    return bench.driver.has_used


def polls(device) -> bool:
    """True if it has begun to poll: its only worker neither sleeps nor serves."""
    [worker] = device._workers.values()
    frame = sys._current_frames().get(worker._thread.ident)
    while frame is not None:
        if frame.f_code in (SplitQueue.poll.__code__, PackedQueue.poll.__code__):
            return True
        frame = frame.f_back
    return False


@contextmanager
def polling_for_an_hour():
    """An echo that polls: its first wait was shorter than that."""
    device = Echo()
    device.poll_ns = LONG
    bench = Bench(device)
    bench.activate()
    try:
        assert bench.echo(b"echo") == b"echo"
        wait_for(lambda: polls(device))
        yield bench
    finally:
        bench.close()  # would hang, if polling did not look for the stop


def test_a_worker_that_has_polled_in_vain_sleeps():
    device = Echo()
    device.poll_ns = 200_000_000
    bench = Bench(device)
    bench.activate()
    try:
        wait_for(lambda: bench.echo(b"echo") == b"echo" and polls(device))
        wait_for(lambda: quiet(device))
    finally:
        bench.close()


def test_a_worker_that_polls_serves_without_kicks():
    with polling_for_an_hour() as bench:
        for _ in range(50):
            wait_for(served_without_a_kick(bench))
            bench.driver.pop_used()


def test_one_worker_of_a_process_polls_and_the_others_sleep():
    with polling_for_an_hour() as first:
        second = Echo()
        second.poll_ns = LONG
        bench = Bench(second)
        bench.activate()
        try:
            for _ in range(3):
                assert bench.echo(b"echo") == b"echo"
                wait_for(lambda: asleep(second))
            wait_for(served_without_a_kick(first))
            first.device.reset()
            assert bench.echo(b"echo") == b"echo"
            wait_for(lambda: polls(second))
        finally:
            bench.close()


def test_whoever_claims_the_queue_has_it_from_a_worker_that_polls():
    with polling_for_an_hour() as bench:
        queue = bench.rig.queue
        assert queue.claim(SAFETY_TIMEOUT)
        has_used = served_without_a_kick(bench)
        time.sleep(0.01)
        assert not has_used()
        queue.lock.release()
        queue.kick.signal()
        wait_for(has_used)
        bench.driver.pop_used()
        assert bench.echo(b"echo") == b"echo"


def test_a_queue_that_is_reset_alone_ends_the_polling():
    with polling_for_an_hour() as bench:
        bench.device.reset_queue(0)
        assert not bench.rig.queue.ready
        assert bench.device.queues_in_use == []
