"""Take the ELF vmlinux out of a bzImage.

A bzImage unpacks itself in the guest, which takes memory and, where the guest is emulated, seconds.
What it holds is an ELF with a PVH note, which starts at once. Source: Linux boot.rst,
payload_offset and payload_length; the compressors are those of Linux scripts/Makefile.lib, which
append the unpacked size in four bytes (gzip has it in its own trailer).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from pyvmm.boot.image_file import ImageFile
from pyvmm.boot.x86 import bzimage, detect
from pyvmm.errors import ConfigError

_ELF_MAGIC = b"\x7fELF"
_MAX_UNPACKED = 1 << 30
_MAX_PAYLOAD = 512 << 20  # bytes, which are in memory; a kernel of Debian's has 12 MiB
_SIZE_FIELD = 4
_CHUNK = 1 << 20
# Bytes of memory that a payload may ask for: xz and zstd have windows of 128 MiB at most there.
_WINDOW = 128 << 20
_PROGRAM_MEMORY = 1 << 30  # address space, most of which threads only reserve


def unpack_vmlinux(path: str, output: str) -> None:
    """Write the ELF vmlinux in the bzImage at `path` to the file `output`, whole or not at all.

    The file may be longer than the ELF: relocations, which only the bzImage needs, follow it.
    It has 1 GiB at most, and little of it is in memory at a time.
    Raises ConfigError for a file that is not a bzImage, a payload that is damaged, or a compressor
    that this machine has no program for.
    """
    partial = f"{output}.{os.getpid()}.part"
    try:
        with ImageFile(path, "--kernel") as kernel, open(partial, "wb") as file:
            if detect.kind_of(kernel) != detect.BZIMAGE:
                raise kernel.error(f"{path} is an ELF already")
            for piece in unpacked(kernel):
                if not file.tell() and not piece.startswith(_ELF_MAGIC):
                    raise kernel.error(f"{path}: what it unpacks to is not an ELF file")
                file.write(piece)
        os.replace(partial, output)
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {os.strerror(error.errno or 0)}") from None
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def unpacked(kernel: ImageFile) -> Iterator[bytes]:
    """What the payload of a bzImage unpacks to, in pieces: 1 GiB at most. Raises ConfigError."""
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
    unpacker = next((known for magic, known in _UNPACKERS if payload.startswith(magic)), None)
    if unpacker is None:
        raise kernel.error(f"{kernel.path} has a payload of an unknown kind: {payload[:6].hex()}")
    size = int.from_bytes(payload[-_SIZE_FIELD:], "little")
    if not 0 < size <= _MAX_UNPACKED:
        raise kernel.error(f"{kernel.path} is damaged: its payload would unpack to {size} bytes")
    left = size
    for piece in unpacker(kernel, payload):
        left -= len(piece)
        if left < 0:
            break
        yield piece
    if left:
        raise kernel.error(
            f"{kernel.path} is damaged: its payload does not unpack to the {size} bytes it says"
        )


_Unpacker = Callable[[ImageFile, bytes], Iterator[bytes]]


def _library(begin: Callable[[bytes], Callable[[], bytes]]) -> _Unpacker:
    """An unpacker that calls what `begin` makes of a payload until there is no more."""

    def unpack(kernel: ImageFile, payload: bytes) -> Iterator[bytes]:
        try:
            following = begin(payload)
            while piece := following():
                yield piece
        # zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError, ValueError, …
        except Exception as error:
            if isinstance(error, ConfigError):
                raise
            raise kernel.error(f"{kernel.path} has a damaged payload: {error}") from None

    return unpack


def _gzip(payload: bytes) -> Callable[[], bytes]:
    import zlib

    one = zlib.decompressobj(zlib.MAX_WBITS | 16)
    rest = payload

    def following() -> bytes:
        nonlocal rest
        piece = one.decompress(rest, _CHUNK)
        rest = one.unconsumed_tail
        return piece

    return following


def _bzip2(payload: bytes) -> Callable[[], bytes]:
    import bz2

    return _stream(bz2.BZ2Decompressor(), payload)


def _xz(payload: bytes) -> Callable[[], bytes]:
    import lzma  # reads .xz and the older .lzma alike, with the x86 branch filter

    return _stream(lzma.LZMADecompressor(memlimit=2 * _WINDOW), payload)


def _stream(one: Any, payload: bytes) -> Callable[[], bytes]:
    rest = payload

    def following() -> bytes:
        nonlocal rest
        if one.eof or (one.needs_input and not rest):
            return b""
        given, rest = rest, b""
        piece: bytes = one.decompress(given, _CHUNK)
        return piece

    return following


def _zstd(payload: bytes) -> Callable[[], bytes]:
    import zstandard

    one = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(payload[:-_SIZE_FIELD])
    return lambda: one.read(_CHUNK)


def _command(program: str, package: str) -> _Unpacker:
    """An unpacker that pipes through `program`, which Debian has in `package`."""

    def unpack(kernel: ImageFile, payload: bytes) -> Iterator[bytes]:
        import subprocess

        from pyvmm.host import confinement
        from pyvmm.host.programs import find_program

        path = find_program(program)
        if path is None:
            raise kernel.error(
                f"{kernel.path} is compressed with {program}, which is not installed",
                f"apt install {package}",
            )
        path = os.path.realpath(path)
        room = confinement.for_system_program(path, _PROGRAM_MEMORY)
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
            stdin.write(payload[:-_SIZE_FIELD])
            stdin.seek(0)
            process = subprocess.Popen(
                confinement.command(room, [path, "-dc"]),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
            assert process.stdout is not None
            try:
                while piece := process.stdout.read(_CHUNK):
                    yield piece
                status = process.wait()
            finally:
                process.kill()
                process.wait()
                process.stdout.close()
            stderr.seek(0)
            said = stderr.read(_CHUNK).decode(errors="replace").strip().rpartition("\n")[2]
        if status:
            reason = said.encode("ascii", "backslashreplace").decode()
            raise kernel.error(f"{kernel.path} has a damaged payload: {reason or status}")

    return unpack


_UNPACKERS: tuple[tuple[bytes, _Unpacker], ...] = (
    (b"\x1f\x8b", _library(_gzip)),
    (b"BZh", _library(_bzip2)),
    (b"\xfd7zXZ\0", _library(_xz)),
    (b"\x5d\0\0", _library(_xz)),
    (b"\x28\xb5\x2f\xfd", _library(_zstd)),
    (b"\x02\x21\x4c\x18", _command("lz4", "lz4")),  # the legacy frame, which the kernel uses
    (b"\x89LZO", _command("lzop", "lzop")),
)
