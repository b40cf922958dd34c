"""cpio archives in the "newc" form, the one the kernel unpacks as an initramfs.

Format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Several archives
may follow one another; later files replace earlier ones of the same name.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_MAGIC = "070701"
_TRAILER = "TRAILER!!!"
_BLOCK = 4  # names and data are padded to this many bytes


class Entry(NamedTuple):
    """One file of an archive, owned by root and dated 1970, so that equal inputs give equal bytes.

    `name` is relative, without a leading slash. `mode` holds the type as well as the permissions.
    `data` is a file's content or a symbolic link's target. `device` is (major, minor) of a node.
    """

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, mode: int = 0o755) -> Entry:
    """A directory; its parents need entries of their own, earlier ones."""
    return Entry(name, stat.S_IFDIR | mode)


def regular(name: str, data: bytes, mode: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(name, stat.S_IFREG | mode, data)


def symlink(name: str, target: str) -> Entry:
    """A symbolic link to `target`."""
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    """A character device's node."""
    return Entry(name, stat.S_IFCHR | mode, device=(major, minor))


def chunks(entries: Iterable[Entry]) -> Iterator[bytes]:
    """The archive of `entries`, piece by piece; its total length is a multiple of 4.

    Raises ValueError for a name that the format cannot hold (empty, absolute or with a NUL).
    """
    for inode, entry in enumerate(entries, start=1):
        yield _header(entry, inode)
        yield entry.data
        yield b"\0" * (-len(entry.data) % _BLOCK)
    yield _header(Entry(_TRAILER, 0), 0)


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive of `entries` in one piece."""
    return b"".join(chunks(entries))


def _header(entry: Entry, inode: int) -> bytes:
    if not entry.name or entry.name.startswith("/") or "\0" in entry.name:
        raise ValueError(f"{entry.name!r} cannot be a name in a cpio archive")
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    uid = gid = mtime = major = minor = checksum = 0
    fields = (
        *(inode, entry.mode, uid, gid, links, mtime, len(entry.data)),
        *(major, minor, *entry.device, len(name), checksum),
    )
    header = (_MAGIC + "".join(f"{field:08X}" for field in fields)).encode() + name
    return header + b"\0" * (-len(header) % _BLOCK)
