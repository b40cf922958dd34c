"""A worker thread per queue: what it serves, when it interrupts, how it stops."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from descriptors import open_descriptors
from worker_rig import Bench, Echo, quiet, wait_for

from pyvmm.errors import DriverError, HostError
from pyvmm.testing import Desc
from pyvmm.testing.mmio_driver import SAFETY_TIMEOUT
from pyvmm.virtio import defects
from pyvmm.virtio import worker as worker_module
from pyvmm.virtio.worker import QueueDevice


@pytest.fixture
def bench():
    made = []

    def make(device, **options):
        made.append(Bench(device, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def threads_of(b):
    names = (thread.name for thread in threading.enumerate())
    return sorted(name for name in names if name.startswith(f"{b.device.name}-q"))


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_kick_is_served_and_interrupts(bench, event_idx):
    b = bench(Echo(), event_idx=event_idx)
    b.activate()
    for turn in range(1, 20):
        data = b"hello %d" % turn
        chain = b.driver.add([data], [len(data)])
        if b.driver.publish():
            b.rig.kick.signal()
        # Before the driver looks: one that has looked already needs no interrupt.
        assert b.recorder.line.wait(turn, SAFETY_TIMEOUT)
        assert b.driver.pop_used().head == chain.head
        assert b.driver.contents(chain) == data
    assert b.recorder.line.count == 19


def test_what_is_available_before_activation_is_served_without_a_kick(bench):
    b = bench(Echo())
    b.driver.add([b"early"], [5])
    b.driver.publish()
    b.activate()
    wait_for(b.driver.has_used)


def test_row11_a_kick_before_activation_consumes_nothing(bench):
    b = bench(Echo())
    b.driver.add([b"early"], [5])
    b.driver.publish()
    b.rig.kick.signal()
    assert b.rig.queue.state().next_avail == 0
    assert b.driver.used_idx == 0


def test_a_batch_costs_one_interrupt(bench):
    b = bench(Echo())
    for _ in range(4):
        b.driver.add([b"x"], [1])
    b.driver.publish()
    b.activate()
    wait_for(lambda: b.driver.used_idx == 4)
    b.device.reset()
    assert b.recorder.line.count == 1


def test_row21_kicks_on_an_empty_ring_interrupt_nobody(bench):
    b = bench(Echo())
    b.activate()
    for _ in range(2000):
        b.rig.kick.signal()
    assert b.echo(b"alive") == b"alive"
    b.device.reset()
    assert b.recorder.line.count == 1


def test_an_idle_worker_sleeps(bench):
    b = bench(Echo())
    b.activate()
    b.echo(b"x")
    wait_for(lambda: quiet(b.device))


def test_a_device_that_leaves_chains_waiting_is_not_called_for_ever(bench):
    class Starved(Echo):
        def serve(self, queue):
            self.passes += 1
            if queue.pop() is not None:
                queue.step_back()

    b = bench(Starved())
    b.driver.add([], [16])
    b.driver.publish()
    b.activate()
    wait_for(lambda: b.device.passes == 2)  # once for the chain, once because it may be news
    b.device.reset()
    assert b.device.passes == 2


def test_a_receive_device_fills_waiting_chains_from_another_thread(bench):
    """CVE-2020-16843: starved of buffers, or of packets, it goes on when there are some."""

    class Receiver(QueueDevice):
        name, device_type, queue_sizes = "rx", 1, (8,)

        def serve(self, queue):
            pass  # buffers are taken when there is something to put into them

        def receive(self, queue, data):
            with queue.lock:
                chain = queue.pop()
                if chain is None:
                    return False
                chain.writer().write(data)
                queue.add_used(chain, len(data))
                if queue.publish_used():
                    self._activation.interrupt.signal_used(queue.index)
            return True

    b = bench(Receiver())
    b.activate()
    assert not b.device.receive(b.rig.queue, b"lost")
    for turn in range(30):
        chain = b.driver.add([], [4])
        if b.driver.publish():
            b.rig.kick.signal()
        assert b.device.receive(b.rig.queue, b"%4d" % turn)
        assert b.driver.pop_used().head == chain.head
        assert b.driver.contents(chain) == b"%4d" % turn
        assert not b.device.receive(b.rig.queue, b"lost")
    assert b.recorder.line.count == 30


# --- errors --------------------------------------------------------------------------------------


def test_a_broken_chain_fails_the_device_after_what_came_before_it(bench):
    b = bench(Echo())
    good = b.driver.add([b"good"], [4])
    b.driver.offer(99)
    b.driver.publish()
    b.activate()
    assert b.recorder.failed.wait(SAFETY_TIMEOUT)
    b.device._workers[0]._thread.join(SAFETY_TIMEOUT)
    assert b.driver.pop_used().head == good.head
    assert b.driver.contents(good) == b"good"
    assert b.recorder.line.count == 1
    assert [error.section for error in b.recorder.failures] == [
        "2.7.5 The Virtqueue Descriptor Table"
    ]


def test_row36_the_same_head_twice_is_completed_once(bench):
    b = bench(Echo())
    chain = b.driver.add([b"twice"], [5])
    b.driver.offer(chain.head)
    b.driver.publish()
    b.activate()
    assert b.recorder.failed.wait(SAFETY_TIMEOUT)
    assert b.driver.pop_used().head == chain.head
    assert b.driver.used_idx == 1


def test_a_failed_queue_is_left_alone_until_reset(bench):
    b = bench(Echo())
    b.driver.offer(99)
    b.driver.publish()
    b.activate()
    assert b.recorder.failed.wait(SAFETY_TIMEOUT)
    b.device._workers[0]._thread.join(SAFETY_TIMEOUT)
    b.driver.avail_idx = 0
    b.driver.add_raw([Desc(0x8000, 4, 2)])
    b.driver.publish()
    before = b.rig.snapshot()
    for _ in range(50):
        b.rig.kick.signal()
    assert b.rig.snapshot() == before
    assert len(b.recorder.failures) == 1
    assert not b.rig.queue.ready


def test_an_error_of_the_host_fails_the_device(bench):
    error = HostError(5, "preadv of the disk")

    def behave(chain):
        raise error

    b = bench(Echo(behave))
    b.driver.add([b"x"], [1])
    b.driver.publish()
    b.activate()
    assert b.recorder.failed.wait(SAFETY_TIMEOUT)
    assert b.recorder.failures == [error]


def test_an_error_of_the_monitor_fails_the_device_and_says_where(bench, monkeypatch):
    error = ZeroDivisionError("oops")
    lines = []
    monkeypatch.setattr(defects, "_report", lines.append)

    def behave(chain):
        raise error

    b = bench(Echo(behave))
    b.driver.add([b"x"], [1])
    b.driver.publish()
    b.activate()
    assert b.recorder.failed.wait(SAFETY_TIMEOUT)
    (line,) = lines
    assert "echo: queue 0" in line and str(error) in line and "test_worker.py:" in line
    assert "\n" not in line
    (failure,) = b.recorder.failures
    assert isinstance(failure, DriverError)
    assert b.driver.used_idx == 0


def test_the_line_of_an_error_in_our_own_code_names_the_users(bench, monkeypatch):
    lines = []
    monkeypatch.setattr(defects, "_report", lines.append)
    b = bench(Echo(lambda chain: chain.writer().write(5)))  # raised in pyvmm/virtio/queue/chain.py
    b.driver.add([b"x"], [1])
    b.driver.publish()
    b.activate()
    assert b.recorder.failed.wait(SAFETY_TIMEOUT)
    (line,) = lines
    assert "TypeError" in line and "test_worker.py:" in line and "chain.py" not in line


def test_a_worker_that_gives_up_waits_for_whoever_has_its_queue(bench):
    """A pause, say, that has taken the lock right after the batch."""

    class Handed:
        """The first to let go of it hands it to somebody else."""

        def __init__(self):
            self.lock = threading.Lock()
            self.handed = threading.Event()

        def acquire(self, *how):
            return self.lock.acquire(*how)

        def release(self):
            if self.handed.is_set():
                self.lock.release()
            else:
                self.handed.set()

        __enter__ = acquire

        def __exit__(self, *_):
            self.release()

    def behave(chain):
        raise DriverError("broken on purpose", section="2.7")

    b = bench(Echo(behave))
    lock = b.rig.queue.lock = Handed()
    b.driver.add([b"x"], [1])
    b.driver.publish()
    b.activate()
    assert lock.handed.wait(SAFETY_TIMEOUT)
    assert not b.recorder.failed.wait(0.1)
    assert b.rig.queue.ready
    lock.release()
    assert b.recorder.failed.wait(SAFETY_TIMEOUT)
    assert not b.rig.queue.ready


def test_one_broken_queue_does_not_stop_another(bench):
    b = bench(Echo(), queues=2)
    b.activate()
    b.rigs[0].driver.avail_idx = 1000
    b.rigs[0].kick.signal()
    assert b.recorder.failed.wait(SAFETY_TIMEOUT)
    # The transport would stop the device as a whole; by itself the other worker goes on.
    assert b.echo(b"second", index=1) == b"second"


# --- reset ---------------------------------------------------------------------------------------


def test_row12_reset_lets_the_request_at_hand_end_and_nothing_follows(bench):
    entered, leave = threading.Event(), threading.Event()

    def behave(chain):
        entered.set()
        assert leave.wait(SAFETY_TIMEOUT)

    b = bench(Echo(behave))
    first = b.driver.add([b"first"], [5])
    second = b.driver.add([b"second"], [6])
    b.driver.publish()
    b.activate()
    assert entered.wait(SAFETY_TIMEOUT)
    resetting = threading.Thread(target=b.device.reset)
    resetting.start()
    wait_for(lambda: b.rig.queue.halt)
    assert resetting.is_alive()  # it waits for the request
    leave.set()
    resetting.join(SAFETY_TIMEOUT)
    assert not resetting.is_alive()
    assert b.driver.contents(first) == b"first"  # whole
    assert b.driver.contents(second) == bytes(6)  # not begun
    assert b.driver.used_idx == 1
    before, interrupts = b.rig.snapshot(), b.recorder.line.count
    for _ in range(10):
        b.rig.kick.signal()
    assert b.rig.snapshot() == before
    assert b.recorder.line.count == interrupts
    assert not b.rig.queue.ready
    assert b.recorder.failures == []


def test_reset_of_a_device_that_was_never_activated():
    Echo().reset()


def test_a_device_that_was_reset_starts_no_queue(bench):
    b = bench(Echo())
    b.activate()
    b.device.reset()
    with pytest.raises(AssertionError, match="live device"):
        b.device.start_queue(b.rig.queue)


def test_the_queues_in_use_are_those_with_a_worker(bench):
    b = bench(Echo(), queues=2)
    b.activate()
    first, second = (rig.queue for rig in b.rigs)
    assert b.device.queues_in_use == [first, second]
    b.device.reset_queue(0)
    assert b.device.queues_in_use == [second]
    successor = b.rig.built()
    b.device.start_queue(successor)
    assert b.device.queues_in_use == [second, successor]


def test_no_worker_keeps_a_process_that_ends(bench):
    b = bench(Echo(), queues=2)
    b.activate()
    workers = [each for each in threading.enumerate() if each.name.startswith("echo-q")]
    assert [worker.daemon for worker in workers] == [True, True]


def test_a_device_serves_again_after_reset(bench):
    b = bench(Echo())
    for turn in range(5):
        b.activate()
        assert b.echo(b"turn %d" % turn) == b"turn %d" % turn
        b.device.reset()
        b.rig.queue.ready = True  # the transport would build a new queue


def test_reset_gives_threads_and_descriptors_back(bench):
    b = bench(Echo(), queues=2)
    before = open_descriptors()
    for _ in range(10):
        b.activate()
        assert threads_of(b) == ["echo-q0", "echo-q1"]
        b.device.reset()
        assert threads_of(b) == []
    assert open_descriptors() == before


def test_a_driver_that_refills_for_ever_starves_neither_reset_nor_another_queue(bench):
    b = bench(Echo(), queues=2)
    greedy = b.rigs[0]

    class Greedy(Echo):
        def serve(self, queue):
            for chain in queue:
                if queue is greedy.queue:
                    queue.add_used(chain, 0)
                    # As fast as any guest could be, with another chain whenever one is used.
                    queue.publish_used()
                    greedy.driver.offer(chain.head)
                    greedy.driver.publish()
                else:
                    chain.writer().write(chain.reader().read(5))
                    queue.add_used(chain, 5)

    b.device.reset()
    b.device = Greedy()
    greedy.driver.add([b"abc"], [3])
    greedy.driver.publish()
    b.activate()
    wait_for(lambda: greedy.driver.used_idx > 100)
    assert b.echo(b"other", index=1) == b"other"
    moment = greedy.driver.used_idx
    wait_for(lambda: greedy.driver.used_idx != moment)  # it still runs
    done = threading.Thread(target=b.device.reset)
    done.start()
    done.join(SAFETY_TIMEOUT)
    assert not done.is_alive()


def test_activation_that_fails_half_way_leaves_nothing_running(bench, monkeypatch):
    b = bench(Echo(), queues=2)
    real, made = worker_module.Poller, []

    def limited():
        if made:
            raise HostError(24, "epoll")
        made.append(1)
        return real()

    monkeypatch.setattr(worker_module, "Poller", limited)
    with pytest.raises(HostError):
        b.activate()
    assert threads_of(b) == []


def test_a_host_without_threads_is_a_host_error_that_leaves_nothing_open(bench, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    b = bench(Echo())
    before = open_descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(HostError, match="thread") as kept:
            b.activate()
    # Closed by now, though not forgotten: the error has the worker in its traceback.
    assert len(os.listdir("/proc/self/fd")) == before
    del kept
    b.rig.queue.ready = True
    b.activate()
    assert b.echo(b"later") == b"later"


def test_rings_are_touched_with_their_lock_held(bench, monkeypatch):
    """The holder of a queue's lock, such as a pause, has the ring to itself."""
    b = bench(Echo())
    queue, without = b.rig.queue, []

    def watched(name):
        method = getattr(queue, name)

        def call(*arguments):
            if not queue.lock.locked():
                without.append(name)
            return method(*arguments)

        return call

    for name in ("disable_notification", "pop", "publish_used", "enable_notification"):
        monkeypatch.setattr(queue, name, watched(name))
    b.activate()
    for data in (b"a", b"b"):
        assert b.echo(data) == data
    b.device.reset()
    assert without == []


def test_a_kick_that_cannot_be_waited_for_leaves_nothing_open(bench, monkeypatch):
    def refuse(*_):
        raise HostError(errno.ENOSPC, "epoll_ctl")

    b = bench(Echo())
    before = open_descriptors()
    for place in (0, 1):  # the worker's own eventfd, then the queue's kick
        add, calls = worker_module.Poller.add, []

        def fail(poller, *arguments, add=add, calls=calls, place=place):
            calls.append(arguments)
            (refuse if len(calls) > place else add)(poller, *arguments)

        with monkeypatch.context() as patch, pytest.raises(HostError) as kept:
            patch.setattr(worker_module.Poller, "add", fail)
            b.activate()
        # Closed by now, though not forgotten: the error has the worker in its traceback.
        assert len(os.listdir("/proc/self/fd")) == before
        del kept
