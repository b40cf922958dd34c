"""A worker that looks at its ring for a while before it sleeps."""

from __future__ import annotations

import threading
from time import perf_counter_ns

import pytest
from queue_rig import LAYOUTS, Rig
from worker_rig import Bench, Echo, Recorder, quiet, wait_for

from pyvmm.virtio import worker as worker_module
from pyvmm.virtio.device import Activation
from pyvmm.virtio.worker import QueueWorker

LONG = 3_600 * 10**9  # nanoseconds; a test that waits for its end hangs


@pytest.fixture(params=LAYOUTS)
def rig(request):
    rig = Rig(layout=request.param)
    yield rig
    rig.close()


def test_new_buffers_end_the_polling(rig):
    rig.driver.add([b"x"])
    rig.driver.publish()
    assert rig.queue.poll(perf_counter_ns() + LONG)
    assert rig.serve() == 1


def test_buffers_that_come_while_it_polls_end_it(rig):
    def publish():
        rig.driver.add([b"x"])
        rig.driver.publish()

    timer = threading.Timer(0.02, publish)
    timer.start()
    assert rig.queue.poll(perf_counter_ns() + LONG)
    timer.join()


def test_the_time_ends_it_where_nothing_comes(rig):
    assert not rig.queue.poll(perf_counter_ns() + 1000)
    rig.driver.add([b"x"])
    rig.driver.publish()
    assert rig.serve() == 1
    rig.queue.publish_used()
    assert not rig.queue.poll(perf_counter_ns() + 1000), "what was served counts as new"


def test_what_was_seen_and_left_for_the_next_batch_is_not_waited_for(rig):
    """A batch has an end, with large requests soon; the rest may be all there is for a while."""
    for _ in range(2):
        rig.driver.add([bytes(16)], [512, 1])
    rig.driver.publish()
    assert len(rig.queue.peek_usual(16, 1, 512)[0]) == 1
    rig.queue.use_peeked([513])
    rig.queue.publish_used()
    assert rig.queue.poll(perf_counter_ns() + 1000)
    assert rig.serve() == 1
    rig.queue.publish_used()
    assert not rig.queue.poll(perf_counter_ns() + 1000)


@pytest.mark.parametrize("change", [("halt", True), ("ready", False)], ids=str)
def test_a_stop_ends_it(rig, change):
    timer = threading.Timer(0.02, setattr, (rig.queue, *change))
    timer.start()
    assert not rig.queue.poll(perf_counter_ns() + LONG)
    timer.join()


def test_it_goes_round_the_ring(rig):
    for _ in range(5 * rig.driver.size):
        rig.driver.add([b"x"])
        rig.driver.publish()
        assert rig.queue.poll(perf_counter_ns() + LONG)
        assert rig.serve() == 1
        rig.queue.publish_used()
        assert rig.driver.pop_used() is not None


def test_a_worker_that_has_polled_in_vain_sleeps():
    device = Echo()
    device.poll_ns = 200_000_000
    bench = Bench(device)
    bench.activate()

    try:
        wait_for(lambda: bench.echo(b"echo") == b"echo" and device._workers[0]._poll)
        wait_for(lambda: quiet(device))
    finally:
        bench.close()


def test_a_device_that_polls_for_an_hour_serves_and_stops():
    device = Echo()
    device.poll_ns = LONG
    bench = Bench(device)
    bench.activate()
    try:
        # The first sleep is shorter than an hour, so all later requests find it polling.
        for _ in range(50):
            assert bench.echo(b"echo") == b"echo"
        bench.driver.add([b"x"], [1])
        bench.driver.publish()  # and no kick
        wait_for(bench.driver.has_used)
    finally:
        bench.close()  # would hang, if polling did not look for the stop


def test_only_a_sleep_that_polling_would_have_spared_is_preceded_by_it(rig, monkeypatch):
    clock = [1000]
    monkeypatch.setattr(worker_module, "perf_counter_ns", lambda: clock[0])
    recorder = Recorder()
    activation = Activation(rig.memory, 0, (rig.queue,), recorder, recorder.fail)
    worker = QueueWorker("polls", [rig.queue], lambda queue: None, activation, [()], poll_ns=50)
    polls = []
    for slept in (49, 51, 10**9, 10, 60):
        worker._work()  # as its thread does, which is not started
        clock[0] += slept
        worker._learn()
        polls.append(worker._poll)
        worker._poll = 0  # the clock stands still, so polling would have no end
    assert polls == [50, 0, 0, 50, 0]
    worker._close()
    worker._wake.close()
