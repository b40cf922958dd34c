"""Chains of the usual form, looked at and returned a batch at a time, over both rings: that is
nothing that a driver could tell from taking and returning them one by one."""

from __future__ import annotations

import random
import struct

import pytest
from queue_rig import HOLE_END, LAYOUTS, RAM, Rig

from pyvmm.errors import DriverError
from pyvmm.testing import Buffer, Desc, PackedDesc, Used
from pyvmm.testing.packed_driver import AVAIL, USED
from pyvmm.testing.ring import INDIRECT, NEXT, WRITE, Element
from pyvmm.virtio.blk.fast_path import serve_usual
from pyvmm.virtio.queue import packed as packed_layout
from pyvmm.virtio.queue import split as split_layout
from pyvmm.virtio.queue.ring import MAX_PEEKED

FIRST, LAST = 16, 1
HEAD, DATA, END = Buffer(0x8000, FIRST), Buffer(0x9000, 512), Buffer(0xA000, LAST)
PLENTY = 1 << 30
OUTSIDE = 0x7000_0000


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture
def make(layout):
    """Makes rigs with the layout at hand, and closes them."""
    rigs = []

    def make(size=16, **options):
        rigs.append(Rig(size, layout=layout, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make):
    return make()


def peek(rig, most=PLENTY):
    return rig.queue.peek_usual(FIRST, LAST, most)


def offer_read(rig, data=DATA, *, indirect=False):
    return rig.driver.add([HEAD], [data, END], indirect=indirect)


def offer_write(rig, data=DATA, *, indirect=False):
    return rig.driver.add([HEAD, data], [END], indirect=indirect)


@pytest.mark.parametrize("indirect", [False, True])
def test_reads_and_writes_are_told_apart(rig, indirect):
    offer_read(rig, indirect=indirect)
    offer_write(rig, indirect=indirect)
    rig.driver.publish()
    chains, more = peek(rig)
    assert not more
    assert [(len(a), len(b), len(c), size, write) for a, b, c, size, write in chains] == [
        (FIRST, 512, LAST, 512, False),
        (FIRST, 512, LAST, 512, True),
    ]
    (_, to_fill, status, *_), (header, to_read, *_) = chains
    to_fill[:], status[:] = b"d" * 512, b"s"
    assert rig.memory.read(DATA.addr, 512) == b"d" * 512
    assert rig.memory.read(END.addr, 1) == b"s"
    assert header.readonly and to_read.readonly


def test_looking_takes_nothing(rig):
    given = [offer_read(rig) for _ in range(3)]
    rig.driver.publish()
    before = rig.queue.state()
    assert len(peek(rig)[0]) == len(peek(rig)[0]) == 3
    assert rig.queue.state() == before
    rig.queue.use_peeked([])
    assert rig.queue.state() == before
    assert [chain.head for chain in rig.queue] == [chain.head for chain in given]


def test_what_was_not_returned_is_there_again(rig):
    given = [offer_read(rig) for _ in range(4)]
    rig.driver.publish()
    peek(rig)
    rig.queue.use_peeked([513, 1])
    rig.queue.publish_used()
    assert rig.all_used() == [Used(given[0].head, 513), Used(given[1].head, 1)]
    assert len(peek(rig)[0]) == 2
    assert rig.queue.pop().head == given[2].head


def test_nothing_is_returned_twice(rig):
    offer_read(rig)
    rig.driver.publish()
    peek(rig)
    rig.queue.use_peeked([1])
    rig.queue.use_peeked([1])
    rig.queue.publish_used()
    assert len(rig.all_used()) == 1


def test_the_end_of_the_bytes_and_of_the_number(make):
    rig = make(512)
    for _ in range(160):
        offer_read(rig)
    rig.driver.publish()
    chains, more = peek(rig, 1500)
    assert (len(chains), more) == (3, False)
    chains, more = peek(rig, 1)
    assert (len(chains), more) == (1, False)
    chains, more = peek(rig)
    assert (len(chains), more) == (MAX_PEEKED, False)


@pytest.mark.parametrize("start", [None, 1 << 15 | 7, 65533])
def test_all_places_of_the_ring(layout, start):
    """Around and around, also where a chain or an index goes over the end."""
    if layout == "packed" and start == 65533:
        start = 5  # in the round where the wrap counter is 0
    rig = Rig(8, layout=layout, start=start)
    for number in range(50):
        size = 512 * (1 + number % 3)
        given = offer_read(rig, Buffer(0x9000, size))
        rig.driver.publish()
        [(_, _, _, found, _)], more = peek(rig)
        assert (found, more) == (size, False)
        rig.queue.use_peeked([size + 1])
        rig.queue.publish_used()
        assert rig.all_used() == [Used(given.head, size + 1)]
    rig.close()


def test_row32_a_queue_of_two_has_no_chain_of_three(make):
    rig = make(2)
    offer_read(rig, indirect=True)
    rig.driver.publish()
    assert peek(rig) == ([], True)
    with pytest.raises(DriverError):
        rig.queue.pop()


def test_row28_parts_so_large_that_three_of_them_might_be_too_much(rig, monkeypatch):
    """RAM that holds them would have to be as large, so the limit is made small."""
    monkeypatch.setattr(packed_layout if rig.packed else split_layout, "LARGE_PART", 1024)
    offer_read(rig, Buffer(0x9000, 1023))
    offer_read(rig, Buffer(0x9000, 1024))
    rig.driver.publish()
    chains, more = peek(rig)
    assert (len(chains), more) == (1, True)


def test_in_order_queues_are_for_pop(make):
    rig = make(in_order=True)
    offer_read(rig)
    rig.driver.publish()
    assert peek(rig) == ([], True)
    assert rig.serve(513) == 1


UNUSUAL = {
    "two parts": ([HEAD], [END]),
    "four parts": ([HEAD], [DATA, DATA, END]),
    "all readable": ([HEAD, DATA, END], []),
    "all writable": ([], [HEAD, DATA, END]),
    "a long header": ([Buffer(0x8000, 17)], [DATA, END]),
    "a short header": ([Buffer(0x8000, 15)], [DATA, END]),
    "a long status": ([HEAD], [DATA, Buffer(0xA000, 2)]),
    "no data": ([HEAD], [Buffer(0x9000, 0), END]),
    "row 28: nearly 4 GiB": ([HEAD], [Buffer(0x9000, 0xFFFF_FFFF), END]),
    "row 29: header outside RAM": ([Buffer(OUTSIDE, FIRST)], [DATA, END]),
    "row 29: data outside RAM": ([HEAD], [Buffer(OUTSIDE, 512), END]),
    "row 29: data over the end of RAM": ([HEAD], [Buffer(RAM - 256, 512), END]),
    "row 29: data in the hole": ([HEAD, Buffer(HOLE_END - 512, 512)], [END]),
    "row 29: data wraps 2^64": ([HEAD], [Buffer(2**64 - 256, 512), END]),
    "row 29: status outside RAM": ([HEAD], [DATA, Buffer(OUTSIDE, LAST)]),
}


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("parts", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_another_form_ends_the_batch_and_is_for_pop(rig, parts, indirect):
    offer_read(rig)
    odd = rig.driver.add(*parts, indirect=indirect)
    offer_read(rig)
    rig.driver.publish()
    chains, more = peek(rig)
    assert (len(chains), more) == (1, True)
    rig.queue.use_peeked([1])
    assert peek(rig) == ([], True)
    if sum(part.length for part in [*parts[0], *parts[1]]) > 1 << 32:
        with pytest.raises(DriverError):
            rig.queue.pop()
    else:
        assert rig.queue.pop().head == odd.head
        assert len(peek(rig)[0]) == 1


def test_row31_an_indirect_chain_where_that_was_not_negotiated(make):
    rig = make(indirect=False)
    offer_read(rig, indirect=True)
    rig.driver.publish()
    assert peek(rig) == ([], True)
    with pytest.raises(DriverError):
        rig.queue.pop()


def test_row36_a_chain_that_is_in_flight_is_not_seen_again(rig):
    given = offer_read(rig)
    rig.driver.publish()
    assert rig.queue.pop() is not None
    offer_again(rig, given)
    assert peek(rig) == ([], True)
    with pytest.raises(DriverError):
        rig.queue.pop()


def test_row36_nor_one_that_was_returned_and_not_yet_published(rig):
    given = offer_read(rig)
    rig.driver.publish()
    peek(rig)
    rig.queue.use_peeked([1])
    offer_again(rig, given)
    assert peek(rig) == ([], True)
    with pytest.raises(DriverError):
        rig.queue.pop()


def test_row36_a_chain_twice_in_one_batch_is_carried_out_once(rig):
    given = offer_read(rig)
    rig.driver.publish()
    offer_again(rig, given)
    chains, more = peek(rig)
    assert len(chains) <= 1 and more
    rig.queue.use_peeked([1] * len(chains))
    if not chains:
        assert rig.queue.pop().head == given.head
    with pytest.raises(DriverError):
        rig.queue.pop()


def offer_again(rig, given):
    """Make the same chain available once more."""
    if rig.packed:
        # The same buffer id, in the next places of the ring.
        again = rig.driver.add([HEAD], [DATA, END])
        position = again.descriptors[-1]
        raw = bytearray(rig.memory.read(rig.driver.desc_addr + 16 * position, 16))
        raw[12:14] = given.head.to_bytes(2, "little")
        rig.memory.write(rig.driver.desc_addr + 16 * position, raw)
    else:
        rig.driver.offer(given.head)
    rig.driver.publish()


def test_a_queue_that_was_stopped_shows_and_returns_nothing(rig):
    offer_read(rig)
    rig.driver.publish()
    peek(rig)
    before = rig.snapshot()
    rig.queue.ready = False
    rig.queue.use_peeked([1])
    assert peek(rig) == ([], False)
    assert rig.snapshot() == before


def test_a_batch_can_be_taken_after_a_look_for_more(rig):
    """It makes no difference if asking for kicks has looked at the ring."""
    rig.queue.enable_notification()
    for _ in range(3):
        offer_read(rig)
    rig.driver.publish()
    assert rig.queue.enable_notification()
    chains, more = peek(rig)
    assert (len(chains), more) == (3, False)
    rig.queue.use_peeked([1, 1])
    rig.queue.publish_used()
    assert rig.queue.enable_notification()
    assert rig.queue.pop() is not None


def test_a_packed_batch_says_of_each_chain_whether_anything_was_written():
    """In either round of the ring (2.8.2: VIRTQ_DESC_F_WRITE of a used descriptor)."""
    rig = Rig(16, layout="packed")
    place = 0
    for _ in range(8):  # of six entries each: three times round
        for _ in range(2):
            offer_write(rig)
        rig.driver.publish()
        assert len(peek(rig)[0]) == 2
        rig.queue.use_peeked([0, 1])
        rig.queue.publish_used()
        for written in (0, 1):
            assert bool(rig.driver.read_desc(place % 16).flags & WRITE) == bool(written)
            place += 3
        assert [used.written for used in rig.all_used()] == [0, 1]
    rig.close()


def test_a_list_that_ends_in_its_middle_is_not_of_the_usual_form():
    """Though all the rest looks like it."""
    rig = Rig(16)
    rig.driver.add_raw(
        [
            Desc(HEAD.addr, FIRST, NEXT, 1),
            Desc(DATA.addr, 512, WRITE, 2),
            Desc(END.addr, LAST, WRITE),
        ]
    )
    rig.driver.publish()
    assert peek(rig) == ([], True)
    rig.close()


def test_views_are_made_anew_when_memory_changes(rig):
    offer_read(rig)
    rig.driver.publish()
    [(*before, _, _)], _ = peek(rig)
    rig.queue.remap()
    [(*after, _, _)], _ = peek(rig)
    assert len(before) == 3
    assert not any(old is new for old, new in zip(before, after, strict=True))


def test_row37_each_descriptor_is_read_once(rig, monkeypatch):
    """A driver that rewrites all of its descriptors right after the device has read some."""
    module = packed_layout if rig.packed else split_layout
    unpack, reads = module._unpack_three, []

    def spy(table, offset=0):
        fields = unpack(table, offset)
        reads.append(offset)
        rig.memory.write(rig.driver.desc_addr, b"\xff" * 48)
        return fields

    offer_read(rig)
    rig.driver.publish()
    monkeypatch.setattr(module, "_unpack_three", spy)
    [(header, data, status, size, is_write)], more = peek(rig)
    assert (reads, size, is_write, more) == ([0], 512, False, False)
    assert (len(header), len(data), len(status)) == (FIRST, 512, LAST)


@pytest.mark.parametrize("index", [17, 0x8000, 0xFFFF])
def test_rows_23_and_24_an_index_that_jumps(index):
    rig = Rig(16)
    rig.driver.avail_idx = index
    with pytest.raises(DriverError, match=r"2\.7\.6\.1"):
        peek(rig)
    rig.close()


def test_row27_a_list_whose_rest_is_not_available():
    rig = Rig(8, layout="packed")
    given = offer_read(rig)
    rig.driver.publish()
    second = given.descriptors[1]
    raw = rig.driver.read_desc(second)
    rig.driver.write_desc(second, raw._replace(flags=raw.flags ^ (AVAIL | USED)))
    assert peek(rig) == ([], True)
    with pytest.raises(DriverError, match="not available"):
        rig.queue.pop()
    rig.close()


def test_room_is_taken_and_given_back_by_the_batch():
    rig = Rig(8, layout="packed")
    for _ in range(3):
        offer_read(rig)
        rig.driver.publish()
        peek(rig)
        rig.queue.use_peeked([513])
        rig.queue.publish_used()
        assert len(rig.all_used()) == 1
    offer_read(rig)
    rig.driver.publish()
    peek(rig)
    rig.queue.use_peeked([513])  # and not published: these three are still the device's
    rig.driver.add_raw([PackedDesc(*DATA, NEXT | WRITE)] * 5 + [PackedDesc(*DATA, WRITE)])
    rig.driver.publish()
    with pytest.raises(DriverError, match="longer than the 5 descriptors that are free"):
        rig.queue.pop()
    rig.close()


def test_a_chain_that_was_seen_before_it_was_returned_is_gone(rig):
    """A chain that came while kicks were asked for, say."""
    offer_read(rig)
    rig.driver.publish()
    assert rig.queue.enable_notification() is True
    assert len(peek(rig)[0]) == 1
    rig.queue.use_peeked([513])
    rig.queue.publish_used()
    assert peek(rig) == ([], False)
    assert rig.queue.pop() is None
    assert rig.queue.enable_notification() is False


def test_a_stop_ends_the_batch_between_two_requests(rig):
    """Chains that were begun are answered; the others are still in the ring."""
    for sector in (0, 8, 16):  # not one after the other, so each by itself
        rig.driver.add([struct.pack("<LLQ", 0, 0, sector)], [Buffer(0x9000, 512), 1])
    rig.driver.publish()
    done = []

    def carry_out(type, sector, end, views):
        done.append(sector)
        rig.queue.halt = len(done) == 2
        return True

    assert serve_usual(rig.queue, PLENTY, carry_out) is True
    rig.queue.publish_used()
    assert done == [0, 8]
    assert len(rig.all_used()) == 2


def offer_raw(rig, ident):
    """A read in a packed ring, wherever that comes to lie."""
    flags = NEXT, NEXT | WRITE, WRITE
    rig.driver.add_raw(
        [
            PackedDesc(*part, flag, ident)
            for part, flag in zip((HEAD, DATA, END), flags, strict=True)
        ]
    )
    rig.driver.publish()


@pytest.mark.parametrize("ident", [8, 0x7FFF, 0xFFFF])
@pytest.mark.parametrize("indirect", [False, True])
def test_row26_an_id_that_cannot_be(ident, indirect):
    rig = Rig(8, layout="packed")
    if indirect:
        table = rig.driver.make_table([Element(*HEAD), Element(*DATA, WRITE), Element(*END, WRITE)])
        rig.driver.add_raw([PackedDesc(table, 48, INDIRECT, ident)])
        rig.driver.publish()
    else:
        offer_raw(rig, ident)
    assert peek(rig) == ([], True)
    with pytest.raises(DriverError, match=f"buffer id {ident}"):
        rig.queue.pop()
    rig.close()


def test_row26_a_head_that_cannot_be():
    rig = Rig(16)
    offer_read(rig)
    rig.driver.offer(16)
    rig.driver.publish()
    chains, more = peek(rig)
    assert more
    rig.queue.use_peeked([1] * len(chains))
    if not chains:
        rig.queue.pop()
    with pytest.raises(DriverError):
        rig.queue.pop()
    rig.close()


@pytest.mark.parametrize("seed", range(12))
def test_a_driver_cannot_tell_the_two_ways_apart(layout, seed):
    """The same random chains, served in batches and one by one: same heads, same lengths, in the
    same order, and the rings are the same bytes."""
    answers = []
    for batches in (False, True):
        chance = random.Random(seed)
        rig = Rig(32, layout=layout, event_idx=chance.random() < 0.5)
        found = []
        for _ in range(60):
            while rig.driver.room >= 4 and chance.random() < 0.85:
                parts = chance.choice([([HEAD], [DATA, END]), ([HEAD, DATA], [END]),
                                       ([HEAD], [DATA, END]), *UNUSUAL.values()])  # fmt: skip
                if sum(part.length for part in [*parts[0], *parts[1]]) < 1 << 31:
                    rig.driver.add(*parts, indirect=chance.random() < 0.5)
            rig.driver.publish()
            leave = chance.random() < 0.3
            serve_all(rig, batches=batches, most=3 if leave else 1000)
            found.append((rig.queue.publish_used(), rig.all_used()))
        answers.append((found, rig.memory.read(rig.driver.desc_addr, 16 * 32)))
        rig.close()
    assert answers[0] == answers[1]


def serve_all(rig, *, batches, most):
    """Serve about `most` chains; the length returned is what is writable."""
    while most > 0:
        if batches:
            chains, _ = peek(rig)
            chains = chains[:most]
            rig.queue.use_peeked([LAST if write else size + LAST for *_, size, write in chains])
            most -= len(chains)
            if chains:
                continue
        chain = rig.queue.pop()
        if chain is None:
            return
        rig.queue.add_used(chain, chain.writable_size)
        most -= 1


# --- packed rings only ----------------------------------------------------------------------------


@pytest.fixture
def packed():
    rig = Rig(8, layout="packed")
    yield rig
    rig.close()


def put(rig, slot, *, id=0, round=1, flags=(NEXT, NEXT | WRITE, WRITE)):
    """A usual read whose descriptors begin at `slot`, whatever lies there already."""
    for buffer, flag in zip((HEAD, DATA, END), flags, strict=True):
        mark = AVAIL if round else USED
        rig.driver.write_desc(slot, PackedDesc(buffer.addr, buffer.length, flag | mark, id))
        slot += 1
        if slot == 8:
            slot, round = 0, 1 - round


def test_row26_a_buffer_id_that_cannot_be(packed):
    put(packed, 0, id=8)
    assert peek(packed) == ([], True)
    with pytest.raises(DriverError):
        packed.queue.pop()


def test_a_driver_that_overwrites_what_is_in_flight_is_found_out(packed):
    put(packed, 0, id=0)
    put(packed, 3, id=1)
    assert packed.queue.pop() and packed.queue.pop()
    put(packed, 6, id=2)  # two entries are free, and this needs three
    assert peek(packed) == ([], True)
    with pytest.raises(DriverError):
        packed.queue.pop()


def test_entries_that_were_returned_count_as_free_once(packed):
    put(packed, 0, id=0)
    assert len(peek(packed)[0]) == 1
    packed.queue.use_peeked([1])
    packed.queue.publish_used()
    for slot in range(8):
        mark = AVAIL if slot >= 3 else USED
        packed.driver.write_desc(slot, PackedDesc(DATA.addr, 1, NEXT | mark))
    with pytest.raises(DriverError, match="than the 8 descriptors"):
        packed.queue.pop()


def test_a_chain_that_was_taken_back_is_for_pop_to_refuse(packed):
    packed.queue.enable_notification()
    put(packed, 0)
    assert packed.queue.enable_notification()
    put(packed, 0, round=0)
    assert peek(packed) == ([], True)
    with pytest.raises(DriverError):
        packed.queue.pop()


def test_what_was_seen_and_returned_is_not_missed_later(packed):
    packed.queue.enable_notification()
    put(packed, 0, id=0)
    put(packed, 3, id=1)
    assert packed.queue.enable_notification()
    peek(packed)
    packed.queue.use_peeked([1, 1])
    packed.queue.publish_used()
    assert packed.queue.pop() is None


def test_no_more_is_looked_at_than_the_ring_has_room_for():
    """Four of eight places are the device's already, and each chain takes three."""
    rig = Rig(8, layout="packed")
    for _ in range(4):
        rig.driver.add([], [1])
    rig.driver.publish()
    assert len(list(rig.queue)) == 4
    for ident in (4, 5):
        rig.driver.add_raw(
            [
                PackedDesc(*HEAD, NEXT),
                PackedDesc(*DATA, NEXT | WRITE),
                PackedDesc(*END, WRITE, ident),
            ]
        )
        rig.driver.publish()
    chains, more = peek(rig)
    assert (len(chains), more) == (1, True)
    rig.queue.use_peeked([513])
    with pytest.raises(DriverError, match="longer than the 1 descriptors that are free"):
        rig.queue.pop()
    rig.close()
