"""A thread for a whole device: what wakes it, what ends it, and what it leaves behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
from queue_rig import Rig
from worker_rig import Recorder

from pyvmm.errors import DriverError, HostError
from pyvmm.host.poller import READABLE, Poller
from pyvmm.memory import GuestMemory
from pyvmm.virtio.device import Activation
from pyvmm.virtio.worker import DeviceWorker


class Made:
    """A worker without queues; `calls` counts the calls of `work`, `ended` is set by `end`."""

    def __init__(self, work: Callable[[], float | None] = lambda: None) -> None:
        self.recorder = Recorder()
        self.calls = threading.Semaphore(0)
        self.ended = threading.Event()
        self.poller = Poller()
        self._work = work
        memory = GuestMemory([(0, 1 << 20)])
        activation = Activation(memory, 0, (None,), self.recorder, self.recorder.fail)
        self.worker = DeviceWorker("device", activation, self.poller, self._count, self.ended.set)

    def _count(self) -> float | None:
        self.calls.release()
        return self._work()

    def wait_for_call(self) -> None:
        assert self.calls.acquire(timeout=60), "nobody woke the worker"

    def stop(self) -> None:
        self.worker.request_stop()
        self.worker.join()
        assert self.ended.is_set()


def test_work_is_called_at_the_start_and_when_woken() -> None:
    made = Made()
    made.worker.start()
    made.wait_for_call()
    made.worker.wake()
    made.wait_for_call()
    made.stop()
    assert made.recorder.failures == []


def test_work_is_called_again_after_the_time_that_it_asked_for() -> None:
    made = Made(lambda: 0.001)
    made.worker.start()
    for _ in range(3):
        made.wait_for_call()
    made.stop()


def test_a_file_wakes_it_each_time_it_becomes_readable() -> None:
    made = Made()
    heard: list[int] = []
    ours, theirs = os.pipe()
    made.poller.add(ours, heard.append, READABLE)
    made.worker.start()
    made.wait_for_call()
    for _ in range(2):
        os.write(theirs, b"x")
        made.wait_for_call()
    made.stop()
    assert [events & READABLE for events in heard] == [READABLE] * len(heard) and heard
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("error", [DriverError("broken", section="2.7"), ZeroDivisionError()])
def test_what_work_raises_fails_the_device_and_closes_its_files(error: Exception) -> None:
    def fail() -> float | None:
        raise error

    made = Made(fail)
    made.worker.start()
    assert made.recorder.failed.wait(60)
    made.worker.join()
    assert made.ended.is_set()
    [failure] = made.recorder.failures
    assert isinstance(failure, DriverError)


def test_what_woke_it_is_closed_at_its_end() -> None:
    made = Made()
    made.worker.start()
    fd = made.worker._wake.fd
    assert os.readlink(f"/proc/self/fd/{fd}").endswith("[eventfd]")
    made.stop()
    assert made.worker._wake.fd < 0


def test_work_that_never_ends_by_itself_rests_for_whoever_takes_a_queue_out() -> None:
    begun = threading.Event()

    def work() -> None:
        while made.worker.may_go_on:
            begun.set()
            time.sleep(0.001)

    made = Made(work)
    made.worker.start()
    assert begun.wait(60)
    drop = threading.Thread(target=made.worker.drop_queue, args=(0,), daemon=True)
    drop.start()
    drop.join(30)
    assert not drop.is_alive()
    begun.clear()
    assert begun.wait(60), "it rests for ever"
    made.stop()


def test_whoever_takes_a_queue_out_waits_for_the_work_at_hand() -> None:
    begun, leave, forgotten = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert leave.wait(60)

    made = Made(work)
    made.worker.start()
    assert begun.wait(60)
    drop = threading.Thread(target=made.worker.drop_queue, args=(0, forgotten.set), daemon=True)
    drop.start()
    drop.join(0.1)
    assert drop.is_alive() and not forgotten.is_set()
    leave.set()
    drop.join(60)
    assert not drop.is_alive() and forgotten.is_set()
    made.stop()


def test_a_queue_is_served_once_taken_and_may_be_replaced_by_its_successor() -> None:
    made, rig = Made(), Rig()
    made.worker.start()
    made.wait_for_call()
    for queue in (rig.queue, rig.built()):
        queue.end_serving()  # as the reset before left it
        made.worker.take_queue(queue)
        made.wait_for_call()
        assert made.worker.queues == {0: queue}
        assert not queue.halt
        rig.kick.signal()
        made.wait_for_call()
        made.worker.drop_queue(0)
        made.wait_for_call()
        assert made.worker.queues == {}
    made.worker.take_queue(queue)
    made.stop()
    assert queue.halt
    assert made.recorder.failures == []
    rig.close()


def test_waking_it_after_its_end_does_nothing() -> None:
    made = Made()
    made.worker.start()
    made.stop()
    made.worker.wake()


def test_the_end_waits_for_whoever_is_just_waking_it() -> None:
    """Or what is written to could be somebody else's descriptor by then."""
    made = Made()
    made.worker.start()
    made.worker.request_stop()
    end = threading.Thread(target=made.worker.join, daemon=True)
    with made.worker._closing:
        end.start()
        assert made.ended.wait(60)
        end.join(0.1)
        assert end.is_alive()
    end.join(60)
    assert not end.is_alive()


def test_without_a_thread_everything_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    made = Made()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(HostError, match="thread for device"):
        made.worker.start()
    assert made.ended.is_set()


def test_kicks_are_asked_for_with_the_queues_lock_held() -> None:
    made, rig = Made(), Rig()
    enable, locked = rig.queue.enable_notification, []

    def watched() -> bool:
        locked.append(rig.queue.lock.locked())
        return enable()

    rig.queue.enable_notification = watched
    assert made.worker.ask_for_kicks(rig.queue) is False
    rig.driver.add([], [1])
    rig.driver.publish()
    assert made.worker.ask_for_kicks(rig.queue) is True
    assert locked == [True, True]
    made.worker.start()
    made.stop()
    rig.close()
