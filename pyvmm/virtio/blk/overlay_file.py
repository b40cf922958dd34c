"""The header of an overlay's file, and opening one: nothing in it is believed unchecked.

struct, little endian, in the file's first 512 bytes; the rest of its 4 KiB is zero.

    offset  size
         0     8  magic
         8     4  version, 1
        12     4  log2 of the cluster size
        16     8  size of the base in bytes
        24    32  identity of the base
        56     4  CRC-32 of the 56 bytes before

The identity is a hash of samples of the base's content, not its name or times: a base may be moved
and copied. It finds a base that was replaced, or written to in the usual way (a file system that
was mounted has changed its first blocks).
"""

from __future__ import annotations

import os
import struct
import zlib

from pyvmm.errors import ConfigError, HostError
from pyvmm.host.files import SECTOR, open_image, preadv_all
from pyvmm.virtio.blk.backend import Backend
from pyvmm.virtio.blk.overlay import PAGE, Layout, OverlayBackend, layout_for

MAGIC = b"pyvmmOVL"
VERSION = 1
_FIELDS = struct.Struct("<8sIIQ32s")
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

    Locked for us alone until closed. Raises ConfigError for a file that is no overlay, or not one
    of this base; HostError.
    """
    layout = layout_for(base.size_sectors * SECTOR)
    mark = identity(base)
    if not os.path.lexists(path):
        _create(path, layout, mark)
    image = open_image(path)
    try:
        _check(path, image.fd, layout, mark)
        bitmap = bytearray(layout.bitmap_size)
        if preadv_all(image.fd, [memoryview(bitmap)], PAGE) != len(bitmap):
            raise _refusal(path, "is cut short", "restore it, or remove it to begin anew")
    except OSError as error:
        image.close()
        raise HostError(error.errno or 0, f"read of {path}") from None
    except BaseException:
        image.close()
        raise
    return OverlayBackend(base, image, bitmap, keep=True)


def _create(path: str, layout: Layout, mark: bytes) -> None:
    fields = _FIELDS.pack(MAGIC, VERSION, layout.cluster_bits, layout.size, mark)
    header = fields + struct.pack("<I", zlib.crc32(fields))
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _refusal(path, f"cannot be made: {error.strerror}", "name another") from None
    try:
        try:
            os.pwrite(fd, header.ljust(PAGE, b"\0"), 0)
            os.ftruncate(fd, layout.file_size)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        os.unlink(path)
        raise _refusal(path, f"cannot be made: {error.strerror}", "name another") from None


def _check(path: str, fd: int, layout: Layout, mark: bytes) -> None:
    header = os.pread(fd, _FIELDS.size + 4, 0)
    if not header.startswith(MAGIC) or len(header) < _FIELDS.size + 4:
        raise _refusal(path, "is not an overlay", "name a new file, or one that pyvmm made")
    fields = header[: _FIELDS.size]
    _, version, cluster_bits, size, base = _FIELDS.unpack(fields)
    if version != VERSION:
        raise _refusal(path, f"has version {version}", f"this pyvmm reads version {VERSION}")
    if zlib.crc32(fields) != int.from_bytes(header[_FIELDS.size :], "little"):
        raise _refusal(path, "has a damaged header", "restore it, or remove it to begin anew")
    if size != layout.size:
        raise _refusal(
            path, f"is for a base of {size} bytes, not {layout.size}", "give it the base it had"
        )
    if base != mark:
        raise _refusal(
            path, "is for another base, or its base has changed", "give it the base as it was"
        )
    if cluster_bits != layout.cluster_bits:
        raise _refusal(path, f"has clusters of 2**{cluster_bits} bytes", "remove it to begin anew")
    if os.lseek(fd, 0, os.SEEK_END) < layout.file_size:
        raise _refusal(path, "is cut short", "restore it, or remove it to begin anew")


def _refusal(path: str, what: str, cure: str) -> ConfigError:
    return ConfigError(f"the overlay {path} {what}", cure=cure, option="--disk")
