"""preadv2(2) with RWF_NOWAIT, for a Python without os.RWF_NOWAIT.

Such a one was built with a musl before 1.2.5, a C library that does not have the call.
"""

from __future__ import annotations

import ctypes
import os

from pyvmm.host.call_names import number_of
from pyvmm.host.confinement import call_kernel

_RWF_NOWAIT = 8  # <linux/fs.h>


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read(fd: int, buffer: bytearray) -> int:
    """Read what is there now into `buffer`, at the file's position; how many bytes. Raises OSError,
    BlockingIOError where it would have to wait, whatever O_NONBLOCK of the file is."""
    place = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    part = _IoVec(ctypes.addressof(place), len(buffer))
    count = call_kernel(number_of("preadv2"), fd, ctypes.byref(part), 1, -1, -1, _RWF_NOWAIT)
    if count < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return count
