"""Workers that wait for something else than kicks: a socket to read, one to write, some time."""

from __future__ import annotations

import select
import socket
import time

import pytest
from worker_rig import Bench, quiet, receive_datagrams, send_datagrams, wait_for

from pyvmm.host.poller import Source
from pyvmm.testing.mmio_driver import SAFETY_TIMEOUT
from pyvmm.virtio.worker import AT_ONCE, FOR_SOURCE, QueueDevice, Rest


class Receiver(QueueDevice):
    """Puts each datagram of a socket into the next chain."""

    name, device_type, queue_sizes = "rx", 42, (8,)

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ours.setblocking(False)
        self.passes = 0

    def sources(self, index):
        return (Source(self.ours.fileno()),)

    def serve(self, queue):
        self.passes += 1
        return receive_datagrams(self, queue)


class Sender(QueueDevice):
    """Sends each chain to a socket that nobody may read."""

    name, device_type, queue_sizes = "tx", 42, (256,)

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least: a few datagrams
        self.ours.setblocking(False)
        self.passes = self.full = 0

    def sources(self, index):
        return (Source(self.ours.fileno(), select.EPOLLOUT, on_demand=True),)

    def serve(self, queue):
        self.passes += 1
        return send_datagrams(self, queue)


class Ticker(QueueDevice):
    """Answers one chain a pass, and asks for the next pass by `rest`."""

    name, device_type, queue_sizes = "tick", 42, (8,)

    def __init__(self, rest: Rest) -> None:
        self.rest = rest
        self.passes = 0

    def serve(self, queue):
        self.passes += 1
        chain = queue.pop()
        if chain is None:
            return None
        queue.add_used(chain, 0)
        return self.rest


@pytest.fixture
def bench():
    made = []

    def make(device, **options):
        made.append(Bench(device, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
        for end in ("ours", "theirs"):
            if hasattr(each.device, end):
                getattr(each.device, end).close()


@pytest.mark.parametrize("event_idx", [False, True])
def test_data_wakes_a_worker_that_has_buffers(bench, event_idx):
    b = bench(Receiver(), event_idx=event_idx)
    chains = [b.driver.add([], [64]) for _ in range(4)]
    b.driver.publish()
    b.activate()
    for turn, chain in enumerate(chains, start=1):
        b.device.theirs.send(b"data %d" % turn)
        # Before the driver looks: one that has looked already needs no interrupt.
        assert b.recorder.line.wait(turn, SAFETY_TIMEOUT)
        assert b.driver.pop_used().head == chain.head
        assert b.driver.contents(chain).startswith(b"data %d" % turn)
    assert b.recorder.line.count == 4


@pytest.mark.parametrize("event_idx", [False, True])
def test_cve_2020_16843_a_ring_that_was_empty_is_served_after_a_kick(bench, event_idx):
    b = bench(Receiver(), event_idx=event_idx)
    b.activate()
    for turn in range(3):
        b.device.theirs.send(b"early")
        wait_for(lambda: quiet(b.device))  # there is data, and nowhere to put it: no busy loop
        chain = b.driver.add([], [64])
        assert b.driver.publish(), "a kick is wanted"
        b.rig.kick.signal()
        wait_for(b.driver.has_used)
        b.driver.pop_used()
        assert b.driver.contents(chain).startswith(b"early"), turn


@pytest.mark.parametrize("event_idx", [False, True])
def test_no_kicks_are_wanted_while_buffers_wait_for_data(bench, event_idx):
    b = bench(Receiver(), event_idx=event_idx)
    b.driver.add([], [64])
    b.driver.publish()
    b.activate()
    b.device.theirs.send(b"one")
    wait_for(b.driver.has_used)
    b.driver.add([], [64])
    b.driver.publish()
    b.rig.kick.signal()
    wait_for(lambda: quiet(b.device))
    b.driver.add([], [64])
    assert not b.driver.publish()


def test_a_full_socket_holds_chains_back_until_it_is_read(bench):
    b = bench(Sender(), size=256)
    for number in range(200):
        b.driver.add([b"%03d" % number], [])
    b.driver.publish()
    b.activate()
    wait_for(lambda: b.device.full)
    assert b.driver.used_idx < 200
    wait_for(lambda: quiet(b.device))
    for number in range(200):
        assert b.device.theirs.recv(64) == b"%03d" % number
    wait_for(lambda: b.driver.used_idx == 200)


def test_a_source_on_demand_wakes_nobody_who_does_not_wait_for_it(bench):
    b = bench(Sender(), size=256)
    b.activate()
    b.driver.add([b"x"], [])
    b.driver.publish()
    b.rig.kick.signal()
    wait_for(b.driver.has_used)
    wait_for(lambda: quiet(b.device))
    passes = b.device.passes
    b.device.theirs.recv(64)  # which makes room
    assert quiet(b.device)
    assert b.device.passes == passes


@pytest.mark.parametrize("rest", [AT_ONCE, Rest(kicks=False, seconds=0.001), Rest(seconds=0.001)])
def test_a_worker_goes_on_by_itself(bench, rest):
    b = bench(Ticker(rest))
    for _ in range(8):
        b.driver.add([b"x"], [])
    b.driver.publish()
    b.activate()
    wait_for(lambda: b.driver.used_idx == 8)
    wait_for(lambda: quiet(b.device))


def test_a_worker_that_never_ends_its_work_can_be_stopped(bench):
    class Busy(Ticker):
        def serve(self, queue):
            self.passes += 1
            return AT_ONCE

    b = bench(Busy(AT_ONCE))
    b.activate()
    wait_for(lambda: b.device.passes > 100)
    b.device.reset()
    assert quiet(b.device)


def test_a_peer_that_has_gone_does_not_keep_the_worker_awake(bench):
    class Stream(Receiver):
        def __init__(self):
            super().__init__()
            self.ours.close(), self.theirs.close()
            self.ours, self.theirs = socket.socketpair()
            self.ours.setblocking(False)

        def serve(self, queue):
            self.passes += 1
            return FOR_SOURCE

    b = bench(Stream())
    b.activate()
    wait_for(lambda: quiet(b.device))
    passes = b.device.passes
    b.device.theirs.close()
    wait_for(lambda: b.device.passes > passes)
    wait_for(lambda: quiet(b.device))


def test_a_rest_that_waits_for_kicks_does_not_watch_what_is_watched_on_demand(bench):
    """Such a source may be ready all the time."""

    class Writable(Sender):
        def serve(self, queue):
            self.passes += 1
            return Rest()

    b = bench(Writable())
    b.activate()
    wait_for(lambda: b.device.passes > 0)
    time.sleep(0.2)
    assert b.device.passes < 20
