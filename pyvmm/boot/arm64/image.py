"""Linux' Image for arm64: its header, and the files that it comes in (Linux
Documentation/arch/arm64/booting.rst, "Call the kernel image").

Distributions have it as it is, compressed by gzip or zstd, or in an EFI program that unpacks it
(Linux drivers/firmware/efi/libstub/zboot-header.S), which is taken apart here. What is compressed
is unpacked straight into guest memory, and never past what its header asks for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pyvmm.boot.arm64 import layout
from pyvmm.boot.file_kinds import (
    ELF_MACHINES,
    ELF_MAGIC,
    EM_386,
    EM_AARCH64,
    EM_X86_64,
    HEAD,
    not_a_kernel,
)
from pyvmm.boot.image_file import ImageFile
from pyvmm.boot.unpack import GZIP, unpack
from pyvmm.errors import ConfigError
from pyvmm.memory import GuestMemory

HEADER_SIZE = 64
_MAGIC_OFFSET, _MAGIC, _RISCV = 56, b"ARM\x64", b"RSC\x05"
_PAGE = 4096  # bytes, the smallest that a kernel has; it is linked to begin with one
_BIG_ENDIAN = 1 << 0
_PLAUSIBLE_MIB = 1 << 12  # what says more is not a header
_ZSTD = b"\x28\xb5\x2f\xfd"
_PACKED = (GZIP, _ZSTD)
_METHODS = (b"gzip", b"zstd", b"zstd22")  # as a zboot names them
_EFI, _ZBOOT = b"MZ", b"zimg"
_MOST = 1 << 30  # bytes, as of a kernel for x86
_MOST_PACKED = 512 << 20  # bytes, which are in memory; Debian's have 15 MiB
_CHUNK = 4 << 20

_HOW_X86 = "use --arch x86_64, or a kernel for arm64"
_HOW_OTHER = "use one for arm64"
_ELF_X86 = (EM_386, EM_X86_64)


class Image(NamedTuple):
    """A checked header: where it goes from an address that is a multiple of 2 MiB, and how much
    memory it needs there."""

    text_offset: int
    size: int


def load(memory: GuestMemory, kernel: ImageFile) -> tuple[int, int]:
    """Put the kernel into fresh RAM; where it begins, and the end of what it needs. Raises
    ConfigError."""
    head = kernel.read(0, HEAD)
    is_plain = _is_plain(head)
    image, pieces = (parse(kernel, head), iter(())) if is_plain else contents(kernel)
    ram = memory.regions[0]
    start = at = ram.guest_addr + image.text_offset
    end = start + image.size
    if end > ram.end:
        needed = -(-(end - ram.guest_addr) // layout.MIB)
        raise kernel.error(
            f"{kernel.path} needs {needed} MiB of memory to start, the guest has "
            f"{ram.size // layout.MIB} MiB",
            "is the file damaged?" if needed > _PLAUSIBLE_MIB else f"give it --memory {needed}M",
        )
    if is_plain:
        if kernel.size > _most(image):
            raise _too_long(kernel, image)
        kernel.read_into(memory.view(start, kernel.size), 0)
    for piece in pieces:
        memory.write(at, piece)
        at += len(piece)
    return start, end


def contents(kernel: ImageFile) -> tuple[Image, Iterator[bytes]]:
    """The header, and the bytes of the Image, unpacked, in pieces: no more than the header says,
    and 1 GiB at most. Raises ConfigError, also while the pieces are taken."""
    pieces = _pieces(kernel)
    first = next(pieces, b"")
    image = parse(kernel, first)
    return image, _within(kernel, image, _and(first, pieces))


def _within(kernel: ImageFile, image: Image, pieces: Iterator[bytes]) -> Iterator[bytes]:
    left = _most(image)
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            raise _too_long(kernel, image)
        yield piece


def _most(image: Image) -> int:
    return min(image.size, _MOST)


def _too_long(kernel: ImageFile, image: Image) -> ConfigError:
    most = _most(image)
    why = "that its header says" if most == image.size else "that a kernel may have"
    return kernel.error(f"{kernel.path} is damaged: it has more than the {most} bytes {why}")


def parse(kernel: ImageFile, head: bytes) -> Image:
    """Check the header in `head`, what an Image begins with. Raises ConfigError."""
    if len(head) < HEADER_SIZE or not has_magic(head):
        if head[_MAGIC_OFFSET:].startswith(_RISCV):  # which comes in the same EFI programs
            raise kernel.error(f"{kernel.path} is a kernel for RISC-V", _HOW_OTHER)
        raise kernel.error(f"{kernel.path} is damaged: its content is not an Image for arm64")
    text_offset, size, flags = struct.unpack_from("<3Q", head, 8)
    if size == 0:
        raise kernel.error(
            f"{kernel.path} does not say how much memory it needs",
            "use a kernel of Linux 3.17 or later",
        )
    if flags & _BIG_ENDIAN:
        raise kernel.error(f"{kernel.path} is a big-endian kernel", "use a little-endian one")
    if text_offset >= layout.KERNEL_ALIGN or text_offset % _PAGE:
        raise kernel.error(f"{kernel.path} is damaged: its text_offset is {text_offset:#x}")
    return Image(text_offset, size)


def has_magic(head: bytes) -> bool:
    """True if a file that begins with `head` is an Image, not compressed."""
    return head[_MAGIC_OFFSET : _MAGIC_OFFSET + len(_MAGIC)] == _MAGIC


def _and(first: bytes, rest: Iterable[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _pieces(kernel: ImageFile) -> Iterator[bytes]:
    head = kernel.read(0, HEAD)
    if _is_zboot(head):
        return _unpacked(kernel, *_zboot(kernel, head))
    if head.startswith(_PACKED):
        return _unpacked(kernel, 0, kernel.size)
    if _is_plain(head):
        return kernel.pieces(_CHUNK, kernel.size)
    raise _not_a_kernel(kernel, head)


def _is_zboot(head: bytes) -> bool:
    return head.startswith(_EFI) and head[4:8] == _ZBOOT


def _is_plain(head: bytes) -> bool:
    return has_magic(head) and not _is_zboot(head) and not head.startswith(_PACKED)


def _zboot(kernel: ImageFile, head: bytes) -> tuple[int, int]:
    """(offset, size) of the payload of an EFI program that unpacks a kernel."""
    offset, size = struct.unpack_from("<2I", head.ljust(HEADER_SIZE, b"\0"), 8)
    method = head[24:56].split(b"\0", 1)[0]
    if not size or offset + size > kernel.size:
        raise kernel.error(
            f"{kernel.path} is truncated: its payload lies past its end", "copy or build it again"
        )
    if not kernel.read(offset, 4).startswith(_PACKED):
        said = method.decode("ascii", "replace")
        if method in _METHODS:
            raise kernel.error(
                f"{kernel.path} is damaged: its payload is not in the {said} that it says",
                "copy or build it again",
            )
        said = said if said and said.isprintable() else "something unknown"
        raise kernel.error(
            f"{kernel.path} is compressed by {said}", "use one that is compressed by gzip or zstd"
        )
    return offset, size


def _unpacked(kernel: ImageFile, offset: int, size: int) -> Iterator[bytes]:
    if size > _MOST_PACKED:
        raise kernel.error(f"{kernel.path} has {size} bytes of compressed data: it is not a kernel")
    # The header is in the first piece, however little the first one is.
    pieces = unpack(kernel, kernel.read(offset, size))
    first = b""
    for piece in pieces:
        first += piece
        if len(first) >= HEADER_SIZE:
            break
    return _and(first, pieces)


def _not_a_kernel(kernel: ImageFile, head: bytes) -> ConfigError:
    if head.startswith(ELF_MAGIC):
        machine = int.from_bytes(head[18:20], "big" if head[5:6] == b"\2" else "little")
        if machine in _ELF_X86:
            return kernel.error(f"{kernel.path} is an ELF kernel for x86", _HOW_X86)
        if machine != EM_AARCH64 and machine in ELF_MACHINES:
            what = ELF_MACHINES[machine]
            return kernel.error(f"{kernel.path} is an ELF file for {what}", _HOW_OTHER)
        return kernel.error(
            f"{kernel.path} is an ELF file", "use the Image that is built beside vmlinux"
        )
    wanted = "not an Image for arm64 (it lacks its magic number)"
    return not_a_kernel(kernel, head, wanted, "/boot/vmlinuz-* of an arm64 Debian")
