"""Sets of pages of guest memory, and files that lie over one another page by page.

A set of pages is a text of "0" and "1", a byte for each page in the order of the regions: what the
interpreter's own functions on bytes and numbers are quick with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from mmap import PAGESIZE as PAGE_SIZE

NO, YES = b"0", b"1"
_ENTRY = 8
# Documentation/admin-guide/mm/pagemap.rst: the highest byte of a page's entry
_PRESENT, _SWAPPED, _OF_FILE = 0x80, 0x40, 0x20


def _table(has: Callable[[int], object]) -> bytes:
    return b"".join(YES if has(byte) else NO for byte in range(256))


ANY = _table(lambda byte: byte & (_PRESENT | _SWAPPED))
"""The test for a page in this process: it has read or written it, or the kernel has for it."""
OWN = _table(lambda byte: byte & _SWAPPED or (byte & _PRESENT and not byte & _OF_FILE))
"""The test for a page of this process alone, as it has written to a private mapping."""


_pagemap = -1


def keep_open() -> None:
    """Open now what `looked_up` reads, for all times: another user, whom this process is going to
    be, could not."""
    global _pagemap
    with suppress(OSError):
        _pagemap = _open()


def _open() -> int:
    return os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)


def looked_up(address: int, size: int, table: bytes) -> bytes:
    """Those of `size` bytes of this process from `address` on that `table` (ANY or OWN) means; all
    of them where the kernel does not say."""
    count = size // PAGE_SIZE
    entries = b""
    with suppress(OSError):
        fd = _open() if _pagemap < 0 else os.dup(_pagemap)
        try:
            entries = _read(fd, address // PAGE_SIZE * _ENTRY, count * _ENTRY)
        finally:
            os.close(fd)
    if len(entries) < count * _ENTRY:
        return YES * count
    return entries[_ENTRY - 1 :: _ENTRY].translate(table)


def _read(fd: int, offset: int, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        more = os.pread(fd, size - len(found), offset + len(found))
        if not more:
            break
        found += more
    return bytes(found)


def both(one: bytes, other: bytes) -> bytes:
    """The pages that are in one of them or in both; quick if `other` has few runs."""
    found = bytearray(one)
    for first, length in runs(other):
        found[first : first + length] = YES * length
    return bytes(found)


def from_bitmap(bitmap: bytes, count: int) -> bytes:
    """The set that has a bit for each of `count` pages in `bitmap`, the lowest first."""
    digits = format(int.from_bytes(bitmap, "little"), "b").encode()[::-1]
    return digits[:count].ljust(count, NO)


def to_bitmap(pages: bytes) -> bytes:
    """The bitmap of a set, in whole bytes."""
    size = -(-len(pages) // 8)
    return int(pages[::-1], 2).to_bytes(size, "little")


def runs(pages: bytes) -> Iterator[tuple[int, int]]:
    """The first page and the number of pages of each run that is in the set."""
    start = pages.find(YES)
    while start >= 0:
        end = pages.find(NO, start)
        end = len(pages) if end < 0 else end
        yield start, end - start
        start = pages.find(YES, end)


def extents(count: int, over: Sequence[bytes]) -> Iterator[tuple[int, int, int]]:
    """The layers that `count` pages are in: (first page, number of pages, layer), in order. Layer 0
    has all of them, and layer n those in `over[n - 1]`; the highest one counts."""
    if not over and count:
        yield 0, count, 0
        return
    owner = bytearray(count)
    for number, pages in enumerate(over, 1):
        for first, length in runs(pages):
            owner[first : first + length] = bytes([number]) * length
    # Where each layer is next, from where this one is on: no page is looked at twice for a layer.
    layers = range(len(over) + 1)
    following = [-1] * len(layers)
    at = 0
    while at < count:
        for layer in layers:
            if following[layer] < at:
                found = owner.find(layer, at)
                following[layer] = count if found < 0 else found
        here = owner[at]
        end = min((following[layer] for layer in layers if layer != here), default=count)
        yield at, end - at, here
        at = end
