"""The relay's wire format: frames of eight bytes, some with data behind.

    type u8 · reserved u8, zero · slot u16 · value u32      little endian

A slot is a connection's number. Each end opens connections in its own half of them, so that both
may at once.

| type   | value           | meaning                                                          |
|--------|-----------------|------------------------------------------------------------------|
| OPEN   | bytes of a name | the name follows; its sender takes WINDOW bytes in this slot     |
| CREDIT | bytes           | so many more may be sent; the first one says that OPEN succeeded |
| DATA   | bytes           | they follow; never more than the credit                          |
| EOF    | 0               | no more DATA from here                                           |
| CLOSE  | 0               | no more frames from here; a slot is free once both have said so  |
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

OPEN, CREDIT, DATA, EOF, CLOSE = 1, 2, 3, 4, 5

# That each end may open: more than what is behind it takes at once (512 streams of vsock, 64 of the
# control socket and some ports), so that theirs are the limits that users meet.
SLOTS = 1024
# That a process with an end of the relay may need: one for each slot, one for whoever is behind it.
DESCRIPTORS = 4 * SLOTS
MAX_DATA = 16 << 10
MAX_NAME = 4096  # PATH_MAX
WINDOW = 128 << 10  # most bytes on the way to one socket, and so kept for it

_HEADER = Struct("<BBHI")
_LONGEST = {OPEN: MAX_NAME, DATA: MAX_DATA}  # of those with data behind


class Violation(Exception):
    """The other end broke the format or a rule; nothing it says can be trusted any more."""


class Frame(NamedTuple):
    """One frame; `data` is empty but for OPEN and DATA."""

    type: int
    slot: int
    value: int
    data: bytes = b""


def encode(type: int, slot: int, value: int = 0, data: bytes = b"") -> bytes:
    """A frame as bytes; `value` is the length of `data` if there is any."""
    return _HEADER.pack(type, 0, slot, len(data) or value) + data


class Decoder:
    """Bytes to frames; keeps at most one that is not whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with `data`. Raises Violation."""
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= _HEADER.size:
            type, reserved, slot, value = _HEADER.unpack_from(buffer, at)
            length = 0
            if type in _LONGEST:
                length = value
                if not 1 <= value <= _LONGEST[type]:
                    raise Violation(f"a frame of type {type} with {value} bytes")
            elif type not in (CREDIT, EOF, CLOSE):
                raise Violation(f"a frame of type {type}")
            if reserved or slot >= 2 * SLOTS:
                raise Violation(f"a frame for slot {slot}")
            start = at + _HEADER.size
            if len(buffer) - start < length:
                break
            at = start + length
            yield Frame(type, slot, value, bytes(buffer[start:at]))
        del buffer[:at]
