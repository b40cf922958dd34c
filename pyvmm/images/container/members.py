"""Tar members as an archive has them, read in order, with nothing taken for granted.

POSIX pax and ustar, GNU and version 7; sparse files of GNU's four ways (GNU tar manual, "Storing
Sparse Files"). Python's `tarfile` is made for archives that mean well: it reads headers of any
size and number as a whole, searches them in quadratic time, keeps lists as long as the archive
says, and takes a header that it cannot read for the archive's end.
"""

from __future__ import annotations

import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from pyvmm.images.container.refusal import Refused, shown

HEADER_LIMIT = 1 << 20  # bytes of all the headers of one member
_MOST_PIECES = 100_000  # of a sparse file
_BLOCK = 512
_BUFFER = 1 << 16
_ZEROS = bytes(_BUFFER)
_MOST_ID = (1 << 32) - 2  # the highest number stands for "none"
_LATEST = (1 << 31) - 1  # in 2038: mke2fs writes no later second, though ext4 has a place for it
_XATTR = b"SCHILY.xattr."
# The namespaces that Linux has for files on ext4; engines leave out others too.
_NAMESPACES = (b"user.", b"trusted.", b"security.")
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
# Of whoever stored the layers, not of the image.
_NOT_THE_IMAGES = (b"trusted.overlay.", b"user.overlay.", b"security.selinux", b"security.ima")
_MOST_XATTRS = 3000  # bytes; one block of the file system holds what does not fit into the inode
_MOST_XATTR_NAME = 255  # XATTR_NAME_MAX of <linux/limits.h>
_PAX, _GLOBAL = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE), tarfile.XGLTYPE
_LONG = {tarfile.GNUTYPE_LONGNAME: b"path", tarfile.GNUTYPE_LONGLINK: b"linkpath"}
# Kinds that have no content, whatever their header says.
_EMPTY = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE),
    *(tarfile.DIRTYPE, tarfile.FIFOTYPE),
)
_SPARSE_KEYS = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
_Pieces = list[tuple[int, int]]  # (offset in the file, length), ascending


@dataclass(slots=True)
class Member:
    """`kind` is one of tarfile's types, `offset` where its content begins in the archive, `stored`
    how many bytes that has there, and `size` how many the file has (more, if it is sparse)."""

    name: str
    kind: bytes
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    link: str
    device: tuple[int, int]
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    offset: int = 0
    stored: int = 0
    pieces: _Pieces | None = None

    @property
    def is_file(self) -> bool:
        return self.kind in tarfile.REGULAR_TYPES


def members(stream: IO[bytes]) -> Iterator[tuple[Member, IO[bytes] | None]]:
    """Each member, with its content if it is a file: to be read before the next one.

    Raises Refused, or what `refusal.explained` explains.
    """
    archive = _Archive(stream)
    while (member := archive.next()) is not None:
        content = _Content(archive, member)
        yield member, content if member.is_file else None  # type: ignore[misc]
        archive.skip(member.offset + -(-member.stored // _BLOCK) * _BLOCK)


def index(file: IO[bytes], most: int) -> dict[str, Member]:
    """The members of an uncompressed archive by name, the last of a name. Raises like `members`."""
    found: dict[str, Member] = {}
    archive = _Archive(file)
    text = 0
    while (member := archive.next()) is not None:
        name = plain(member.name)
        text += len(name) + len(member.link)
        if len(found) >= most or text > most * 256:
            raise Refused(f"it has more than {most} files")
        # Of what is not asked for, there may be a megabyte.
        member.name, member.xattrs = "", {}
        found[name] = member
        archive.seek(member.offset + -(-member.stored // _BLOCK) * _BLOCK)
    return found


def plain(name: str) -> str:
    """A member's name, or a hard link's target, by which `index` has it."""
    return name.removeprefix("./").rstrip("/")


class _Archive:
    """The headers of an archive that is read from its start to its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._buffer, self._start = b"", 0
        self._position = 0
        self._global: dict[bytes, bytes] = {}

    # --- bytes --------------------------------------------------------------------------------

    def read(self, size: int) -> bytes:
        """1 to `size` bytes; none at the end."""
        if self._start == len(self._buffer):
            self._buffer, self._start = self._file.read(max(_BUFFER, min(size, 1 << 20))), 0
        data = self._buffer[self._start : self._start + size]
        self._start += len(data)
        self._position += len(data)
        return data

    def skip(self, to: int) -> None:
        """Go on behind the first `to` bytes. Raises Refused if there are not as many."""
        while self._position < to:
            if not self.read(min(to - self._position, _BUFFER)):
                raise Refused("it is cut short")

    def seek(self, to: int) -> None:
        """The same without looking at what is between."""
        if to - self._position > len(self._buffer) - self._start:
            self._file.seek(to)
            self._buffer, self._start, self._position = b"", 0, to
        else:
            self.skip(to)

    def _all(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            more = self.read(size - len(data))
            if not more:
                raise Refused("it is cut short")
            data += more
        return bytes(data)

    # --- headers ------------------------------------------------------------------------------

    def next(self) -> Member | None:
        """The next member; None at the end, which blocks of zeros may mark."""
        own: dict[bytes, bytes] = {}
        sparse: list[int] = []
        left = HEADER_LIMIT
        while True:
            block = self.read(_BLOCK)
            if not block and not own:
                return None
            if len(block) < _BLOCK:
                block += self._all(_BLOCK - len(block))
            if not any(block):
                return None
            _check_sum(block)
            kind, size = block[156:157], _number(block[124:136], "a size")
            if kind in _PAX or kind == _GLOBAL or kind in _LONG:
                left -= size
                if left < 0 or size < 0:
                    raise Refused(f"it has a header of {HEADER_LIMIT - left} bytes")
                left -= _BLOCK
                data = self._all(-(-size // _BLOCK) * _BLOCK)[:size]
                if kind in _LONG:
                    own[_LONG[kind]] = data.partition(b"\0")[0]
                elif kind == _GLOBAL:
                    self._global.update(_records(data, [], with_xattrs=False))
                else:
                    own.update(_records(data, sparse, with_xattrs=True))
                continue
            return self._member(block, kind, size, {**self._global, **own}, sparse)

    def _member(
        self, block: bytes, kind: bytes, size: int, pax: dict[bytes, bytes], sparse: list[int]
    ) -> Member:
        name, prefix = _text(block[:100]), _text(block[345:500])
        if prefix and block[257:263] == b"ustar\0":
            name = prefix + b"/" + name
        name = pax.get(b"GNU.sparse.name") or pax.get(b"path") or name
        if kind == tarfile.AREGTYPE and name.endswith(b"/"):
            kind = tarfile.DIRTYPE
        if size < 0 or (size := _pax_number(pax, b"size", size)) < 0:
            raise Refused(f"{shown(_str(name))} has a negative size")
        device = (0, 0)
        if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            device = (_number(block[329:337], "a device"), _number(block[337:345], "a device"))
        member = Member(
            name=_str(name),
            kind=kind,
            mode=_number(block[100:108], "a mode") & 0o7777,
            uid=_pax_number(pax, b"uid", _number(block[108:116], "a user")),
            gid=_pax_number(pax, b"gid", _number(block[116:124], "a group")),
            mtime=_time(pax, _number(block[136:148], "a time")),
            size=0 if kind in _EMPTY else size,
            link=_str(pax.get(b"linkpath") or _text(block[157:257])),
            device=device,
            xattrs=_xattrs(_str(name), pax),
            offset=self._position,
            stored=0 if kind in _EMPTY else size,
        )
        for number in (member.uid, member.gid):
            if not 0 <= number <= _MOST_ID:
                raise Refused(
                    f"{shown(member.name)} belongs to {number}, which is not a user or group"
                )
        if member.is_file:
            self._find_pieces(member, block, pax, sparse)
        return member

    # --- sparse files -------------------------------------------------------------------------

    def _find_pieces(
        self, member: Member, block: bytes, pax: dict[bytes, bytes], sparse: list[int]
    ) -> None:
        """Of what `member` is made, if it is sparse. Raises Refused."""
        end = self._position + member.stored
        if member.kind == tarfile.GNUTYPE_SPARSE:
            numbers = self._old_gnu(block)
            end = self._position + member.stored
            member.size = _number(block[483:495], "a size")
        elif (pax.get(b"GNU.sparse.major"), pax.get(b"GNU.sparse.minor")) == (b"1", b"0"):
            numbers = self._gnu_1_0(end)
            member.size = _pax_number(pax, b"GNU.sparse.realsize", 0)
        elif b"GNU.sparse.map" in pax:
            numbers = [_decimal(word, "a sparse file") for word in _words(pax[b"GNU.sparse.map"])]
            member.size = _pax_number(pax, b"GNU.sparse.size", 0)
        elif b"GNU.sparse.size" in pax:
            numbers = sparse
            member.size = _pax_number(pax, b"GNU.sparse.size", 0)
        else:
            return
        member.offset, member.stored = self._position, end - self._position
        pieces = [*zip(numbers[::2], numbers[1::2], strict=False)]
        last = total = 0
        for start, length in pieces:
            if start < last or length < 0:
                raise Refused(f"{shown(member.name)} is a sparse file whose pieces overlap")
            last, total = start + length, total + length
        if len(numbers) % 2 or last > member.size or total > member.stored:
            raise Refused(f"{shown(member.name)} is a sparse file of pieces that are not there")
        member.pieces = pieces

    def _old_gnu(self, block: bytes) -> list[int]:
        numbers: list[int] = []
        place, count, more = 386, 4, block[482]
        while True:
            for start in range(place, place + count * 24, 24):
                if not block[start + 12]:
                    break  # the others are empty
                for digits in (block[start : start + 12], block[start + 12 : start + 24]):
                    numbers.append(_number(digits, "a sparse file"))
            if not more:
                return numbers
            _check_count(len(numbers))
            block = self._all(_BLOCK)
            place, count, more = 0, 21, block[504]

    def _gnu_1_0(self, end: int) -> list[int]:
        """The map is in front of the content, a number a line."""
        numbers: list[int] = []
        rest, count = b"", -1
        while count < 0 or len(numbers) < count:
            if self._position >= end:
                raise Refused("it has a sparse file without a whole map")
            *lines, rest = (rest + self._all(_BLOCK)).split(b"\n")
            if len(rest) > _BLOCK:
                raise Refused("it has a broken tar header (a sparse file's map)")
            for line in lines:
                number = _decimal(line, "a sparse file")
                if count < 0:
                    count = 2 * number
                    _check_count(count)
                elif len(numbers) < count:
                    numbers.append(number)
        return numbers


class _Content:
    """The contents of a file, to be read from its start to its end."""

    def __init__(self, archive: _Archive, member: Member) -> None:
        self._archive = archive
        pieces = [(0, member.size)] if member.pieces is None else member.pieces
        self._pieces = iter([*pieces, (member.size, 0)])
        self._place = 0
        self._start, self._left = next(self._pieces)
        self._size = member.size

    def read(self, size: int) -> bytes:
        """1 to `size` bytes; none at the end, be it too early."""
        while self._place < self._size:
            if self._place < self._start:
                data = _ZEROS[: min(size, self._start - self._place)]
            elif self._left:
                data = self._archive.read(min(size, self._left))
                self._left -= len(data)
                self._start += len(data)
            else:
                self._start, self._left = next(self._pieces)
                continue
            self._place += len(data)
            return data
        return b""


def _check_count(numbers: int) -> None:
    if numbers > 2 * _MOST_PIECES:
        raise Refused(f"it has a sparse file of more than {_MOST_PIECES} pieces")


def _check_sum(block: bytes) -> None:
    said = _number(block[148:156], "a checksum")
    plain = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if said != plain:
        # Some old programs took the bytes for signed ones.
        signed = plain - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        if said != signed:
            raise Refused("it has a broken tar header (its checksum is another one)")


def _text(data: bytes) -> bytes:
    return data.partition(b"\0")[0]


def _str(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _number(data: bytes, what: str) -> int:
    """Octal digits or, behind a byte of 0x80 or 0xff, a number to the base of 256."""
    if data[0] in (0x80, 0xFF):
        number = int.from_bytes(data[1:], "big")
        return number - (1 << 8 * (len(data) - 1)) if data[0] == 0xFF else number
    digits = _text(data).strip(b" ")
    if digits.translate(None, b"01234567"):
        raise Refused(f"it has a broken tar header ({what} is {shown(repr(data))})")
    return int(digits or b"0", 8)


def _decimal(digits: bytes, what: str) -> int:
    if not (digits.isdigit() and len(digits) < 20):
        raise Refused(f"it has a broken tar header ({what} is {shown(repr(digits[:40]))})")
    return int(digits)


def _words(text: bytes) -> list[bytes]:
    _check_count(text.count(b",") + 1)
    return text.split(b",")


def _pax_number(pax: dict[bytes, bytes], key: bytes, default: int) -> int:
    text = pax.get(key)
    if not text:
        return default
    number = _decimal(text.removeprefix(b"-"), _str(key))
    return -number if text.startswith(b"-") else number


def _time(pax: dict[bytes, bytes], default: int) -> int:
    try:
        time = float(pax.get(b"mtime") or default)
    except ValueError:
        time = 0
    return int(min(max(time, 0), _LATEST)) if math.isfinite(time) else 0


def _records(data: bytes, sparse: list[int], *, with_xattrs: bool) -> dict[bytes, bytes]:
    """The records of extended headers that count here, "LENGTH KEY=VALUE\\n"; numbers that come
    again for each piece of a sparse file are put into `sparse`. Raises Refused."""
    found: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 12)
        length = _decimal(data[position:space], "a record") if space > 0 else 0
        end = position + length
        equals = data.find(b"=", space, end)
        if not space < equals < end <= len(data) or data[end - 1 : end] != b"\n":
            if not data[position:].strip(b"\0"):
                break  # padding, which some writers count in
            raise Refused("it has a broken tar header (an extended one)")
        key, value = data[space + 1 : equals], data[equals + 1 : end - 1]
        position = end
        if key in _SPARSE_KEYS:
            sparse.append(_decimal(value, "a sparse file"))
            _check_count(len(sparse))
        elif key in _KEYS or (with_xattrs and key.startswith(_XATTR)):
            found[key] = value
    return found


_KEYS = {
    *(b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime"),
    *(b"GNU.sparse.major", b"GNU.sparse.minor", b"GNU.sparse.name", b"GNU.sparse.realsize"),
    *(b"GNU.sparse.map", b"GNU.sparse.size"),
}


def _xattrs(member: str, pax: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """The member's extended attributes that belong to the image. Raises Refused."""
    found = {}
    for key, value in pax.items():
        name = key.removeprefix(_XATTR)
        known = name in _ACLS or any(name.startswith(one) and name != one for one in _NAMESPACES)
        if name in _ACLS and not value:
            continue  # it stands for none, as for setxattr
        if name != key and known and not name.startswith(_NOT_THE_IMAGES):
            found[name] = value
    if sum(len(name) + len(value) + 32 for name, value in found.items()) > _MOST_XATTRS:
        raise Refused(f"the extended attributes of {shown(member)} are too large for ext4")
    for name in found:
        if len(name) > _MOST_XATTR_NAME or b"\0" in name:
            raise Refused(f"{shown(member)} has an attribute called {shown(_str(name))}")
    return found
