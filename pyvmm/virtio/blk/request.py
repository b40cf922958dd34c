"""A block request, parsed from a descriptor chain: no file, no ring, no side effect.

Virtio 1.3, 5.2.6 Device Operation: a 16-byte header to read, data in one direction, a status byte
to write. The layout over descriptors is the driver's choice (2.7.4 Message Framing), so the header
is the first 16 readable bytes and the status the last writable one, wherever those lie.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from pyvmm.errors import DriverError, GuestMemoryError
from pyvmm.virtio.blk.config import MAX_RANGE_SEGMENTS
from pyvmm.virtio.blk.uapi import (
    TYPE_NAMES,
    VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
)
from pyvmm.virtio.queue.chain import DescriptorChain

SECTOR = 512
HEADER = Struct("<IIQ")  # struct virtio_blk_outhdr: type, ioprio, sector
_HEADER_SIZE = HEADER.size
_unpack_header = HEADER.unpack
SEGMENT = Struct("<QII")  # struct virtio_blk_discard_write_zeroes: sector, num_sectors, flags
NO_HEADER = -1  # the type of a request whose header could not be read


class Request:
    """A request of the driver.

    `type` and `sector` are the header's; `data` the data buffers, in place, `size` bytes in all.
    `status` is the one byte to answer in; `room` the writable bytes in front of it. `refusal` is
    VIRTIO_BLK_S_OK for a request to carry out; otherwise it is the status to answer at once,
    because of `reason`. `type` is NO_HEADER where there was none to read.
    """

    __slots__ = ("data", "reason", "refusal", "room", "sector", "size", "status", "type")

    def __init__(
        self,
        type: int,
        sector: int,
        data: list[memoryview],
        size: int,
        status: memoryview,
        room: int,
        refusal: int = VIRTIO_BLK_S_OK,
        reason: str = "",
    ) -> None:
        self.type = type
        self.sector = sector
        self.data = data
        self.size = size
        self.status = status
        self.room = room
        self.refusal = refusal
        self.reason = reason

    def answer(self, status: int) -> int:
        """Write the status byte; the number of bytes to report in the used ring.

        That is how many bytes were written without a gap from the first writable one on (2.7.8.2
        Device Requirements: The Virtqueue Used Ring), which leaves out the status byte when
        something in front of it was not written.
        """
        self.status[0] = status
        room = self.room
        written = 0
        if room and status == VIRTIO_BLK_S_OK:
            if self.type == VIRTIO_BLK_T_IN:
                return room + 1
            if self.type == VIRTIO_BLK_T_GET_ID:
                written = VIRTIO_BLK_ID_BYTES
        return written + 1 if written == room else written


class Segment(NamedTuple):
    """A range of a DISCARD or WRITE_ZEROES, in sectors of 512 bytes."""

    sector: int
    sectors: int
    unmap: bool


class RangesRequest(Request):
    """A DISCARD or WRITE_ZEROES: `size` is that of all `segments`, `sector` the first one's."""

    __slots__ = ("segments",)

    def __init__(
        self, type: int, segments: list[Segment], status: memoryview, room: int, reason: str = ""
    ) -> None:
        size = sum(segment.sectors for segment in segments) * SECTOR
        refusal = VIRTIO_BLK_S_UNSUPP if reason else VIRTIO_BLK_S_OK
        super().__init__(type, segments[0].sector, [], size, status, room, refusal, reason)
        self.segments = segments


def parse(chain: DescriptorChain) -> Request | None:
    """The request in `chain`, or None if it has no status byte in RAM, so cannot be answered.

    Never raises for what a driver can do: what is wrong with the request is its `refusal`.
    """
    ram = chain.ram
    room = chain.writable_size - 1
    readable, writable = chain.readable, chain.writable
    try:
        last = writable[-1]
        if last[1] != 1:
            last = last[0] + last[1] - 1, 1
        status = ram.writable(last)
    except (IndexError, GuestMemoryError):
        return None
    type, sector = NO_HEADER, 0
    try:
        first = readable[0]
        if first[1] == _HEADER_SIZE:  # Drivers give the header a descriptor of its own.
            type, _, sector = _unpack_header(ram.readable(first))
            following = readable[1:]
        else:
            type, _, sector = chain.reader().unpack(HEADER)
            following = _without_header(chain)
        if type == VIRTIO_BLK_T_IN:
            if following:
                return _ioerr(type, sector, status, room, "a read with data to write")
            # Nor do they make it share the status's.
            whole = writable[:-1] if last is writable[-1] else _without_status(writable)
            data, size = [ram.writable(part) for part in whole], room
        elif type == VIRTIO_BLK_T_OUT:
            if room:
                return _ioerr(type, sector, status, room, "a write with room for data to read")
            data = [ram.readable(part) for part in following]
            size = chain.readable_size - _HEADER_SIZE
        else:
            return _parse_rare(chain, type, sector, status, room)
    except (IndexError, DriverError) as error:
        reason = str(error) if chain.readable else "no header"
        return _ioerr(type, sector, status, room, reason)
    if size % SECTOR:
        return _ioerr(type, sector, status, room, f"{size} bytes of data are not whole sectors")
    return Request(type, sector, data, size, status, room)


def _parse_rare(
    chain: DescriptorChain, type: int, sector: int, status: memoryview, room: int
) -> Request:
    if type == VIRTIO_BLK_T_FLUSH:
        # Drivers set no sector and send no data (5.2.6.1); if they do, it changes nothing.
        return Request(type, 0, [], 0, status, room)
    if type == VIRTIO_BLK_T_GET_ID:
        if room < VIRTIO_BLK_ID_BYTES:
            return _ioerr(type, sector, status, room, f"{room} bytes are too few for an id")
        data = chain.writer().take(VIRTIO_BLK_ID_BYTES)
        return Request(type, 0, data, VIRTIO_BLK_ID_BYTES, status, room)
    if type in (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES):
        return _parse_ranges(chain, type, sector, status, room)
    return Request(
        type, sector, [], 0, status, room, VIRTIO_BLK_S_UNSUPP, f"unknown request type {type}"
    )


def _parse_ranges(
    chain: DescriptorChain, type: int, sector: int, status: memoryview, room: int
) -> Request:
    """Segments that are to be discarded or zeroed, and what 5.2.6.2 wants refused of them."""
    if room:
        return _ioerr(type, sector, status, room, f"{TYPE_NAMES[type]} with room for data to read")
    size = chain.readable_size - _HEADER_SIZE
    if size <= 0 or size % SEGMENT.size:
        return _ioerr(type, sector, status, room, f"{size} bytes are not one or more segments")
    count = size // SEGMENT.size
    if count > MAX_RANGE_SEGMENTS:
        return _ioerr(type, sector, status, room, f"{count} segments, over {MAX_RANGE_SEGMENTS}")
    reader = chain.reader()
    reader.skip(_HEADER_SIZE)
    copy = reader.read(size)
    allowed = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP if type == VIRTIO_BLK_T_WRITE_ZEROES else 0
    segments, reason = [], ""
    for first, sectors, flags in SEGMENT.iter_unpack(copy):
        if flags & ~allowed:
            reason = f"flags {flags:#x} in a {TYPE_NAMES[type]}"
        unmap = bool(flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
        segments.append(Segment(first, sectors, unmap))
    return RangesRequest(type, segments, status, room, reason)


def _without_header(chain: DescriptorChain) -> list[tuple[int, int]]:
    left = _HEADER_SIZE
    for index, (addr, length) in enumerate(chain.readable):
        if left < length:
            return [(addr + left, length - left), *chain.readable[index + 1 :]]
        left -= length
    return []


def _without_status(writable: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """All writable bytes but the last, which is the status."""
    addr, length = writable[-1]
    return [*writable[:-1], (addr, length - 1)]


def _ioerr(type: int, sector: int, status: memoryview, room: int, reason: str) -> Request:
    return Request(type, sector, [], 0, status, room, VIRTIO_BLK_S_IOERR, reason)
