"""Take the ELF vmlinux out of a bzImage.

A bzImage unpacks itself in the guest, which takes memory and, where the guest is emulated, seconds.
What it holds is an ELF with a PVH note, which starts at once. Source: Linux boot.rst,
payload_offset and payload_length; the compressors are those of Linux scripts/Makefile.lib, which
append the unpacked size in four bytes (gzip has it in its own trailer).
"""

from __future__ import annotations

from collections.abc import Iterator

from pyvmm.boot.image_file import ImageFile, write_whole
from pyvmm.boot.unpack import GZIP, check_kind, unpack
from pyvmm.boot.x86 import bzimage, detect

_ELF_MAGIC = b"\x7fELF"
_MAX_UNPACKED = 1 << 30
_MAX_PAYLOAD = 512 << 20  # bytes, which are in memory; a kernel of Debian's has 12 MiB
_SIZE_FIELD = 4


def unpack_vmlinux(path: str, output: str) -> None:
    """Write the ELF vmlinux in the bzImage at `path` to the file `output`, whole or not at all.

    The file may be longer than the ELF: relocations, which only the bzImage needs, follow it.
    It has 1 GiB at most, and little of it is in memory at a time.
    Raises ConfigError for a file that is not a bzImage, a payload that is damaged, or a compressor
    that this machine has no program for.
    """
    with ImageFile(path, "--kernel") as kernel:
        if detect.kind_of(kernel) != detect.BZIMAGE:
            raise kernel.error(f"{path} is an ELF already")
        write_whole(output, _elf_pieces(kernel))


def _elf_pieces(kernel: ImageFile) -> Iterator[bytes]:
    pieces = unpacked(kernel)
    first = next(pieces, b"")
    if not first.startswith(_ELF_MAGIC):
        raise kernel.error(f"{kernel.path}: what it unpacks to is not an ELF file")
    yield first
    yield from pieces


def unpacked(kernel: ImageFile) -> Iterator[bytes]:
    """The unpacked payload of a bzImage, in pieces: 1 GiB at most. Raises ConfigError."""
    return _unpack(kernel, _payload(kernel))


def _payload(kernel: ImageFile) -> bytes:
    image = bzimage.parse(kernel)
    offset = image.setup_size + image.payload_offset
    if not image.payload_length or image.payload_offset + image.payload_length > image.code_size:
        raise kernel.error(f"{kernel.path} is damaged: its payload does not lie within it")
    if image.payload_length > _MAX_PAYLOAD:
        raise kernel.error(f"{kernel.path} has a payload of {image.payload_length} bytes")
    return kernel.read(offset, image.payload_length)


def _unpack(kernel: ImageFile, payload: bytes) -> Iterator[bytes]:
    """The unpacked bytes, in pieces that are not empty."""
    if payload.startswith(_ELF_MAGIC):
        yield payload  # CONFIG_KERNEL_UNCOMPRESSED
        return
    check_kind(kernel, payload)
    size = int.from_bytes(payload[-_SIZE_FIELD:], "little")
    if not 0 < size <= _MAX_UNPACKED:
        raise kernel.error(f"{kernel.path} is damaged: its payload would unpack to {size} bytes")
    left = size
    stream = payload if payload.startswith(GZIP) else payload[:-_SIZE_FIELD]
    for piece in unpack(kernel, stream):
        left -= len(piece)
        if left < 0:
            break
        yield piece
    if left:
        raise kernel.error(
            f"{kernel.path} is damaged: its payload does not unpack to the {size} bytes it says"
        )
