"""The boot choices of a disk with partitions: its table, and what each partition holds.

Only for a word to the user when a guest has not found its root file system. A table is untrusted:
every size in it is bounded, and one that the guest's kernel would not take does not count. Sources:
UEFI 2.10, chapter 5 "GUID Partition Table (GPT) Disk Layout"; Linux block/partitions/efi.c and
msdos.c, which decide what a guest sees; the Discoverable Partitions Specification (uapi-group.org)
for what the types mean; the file systems' own headers for their superblocks.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

Read = Callable[[int, int], bytes]  # (offset, bytes): as many bytes, fewer past the end

MOST_PARTITIONS = 64  # that are looked at; a guest's kernel makes 256 devices at most
_MOST_ENTRY_BYTES = 4 << 20  # as the kernel, which allocates them in one piece
_MOST_LINKS = 100  # of a chain of logical partitions, as the kernel
_MOST_NAMED = 4  # partitions in one line
_SECTOR = 512
_TABLE_MAGIC = b"\x55\xaa"
_GPT_HEADER = struct.Struct("<8sIII4xQQQQ16sQIII")
_ENTRIES = 446  # of four rows in a boot sector
_ROW = struct.Struct("<B3xB3xII")
_EXTENDED = (0x05, 0x0F, 0x85)
_PROTECTIVE = 0xEE
_FIRST_LOGICAL = 5

ROOT_TYPES = (
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",  # "Root Partition (amd64/x86_64)"
    "b921b045-1df0-41c3-af44-4c6f280d3fae",  # "Root Partition (64-bit ARM/AArch64)"
)
_NOT_ROOT = {
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b",  # EFI System Partition
    "bc13c2ff-59e6-4262-a352-b275fd6f7172",  # Extended Boot Loader Partition
    "21686148-6449-6e6f-744e-656564454649",  # BIOS boot partition
    "933ac7e1-2eb4-4f13-b844-0e14e2aef915",  # Home Partition
    "3b8f8425-20e0-4f3b-907f-1a25a76f98e8",  # Server Data Partition
    "4d21b016-b534-45c2-a9fb-5c16e091fd2d",  # Variable Data Partition
    "8484680c-9521-48c6-9c11-b0720656f69e",  # /usr/ Partition (amd64/x86_64)
    "b0e01050-ee5f-4390-949a-9101b17104e9",  # /usr/ Partition (64-bit ARM/AArch64)
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f",  # Swap
}
_ROOTS = {"ext4", "xfs", "btrfs", "squashfs", "erofs", "f2fs"}  # a Linux system may live in these
# What is there, where its magic stands, and (offset, bytes) of its label and its UUID.
_NOWHERE = (0, 0)
_CONTENTS = (
    ("ext4", 0x438, b"\x53\xef", (0x478, 16), 0x468),  # ext2 and ext3 as well: the same driver
    ("xfs", 0, b"XFSB", (108, 12), 32),
    ("btrfs", 0x1_0040, b"_BHRfS_M", (0x1_012B, 256), 0x1_0020),
    ("squashfs", 0, b"hsqs", _NOWHERE, 0),
    ("erofs", 0x400, b"\xe2\xe1\xf5\xe0", (0x440, 16), 0x430),
    ("f2fs", 0x400, b"\x10\x20\xf5\xf2", _NOWHERE, 0),
    ("swap", 4086, b"SWAPSPACE2", (0x41C, 16), 0x40C),
    ("LUKS", 0, b"LUKS\xba\xbe", _NOWHERE, 0),
    ("LVM", 0x218, b"LVM2 001", _NOWHERE, 0),
    ("vfat", 82, b"FAT32   ", _NOWHERE, 0),
    ("vfat", 54, b"FAT16   ", _NOWHERE, 0),
    ("vfat", 54, b"FAT12   ", _NOWHERE, 0),
)


class Content(NamedTuple):
    """The content of a partition: `kind` is ext4, xfs, …, or empty for what is not known."""

    kind: str = ""
    label: str = ""
    uuid: str = ""


class Partition(NamedTuple):
    """Partition `number` of a disk, as the guest's kernel counts; 0 is a disk that has none.

    `start` and `size` are in bytes. `type` is a GUID, or two hexadecimal digits in a DOS table;
    `name` is a GPT's.
    """

    number: int
    start: int
    size: int
    type: str
    uuid: str
    name: str
    content: Content

    @property
    def may_be_root(self) -> bool:
        """True if a Linux system may live here."""
        return self.content.kind in _ROOTS and self.type not in _NOT_ROOT


class Table(NamedTuple):
    """A disk's partitions, of which there are `total`; those in `partitions` were looked at. A
    guest's kernel takes a table whose first copy is `damaged` only if it is told to."""

    partitions: tuple[Partition, ...]
    total: int
    damaged: bool = False


def read_disk(read: Read, size: int, block: int = _SECTOR) -> Table | None:
    """The table of a disk of `size` bytes in blocks of `block`: its partitions, or the one thing
    that it holds; None if neither is known.

    Raises what `read` raises.
    """
    table = _read_table(read, size, block)
    if table is None:
        content = _content_of(read, 0, size)
        if content.kind:
            table = Table((Partition(0, 0, size, "", "", "", content),), 1)
    return table


def _read_table(read: Read, size: int, block: int) -> Table | None:
    sector = read(0, _SECTOR)
    if len(sector) < _SECTOR or sector[510:] != _TABLE_MAGIC or size < 2 * block:
        return None
    rows = [_ROW.unpack_from(sector, _ENTRIES + 16 * index) for index in range(4)]
    if any(flag & 0x7F for flag, *_ in rows):
        return None  # it is code: a file system's boot sector has no table there
    if any(kind == _PROTECTIVE for _, kind, *_ in rows):
        return _read_gpt(read, size, block)
    return _read_dos(read, size, block, sector, rows)


def _read_gpt(read: Read, size: int, block: int) -> Table | None:
    last = size // block - 1
    for lba in (1, last):
        entries = _gpt_entries(read, lba, block)
        if entries is not None:
            break
    else:
        return None
    found: list[Partition] = []
    count = 0
    for index, entry in enumerate(entries):
        if entry[:16] == bytes(16):
            continue
        first, end = struct.unpack_from("<QQ", entry, 32)
        if not first <= end <= last:
            continue
        count += 1
        if len(found) < MOST_PARTITIONS:
            start, length = first * block, (end - first + 1) * block
            found.append(
                Partition(
                    *(index + 1, start, length, _guid(entry[:16]), _guid(entry[16:32])),
                    entry[56:128].decode("utf-16-le", "replace").partition("\0")[0],
                    _content_of(read, start, length),
                )
            )
    return Table(tuple(found), count, damaged=lba != 1) if found else None


def _gpt_entries(read: Read, lba: int, block: int) -> list[bytes] | None:
    header = read(lba * block, _SECTOR)
    if len(header) < _SECTOR:
        return None
    magic, _, length, crc, own, _, _, _, _, start, count, size, sum = _GPT_HEADER.unpack_from(
        header
    )
    if magic != b"EFI PART" or own != lba or not _GPT_HEADER.size <= length <= _SECTOR:
        return None
    if zlib.crc32(header[:16] + bytes(4) + header[20:length]) != crc:
        return None
    if size < 128 or size % 128 or not 0 < count * size <= _MOST_ENTRY_BYTES:
        return None
    table = read(start * block, count * size)
    if len(table) < count * size or zlib.crc32(table) != sum:
        return None
    return [table[at : at + 128] for at in range(0, count * size, size)]


def _guid(raw: bytes) -> str:
    return str(uuid.UUID(bytes_le=raw))


def _read_dos(
    read: Read, size: int, block: int, sector: bytes, rows: list[tuple[int, ...]]
) -> Table | None:
    signature = int.from_bytes(sector[440:444], "little")
    found: list[Partition] = []

    def add(number: int, kind: int, first: int, length: int) -> None:
        start, length = first * block, length * block
        if length and start < size:
            content = _content_of(read, start, length)
            name = f"{signature:08x}-{number:02x}"
            found.append(Partition(number, start, length, f"{kind:02x}", name, "", content))

    for number, (_, kind, first, length) in enumerate(rows, 1):
        if kind and kind not in _EXTENDED:
            add(number, kind, first, length)
    for _, kind, first, length in rows:
        if kind in _EXTENDED and length:
            _add_logical(read, block, first, add)
            break
    return Table(tuple(found), len(found)) if found else None


def _add_logical(
    read: Read, block: int, extended: int, add: Callable[[int, int, int, int], None]
) -> None:
    """Follow the chain of the extended partition that begins at block `extended`."""
    at, number = extended, _FIRST_LOGICAL
    for _ in range(_MOST_LINKS):
        sector = read(at * block, _SECTOR)
        if len(sector) < _SECTOR or sector[510:] != _TABLE_MAGIC or number > MOST_PARTITIONS:
            return
        rows = [_ROW.unpack_from(sector, _ENTRIES + 16 * index) for index in range(4)]
        for _, kind, first, length in rows:
            if kind and kind not in _EXTENDED and length:
                add(number, kind, at + first, length)
                number += 1
        following = [first for _, kind, first, length in rows if kind in _EXTENDED and length]
        if not following:
            return
        at = extended + following[0]


def _content_of(read: Read, start: int, size: int) -> Content:
    for kind, offset, magic, label, id in _CONTENTS:
        if offset + len(magic) <= size and read(start + offset, len(magic)) == magic:
            text = read(start + label[0], label[1]).partition(b"\0")[0]
            raw = read(start + id, 16) if id else b""
            found = str(uuid.UUID(bytes=raw)) if len(raw) == 16 else ""
            return Content(kind, text.decode("utf-8", "replace").rstrip(), found)
    return Content()


def roots(table: Table) -> list[Partition]:
    """The partitions that a Linux system may live in, the likeliest first: the one whose type says
    so, then by size."""
    found = [partition for partition in table.partitions if partition.may_be_root]
    return sorted(found, key=lambda one: (one.type not in ROOT_TYPES, -one.size))


def is_damaged(read: Read, size: int) -> bool:
    """True if the disk says that it has a GPT, where `read_disk` found none."""
    sector = read(0, _SECTOR)
    if len(sector) < _SECTOR or sector[510:] != _TABLE_MAGIC:
        return False
    return any(
        _ROW.unpack_from(sector, _ENTRIES + 16 * index)[1] == _PROTECTIVE for index in range(4)
    )


def overlapping(table: Table, one: Partition) -> Partition | None:
    """A partition that lies where `one` lies, if there is any."""
    for other in table.partitions:
        within = other.start < one.start + one.size and one.start < other.start + other.size
        if other.number != one.number and within:
            return other
    return None


def advice(disk: str, table: Table, number: int) -> str:
    """The cure where `disk`, such as /dev/vda, has `table` and partition `number` of it (0:
    the whole disk) was not a root file system; "" if it looks like one."""
    chosen = next((one for one in table.partitions if one.number == number), None)
    if chosen is not None and chosen.may_be_root:
        return f"{_holds(disk, chosen)}: add {_needs(chosen)}" if _needs(chosen) else ""
    found = roots(table)
    why = f"{disk} holds partitions" if chosen is None else _holds(disk, chosen)
    if not found:
        kinds = sorted({one.content.kind or "something unknown" for one in table.partitions})
        return f"{why}, and no Linux file system" + (
            "" if number == 0 and chosen else f" ({', '.join(kinds)})"
        )
    text = " or ".join(f"root={_device(disk, one)} ({about(one)})" for one in found[:_MOST_NAMED])
    more = f", or one of {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    needs = f", with {_needs(found[0])}" if _needs(found[0]) else ""
    damaged = "; and gpt, as the first copy of the table is damaged" if table.damaged else ""
    return f"{why}: put {text}{more} into --cmdline{needs}{damaged}"


def _device(disk: str, one: Partition) -> str:
    return f"{disk}{one.number or ''}"


def _holds(disk: str, one: Partition) -> str:
    return f"{_device(disk, one)} holds {one.content.kind or 'nothing that is known'}"


def _needs(one: Partition) -> str:
    """Advice on how to mount it: the recipes' initramfs has ext4 alone."""
    if one.content.kind == "ext4":
        return ""
    return f"rootfstype={one.content.kind} and an --initrd that has its driver"


def listed(disks: Sequence[tuple[str, Table]], wanted: str) -> str:
    """The content of `disks` in a few words, by the kind of name that `wanted`, the value of root=,
    has: PARTUUID=…, LABEL=… and so on."""
    key = wanted.partition("=")[0]
    texts: list[str] = []
    left = 0
    for disk, table in disks:
        for one in table.partitions:
            if len(texts) == 2 * _MOST_NAMED:
                left += 1
                continue
            names = {"PARTUUID": one.uuid, "PARTLABEL": one.name}
            names |= {"UUID": one.content.uuid, "LABEL": one.content.label}
            name = f', {key}="{_printable(names[key])}"' if names.get(key) else ""
            texts.append(f"{_device(disk, one)} ({about(one)}{name})")
        left += table.total - len(table.partitions)
    return ", ".join(texts) + (f" and {left} more" if left else "")


def about(one: Partition) -> str:
    """The content of a partition, and its size, in a few words."""
    size = f"{one.size >> 30} GiB" if one.size >= 10 << 30 else f"{one.size >> 20} MiB"
    return f"{one.content.kind or 'unknown'}, {size}"


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)
