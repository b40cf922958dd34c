"""The named chains: the lawful ones reach a device whole, the others do what they say.

The device is an echo on the real transport; which rings there are depends on what it offers.
"""

from __future__ import annotations

import pytest
from rings import ALL_FEATURES, RINGS, for_each_ring

from pyvmm.memory import GuestMemory
from pyvmm.testing import (
    Arena,
    DriverTimeout,
    MockPackedDriver,
    MockSplitDriver,
    Used,
    attached,
    illegal_chains,
    legal_chains,
    placements,
)
from pyvmm.testing import mmio_driver as mmio_module
from pyvmm.testing.mmio_driver import SAFETY_TIMEOUT
from pyvmm.virtio.features import VIRTIO_F_RING_RESET, mask
from pyvmm.virtio.worker import QueueDevice


class Echo(QueueDevice):
    """Answers with what it reads, cut or filled up with zeros to what fits."""

    name, device_type, queue_sizes = "echo", 42, (16, 8)
    features = ALL_FEATURES

    def serve(self, queue):
        for chain in queue:
            data = chain.reader().read(min(chain.readable_size, 1 << 16))
            writer = chain.writer()
            writer.write(data[: writer.available].ljust(min(writer.available, 1 << 16), b"\0"))
            queue.add_used(chain, writer.written)


@pytest.fixture(params=RINGS)
def echo(request):
    with attached(Echo(), ring=request.param) as driver:
        yield driver


@pytest.mark.parametrize("ring, legal", for_each_ring(legal_chains))
def test_a_lawful_chain_is_served_whole(ring, legal):
    with attached(Echo(), ring=ring) as driver:
        queue = driver.queues[0]
        chain = legal.offer(queue)
        driver.kick()
        used = driver.mmio.wait_used(0, chain)
        room = sum(legal.writable)
        assert used == Used(chain.head, room)
        assert queue.contents(chain) == legal.content[:room].ljust(room, b"\0")
        assert not driver.needs_reset and driver.log == []


@pytest.mark.parametrize(
    "ring, illegal", for_each_ring(lambda ring: illegal_chains(ring, "refused"))
)
def test_a_refused_chain_needs_a_reset_and_changes_nothing(ring, illegal):
    with attached(Echo(), ring=ring) as driver:
        queue = driver.queues[0]
        illegal.offer(queue)
        before = driver.memory.read(0, 1 << 20)
        driver.kick()
        driver.mmio.wait_needs_reset()
        after = bytearray(driver.memory.read(0, 1 << 20))
        changed = {place for place in range(len(before)) if before[place] != after[place]}
        assert changed <= allowed_to_change(queue, illegal)
        [line] = driver.log
        assert line.startswith("echo: needs a reset: ")
        driver.restart()
        assert driver.request([b"again"], [5]).data == b"again"


def allowed_to_change(queue, illegal):
    own = set(range(queue.device_addr, queue.device_addr + (6 + 8 * queue.size)))
    if illegal.name == "same head twice":  # the first time is good
        own |= set(range(queue.memory.regions[0].guest_addr, queue.arena.next))
    return own


@pytest.mark.parametrize(
    "ring, illegal", for_each_ring(lambda ring: illegal_chains(ring, "contained"))
)
def test_a_contained_chain_does_not_keep_the_device_from_its_next_life(ring, illegal):
    with attached(Echo(), ring=ring) as driver:
        illegal.offer(driver.queues[0])
        driver.kick()
        driver.restart()
        assert driver.request([b"again"], [5]).data == b"again"


@pytest.mark.parametrize("ring, bad", for_each_ring(placements))
def test_a_bad_placement(ring, bad):
    with attached(Echo(), ring=ring, start=False) as driver:
        driver.mmio.negotiate()
        queue = {"split": MockSplitDriver, "packed": MockPackedDriver}[ring](driver.memory, 8)
        enabled = driver.mmio.place_queue(0, 8, *bad.addresses(queue))
        if bad.outcome == "refused":
            assert not enabled
            assert any("not enabled" in line for line in driver.log)


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_names_are_unique_and_say_their_section(ring):
    for values in (legal_chains(ring), illegal_chains(ring), placements(ring)):
        assert len({str(value) for value in values}) == len(values) > 0
    assert all(illegal.section.startswith("2.") for illegal in illegal_chains(ring))


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_all_of_them_fit_a_small_ring_of_their_kind(ring):
    """The packed ones too, whatever devices there are: that they can be written at all."""
    make = {"split": MockSplitDriver, "packed": MockPackedDriver}[ring]
    for value in (*legal_chains(ring), *illegal_chains(ring)):
        memory = GuestMemory([(0, 1 << 20)])
        queue = make(memory, 8, arena=Arena(memory, 0x1000))
        before = memory.read(0x1000, 16 * 8 + 22)
        value.offer(queue)
        assert memory.read(0x1000, 16 * 8 + 22) != before, value
        memory.close()


def test_chains_of_one_ring_are_not_put_into_the_other():
    memory = GuestMemory([(0, 1 << 20)])
    packed = MockPackedDriver(memory, 8)
    only_split = [chain for chain in illegal_chains("split") if "packed" not in chain.rings]
    for illegal in only_split:
        if illegal.name in ("table in table", "more than 2^32 bytes"):
            continue  # can be written, but mean something else there
        with pytest.raises(TypeError):
            illegal.offer(packed)
    memory.close()


# --- attached ------------------------------------------------------------------------------------


def test_a_request_in_one_line(echo):
    answer = echo.request([b"to and ", b"fro"], [4, 10], indirect=True)
    assert answer.data == answer.buffers == b"to and fro\0\0\0\0"
    assert answer.written == 14
    assert echo.request([b"x"], [1], queue=1).data == b"x"
    chain = echo.mmio.submit(0, [b"y"], [1])
    assert echo.irq.wait(1, SAFETY_TIMEOUT)  # now at the latest, as nobody looks
    echo.mmio.wait_used(0, chain)
    assert echo.config(0, 2) == b"\0\0"
    assert echo.features >> 32 & 1


def test_a_device_that_fails_is_told_at_once(monkeypatch):
    class Broken(Echo):
        def serve(self, queue):
            for _ in queue:
                raise ZeroDivisionError

    monkeypatch.setattr(mmio_module, "SAFETY_TIMEOUT", 3600.0)
    with attached(Broken()) as driver:
        with pytest.raises(DriverTimeout, match=r"(?s)needs a reset.*status 0x4f"):
            driver.request([b"x"], [1])
        assert driver.needs_reset
        assert "needs a reset" in driver.log[0]


def test_features_and_queue_sizes_are_the_callers():
    with attached(Echo(), features=1 << 32, queue_sizes=[4]) as driver:
        assert driver.features == 1 << 32
        assert [queue.size for queue in driver.queues] == [4]
        assert not driver.queues[0].event_idx


def test_a_ring_that_is_not_offered_is_said():
    class Plain(Echo):
        features = 0

    with pytest.raises(AssertionError, match="RING_PACKED"), attached(Plain(), ring="packed"):
        pass


def test_in_order_in_a_split_ring():
    memory = GuestMemory([(0, 1 << 20)])
    queue = MockSplitDriver(memory, 4, arena=Arena(memory, 0x1000), in_order=True)
    chains = [queue.add([], [size]) for size in (5, 6, 7)]
    queue.publish()
    # 2.7.9: one element for two buffers, at the place of the first; the index moves by two
    memory.write(0x1050, bytes.fromhex("0000 0200 01000000 02000000"))
    assert [queue.pop_used() for _ in range(3)] == [Used(0, 5), Used(1, 2), None]
    # descriptors are taken in ring order
    assert queue.add([], [1, 1]).descriptors == [3, 0]
    memory.write(0x1050 + 4 + 16, bytes.fromhex("02000000 07000000"))
    memory.write(0x1052, b"\3\0")
    assert queue.pop_used() == Used(chains[2].head, 7)
    memory.close()


def test_interrupts_of_a_split_driver_in_bytes():
    memory = GuestMemory([(0, 1 << 20)])
    for event_idx, off, on in ((False, "0100", "0000"), (True, "ffff", "0000")):
        queue = MockSplitDriver(memory, 4, arena=Arena(memory, 0x1000), event_idx=event_idx)
        at = 0x1040 if not event_idx else 0x1040 + 12
        queue.disable_interrupts()
        assert memory.read(at, 2).hex() == off
        queue.enable_interrupts()
        assert memory.read(at, 2).hex() == on
    queue.interrupt_after(3)
    assert memory.read(0x104C, 2) == b"\2\0"
    assert queue.device_wants_kicks
    memory.close()


@pytest.mark.parametrize("ring", RINGS)
def test_one_queue_is_reset_and_goes_on_in_other_memory(ring):
    class Resettable(Echo):
        features = ALL_FEATURES | mask(VIRTIO_F_RING_RESET)

    with attached(Resettable(), ring=ring) as driver:
        for number in range(3):
            driver.request([b"x"], [1], queue=1)
            before = driver.queues[0]
            driver.request([b"x"], [1])
            after = driver.mmio.reset_queue(0, 4 if number else None)
            assert after is driver.queues[0] and after.desc_addr != before.desc_addr
            assert after.size == (4 if number else 16)
            assert driver.request([b"again"], [5]).data == b"again"
            assert driver.request([b"other"], [5], queue=1).data == b"other"
