"""Holes and zeroed ranges in files and on block devices: fallocate(2) and BLKDISCARD.

What a file system cannot do it says by EOPNOTSUPP, and that is remembered: a guest may ask often.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator

from pyvmm.errors import HostError

# <linux/falloc.h>
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16
# <linux/fs.h>
BLKDISCARD = 0x1277

_PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_ZERO = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY)
_Fallocate = Callable[[int, int, int, int], None]


def punch(fd: int, offset: int, size: int) -> None:
    """Free `size` bytes at `offset` of the open file; they read as zeroes then. Other threads go on
    meanwhile, which they would not with mmap.madvise. Raises HostError."""
    try:
        _fallocate()(fd, _PUNCH, offset, size)
    except OSError as error:
        raise HostError(error.errno or 0, f"fallocate of {size} bytes") from None


def data_of(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges between `start` and `end` of an open file that may have anything but zeroes: each
    by where it begins and ends. A block device cannot tell, so all of it is one. Raises
    HostError."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
            hole = os.lseek(fd, start, os.SEEK_HOLE) if start < end else end
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is behind
                return
            if error.errno == errno.EINVAL:
                yield start, end
                return
            raise HostError(error.errno or 0, "lseek to what a file has") from None
        if start < end:
            yield start, min(hole, end)
        start = hole


class Holes:
    """Frees and zeroes ranges of one open file; which ways it has is found out on the way."""

    def __init__(self, fd: int, is_block_device: bool = False) -> None:
        self._fd = fd
        self._is_block_device = is_block_device
        self._missing: set[int] = set()

    def discard(self, offset: int, size: int) -> None:
        """Free `size` bytes at `offset` where that can be done. Raises OSError."""
        if self._is_block_device:
            self._attempt(BLKDISCARD, offset, size)
        else:
            self._attempt(_PUNCH, offset, size)

    def zero(self, offset: int, size: int, may_unmap: bool) -> bool:
        """Make the range read as zeroes, freeing it if `may_unmap` and possible; False, and
        nothing done, where only writing would do it. Raises OSError."""
        ways = (_PUNCH, _ZERO) if may_unmap else (_ZERO,)
        return any(self._attempt(way, offset, size) for way in ways)

    def _attempt(self, way: int, offset: int, size: int) -> bool:
        if way in self._missing:
            return False
        try:
            if way == BLKDISCARD:
                fcntl.ioctl(self._fd, BLKDISCARD, struct.pack("@QQ", offset, size))
            else:
                _fallocate()(self._fd, way, offset, size)
        except OSError as error:
            # A block device wants whole blocks of its own; a guest that has none is just refused.
            if error.errno == errno.EINVAL and self._is_block_device:
                return False
            if error.errno not in _UNSUPPORTED:
                raise
            self._missing.add(way)
            return False
        return True


_loaded: list[_Fallocate] = []


def _fallocate() -> _Fallocate:
    # Loaded when first needed: ctypes takes its time, and most guests never ask for it.
    if not _loaded:
        _loaded.append(_load())
    return _loaded[0]


def _load() -> _Fallocate:
    import ctypes

    number = ctypes.c_int64
    function = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, number, number)

    def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
        while function(fd, mode, offset, size) != 0:
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))

    return fallocate
