"""A disk of one's own from a pristine image."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os

from pyvmm.errors import ConfigError

_FICLONE = 0x40049409  # <linux/fs.h>: _IOW(0x94, 9, int)
_CHUNK = 8 << 20


def copy_sparse(source: str, target: str) -> None:
    """Copy `source` to `target`, which is replaced: shared blocks where the file system can.

    Otherwise only what is not a hole is copied. Raises ConfigError; a half copy is removed.
    """
    # In a folder of many users nobody is to guess it, and put a link there.
    temporary = f"{target}.{os.urandom(8).hex()}.part"
    try:
        with open(source, "rb") as reader, open(temporary, "xb") as writer:
            _fill(reader.fileno(), writer.fileno())
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first failure is the one to report
            os.unlink(temporary)
        raise ConfigError(f"cannot copy {source} to {target}: {error.strerror}") from None


def _fill(reader: int, writer: int) -> None:
    with contextlib.suppress(OSError):  # Whatever is really wrong, copying meets it again.
        fcntl.ioctl(writer, _FICLONE, reader)
        return
    size = os.fstat(reader).st_size
    os.ftruncate(writer, size)
    position = 0
    while position < size:
        try:
            start = os.lseek(reader, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        position = os.lseek(reader, start, os.SEEK_HOLE)
        _copy_range(reader, writer, start, position)


def _copy_range(reader: int, writer: int, start: int, end: int) -> None:
    while start < end:
        data = os.pread(reader, min(_CHUNK, end - start), start)
        if not data:
            return
        written = 0
        while written < len(data):
            written += os.pwrite(writer, memoryview(data)[written:], start + written)
        start += len(data)
