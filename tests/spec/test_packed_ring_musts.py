"""Each MUST of virtio 1.3, 2.8 Packed Virtqueues, that binds the device: one test, named after its
section, with the sentence in short."""

from __future__ import annotations

from itertools import permutations

import pytest
from queue_rig import PackedRig, Rig

from pyvmm.testing import PackedDesc, Used
from pyvmm.testing.packed_driver import AVAIL, USED
from pyvmm.testing.ring import NEXT, WRITE

WRAP = 1 << 15
STARTS = [WRAP, 0, WRAP | 6]


@pytest.fixture(params=STARTS, ids=["wrap counter 1", "wrap counter 0", "near the end"])
def rig(request):
    rig = PackedRig(8, start=request.param)
    yield rig
    rig.close()


def ring(rig: PackedRig) -> list[PackedDesc]:
    return [rig.driver.read_desc(index) for index in range(rig.driver.size)]


def test_2_8_7_only_the_write_flag_counts_in_an_indirect_table(rig):
    """2.8.7 Indirect Flag: others are reserved and are ignored by the device."""
    rig.driver.write_table(
        0x9000, [PackedDesc(0x8000, 3, 0xFFFF & ~WRITE, 9), PackedDesc(0x8003, 4, 0xFFFF, 9)]
    )
    rig.driver.add_raw([PackedDesc(0x9000, 32, 4, 2)])
    rig.driver.publish()
    chain = rig.queue.pop()
    assert (chain.head, chain.readable, chain.writable) == (2, [(0x8000, 3)], [(0x8003, 4)])


def test_2_8_7_write_is_ignored_on_a_descriptor_that_refers_to_a_table(rig):
    """2.8.7 Indirect Flag: WRITE is reserved there and is ignored by the device."""
    rig.driver.write_table(0x9000, [PackedDesc(0x8000, 3)])
    rig.driver.add_raw([PackedDesc(0x9000, 16, 4 | WRITE, 2)])
    rig.driver.publish()
    assert rig.queue.pop().readable == [(0x8000, 3)]


def test_2_8_12_descriptors_are_processed_in_ring_order(rig):
    """2.8.12 Device Requirements: Virtqueues"""
    for _ in range(3):
        heads = [rig.driver.add([], [1], scrambled=True).head for _ in range(5)]
        rig.driver.publish()
        assert [chain.head for chain in rig.queue] == heads
        for head in heads:
            rig.queue.add_used(rig.queue.chain_in_flight(head), 1)
        rig.queue.publish_used()
        rig.all_used()


@pytest.mark.parametrize("order", [*permutations(range(3))], ids=str)
def test_2_8_12_descriptors_are_written_in_the_order_of_completion(rig, order):
    """2.8.12 Device Requirements: Virtqueues"""
    given = [rig.driver.add([b"r"] * (1 + n % 2), [9]) for n in range(3)]
    rig.driver.publish()
    taken = list(rig.queue)
    for place in order:
        rig.queue.add_used(taken[place], place)
    rig.queue.publish_used()
    assert rig.all_used() == [Used(given[place].head, place) for place in order]


def test_2_8_15_no_write_to_a_device_readable_buffer(rig):
    """2.8.15 Device Requirements: The Virtqueue Descriptor Table"""
    chain = rig.driver.add([b"read", b"only"], [8])
    rig.driver.publish()
    taken = rig.queue.pop()
    for view in taken.readable_views() + taken.reader().take(8):
        assert view.readonly
    taken.writer().write(b"written!")
    rig.queue.add_used(taken, 8)
    rig.queue.publish_used()
    assert b"".join(rig.memory.read(*part) for part in chain.readable) == b"readonly"


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("flags", [0, AVAIL, USED, AVAIL | USED])
def test_2_8_15_no_descriptor_is_used_whose_avail_bit_did_not_change(start, flags):
    """2.8.15 Device Requirements: The Virtqueue Descriptor Table"""
    rig = PackedRig(8, start=start)
    place = start % WRAP
    rig.driver.write_desc(place, PackedDesc(0x8000, 1, flags | WRITE, 0))
    before = ring(rig)
    taken = rig.queue.pop()
    assert (taken is not None) is (flags == (AVAIL if start & WRAP else USED))
    rig.queue.publish_used()
    assert ring(rig) == before
    rig.close()


def test_2_8_15_no_descriptor_changes_after_its_used_bit(rig):
    """2.8.15 Device Requirements: The Virtqueue Descriptor Table"""
    for _ in range(6):
        [place] = rig.driver.add([], [1]).descriptors
        rig.driver.add([], [1])
        rig.driver.publish()
        first, second = list(rig.queue)
        rig.queue.add_used(first, 1)
        rig.queue.publish_used()
        marked = rig.driver.read_desc(place)
        rig.queue.add_used(second, 1)
        rig.queue.publish_used()
        rig.queue.disable_notification()
        rig.queue.enable_notification()
        assert rig.driver.read_desc(place) == marked
        assert len(rig.all_used()) == 2


@pytest.mark.parametrize("length", [2, 5, 8])
def test_2_8_18_descriptors_of_a_list_are_used_in_their_order(rig, length):
    """2.8.18 Device Requirements: Scatter-Gather Support"""
    rig.memory.write(0x8000, bytes(range(length)))
    flags = [NEXT] * (length - 1) + [0]
    rig.driver.add_raw([PackedDesc(0x8000 + n, 1, flag, 3) for n, flag in enumerate(flags)])
    rig.driver.publish()
    assert rig.queue.pop().reader().read(length) == bytes(range(length))


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_6_2_in_order_buffers_are_used_in_the_order_in_which_they_became_available(layout):
    """6.2 Device Requirements: Reserved Feature Bits (VIRTIO_F_IN_ORDER)"""
    rig = Rig(8, layout=layout, in_order=True)
    heads = [rig.driver.add([], [4]).head for _ in range(4)]
    rig.driver.publish()
    taken = list(rig.queue)
    with pytest.raises(ValueError, match="out of order"):
        rig.queue.add_used(taken[1], 4)
    for chain in taken:
        rig.queue.add_used(chain, 4)
    rig.queue.publish_used()
    assert [used.head for used in rig.all_used()] == heads
    rig.close()
