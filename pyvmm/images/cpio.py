"""A writer for the "newc" cpio archive, the format of an initramfs.

Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Each entry is a
header of the magic "070701" and thirteen 8-digit hexadecimal fields, the name with its NUL, then
the data; header + name and data are each padded to 4 bytes. The entry "TRAILER!!!" ends it.

Writing it here instead of with cpio(1) makes the archive the same bytes for the same contents (no
times, no inode numbers of the build machine) and lets anyone create device nodes in it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from typing import NamedTuple

TRAILER = "TRAILER!!!"


class Entry(NamedTuple):
    """One file: `mode` has the type bits (stat.S_IFREG …) and the permissions.

    `data` is a file's contents or a symbolic link's target; `device` the (major, minor) of a node.
    """

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, mode: int = 0o755) -> Entry:
    return Entry(name, stat.S_IFDIR | mode)


def regular(name: str, data: bytes, mode: int = 0o644) -> Entry:
    return Entry(name, stat.S_IFREG | mode, data)


def symlink(name: str, target: str) -> Entry:
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    return Entry(name, stat.S_IFCHR | mode, device=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """The whole archive; the kernel unpacks it in this order, so directories go before files.

    Raises ValueError for a name that the format cannot hold (empty, absolute or with a NUL).
    """
    parts: list[bytes] = []
    number = 0
    for number, entry in enumerate(entries, start=1):
        parts.append(_record(entry, number))
    parts.append(_record(Entry(TRAILER, 0), number + 1))
    return b"".join(parts)


def _record(entry: Entry, inode: int) -> bytes:
    if not entry.name or entry.name.startswith("/") or "\0" in entry.name:
        raise ValueError(f"{entry.name!r} cannot be a name in a cpio archive")
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        *(inode, entry.mode, 0, 0, links, 0, len(entry.data)),  # 0, 0: root; 0: no time
        *(0, 0, *entry.device, len(name), 0),  # 0, 0: on no device; 0: no check sum in "newc"
    )
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
