"""A layer's bytes: unpacked as they are read, counted, and checked against both of its digests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import IO, Any

from pyvmm.images.container.refusal import Refused, shown
from pyvmm.images.container.unpack import unpacker

_DIGEST = re.compile(r"(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})")
_CHUNK = 1 << 16


def check_digest(digest: object) -> str:
    """`digest` if it is one that can be checked. Raises Refused."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise Refused(f"{shown(str(digest)[:200])} is not a digest")
    return digest


def check_size(size: object) -> int | None:
    """`size` if it is one, or there is none: the digest says enough. Raises Refused."""
    if size is None or (type(size) is int and size >= 0):
        return size
    raise Refused(f"{shown(str(size)[:100])} is not a size")


def verifier(digest: str, size: int | None) -> Callable[[bytes], None]:
    """A function that raises Refused for bytes whose digest or number is another one."""

    def check(data: bytes) -> None:
        found = _hash_of(digest)
        found.update(data)
        if _hex(found) != digest.partition(":")[2]:
            raise Refused(f"what is to be {digest[:19]}… is not")
        if size not in (None, len(data)):
            raise Refused(f"what is to have {size} bytes has {len(data)}")

    return check


class Budget:
    """The number of bytes to which all the layers together may still unpack."""

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
    """The archive in a layer, to be read to its end and then `finish`ed.

    `digest` and `size` are of the stored bytes, `diff_id` of the unpacked ones; None is not
    checked.
    `advance` hears how many stored bytes were read.
    """

    def __init__(
        self,
        stored: IO[bytes],
        *,
        digest: str | None,
        size: int | None = None,
        diff_id: str | None,
        budget: Budget,
        advance: Callable[[int], None],
    ) -> None:
        self._stored = _Hashed(stored, digest, size, advance)
        self._diff_id = diff_id
        self._hash = None if diff_id is None else _hash_of(diff_id)
        self._budget = budget
        self._unpacked = unpacker(self._stored)

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

    def __init__(
        self,
        file: IO[bytes],
        digest: str | None,
        size: int | None,
        advance: Callable[[int], None],
    ) -> None:
        self._file, self._digest, self._advance = file, digest, advance
        self._size, self._count = size, 0
        self._hash = None if digest is None else _hash_of(digest)
        self._ahead, self._at = b"", 0

    def peek(self, size: int) -> bytes:
        """At most `size` bytes, which `read` gives once more."""
        if self._at == len(self._ahead):
            self._ahead, self._at = self._file.read(_CHUNK), 0
            self._advance(len(self._ahead))
            self._count += len(self._ahead)
            if self._hash is not None:
                self._hash.update(self._ahead)
        return self._ahead[self._at : self._at + size]

    def read(self, size: int = _CHUNK) -> bytes:
        # gzip asks for the bytes of its header one by one, and a header may be without end.
        data = self.peek(size if size >= 0 else _CHUNK)
        self._at += len(data)
        return data

    def finish(self) -> None:
        while self.read():
            pass
        if self._hash is not None and self._digest != f"{self._hash.name}:{_hex(self._hash)}":
            raise Refused(f"it is not what {self._digest} names")
        if self._size not in (None, self._count):
            raise Refused(f"it is to have {self._size} bytes, and has {self._count}")


def _hash_of(digest: str) -> Any:
    return hashlib.new(digest.partition(":")[0])


def _hex(found: Any) -> str:
    text: str = found.hexdigest()
    return text
