"""Reader and Writer: a chain's bytes, whatever pieces they come in."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from queue_rig import HOLE_END, RAM, Rig

from pyvmm.errors import DriverError, GuestMemoryError
from pyvmm.testing import Buffer
from pyvmm.virtio.queue.chain import MAX_VIEWS, DescriptorChain, RamWindow, Reader, Writer

HEADER = struct.Struct("<IIQ")


@pytest.fixture
def rig():
    rig = Rig(size=16)
    yield rig
    rig.close()


def chain_of(rig: Rig, readable=(), writable=()) -> DescriptorChain:
    rig.driver.add(readable, writable)
    rig.driver.publish()
    chain = rig.queue.pop()
    assert chain is not None
    return chain


def test_the_two_directions_and_their_sizes(rig):
    chain = chain_of(rig, [b"abc", b"defg"], [5, 1])
    assert (chain.readable_size, chain.writable_size) == (7, 6)
    assert [length for _, length in chain.readable] == [3, 4]
    assert [length for _, length in chain.writable] == [5, 1]
    assert [bytes(view) for view in chain.readable_views()] == [b"abc", b"defg"]
    chain.writable_views()[0][:] = b"hello"
    assert rig.memory.read(*chain.writable[0]) == b"hello"


def test_readable_memory_cannot_be_written_through_any_view(rig):
    chain = chain_of(rig, [b"constant", Buffer(HOLE_END, 8)])
    for view in (*chain.readable_views(), *Reader(chain).take(16)):
        with pytest.raises(TypeError):
            view[0] = 0


@given(st.lists(st.binary(max_size=5), max_size=6), st.lists(st.integers(0, 9), max_size=12))
def test_reads_of_any_lengths_see_the_bytes_in_order(pieces, reads):
    rig = Rig(size=16)
    chain = chain_of(rig, [*pieces, b"end"])
    reader, content = chain.reader(), b"".join([*pieces, b"end"])
    seen = b""
    for wanted in reads:
        assert reader.available == len(content) - len(seen)
        if wanted > reader.available:
            with pytest.raises(DriverError):
                reader.read(wanted)
        else:
            seen += reader.read(wanted)
    assert seen == content[: len(seen)]
    assert reader.read(reader.available) == content[len(seen) :]
    rig.close()


@given(st.lists(st.integers(0, 5), max_size=6), st.lists(st.binary(max_size=9), max_size=12))
def test_writes_of_any_lengths_land_in_order(pieces, writes):
    rig = Rig(size=16)
    given_chain = rig.driver.add([], [*pieces, 1])
    rig.driver.publish()
    writer = Writer(rig.queue.pop())
    expected = b""
    for data in writes:
        if len(data) <= writer.available:
            writer.write(data)
            expected += data
        assert writer.written == len(expected)
    content = rig.driver.contents(given_chain)
    assert content == expected.ljust(len(content), b"\0")
    rig.close()


def test_views_taken_join_up_across_descriptors(rig):
    chain = chain_of(rig, [b"0123", b"456789"])
    reader = chain.reader()
    reader.skip(2)
    views = reader.take(5)
    assert [bytes(view) for view in views] == [b"23", b"456"]
    assert reader.available == 3
    reader = chain.reader()
    assert [bytes(view) for size in (1, 3, 6) for view in reader.take(size)] == [
        b"0", b"123", b"456789",
    ]  # fmt: skip


def test_more_than_there_is_raises_and_moves_nothing(rig):
    chain = chain_of(rig, [b"abc"], [3])
    reader, writer = chain.reader(), chain.writer()
    with pytest.raises(DriverError):
        reader.take(4)
    with pytest.raises(DriverError):
        writer.write(b"four")
    with pytest.raises(DriverError):
        reader.skip(-1)
    assert reader.read(3) == b"abc"
    assert writer.written == 0


@pytest.mark.parametrize("cut", [1, 8, 15, 16])
def test_row35_a_header_is_unpacked_however_it_is_cut(rig, cut):
    header = HEADER.pack(1, 2, 3)
    chain = chain_of(rig, [header[:cut], header[cut:] + b"data"])
    reader = chain.reader()
    assert reader.unpack(HEADER) == (1, 2, 3)
    assert reader.read(reader.available) == b"data"


def test_a_header_past_the_hole_is_unpacked(rig):
    rig.memory.write(HOLE_END, HEADER.pack(7, 8, 9))
    reader = chain_of(rig, [Buffer(HOLE_END, 16)]).reader()
    assert reader.unpack(HEADER) == (7, 8, 9)


def test_a_header_is_missing(rig):
    with pytest.raises(DriverError):
        chain_of(rig, [b"short"]).reader().unpack(HEADER)
    with pytest.raises(DriverError):
        chain_of(rig, [], [1]).reader().unpack(HEADER)


@pytest.mark.parametrize("layout", [[4, 1], [5], [1, 1, 1, 1, 1], [4, 1, 0], [0, 5, 0, 0]], ids=str)
def test_row35_the_last_byte_is_found_in_any_layout(rig, layout):
    given_chain = rig.driver.add([], layout)
    rig.driver.publish()
    writer = rig.queue.pop().writer()
    writer.take_last_byte()[0] = 0x55
    assert (writer.available, writer.written) == (4, 0)
    writer.write(b"data")
    assert (writer.available, writer.written) == (0, 4)
    assert rig.driver.contents(given_chain) == b"data\x55"


def test_last_bytes_are_taken_from_the_end_until_none_is_left(rig):
    given_chain = rig.driver.add([], [1, 2, 1, 1])
    rig.driver.publish()
    writer = rig.queue.pop().writer()
    for value in (5, 4, 3, 2, 1):
        writer.take_last_byte()[:] = bytes([value])
    with pytest.raises(DriverError):
        writer.take_last_byte()
    assert rig.driver.contents(given_chain) == bytes([1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    "bad",
    [
        Buffer(RAM - 8, 16),
        Buffer(RAM, 16),
        Buffer(HOLE_END - 8, 16),
        Buffer(HOLE_END + 0x10000 - 8, 16),
        Buffer(2**64 - 8, 16),
        Buffer(2**64 - 1, 2**30),
    ],
    ids=["straddles the end", "in the hole", "out of the hole", "past RAM", "wraps", "huge"],
)
def test_row29_a_buffer_outside_ram_is_met_only_where_it_is_touched(rig, bad):
    good = Buffer(0x8000, 1)
    before = rig.snapshot()
    rig.driver.add([b"head", bad], [bad, good])
    rig.driver.publish()
    before = rig.snapshot()
    chain = rig.queue.pop()
    assert chain is not None
    reader, writer = chain.reader(), chain.writer()
    assert reader.read(4) == b"head"
    with pytest.raises(GuestMemoryError):
        reader.read(bad.length)
    status = writer.take_last_byte()
    with pytest.raises(GuestMemoryError):
        writer.take(bad.length)
    with pytest.raises(GuestMemoryError):
        chain.writer().write(bytes(17))
    with pytest.raises(GuestMemoryError):
        chain.readable_views()
    with pytest.raises(GuestMemoryError):
        chain.writable_views()
    assert rig.snapshot() == before
    status[0] = 1
    assert rig.memory.read(0x8000, 1) == b"\1"


def test_row29_a_status_byte_outside_ram_is_reported(rig):
    chain = chain_of(rig, [], [Buffer(RAM - 1, 2)])
    with pytest.raises(GuestMemoryError):
        chain.writer().take_last_byte()


def test_row30_empty_descriptors_are_no_parts(rig):
    chain = chain_of(rig, [b"", b"ab", b""], [0, 2, 0])
    assert [length for _, length in chain.readable] == [2]
    assert [length for _, length in chain.writable] == [2]
    assert chain.reader().read(2) == b"ab"
    chain = chain_of(rig, [b""], [0])
    assert (chain.readable, chain.writable) == ([], [])
    assert chain.reader().read(0) == b""
    chain.writer().write(b"")
    with pytest.raises(DriverError):
        chain.writer().take_last_byte()


def test_row30_an_empty_descriptor_may_point_anywhere(rig):
    chain = chain_of(rig, [Buffer(2**64 - 1, 0)], [Buffer(HOLE_END - 1, 0), 1])
    assert chain.readable_views() == []
    assert len(chain.writable_views()) == 1


def test_a_chain_says_what_it_is(rig):
    chain = chain_of(rig, [b"ab"], [3, 4])
    assert "2 bytes to read in 1 parts, 7 to write in 2" in repr(chain)


def test_a_driver_that_never_uses_a_place_twice_makes_nothing_grow(rig):
    window = RamWindow(rig.memory)
    places = window.places(window.writable_views, 16)
    for addr in range(2 * MAX_VIEWS + 10):
        window.readable((addr, 1))
        assert len(places[addr]) == 16
        assert len(window.readable_views) <= MAX_VIEWS
        assert len(window.writable_views) <= MAX_VIEWS
        assert len(places) <= MAX_VIEWS
    assert bytes(window.readable((0, 4))) == rig.memory.read(0, 4)


def test_a_place_that_is_used_again_is_looked_up_once(rig):
    window = RamWindow(rig.memory)
    places = window.places(window.writable_views, 16)
    assert window.readable((0, 4)) is window.readable((0, 4))
    assert places[0x100] is places[0x100]
    window.refresh()
    assert len(places) == len(window.readable_views) == len(window.writable_views) == 0
