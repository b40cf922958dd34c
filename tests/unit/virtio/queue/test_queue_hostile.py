"""Split and packed virtqueues with a driver that breaks the rules; row numbers are those of the
table of bad input that docs/robustness.md has.

`ring` is a queue of either layout, from several places of its ring on. What only one layout has is
tested with `split` or `packed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from queue_rig import HOLE_END, RAM, Rig

from pyvmm.errors import DriverError, GuestMemoryError
from pyvmm.testing import Desc, Element, PackedDesc
from pyvmm.testing.packed_driver import AVAIL, USED, EventSuppression
from pyvmm.testing.ring import INDIRECT, NEXT, WRITE, Chain
from pyvmm.virtio.queue import packed as packed_queue
from pyvmm.virtio.queue import split as split_queue
from pyvmm.virtio.queue.state import QueueConfig

SIZE = 8
DATA = 0x8000  # RAM that nothing else uses
TABLE = 0x9000
WRAP = 1 << 15
RAM_END = HOLE_END + 0x10000

SPLIT = {"split": ("split", None), "split, indices come round": ("split", 65536 - 2)}
PACKED = {
    "packed, first round": ("packed", WRAP),
    "packed, second round": ("packed", 0),
    "packed, near the end": ("packed", WRAP | 6),
}
Start = tuple[str, int | None]


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    """Makes rigs that begin at a `Start`, and closes them."""
    rigs: list[Rig] = []

    def make(begin: Start, size: int = SIZE, **options: bool) -> Rig:
        layout, start = begin
        rigs.append(Rig(size, layout=layout, start=start, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture(params=[*SPLIT.values(), *PACKED.values()], ids=[*SPLIT, *PACKED])
def begin(request: pytest.FixtureRequest) -> Start:
    return request.param


@pytest.fixture
def ring(begin: Start, make: Callable[..., Rig]) -> Rig:
    return make(begin)


@pytest.fixture(params=SPLIT.values(), ids=[*SPLIT])
def split(request: pytest.FixtureRequest, make: Callable[..., Rig]) -> Rig:
    return make(request.param)


@pytest.fixture(params=PACKED.values(), ids=[*PACKED])
def packed(request: pytest.FixtureRequest, make: Callable[..., Rig]) -> Rig:
    return make(request.param)


def refused(rig: Rig, *sections: str) -> None:
    """The next pop fails, says why, changes no memory, consumes nothing, and fails again.

    `sections`: what the error refers to in a split ring, and in a packed one.
    """
    section = sections[-1] if rig.packed else sections[0]
    before, state = rig.snapshot(), rig.queue.state()
    for _ in range(2):
        with pytest.raises(DriverError) as caught:
            rig.queue.pop()
        assert caught.value.section.startswith(section)
        assert "\n" not in str(caught.value)
    assert rig.snapshot() == before
    assert rig.queue.state() == state


def refused_for_want_of_room(rig: Rig) -> None:
    state = rig.queue.state()
    with pytest.raises(DriverError, match="free"):
        rig.queue.pop()
    assert rig.queue.state() == state


def offer(rig: Rig, *elements: Element) -> Chain:
    """Make a chain available. Each element refers to the one behind it, the last to the first."""
    chain = rig.driver.add_elements(elements)
    rig.driver.publish()
    return chain


def offer_head(rig: Rig, head: int) -> None:
    """Make one writable byte available under this head or id, whether or not it is free."""
    if rig.packed:
        rig.driver.add_raw([PackedDesc(DATA, 1, WRITE, head)])
    else:
        if head < SIZE:
            rig.driver.write_desc(head, Desc(DATA, 1, WRITE))
        rig.driver.offer(head)
    rig.driver.publish()


def offer_split(rig: Rig, *descs: Desc) -> None:
    rig.driver.add_raw(descs)
    rig.driver.publish()


def offer_packed(rig: Rig, *descs: PackedDesc) -> list[int]:
    places = rig.driver.add_raw(descs)
    rig.driver.publish()
    return places


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 257, 512, 0x10008, 65536, 1 << 32, -8])
def test_row14_sizes_that_are_refused(ring, size):
    ring.config.size = size
    with pytest.raises(DriverError, match="from 1 to 256"):
        ring.built()


@pytest.mark.parametrize("size", [3, 6, 7, 12, 100, 255])
def test_row14_a_split_queues_size_is_a_power_of_two(split, size):
    split.config.size = size
    with pytest.raises(DriverError):
        split.built()


@pytest.mark.parametrize("size", [1, 3, 7, 100, 255, 256])
def test_row14_a_packed_queues_size_need_not_be_a_power_of_two(packed, size):
    packed.config.size = size
    assert packed.built().size == size


@pytest.mark.parametrize("size", [32769, 65536])
def test_row14_no_size_exceeds_32768(ring, size):
    config = QueueConfig(65536, size, 0, 0x4000, 0x8000)
    with pytest.raises(DriverError):
        config.validate(ring.memory, packed=ring.packed)


@pytest.mark.parametrize(
    "part, step", [("desc_addr", 8), ("avail_addr", 1), ("used_addr", 2), ("used_addr", 1)]
)
def test_row16_a_misaligned_part_is_refused(ring, part, step):
    setattr(ring.config, part, getattr(ring.config, part) + step)
    with pytest.raises(DriverError, match="aligned"):
        ring.built()


def test_row16_the_driver_area_of_a_packed_queue_is_aligned_to_4(packed):
    packed.config.avail_addr += 2
    with pytest.raises(DriverError, match="aligned"):
        packed.built()


@pytest.mark.parametrize("part", ["desc_addr", "avail_addr", "used_addr"])
@pytest.mark.parametrize("addr", [2**64 - 16, RAM, HOLE_END - 16, RAM_END, 2**64, 2**63], ids=hex)
def test_row17_a_part_outside_ram_is_refused(ring, part, addr):
    setattr(ring.config, part, addr)
    before = ring.snapshot()
    with pytest.raises(GuestMemoryError):
        ring.built()
    assert ring.snapshot() == before


@pytest.mark.parametrize("addr", [RAM - 16, RAM_END - 16], ids=hex)
def test_row17_descriptors_that_end_outside_ram_are_refused(ring, addr):
    ring.config.desc_addr = addr
    before = ring.snapshot()
    with pytest.raises(GuestMemoryError):
        ring.built()
    assert ring.snapshot() == before


@pytest.mark.parametrize("part", ["avail_addr", "used_addr"])
@pytest.mark.parametrize("addr", [RAM - 16, RAM_END - 16], ids=hex)
def test_row17_a_ring_that_ends_outside_ram_is_refused(split, part, addr):
    """A packed queue's other parts have 4 bytes, aligned: they lie in RAM or do not."""
    setattr(split.config, part, addr)
    before = split.snapshot()
    with pytest.raises(GuestMemoryError):
        split.built()
    assert split.snapshot() == before


def test_row17_parts_may_end_where_ram_ends(ring):
    ring.config.desc_addr = RAM - 16 * SIZE
    ring.config.avail_addr = RAM_END - (4 if ring.packed else 6 + 2 * SIZE)
    ring.config.used_addr = HOLE_END
    assert ring.built().pop() is None


def test_cve_2026_5747_the_size_cannot_be_changed_under_a_live_queue(ring):
    ring.config.size = 256
    ring.config.desc_addr = RAM - 16
    offer_head(ring, 200)
    refused(ring, "2.7.5", "2.8.21")
    assert ring.queue.size == SIZE


# --- more than there is room for, and what was taken back ----------------------------------------


@pytest.mark.parametrize("jump", [9, 10, 0x7FFF, 0x8000])
def test_row23_the_index_jumps_by_more_than_the_size(split, jump):
    split.driver.avail_idx = (split.driver.avail_idx + jump) & 0xFFFF
    refused(split, "2.7.6.1")


def test_row23_seen_while_asking_for_kicks(split):
    split.driver.avail_idx = (split.driver.avail_idx + 9) & 0xFFFF
    with pytest.raises(DriverError):
        split.queue.enable_notification()


def test_row23_more_than_the_ring_holds_bit_by_bit(split):
    """Each step is lawful by itself, as long as one looks at the last index only."""
    for _ in range(8):
        split.driver.add_raw([Desc(DATA, 1, WRITE)])
    split.driver.publish()
    split.queue.pop()
    split.queue.step_back()  # the device waits for something else
    assert split.queue.enable_notification() is True
    split.driver.avail_idx = (split.driver.avail_idx + 1) & 0xFFFF
    with pytest.raises(DriverError):
        split.queue.enable_notification()


@pytest.mark.parametrize("restored", [False, True])
def test_row23_a_chain_that_runs_over_what_the_device_holds(packed, restored):
    """More made available than the ring has room for."""
    assert packed.queue.pop() is None
    for ident in range(7):
        offer_head(packed, ident)
    assert len(list(packed.queue)) == 7
    if restored:
        packed.queue = packed.restored(packed.queue.state())
    # One entry is left, and this takes two: the second is the first chain's.
    offer_packed(packed, PackedDesc(DATA, 1, NEXT), PackedDesc(DATA, 1, WRITE, 7))
    refused_for_want_of_room(packed)


def test_row23_a_whole_round_more_than_there_is_room_for(packed):
    for ident in range(8):
        offer_head(packed, ident)
    assert len(list(packed.queue)) == 8
    offer_head(packed, 0)
    refused_for_want_of_room(packed)


def test_row23_a_table_where_there_is_no_room(packed):
    offer_packed(packed, *[PackedDesc(DATA, 1, WRITE | NEXT)] * 7, PackedDesc(DATA, 1, WRITE))
    assert len(packed.queue.pop().writable) == 8
    packed.driver.write_table(TABLE, [PackedDesc(DATA, 1, WRITE)])
    offer_packed(packed, PackedDesc(TABLE, 16, INDIRECT, 5))
    refused_for_want_of_room(packed)


def test_row23_the_room_is_what_was_given_back_and_no_more(packed):
    for _ in range(2):
        offer_head(packed, 0)
        packed.serve()
        packed.queue.publish_used()
    offer_head(packed, 1)
    assert packed.queue.pop() is not None
    offer_packed(packed, *[PackedDesc(DATA, 1, WRITE | NEXT)] * 7, PackedDesc(DATA, 1, WRITE))
    with pytest.raises(DriverError, match="longer than the 7 descriptors that are free"):
        packed.queue.pop()


@pytest.mark.parametrize("start", [0, 5])
def test_row24_the_index_is_decremented(make, start):
    rig = make(("split", start))
    rig.driver.avail_idx = (start - 1) & 0xFFFF
    with pytest.raises(DriverError, match="index"):
        rig.queue.pop()


def test_row24_the_index_is_decremented_to_a_chain_that_still_waits(split):
    first = split.driver.avail_idx
    for head in range(5):
        offer_head(split, head)
    assert split.queue.pop() is not None  # has seen five, leaves four
    split.driver.avail_idx = last = (first + 3) & 0xFFFF
    with pytest.raises(DriverError, match=f"index went from {(first + 5) & 0xFFFF} to {last}"):
        split.queue.enable_notification()


def test_row24_what_was_made_available_is_taken_back(packed):
    [place] = offer_packed(packed, PackedDesc(DATA, 1, WRITE, 0))
    assert packed.queue.enable_notification() is True
    packed.driver.write_desc(place, PackedDesc(DATA, 1, WRITE, 0))
    packed.driver.write_desc(place, PackedDesc(DATA, 1, WRITE | AVAIL | USED, 0))
    refused(packed, "2.8.16")


def test_row24_of_several_chains_the_next_one_is_taken_back(packed):
    places = [offer_packed(packed, PackedDesc(DATA, 1, WRITE, ident))[0] for ident in range(3)]
    assert packed.queue.enable_notification() is True
    assert packed.queue.pop() is not None
    packed.driver.write_desc(places[1], PackedDesc(DATA, 1, WRITE, 1))
    packed.driver.write_desc(places[1], PackedDesc(DATA, 1, WRITE | AVAIL | USED, 1))
    with pytest.raises(DriverError, match="taken back"):
        packed.queue.pop()


def test_row24_a_stepped_back_chain_is_taken_back(packed):
    [place] = offer_packed(packed, PackedDesc(DATA, 1, WRITE, 0))
    packed.queue.pop()
    packed.queue.step_back()
    packed.driver.write_desc(place, PackedDesc(DATA, 1, WRITE, 0))
    refused(packed, "2.8.16")


# --- heads and ids -------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [8, 9, 0x7FFF, 0xFFFF])
def test_row26_a_head_that_the_queue_has_no_room_for(ring, head):
    offer_head(ring, head)
    refused(ring, "2.7.5", "2.8.21.1")


@pytest.mark.parametrize("flags", [AVAIL | USED, AVAIL, USED])
def test_only_descriptors_of_this_round_are_available(make, flags):
    rig = make(("packed", WRAP))
    rig.driver.write_desc(0, PackedDesc(DATA, 1, flags, 0))
    assert (rig.queue.pop() is not None) is (flags == AVAIL)


def test_row36_the_same_head_twice_is_completed_once(ring):
    offer_head(ring, 3)
    offer_head(ring, 3)
    taken = ring.queue.pop()
    with pytest.raises(DriverError, match="again"):
        ring.queue.pop()
    ring.queue.add_used(taken, 1)
    with pytest.raises(DriverError, match="again"):
        ring.queue.pop()  # not while the first is not published
    ring.queue.publish_used()
    assert [used.head for used in ring.all_used()] == [3]


def test_row36_a_head_may_come_again_once_it_was_used(ring):
    for _ in range(20):
        offer_head(ring, 5)
        assert ring.serve(1) == 1
        ring.queue.publish_used()
        assert len(ring.all_used()) == 1


def test_unbounded_requests_in_flight_are_impossible(ring):
    """CVE-2016-5403: a driver that never waits for anything is stopped at the queue's size."""
    taken = 0
    with pytest.raises(DriverError):
        for turn in range(20):
            offer_head(ring, turn % 8)
            taken += ring.queue.pop() is not None
    assert taken == 8


# --- chains --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [NEXT, NEXT | WRITE])
@pytest.mark.parametrize("length", [0, 4])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_row27_a_chain_without_an_end(ring, count, length, flags):
    """A loop in a split ring; in a packed one a list whose rest was not made available, or one of
    the whole ring."""
    offer(ring, *[Element(DATA, length, flags)] * count)
    refused(ring, "2.7.5.3.1", "2.8.17")


@pytest.mark.parametrize("following", [8, 9, 0xFFFF])
def test_row27_next_past_the_table(split, following):
    offer_split(split, Desc(DATA, 4, NEXT, following))
    refused(split, "2.7.5.2")


def test_row27_a_loop_in_an_indirect_table(split):
    split.driver.write_table(TABLE, [Desc(DATA, 4, NEXT, 1), Desc(DATA, 4, NEXT, 0)])
    offer(split, Element(TABLE, 32, INDIRECT))
    refused(split, "2.7.5.3.1")


def test_row28_more_than_4_gib_in_all(ring):
    offer(ring, Element(DATA, 2**32 - 1, NEXT), Element(DATA, 2, WRITE))
    refused(ring, "2.7.5.2", "2.8.17")


@pytest.mark.parametrize("huge", [0, 1, 2])
def test_row28_in_a_chain_of_the_usual_shape(ring, huge):
    """Of three descriptors, which are read at one go."""
    lengths = [2 if place != huge else 2**32 - 1 for place in range(3)]
    offer(
        ring,
        Element(DATA, lengths[0], NEXT),
        Element(DATA, lengths[1], WRITE | NEXT),
        Element(DATA, lengths[2], WRITE),
    )
    refused(ring, "2.7.5.2", "2.8.17")


def test_row28_more_than_4_gib_in_a_table(ring):
    table = ring.driver.make_table([Element(DATA, 2**32 - 1), Element(DATA, 2, WRITE)])
    offer(ring, Element(table, 32, INDIRECT))
    refused(ring, "2.7.5.2", "2.8.17")


def test_row28_exactly_4_gib_is_a_chain(ring):
    offer(ring, Element(DATA, 2**32 - 1, NEXT), Element(DATA, 1, WRITE))
    chain = ring.queue.pop()
    assert chain.readable_size + chain.writable_size == 2**32


def test_row28_exactly_4_gib_in_a_table_are_a_chain(ring):
    table = ring.driver.make_table([Element(DATA, 2**32 - 1), Element(DATA, 1, WRITE)])
    offer(ring, Element(table, 32, INDIRECT))
    chain = ring.queue.pop()
    assert chain.readable_size + chain.writable_size == 2**32


@pytest.mark.parametrize("addr", [2**64 - 1, RAM, RAM - 2, HOLE_END - 2])
def test_row29_a_chain_with_a_buffer_outside_ram_is_returned_all_the_same(ring, addr):
    given = offer(ring, Element(addr, 4, NEXT), Element(DATA, 1, WRITE))
    chain = ring.queue.pop()
    with pytest.raises(GuestMemoryError):
        chain.reader().read(4)
    chain.writer().write(b"\1")
    ring.queue.add_used(chain, 1)
    ring.queue.publish_used()
    assert ring.driver.pop_used() == (given.head, 1)
    assert ring.driver.pop_used() is None


def test_row30_empty_descriptors_do_not_hang(ring):
    offer(ring, Element(DATA, 0, NEXT), Element(0, 0, NEXT), Element(DATA, 0, WRITE))
    chain = ring.queue.pop()
    assert (chain.readable_size, chain.writable_size) == (0, 0)
    assert chain.slots == (3 if ring.packed else 1)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_row30_an_empty_part_of_the_usual_shape_is_left_out(ring, empty):
    lengths = [4 if place != empty else 0 for place in range(3)]
    flags = [NEXT, WRITE | NEXT, WRITE]
    offer(ring, *(Element(DATA, lengths[n], flags[n]) for n in range(3)))
    chain = ring.queue.pop()
    assert chain.readable == [(DATA, 4)][: lengths[0]]
    assert chain.writable == [(DATA, 4)] * (2 if empty == 0 else 1)


def test_a_chain_of_another_order_than_its_descriptors(split):
    """The second one looks like the next of the first, and is none of this chain's."""
    offer_split(
        split,
        Desc(DATA, 1, NEXT, 2),
        Desc(DATA + 16, 1, WRITE | NEXT, 2),
        Desc(DATA + 32, 1, WRITE),
    )
    chain = split.queue.pop()
    assert (chain.readable, chain.writable) == ([(DATA, 1)], [(DATA + 32, 1)])


@pytest.mark.parametrize("length", [0, 4])
def test_row34_readable_after_writable(ring, length):
    offer(ring, Element(DATA, length, WRITE | NEXT), Element(DATA, length))
    refused(ring, "2.7.4.2", "2.8.17")


def test_flag_bits_without_a_meaning_are_ignored(ring):
    reserved = 0xFFFF & ~(INDIRECT | NEXT | WRITE | (AVAIL | USED if ring.packed else 0))
    offer(ring, Element(DATA, 4, reserved | NEXT), Element(DATA, 6, reserved | WRITE))
    chain = ring.queue.pop()
    assert (chain.readable_size, chain.writable_size) == (4, 6)


def test_next_without_the_flag_is_ignored(split):
    offer_split(split, Desc(DATA, 4, 0, 0xFFFF))
    assert split.queue.pop().readable_size == 4


# --- indirect tables -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3])
def test_row31_indirect_without_negotiation(begin, make, length):
    rig = make(begin, indirect=False)
    parts = [Element(DATA, 4), Element(DATA, 4, WRITE), Element(DATA, 4, WRITE)]
    table = rig.driver.make_table(parts[-length:])
    offer(rig, Element(table, 16 * length, INDIRECT))
    refused(rig, "2.7.5.3.1", "2.8.19")


def test_row31_a_table_in_a_table(split):
    split.driver.write_table(TABLE, [Desc(TABLE, 16, INDIRECT)])
    offer(split, Element(TABLE, 16, INDIRECT))
    refused(split, "2.7.5.3.1")


def test_row31_a_table_in_a_packed_table_is_a_buffer_like_any_other(packed):
    """2.8.7: of the flags in a table only WRITE means something, others the device ignores."""
    packed.driver.write_table(
        TABLE, [PackedDesc(DATA, 16, INDIRECT), PackedDesc(DATA, 4, WRITE | NEXT)]
    )
    offer(packed, Element(TABLE, 32, INDIRECT))
    chain = packed.queue.pop()
    assert chain.readable == [(DATA, 16)]
    assert chain.writable == [(DATA, 4)]


def test_row31_indirect_with_next(ring):
    table = ring.driver.make_table([Element(DATA, 4)])
    offer(ring, Element(table, 16, INDIRECT | NEXT), Element(DATA, 4))
    refused(ring, "2.7.5.3.1", "2.8.19")


@pytest.mark.parametrize("length", [0, 1, 15, 17, 2**32 - 1])
def test_row32_a_table_that_is_not_made_of_descriptors(ring, length):
    offer(ring, Element(TABLE, length, INDIRECT))
    refused(ring, "2.7.5.3.1", "2.8.19")


@pytest.mark.parametrize("addr", [RAM, RAM - 16, HOLE_END - 16, 2**64 - 16])
def test_row32_a_table_outside_ram(ring, addr):
    offer(ring, Element(addr, 32, INDIRECT))
    refused(ring, "2.7.5")


def test_row32_next_past_the_indirect_table(split):
    split.driver.write_table(TABLE, [Desc(DATA, 4, NEXT, 1), Desc(DATA, 4)])
    offer(split, Element(TABLE, 16, INDIRECT))
    refused(split, "2.7.5.2")


@pytest.mark.parametrize("entries", [9, 1000])
def test_row32_a_chain_longer_than_the_queue(ring, entries):
    table = ring.driver.make_table([Element(DATA, 1)] * entries)
    offer(ring, Element(table, 16 * entries, INDIRECT))
    refused(ring, "2.7.5.3.1", "2.8.19")


@pytest.mark.parametrize("direct", [1, 7])
def test_row32_a_chain_longer_than_the_queue_that_ends_in_a_table(split, direct):
    entries = 9 - direct
    table = split.driver.make_table([Element(DATA, 1)] * entries)
    offer(split, *[Element(DATA, 1, NEXT)] * direct, Element(table, 16 * entries, INDIRECT))
    refused(split, "2.7.5.3.1")


def test_row32_a_table_as_large_as_ram(packed):
    """All of a packed ring's table is the chain."""
    offer(packed, Element(0, 16 * 0xFFFF, INDIRECT))
    refused(packed, "2.8.19")


def test_row33_write_on_the_indirect_pointer_means_nothing(ring):
    table = ring.driver.make_table([Element(DATA, 4), Element(DATA, 6, WRITE)])
    offer(ring, Element(table, 32, INDIRECT | WRITE))
    chain = ring.queue.pop()
    assert (chain.readable_size, chain.writable_size) == (4, 6)


@pytest.mark.parametrize("direct", [1, 2, 6])
def test_row33_a_direct_chain_may_end_in_a_table_in_a_split_ring_alone(ring, direct):
    """2.8.19 forbids it in a packed ring."""
    table = ring.driver.make_table([Element(DATA, 2), Element(DATA, 1, WRITE)])
    offer(ring, *[Element(DATA, 1, NEXT)] * direct, Element(table, 32, INDIRECT))
    if ring.packed:
        refused(ring, "2.8.19")
    else:
        chain = ring.queue.pop()
        assert (chain.readable_size, chain.writable_size) == (direct + 2, 1)


def test_row34_across_the_start_of_an_indirect_table(split):
    table = split.driver.make_table([Element(DATA, 4)])
    offer(split, Element(DATA, 4, WRITE | NEXT), Element(table, 16, INDIRECT))
    refused(split, "2.7.4.2")


def test_row34_readable_after_writable_in_a_table(ring):
    table = ring.driver.make_table([Element(DATA, 1, WRITE), Element(DATA, 1)])
    offer(ring, Element(table, 32, INDIRECT))
    refused(ring, "2.7.4.2", "2.8.17")


# --- descriptors that change while the device looks ----------------------------------------------


def spoil(rig: Rig, place: int) -> None:
    """Overwrite a descriptor with one that the device would refuse."""
    desc = PackedDesc if rig.packed else Desc
    rig.driver.write_desc(place, desc(2**64 - 1, 2**32 - 1, 0xFFFF, 0xFFFF))


def test_row37_a_descriptor_rewritten_after_it_was_taken_changes_nothing(ring):
    given = ring.driver.add([b"safe"], [4])
    ring.driver.publish()
    chain = ring.queue.pop()
    for place in given.descriptors:
        spoil(ring, place)
    assert chain.reader().read(4) == b"safe"
    chain.writer().write(b"done")
    assert ring.driver.contents(given) == b"done"
    ring.queue.add_used(chain, 4)
    ring.queue.publish_used()
    assert ring.driver.pop_used() == (given.head, 4)


def test_row37_each_descriptor_is_read_once(ring, monkeypatch):
    """A driver that rewrites a descriptor right after the device's read never splits its fields."""
    module = packed_queue if ring.packed else split_queue
    reads = []
    unpack = module._unpack_desc

    def read(table, offset):
        reads.append(offset // 16)
        fields = unpack(table, offset)
        spoil(ring, offset // 16)
        return fields

    monkeypatch.setattr(module, "_unpack_desc", read)
    given = offer(
        ring,
        Element(DATA, 4, NEXT),
        Element(DATA + 8, 5, NEXT | WRITE),
        Element(DATA, 1, WRITE),
    )
    chain = ring.queue.pop()
    assert reads == given.descriptors
    assert chain.head == given.head
    assert chain.readable == [(DATA, 4)]
    assert chain.writable == [(DATA + 8, 5), (DATA, 1)]


def test_row37_flags_that_change_between_the_first_look_and_the_copy(packed, monkeypatch):
    unpack = packed_queue._unpack_desc
    [place] = offer_packed(packed, PackedDesc(DATA, 4, WRITE, 4))

    def spy(ring, offset):
        packed.driver.write_desc(place, PackedDesc(DATA, 4, 0, 4))
        packed.driver.write_desc(place, PackedDesc(DATA, 4, AVAIL | USED, 4))
        return unpack(ring, offset)

    monkeypatch.setattr(packed_queue, "_unpack_desc", spy)
    with pytest.raises(DriverError, match="not available"):
        packed.queue.pop()


# --- event suppression ---------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 0xFFFC, 0xFFFF])
@pytest.mark.parametrize("offset, wrap", [(0, 0), (7, 1), (8, 0), (0x7FFF, 1)])
@pytest.mark.parametrize("event_idx", [False, True])
def test_row38_any_event_suppression_is_survived(make, flags, offset, wrap, event_idx):
    rig = make(("packed", WRAP), event_idx=event_idx)
    rig.driver.want_interrupts = False
    rig.driver.driver_event = EventSuppression(offset, wrap, flags)
    for ident in range(8):
        offer_head(rig, ident)
    assert rig.serve(1) == 8
    notify = rig.queue.publish_used()
    if not event_idx or flags & 3 != 2:
        assert notify is (flags & 3 != 1)
