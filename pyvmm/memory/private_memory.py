"""Guest RAM that begins as what files have, and is changed in this process alone.

One file has all of it, others may lie over it, each with some pages (pages.py).

The files are mapped privately: pages that are only read are the page cache's, shared by all VMs
that began with them, and a page that is written is copied first. So the start takes no time for
each byte of memory.

Nothing here changes a file. Whoever cuts one short meanwhile takes the pages away: an access to
them ends the process (SIGBUS), as with any mapped file. The file's folder is its owner's alone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from pyvmm.errors import ConfigError, GuestMemoryError, HostError
from pyvmm.host import syscalls
from pyvmm.memory import pages
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory, pieces

_NORESERVE = 0x4000  # <asm-generic/mman.h> MAP_NORESERVE: copies may come, or may not
_FIXED = 0x10  # <asm-generic/mman-common.h> MAP_FIXED
_LOOKED_AT = 2 << 20  # bytes whose pages are looked at together
# Mappings for pieces of upper files; vm.max_map_count, which is for all of a process, is 65530 by
# default. What is beyond is copied, the smallest pieces first.
_MOST_MAPPED = 8192
_FAILED = ctypes.c_void_p(-1).value


class PrivateMemory(GuestMemory):
    """Guest RAM with the contents of files, in the order of its ranges. It has no `fd`: no other
    process can share what the guest writes. `began_as` is what its maker calls those contents."""

    began_as = ""
    _files: tuple[int, ...] = ()

    def __init__(
        self,
        ranges: Iterable[tuple[int, int]],
        fd: int,
        over: Sequence[tuple[int, bytes]] = (),
    ) -> None:
        """`fd` is open for reading and stays the caller's, as are those in `over`: each with the
        set of the pages that are in it, in the places that they have in memory, the lowest first.
        Raises ConfigError if a file is not exactly of the ranges' size, HostError if it cannot be
        mapped."""
        wanted = list(ranges)
        self._check(wanted)
        total = sum(size for _, size in wanted)
        for one in (fd, *(one for one, _ in over)):
            status = os.fstat(one)
            if not stat.S_ISREG(status.st_mode) or status.st_size != total:
                raise ConfigError(
                    f"the saved memory has {status.st_size} bytes, and the guest {total}",
                    cure="take a new snapshot",
                )
        try:
            self._map = mmap.mmap(
                fd, total, mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            )
        except OSError as error:
            raise HostError(error.errno or 0, "mmap of saved memory") from None
        syscalls.prefer_huge_pages(self._map)
        self._files = tuple(os.dup(one) for one in (fd, *(one for one, _ in over)))
        self._lay_out(wanted, self._map)
        self._replaced = bytearray()  # the pages that `discard` has replaced, once there are any
        sets = [which for _, which in over]
        self._extents = list(pages.extents(total // PAGE_SIZE, sets)) if over else []
        self._starts = [first for first, _, _ in self._extents]
        self._lay_over(int(self.regions[0].host_addr))

    def _lay_over(self, start: int) -> None:
        upper = sorted((count, first, layer) for first, count, layer in self._extents if layer)
        for number, (count, first, layer) in enumerate(reversed(upper)):
            address, size, offset = start + first * PAGE_SIZE, count * PAGE_SIZE, first * PAGE_SIZE
            if number < _MOST_MAPPED:
                _map_over(address, size, self._files[layer], offset)
            else:
                read_into(memoryview(self._map)[offset : offset + size], self._files[layer], offset)

    @property
    def resident(self) -> int:
        """The number of its bytes that are this process's own or in the page cache, as far as it
        has looked at them: /proc says it for its mappings."""
        start = int(self.regions[0].host_addr) if self.regions else 0
        return _resident(start, start + self.size)

    def touched(self) -> Iterator[memoryview | int]:
        """See GuestMemory: the files' holes are zero where nobody has made a page of his own."""
        for region in self.regions:
            for start in range(0, region.size, _LOOKED_AT):
                view = region.view[start : start + _LOOKED_AT]
                yield from self._pieces(region.host_addr + start, region.fd_offset + start, view)

    def _pieces(self, address: int, offset: int, view: memoryview) -> Iterator[memoryview | int]:
        if pages.YES in pages.looked_up(address, len(view), pages.OWN):
            yield view
            return
        at = 0
        while at < len(view):
            file, end = self._file_at(offset + at)
            part = view[at : min(len(view), end - offset)]
            yield from pieces(file, offset + at, part)
            at += len(part)

    def _file_at(self, offset: int) -> tuple[int, int]:
        """The file that has `offset`, and where another one begins to have what follows."""
        if not self._extents:
            return self._files[0], self.size
        first, count, layer = self._extents[bisect_right(self._starts, offset // PAGE_SIZE) - 1]
        return self._files[layer], (first + count) * PAGE_SIZE

    def changed(self) -> bytes:
        """The set of the pages that may not be as the files have them."""
        start = int(self.regions[0].host_addr)
        own = pages.looked_up(start, self.size, pages.OWN)
        return pages.both(own, bytes(self._replaced)) if self._replaced else own

    def discard(self, addr: int, length: int) -> None:
        """See GuestMemory. Pages of the file would show again if they were only let go of, so that
        fresh ones are put in their place."""
        if addr % PAGE_SIZE or length % PAGE_SIZE or length <= 0:
            raise ValueError(f"range {addr:#x} + {length:#x} is not made of whole pages")
        for region in self.regions:
            offset = addr - region.guest_addr
            if offset >= 0 and offset + length <= region.size:
                _put_zeroes(region.host_addr + offset, length)
                self._note((region.fd_offset + offset) // PAGE_SIZE, length // PAGE_SIZE)
                return
        raise GuestMemoryError(addr, length)

    def _note(self, first: int, count: int) -> None:
        self._replaced = self._replaced or bytearray(pages.NO * (self.size // PAGE_SIZE))
        self._replaced[first : first + count] = pages.YES * count

    def close(self) -> None:
        """See GuestMemory: the mapping goes with the last view of it."""
        self.regions = ()
        while self._files:
            os.close(self._files[-1])
            self._files = self._files[:-1]

    __del__ = close


def read_into(view: memoryview, fd: int, offset: int) -> None:
    """Fill `view` with what the file `fd` has from `offset` on. Raises HostError."""
    while view:
        try:
            done = os.preadv(fd, [view], offset)
        except OSError as error:
            raise HostError(error.errno or 0, "reading of saved memory") from None
        if not done:
            raise HostError(0, "reading of saved memory: it has been cut short")
        view, offset = view[done:], offset + done


def _map_over(address: int, size: int, fd: int, offset: int) -> None:
    _map(address, size, mmap.MAP_PRIVATE | _NORESERVE | _FIXED, fd, offset, "mmap of saved memory")


def _put_zeroes(address: int, length: int) -> None:
    how = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE | _FIXED
    _map(address, length, how, -1, 0, f"mmap of {length} fresh bytes")


def _map(address: int, size: int, how: int, fd: int, offset: int, what: str) -> None:
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = (
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_int64,
    )
    prot = mmap.PROT_READ | mmap.PROT_WRITE
    if function(address, size, prot, how, fd, offset) == _FAILED:
        raise HostError(ctypes.get_errno(), what)


def _resident(start: int, end: int) -> int:
    """The bytes that /proc/self/smaps counts for the mappings that begin from `start` to `end`."""
    import re  # only once somebody asks

    with open("/proc/self/smaps", "rb", buffering=1 << 16) as file:
        text = file.read()
    found, counts = 0, False
    for address, kilobytes in re.findall(rb"^(?:([0-9a-f]+)-|Rss: +(\d+))", text, re.MULTILINE):
        if address:  # of a mapping's first line
            counts = start <= int(address, 16) < end
        elif counts:
            found += int(kilobytes) << 10
    return found
