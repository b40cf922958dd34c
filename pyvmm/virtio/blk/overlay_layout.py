"""The layout of an overlay's file; see `overlay`."""

from __future__ import annotations

import errno
from typing import NamedTuple

from pyvmm.errors import HostError

PAGE = 4096
_MIN_CLUSTER_BITS = 12
_MAX_BITMAP = 1 << 20  # bytes; 32 GiB have clusters of 4 KiB, larger disks larger ones
_MIN_ROOM = 1 << 20  # for the bitmap, kept free in the sparse file: any disk can grow to 32 GiB,
_GROWTH = 16  # and to this many times its size


class Layout(NamedTuple):
    """The layout of an overlay's file, in bytes, for a disk of `size` bytes; of the base
    `shown` bytes show through."""

    size: int
    cluster_bits: int
    data_offset: int
    shown: int

    @property
    def bitmap_size(self) -> int:
        """The size of the bitmap, in whole pages."""
        return _bitmap_size(self.size, self.cluster_bits)

    @property
    def file_size(self) -> int:
        """The least size of the file."""
        bits = self.cluster_bits
        return self.data_offset + (self.size + (1 << bits) - 1 >> bits << bits)

    def resized(self, size: int) -> Layout:
        """For another size: nothing moves. Raises HostError, EFBIG, if the bitmap has no room."""
        if PAGE + _bitmap_size(size, self.cluster_bits) > self.data_offset:
            largest = (self.data_offset - PAGE) * 8 << self.cluster_bits
            raise HostError(
                errno.EFBIG,
                f"resize of an overlay that has room for {largest} bytes",
                cure="copy the disk to a larger image",
            )
        return self._replace(size=size, shown=min(size, self.shown))


def _bitmap_size(size: int, cluster_bits: int) -> int:
    clusters = size + (1 << cluster_bits) - 1 >> cluster_bits
    return -(-clusters // (8 * PAGE)) * PAGE


def layout_for(size: int) -> Layout:
    """The layout of a new overlay over `size` bytes; the same for the same size."""
    bits = _MIN_CLUSTER_BITS
    while size >> bits > _MAX_BITMAP * 8:
        bits += 1
    room = max(_MIN_ROOM, _GROWTH * _bitmap_size(size, bits))
    return Layout(size, bits, PAGE + room, size)
