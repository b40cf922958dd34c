"""What kernels' loaders have to make of a file, by the boot protocols and what pyvmm refuses.

Each says of any bytes whether they have to be refused, and where each byte has to be otherwise; and
which numbers in them matter, with the values at the edge of what each may be.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from itertools import pairwise
from typing import Any, NamedTuple

import zstandard
from fuzz.damage import Number

MIB = 1 << 20
PAGE = 4096
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class Refused(Exception):
    """The file has to be refused."""


class Edge(NamedTuple):
    """A number in a file, and what it may be at its edges."""

    number: Number
    values: tuple[int, ...]


def edge(name: str, at: int, size: int, *values: int) -> Edge:
    top = 1 << 8 * size
    return Edge(Number(name, at, size), tuple(one for one in values if 0 <= one < top))


def u(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


def up(value: int, step: int) -> int:
    return -(-value // step) * step


class Loaded(NamedTuple):
    """A kernel in memory: what is where from 1 MiB on, its whole room, and how it begins."""

    parts: list[tuple[int, bytes]]
    start: int
    end: int
    initrd_max: int
    cmdline_max: int
    rip: int
    is_long: bool
    header: bytes | None  # of the zero page; None: it is started by PVH
    code32: int = 0


# --- bzImage --------------------------------------------------------------------------------------


class BzImage(NamedTuple):
    setup: int
    code: bytes
    head: bytes
    start: int
    loaded: Loaded


def bzimage(data: bytes) -> BzImage:
    """By Linux boot.rst. Raises Refused."""
    raw = data[:0x290].ljust(0x290, b"\0")
    end = 0x202 + raw[0x201]
    version = u(raw, 0x206, 2)
    if raw[0x202:0x206] != b"HdrS" or version < 0x206 or not raw[0x211] & 1:
        raise Refused("protocol")
    if end < 0x23C or end > 0x290:
        raise Refused("header")
    head = raw[:end].ljust(0x290, b"\0")
    setup = 512 * ((head[0x1F1] or 4) + 1)
    paragraphs = u(head, 0x1F4, 4)
    there = -(-(len(data) - setup) // 16)
    if paragraphs * 16 <= 0x200 or there < paragraphs:
        raise Refused("code")
    code = data[setup : setup + 16 * paragraphs]
    start = u(head, 0x258, 8) if version >= 0x20A else MIB
    if head[0x234]:
        step = u(head, 0x230, 4)
        if bin(step).count("1") != 1:
            raise Refused("alignment")
        start = up(max(start, MIB), step)
    elif start < MIB:
        raise Refused("low")
    room = max(u(head, 0x260, 4) if version >= 0x20A else 0, len(code))
    is_long = version >= 0x20C and bool(head[0x236] & 1)
    loaded = Loaded(
        parts=[(start, code)],
        start=start,
        end=start + room,
        initrd_max=u(head, 0x22C, 4),
        cmdline_max=min(u(head, 0x238, 4), 0xFFFF),
        rip=start + 0x200 * is_long,
        is_long=is_long,
        header=head[0x1F1:end],
        code32=start,
    )
    return BzImage(setup, code, head, start, loaded)


def bzimage_edges(data: bytes, size: int, cmdline: int, initrd: int) -> list[Edge]:
    """For memory of `size` bytes, and a command line and an initrd of so many."""
    sectors = data[0x1F1] or 4
    rest = (len(data) - 512 * (sectors + 1)) // 16
    step = max(1, u(data, 0x230, 4))
    try:
        model = bzimage(data)
        start, code, end = model.start, len(model.code), model.loaded.end
    except Refused:
        start, code, end = MIB, 16 * max(0, rest), MIB
    pages = up(initrd, PAGE)
    return [
        edge("setup_sects", 0x1F1, 1, 0, 1, sectors - 1, sectors + 1, 4),
        edge("syssize", 0x1F4, 4, 0, 0x20, 0x21, rest, rest + 1, rest + 2, rest - 1),
        edge("jump", 0x201, 1, 0x39, 0x3A, 0x3B, 0x57, 0x58, 0x5A, 0x62, 0x8D, 0x8E, 0x8F),
        edge("magic", 0x202, 4, 0),
        edge("version", 0x206, 2, *range(0x205, 0x208), *range(0x209, 0x20E), 0x105, 0x305),
        edge("kernel_version", 0x20E, 2, 0, 1, 0xFFFF),
        edge("loadflags", 0x211, 1, 0, 1, 2, 0x80, 0x81),
        edge("initrd_addr_max", 0x22C, 4, end - 1, end, end + pages - 1, end + pages - 2),
        edge("initrd_addr_max", 0x22C, 4, start - 1, start - 2, MIB + pages - 1, MIB + pages - 2),
        edge("initrd_addr_max", 0x22C, 4, size - 1, size, size - 2, 0),
        edge("alignment", 0x230, 4, 0, 1, 2, 3, PAGE, PAGE + 1, 2 * PAGE, MIB, 2 * MIB),
        edge("relocatable", 0x234, 1, 0, 1, 2),
        edge("xloadflags", 0x236, 2, 0, 1, 2, 3),
        edge("cmdline_size", 0x238, 4, cmdline - 1, cmdline, cmdline + 1, 0xFFFF, 0x10000),
        edge("pref_address", 0x258, 8, MIB - 1, MIB, MIB + 1, 0, MIB - step, MIB + step),
        edge("pref_address", 0x258, 8, *(size - one + n for one in (code, 0) for n in (-1, 0, 1))),
        edge("pref_address", 0x258, 8, *(up(size - code, step) + n * step for n in (-2, -1, 0))),
        edge("init_size", 0x260, 4, 0, code - 1, code, code + 1),
        edge("init_size", 0x260, 4, *(size - start - pages * n for n in (0, 1))),
        edge("init_size", 0x260, 4, *(size - start - pages * n + 1 for n in (0, 1))),
        edge("init_size", 0x260, 4, 0xC0000000 - start, 0xC0000001 - start),
    ]


# --- ELF ------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    at: int
    kind: int
    offset: int
    paddr: int
    filesz: int
    memsz: int
    align: int


_HEADS = {1: (52, 32, 28, 42, 44), 2: (64, 56, 32, 54, 56)}  # and places of phoff, phentsize, phnum


def _rows(data: bytes) -> list[_Row]:
    is_wide = data[4] == 2
    _, step, *places = _HEADS[data[4]]
    begin = u(data, places[0], 8 if is_wide else 4)
    count = u(data, places[2], 2)
    found = []
    for at in range(begin, begin + step * min(count, 200), step):
        row = data[at : at + step].ljust(step, b"\0")
        if is_wide:
            kind, _, offset, _, paddr, filesz, memsz, align = struct.unpack("<IIQQQQQQ", row)
        else:
            kind, offset, _, paddr, filesz, memsz, _, align = struct.unpack("<8I", row)
        found.append(_Row(at, kind, offset, paddr, filesz, memsz, align))
    return found


def elf(data: bytes) -> Loaded:
    """By the System V ABI, and Xen's note. Raises Refused."""
    if len(data) < 64 or data[4] not in _HEADS or data[5] != 1:
        raise Refused("ident")
    is_wide = data[4] == 2
    _, step, phoff, phentsize, phnum = _HEADS[data[4]]
    count = u(data, phnum, 2)
    if u(data, 18, 2) != (62 if is_wide else 3) or u(data, 16, 2) not in (2, 3) or count > 128:
        raise Refused("header")
    if count and u(data, phentsize, 2) != step:
        raise Refused("entries")
    if u(data, phoff, 8 if is_wide else 4) + count * step > len(data):
        raise Refused("table")
    rows = _rows(data)
    loads = []
    for row in rows:
        if row.kind == 1:
            if row.filesz > row.memsz or row.offset + row.filesz > len(data):
                raise Refused("segment")
            if row.paddr + row.memsz > 1 << 64 or (row.memsz and row.paddr < MIB):
                raise Refused("place")
            if row.memsz:
                loads.append(row)
    loads.sort(key=lambda row: row.paddr)
    if not loads or any(a.paddr + a.memsz > b.paddr for a, b in pairwise(loads)):
        raise Refused("segments")
    pvh = None
    for row in rows:
        if row.kind == 4 and pvh is None:
            if row.offset + row.filesz > len(data) or row.filesz > MIB:
                raise Refused("notes")
            pvh = _pvh(data[row.offset : row.offset + row.filesz], 8 if row.align == 8 else 4)
    if pvh is None and not is_wide:
        raise Refused("no note")
    entry = u(data, 24, 8 if is_wide else 4) if pvh is None else pvh
    if not any(row.paddr <= entry < row.paddr + row.filesz for row in loads):
        raise Refused("entry")
    header = None
    if pvh is None:
        page = bytearray(0x290)
        struct.pack_into("<H4sH", page, 0x1FE, 0xAA55, b"", 0)
        page[0x202:0x206] = b"HdrS"
        struct.pack_into("<H", page, 0x206, 0x20F)
        struct.pack_into("<I4xI", page, 0x230, 16 * MIB, 0xFFFF)
        header = bytes(page[0x1F1:])
    return Loaded(
        parts=[(row.paddr, data[row.offset : row.offset + row.filesz]) for row in loads],
        start=loads[0].paddr,
        end=loads[-1].paddr + loads[-1].memsz,
        initrd_max=0xC0000000 - 1,
        cmdline_max=2047,
        rip=entry,
        is_long=pvh is None,
        header=header,
        code32=entry & 0xFFFFFFFF,
    )


def _pvh(notes: bytes, step: int) -> int | None:
    at = 0
    while len(notes) - at >= 12:
        name, desc, kind = struct.unpack_from("<3I", notes, at)
        begin = up(at + 12 + name, step)
        if kind == 18 and name == 4 and notes[at + 12 : at + 16] == b"Xen\0":
            value = notes[begin : begin + desc]
            if desc not in (4, 8) or len(value) < desc:
                raise Refused("note")
            return int.from_bytes(value, "little")
        at = up(begin + desc, step)
    return None


def elf_edges(data: bytes, size: int) -> list[Edge]:
    if len(data) < 64 or data[4] not in _HEADS:
        return [edge("class", 4, 1, 1, 2)]
    is_wide = data[4] == 2
    word = 8 if is_wide else 4
    _, step, phoff, phentsize, phnum = _HEADS[data[4]]
    begin, count = u(data, phoff, word), u(data, phnum, 2)
    rows = _rows(data)
    loads = [row for row in rows if row.kind == 1 and row.memsz]
    ends = [row.paddr + row.memsz for row in loads]
    places = [
        one
        for row in loads
        for one in (row.paddr, row.paddr - 1, row.paddr + row.filesz, row.paddr + row.filesz - 1)
    ]
    fit = len(data) - count * step
    found = [
        edge("class", 4, 1, 0, 1, 2, 3),
        edge("data", 5, 1, 0, 1, 2),
        edge("kind", 16, 2, 1, 2, 3, 4),
        edge("machine", 18, 2, 3, 62, 183),
        edge("entry", 24, word, *places, *ends),
        edge("phoff", phoff, word, 0, fit, fit + 1, fit - 1),
        edge("phentsize", phentsize, 2, step - 1, step + 1, 0, 32, 56),
        edge("phnum", phnum, 2, 0, count - 1, count + 1, 127, 128, 129, 0xFFFF),
        edge("phnum", phnum, 2, *((len(data) - begin) // step + n for n in (0, 1))),
    ]
    at = (16, 32, 40, 24, 48) if is_wide else (4, 16, 20, 12, 28)
    where = dict(zip(("offset", "filesz", "memsz", "paddr", "align"), at, strict=True))
    where["offset"] = 8 if is_wide else 4

    def put(name: str, row: _Row, *values: int) -> None:
        found.append(edge(name, row.at + where[name], word, *values))

    for row in rows[:8]:
        found.append(edge("type", row.at, 4, 0, 1, 4, 6))
        put("offset", row, *(len(data) - row.filesz + n for n in (-1, 0, 1)))
        rest = len(data) - row.offset
        put("filesz", row, 0, rest - 1, rest, rest + 1, row.memsz, row.memsz + 1, MIB, MIB + 1)
        room, top = size - row.paddr, (1 << 64) - row.paddr
        put(
            "memsz",
            row,
            0,
            row.filesz,
            row.filesz - 1,
            row.filesz + 1,
            room,
            room + 1,
            top,
            top + 1,
        )
        others = [one for one in loads if one is not row]
        free = [one.paddr - row.paddr + n for one in others for n in (0, 1)]
        put("memsz", row, *(one for one in free if one > 0))
        near = [one.paddr + one.memsz - n for one in others for n in (0, 1)]
        near += [one.paddr - row.memsz + n for one in others for n in (0, 1)]
        low = (MIB - 1, MIB, MIB + 1, *(size - row.memsz + n for n in (-1, 0, 1)))
        put("paddr", row, *low, *near, top)
        put("align", row, 0, 4, 8, 16)
        if row.kind == 4:
            note = row.offset + row.filesz - 20
            found += [
                edge("nsize", note, 4, 3, 4, 5, 8),
                edge("dsize", note + 4, 4, 0, 3, 4, 5, 8),
                edge("note type", note + 8, 4, 17, 18, 19),
                edge("desc", note + 16, 4, *places),
                edge("earlier dsize", note - 16, 4, 0, 1, 3, 4, 5, 8),
            ]
    return found


def load(data: bytes, size: int, initrd: bytes | None, cmdline: str) -> tuple[Loaded, int]:
    """The kernel, and where the initrd is, in memory of `size` bytes. Raises Refused."""
    found = elf(data) if data[:4] == b"\x7fELF" else bzimage(data).loaded
    if len(cmdline.encode()) > found.cmdline_max or found.end > size:
        raise Refused("room")
    if initrd is None:
        return found, 0
    check_initrd(initrd)
    top = min(found.initrd_max + 1, size)
    at = (top - len(initrd)) // PAGE * PAGE
    if at < found.end:
        at = (min(found.start, top) - len(initrd)) // PAGE * PAGE
        if at < MIB:
            raise Refused("no place")
    return found, at


def check_initrd(data: bytes) -> None:
    if not data or data[:4] == b"\x7fELF":
        raise Refused("none")
    if data[0x202:0x206] == b"HdrS" or data[0x38:0x3C] == b"ARM\x64":
        raise Refused("a kernel")
    if data[:6] not in (b"070701", b"070702"):
        return
    at = 0
    while True:
        head = data[at : at + 110] if at >= 0 else b""
        if len(head) < 110 or head[:6] not in (b"070701", b"070702"):
            raise Refused("breaks off")
        try:
            size, name = int(head[54:62], 16), int(head[94:102], 16)
        except ValueError:
            raise Refused("no number") from None
        if data[at + 110 : at + 110 + max(0, min(name, 10))] == b"TRAILER!!!":
            return
        at += up(110 + name, 4) + up(size, 4)


# --- what is compressed ---------------------------------------------------------------------------


def unpacked(data: bytes) -> bytes:
    """The first thing in `data`, whole. Raises Refused."""
    one: Any
    if data[:2] == GZIP:
        one = zlib.decompressobj(31)
    elif data[:3] == b"BZh":
        one = bz2.BZ2Decompressor()
    elif data[:6] == b"\xfd7zXZ\0" or data[:3] == b"\x5d\0\0":
        one = lzma.LZMADecompressor(memlimit=256 * MIB)
    elif data[:4] == ZSTD:
        one = zstandard.ZstdDecompressor(max_window_size=128 * MIB).decompressobj()
    else:
        raise Refused("unknown")
    try:
        found: bytes = one.decompress(data)
    except Exception as error:
        raise Refused("damaged") from error
    if not one.eof:
        raise Refused("cut off")
    return found


def payload(data: bytes) -> bytes:
    """The vmlinux in a bzImage, by boot.rst and Makefile.lib. Raises Refused."""
    image = bzimage(data)
    at, size = u(image.head, 0x248, 4), u(image.head, 0x24C, 4)
    if size == 0 or at + size > len(image.code):
        raise Refused("outside")
    packed = image.code[at : at + size]
    if packed[:4] == b"\x7fELF":
        return packed
    said = u(packed, max(0, len(packed) - 4), 4)
    found = unpacked(packed if packed[:2] == GZIP else packed[:-4])
    if not 0 < said <= 1 << 30 or len(found) != said:
        raise Refused("size")
    return found


# --- arm64 ----------------------------------------------------------------------------------------


def arm64(data: bytes, size: int) -> tuple[int, int, bytes]:
    """Where it begins, where what it needs ends, and its bytes. Raises Refused."""
    if data[:2] == b"MZ" and data[4:8] == b"zimg":
        at, count = u(data, 8, 4), u(data, 12, 4)
        packed = data[at : at + count]
        if not count or at + count > len(data) or (packed[:2] != GZIP and packed[:4] != ZSTD):
            raise Refused("payload")
        data = unpacked(packed)
    elif data[:2] == GZIP or data[:4] == ZSTD:
        data = unpacked(data)
    if len(data) < 64 or data[56:60] != b"ARM\x64":
        raise Refused("magic")
    offset, room, flags = struct.unpack_from("<3Q", data, 8)
    if not room or flags % 2 or offset % PAGE or offset >= 2 * MIB:
        raise Refused("header")
    if offset + room > size or len(data) > room:
        raise Refused("room")
    return offset, offset + room, data


def arm64_edges(data: bytes, size: int, length: int) -> list[Edge]:
    """Those of a header, of a kernel of `length` bytes."""
    offset, room = u(data, 8, 8), u(data, 16, 8)
    near = [size - room + n for n in (-PAGE, -1, 0, 1)]
    return [
        edge("text_offset", 8, 8, 0, PAGE, PAGE - 1, PAGE + 1, 2 * MIB, 2 * MIB - PAGE, *near),
        edge("text_offset", 8, 8, size // PAGE * PAGE - room // PAGE * PAGE),
        edge("image_size", 16, 8, 0, 1, length - 1, length, length + 1),
        edge("image_size", 16, 8, *(size - offset + n for n in (-1, 0, 1))),
        edge("flags", 24, 8, 0, 1, 2, 10, 11),
        edge("magic", 56, 4, 0),
    ]


# --- modules --------------------------------------------------------------------------------------


class Section(NamedTuple):
    name: int
    kind: int
    offset: int
    size: int
    align: int
    other: tuple[int, ...]


class Module(NamedTuple):
    """The sections that can be read, and whether those are all; where their names are."""

    sections: list[Section]
    is_whole: bool
    names: int

    def is_called(self, data: bytes, section: Section, *names: bytes) -> bool:
        at = self.names + section.name
        return data[at : at + 32].startswith(names)


def module(data: bytes) -> Module:
    """By elf(5), of either class and order. Raises Refused."""
    if data[:4] != b"\x7fELF" or len(data) < 64 or data[4] not in (1, 2):
        raise Refused("no ELF")
    order = "big" if data[5] == 2 else "little"
    is_wide = data[4] == 2

    def n(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)  # type: ignore[arg-type]

    start = n(0x28, 8) if is_wide else n(0x20, 4)
    step, count, strings = (
        n(at, 2) for at in range(*((0x3A, 0x40, 2) if is_wide else (0x2E, 0x34, 2)))
    )
    word, length = (8, 64) if is_wide else (4, 40)

    def section(index: int) -> Section | None:
        at = start + index * step
        if at + length > len(data):
            return None
        rest = [n(at + 8 + word * index, word) for index in range(4)]
        at += 8 + 4 * word
        tail = n(at, 4), n(at + 4, 4), n(at + 8, word), n(at + 8 + word, word)
        at -= 8 + 4 * word
        others = (rest[0], rest[1], tail[0], tail[1], tail[3])
        return Section(n(at, 4), n(at + 4, 4), rest[2], rest[3], tail[2], others)

    names = section(strings)
    if names is None or strings >= count:
        raise Refused("names")
    found = []
    for index in range(count):
        one = section(index)
        if one is None:
            return Module(found, False, names.offset)
        found.append(one)
    return Module(found, True, names.offset)


def modinfo(data: bytes) -> dict[str, list[str]]:
    """What a module says of itself. Raises Refused."""
    found = module(data)
    info = [one for one in found.sections if found.is_called(data, one, b".modinfo\0")]
    if not info:
        raise Refused("no information")
    at, size = info[0].offset, info[0].size
    if size > 4 * MIB or at + size > len(data):
        raise Refused("outside")
    texts: dict[str, list[str]] = {}
    for text in data[at : at + size].decode("ascii", "replace").split("\0"):
        if "=" in text:
            name, value = text.split("=", 1)
            texts.setdefault(name, []).append(value)
    if "vermagic" not in texts:
        raise Refused("no version")
    return texts


def module_edges(data: bytes) -> list[Edge]:
    """Those of a little-endian one of 64 bits."""
    start, count = u(data, 0x28, 8), u(data, 0x3C, 2)
    fit = len(data) - 64 * count
    found = [
        edge("class", 4, 1, 0, 1, 2, 3),
        edge("order", 5, 1, 0, 1, 2),
        edge("shoff", 0x28, 8, 0, fit - 1, fit, fit + 1, len(data), len(data) + 1),
        edge("shentsize", 0x3A, 2, 0, 40, 63, 64, 65),
        edge("shnum", 0x3C, 2, 0, 1, count - 1, count + 1),
        edge("shstrndx", 0x3E, 2, 0, count - 1, count, count + 1, 0xFFFF),
    ]
    for index in range(min(count, 16)):
        at = start + 64 * index
        offset, size = u(data, at + 24, 8), u(data, at + 32, 8)
        rest = len(data) - offset
        found += [
            edge("sh_name", at, 4, 0, 1, u(data, at, 4) + 1, len(data)),
            edge("sh_type", at + 4, 4, 0, 1, 8, 3),
            edge("sh_offset", at + 24, 8, *(len(data) - size + n for n in (-1, 0, 1))),
            edge(
                "sh_size", at + 32, 8, 0, size - 1, size + 1, rest, rest + 1, 4 * MIB, 4 * MIB + 1
            ),
            edge("sh_addralign", at + 48, 8, 0, 1, 2, 3, 16, 4096, 65535, 65536, 65537),
        ]
    return found
