"""The packed virtqueue with a driver that breaks the rules; row numbers are those of the table of
bad input that docs/robustness.md has, with what a packed ring has in that place."""

from __future__ import annotations

import pytest
from queue_rig import HOLE_END, RAM, PackedRig

from pyvmm.errors import DriverError, GuestMemoryError
from pyvmm.testing import PackedDesc as Desc
from pyvmm.testing.packed_driver import AVAIL, USED, EventSuppression
from pyvmm.testing.ring import INDIRECT, NEXT, WRITE
from pyvmm.virtio.queue.packed import PackedQueue
from pyvmm.virtio.queue.state import QueueConfig

DATA = 0x8000  # RAM that nothing else uses
TABLE = 0x9000
WRAP = 1 << 15


@pytest.fixture(params=[WRAP, 0, WRAP | 6], ids=["first round", "second round", "near the end"])
def rig(request):
    rig = PackedRig(8, start=request.param)
    yield rig
    rig.close()


def refused(rig: PackedRig, section: str) -> None:
    """The next pop fails, says why, changes no memory, consumes nothing, and fails again."""
    before, state = rig.snapshot(), rig.queue.state()
    for _ in range(2):
        with pytest.raises(DriverError) as caught:
            rig.queue.pop()
        assert caught.value.section.startswith(section)
        assert "\n" not in str(caught.value)
    assert rig.snapshot() == before
    assert rig.queue.state() == state


def offer(rig: PackedRig, *descs: Desc) -> list[int]:
    places = rig.driver.add_raw(descs)
    rig.driver.publish()
    return places


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 257, 512, 0x10008, 65536, 1 << 32, -8])
def test_row14_sizes_that_are_refused(rig, size):
    rig.config.size = size
    with pytest.raises(DriverError, match="from 1 to 256"):
        rig.built()


@pytest.mark.parametrize("size", [1, 3, 7, 100, 255, 256])
def test_row14_sizes_need_not_be_powers_of_two(rig, size):
    rig.config.size = size
    assert rig.built().size == size


def test_row14_no_size_exceeds_32768(rig):
    with pytest.raises(DriverError):
        QueueConfig(65536, 32769, 0, 0x4000, 0x8000).validate(rig.memory, packed=True)


@pytest.mark.parametrize(
    "part, step", [("desc_addr", 8), ("avail_addr", 2), ("avail_addr", 1), ("used_addr", 2)]
)
def test_row16_a_misaligned_part_is_refused(rig, part, step):
    setattr(rig.config, part, getattr(rig.config, part) + step)
    with pytest.raises(DriverError, match="aligned"):
        rig.built()


@pytest.mark.parametrize("part", ["desc_addr", "avail_addr", "used_addr"])
@pytest.mark.parametrize(
    "addr", [2**64 - 16, RAM, HOLE_END - 16, HOLE_END + 0x10000, 2**64, 2**63], ids=hex
)
def test_row17_a_part_that_does_not_lie_in_one_region_is_refused(rig, part, addr):
    setattr(rig.config, part, addr)
    before = rig.snapshot()
    with pytest.raises(GuestMemoryError):
        rig.built()
    assert rig.snapshot() == before


def test_row17_parts_may_end_where_ram_ends(rig):
    config = QueueConfig(8, 8, RAM - 128, HOLE_END + 0x10000 - 4, HOLE_END)
    assert PackedQueue(rig.memory, config, 0, 0, rig.kick).pop() is None


def test_cve_2026_5747_the_size_cannot_be_changed_under_a_live_queue(rig):
    rig.config.size = 256
    offer(rig, Desc(DATA, 4, WRITE, 200))
    refused(rig, "2.8.21")
    assert rig.queue.size == 8


# --- the ring ------------------------------------------------------------------------------------


def test_row23_a_chain_that_runs_over_what_the_device_holds(rig):
    """More made available than the ring has room for."""
    assert rig.queue.pop() is None
    for ident in range(7):
        offer(rig, Desc(DATA, 1, WRITE, ident))
    assert len(list(rig.queue)) == 7
    # One entry is left, and this takes two: the second is the first chain's.
    rig.driver.add_raw([Desc(DATA, 1, NEXT), Desc(DATA, 1, WRITE, 7)])
    rig.driver.publish()
    refused_with_chains_in_flight(rig)


def test_row23_a_whole_round_more_than_there_is_room_for(rig):
    for ident in range(8):
        offer(rig, Desc(DATA, 1, WRITE, ident))
    assert len(list(rig.queue)) == 8
    offer(rig, Desc(DATA, 1, WRITE, 0))
    refused_with_chains_in_flight(rig)


def test_row23_a_table_where_there_is_no_room(rig):
    offer(rig, *[Desc(DATA, 1, WRITE | NEXT)] * 7, Desc(DATA, 1, WRITE))
    assert len(rig.queue.pop().writable) == 8
    rig.driver.write_table(TABLE, [Desc(DATA, 1, WRITE)])
    offer(rig, Desc(TABLE, 16, INDIRECT, 5))
    refused_with_chains_in_flight(rig)


def test_row23_the_room_is_what_was_given_back_and_no_more(rig):
    for _ in range(2):
        offer(rig, Desc(DATA, 1, WRITE, 0))
        rig.serve()
        rig.queue.publish_used()
    offer(rig, Desc(DATA, 1, WRITE, 1))
    assert rig.queue.pop() is not None
    offer(rig, *[Desc(DATA, 1, WRITE | NEXT)] * 7, Desc(DATA, 1, WRITE))
    with pytest.raises(DriverError, match="longer than the 7 descriptors that are free"):
        rig.queue.pop()


def refused_with_chains_in_flight(rig: PackedRig) -> None:
    state = rig.queue.state()
    with pytest.raises(DriverError, match="free"):
        rig.queue.pop()
    assert rig.queue.state() == state


def test_row24_what_was_made_available_is_taken_back(rig):
    places = offer(rig, Desc(DATA, 1, WRITE, 0))
    assert rig.queue.enable_notification() is True
    rig.driver.write_desc(places[0], Desc(DATA, 1, WRITE, 0))
    rig.driver.write_desc(places[0], Desc(DATA, 1, WRITE | AVAIL | USED, 0))
    refused(rig, "2.8.16")


def test_row24_a_stepped_back_chain_is_taken_back(rig):
    places = offer(rig, Desc(DATA, 1, WRITE, 0))
    rig.queue.pop()
    rig.queue.step_back()
    rig.driver.write_desc(places[0], Desc(DATA, 1, WRITE, 0))
    refused(rig, "2.8.16")


@pytest.mark.parametrize("ident", [8, 9, 0x7FFF, 0xFFFF])
def test_row26_an_id_that_the_ring_has_no_room_for(rig, ident):
    offer(rig, Desc(DATA, 1, WRITE, ident))
    refused(rig, "2.8.21.1")


@pytest.mark.parametrize("flags", [AVAIL | USED, AVAIL, USED])
def test_only_descriptors_of_this_round_are_available(flags):
    rig = PackedRig(8)
    rig.driver.write_desc(0, Desc(DATA, 1, flags, 0))
    assert (rig.queue.pop() is not None) is (flags == AVAIL)
    rig.close()


def test_row36_the_same_id_twice_is_completed_once(rig):
    offer(rig, Desc(DATA, 4, WRITE, 3))
    offer(rig, Desc(DATA, 4, WRITE, 3))
    taken = rig.queue.pop()
    with pytest.raises(DriverError, match="again"):
        rig.queue.pop()
    rig.queue.add_used(taken, 4)
    with pytest.raises(DriverError, match="again"):
        rig.queue.pop()  # not while the first is not published
    rig.queue.publish_used()
    assert [used.head for used in rig.all_used()] == [3]


def test_row36_an_id_may_come_again_once_it_was_used(rig):
    for _ in range(20):
        offer(rig, Desc(DATA, 4, WRITE, 5))
        assert rig.serve(4) == 1
        rig.queue.publish_used()
        assert len(rig.all_used()) == 1


def test_unbounded_requests_in_flight_are_impossible(rig):
    """CVE-2016-5403: a driver that never waits for anything is stopped at the queue's size."""
    taken = 0
    with pytest.raises(DriverError):
        for turn in range(20):
            offer(rig, Desc(DATA, 1, WRITE, turn % 8))
            taken += rig.queue.pop() is not None
    assert taken == 8


# --- descriptors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 4])
def test_row27_a_list_without_an_end(rig, length):
    offer(rig, *[Desc(DATA, length, NEXT, 0)] * 8)
    refused(rig, "2.8.17")


def test_row27_a_list_whose_rest_is_not_available(rig):
    offer(rig, Desc(DATA, 4, NEXT, 0))
    refused(rig, "2.8.17")


def test_row28_more_than_4_gib_in_all(rig):
    offer(rig, Desc(DATA, 2**32 - 1, NEXT), Desc(DATA, 2, WRITE))
    refused(rig, "2.8.17")


def test_row28_more_than_4_gib_in_a_table(rig):
    rig.driver.write_table(TABLE, [Desc(DATA, 2**32 - 1), Desc(DATA, 2, WRITE)])
    offer(rig, Desc(TABLE, 32, INDIRECT))
    refused(rig, "2.8.17")


def test_row28_exactly_4_gib_is_a_chain(rig):
    offer(rig, Desc(DATA, 2**32 - 1, NEXT), Desc(DATA, 1, WRITE))
    chain = rig.queue.pop()
    assert chain.readable_size + chain.writable_size == 2**32


@pytest.mark.parametrize("addr", [2**64 - 1, RAM, RAM - 2, HOLE_END - 2])
def test_row29_a_chain_with_a_buffer_outside_ram_is_returned_all_the_same(rig, addr):
    offer(rig, Desc(addr, 4, NEXT), Desc(DATA, 1, WRITE, 2))
    chain = rig.queue.pop()
    with pytest.raises(GuestMemoryError):
        chain.reader().read(4)
    chain.writer().write(b"\1")
    rig.queue.add_used(chain, 1)
    rig.queue.publish_used()
    assert rig.driver.pop_used() == (2, 1)


def test_row30_empty_descriptors_do_not_hang(rig):
    offer(rig, Desc(DATA, 0, NEXT), Desc(0, 0, NEXT), Desc(DATA, 0, WRITE))
    chain = rig.queue.pop()
    assert (chain.readable_size, chain.writable_size, chain.slots) == (0, 0, 3)


def test_row31_indirect_without_negotiation():
    rig = PackedRig(indirect=False)
    rig.driver.write_table(TABLE, [Desc(DATA, 4)])
    offer(rig, Desc(TABLE, 16, INDIRECT))
    refused(rig, "2.8.19")
    rig.close()


def test_row31_a_table_in_a_table_is_a_buffer_like_any_other(rig):
    """2.8.7: of the flags in a table only WRITE means something, others the device ignores."""
    rig.driver.write_table(TABLE, [Desc(DATA, 16, INDIRECT), Desc(DATA, 4, WRITE | NEXT)])
    offer(rig, Desc(TABLE, 32, INDIRECT))
    chain = rig.queue.pop()
    assert chain.readable == [(DATA, 16)]
    assert chain.writable == [(DATA, 4)]


def test_row31_indirect_with_next(rig):
    rig.driver.write_table(TABLE, [Desc(DATA, 4)])
    offer(rig, Desc(TABLE, 16, INDIRECT | NEXT), Desc(DATA, 4))
    refused(rig, "2.8.19")


@pytest.mark.parametrize("length", [0, 1, 15, 17, 2**32 - 1])
def test_row32_a_table_that_is_not_made_of_descriptors(rig, length):
    offer(rig, Desc(TABLE, length, INDIRECT))
    refused(rig, "2.8.19")


@pytest.mark.parametrize("addr", [RAM, RAM - 16, HOLE_END - 16, 2**64 - 16])
def test_row32_a_table_outside_ram(rig, addr):
    offer(rig, Desc(addr, 32, INDIRECT))
    refused(rig, "2.7.5")


@pytest.mark.parametrize("entries", [9, 1000, 0xFFFF])
def test_row32_a_chain_longer_than_the_queue(rig, entries):
    offer(rig, Desc(0, 16 * min(entries, RAM // 16), INDIRECT))
    refused(rig, "2.8.19")


def test_row33_write_on_the_indirect_pointer_means_nothing(rig):
    rig.driver.write_table(TABLE, [Desc(DATA, 4), Desc(DATA, 6, WRITE)])
    offer(rig, Desc(TABLE, 32, INDIRECT | WRITE))
    chain = rig.queue.pop()
    assert (chain.readable_size, chain.writable_size) == (4, 6)


@pytest.mark.parametrize("direct", [1, 2, 6])
def test_row33_a_list_must_not_end_in_an_indirect_table(rig, direct):
    """Other than in a split ring: 2.8.19 forbids it."""
    rig.driver.write_table(TABLE, [Desc(DATA, 2)])
    offer(rig, *[Desc(DATA, 1, NEXT)] * direct, Desc(TABLE, 16, INDIRECT))
    refused(rig, "2.8.19")


@pytest.mark.parametrize("length", [0, 4])
def test_row34_readable_after_writable(rig, length):
    offer(rig, Desc(DATA, length, WRITE | NEXT), Desc(DATA, length))
    refused(rig, "2.8.17")


def test_row34_readable_after_writable_in_a_table(rig):
    rig.driver.write_table(TABLE, [Desc(DATA, 1, WRITE), Desc(DATA, 1)])
    offer(rig, Desc(TABLE, 32, INDIRECT))
    refused(rig, "2.8.17")


def test_flag_bits_without_a_meaning_are_ignored(rig):
    reserved = 0xFFFF & ~(AVAIL | USED | INDIRECT | NEXT | WRITE)
    offer(rig, Desc(DATA, 4, reserved | NEXT), Desc(DATA, 6, reserved | WRITE, 1))
    chain = rig.queue.pop()
    assert (chain.readable_size, chain.writable_size) == (4, 6)


def test_row37_a_descriptor_rewritten_after_it_was_taken_changes_nothing(rig):
    given = rig.driver.add([b"safe"], [4])
    rig.driver.publish()
    chain = rig.queue.pop()
    for place in given.descriptors:
        rig.driver.write_desc(place, Desc(2**64 - 1, 2**32 - 1, 0xFFFF, 0xFFFF))
    assert chain.reader().read(4) == b"safe"
    chain.writer().write(b"done")
    assert rig.driver.contents(given) == b"done"
    rig.queue.add_used(chain, 4)
    rig.queue.publish_used()
    assert rig.driver.pop_used() == (given.head, 4)


def test_row37_each_descriptor_is_read_once(rig, monkeypatch):
    """A driver that rewrites a descriptor right after the device's read never splits its fields."""
    from pyvmm.virtio.queue import packed as packed_queue

    reads = []
    unpack = packed_queue._unpack_desc

    def spy(ring, offset):
        reads.append(offset // 16)
        fields = unpack(ring, offset)
        rig.driver.write_desc(offset // 16, Desc(2**64 - 1, 2**32 - 1, 0xFFFF, 0xFFFF))
        return fields

    monkeypatch.setattr(packed_queue, "_unpack_desc", spy)
    places = offer(
        rig, Desc(DATA, 4, NEXT), Desc(DATA + 8, 5, NEXT | WRITE), Desc(DATA, 1, WRITE, 4)
    )
    chain = rig.queue.pop()
    assert reads == places
    assert chain.head == 4
    assert chain.readable == [(DATA, 4)]
    assert chain.writable == [(DATA + 8, 5), (DATA, 1)]


def test_row37_flags_that_change_between_the_first_look_and_the_copy(rig, monkeypatch):
    from pyvmm.virtio.queue import packed as packed_queue

    unpack = packed_queue._unpack_desc
    [place] = offer(rig, Desc(DATA, 4, WRITE, 4))

    def spy(ring, offset):
        rig.driver.write_desc(place, Desc(DATA, 4, 0, 4))
        rig.driver.write_desc(place, Desc(DATA, 4, AVAIL | USED, 4))
        return unpack(ring, offset)

    monkeypatch.setattr(packed_queue, "_unpack_desc", spy)
    with pytest.raises(DriverError, match="not available"):
        rig.queue.pop()


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 0xFFFC, 0xFFFF])
@pytest.mark.parametrize("offset, wrap", [(0, 0), (7, 1), (8, 0), (0x7FFF, 1)])
def test_row38_any_event_suppression_is_survived(flags, offset, wrap):
    for event_idx in (False, True):
        rig = PackedRig(8, event_idx=event_idx)
        rig.driver.want_interrupts = False
        rig.driver.driver_event = EventSuppression(offset, wrap, flags)
        for ident in range(8):
            offer(rig, Desc(DATA, 1, WRITE, ident))
        assert rig.serve(1) == 8
        notify = rig.queue.publish_used()
        if not event_idx or flags & 3 != 2:
            assert notify is (flags & 3 != 1)
        rig.close()
