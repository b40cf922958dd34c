"""Every device, over split and packed rings: the ring rows of docs/robustness.md,
and resetting one queue alone (virtio 1.3, 2.6.1 Virtqueue Reset)."""

from __future__ import annotations

import threading

import pytest
from every_device import KINDS, EveryRig, every_device
from mmio_harness import wait_for
from robustness_rows import illegal_params, legal_params

from pyvmm.testing.attached import Over
from pyvmm.testing.chains import LegalChain
from pyvmm.testing.illegal import IllegalChain
from pyvmm.testing.mmio_driver import (
    DRIVER_OK,
    F_EVENT_IDX,
    F_RING_PACKED,
    F_RING_RESET,
    QUEUE_NOTIFY,
    QUEUE_READY,
    QUEUE_SEL,
    STATUS,
    USED_BUFFER,
    Ring,
)
from pyvmm.testing.ring import MockDriver
from pyvmm.virtio.features import RING_FEATURES

SMALL = 8
NAMES = sorted(KINDS)
each = pytest.mark.parametrize("ring", ["split", "packed"])
each_device = pytest.mark.parametrize("name", NAMES)


def memory_of(rig: EveryRig) -> bytes:
    return b"".join(bytes(region.view) for region in rig.driver.memory.regions)


def ring_of(rig: EveryRig, queue: MockDriver) -> list[bytes]:
    """The three areas of a queue, whichever it was."""
    if rig.driver.features & F_RING_PACKED:
        sizes = 16 * queue.size, 4, 4
    else:
        sizes = 16 * queue.size, 6 + 2 * queue.size, 6 + 8 * queue.size
    areas = queue.desc_addr, queue.driver_addr, queue.device_addr
    return [rig.driver.memory.read(*area) for area in zip(areas, sizes, strict=True)]


def workers_of(rig: EveryRig) -> list[str]:
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.name.startswith(f"{rig.device.name}-")
    ]


def refusals(rig: EveryRig) -> list[str]:
    return [line for line in rig.driver.log if "needs a reset" in line]


# --- what the driver may not put into a ring ------------------------------------------------------


@pytest.mark.parametrize(("name", "ring", "illegal"), illegal_params(NAMES))
def test_what_no_driver_may_put_into_a_ring(
    transport_name: Over, name: str, ring: Ring, illegal: IllegalChain
) -> None:
    with every_device(name, ring, over=transport_name, queue_size=SMALL) as rig:
        queue = rig.prompt[0]
        illegal.offer(rig.driver.queues[queue])
        rig.driver.kick(queue)
        if illegal.outcome == "refused":
            rig.driver.mmio.wait_needs_reset()
            wait_for(lambda: len(refusals(rig)) > 0)  # it is told of after the status bit is set
        rig.assert_alive(restart=True)
        if illegal.outcome == "refused":
            assert len(refusals(rig)) == 1


@pytest.mark.parametrize(("name", "ring", "legal"), legal_params(NAMES))
def test_every_lawful_arrangement_comes_back(
    transport_name: Over, name: str, ring: Ring, legal: LegalChain
) -> None:
    with every_device(name, ring, over=transport_name, queue_size=SMALL) as rig:
        for queue in rig.prompt:
            chain = legal.offer(rig.driver.queues[queue])
            rig.driver.kick(queue)
            used = rig.driver.mmio.wait_used(queue, chain)
            assert used.written <= sum(legal.writable)
        assert not rig.driver.needs_reset, rig.driver.log


# --- when the driver may and may not be served ----------------------------------------------------


@each
@each_device
def test_row11_nothing_is_consumed_before_driver_ok(
    transport_name: Over, name: str, ring: Ring
) -> None:
    with every_device(name, ring, over=transport_name, start=False) as rig:
        mmio = rig.driver.mmio
        mmio.negotiate()
        mmio.setup_queues()
        for queue in rig.prompt:
            rig.submit(queue)
        before = memory_of(rig)
        for queue in range(len(mmio.queues)):
            mmio.kick(queue)
        assert workers_of(rig) == []
        assert memory_of(rig) == before and rig.driver.irq.count == 0
        mmio.add_status(DRIVER_OK)
        for queue in rig.prompt:
            mmio.wait_used(queue)


@each
@each_device
def test_row12_after_a_reset_nothing_moves(transport_name: Over, name: str, ring: Ring) -> None:
    with every_device(name, ring, over=transport_name, queue_size=SMALL) as rig:
        for _ in range(2):
            for queue in rig.prompt:
                rig.submit(queue)
        queues = rig.driver.queues
        rig.driver.mmio.write(STATUS, 0)
        assert rig.driver.mmio.read(STATUS) == 0
        assert workers_of(rig) == []
        before, interrupts = memory_of(rig), rig.driver.irq.count
        for index in range(len(queues)):
            rig.driver.kick(index)
        assert memory_of(rig) == before
        assert (rig.driver.irq.count, rig.driver.mmio.acknowledge()) == (interrupts, 0)
        rig.assert_alive(restart=True)


@pytest.mark.mmio_only
@each
@each_device
def test_row18_a_queue_that_is_not_ready_is_left_alone(
    transport_name: Over, name: str, ring: Ring
) -> None:
    with every_device(name, ring, over=transport_name, queue_size=SMALL) as rig:
        stopped, *others = rig.prompt
        rig.driver.mmio.write(QUEUE_SEL, stopped)
        rig.driver.mmio.write(QUEUE_READY, 0)
        assert rig.driver.mmio.read(QUEUE_READY) == 0
        rig.submit(stopped)
        queue = rig.driver.queues[stopped]
        before = ring_of(rig, queue)
        rig.driver.kick(stopped)
        rig.driver.mmio.write(STATUS, 0)  # by now everything has ended
        assert ring_of(rig, queue) == before
        rig.driver.restart()
        for queue in others:
            rig.serves(queue)


@each
@each_device
def test_row19_a_queue_that_there_is_not(transport_name: Over, name: str, ring: Ring) -> None:
    with every_device(name, ring, over=transport_name) as rig:
        for index in (len(rig.device.queue_sizes), 0xFFFF, 0xFFFF_FFFF):
            rig.driver.mmio.write(QUEUE_NOTIFY, index)
        rig.assert_alive()


@each
@each_device
def test_row21_kicks_without_a_reason_are_no_interrupts(
    transport_name: Over, name: str, ring: Ring
) -> None:
    with every_device(name, ring, over=transport_name) as rig:
        for _ in range(300):
            for queue in range(len(rig.driver.queues)):
                rig.driver.kick(queue)
        rig.driver.mmio.write(STATUS, 0)  # by now everything has ended
        assert rig.driver.irq.count == 0
        rig.assert_alive(restart=True)


@each
@each_device
def test_row25_the_ring_goes_round(transport_name: Over, name: str, ring: Ring) -> None:
    """A packed one many times; the indices of a split one are followed by tests of the queue."""
    with every_device(name, ring, over=transport_name, queue_size=SMALL) as rig:
        for _ in range(3 * SMALL + 1):
            for queue in rig.prompt:
                rig.serves(queue)


@each
@each_device
def test_row36_more_than_the_ring_holds(transport_name: Over, name: str, ring: Ring) -> None:
    """As many chains as there is room for, several times over: each comes back once."""
    with every_device(name, ring, over=transport_name, queue_size=SMALL) as rig:
        for queue in rig.prompt:
            mock = rig.driver.queues[queue]
            for _ in range(3):
                chains = []
                while mock.room >= 4:
                    chains.append(rig.submit(queue))
                rig.driver.kick(queue)
                for chain in chains:
                    rig.driver.mmio.wait_used(queue, chain)  # type: ignore[arg-type]
                assert not mock.outstanding and not mock.has_used()


@each
@each_device
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event idx"])
def test_row38_who_wants_no_interrupts_gets_none(
    transport_name: Over, name: str, ring: Ring, event_idx: bool
) -> None:
    with every_device(
        name, ring, over=transport_name, queue_size=SMALL, without=0 if event_idx else F_EVENT_IDX
    ) as rig:
        [queue, *_] = rig.prompt
        mock = rig.driver.queues[queue]
        mock.want_interrupts = False
        mock.disable_interrupts()
        before = rig.driver.irq.count
        for _ in range(SMALL + 1):
            rig.serves(queue)
        rig.driver.mmio.acknowledge()
        assert rig.driver.irq.count == before
        mock.want_interrupts = True
        mock.enable_interrupts()
        rig.submit(queue)
        rig.driver.mmio.wait_interrupt(before + 1)
        assert rig.driver.mmio.acknowledge() & USED_BUFFER


# --- one queue alone: 2.6.1 Virtqueue Reset -------------------------------------------------------


@each_device
def test_every_ring_feature_is_offered(name: str) -> None:
    with every_device(name, "split") as rig:
        assert rig.driver.features & RING_FEATURES == RING_FEATURES
    with every_device(name, "packed") as rig:
        assert rig.driver.features & F_RING_PACKED


@each
@each_device
def test_each_queue_can_be_reset_and_goes_on_elsewhere(
    transport_name: Over, name: str, ring: Ring
) -> None:
    with every_device(name, ring, over=transport_name) as rig:
        mmio = rig.driver.mmio
        assert rig.driver.features & F_RING_RESET
        for index, largest in enumerate(rig.device.queue_sizes):
            for size in (SMALL, 4, largest):
                mmio.reset_queue(index, size)
                for queue in rig.prompt:
                    rig.serves(queue)
        rig.assert_alive()


@each
@each_device
def test_a_reset_queue_gives_nothing_back(transport_name: Over, name: str, ring: Ring) -> None:
    """Neither what it had taken nor what waited in its ring, now or later."""
    with every_device(name, ring, over=transport_name, queue_size=SMALL) as rig:
        mmio = rig.driver.mmio
        for index in range(len(rig.device.queue_sizes)):
            if index not in rig.prompt:  # these wait for the host
                for _ in range(2):
                    mmio.submit(index, [bytes(10)], [4096])
            else:
                rig.serves(index)
            mmio.write(QUEUE_SEL, index)
            old = mmio.queues[index]
            mmio.reset_queue(index)
            before = ring_of(rig, old)
            if index in rig.prompt:
                rig.serves(index)
            assert ring_of(rig, old) == before
        rig.assert_alive()


@each
@each_device
def test_a_queue_that_was_never_enabled_can_be_reset_and_used(
    transport_name: Over, name: str, ring: Ring
) -> None:
    with every_device(name, ring, over=transport_name, start=False) as rig:
        mmio = rig.driver.mmio
        late = rig.prompt[0]
        sizes = [0 if index == late else size for index, size in enumerate(rig.device.queue_sizes)]
        mmio.start(queue_sizes=sizes)
        mmio.reset_queue(late, SMALL)
        rig.serves(late)
        rig.assert_alive()


@each
@each_device
def test_a_queue_is_reset_while_the_others_are_busy(
    transport_name: Over, name: str, ring: Ring
) -> None:
    with every_device(name, ring, over=transport_name, queue_size=SMALL) as rig:
        mmio = rig.driver.mmio
        reset, *busy = rig.prompt
        for _ in range(20):
            chains = [(queue, rig.submit(queue)) for queue in busy]
            rig.submit(reset)
            mmio.reset_queue(reset)
            for queue, chain in chains:
                mmio.wait_used(queue, chain)  # type: ignore[arg-type]
            rig.serves(reset)
        rig.assert_alive()
