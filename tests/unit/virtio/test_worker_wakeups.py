"""A driver in another process, which runs truly at the same time: nothing torn, nothing lost."""

from __future__ import annotations

import os
import random
import select
import sys

import pytest
from queue_rig import Rig

from pyvmm.host.syscalls import EventFd
from pyvmm.testing import Buffer
from pyvmm.testing.mmio_driver import SAFETY_TIMEOUT
from pyvmm.virtio.device import Activation
from pyvmm.virtio.worker import QueueDevice

ROUNDS = 1500


def in_child(function) -> int:
    """Fork, run `function`, and the child's process id; its exit code is 0 if nothing raised."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function()
        code = 0
    except BaseException as error:
        sys.stderr.write(f"driver process: {error!r}\n")
    finally:
        os._exit(code)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_cve_2020_13759_an_index_is_never_seen_torn():
    # Between 0x00ff and 0x0100 both bytes change. Half of one and half of the other would be a
    # jump, which is a DriverError.
    rig = Rig(size=2, start=0x00FF)
    stop = EventFd()

    def flip():
        poll = select.poll()
        poll.register(stop.fd, select.POLLIN)
        while not poll.poll(0):
            for _ in range(2000):
                rig.driver.avail_idx = 0x0100
                rig.driver.avail_idx = 0x00FF

    pid = in_child(flip)
    try:
        seen = set()
        for _ in range(30000):
            rig.queue.enable_notification()
            seen.add(rig.queue._seen_avail)
            rig.queue._seen_avail = 0x00FF  # or the way back would be an index that steps back
        assert seen <= {0x00FF, 0x0100}
    finally:
        stop.signal()
        assert exit_code(pid) == 0
        rig.close()


class Sink(QueueDevice):
    name, device_type, queue_sizes = "sink", 42, (256,)

    def serve(self, queue):
        for chain in queue:
            queue.add_used(chain, 0)


class EventFdInterrupt:
    def __init__(self):
        self.event = EventFd()

    def signal_used(self, *queue_indexes):
        self.event.signal()

    def signal_config_change(self):
        pass


def wait_readable(event: EventFd) -> None:
    poll = select.poll()
    poll.register(event.fd, select.POLLIN)
    assert poll.poll(SAFETY_TIMEOUT * 1000), "a kick or an interrupt was lost"
    event.drain()


@pytest.mark.parametrize("poll_ns", [0, 20_000, 10**9])
@pytest.mark.parametrize("event_idx", [False, True])
def test_row38_no_kick_and_no_interrupt_is_ever_lost(event_idx, poll_ns):
    """The driver kicks only if asked to and sleeps until it is interrupted, 1,500 times."""
    rig = Rig(size=8, event_idx=event_idx)
    interrupt = EventFdInterrupt()
    failures = []

    def drive():
        rng = random.Random(1)
        driver, data = rig.driver, Buffer(0x8000, 16)
        for _ in range(ROUNDS):
            waiting = rng.randint(1, 8)
            for _ in range(waiting):
                driver.add([data])
                # Sometimes one by one, while the device is at work already; sometimes in a batch.
                if rng.random() < 0.6 and driver.publish():
                    rig.kick.signal()
            if driver.publish():
                rig.kick.signal()
            while waiting:
                # pop_used moves used_event, and only then is the ring looked at again.
                if driver.pop_used() is not None:
                    waiting -= 1
                else:
                    wait_readable(interrupt.event)

    # The worker's threads must not exist yet when the process forks.
    pid = in_child(drive)
    device = Sink()
    device.poll_ns = poll_ns
    device.activate(Activation(rig.memory, rig.features, (rig.queue,), interrupt, failures.append))
    try:
        assert exit_code(pid) == 0
    finally:
        device.reset()
        rig.close()
        interrupt.event.close()
    assert failures == []


@pytest.mark.parametrize("event_idx", [False, True])
def test_chains_left_behind_are_announced_again_when_the_indices_have_gone_round(event_idx):
    rig = Rig(size=8, event_idx=event_idx)

    def offer(count):
        for _ in range(count):
            rig.driver.offer(rig.driver._next_slot % 8)
        rig.driver.publish()

    offer(2)
    assert rig.queue.enable_notification() is True  # two are waiting at index 0
    rig.serve()
    offer(6)
    for _ in range(65536 // 8 - 1):
        assert rig.serve() in (6, 8)
        rig.queue.publish_used()
        assert rig.queue.enable_notification() is False
        offer(8)
    rig.serve()
    rig.queue.publish_used()
    assert rig.queue.state().next_avail == 0
    offer(2)
    assert rig.queue.enable_notification() is True
    rig.close()
