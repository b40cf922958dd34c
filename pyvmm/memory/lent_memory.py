"""Guest RAM that belongs to another process, which lends it region by region, by file descriptor.

A vhost-user front end hands over such regions and may take them back or add more at any time, so
`regions` is replaced as a whole whenever it changes: whoever reads it sees the old or the new.
Regions that touch are joined to one there.
"""

from __future__ import annotations

import mmap
import os
import stat

import _cffi_backend

from pyvmm.errors import HostError, PyvmmError
from pyvmm.host import syscalls
from pyvmm.memory.contiguous_view import join
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory, Region

_ffi = _cffi_backend.FFI()
_ADDRESSES = 1 << 64


class LentMemoryError(PyvmmError):
    """A region that cannot be: the lender's fault."""


class LentMemory(GuestMemory):
    """Guest RAM mapped from other processes' files; empty until a region is added.

    A file that its owner truncates later takes its pages with it. A system call that is to fill
    them then fails with EFAULT, but an access of ours raises SIGBUS, which ends the process: see
    docs/decisions/0140-vhost-user.md. Only a memfd sealed against shrinking rules that out.
    """

    def __init__(self) -> None:
        self.fd = -1
        self.size = 0
        self.regions = ()
        self._lent: tuple[Region, ...] = ()  # one by one

    def add(self, guest_addr: int, size: int, fd: int, fd_offset: int) -> Region:
        """Map `size` bytes from `fd_offset` of `fd` on, to be the RAM at `guest_addr`; the region.

        `fd` stays the caller's. Raises LentMemoryError for a region that is empty or askew, leaves
        the address space, overlaps another or is not all in its file; HostError if it cannot be
        mapped. Nothing has changed then.
        """
        region = self.map_region(guest_addr, size, fd, fd_offset)
        check_disjoint((*self._lent, region))
        self._replace((*self._lent, region))
        return region

    def replace(self, regions: list[Region]) -> None:
        """Have just these `regions`, each from `map_region`. Raises LentMemoryError, changing
        nothing, if they overlap."""
        check_disjoint(tuple(regions))
        self._replace(tuple(regions))

    def remove(self, guest_addr: int, size: int) -> None:
        """Give the region back that is exactly this range. Raises LentMemoryError if none is."""
        kept = tuple(r for r in self._lent if (r.guest_addr, r.size) != (guest_addr, size))
        if len(kept) == len(self._lent):
            raise LentMemoryError(f"there is no region {guest_addr:#x} + {size:#x}")
        self._replace(kept)

    def close(self) -> None:
        """Forget all regions. Their mappings go with the last view of them."""
        self._replace(())

    def _replace(self, regions: tuple[Region, ...]) -> None:
        self._lent = regions
        # The largest first: nearly every access is to it, and a search begins there.
        self.regions = tuple(sorted(join(regions), key=lambda region: -region.size))
        self.size = sum(region.size for region in regions)

    @staticmethod
    def map_region(guest_addr: int, size: int, fd: int, fd_offset: int) -> Region:
        """A region that is not part of the memory yet: see `add` for what is checked."""
        what = f"region {guest_addr:#x} + {size:#x}"
        if not size:
            raise LentMemoryError(f"{what} is empty")
        # An aligned address of the guest has to be aligned here. Sizes need not be whole pages.
        if (guest_addr - fd_offset) % PAGE_SIZE:
            raise LentMemoryError(f"{what} lies askew in its file, at {fd_offset:#x}")
        if guest_addr + size > _ADDRESSES:
            raise LentMemoryError(f"{what} leaves the address space")
        try:
            status = os.fstat(fd)
        except OSError as error:
            raise HostError(error.errno or 0, "fstat") from None
        if not stat.S_ISREG(status.st_mode):
            raise LentMemoryError(f"{what} is not in a file of memory")
        end = fd_offset + size
        if end > status.st_size:
            raise LentMemoryError(f"{what} ends at {end:#x} of a file of {status.st_size:#x} bytes")
        # From the file's start, as a file of huge pages takes no other offset of ours for granted.
        mapping = syscalls.map_shared(fd, end)
        view = memoryview(mapping)[fd_offset:end]
        return Region(guest_addr, size, fd_offset, _address(mapping) + fd_offset, view)


def check_disjoint(regions: tuple[Region, ...]) -> None:
    """Raises LentMemoryError for two regions that overlap."""
    end = -1
    for region in sorted(regions, key=lambda region: region.guest_addr):
        if region.guest_addr < end:
            raise LentMemoryError(f"the region at {region.guest_addr:#x} overlaps another")
        end = region.end


def _address(mapping: mmap.mmap) -> int:
    return int(_ffi.cast("uintptr_t", _ffi.from_buffer(mapping)))
