"""Unpacks what is compressed in a kernel file, by the methods that Linux' own makefiles have.

A stranger's data: what it unpacks to comes in pieces of at most 1 MiB, and whoever takes them says
when there are too many. Source: Linux scripts/Makefile.lib.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from pyvmm.boot.image_file import ImageFile
from pyvmm.errors import ConfigError

GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20
_GIVEN = 1 << 16
# Bytes of memory that a payload may ask for: xz and zstd have windows of 128 MiB at most there.
_WINDOW = 128 << 20
_CUT_OFF = "it is cut off"
_REPEATED = 1  # a block of zstd's that is one byte, many times
_PROGRAM_MEMORY = 1 << 30  # address space, most of which threads only reserve


def check_kind(kernel: ImageFile, payload: bytes) -> None:
    """Raise ConfigError unless `payload` begins as something that `unpack` knows."""
    if _unpacker(payload) is None:
        raise kernel.error(f"{kernel.path} has a payload of an unknown kind: {payload[:6].hex()}")


def unpack(kernel: ImageFile, payload: bytes) -> Iterator[bytes]:
    """The content of `payload`, compressed data in the file `kernel`, in pieces that are not
    empty. Raises ConfigError for data that is damaged, or of a kind that this machine has no
    program for."""
    check_kind(kernel, payload)
    unpacker = _unpacker(payload)
    assert unpacker is not None
    yield from unpacker(kernel, payload)


def _unpacker(payload: bytes) -> Unpacker | None:
    return next((known for magic, known in _UNPACKERS if payload.startswith(magic)), None)


Unpacker = Callable[[ImageFile, bytes], Iterator[bytes]]


def _library(begin: Callable[[bytes], Callable[[], bytes]]) -> Unpacker:
    """An unpacker that calls what `begin` makes of a payload until there is no more."""

    def one(kernel: ImageFile, payload: bytes) -> Iterator[bytes]:
        try:
            following = begin(payload)
            while piece := following():
                yield piece
        # zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError, ValueError, …
        except Exception as error:
            if isinstance(error, ConfigError):
                raise
            raise kernel.error(f"{kernel.path} has a damaged payload: {error}") from None

    return one


def _gzip(payload: bytes) -> Callable[[], bytes]:
    import zlib

    one = zlib.decompressobj(zlib.MAX_WBITS | 16)
    given, rest = 0, b""

    def following() -> bytes:
        nonlocal given, rest
        while not one.eof:
            is_last = not rest and given >= len(payload)
            if not rest:
                # A little at a time: what it does not take yet is copied.
                rest, given = payload[given : given + _GIVEN], given + _GIVEN
            piece = one.decompress(rest, _CHUNK)
            rest = one.unconsumed_tail
            if piece:
                return piece
            if is_last and not one.eof:
                raise EOFError(_CUT_OFF)
        return b""

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
        # A piece may be empty before the end: whether that has come the next call knows.
        while not one.eof:
            if one.needs_input and not rest:
                raise EOFError(_CUT_OFF)
            given, rest = rest, b""
            piece: bytes = one.decompress(given, _CHUNK)
            if piece:
                return piece
        return b""

    return following


def _zstd(payload: bytes) -> Callable[[], bytes]:
    import zstandard

    frame = payload[: _end_of_frame(payload)]
    one = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(frame)
    return lambda: one.read(_CHUNK)


def _end_of_frame(data: bytes) -> int:
    """The end of the zstd frame at the start of `data`, as the library stumbles over what follows
    it (RFC 8878, 3.1.1 "Zstandard Frames")."""
    import zstandard

    at = int(zstandard.frame_header_size(data))
    last = False
    while not last and at < len(data):
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        at += 3 + (1 if kind == _REPEATED else size)
    at += 4 * bool(zstandard.get_frame_parameters(data).has_checksum)
    if not last or at > len(data):
        raise EOFError(_CUT_OFF)
    return at


def _command(program: str, package: str) -> Unpacker:
    """An unpacker that pipes through `program`, which Debian has in `package`."""

    def one(kernel: ImageFile, payload: bytes) -> Iterator[bytes]:
        import subprocess
        import tempfile

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
            stdin.write(payload)
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

    return one


_UNPACKERS: tuple[tuple[bytes, Unpacker], ...] = (
    (GZIP, _library(_gzip)),
    (b"BZh", _library(_bzip2)),
    (b"\xfd7zXZ\0", _library(_xz)),
    (b"\x5d\0\0", _library(_xz)),
    (b"\x28\xb5\x2f\xfd", _library(_zstd)),
    (b"\x02\x21\x4c\x18", _command("lz4", "lz4")),  # the legacy frame, which the kernel uses
    (b"\x89LZO", _command("lzop", "lzop")),
)
