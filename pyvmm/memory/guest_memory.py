"""Checked, zero-copy access to guest RAM by guest-physical address.

All RAM is one memfd, mapped once and shared, so that another process (a vhost-user back end, say)
can map the same memory by file descriptor and offset; it cannot cut it short. A `Region` is one
range of guest-physical addresses within it; between regions there are holes, where an access is a
`GuestMemoryError`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import _cffi_backend

from pyvmm.errors import GuestMemoryError
from pyvmm.host import holes, syscalls

_ffi = _cffi_backend.FFI()
PAGE_SIZE = 4096
_BLOCK = 512  # st_blocks is in these (stat(2))


class Region(NamedTuple):
    """One contiguous range of guest RAM; sizes and offsets in bytes.

    `view` is the whole region as writable bytes; `host_addr` is where it is mapped in this process.
    """

    guest_addr: int
    size: int
    fd_offset: int
    host_addr: int
    view: memoryview

    @property
    def end(self) -> int:
        """The first guest-physical address past the region."""
        return self.guest_addr + self.size


def pieces(fd: int, offset: int, view: memoryview) -> Iterator[memoryview | int]:
    """See GuestMemory.touched, for a `view` of the file `fd` from `offset` on. Raises HostError."""
    at, end = offset, offset + len(view)
    for data, hole in holes.data_of(fd, offset, end):
        if data > at:
            yield data - at
        yield view[data - offset : hole - offset]
        at = hole
    if end > at:
        yield end - at


class GuestMemory:
    """Guest RAM: one shared memfd, seen through regions. `fd` is the memfd. Once it is `lent`,
    other processes have it too, and have had it for good.

    Memory that nobody refers to any more is given back.
    """

    fd = -1
    lent = False
    _fixed = True  # the file's size, whoever has it
    _discarded: list[tuple[int, int]] | None = None

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Create zeroed RAM for `ranges` of (guest-physical address, size in bytes).

        Ranges are page aligned, ascending and disjoint. Raises ValueError where they are not (they
        come from the memory map, not from a guest) and HostError if the host refuses.
        """
        wanted = list(ranges)
        self._check(wanted)
        total = sum(size for _, size in wanted)
        self.fd = syscalls.create_memfd("pyvmm-guest-ram", total, fixed=self._fixed)
        try:
            self._map = syscalls.map_shared(self.fd, total)
            syscalls.prefer_huge_pages(self._map)
        except BaseException:
            self.close()
            raise
        self._lay_out(wanted, self._map)

    def _lay_out(self, wanted: list[tuple[int, int]], mapping: mmap.mmap) -> None:
        """Have `mapping`, which holds them one after the other, be the ranges."""
        whole = memoryview(mapping)
        base = int(_ffi.cast("uintptr_t", _ffi.from_buffer(whole)))
        regions = []
        offset = 0
        for guest_addr, size in wanted:
            view = whole[offset : offset + size]
            regions.append(Region(guest_addr, size, offset, base + offset, view))
            offset += size
        self.regions = tuple(regions)
        self.size = offset

    @staticmethod
    def _check(ranges: list[tuple[int, int]]) -> None:
        if not ranges:
            raise ValueError("guest memory needs at least one range")
        end = 0
        for guest_addr, size in ranges:
            if guest_addr % PAGE_SIZE or size % PAGE_SIZE or size <= 0:
                raise ValueError(f"range {guest_addr:#x} + {size:#x} is not made of whole pages")
            if guest_addr < end:
                raise ValueError(f"range at {guest_addr:#x} overlaps the one before it")
            end = guest_addr + size

    def view(self, addr: int, length: int) -> memoryview:
        """`length` bytes of RAM at guest-physical `addr`, in place and writable.

        Raises GuestMemoryError unless the whole range lies within one region.
        """
        for region in self.regions:
            offset = addr - region.guest_addr
            if offset >= 0 and offset + length <= region.size and length >= 0:
                return region.view[offset : offset + length]
        raise GuestMemoryError(addr, length)

    def host_addr(self, addr: int) -> int:
        """The address in this process of guest-physical `addr`. Raises GuestMemoryError."""
        for region in self.regions:
            if region.guest_addr <= addr < region.end:
                return region.host_addr + addr - region.guest_addr
        raise GuestMemoryError(addr, 1)

    def contains(self, addr: int, length: int) -> bool:
        """True if all `length` bytes at guest-physical `addr` lie within one region."""
        return any(
            region.guest_addr <= addr and addr + length <= region.end for region in self.regions
        )

    def read(self, addr: int, length: int) -> bytes:
        """A copy of `length` bytes at guest-physical `addr`. Raises GuestMemoryError."""
        return bytes(self.view(addr, length))

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to guest-physical `addr`. Raises GuestMemoryError, changing nothing then."""
        self.view(addr, len(data))[:] = data

    @property
    def resident(self) -> int:
        """The number of its bytes that the host has given, for what was written or read so far."""
        return os.fstat(self.fd).st_blocks * _BLOCK

    def touched(self) -> Iterator[memoryview | int]:
        """All of it in the order of the regions, in pieces: a view of what may not be zero, or how
        many bytes are zero for certain, as nobody has written there. Raises HostError."""
        for region in self.regions:
            yield from pieces(self.fd, region.fd_offset, region.view)

    def discard(self, addr: int, length: int) -> None:
        """Give the whole pages at guest-physical `addr` back to the host; they read as zero then.

        Raises GuestMemoryError unless they lie within one region, ValueError unless they are whole
        pages, HostError if the host does not take them.
        """
        if addr % PAGE_SIZE or length % PAGE_SIZE or length <= 0:
            raise ValueError(f"range {addr:#x} + {length:#x} is not made of whole pages")
        for region in self.regions:
            offset = addr - region.guest_addr
            if offset >= 0 and offset + length <= region.size:
                holes.punch(self.fd, region.fd_offset + offset, length)
                if self._discarded is not None:
                    self._discarded.append((region.fd_offset + offset, length))
                return
        raise GuestMemoryError(addr, length)

    def watch_discards(self) -> None:
        """From now on `discarded` knows."""
        self._discarded = []

    def discarded(self) -> bytes:
        """The set of pages (pages.py) that were discarded since the last call."""
        found = bytearray(b"0" * (self.size // PAGE_SIZE))
        # A balloon's threads may come in between: one at a time is taken, and none is lost.
        while self._discarded:
            offset, length = self._discarded.pop()
            first, count = offset // PAGE_SIZE, length // PAGE_SIZE
            found[first : first + count] = b"1" * count
        return bytes(found)

    def mapped(self) -> bytes:
        """The set of pages (pages.py) that this process has mapped, or another one may have written
        to. Raises HostError."""
        from pyvmm.memory import pages

        found = bytearray(pages.NO * (self.size // PAGE_SIZE))
        at = 0
        for piece in pieces(self.fd, 0, memoryview(self._map)):
            if isinstance(piece, int):  # nobody has a page there, and to be told so takes long
                at += piece
                continue
            address = self.regions[0].host_addr + at
            if self.lent:  # nobody knows what others have touched
                here = pages.YES * (len(piece) // PAGE_SIZE)
            else:
                here = pages.looked_up(address, len(piece), pages.ANY)
            found[at // PAGE_SIZE : at // PAGE_SIZE + len(here)] = here
            at += len(piece)
        return bytes(found)

    def let_go(self) -> None:
        """Have this process have no page of it mapped, until one is touched; nothing is lost."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Give the memory back. No view may be used afterwards; the VM must be gone already."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            # Views that others still hold keep the mapping alive until they go; the region views
            # are ours to drop.
            self.regions = ()

    __del__ = close
