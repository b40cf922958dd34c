"""A stranger's disk, as far as the host reads it: tables of partitions, and the texts by which it
boots. Its file systems: tests/fuzz/file_systems.py.

Tables are written here and read again by a reader of our own. Texts are put together from the lines
that loaders know. A case raises AssertionError, with what was changed, if

- a table is not what our own reader makes of it,
- anything but an error of ours of one line is raised, or FileNotFoundError for what is not there,
- more is read than the bound, in bytes or in calls,
- a boot entry names what is not there, or words that a kernel would take for more than they are.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Iterator
from random import Random
from typing import Any

from fuzz.damage import Number, fields, harm
from fuzz.room import told

from pyvmm.boot import partitions
from pyvmm.boot.boot_entry import find
from pyvmm.errors import ConfigError
from pyvmm.testing.mmio_driver import Ring

MIB = 1 << 20
_BLOCK = 512


def _one_line(error: ConfigError) -> None:
    assert "\n" not in str(error) and len(str(error)) < 2000, error


# --- tables ---------------------------------------------------------------------------------------

_HEADER = "magic:8 revision:4 length:4 crc:4 :4 own:8 other:8 first:8 last:8 guid:16 start:8 " + (
    "count:4 size:4 sum:4"
)
_ENTRY = "type:8 :8 id:8 :8 first:8 last:8 flags:8 name:8"
_ROW = "flag:1 :3 kind:1 :3 first:4 length:4"


class _Disk:
    """Sectors that are not zeros, of a disk of any size."""

    def __init__(self, sectors: int) -> None:
        self.size = sectors * _BLOCK
        self.parts: dict[int, bytearray] = {}
        self.read_bytes = self.calls = 0

    def put(self, sector: int, data: bytes) -> bytearray:
        self.parts[sector * _BLOCK] = bytearray(data)
        return self.parts[sector * _BLOCK]

    def get(self, offset: int, size: int) -> bytes:
        """The bytes there."""
        size = max(0, min(size, self.size - offset))
        if size > 32 * MIB:
            raise AssertionError(f"{size} bytes at once")
        made = bytearray(size)
        for at, part in self.parts.items():
            low, high = max(at, offset), min(at + len(part), offset + size)
            if low < high:
                made[low - offset : high - offset] = part[low - at : high - at]
        return bytes(made)

    def read(self, offset: int, size: int) -> bytes:
        """The same for the reader under test, counted."""
        assert offset >= 0 and size >= 0
        self.calls += 1
        self.read_bytes += size
        assert self.calls < 5000 and self.read_bytes < 32 * MIB, "it reads without an end"
        return self.get(offset, size)


_MAGICS = {"ext4": (0x438, b"\x53\xef"), "xfs": (0, b"XFSB"), "swap": (4086, b"SWAPSPACE2")}
_TYPES = (partitions.ROOT_TYPES[0], "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", str(uuid.UUID(int=7)))


def _with_contents(rng: Random, disk: _Disk, starts: list[int]) -> None:
    for start in starts:
        if rng.random() < 0.5:
            at, magic = _MAGICS[rng.choice(list(_MAGICS))]
            sector, within = divmod(start * _BLOCK + at, _BLOCK)
            disk.put(sector, bytes(within) + magic)


def _gpt(rng: Random, disk: _Disk, note: list[str], *, good: bool) -> None:
    last = disk.size // _BLOCK - 1
    count, size = rng.choice(((128, 128), (4, 128), (8, 256)))
    table = bytearray(count * size)
    numbers: list[Number] = []
    starts = []
    for index in range(rng.randrange(min(count, 6) + 1)):
        first = rng.randrange(34, max(35, last - 40))
        end = min(last, first + rng.randrange(200))
        name = rng.choice(("root", "EFI system", "ü\n", "x" * 36)).encode("utf-16-le")
        head = uuid.UUID(rng.choice(_TYPES)).bytes_le + rng.randbytes(16)
        at = index * size
        table[at : at + 128] = (head + struct.pack("<QQQ", first, end, 0) + name).ljust(128, b"\0")
        numbers += fields(_ENTRY, at)
        starts.append(first)
    if not good and rng.random() < 0.5:
        harm(rng, table, numbers, note)
        del table[count * size :]
        table += bytes(count * size - len(table))
    mbr = bytearray(512)
    mbr[446:462] = struct.pack("<B3xB3xII", 0, 0xEE, 1, min(last, 0xFFFFFFFF))
    mbr[510:] = b"\x55\xaa"
    if not good and rng.random() < 0.2:
        harm(rng, mbr, fields(_ROW, 446), note)
    disk.put(0, mbr)
    for own, other, place in ((1, last, 2), (last, 1, last - 1 - len(table) // _BLOCK)):
        values = [b"EFI PART", 0x10000, 92, 0, own, other, 34, last - 34, rng.randbytes(16)]
        values += [place, count, size, zlib.crc32(table)]
        header = bytearray(struct.pack("<8sIIIxxxxQQQQ16sQIII", *values).ljust(512, b"\0"))
        if not good and rng.random() < 0.5:
            harm(rng, header, fields(_HEADER), note)
            header = header[:512].ljust(512, b"\0")
        if rng.random() < 0.9 or good:  # the sum is right, whatever is said
            length = min(512, int.from_bytes(header[12:16], "little"))
            header[16:20] = bytes(4)
            header[16:20] = struct.pack("<I", zlib.crc32(header[:length]))
        disk.put(own, header)
        kept = bytearray(table)
        if not good and rng.random() < 0.1:
            harm(rng, kept, numbers, note)
        disk.put(place, kept)
    _with_contents(rng, disk, starts)


def _dos(rng: Random, disk: _Disk, note: list[str], *, good: bool) -> None:
    last = min(disk.size // _BLOCK - 1, (1 << 32) - 1)
    starts = []

    def sector(rows: list[tuple[int, int, int]]) -> bytearray:
        made = bytearray(512)
        made[440:444] = b"\x78\x56\x34\x12"
        for index, (kind, first, length) in enumerate(rows):
            made[446 + 16 * index : 462 + 16 * index] = struct.pack(
                "<B3xB3xII", 0, kind, first, length
            )
        made[510:] = b"\x55\xaa"
        if not good and rng.random() < 0.6:
            numbers = [one for row in range(4) for one in fields(_ROW, 446 + 16 * row)]
            harm(rng, made, numbers, note)
            made = made[:512].ljust(512, b"\0")
        return made

    rows = [
        (rng.choice((0x83, 0x82, 7, 0xEF, 0)), rng.randrange(1, last), rng.randrange(1, 300))
        for _ in range(rng.randrange(4))
    ]
    starts += [first for _, first, _ in rows]
    if rng.random() < 0.6:
        begin = rng.randrange(1, max(2, last - 600))
        rows.append((rng.choice((5, 0x0F, 0x85)), begin, 600))
        at, count = 0, rng.choice((0, 1, 3, 70))
        if not good and rng.random() < 0.05:  # it leads to itself, and has nothing
            count = 0
            disk.put(begin, sector([(5, 0, 9)]))
        for number in range(count):
            inner = [(0x83, 1, rng.randrange(1, 9))] if rng.random() < 0.9 else []
            if number + 1 < count:
                following = at + 1 + rng.randrange(4) if good or rng.random() < 0.95 else at
                inner.append((5, following, 9))
            disk.put(begin + at, sector(inner))
            if number + 1 < count:
                at = following
    rng.shuffle(rows)
    disk.put(0, sector(rows[:4]))
    _with_contents(rng, disk, starts)


_Row = tuple[int, int, int, str, str, str]


def _table_of(disk: _Disk) -> tuple[list[_Row], int, bool] | None:
    """The table by UEFI 2.10, 5.3 and what Linux makes of it."""
    mbr = disk.get(0, 512)
    if len(mbr) < 512 or mbr[510:] != b"\x55\xaa" or disk.size < 1024:
        return None
    rows = [struct.unpack_from("<B3xB3xII", mbr, 446 + 16 * n) for n in range(4)]
    if any(flag & 0x7F for flag, *_ in rows):
        return None
    if all(kind != 0xEE for _, kind, *_ in rows):
        return _dos_of(disk, mbr, rows)
    last = disk.size // _BLOCK - 1
    for place in (1, last):
        header = disk.get(place * _BLOCK, 512)
        if len(header) < 512 or header[:8] != b"EFI PART":
            continue
        length, crc = struct.unpack_from("<II", header, 12)
        if struct.unpack_from("<Q", header, 24)[0] != place or not 92 <= length <= 512:
            continue
        if zlib.crc32(header[:16] + bytes(4) + header[20:length]) != crc:
            continue
        start, count, size, total = struct.unpack_from("<QIII", header, 72)
        if size < 128 or size % 128 or not 0 < count * size <= 4 * MIB:
            continue
        table = disk.get(start * _BLOCK, count * size)
        if len(table) != count * size or zlib.crc32(table) != total:
            continue
        found: list[_Row] = []
        valid = 0
        for index in range(count):
            entry = table[index * size : index * size + 128]
            first, end = struct.unpack_from("<QQ", entry, 32)
            if entry[:16] == bytes(16) or not first <= end <= last:
                continue
            valid += 1
            if valid > partitions.MOST_PARTITIONS:
                continue
            ids = [str(uuid.UUID(bytes_le=entry[at : at + 16])) for at in (0, 16)]
            name = entry[56:128].decode("utf-16-le", "replace").split("\0")[0]
            found.append((index + 1, first * 512, (end - first + 1) * 512, ids[0], ids[1], name))
        return (found, valid, place != 1) if found else None
    return None


def _dos_of(
    disk: _Disk, mbr: bytes, rows: list[tuple[Any, ...]]
) -> tuple[list[_Row], int, bool] | None:
    mark = mbr[440:444][::-1].hex()
    extended = (5, 0x0F, 0x85)
    found: list[_Row] = []

    def add(number: int, kind: int, first: int, length: int) -> None:
        if length and first * _BLOCK < disk.size:
            name = f"{mark}-{number:02x}"
            found.append((number, first * _BLOCK, length * _BLOCK, f"{kind:02x}", name, ""))

    for number, (_, kind, first, length) in enumerate(rows, 1):
        if kind and kind not in extended:
            add(number, kind, first, length)
    base = next((first for _, kind, first, length in rows if kind in extended and length), None)
    at, number, links = base, 5, 0
    while at is not None and links < 100 and number <= partitions.MOST_PARTITIONS:
        links += 1
        sector = disk.get(at * _BLOCK, 512)
        if len(sector) < 512 or sector[510:] != b"\x55\xaa":
            break
        inner = [struct.unpack_from("<B3xB3xII", sector, 446 + 16 * n) for n in range(4)]
        for _, kind, first, length in inner:
            if kind and kind not in extended and length:
                add(number, kind, at + first, length)
                number += 1
        onward = [first for _, kind, first, length in inner if kind in extended and length]
        at = base + onward[0] if onward and base is not None else None
    return (found, len(found), False) if found else None


def _tables(rng: Random, note: list[str]) -> None:
    disk = _Disk(rng.choice((100, 2048, 1 << 20, 1 << 33)))
    good = rng.random() < 0.2
    kind = rng.choice((_gpt, _gpt, _dos))
    kind(rng, disk, note, good=good)
    expected = _table_of(disk)
    table = partitions.read_disk(disk.read, disk.size)
    if expected is None:
        assert table is None or (table.total == 1 and table.partitions[0].number == 0), table
    else:
        assert table is not None, expected
        found = [one[:6] for one in table.partitions]
        assert (found, table.total, table.damaged) == expected, (found, expected)
        for one in table.partitions:
            for name, (at, magic) in _MAGICS.items():
                here = disk.get(one.start + at, len(magic)) == magic
                if one.content.kind == name:
                    assert here and at + len(magic) <= one.size
            assert one.may_be_root or one not in partitions.roots(table)
            over = partitions.overlapping(table, one)
            lies = [o for o in table.partitions if o.number != one.number and (
                o.start < one.start + one.size and one.start < o.start + o.size)]  # fmt: skip
            assert (over is None) == (not lies)
    if table is not None:
        for text in (
            partitions.advice("/dev/vda", table, rng.randrange(6)),
            partitions.listed(
                [("/dev/vda", table)], rng.choice(("PARTLABEL=x", "UUID=1", "LABEL="))
            ),
        ):
            assert text.isprintable() and len(text) < 4000, text
    assert isinstance(partitions.is_damaged(disk.read, disk.size), bool)


# --- texts ----------------------------------------------------------------------------------------


class Texts:
    """A file system of some texts, of which the reading is counted."""

    where = "the disk"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = {self._clean(path): data for path, data in files.items()}
        self.steps = 0

    @staticmethod
    def _clean(path: str) -> str:
        return "/" + "/".join(part for part in path.split("/") if part)

    def _step(self, size: int = 0) -> None:
        self.steps += 1
        assert self.steps < 5000, "it looks without an end"

    def has(self, path: str) -> bool:
        self._step()
        return self._clean(path) in self.files or bool(self.names(path))

    def names(self, path: str) -> list[str]:
        self._step()
        folder = self._clean(path).rstrip("/") + "/"
        below = [one.removeprefix(folder) for one in self.files if one.startswith(folder)]
        return sorted({one.split("/")[0] for one in below})

    def read_file(self, path: str, most: int) -> Iterator[bytes]:
        self._step()
        data = self.files.get(self._clean(path))
        if data is None:
            raise FileNotFoundError(path)
        if len(data) > most:
            raise ConfigError(f"it has {len(data)} bytes", cure="none")
        for at in range(0, len(data), 700):
            yield data[at : at + 700]

    def read_text(self, path: str, most: int) -> str:
        return b"".join(self.read_file(path, most)).decode("utf-8", "replace")


_LINES = (
    *("set default=0", 'set default="1>0"', "set default=${saved_entry}", "set root=hd0,gpt1"),
    *("menuentry 'One' {", 'menuentry "Two" --id two {', "submenu 'More' {", "}", "if [ x ]; then"),
    *("linux /vmlinuz-6.1 root=/dev/vda1 ro quiet", "initrd /initrd.img-6.1", "boot", "fi"),
    *("linux /boot/vmlinuz-6.1 a='b c' $kernelopts", "linux ${kernel} ro", "linux", "insmod gzio"),
    *("set kernelopts='root=UUID=1 rw'", "set x=$x$x$x$x", "linux (hd0,1)/vmlinuz-6.1", "{", "} }"),
    *(
        "initrd /boot/initrd.img-6.1 /nothing",
        "linux '/vmlinuz-6.1",
        "function f {",
        "\tsavedefault",
    ),
)
_EXTLINUX = (
    *(
        "DEFAULT one",
        "LABEL one",
        "LABEL two",
        "KERNEL /vmlinuz-6.1",
        "LINUX vmlinuz-6.1",
        "TIMEOUT 1",
    ),
    *(
        "APPEND root=/dev/vda1 initrd=/initrd.img-6.1 quiet",
        "INITRD /initrd.img-6.1,/nothing",
        "APPEND -",
    ),
    *("MENU DEFAULT", "KERNEL menu.c32", "UI vesamenu.c32", "kernel ../../vmlinuz-6.1"),
)
_FIELDS = (
    *(
        "title Linux",
        "linux /vmlinuz-6.1",
        "linux /boot/vmlinuz-6.1",
        "initrd /initrd.img-6.1",
        "version 6.1",
    ),
    *("options root=/dev/vda1 ro", "options $kernelopts", "efi /shell.efi", "# a comment", "linux"),
    *("initrd $tuned_initrd", "initrd /nothing", "options 'quote", "sort-key x"),
)
_SECTIONS = "name:8 size:4 address:4 raw:4 offset:4 :16"


def _unified(rng: Random, note: list[str]) -> bytes:
    parts = [
        ("linux", b"the kernel" * 20),
        ("initrd", b"the initrd"),
        ("uname", b"6.1"),
        ("cmdline", b"ro\0"),
    ]
    rng.shuffle(parts)
    head = bytearray(b"MZ".ljust(60, b"\0") + struct.pack("<I", 64))
    head += b"PE\0\0" + struct.pack("<HH12xHH", 0x8664, len(parts), 16, 0) + bytes(16)
    at, body = 1024, b""
    numbers = [Number("pe", 60, 4), Number("sections", 70, 2), Number("optional", 84, 2)]
    for name, data in parts:
        numbers += fields(_SECTIONS, len(head))
        padded = data.ljust(512, b"\0")
        head += struct.pack("<8sIIII16x", b"." + name.encode(), len(data), 0x1000, 512, at)
        at, body = at + 512, body + padded
    made = bytearray(bytes(head).ljust(1024, b"\0") + body)
    if rng.random() < 0.6:
        harm(rng, made, numbers, note)
    return bytes(made)


def _text(rng: Random, lines: tuple[str, ...]) -> bytes:
    chosen = [rng.choice(lines) for _ in range(rng.choice((1, 4, 12, 40)))]
    if rng.random() < 0.1:
        at = rng.randrange(len(chosen))
        strange = (
            "x" * 9000,
            "\x1b[2J",
            "'" * 9,
            "\\",
            "set default='" + ">" * 3000,
            "${" * 50,
            "\0",
        )
        chosen[at] += rng.choice(strange)
    data = bytearray("\n".join(chosen).encode())
    if rng.random() < 0.2:
        harm(rng, data, [], [])
    return bytes(data)


def _texts(rng: Random, note: list[str]) -> None:
    files: dict[str, bytes] = {}
    prefix = rng.choice(("/boot", ""))
    for name in ("vmlinuz-6.1", "initrd.img-6.1", "vmlinuz-6.10~rc1", "vmlinuz"):
        if rng.random() < 0.6:
            files[f"{prefix}/{name}"] = name.encode()
    if rng.random() < 0.7:
        files[f"{prefix}/{rng.choice(('grub', 'grub2'))}/grub.cfg"] = _text(rng, _LINES)
    if rng.random() < 0.3:
        block = b"# GRUB Environment Block\nsaved_entry=" + rng.choice(
            (b"0", b"two", b"1>0", b"9" * 99)
        )
        files[f"{prefix}/grub/grubenv"] = block + b"\nkernelopts=root=LABEL=x\n" + b"#" * 40
    if rng.random() < 0.3:
        for number in range(rng.choice((1, 3))):
            files[f"{prefix}/loader/entries/{number}-6.{number}.conf"] = _text(rng, _FIELDS)
        files[f"{prefix}/loader/loader.conf"] = b"default 1*\ntimeout 3\n"
    if rng.random() < 0.2:
        files[f"{prefix}/extlinux/extlinux.conf"] = _text(rng, _EXTLINUX)
    if rng.random() < 0.2:
        files[f"{prefix}/EFI/Linux/one.efi"] = _unified(rng, note)
    note.append(repr(files))
    systems: Any = [Texts(files)]
    if rng.random() < 0.2:
        systems.append(Texts({"/vmlinuz-6.1": b"other", "/boot/initrd.img-6.1": b"other"}))
    try:
        entry = find(systems)
    except ConfigError as error:
        _one_line(error)
        return
    if entry is None:
        return
    assert entry.system in systems and entry.system.has(entry.kernel), entry.kernel
    for path in entry.initrds:
        assert entry.system.has(path), path
    for word in entry.cmdline:
        assert "$" not in word and word.count('"') in (0, 2), word
        assert '"' not in word.strip('"') and (" " not in word or word[0] == word[-1] == '"')
    try:
        kernel = b"".join(entry.read_kernel(1 << 20))
        initrds = b"".join(entry.read_initrds(1 << 20))
        assert len(kernel) <= 1 << 20 and len(initrds) <= 2 << 20
        if entry.sections:
            start, size = entry.sections[".linux"]
            whole = entry.system.files[entry.kernel]
            assert kernel == whole[start : start + size]
        else:
            assert kernel == entry.system.files[Texts._clean(entry.kernel)]
    except FileNotFoundError:  # what is named is a folder
        pass
    except ConfigError as error:
        _one_line(error)


_WAYS = (_tables, _tables, _tables, _texts, _texts)


def disk_case(rng: Random, ring: Ring) -> int:
    """One disk; one step."""
    note: list[str] = []
    way = rng.choice(_WAYS)
    with told(way, note):
        way(rng, note)
    return 1
