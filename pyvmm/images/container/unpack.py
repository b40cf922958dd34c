"""Compressed bytes, unpacked as they are read, in bounded memory: gzip, zstd, bzip2, xz.

What they are they say themselves: the media type that a manifest gives is wrong often enough.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import IO, Any, Protocol

from pyvmm.images.container.refusal import Refused

# Bytes of memory that an archive may ask for; `zstd --long` and `xz -9` ask for so much.
_MOST_MEMORY = 128 << 20
_GZIP, _ZSTD, _BZIP2, _XZ = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zX"
_SKIPPABLE = (
    b"\x2a\x4d\x18"  # behind 0x50 to 0x5f: a zstd frame of something else (RFC 8878, 3.1.2)
)


class Stored(Protocol):
    """The source of the bytes."""

    def peek(self, size: int) -> bytes: ...
    def read(self, size: int = ...) -> bytes: ...


def unpacker(stored: Stored) -> Any:
    """An object whose `read(size)` has what `stored` unpacks to; itself if it is not compressed.

    Raises Refused for what this Python cannot unpack.
    """
    kind = _kind(stored.peek(4))
    if kind == _GZIP:
        return gzip.GzipFile(fileobj=stored, mode="rb")  # type: ignore[call-overload]
    if kind == _ZSTD:
        import zstandard

        one = zstandard.ZstdDecompressor(max_window_size=_MOST_MEMORY)
        return one.stream_reader(stored, read_across_frames=True)  # type: ignore[arg-type]
    if kind == _BZIP2:
        return _Streams(stored, _bzip2())
    if kind == _XZ:
        return _Streams(stored, _xz())
    return stored


def is_compressed(file: IO[bytes]) -> bool:
    """True if it begins like a compressed file; it is read from its start afterwards."""
    magic = file.read(4)
    file.seek(0)
    return bool(_kind(magic))


def _kind(magic: bytes) -> bytes:
    if magic[1:] == _SKIPPABLE and magic[0] >> 4 == 5:
        return _ZSTD
    return next((kind for kind in (_GZIP, _ZSTD, _BZIP2, _XZ) if magic.startswith(kind)), b"")


def _bzip2() -> Callable[[], Any]:
    try:
        import bz2
    except ImportError:
        raise _cannot("bzip2") from None
    return bz2.BZ2Decompressor


def _xz() -> Callable[[], Any]:
    try:
        import lzma
    except ImportError:
        raise _cannot("xz") from None
    return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_MEMORY)


def _cannot(program: str) -> Refused:
    return Refused(f"this Python cannot unpack {program}", cure=f"first: {program} -d")


class _Streams:
    """Compressed streams, one behind the other, with padding of zeros between and behind them."""

    def __init__(self, stored: Stored, begin: Callable[[], Any]) -> None:
        self._stored, self._begin = stored, begin
        self._one = begin()

    def read(self, size: int) -> bytes:
        while True:
            more = b""
            if self._one.eof:
                more = self._next()
                if not more:
                    return b""
                self._one = self._begin()
            elif self._one.needs_input:
                more = self._stored.read()
                if not more:
                    raise EOFError("it is cut short")
            try:
                data: bytes = self._one.decompress(more, size)
            except Exception as error:  # the libraries have nothing better in common
                raise ValueError(str(error)) from None
            if data:
                return data

    def _next(self) -> bytes:
        more: bytes = self._one.unused_data.lstrip(b"\0")
        while not more and (read := self._stored.read()):
            more = read.lstrip(b"\0")
        return more
