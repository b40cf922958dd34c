"""Several queues of a device served by one thread."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from worker_rig import Bench, Echo, receive_datagrams, send_datagrams, wait_for

from pyvmm.errors import DriverError
from pyvmm.host.poller import Source
from pyvmm.testing.mmio_driver import SAFETY_TIMEOUT
from pyvmm.virtio import defects
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.worker import AT_ONCE, FOR_SOURCE, QueueWorker, Rest


class Shared(VirtioDevice):
    """An echo on all its queues, by one thread; `order` says which queue was served when."""

    name, device_type, queue_sizes = "shared", 42, (256, 256)

    def __init__(self, behave=lambda queue, chain: None):
        self.behave = behave
        self.order = []
        self.threads = set()
        self.worker = None

    def activate(self, activation):
        queues = [queue for queue in activation.queues if queue is not None]
        sources = [self.sources(queue.index) for queue in queues]
        self.worker = QueueWorker("shared", queues, self.serve, activation, sources)
        self.worker.start()

    def sources(self, index):
        return ()

    def serve(self, queue):
        self.threads.add(threading.get_ident())
        for chain in queue:
            self.order.append(queue.index)
            self.behave(queue, chain)
            writer = chain.writer()
            writer.write(chain.reader().read(chain.readable_size))
            queue.add_used(chain, writer.written)

    def reset(self):
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.request_stop()
            worker.join()


@pytest.fixture
def bench():
    made = []

    def make(device, **options):
        made.append(Bench(device, queues=2, **options))
        made[-1].activate()
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("event_idx", [False, True])
def test_each_queue_is_served_after_its_kick_by_the_same_thread(bench, event_idx):
    b = bench(Shared(), event_idx=event_idx)
    for turn in range(150):
        rig = b.rigs[(0, 1, 1)[turn % 3]]
        data = b"%d" % turn
        chain = rig.driver.add([data], [len(data)])
        if rig.driver.publish():
            rig.kick.signal()
        # Before the driver looks: one that has looked already needs no interrupt.
        assert b.recorder.line.wait(turn + 1, SAFETY_TIMEOUT)
        assert rig.driver.pop_used().head == chain.head
        assert rig.driver.contents(chain) == data
    assert len(b.device.threads) == 1
    assert b.recorder.line.count == 150


def test_a_queue_that_was_stopped_does_not_hold_up_the_other(bench):
    b = bench(Shared())
    assert b.echo(b"before") == b"before"
    b.rigs[0].queue.halt = True
    with b.rigs[0].queue.lock:
        b.rigs[0].queue.ready = False
    b.rigs[0].driver.add([b"x"], [1])
    b.rigs[0].driver.publish()
    b.rigs[0].kick.signal()
    for _ in range(3):
        assert b.echo(b"other", 1) == b"other"
    assert not b.rigs[0].driver.has_used()


def test_a_broken_ring_fails_the_device_after_the_other_queue_was_notified(bench):
    def behave(queue, chain):
        if queue.index == 1:
            raise DriverError("broken on purpose", section="2.7")

    device = Shared(behave)
    b = bench(device)
    held = b.rigs[0].queue.lock
    with held:  # both have something before the thread gets to see either
        for rig in b.rigs:
            rig.driver.add([b"x"], [1])
            rig.driver.publish()
            rig.kick.signal()
    assert b.recorder.failed.wait(SAFETY_TIMEOUT)
    wait_for(b.rigs[0].driver.has_used)
    wait_for(lambda: b.recorder.line.count >= 1)
    assert len(b.recorder.failures) == 1
    assert not any(rig.queue.ready for rig in b.rigs)


def test_a_defect_of_ours_names_the_worker_and_not_one_of_its_queues(bench, monkeypatch):
    def behave(queue, chain):
        raise ZeroDivisionError("oops")

    lines = []
    monkeypatch.setattr(defects, "_report", lines.append)
    b = bench(Shared(behave))
    b.rigs[1].driver.add([b"x"], [1])
    b.rigs[1].driver.publish()
    b.rigs[1].kick.signal()
    assert b.recorder.failed.wait(SAFETY_TIMEOUT)
    (line,) = lines
    assert line.startswith("shared failed inside the monitor: ZeroDivisionError: oops")


@pytest.mark.parametrize("event_idx", [False, True])
def test_both_queues_of_a_pass_are_notified_at_once(bench, event_idx):
    begun, both_are_there = threading.Event(), threading.Event()

    def behave(queue, chain):
        if queue.index == 0:
            begun.set()
            assert both_are_there.wait(SAFETY_TIMEOUT)

    b = bench(Shared(behave), event_idx=event_idx)
    for rig in b.rigs:
        rig.driver.add([b"x"], [1])
        rig.driver.publish()
        rig.kick.signal()
        assert begun.wait(SAFETY_TIMEOUT)
    both_are_there.set()
    wait_for(lambda: b.recorder.notified)
    assert b.recorder.notified == [(0, 1)]
    assert all(rig.driver.has_used() for rig in b.rigs)


def test_kicks_are_off_while_a_queue_is_served(bench):
    wanted = []
    b = bench(Shared(lambda queue, chain: wanted.append(b.rigs[queue.index].driver.used_flags)))
    for index in (0, 1):
        wait_for(lambda index=index: b.rigs[index].driver.device_wants_kicks)
        assert b.echo(b"x", index) == b"x"
    assert wanted == [1, 1]  # VIRTQ_USED_F_NO_NOTIFY


def test_no_queue_is_served_after_a_stop(bench):
    """Though their turn had begun: not even by a device that takes its chains one by one."""
    begun, leave = threading.Event(), threading.Event()

    class Direct(Shared):
        def serve(self, queue):
            self.order.append(queue.index)
            begun.set()
            assert leave.wait(SAFETY_TIMEOUT)

    b = bench(Direct())
    assert begun.wait(SAFETY_TIMEOUT)
    worker, b.device.worker = b.device.worker, None
    worker.request_stop()
    leave.set()
    worker.join()
    assert b.device.order == [0]


def test_a_source_is_watched_for_the_queue_that_wants_it_only(bench):
    """One that has something all the time would wake the thread again and again."""
    ours, theirs = socket.socketpair()

    class Resting(Shared):
        def sources(self, index):
            return [Source(ours.fileno(), on_demand=True)] if index == 0 else []

        def serve(self, queue):
            self.order.append(queue.index)
            return FOR_SOURCE if queue.index == 1 else None

    theirs.send(b"x")
    b = bench(Resting())
    wait_for(lambda: b.device.order)
    time.sleep(0.2)
    assert len(b.device.order) < 20
    b.device.reset()
    ours.close()
    theirs.close()


class Busy(Shared):
    """Queue 0 has always more to do."""

    def serve(self, queue):
        super().serve(queue)
        if queue.index == 0:
            self.order.append(0)
            return AT_ONCE
        return None


def test_a_queue_that_is_never_done_keeps_neither_the_other_waiting_nor_the_end(bench):
    b = bench(Busy())
    assert b.echo(b"between", 1) == b"between"
    wait_for(lambda: len(b.device.order) > 100)
    assert b.echo(b"again", 1) == b"again"
    b.device.reset()


class Duplex(Shared):
    """Queue 0 sends to a socket and queue 1 receives from it; both wait for the same descriptor."""

    def __init__(self):
        super().__init__()
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least: a few datagrams
        self.ours.setblocking(False)
        self.full = 0

    def sources(self, index):
        import select

        fd = self.ours.fileno()
        return (Source(fd) if index else Source(fd, select.EPOLLOUT, on_demand=True),)

    def serve(self, queue):
        return self._receive(queue) if queue.index else self._send(queue)

    def _send(self, queue):
        return send_datagrams(self, queue)

    def _receive(self, queue):
        return receive_datagrams(self, queue)

    def reset(self):
        super().reset()
        self.ours.close()
        self.theirs.close()


def test_one_descriptor_is_waited_for_by_both_queues(bench):
    b = bench(Duplex(), size=64)
    send, receive = b.rigs
    for _ in range(60):
        receive.driver.add([], [64])
    receive.driver.publish()
    receive.kick.signal()
    sent = [b"%04d" % turn for turn in range(60)]
    for data in sent:
        send.driver.add([data], [])
    send.driver.publish()
    send.kick.signal()
    wait_for(lambda: b.device.full > 0)
    got = []
    for turn in range(60):  # each is answered while more wait to be sent
        got.append(b.device.theirs.recv(64))
        b.device.theirs.send(b"answer %d" % turn)
    assert got == sent
    wait_for(lambda: receive.queue.state().next_used == 60)
    assert send.queue.state().next_used == 60


class Sleepy(Shared):
    """Each queue asks for its next turn after a while, and gets no kick."""

    def __init__(self, quick):
        super().__init__()
        self.quick = quick

    def serve(self, queue):
        super().serve(queue)
        self.order.append(queue.index)
        seconds = 0.001 if queue.index == self.quick else SAFETY_TIMEOUT
        return Rest(kicks=False, seconds=seconds)


@pytest.mark.parametrize("quick", [0, 1])
def test_the_shortest_rest_counts(bench, quick):
    b = bench(Sleepy(quick))
    wait_for(lambda: len(b.device.order) > 20)
    assert set(b.device.order) == {0, 1}


def test_echo_is_the_same_as_with_a_thread_each():
    single, shared = Bench(Echo(), queues=2), Bench(Shared(), queues=2)
    for b in (single, shared):
        b.activate()
        assert [b.echo(b"%d" % n, n % 2) for n in range(10)] == [b"%d" % n for n in range(10)]
        b.close()
