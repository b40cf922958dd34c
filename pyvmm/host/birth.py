"""When a file was made: statx(2), which Python's os.stat does not give."""

from __future__ import annotations

import ctypes
import os
import struct

# <linux/fcntl.h>, <linux/stat.h>
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW = -100, 0x100
_STATX_BTIME = 0x800
_SIZE, _BTIME = 256, struct.Struct("=qI")  # of struct statx; of its stx_btime
_BTIME_OFFSET = 80


def born_ns(path: str) -> int:
    """When the file at `path`, a link itself, was made: nanoseconds since the epoch, which nobody
    can set; 0 where the file system does not keep it. Raises OSError."""
    statx = ctypes.CDLL(None, use_errno=True).statx
    found = ctypes.create_string_buffer(_SIZE)
    name = os.fsencode(path)
    if statx(_AT_FDCWD, name, _AT_SYMLINK_NOFOLLOW, _STATX_BTIME, found):
        raise OSError(ctypes.get_errno(), "statx", path)
    [has] = struct.unpack_from("=I", found)
    if not has & _STATX_BTIME:
        return 0
    seconds, nanoseconds = _BTIME.unpack_from(found, _BTIME_OFFSET)
    born: int = seconds * 1_000_000_000 + nanoseconds
    return born
