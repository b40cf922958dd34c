"""A driver in another process: both sides really run at once, as a guest and its monitor do.

What a missing fence or a lost wake-up would do is a hang, which ends in a failure after a minute.
"""

from __future__ import annotations

import os
import random
import select
import sys
import traceback

import pytest
from queue_rig import LAYOUTS, Rig

from pyvmm.host.syscalls import EventFd
from pyvmm.testing import Buffer
from pyvmm.testing.mmio_driver import SAFETY_TIMEOUT
from pyvmm.virtio.device import Activation
from pyvmm.virtio.worker import QueueDevice

REQUESTS = 3000
SIZE = 16


class Adder(QueueDevice):
    """Answers the number in a request with the next one."""

    name, device_type, queue_sizes = "adder", 42, (SIZE,)

    def serve(self, queue):
        for chain in queue:
            number = int.from_bytes(chain.reader().read(4), "little")
            writer = chain.writer()
            writer.write((number + 1).to_bytes(4, "little"))
            queue.add_used(chain, 4)


class Interrupts:
    """The device's: an eventfd, as an irqfd is."""

    def __init__(self, line):
        self.line = line

    def signal_used(self, *queue_indexes):
        self.line.signal()

    def signal_config_change(self):
        pass


def drive(rig: Rig, line: EventFd, seed: int) -> None:
    """Have REQUESTS numbers added to, some at a time, sleeping whenever nothing is to do."""
    chance = random.Random(seed)
    driver = rig.driver
    # Two buffers for each descriptor, used over and over.
    places = [(0x8000 + 16 * n, 0x8008 + 16 * n) for n in range(SIZE)]
    free = list(places)
    out = {}
    waiter = select.poll()
    waiter.register(line.fd, select.POLLIN)
    sent = answered = 0
    while answered < REQUESTS:
        for _ in range(chance.randrange(1, SIZE)):
            indirect = chance.random() < 0.5
            if sent == REQUESTS or not free or driver.room < (1 if indirect else 2):
                break
            question, answer = free.pop()
            rig.memory.write(question, sent.to_bytes(4, "little"))
            chain = driver.add([Buffer(question, 4)], [Buffer(answer, 4)], indirect=indirect)
            out[chain.head] = sent, question, answer
            sent += 1
        if driver.publish():
            rig.kick.signal()
        taken = 0
        while not taken:
            while (used := driver.pop_used()) is not None:
                number, question, answer = out.pop(used.head)
                assert used.written == 4
                assert int.from_bytes(rig.memory.read(answer, 4), "little") == number + 1
                free.append((question, answer))
                taken += 1
            if not taken:
                assert waiter.poll(SAFETY_TIMEOUT * 1000), (
                    f"nobody woke the driver\n{driver.dump()}"
                )
                line.drain()
        answered += taken
    assert not out


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
@pytest.mark.parametrize("in_order", [False, True], ids=["any order", "in order"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nobody_waits_for_ever(layout, in_order, event_idx):
    rig = Rig(SIZE, layout=layout, event_idx=event_idx, in_order=in_order)
    line = EventFd()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            drive(rig, line, seed=7)
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    failures = []
    device = Adder()
    queues = (rig.queue,)
    device.activate(Activation(rig.memory, rig.features, queues, Interrupts(line), failures.append))
    _, status = os.waitpid(child, 0)
    device.reset()
    assert (os.waitstatus_to_exitcode(status), failures) == (0, [])
    line.close()
    rig.close()
