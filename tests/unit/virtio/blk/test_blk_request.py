"""Block requests parsed from chains of any shape: no file, no ring."""

from __future__ import annotations

import random
import struct
from itertools import pairwise

import pytest

from pyvmm.memory import GuestMemory
from pyvmm.virtio.blk import request as blk_request
from pyvmm.virtio.blk.request import RangesRequest, Request, parse
from pyvmm.virtio.queue.chain import DescriptorChain, RamWindow

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
HEADER, DATA, STATUS = 0x1000, 0x2000, 0x1800
OUTSIDE = 0x4000_0000
RAM = 0x10_0000
HIGH = 0x1_0000_0000


class Chains:
    """Makes chains by hand; parts are (address, length)."""

    def __init__(self) -> None:
        self.memory = GuestMemory([(0, RAM), (HIGH, RAM)])
        self.window = RamWindow(self.memory)

    def chain(self, readable: list[tuple[int, int]], writable: list[tuple[int, int]]):
        readable = [part for part in readable if part[1]]
        writable = [part for part in writable if part[1]]
        sizes = (sum(n for _, n in readable), sum(n for _, n in writable))
        return DescriptorChain(0, readable, writable, *sizes, self.window)

    def put_header(self, type: int, sector: int = 0, addr: int = HEADER) -> None:
        self.memory.write(addr, struct.pack("<IIQ", type, 0, sector))


@pytest.fixture
def chains() -> Chains:
    made = Chains()
    made.memory.view(STATUS, 1)[0] = 0xAA
    return made


def parsed(chain: DescriptorChain) -> Request:
    request = parse(chain)
    assert request is not None
    return request


def test_the_ordinary_read(chains: Chains) -> None:
    chains.put_header(IN, 0x123456789)
    request = parsed(chains.chain([(HEADER, 16)], [(DATA, 4096), (STATUS, 1)]))
    assert (request.type, request.sector, request.size) == (IN, 0x123456789, 4096)
    assert request.refusal == OK
    request.data[0][:] = b"\x5a" * 4096
    assert chains.memory.read(DATA, 4096) == b"\x5a" * 4096
    assert request.answer(OK) == 4097
    assert chains.memory.read(STATUS, 1) == b"\0"


def test_the_ordinary_write_cannot_change_what_the_device_only_reads(chains: Chains) -> None:
    chains.put_header(OUT, 7)
    request = parsed(chains.chain([(HEADER, 16), (DATA, 512)], [(STATUS, 1)]))
    assert (request.type, request.sector, request.size, request.refusal) == (OUT, 7, 512, OK)
    assert all(view.readonly for view in request.data)
    assert request.answer(OK) == 1


def test_the_ioprio_field_means_nothing(chains: Chains) -> None:
    chains.memory.write(HEADER, struct.pack("<IIQ", IN, 0xFFFFFFFF, 3))
    request = parsed(chains.chain([(HEADER, 16)], [(DATA, 512), (STATUS, 1)]))
    assert (request.refusal, request.sector) == (OK, 3)


def test_row29_data_outside_ram_is_an_error_that_can_be_answered(chains: Chains) -> None:
    chains.put_header(IN)
    for bad in ((OUTSIDE, 512), (RAM - 256, 512), (2**64 - 256, 512), (HIGH + RAM - 1, 512)):
        request = parsed(chains.chain([(HEADER, 16)], [bad, (STATUS, 1)]))
        assert request.refusal == IOERR
        assert request.answer(IOERR) == 0  # nothing was written from the first writable byte on
        assert chains.memory.read(STATUS, 1) == b"\1"
    chains.put_header(OUT)
    request = parsed(chains.chain([(HEADER, 16), (OUTSIDE, 512)], [(STATUS, 1)]))
    assert (request.refusal, request.answer(IOERR)) == (IOERR, 1)


def test_row29_a_header_outside_ram(chains: Chains) -> None:
    for bad in ([(OUTSIDE, 16)], [(RAM - 8, 16)], [(2**64 - 8, 16)], [(HEADER, 8), (OUTSIDE, 8)]):
        request = parsed(chains.chain(bad, [(DATA, 512), (STATUS, 1)]))
        assert request.refusal == IOERR


def test_row29_a_status_byte_outside_ram_cannot_be_answered(chains: Chains) -> None:
    chains.put_header(IN)
    before = chains.memory.read(0, RAM)
    for bad in ((OUTSIDE, 1), (RAM, 1), (RAM - 512, 513), (2**64 - 1, 1), (2**64 - 1, 2)):
        assert parse(chains.chain([(HEADER, 16)], [(DATA, 512), bad])) is None
    assert chains.memory.read(0, RAM) == before


def test_row30_no_writable_byte_at_all(chains: Chains) -> None:
    chains.put_header(IN)
    assert parse(chains.chain([(HEADER, 16)], [])) is None
    assert parse(chains.chain([], [])) is None


def test_row30_no_header_or_too_short_a_one(chains: Chains) -> None:
    for readable in ([], [(HEADER, 15)], [(HEADER, 1), (HEADER, 1)]):
        request = parsed(chains.chain(readable, [(DATA, 512), (STATUS, 1)]))
        assert (request.refusal, request.answer(IOERR)) == (IOERR, 0)


def test_row30_no_data(chains: Chains) -> None:
    for type in (IN, OUT):
        chains.put_header(type)
        request = parsed(chains.chain([(HEADER, 16)], [(STATUS, 1)]))
        assert (request.refusal, request.size, request.data) == (OK, 0, [])
        assert request.answer(OK) == 1


def test_row35_header_split_1_and_15(chains: Chains) -> None:
    header = struct.pack("<IIQ", IN, 0, 0xABCDEF)
    chains.memory.write(HEADER, header[:1])
    chains.memory.write(0x3000, header[1:])
    parts = [(HEADER, 1), (0x3000, 15)]
    request = parsed(chains.chain(parts, [(DATA, 512), (STATUS, 1)]))
    assert (request.refusal, request.type, request.sector) == (OK, IN, 0xABCDEF)


def test_row35_header_and_data_in_one_descriptor(chains: Chains) -> None:
    chains.put_header(OUT, 5)
    chains.memory.write(HEADER + 16, b"\x77" * 512)
    request = parsed(chains.chain([(HEADER, 528)], [(STATUS, 1)]))
    assert (request.refusal, request.size) == (OK, 512)
    assert b"".join(request.data) == b"\x77" * 512


def test_row35_status_inside_the_datas_descriptor(chains: Chains) -> None:
    chains.put_header(IN)
    for writable in ([(DATA, 513)], [(DATA, 100), (DATA + 100, 413)]):
        request = parsed(chains.chain([(HEADER, 16)], writable))
        assert (request.refusal, request.size) == (OK, 512)
        assert sum(map(len, request.data)) == 512
        assert request.answer(OK) == 513
        assert chains.memory.read(DATA + 512, 1) == b"\0"


def cut(rng: random.Random, addr: int, length: int) -> list[tuple[int, int]]:
    """The range cut into random pieces, empty ones among them."""
    marks = sorted(rng.randrange(length + 1) for _ in range(rng.randrange(6)))
    edges = [0, *marks, length]
    return [(addr + a, b - a) for a, b in pairwise(edges)]


def test_row35_any_cut_of_the_same_bytes_is_the_same_request(chains: Chains) -> None:
    rng = random.Random(35)
    payload = bytes(rng.randrange(256) for _ in range(1024))
    for _ in range(300):
        high = rng.choice([0, HIGH])
        for type, size in ((IN, 1024), (OUT, 1024), (GET_ID, 20)):
            chains.put_header(type, 9, HEADER + high)
            chains.memory.write(HEADER + 16 + high, payload)
            readable = cut(rng, HEADER + high, 16 + (1024 if type == OUT else 0))
            writable = cut(rng, DATA + high, 1 + (0 if type == OUT else size))
            request = parsed(chains.chain(readable, writable))
            assert (request.refusal, request.type, request.size) == (OK, type, size)
            if type == OUT:
                assert b"".join(request.data) == payload
            else:
                for index, view in enumerate(request.data):
                    view[:] = bytes([index + 1]) * len(view)
                assert b"\0" not in chains.memory.read(DATA + high, size)
            assert request.answer(IOERR) <= 1
            status = DATA + high + (0 if type == OUT else size)
            assert chains.memory.read(status, 1) == b"\1"


def test_row37_the_header_is_read_once(chains: Chains, monkeypatch: pytest.MonkeyPatch) -> None:
    chains.put_header(IN, 1)
    reads = []
    real = blk_request._unpack_header

    def counting(*args: object) -> tuple[int, ...]:
        reads.append(args)
        fields = real(*args)
        chains.put_header(OUT, 2**63)  # what a hostile vCPU would do at the worst moment
        return fields

    monkeypatch.setattr(blk_request, "_unpack_header", counting)
    request = parsed(chains.chain([(HEADER, 16)], [(DATA, 512), (STATUS, 1)]))
    assert (request.type, request.sector, len(reads)) == (IN, 1, 1)


def test_row39_data_in_the_wrong_direction(chains: Chains) -> None:
    chains.put_header(IN)
    request = parsed(chains.chain([(HEADER, 16), (DATA, 512)], [(DATA, 512), (STATUS, 1)]))
    assert (request.refusal, request.data) == (IOERR, [])
    request = parsed(chains.chain([(HEADER, 16), (DATA, 512)], [(STATUS, 1)]))
    assert request.refusal == IOERR
    chains.put_header(OUT)
    request = parsed(chains.chain([(HEADER, 16), (DATA, 512)], [(DATA, 512), (STATUS, 1)]))
    assert (request.refusal, request.data) == (IOERR, [])


def test_row40_data_that_is_no_whole_sectors(chains: Chains) -> None:
    for size in (1, 511, 513, 4095):
        chains.put_header(IN)
        request = parsed(chains.chain([(HEADER, 16)], [(DATA, size), (STATUS, 1)]))
        assert request.refusal == IOERR
        chains.put_header(OUT)
        request = parsed(chains.chain([(HEADER, 16), (DATA, size)], [(STATUS, 1)]))
        assert request.refusal == IOERR


def test_row44_a_flush_with_a_sector_or_data_is_a_flush(chains: Chains) -> None:
    chains.put_header(FLUSH, 2**64 - 1)
    request = parsed(chains.chain([(HEADER, 16), (DATA, 512)], [(DATA, 512), (STATUS, 1)]))
    assert (request.type, request.refusal, request.data) == (FLUSH, OK, [])
    assert request.answer(OK) == 0  # the 512 bytes in front of the status were not written
    request = parsed(chains.chain([(HEADER, 16)], [(STATUS, 1)]))
    assert request.answer(OK) == 1


def test_row45_buffers_for_the_id(chains: Chains) -> None:
    chains.put_header(GET_ID)
    for room, refusal, used in ((0, IOERR, 1), (19, IOERR, 0), (20, OK, 21), (64, OK, 20)):
        request = parsed(chains.chain([(HEADER, 16)], [(DATA, room), (STATUS, 1)]))
        assert request.refusal == refusal
        assert sum(map(len, request.data)) == (0 if refusal else 20)
        assert request.answer(refusal) == used


@pytest.mark.parametrize("type", [2, 3, 5, 6, 7, 9, 10, 12, 15, *range(16, 27), 2**31, 2**32 - 1])
def test_row46_unknown_and_zone_requests(chains: Chains, type: int) -> None:
    chains.put_header(type)
    request = parsed(chains.chain([(HEADER, 16), (DATA, 512)], [(DATA, 512), (STATUS, 1)]))
    assert (request.refusal, request.data) == (UNSUPP, [])


@pytest.mark.parametrize("flags", [0, 1, 2, 0xFFFFFFFF])
def test_row47_secure_erase_is_not_offered(chains: Chains, flags: int) -> None:
    chains.put_header(14)
    chains.memory.write(DATA, struct.pack("<QII", 0, 1, flags))
    request = parsed(chains.chain([(HEADER, 16), (DATA, 16)], [(STATUS, 1)]))
    assert (request.refusal, request.answer(UNSUPP)) == (UNSUPP, 1)


def ranges(
    chains: Chains, type: int, segments: list[tuple[int, int, int]], cut: int = 0
) -> Request:
    """The request with `segments`, in one buffer or in two that are cut after `cut` bytes."""
    chains.put_header(type)
    data = b"".join(struct.pack("<QII", *segment) for segment in segments)
    chains.memory.write(DATA, data)
    parts = [(DATA, cut), (DATA + cut, len(data) - cut)] if cut else [(DATA, len(data))]
    return parsed(chains.chain([(HEADER, 16), *parts], [(STATUS, 1)]))


@pytest.mark.parametrize("type", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize("cut", [0, 1, 16, 20])
def test_segments_are_parsed_however_they_are_cut(chains: Chains, type: int, cut: int) -> None:
    request = ranges(chains, type, [(8, 16, 0), (2**64 - 1, 2**32 - 1, 0)], cut)
    assert isinstance(request, RangesRequest)
    assert request.refusal == OK
    assert request.segments == [(8, 16, False), (2**64 - 1, 2**32 - 1, False)]
    assert (request.sector, request.size) == (8, (16 + 2**32 - 1) * 512)
    assert request.answer(OK) == 1


@pytest.mark.parametrize("type", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize("flags", [1, 2, 3, 2**31, 2**32 - 1])
def test_row47_flags(chains: Chains, type: int, flags: int) -> None:
    # In the last segment of three: the first ones must not be carried out either.
    request = ranges(chains, type, [(0, 1, 0), (1, 1, 0), (2, 1, flags)])
    if type == WRITE_ZEROES and flags == 1:
        assert isinstance(request, RangesRequest)
        assert request.segments[2].unmap
    else:
        assert (request.refusal, request.answer(UNSUPP)) == (UNSUPP, 1)


@pytest.mark.parametrize("type", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize("size", [0, 1, 15, 17, 24, 33 * 16, 2**32 - 16])
def test_segments_of_an_odd_size_or_too_many(chains: Chains, type: int, size: int) -> None:
    chains.put_header(type)
    parts = [(HEADER, 16), *([(DATA, size)] if size else [])]
    assert parsed(chains.chain(parts, [(STATUS, 1)])).refusal == IOERR


@pytest.mark.parametrize("type", [DISCARD, WRITE_ZEROES])
def test_row39_a_discard_with_room_for_data(chains: Chains, type: int) -> None:
    chains.put_header(type)
    request = parsed(chains.chain([(HEADER, 16), (DATA, 16)], [(DATA, 512), (STATUS, 1)]))
    assert (request.refusal, request.answer(IOERR)) == (IOERR, 0)


@pytest.mark.parametrize("type", [DISCARD, WRITE_ZEROES])
def test_row29_segments_outside_ram(chains: Chains, type: int) -> None:
    chains.put_header(type)
    request = parsed(chains.chain([(HEADER, 16), (2**40, 16)], [(STATUS, 1)]))
    assert request.refusal == IOERR


def test_a_huge_length_is_bounded_by_ram(chains: Chains) -> None:
    # CVE classes 2016-6490, 2016-7422, 2011-1750: zero, huge and unaligned lengths
    chains.put_header(IN)
    for length in (0xFFFFFFFF, 0xFFFFFE00, RAM, 0x80000000):
        request = parsed(chains.chain([(HEADER, 16)], [(DATA, length), (STATUS, 1)]))
        assert (request.refusal, request.data) == (IOERR, [])
