"""Unified kernel images: an EFI program that has a kernel, its initrd and its command line.

Sources: the Unified Kernel Image Specification (uapi-group.org); Microsoft's PE Format ("MS-DOS
Stub", "COFF File Header", "Section Table").
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping

HEAD = 64 << 10  # bytes of the file that the headers are in
_MOST_SECTIONS = 96  # as a loader takes
_ROW = struct.Struct("<8sIIII16x")  # name, size in memory, address, size in the file, offset there

Sections = Mapping[str, tuple[int, int]]  # (offset in the file, bytes) by name


def sections(head: bytes) -> Sections:
    """The sections of the image that begins with `head`, without those of its other profiles;
    nothing if it is no unified kernel image."""
    found: dict[str, tuple[int, int]] = {}
    if head[:2] != b"MZ" or len(head) < 64:
        return found
    (at,) = struct.unpack_from("<I", head, 60)
    if head[at : at + 4] != b"PE\0\0" or len(head) < at + 24:
        return found
    count, optional = struct.unpack_from("<2xH12xH", head, at + 4)
    at += 24 + optional
    for _ in range(min(count, _MOST_SECTIONS)):
        if at + _ROW.size > len(head):
            break
        name, in_memory, _, in_file, offset = _ROW.unpack_from(head, at)
        at += _ROW.size
        text = name.rstrip(b"\0").decode("ascii", "replace")
        if text == ".profile":
            break
        # What is in the file is padded.
        found.setdefault(text, (offset, min(in_memory, in_file)))
    return found if ".linux" in found else {}


def cut(pieces: Iterable[bytes], start: int, size: int) -> Iterator[bytes]:
    """`size` bytes, or as many as there are, from byte `start` on of what is in `pieces`."""
    for piece in pieces:
        part = piece[start : start + size]
        start = max(0, start - len(piece))
        size -= len(part)
        if part:
            yield part
        if not size:
            return
