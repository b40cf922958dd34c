"""A layer's bytes: unpacked as they are read, counted, and checked against both of its digests."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Callable
from typing import IO, Any

from pyvmm.images.container.refusal import Refused, shown

_DIGEST = re.compile(r"(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})")
_CHUNK = 1 << 16
_ZSTD_WINDOW = 128 << 20  # bytes of memory that a frame may ask for; `zstd --long` makes such
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def check_digest(digest: object) -> str:
    """`digest` if it is one that can be checked. Raises Refused."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise Refused(f"{shown(str(digest)[:200])} is no digest")
    return digest


def verifier(digest: str) -> Callable[[bytes], None]:
    """A function that raises Refused for bytes whose digest is another one."""

    def check(data: bytes) -> None:
        found = _hash_of(digest)
        found.update(data)
        if _hex(found) != digest.partition(":")[2]:
            raise Refused(f"what is to be {digest[:19]}… is not")

    return check


class Budget:
    """How many bytes all the layers together may still unpack to."""

    def __init__(self, most: int) -> None:
        self._most = self._left = most

    def spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise Refused(
                f"its layers unpack to more than {self._most >> 20} MiB",
                cure="allow more with --size, if there is room for it",
            )


class LayerStream:
    """What a layer unpacks to, to be read to its end and then `finish`ed.

    `digest` is of the stored bytes, `diff_id` of the unpacked ones; None is not checked.
    `advance` hears how many stored bytes were read.
    """

    def __init__(
        self,
        stored: IO[bytes],
        *,
        digest: str | None,
        diff_id: str | None,
        budget: Budget,
        advance: Callable[[int], None],
    ) -> None:
        self._stored = _Hashed(stored, digest, advance)
        self._diff_id = diff_id
        self._hash = None if diff_id is None else _hash_of(diff_id)
        self._budget = budget
        self._unpacked = _unpack(self._stored)

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        data: bytes = self._unpacked.read(size)
        self._budget.spend(len(data))
        if self._hash is not None:
            self._hash.update(data)
        return data

    def finish(self) -> None:
        """Read what is behind the tar archive, and check the digests. Raises Refused."""
        while self.read(_CHUNK):
            pass
        self._stored.finish()
        if self._hash is not None and self._diff_id != f"{self._hash.name}:{_hex(self._hash)}":
            raise Refused(f"it unpacks to something else than {self._diff_id}")


class _Hashed:
    """Stored bytes on their way to be unpacked."""

    def __init__(self, file: IO[bytes], digest: str | None, advance: Callable[[int], None]) -> None:
        self._file, self._digest, self._advance = file, digest, advance
        self._hash = None if digest is None else _hash_of(digest)
        self._ahead = b""

    def peek(self, size: int) -> bytes:
        self._ahead = self.read(size)
        return self._ahead

    def read(self, size: int = _CHUNK) -> bytes:
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
            return data
        data = self._file.read(min(size, _CHUNK) if size >= 0 else _CHUNK)
        self._advance(len(data))
        if self._hash is not None:
            self._hash.update(data)
        return data

    def finish(self) -> None:
        while self.read():
            pass
        if self._hash is not None and self._digest != f"{self._hash.name}:{_hex(self._hash)}":
            raise Refused(f"it is not what {self._digest} names")


def _unpack(stored: _Hashed) -> Any:
    """By what it is: the media type that a manifest gives is wrong often enough."""
    magic = stored.peek(4)
    if magic.startswith(_GZIP):
        return gzip.GzipFile(fileobj=stored, mode="rb")  # type: ignore[call-overload]
    if magic == _ZSTD:
        import zstandard

        unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        return unpacker.stream_reader(stored, read_across_frames=True)  # type: ignore[arg-type]
    return stored


def is_compressed(file: IO[bytes]) -> bool:
    """Whether it begins like a compressed file; it is read from its start afterwards."""
    magic = file.read(4)
    file.seek(0)
    return magic.startswith(_GZIP) or magic == _ZSTD


def _hash_of(digest: str) -> Any:
    return hashlib.new(digest.partition(":")[0])


def _hex(found: Any) -> str:
    text: str = found.hexdigest()
    return text
