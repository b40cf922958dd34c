"""Guest RAM that begins as what a file has, and is changed in this process alone.

The file is mapped privately: pages that are only read are the page cache's, shared by all VMs that
began with this file, and a page that is written is copied first. So the start takes no time for
each byte of memory.

Nothing here changes the file. Whoever cuts it short meanwhile takes the pages away: an access to
them ends the process (SIGBUS), as with any mapped file. The file's folder is its owner's alone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
from collections.abc import Iterable, Iterator

from pyvmm.errors import ConfigError, GuestMemoryError, HostError
from pyvmm.host import syscalls
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory, pieces

_NORESERVE = 0x4000  # <asm-generic/mman.h> MAP_NORESERVE: copies may come, or may not
_FIXED = 0x10  # <asm-generic/mman-common.h> MAP_FIXED
_LOOKED_AT = 2 << 20  # bytes whose pages are looked at together
# Documentation/admin-guide/mm/pagemap.rst: bits of a page's entry
_SWAPPED, _PRESENT, _OF_FILE = 1 << 62, 1 << 63, 1 << 61
_FAILED = ctypes.c_void_p(-1).value


class PrivateMemory(GuestMemory):
    """Guest RAM with the contents of a file, in the order of its ranges. Its `fd` is none: no other
    process can share what the guest writes."""

    _file = -1

    def __init__(self, ranges: Iterable[tuple[int, int]], fd: int) -> None:
        """`fd` is open for reading and stays the caller's. Raises ConfigError if the file is not
        exactly of the ranges' size, HostError if it cannot be mapped."""
        wanted = list(ranges)
        self._check(wanted)
        total = sum(size for _, size in wanted)
        status = os.fstat(fd)
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
        self._file = os.dup(fd)
        self._lay_out(wanted, self._map)

    @property
    def resident(self) -> int:
        """How many bytes of it are this process's own or in the page cache, as far as it has looked
        at them: /proc says it for the mapping."""
        start = self.regions[0].host_addr if self.regions else 0
        return _resident(start)

    def touched(self) -> Iterator[memoryview | int]:
        """See GuestMemory: the file's holes are zero where nobody has made a page of his own."""
        for region in self.regions:
            for start in range(0, region.size, _LOOKED_AT):
                view = region.view[start : start + _LOOKED_AT]
                yield from self._pieces(region.host_addr + start, region.fd_offset + start, view)

    def _pieces(self, address: int, offset: int, view: memoryview) -> Iterator[memoryview | int]:
        if _has_own_pages(address, len(view)):
            yield view
        else:
            yield from pieces(self._file, offset, view)

    def discard(self, addr: int, length: int) -> None:
        """See GuestMemory. Pages of the file would show again if they were only let go of, so that
        fresh ones are put in their place."""
        if addr % PAGE_SIZE or length % PAGE_SIZE or length <= 0:
            raise ValueError(f"range {addr:#x} + {length:#x} is not made of whole pages")
        for region in self.regions:
            offset = addr - region.guest_addr
            if offset >= 0 and offset + length <= region.size:
                _put_zeroes(region.host_addr + offset, length)
                return
        raise GuestMemoryError(addr, length)

    def close(self) -> None:
        """See GuestMemory: the mapping goes with the last view of it."""
        self.regions = ()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    __del__ = close


def _put_zeroes(address: int, length: int) -> None:
    how = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE | _FIXED
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = (
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_int64,
    )
    prot = mmap.PROT_READ | mmap.PROT_WRITE
    if function(address, length, prot, how, -1, 0) == _FAILED:
        raise HostError(ctypes.get_errno(), f"mmap of {length} fresh bytes")


def _resident(start: int) -> int:
    """The bytes that /proc/self/smaps counts for the mapping that begins at `start`."""
    wanted = f"{start:x}-"
    with open("/proc/self/smaps") as file:
        for line in file:
            if line.startswith(wanted):
                for detail in file:
                    if detail.startswith("Rss:"):
                        return int(detail.split()[1]) << 10
    return 0


def _has_own_pages(address: int, size: int) -> bool:
    """Whether a page of the range is this process's own, or nobody can say."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            found = os.pread(file.fileno(), size // PAGE_SIZE * 8, address // PAGE_SIZE * 8)
    except OSError:
        return True
    entries = memoryview(found).cast("Q")
    return len(found) < size // PAGE_SIZE * 8 or any(
        entry & _SWAPPED or (entry & _PRESENT and not entry & _OF_FILE) for entry in entries
    )
