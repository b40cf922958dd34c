"""The split virtqueue with a driver that breaks the rules; row numbers are those of the table of
bad input that docs/robustness.md has."""

from __future__ import annotations

import pytest
from queue_rig import HOLE_END, RAM, Rig

from pyvmm.errors import DriverError, GuestMemoryError
from pyvmm.testing import Desc
from pyvmm.testing.mock_driver import INDIRECT, NEXT, WRITE
from pyvmm.virtio.queue.split import SplitQueue
from pyvmm.virtio.queue.state import QueueConfig

DATA = 0x8000  # RAM that nothing else uses
TABLE = 0x9000


@pytest.fixture
def rig():
    rig = Rig(size=8)
    yield rig
    rig.close()


def refused(rig: Rig, section: str) -> None:
    """The next pop fails, says why, changes no memory, consumes nothing, and fails again."""
    before = rig.snapshot()
    for _ in range(2):
        with pytest.raises(DriverError) as caught:
            rig.queue.pop()
        assert caught.value.section.startswith(section)
        assert "\n" not in str(caught.value)
    assert rig.snapshot() == before
    assert rig.queue.state().next_avail == 0
    assert rig.queue.state().in_flight == ()


def offer(rig: Rig, *descs: Desc) -> None:
    rig.driver.add_raw(descs)
    rig.driver.publish()


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, 6, 12, 512, 0x10008, 65536, 1 << 32, -8])
def test_row14_sizes_that_are_refused(rig, size):
    rig.config.size = size
    with pytest.raises(DriverError):
        SplitQueue(rig.memory, rig.config, 0, 0, rig.kick)


def test_row14_no_size_exceeds_32768(rig):
    config = QueueConfig(65536, 65536, 0, 0x4000, 0x8000)
    with pytest.raises(DriverError):
        config.validate(rig.memory)


@pytest.mark.parametrize(
    "part, step", [("desc_addr", 8), ("avail_addr", 1), ("used_addr", 2), ("used_addr", 1)]
)
def test_row16_a_misaligned_part_is_refused(rig, part, step):
    setattr(rig.config, part, getattr(rig.config, part) + step)
    with pytest.raises(DriverError, match="aligned"):
        SplitQueue(rig.memory, rig.config, 0, 0, rig.kick)


@pytest.mark.parametrize("part", ["desc_addr", "avail_addr", "used_addr"])
@pytest.mark.parametrize(
    "addr",
    [2**64 - 16, RAM, RAM - 16, HOLE_END - 16, HOLE_END + 0x10000 - 16, 2**64, 2**63],
    ids=["wraps", "hole", "straddles", "out of the hole", "end of RAM", "2^64", "2^63"],
)
def test_row17_a_part_that_does_not_lie_in_one_region_is_refused(rig, part, addr):
    setattr(rig.config, part, addr)
    before = rig.snapshot()
    with pytest.raises(GuestMemoryError):
        SplitQueue(rig.memory, rig.config, 0, 0, rig.kick)
    assert rig.snapshot() == before


def test_row17_parts_may_end_where_ram_ends(rig):
    config = QueueConfig(8, 8, RAM - 128, HOLE_END + 0x10000 - 22, HOLE_END)
    SplitQueue(rig.memory, config, 0, 0, rig.kick)


def test_cve_2026_5747_the_size_cannot_be_changed_under_a_live_queue(rig):
    rig.config.size = 256
    rig.config.desc_addr = RAM - 16
    rig.driver.offer(200)
    rig.driver.publish()
    refused(rig, "2.7.5")
    assert rig.queue.size == 8


# --- available ring ------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [9, 10, 0x7FFF, 0x8000])
def test_row23_the_index_jumps_by_more_than_the_size(rig, jump):
    rig.driver.avail_idx = jump
    refused(rig, "2.7.6.1")


def test_row23_seen_while_asking_for_kicks(rig):
    rig.driver.avail_idx = 9
    with pytest.raises(DriverError):
        rig.queue.enable_notification()


def test_row23_more_than_the_ring_holds_bit_by_bit(rig):
    """Each step is lawful by itself, as long as one looks at the last index only."""
    for _ in range(8):
        rig.driver.add_raw([Desc(DATA, 1, WRITE)])
    rig.driver.publish()
    rig.queue.pop()
    rig.queue.step_back()  # the device waits for something else
    assert rig.queue.enable_notification() is True
    rig.driver.avail_idx = 9
    with pytest.raises(DriverError):
        rig.queue.enable_notification()


@pytest.mark.parametrize("start", [0, 5])
def test_row24_the_index_is_decremented(start):
    rig = Rig(size=8, start=start)
    rig.driver.avail_idx = (start - 1) & 0xFFFF
    with pytest.raises(DriverError, match="index"):
        rig.queue.pop()
    rig.close()


def test_row24_the_index_is_decremented_to_a_chain_that_still_waits(rig):
    for head in range(5):
        rig.driver.write_desc(head, Desc(DATA, 1, WRITE))
        rig.driver.offer(head)
    rig.driver.publish()
    assert rig.queue.pop() is not None  # has seen five, leaves four
    rig.driver.avail_idx = 3
    with pytest.raises(DriverError, match="index went from 5 to 3"):
        rig.queue.enable_notification()


@pytest.mark.parametrize("head", [8, 9, 0x7FFF, 0xFFFF])
def test_row26_a_head_past_the_table(rig, head):
    rig.driver.offer(head)
    rig.driver.publish()
    refused(rig, "2.7.5")


def test_row36_the_same_head_twice_is_completed_once(rig):
    chain = rig.driver.add([], [4])
    rig.driver.offer(chain.head)
    rig.driver.publish()
    taken = rig.queue.pop()
    with pytest.raises(DriverError, match="again"):
        rig.queue.pop()
    rig.queue.add_used(taken, 4)
    rig.queue.publish_used()
    assert rig.driver.used_idx == 1


def test_row36_a_head_that_was_returned_but_not_published_is_still_in_flight(rig):
    chain = rig.driver.add([], [4])
    rig.driver.offer(chain.head)
    rig.driver.publish()
    rig.queue.add_used(rig.queue.pop(), 4)
    with pytest.raises(DriverError, match="again"):
        rig.queue.pop()
    rig.queue.publish_used()
    assert rig.driver.used_idx == 1


def test_row36_a_head_may_come_again_once_it_was_used(rig):
    for _ in range(3):
        rig.driver.add_raw([Desc(DATA, 4, WRITE)])
        rig.driver.publish()
        assert rig.serve(4) == 1
        rig.queue.publish_used()


def test_unbounded_requests_in_flight_are_impossible(rig):
    """CVE-2016-5403: a driver that never waits for anything is stopped at the queue's size."""
    taken = 0
    with pytest.raises(DriverError):
        for turn in range(20):
            rig.driver.write_desc(turn % 8, Desc(DATA, 1, WRITE))
            rig.driver.offer(turn % 8)
            rig.driver.publish()
            taken += rig.queue.pop() is not None
    assert taken == 8


# --- descriptors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("following", [8, 9, 0xFFFF])
def test_row27_next_past_the_table(rig, following):
    offer(rig, Desc(DATA, 4, NEXT, following))
    refused(rig, "2.7.5.2")


def test_row27_a_loop_of_one(rig):
    offer(rig, Desc(DATA, 4, NEXT, 0))
    refused(rig, "2.7.5.3.1")


@pytest.mark.parametrize("flags", [NEXT, NEXT | WRITE])
@pytest.mark.parametrize("length", [0, 4])
def test_row27_a_loop_of_two(rig, flags, length):
    offer(rig, Desc(DATA, length, flags, 1), Desc(DATA, length, flags, 0))
    refused(rig, "2.7.5.3.1")


def test_row27_a_loop_in_an_indirect_table(rig):
    rig.driver.write_table(TABLE, [Desc(DATA, 4, NEXT, 1), Desc(DATA, 4, NEXT, 0)])
    offer(rig, Desc(TABLE, 32, INDIRECT))
    refused(rig, "2.7.5.3.1")


def test_row28_more_than_4_gib_in_all(rig):
    offer(rig, Desc(DATA, 2**32 - 1, NEXT, 1), Desc(DATA, 2, WRITE))
    refused(rig, "2.7.5.2")


@pytest.mark.parametrize("huge", [0, 1, 2])
def test_row28_in_a_chain_of_the_usual_shape(rig, huge):
    """Of three descriptors, which are read at one go."""
    lengths = [2 if place != huge else 2**32 - 1 for place in range(3)]
    offer(
        rig,
        Desc(DATA, lengths[0], NEXT, 1),
        Desc(DATA, lengths[1], WRITE | NEXT, 2),
        Desc(DATA, lengths[2], WRITE),
    )
    refused(rig, "2.7.5.2")


def test_row28_exactly_4_gib_is_a_chain(rig):
    offer(rig, Desc(DATA, 2**32 - 1, NEXT, 1), Desc(DATA, 1, WRITE))
    chain = rig.queue.pop()
    assert chain.readable_size + chain.writable_size == 2**32


@pytest.mark.parametrize("addr", [2**64 - 1, RAM, RAM - 2, HOLE_END - 2])
def test_row29_a_chain_with_a_buffer_outside_ram_is_returned_all_the_same(rig, addr):
    offer(rig, Desc(addr, 4, NEXT, 1), Desc(DATA, 1, WRITE))
    chain = rig.queue.pop()
    chain.writer().write(b"\1")
    rig.queue.add_used(chain, 1)
    rig.queue.publish_used()
    assert rig.driver.used_idx == 1


def test_row30_empty_descriptors_do_not_hang(rig):
    offer(rig, Desc(DATA, 0, NEXT, 1), Desc(0, 0, NEXT, 2), Desc(DATA, 0, WRITE))
    chain = rig.queue.pop()
    assert (chain.readable_size, chain.writable_size) == (0, 0)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_row30_an_empty_part_of_the_usual_shape_is_left_out(rig, empty):
    lengths = [4 if place != empty else 0 for place in range(3)]
    flags = [NEXT, WRITE | NEXT, WRITE]
    offer(rig, *(Desc(DATA, lengths[n], flags[n], n + 1) for n in range(3)))
    chain = rig.queue.pop()
    assert chain.readable == [(DATA, 4)][: lengths[0]]
    assert chain.writable == [(DATA, 4)] * (2 if empty == 0 else 1)


def test_a_chain_of_another_order_than_its_descriptors(rig):
    """The second one looks like the next of the first, and is none of this chain's."""
    offer(
        rig,
        Desc(DATA, 1, NEXT, 2),
        Desc(DATA + 16, 1, WRITE | NEXT, 2),
        Desc(DATA + 32, 1, WRITE),
    )
    chain = rig.queue.pop()
    assert (chain.readable, chain.writable) == ([(DATA, 1)], [(DATA + 32, 1)])


@pytest.mark.parametrize("length", [1, 2, 3])
def test_row31_indirect_without_negotiation(length):
    rig = Rig(indirect=False)
    table = [Desc(DATA, 4, NEXT, 1), Desc(DATA, 4, WRITE | NEXT, 2), Desc(DATA, 4, WRITE)]
    rig.driver.write_table(TABLE, table[-length:] if length != 2 else table)
    offer(rig, Desc(TABLE, 16 * length, INDIRECT))
    refused(rig, "2.7.5.3.1")
    rig.close()


def test_row31_nested(rig):
    rig.driver.write_table(TABLE, [Desc(TABLE, 16, INDIRECT)])
    offer(rig, Desc(TABLE, 16, INDIRECT))
    refused(rig, "2.7.5.3.1")


def test_row31_indirect_with_next(rig):
    rig.driver.write_table(TABLE, [Desc(DATA, 4)])
    offer(rig, Desc(TABLE, 16, INDIRECT | NEXT, 1), Desc(DATA, 4))
    refused(rig, "2.7.5.3.1")


@pytest.mark.parametrize("length", [0, 1, 15, 17, 2**32 - 1])
def test_row32_a_table_that_is_not_made_of_descriptors(rig, length):
    offer(rig, Desc(TABLE, length, INDIRECT))
    refused(rig, "2.7.5.3.1")


@pytest.mark.parametrize("addr", [RAM, RAM - 16, HOLE_END - 16, 2**64 - 16])
def test_row32_a_table_outside_ram(rig, addr):
    offer(rig, Desc(addr, 32, INDIRECT))
    refused(rig, "2.7.5")


def test_row32_next_past_the_indirect_table(rig):
    rig.driver.write_table(TABLE, [Desc(DATA, 4, NEXT, 1), Desc(DATA, 4)])
    offer(rig, Desc(TABLE, 16, INDIRECT))
    refused(rig, "2.7.5.2")


@pytest.mark.parametrize("direct", [0, 1, 7])
def test_row32_a_chain_longer_than_the_queue(rig, direct):
    entries = 9 - direct
    rig.driver.write_table(TABLE, [Desc(DATA, 1, NEXT, i + 1) for i in range(entries)])
    rig.memory.write(TABLE + 16 * (entries - 1), Desc(DATA, 1).pack())
    prefix = [Desc(DATA, 1, NEXT, i + 1) for i in range(direct)]
    offer(rig, *prefix, Desc(TABLE, 16 * entries, INDIRECT))
    refused(rig, "2.7.5.3.1")


def test_row33_write_on_the_indirect_pointer_means_nothing(rig):
    rig.driver.write_table(TABLE, [Desc(DATA, 4, NEXT, 1), Desc(DATA, 6, WRITE)])
    offer(rig, Desc(TABLE, 32, INDIRECT | WRITE))
    chain = rig.queue.pop()
    assert (chain.readable_size, chain.writable_size) == (4, 6)


@pytest.mark.parametrize("direct", [1, 2, 6])
def test_row33_a_direct_chain_may_end_in_an_indirect_table(rig, direct):
    rig.driver.write_table(TABLE, [Desc(DATA, 2, NEXT, 1), Desc(DATA, 1, WRITE)])
    prefix = [Desc(DATA, 1, NEXT, i + 1) for i in range(direct)]
    offer(rig, *prefix, Desc(TABLE, 32, INDIRECT))
    chain = rig.queue.pop()
    assert (chain.readable_size, chain.writable_size) == (direct + 2, 1)


@pytest.mark.parametrize("length", [0, 4])
def test_row34_readable_after_writable(rig, length):
    offer(rig, Desc(DATA, length, WRITE | NEXT, 1), Desc(DATA, length))
    refused(rig, "2.7.4.2")


def test_row34_across_the_start_of_an_indirect_table(rig):
    rig.driver.write_table(TABLE, [Desc(DATA, 4)])
    offer(rig, Desc(DATA, 4, WRITE | NEXT, 1), Desc(TABLE, 16, INDIRECT))
    refused(rig, "2.7.4.2")


def test_flag_bits_without_a_meaning_are_ignored(rig):
    offer(rig, Desc(DATA, 4, 0xFFF8 | NEXT, 1), Desc(DATA, 6, 0xFFF8 | WRITE))
    chain = rig.queue.pop()
    assert (chain.readable_size, chain.writable_size) == (4, 6)


def test_next_without_the_flag_is_ignored(rig):
    offer(rig, Desc(DATA, 4, 0, 0xFFFF))
    assert rig.queue.pop().readable_size == 4


def test_row37_a_descriptor_rewritten_after_it_was_taken_changes_nothing(rig):
    given = rig.driver.add([b"safe"], [4])
    rig.driver.publish()
    chain = rig.queue.pop()
    for index in given.descriptors:
        rig.driver.write_desc(index, Desc(2**64 - 1, 2**32 - 1, WRITE | NEXT, 0xFFFF))
    assert chain.reader().read(4) == b"safe"
    chain.writer().write(b"done")
    assert rig.driver.contents(given) == b"done"


def test_row37_each_descriptor_is_read_once(rig, monkeypatch):
    """A driver that rewrites a descriptor right after the device's read never splits its fields."""
    from pyvmm.virtio.queue import split as split_queue

    reads = []

    unpack = split_queue._unpack_desc

    def read(table, offset):
        reads.append(offset)
        fields = unpack(table, offset)
        rig.driver.write_desc(offset // 16, Desc(2**64 - 1, 2**32 - 1, INDIRECT, 0xFFFF))
        return fields

    monkeypatch.setattr(split_queue, "_unpack_desc", read)
    offer(rig, Desc(DATA, 4, NEXT, 1), Desc(DATA + 8, 5, NEXT | WRITE, 2), Desc(DATA, 1, WRITE))
    chain = rig.queue.pop()
    assert reads == [0, 16, 32]
    assert chain.readable == [(DATA, 4)]
    assert chain.writable == [(DATA + 8, 5), (DATA, 1)]
