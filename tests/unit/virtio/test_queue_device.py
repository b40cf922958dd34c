"""The whole way: a driver that knows registers only, the transport, a queue, a device's thread."""

from __future__ import annotations

import os
import re

import pytest

from pyvmm.memory import GuestMemory
from pyvmm.testing import InterruptLine, MmioDriver
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio import worker
from pyvmm.virtio.features import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, mask

BOTH = mask(VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC)


def rng_of_the_docstring():
    """The device in the module's docstring, as it stands there."""
    code = re.search(r"(?m)^    class Rng.*?(?=\n\S|\Z)", worker.__doc__, re.DOTALL)
    assert code is not None
    names = {"os": os, "QueueDevice": worker.QueueDevice, "Queue": worker.Queue}
    exec("\n".join(line[4:] for line in code.group().splitlines()), names)
    return names["Rng"]()


class Setup:
    def __init__(self, features: int, *, doorbells: bool = False) -> None:
        self.log: list[str] = []
        self.memory = GuestMemory([(0, 4 << 20)])
        self.device = rng_of_the_docstring()
        self.device.features = features
        self.irq = InterruptLine()
        self.transport = MmioTransport(self.device, self.memory, self.irq, log=self.log.append)
        kicks = self.transport.kicks if doorbells else ()
        self.driver = MmioDriver(self.transport, self.memory, irq=self.irq, kicks=kicks)

    def close(self) -> None:
        self.driver.reset()
        self.transport.close()
        self.memory.close()


@pytest.fixture(params=[0, BOTH], ids=["plain", "event index and indirect"])
def setup(request):
    setup = Setup(request.param)
    yield setup
    setup.close()


def test_a_device_in_a_few_lines_works(setup):
    setup.driver.start()
    indirect = bool(setup.device.features)
    for turn in range(1, 100):
        chain = setup.driver.submit(0, [], [20, 12], indirect=indirect)
        # Before the driver looks: one that has looked already needs no interrupt.
        setup.driver.wait_interrupt(turn)
        assert setup.driver.wait_used(0, chain).written == 32
        assert setup.driver.queues[0].contents(chain) != bytes(32)
        assert setup.driver.acknowledge() == 1


def test_kicks_by_eventfd_reach_it_too():
    setup = Setup(BOTH, doorbells=True)
    setup.driver.start()
    assert setup.driver.request(0, [], [8])[0] == 8
    setup.close()


def test_a_broken_ring_needs_a_reset_and_a_reset_cures_it(setup):
    driver = setup.driver
    for _ in range(3):
        (queue,) = driver.start()
        assert driver.request(0, [], [8])[0] == 8
        queue.avail_idx = 1000
        driver.kick()
        driver.wait_needs_reset()
        before = bytes(setup.memory.regions[0].view)
        driver.kick()
        driver.kick()
        assert bytes(setup.memory.regions[0].view) == before
        driver.reset()
        assert driver.status == 0
    assert any("available index" in line and "2.7.6.1" in line for line in setup.log)


def test_row12_reset_while_the_device_is_busy_ends_dma_and_interrupts(setup):
    driver = setup.driver
    for _ in range(20):
        (queue,) = driver.start()
        for _ in range(16):
            queue.add([], [16])
        queue.publish()
        driver.kick()
        driver.reset()
        before, interrupts = bytes(setup.memory.regions[0].view), setup.irq.count
        assert driver.acknowledge() == 0
        assert bytes(setup.memory.regions[0].view) == before
        assert setup.irq.count == interrupts


def test_a_changed_configuration_is_told_to_a_driver_that_is_at_work(setup):
    status = setup.driver.registers.read
    setup.device.signal_config_change()
    setup.driver.start()
    assert not status(0x60, 4) & 2
    setup.device.signal_config_change()
    assert status(0x60, 4) & 2 and setup.transport.negotiation.config_interrupts == 1
    setup.driver.reset()
    setup.device.signal_config_change()
    assert not status(0x60, 4) & 2
