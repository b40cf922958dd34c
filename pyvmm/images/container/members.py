"""Tar members as an archive has them, read in order, with nothing taken for granted."""

from __future__ import annotations

import math
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from pyvmm.images.container.refusal import Refused, shown

HEADER_LIMIT = 1 << 20  # bytes of a long name or of extended headers; Python reads them as a whole
_BUFFER = 1 << 16
_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_MOST_ID = (1 << 32) - 2  # the highest number stands for "none"
_XATTR = "SCHILY.xattr."
# Of whoever stored the layers, not of the image.
_NOT_THE_IMAGES = ("trusted.overlay.", "user.overlay.", "security.selinux", "security.ima")
_MOST_XATTRS = 3000  # bytes; one block of the file system holds what does not fit into the inode


class _Header(tarfile.TarInfo):
    """A header block is looked at before anything else is done with it.

    The library takes one that it cannot read for the archive's end, and believes sizes.
    """

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> _Header:
        try:
            found = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            # No blocks of zeros at the end, be it the beginning too: engines take that.
            raise tarfile.EOFHeaderError("end") from None  # type: ignore[attr-defined]
        except tarfile.HeaderError as error:
            raise Refused(f"it has a broken tar header ({error})") from None
        if found.size < 0:
            raise Refused(f"{shown(found.name)} has a negative size")
        if found.type in _HEADERS and found.size > HEADER_LIMIT:
            raise Refused(f"it has a header of {found.size} bytes")
        return found


def members(stream: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Each member, with its content if it is a file: to be read before the next one.

    Raises Refused, or what `refusal.explained` explains.
    """
    with tarfile.open(
        fileobj=stream,
        mode="r|",
        bufsize=_BUFFER,
        tarinfo=_Header,
        encoding="utf-8",
        errors="surrogateescape",
    ) as archive:
        while (member := archive.next()) is not None:
            _check(member)
            yield member, archive.extractfile(member) if member.isreg() else None
            # The library remembers every member, for random access.
            archive.members.clear()  # type: ignore[attr-defined]


def index(file: IO[bytes], most: int) -> dict[str, tarfile.TarInfo]:
    """The members of an uncompressed archive by name, the last of a name. Raises like `members`."""
    found: dict[str, tarfile.TarInfo] = {}
    with tarfile.open(
        fileobj=file, mode="r:", tarinfo=_Header, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        while (member := archive.next()) is not None:
            _check(member)
            found[member.name.removeprefix("./").rstrip("/")] = member
            archive.members.clear()  # type: ignore[attr-defined]
            if len(found) > most:
                raise Refused(f"it has more than {most} files")
    return found


def _check(member: tarfile.TarInfo) -> None:
    """What extended headers may have changed."""
    if member.size < 0:
        raise Refused(f"{shown(member.name)} has a negative size")
    for number in (member.uid, member.gid):
        if not 0 <= number <= _MOST_ID:
            raise Refused(f"{shown(member.name)} belongs to {number}, which is no user or group")
    member.mode &= 0o7777
    member.mtime = member.mtime if math.isfinite(member.mtime) else 0
    member.mtime = min(max(int(member.mtime), 0), (1 << 34) - 1)  # what ext4 can say


def xattrs(member: tarfile.TarInfo) -> dict[str, bytes]:
    """The member's extended attributes that belong to the image. Raises Refused."""
    found = {}
    for key, value in member.pax_headers.items():
        name = key.removeprefix(_XATTR)
        if name != key and not name.startswith(_NOT_THE_IMAGES):
            found[name] = value.encode("utf-8", "surrogateescape")
    if sum(len(name) + len(value) + 32 for name, value in found.items()) > _MOST_XATTRS:
        raise Refused(f"the extended attributes of {shown(member.name)} are too large for ext4")
    for name in found:
        if len(name.encode("utf-8", "surrogateescape")) > 255 or not name.isprintable():
            raise Refused(f"{shown(member.name)} has an attribute called {shown(name)}")
    return found
