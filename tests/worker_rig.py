"""A device that echoes, a worker to serve it, and who listens to its interrupts and failures."""

from __future__ import annotations

import select
import sys
import threading
import time

from queue_rig import Rig

from pyvmm.host.poller import Poller
from pyvmm.testing import InterruptLine
from pyvmm.testing.mmio_driver import SAFETY_TIMEOUT
from pyvmm.virtio.device import Activation
from pyvmm.virtio.worker import FOR_SOURCE, QueueDevice

_WAIT = Poller.wait.__code__  # of the real one, which tests replace


class Recorder:
    """Interrupts and failures of a device."""

    def __init__(self):
        self.line = InterruptLine()
        self.notified = []  # the queues of each notification
        self.failures = []
        self.failed = threading.Event()

    def signal_used(self, *queue_indexes):
        self.notified.append(queue_indexes)
        self.line()

    def signal_config_change(self):
        pass

    def fail(self, error):
        self.failures.append(error)
        self.failed.set()


class Echo(QueueDevice):
    """Answers each chain with the bytes that it reads; `behave` runs before each."""

    name, device_type, queue_sizes = "echo", 42, (256,)

    def __init__(self, behave=lambda chain: None):
        self.behave = behave
        self.passes = 0

    def serve(self, queue):
        self.passes += 1
        for chain in queue:
            self.behave(chain)
            writer = chain.writer()
            writer.write(chain.reader().read(chain.readable_size))
            queue.add_used(chain, writer.written)


class Bench:
    def __init__(self, device, *, queues=1, **options):
        self.rigs = [Rig(**options) for _ in range(queues)]
        for index, rig in enumerate(self.rigs):
            rig.queue.index = index
        self.rig = self.rigs[0]
        self.driver = self.rig.driver
        self.device = device
        self.recorder = Recorder()

    def activate(self):
        self.device.activate(
            Activation(
                self.rig.memory,
                self.rig.features,
                tuple(rig.queue for rig in self.rigs),
                self.recorder,
                self.recorder.fail,
            )
        )

    def echo(self, data, index=0):
        """Have `data` echoed by a kick, waiting for the interrupt's effect."""
        rig = self.rigs[index]
        chain = rig.driver.add([data], [len(data)])
        if rig.driver.publish():
            rig.kick.signal()
        wait_for(rig.driver.has_used)
        rig.driver.pop_used()
        return rig.driver.contents(chain)

    def close(self):
        self.device.reset()
        for rig in self.rigs:
            rig.close()


def quiet(device):
    """True if its workers sleep, with nothing to wake them, and go on sleeping for a while. One
    that was woken and has no processor yet does not sleep."""
    passes = device.passes
    if not asleep(device):
        return False
    time.sleep(0.05)
    return asleep(device) and device.passes == passes


def asleep(device):
    """True if its workers wait, and nothing has happened that would wake them."""
    frames = sys._current_frames()
    for worker in device._workers.values():
        frame = frames.get(worker._thread.ident)
        if frame is None or frame.f_code is not _WAIT:
            return False
        if select.select([worker._poller._epoll.fileno()], [], [], 0)[0]:
            return False
    return True


def wait_for(condition):
    deadline = time.monotonic() + SAFETY_TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "the worker hangs"
        time.sleep(0.0005)


def receive_datagrams(device, queue):
    """Serve `queue`: each datagram of the socket `device.ours` goes into the next chain."""
    for chain in queue:
        try:
            data = device.ours.recv(64)
        except BlockingIOError:
            queue.step_back()
            return FOR_SOURCE
        chain.writer().write(data)
        queue.add_used(chain, len(data))
    return None


def send_datagrams(device, queue):
    """Serve `queue`: each chain goes to the socket `device.ours`; `device.full` counts when it took
    no more."""
    for chain in queue:
        try:
            device.ours.send(chain.reader().read(chain.readable_size))
        except BlockingIOError:
            queue.step_back()
            device.full += 1
            return FOR_SOURCE
        queue.add_used(chain, 0)
    return None
