"""The header of an overlay's file, and opening one: nothing in it is believed unchecked.

struct, little endian, in the file's first 512 bytes; the rest of its 4 KiB is zero.

    offset  size
         0     8  magic
         8     4  version, 2
        12     4  log2 of the cluster size
        16     8  size of the base in bytes
        24    32  identity of the base
        56     8  size of the disk in bytes
        64     8  offset of the data
        72     8  how many bytes of the base show through
        80     4  CRC-32 of the 80 bytes before

Version 1 had no disk of another size: its checksum is at 56, and the data follow the bitmap.

The identity is a hash of samples of the base's content, not its name or times: a base may be moved
and copied. It finds a base that was replaced, or written to in the usual way (a file system that
was mounted has changed its first blocks).
"""

from __future__ import annotations

import errno
import os
import struct
import zlib

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import handed
from pyvmm.host.files import SECTOR, open_image, preadv_all
from pyvmm.virtio.blk.backend import Backend
from pyvmm.virtio.blk.overlay import OverlayBackend
from pyvmm.virtio.blk.overlay_layout import PAGE, Layout, layout_for

MAGIC = b"pyvmmOVL"
VERSION = 2
_FIELDS = struct.Struct("<8sIIQ32sQQQ")
_FIELDS_1 = struct.Struct("<8sIIQ32s")
_RESTORE = "restore it, or remove it to begin anew"
_SAMPLE = 4096
_FIRST_SAMPLES = 16  # the first 64 KiB whole: partition table, superblock
_SPREAD_SAMPLES = 48


def identity(base: Backend) -> bytes:
    """32 bytes that differ for bases that differ in what is looked at. Raises HostError."""
    from hashlib import blake2b

    size = base.size_sectors * SECTOR
    step = max(_SAMPLE, size // _SPREAD_SAMPLES // _SAMPLE * _SAMPLE)
    first = range(0, min(size, _FIRST_SAMPLES * _SAMPLE), _SAMPLE)
    digest = blake2b(size.to_bytes(8, "little"), digest_size=32)
    for offset in sorted({*first, *range(0, size, step)}):
        sample = bytearray(min(_SAMPLE, size - offset))
        base.readv([memoryview(sample)], len(sample), offset)
        digest.update(sample)
    return digest.digest()


def open_overlay(base: Backend, path: str) -> OverlayBackend:
    """`base` with the changes in the overlay file at `path`, which is made if it is not there.

    Locked for us alone until closed. Raises ConfigError for a file that is not an overlay of
    this base; HostError.
    """
    size = base.size_sectors * SECTOR
    mark = identity(base)
    if not (handed.has(path) or os.path.lexists(path)):
        _create(path, layout_for(size), size, mark)
    image = open_image(path)
    try:
        layout = read_header(path, image.fd, size, mark)
        bitmap = bytearray(layout.bitmap_size)
        if preadv_all(image.fd, [memoryview(bitmap)], PAGE) != len(bitmap):
            raise _refusal(path, "is cut short", _RESTORE)
    except OSError as error:
        image.close()
        raise HostError(error.errno or 0, f"read of {path}") from None
    except BaseException:
        image.close()
        raise

    def write_header(layout: Layout) -> None:
        try:
            os.pwrite(image.fd, header(layout, size, mark), 0)
        except OSError as error:
            raise HostError(error.errno or 0, f"write of {path}") from None

    return OverlayBackend(base, image, layout, bitmap, write_header)


def is_unused(path: str) -> bool:
    """True if the overlay's file at `path` is not there, or has nothing behind its header."""
    try:
        with open(path, "rb") as file:
            os.lseek(file.fileno(), PAGE, os.SEEK_DATA)
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENXIO)
    return False


def header(layout: Layout, base_size: int, mark: bytes) -> bytes:
    """The 4 KiB of it. What changes later is within one sector, which storage writes as one."""
    fields = _FIELDS.pack(
        *(MAGIC, VERSION, layout.cluster_bits, base_size, mark),
        *(layout.size, layout.data_offset, layout.shown),
    )
    return (fields + struct.pack("<I", zlib.crc32(fields))).ljust(PAGE, b"\0")


def _create(path: str, layout: Layout, base_size: int, mark: bytes) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _refusal(path, f"cannot be made: {error.strerror}", "name another") from None
    try:
        try:
            os.pwrite(fd, header(layout, base_size, mark), 0)
            os.ftruncate(fd, layout.file_size)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        os.unlink(path)
        raise _refusal(path, f"cannot be made: {error.strerror}", "name another") from None


def read_header(path: str, fd: int, base_size: int, mark: bytes) -> Layout:
    header = os.pread(fd, SECTOR, 0)
    if not header.startswith(MAGIC) or len(header) < SECTOR:
        raise _refusal(path, "is not an overlay", "name a new file, or one that pyvmm made")
    version = int.from_bytes(header[8:12], "little")
    if version not in (1, VERSION):
        raise _refusal(path, f"has version {version}", f"this pyvmm reads version {VERSION}")
    fields = _FIELDS_1 if version == 1 else _FIELDS
    checksum = header[fields.size : fields.size + 4]
    if zlib.crc32(header[: fields.size]) != int.from_bytes(checksum, "little"):
        raise _refusal(path, "has a damaged header", _RESTORE)
    _, _, bits, size, base, *rest = fields.unpack(header[: fields.size])
    if size != base_size:
        raise _refusal(
            path, f"is for a base of {size} bytes, not {base_size}", "give it the base it had"
        )
    if base != mark:
        raise _refusal(
            path, "is for another base, or its base has changed", "give it the base as it was"
        )
    layout = layout_for(base_size)
    if bits != layout.cluster_bits:
        raise _refusal(path, f"has clusters of 2**{bits} bytes", "remove it to begin anew")
    if version == 1:
        layout = layout._replace(data_offset=PAGE + layout.bitmap_size)
    else:
        size, data_offset, shown = rest
        if data_offset % PAGE or data_offset > layout.data_offset:
            raise _refusal(path, f"has its data at {data_offset:#x}", _RESTORE)
        layout = Layout(size, bits, data_offset, shown)
    _check(path, fd, layout, base_size)
    return layout


def _check(path: str, fd: int, layout: Layout, base_size: int) -> None:
    size = layout.size
    # The room before the data bounds the size, and so what is read of the bitmap.
    too_large = PAGE + layout.bitmap_size > layout.data_offset
    if size < SECTOR or size % SECTOR or too_large or layout.shown > min(size, base_size):
        raise _refusal(path, f"cannot be for a disk of {size} bytes", _RESTORE)
    if os.lseek(fd, 0, os.SEEK_END) < layout.file_size:
        raise _refusal(path, "is cut short", _RESTORE)


def _refusal(path: str, what: str, cure: str) -> ConfigError:
    return ConfigError(f"the overlay {path} {what}", cure=cure, option="--disk")
