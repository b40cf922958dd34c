"""Regions of guest RAM that lie next to each other, seen as one: a buffer may begin in the one and
end in the other, as a guest knows nothing of where its monitor's memory comes from.

They come from several files, so the pages are mapped a second time, side by side: mremap(2) with an
old size of 0 maps what is shared once more, and needs no file descriptor.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import _cffi_backend

from pyvmm.memory.guest_memory import PAGE_SIZE, Region

_ffi = _cffi_backend.FFI()
_FAILED = ctypes.c_void_p(-1).value
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2  # <linux/mman.h>
_NORESERVE = 0x4000  # <asm-generic/mman.h> MAP_NORESERVE
_given_up: list[mmap.mmap] = []
_mremap = ctypes.CDLL(None).mremap
_mremap.restype = ctypes.c_void_p
_mremap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p,
)  # fmt: skip


def join(regions: Sequence[Region]) -> list[Region]:
    """The regions, which are disjoint, with those that touch made one.

    Where that cannot be (pages of different sizes, say) they stay apart.
    """
    joined: list[Region] = []
    for group in _touching(regions):
        whole = _side_by_side(group) if len(group) > 1 else None
        joined += group if whole is None else [whole]
    return joined


def _touching(regions: Sequence[Region]) -> list[list[Region]]:
    groups: list[list[Region]] = []
    end = -1
    for region in sorted(regions, key=lambda region: region.guest_addr):
        if region.guest_addr != end or region.guest_addr % PAGE_SIZE:
            groups.append([])
        groups[-1].append(region)
        end = region.end
    return groups


def _side_by_side(group: list[Region]) -> Region | None:
    start, size = group[0].guest_addr, group[-1].end - group[0].guest_addr
    if start % PAGE_SIZE:
        return None
    try:
        # Holds the addresses; what it maps itself is never touched.
        mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    except (OSError, OverflowError):
        return None
    base = int(_ffi.cast("uintptr_t", _ffi.from_buffer(mapping)))
    for region in group:
        there = base + region.guest_addr - start
        how = _MREMAP_MAYMOVE | _MREMAP_FIXED
        # A mapping has whole pages, and is as long as the part of the last page that counts.
        length = -(-region.size // PAGE_SIZE) * PAGE_SIZE
        if _mremap(region.host_addr, 0, length, how, there) in (_FAILED, None):
            # It may have left a hole, where by now something else could be: not ours to unmap.
            _given_up.append(mapping)
            return None
    return Region(start, size, group[0].fd_offset, base, memoryview(mapping))
