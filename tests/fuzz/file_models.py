"""Readers of file systems of our own, to hold those of pyvmm.boot against: from the same
descriptions of the formats, in the plainest way, with the same rules for what is refused.

They also tell where each number is that they look at, by its name, and which values are at the
edge of what it may be: that is where faults are.
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import zstandard

MIB = 1 << 20
MOST_PATH, MOST_LINKS, MOST_DIRECTORY, MOST_PIECES = 4095, 16, 2 << 20, 1 << 16
MODES = (0o100644, 0o040755, 0o120777, 0o010644)


class Refused(Exception):
    """The file system is damaged, is not understood, or costs too much."""


class Noted(NamedTuple):
    """A number, where it is, and what it may be at its edges."""

    name: str
    at: int
    size: int
    order: str
    edges: tuple[int, ...]


class Node(NamedTuple):
    """What there is at a path; `more` is what its file system has of it."""

    mode: int
    size: int
    more: tuple[int, ...] = ()

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


class Model:
    """A file system of `size` bytes that `get` reads; `left` bytes may be looked at.

    `may_refuse` is set where a reader may look further than it has to, and find damage there;
    `unsure` where what is damaged has no meaning.
    """

    order = "little"

    def __init__(self, get: Callable[[int, int], bytes], size: int, left: int) -> None:
        self._get, self._size, self.left = get, size, left
        self.spent = 0
        self.noted: list[Noted] | None = None
        self.may_refuse = self.unsure = False
        self.most = 0

    def open(self) -> None:
        """Look at what says what it is."""
        raise NotImplementedError

    def raw(self, at: int, size: int) -> bytes:
        if at + size > self._size:
            raise Refused(f"byte {at}")
        return self._get(at, size)

    def take(self, size: int) -> None:
        self.spent += size
        if self.spent > self.left:
            raise Refused("too much")

    def note(self, name: str, at: int | None, size: int, *edges: int) -> None:
        if self.noted is not None and at is not None:
            self.noted.append(Noted(name, at, size, self.order, edges))

    def number(self, name: str, at: int, size: int, *edges: int) -> int:
        """One of the disk's, at any place."""
        self.note(name, at, size, *edges)
        return int.from_bytes(self.raw(at, size), self.order)  # type: ignore[arg-type]

    # --- by path ----------------------------------------------------------------------------------

    def root(self) -> Node:
        raise NotImplementedError

    def child(self, directory: Node, name: bytes) -> Node | None:
        raise NotImplementedError

    def target(self, link: Node) -> bytes:
        raise NotImplementedError

    def content(self, node: Node) -> Iterator[bytes]:
        raise NotImplementedError

    def all_names(self, directory: Node) -> list[str]:
        raise NotImplementedError

    def find(self, path: str) -> Node:
        trail, left, links = [self.root()], path.encode().split(b"/"), 0
        while left:
            name = left.pop(0)
            if name == b"..":
                trail = trail[:-1] or trail
            elif name not in (b"", b"."):
                if not trail[-1].is_directory:
                    raise FileNotFoundError
                self.take(4096)
                found = self.child(trail[-1], name)
                if found is None:
                    raise FileNotFoundError
                if not stat.S_ISLNK(found.mode):
                    trail.append(found)
                    continue
                links += 1
                if links > MOST_LINKS or found.size > MOST_PATH:
                    raise Refused("links")
                to = self.target(found)
                trail = trail[:1] if to[:1] == b"/" else trail
                left = to.split(b"/") + left
        return trail[-1]

    def file(self, path: str) -> bytes:
        """What has to come for that file. Raises Refused, FileNotFoundError."""
        if len(path) > MOST_PATH:
            raise FileNotFoundError
        node = self.find(path)
        if not stat.S_ISREG(node.mode) or node.size > self.most:
            raise Refused("no such file")
        return b"".join(self.content(node))

    def names(self, path: str) -> list[str]:
        try:
            node = self.find(path)
        except FileNotFoundError:
            return []
        names = self.all_names(node) if node.is_directory else []
        return sorted(one for one in names if one.isprintable())


def _texts(names: list[bytes]) -> list[str]:
    found = [one.decode(errors="replace") for one in names]
    return [one for one in found if "\ufffd" not in one]


def _kind(mode: int) -> str:
    names = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
    return names.get(stat.S_IFMT(mode), "other")


def _sizes(mode: int, size: int, block: int, most: int) -> tuple[int, ...]:
    """What the size of such a node may be at its edges."""
    kind = _kind(mode)
    near = (0, size - 1, size + 1)
    if kind == "link":
        return (*near, 1, 59, 60, 61, MOST_PATH, MOST_PATH + 1)
    if kind == "directory":
        return (*near, block - 1, block, size - block, MOST_DIRECTORY, MOST_DIRECTORY + 1)
    several = (12 * block, 12 * block + 1, (12 + block // 4) * block, (12 + block // 4) * block + 1)
    return (*near, most, most + 1, -(-size // block) * block, size + block, *several)


# --- ext2, ext3, ext4 -----------------------------------------------------------------------------

_UNKNOWN = (1, 8, 0x10, 0x20, 0x800, 0x1000, 0x20000, 0x80000000)


class _Run(NamedTuple):
    """So many bytes of a file: from `at` of the disk on, or zeros."""

    size: int
    at: int | None


class Ext(Model):
    def open(self) -> None:
        def sb(name: str, at: int, size: int, *edges: int) -> int:
            return self.number(name, 1024 + at, size, *edges)

        if sb("magic", 0x38, 2) != 0xEF53:
            raise Refused("magic")
        shift = sb("log_block_size", 0x18, 4, 0, 1, 2, 6, 7, 8)
        if shift > 6:
            raise Refused("blocks")
        self.block = 1024 << shift
        self.inodes = sb("inodes_count", 0, 4, 1, 2, *range(11, 20))
        self.per_group = sb("inodes_per_group", 0x28, 4, 0, 1, 2, 11, 12)
        self.first = sb("first_data_block", 0x14, 4, 0, 1, 2)
        self.inode_size, features = 128, 0
        if sb("rev_level", 0x4C, 4, 0, 1, 2):
            sizes = (64, 127, 128, 129, 192, 256, 384, self.block, 2 * self.block)
            self.inode_size = sb("inode_size", 0x58, 2, *sizes)
            value = 0x2C2
            features = sb("incompat", 0x60, 4, *(value | one for one in (*_UNKNOWN, 0x80, 0x1F7C6)))
        known = 0x2 | 0x4 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000
        if features & ~(known | 0x10000 | 0x20000):
            raise Refused("features")
        self.descriptor = 32
        if features & 0x80:
            self.descriptor = sb("desc_size", 0xFE, 2, 0, 31, 32, 33, 63, 64, 128, 1024, 1025)
        is_power = bin(self.inode_size).count("1") == 1
        if not (is_power and 128 <= self.inode_size <= self.block and self.per_group):
            raise Refused("inodes")
        if self.first > 1 or not 32 <= self.descriptor <= 1024:
            raise Refused("groups")

    def root(self) -> Node:
        return self.inode(2)

    def inode(self, number: int) -> Node:
        if number == 0 or number > self.inodes:
            raise Refused(f"inode {number}")
        self.note("inodes_count", 1024, 4, number, number - 1)
        self.note("inodes_per_group", 1024 + 0x28, 4, number, number - 1, number - 2)
        group, index = (number - 1) // self.per_group, (number - 1) % self.per_group
        at = (self.first + 1) * self.block + group * self.descriptor
        self.raw(at, 64)
        last = self._size // self.block
        table = self.number("inode_table", at + 8, 4, last, last - 1)
        if self.descriptor >= 64:
            table += self.number("inode_table_hi", at + 0x28, 4, 1) << 32
        at = table * self.block + index * self.inode_size
        self.raw(at, 128)
        mode = self.number("i_mode", at, 2, *MODES)
        size = self.number("i_size", at + 4, 4)
        edges = _sizes(mode, size, self.block, self.most)
        self.note(f"{_kind(mode)} size", at + 4, 4, *edges)
        size += self.number("i_size_hi", at + 0x6C, 4, 1) << 32
        flags = self.number("i_flags", at + 0x20, 4)
        self.note("i_flags", at + 0x20, 4, *(flags ^ one for one in (0x80000, 0x10000000, 0x800)))
        return Node(mode, size, (at + 0x28, flags))

    def runs(self, node: Node) -> Iterator[_Run]:
        place, flags = node.more
        if flags & 0x10000800:
            raise Refused("inline, or encrypted")
        blocks = self.extents(place) if flags & 0x80000 else self.mapped(node)
        left, next = node.size, 0
        for logical, count, physical in blocks:
            if logical < next:
                if not left:
                    self.may_refuse = True
                    return
                raise Refused("order")
            hole = min(left, (logical - next) * self.block)
            yield _Run(hole, None)
            size = min(left - hole, count * self.block)
            left -= hole + size
            next = logical + count
            yield _Run(size, physical * self.block if physical else None)
            if not left and physical:
                return
            if not left:
                self.may_refuse = True
                return
        yield _Run(left, None)

    def extents(self, place: int) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []
        total = 1

        def below(at: int, room: int, above: int) -> None:
            nonlocal total
            most = room // 12 - 1
            if self.number("eh_magic", at, 2) != 0xF30A:
                raise Refused("magic")
            count = self.number("eh_entries", at + 2, 2, most, most + 1, 0, 1)
            depth = self.number("eh_depth", at + 6, 2, 0, 1, 5, 6, above, above - 1)
            total += count
            if depth >= above or count > most or total > MOST_PIECES:
                raise Refused("a tree")
            ending = 0
            for at in [at + 12 * number for number in range(1, count + 1)]:
                last = self._size // self.block
                if depth:
                    block = self.number("ei_leaf_lo", at + 4, 4, last, last - 1)
                    block += self.number("ei_leaf_hi", at + 8, 2, 1) << 32
                    self.take(self.block)
                    self.raw(block * self.block, self.block)
                    below(block * self.block, self.block, depth)
                    continue
                logical = self.number("ee_block", at, 4, ending, ending - 1 if ending else 0)
                count = self.number("ee_len", at + 4, 2, 0, 1, 32767, 32768, 32769, 65535)
                physical = self.number("ee_start_hi", at + 6, 2, 1) << 32
                physical += self.number("ee_start_lo", at + 8, 4, 0, last, last - 1)
                if count > 32768:
                    count, physical = count - 32768, 0
                ending = logical + count
                found.append((logical, count, physical))

        below(place, 60, 6)
        return found

    def mapped(self, node: Node) -> Iterator[tuple[int, int, int]]:
        place, _ = node.more
        needed = -(-node.size // self.block)
        fan = self.block // 4

        def below(at: int | None, level: int, logical: int) -> Iterator[tuple[int, int, int]]:
            last = self._size // self.block
            number = 0 if at is None else self.number(f"block {level}", at, 4, 0, last, last - 1)
            if level == 0:
                yield logical, 1, number
                return
            if number:
                self.raw(number * self.block, self.block)
            for index in range(fan):
                begin = logical + index * fan ** (level - 1)
                if begin >= needed:
                    return
                inner = number * self.block + 4 * index if number else None
                yield from below(inner, level - 1, begin)

        logical = 0
        for index in range(15):
            if logical >= needed:
                return
            level = max(0, index - 11)
            yield from below(place + 4 * index, level, logical)
            logical += fan**level

    def content(self, node: Node) -> Iterator[bytes]:
        for run in self.runs(node):
            if run.at is None or not run.size:
                yield bytes(run.size)
            else:
                yield self.raw(run.at, run.size)

    def target(self, link: Node) -> bytes:
        if link.size < 60:
            return self.raw(link.more[0], link.size)
        return b"".join(self.content(link))

    def entries(self, node: Node) -> dict[bytes, int]:
        if node.size > MOST_DIRECTORY:
            raise Refused("large")
        self.take(node.size)
        parts, places, at = [], [], 0
        for run in self.runs(node):
            if run.size:
                parts.append(bytes(run.size) if run.at is None else self.raw(run.at, run.size))
                places.append((at, run))
                at += run.size
        data = b"".join(parts)

        def place(offset: int) -> int | None:
            begin, run = next(one for one in reversed(places) if one[0] <= offset)
            return None if run.at is None else run.at + offset - begin

        found, at = {}, 0
        while at + 8 <= len(data):
            number, length, name = struct.unpack_from("<IHB", data, at)
            if self.noted is not None:
                where = place(at)
                if where is not None:
                    rest = len(data) - at
                    self.note("d_inode", where, 4, 0, self.inodes, self.inodes + 1)
                    edges = (0, 4, 7, 8, 9, 12, name + 8, name + 7, min(rest, 65535))
                    self.note("rec_len", where + 4, 2, *edges, min(rest + 1, 65535))
                    self.note("name_len", where + 6, 1, 0, *(min(255, length - n) for n in (8, 7)))
            length = length or 65536
            if length < 8 or at + length > len(data) or 8 + name > length:
                raise Refused("entries")
            if number and name:
                found[data[at + 8 : at + 8 + name]] = number
            at += length
        return found

    def child(self, directory: Node, name: bytes) -> Node | None:
        number = self.entries(directory).get(name)
        return None if number is None else self.inode(number)

    def all_names(self, directory: Node) -> list[str]:
        return _texts(list(self.entries(directory)))


# --- XFS ------------------------------------------------------------------------------------------


class Xfs(Model):
    order = "big"

    def open(self) -> None:
        number = self.number
        if number("magic", 0, 4, 0) != int.from_bytes(b"XFSB", "big"):
            raise Refused("magic")
        self.block = number("blocksize", 4, 4, 512, 1024, 65536)
        self.root_at = number("rootino", 56, 8, 0)
        self.group = number("agblocks", 84, 4, 0, 1)
        self.groups = number("agcount", 88, 4, 0, 1, 2, 3)
        version = number("versionnum", 100, 2) & 15
        self.note("versionnum", 100, 2, 0xB4A3, 0xB4A4, 0xB4A5, 0xB4A6)
        self.inode_size = number("inodesize", 104, 2, 256, 128, 512, 1024, 2048, 4096)
        block_log = number("blocklog", 120, 1, 8, 9, 10, 16, 17)
        self.per_block = number("inopblog", 123, 1, 1, 2, 3, 4)
        self.group_log = number("agblklog", 124, 1, 31, 32)
        self.note("agblklog", 124, 1, self.group_log - 1, self.group_log + 1)
        self.note("agblocks", 84, 4, 1 << self.group_log % 32, (1 << self.group_log % 32) + 1)
        directory_log = number("dirblklog", 192, 1, 0, 1, 3, 4, 5)
        if version not in (4, 5):
            raise Refused("version")
        if version == 5:
            features = number("incompat", 216, 4)
            self.note("incompat", 216, 4, *(features ^ 1 << bit for bit in (0, 3, 4, 5, 8, 9, 31)))
            if features & 0x10 or features >> 9:
                raise Refused("features")
            self.types = features & 1
        else:
            self.types = number("features2", 200, 4) >> 9 & 1
        power = 1 << block_log
        if (
            not 512 <= power <= 65536
            or self.block != power
            or self.inode_size != self.block >> self.per_block
            or not 256 <= self.inode_size <= 2048
            or self.group_log > 31
            or not 0 < self.group <= 1 << self.group_log
            or self.groups == 0
            or block_log + directory_log > 16
        ):
            raise Refused("sizes")
        self.directory_block = 1 << block_log + directory_log

    def place(self, block: int) -> int:
        group, within = block >> self.group_log, block % (1 << self.group_log)
        self.note("agblocks", 84, 4, within, within + 1)
        self.note("agcount", 88, 4, group, group + 1)
        if group >= self.groups or within >= self.group:
            raise Refused("no block")
        return (group * self.group + within) * self.block

    def root(self) -> Node:
        return self.inode(self.root_at)

    def inode(self, number: int) -> Node:
        at = self.place(number >> self.per_block)
        at += number % (1 << self.per_block) * self.inode_size
        raw = self.raw(at, self.inode_size)
        version = self.number("di_version", at + 4, 1, 0, 1, 2, 3, 4)
        core = 176 if version == 3 else 100
        form = self.number("di_format", at + 5, 1, 0, 1, 2, 3, 4)
        most = (self.inode_size - core) // 8
        fork = self.number("di_forkoff", at + 82, 1, 0, 1, most, most + 1)
        self.note("di_magic", at, 2, 0)
        if raw[:2] != b"IN" or not 1 <= version <= 3 or core + 8 * fork > self.inode_size:
            raise Refused(f"inode {number}")
        if self.number("di_flags", at + 90, 2, 1) & 1:
            raise Refused("realtime")
        mode = self.number("di_mode", at + 2, 2, *MODES)
        size = self.number("di_size", at + 56, 8)
        edges = _sizes(mode, size, self.block, self.most)
        self.note(f"{_kind(mode)} size", at + 56, 8, *edges)
        end = at + core + 8 * fork if fork else at + self.inode_size
        room = end - at - core
        self.note("di_size", at + 56, 8, room, room + 1)
        extents = self.number("di_nextents", at + 76, 4, room // 16, room // 16 + 1, 0, 1)
        if version == 3 and self.number("di_flags2", at + 120, 8, 0x10, 8) & 0x10:
            extents = self.number("di_big_nextents", at + 24, 8, room // 16, room // 16 + 1, 0)
        return Node(mode, size, (at + core, end, form, extents))

    def inline(self, node: Node) -> int:
        start, end, *_ = node.more
        if start + node.size > end:
            raise Refused("room")
        return start

    def pieces(self, node: Node) -> Iterator[tuple[int, int, int | None]]:
        ending = 0
        for number, at in enumerate(self.records(node), 1):
            high, low = self.number("br_high", at, 8), self.number("br_low", at + 8, 8)
            whole = high << 64 | low
            self.note("br_high", at, 8, high ^ 1 << 63, *((high & 511) | n << 9 for n in (0, 1)))
            edges = [ending, ending - 1] if ending else []
            self.note("br_high", at, 8, *((high & 511) | n << 9 for n in edges))
            group = self.group - 1
            self.note("br_low", at + 8, 8, low >> 21 << 21, low >> 21 << 21 | 1)
            if group >= 0:
                self.note(
                    "br_low", at + 8, 8, *((group + n) << 21 | low % (1 << 21) for n in (0, 1))
                )
            size, block, logical = whole % (1 << 21), whole >> 21 & (1 << 52) - 1, whole >> 73
            logical &= (1 << 54) - 1
            if logical < ending or size == 0 or number > MOST_PIECES:
                raise Refused("pieces")
            ending = logical + size
            yield logical, size, None if whole >> 127 else self.place(block)

    def records(self, node: Node) -> Iterator[int]:
        start, end, form, extents = node.more
        if form == 2:
            if start + 16 * extents > end:
                raise Refused("room")
            yield from range(start, start + 16 * extents, 16)
            return
        if form != 3 or end - start < 4:
            raise Refused("no content")
        level = self.number("bb_level", start, 2, 0, 1, 2, 8, 9)
        count = self.number("bb_numrecs", start + 2, 2)
        if level == 0 or level > 8:
            raise Refused("level")
        left = self.below(start, end - start, 4, count)[::-1]
        levels = [level - 1] * len(left)
        while left:
            block, level = left.pop(), levels.pop()
            self.take(self.block)
            at = self.place(block)
            head = {b"BMAP": 24, b"BMA3": 72}.get(self.raw(at, self.block)[:4])
            self.note("bb_magic", at, 4, 0x424D4150, 0x424D4133)
            said = self.number("bb_level", at + 4, 2, 0, 1, 2)
            most = (self.block - (head or 24)) // 16
            count = self.number("bb_numrecs", at + 6, 2, 0, 1, most, most + 1)
            if head is None or said != level or len(left) + count > MOST_PIECES:
                raise Refused("a tree")
            if level:
                more = self.below(at, self.block, head, count)[::-1]
                left += more
                levels += [level - 1] * len(more)
            elif count > most:
                raise Refused("a leaf")
            else:
                yield from range(at + head, at + head + 16 * count, 16)

    def below(self, at: int, room: int, head: int, count: int) -> list[int]:
        most = (room - head) // 16
        self.note("bb_numrecs", at + head - (2 if head == 4 else head - 6), 2, 0, 1, most, most + 1)
        if count == 0 or count > most:
            raise Refused("a node")
        begin = at + head + 8 * most
        return [self.number("bb_ptr", begin + 8 * n, 8) for n in range(count)]

    def content(self, node: Node) -> Iterator[bytes]:
        if node.more[2] == 1:
            yield self.raw(self.inline(node), node.size)
            return
        left, ending = node.size, 0
        for logical, count, at in self.pieces(node):
            hole = min(left, (logical - ending) * self.block)
            yield bytes(hole)
            size = min(left - hole, count * self.block)
            left -= hole + size
            ending = logical + count
            yield bytes(size) if at is None or not size else self.raw(at, size)
            if not left:
                self.may_refuse |= at is None
                return
        yield bytes(left)

    def target(self, link: Node) -> bytes:
        if link.more[2] == 1:
            return self.raw(self.inline(link), link.size)
        found = b""
        for _, count, at in self.pieces(link):
            if at is None:
                raise Refused("never written")
            wanted = link.size - len(found)
            data = self.raw(at, min(count * self.block, 56 + wanted))
            self.note("sl_magic", at, 4, 0)
            found += (data[56:] if data[:4] == b"XSLM" else data)[:wanted]
            if len(found) == link.size:
                break
        return found

    def entries(self, node: Node) -> dict[bytes, int]:
        if node.size > MOST_DIRECTORY:
            raise Refused("large")
        if node.more[2] == 1:
            return self.short(node)
        found: dict[bytes, int] = {}
        blocks: list[int] = []
        for logical, count, at in self.pieces(node):
            if logical * self.block >= node.size:
                break
            if count * self.block > MOST_DIRECTORY:
                raise Refused("large")
            self.take(count * self.block)
            if at is None:
                raise Refused("never written")
            for begin in range(at, at + count * self.block, self.block):
                self.raw(begin, self.block)
                blocks.append(begin)
                if len(blocks) * self.block == self.directory_block:
                    self.add_block(blocks, found)
                    blocks = []
        return found

    def short(self, node: Node) -> dict[bytes, int]:
        at = self.inline(node)
        end = at + node.size
        if node.size < 2:
            raise Refused("short")
        count = self.number("sf_count", at, 1, 0, 1, 255)
        self.note("sf_count", at, 1, count + 1, count - 1)
        width = 8 if self.number("sf_i8count", at + 1, 1, 0, 1) else 4
        at += 2 + width
        found = {}
        for _ in range(count):
            if at >= end:
                raise Refused("short")
            length = self.number("sf_namelen", at, 1, 0)
            rest = end - at - 3 - self.types - width
            self.note("sf_namelen", at, 1, *(one for one in (rest, rest + 1) if 0 <= one < 256))
            name_at, at = at + 3, at + 3 + length + self.types
            if at + width > end:
                raise Refused("short")
            name = self.raw(name_at, min(length, end - name_at))
            found[name] = self.number("sf_inumber", at, width)
            at += width
        return found

    def add_block(self, blocks: list[int], found: dict[bytes, int]) -> None:
        raw = b"".join(self.raw(at, self.block) for at in blocks)

        def note(name: str, at: int, size: int, *edges: int) -> None:
            self.note(name, blocks[at // self.block] + at % self.block, size, *edges)

        at = {b"XD2B": 16, b"XD2D": 16, b"XDB3": 64, b"XDD3": 64}.get(raw[:4])
        kinds = (b"XD2B", b"XD2D", b"XDB3", b"XDD3")
        note("hdr_magic", 0, 4, *(int.from_bytes(one, "big") for one in kinds))
        if at is None:
            raise Refused("magic")
        end = len(raw)
        if raw[:4] in (b"XD2B", b"XDB3"):
            count = int.from_bytes(raw[-8:-4], "big")
            note("tail_count", len(raw) - 8, 4, 0, 1, count + 1, count - 1)
            end -= 8 + 8 * count
        while at + 11 <= end:
            rest = end - at
            if raw[at : at + 2] == b"\xff\xff":
                length = int.from_bytes(raw[at + 2 : at + 4], "big")
                note("freetag", at, 2, 0)
                note(
                    "length", at + 2, 2, 0, 7, 8, *(min(rest + n, 65535) for n in (-8, -1, 0, 1, 8))
                )
            else:
                size = raw[at + 8]
                length = -(-(11 + size + self.types) // 8) * 8
                note("inumber", at, 8)
                note(
                    "namelen", at + 8, 1, 0, *(max(0, min(255, rest - n)) for n in (11, 12, 10, 4))
                )
                found[raw[at + 9 : at + 9 + size]] = int.from_bytes(raw[at : at + 8], "big")
            if length < 8 or length > rest:
                raise Refused("entries")
            at += length

    def child(self, directory: Node, name: bytes) -> Node | None:
        number = self.entries(directory).get(name)
        return None if number is None else self.inode(number)

    def all_names(self, directory: Node) -> list[str]:
        return _texts(list(self.entries(directory)))


# --- Btrfs ----------------------------------------------------------------------------------------

_Key = tuple[int, int, int]
_LAST = (1 << 64) - 1


class Btrfs(Model):
    def open(self) -> None:
        def sb(name: str, at: int, size: int, *edges: int) -> int:
            return self.number(name, 0x10000 + at, size, *edges)

        self.kept: set[int] = set()
        self.chunks: set[tuple[int, int, int]] = set()
        self.note("magic", 0x10000 + 64, 8, 0)
        if self.raw(0x10000 + 64, 8) != b"_BHRfS_M":
            raise Refused("magic")
        flags = sb("incompat_flags", 188, 8)
        for bit in (0, 7, 10, 11, 12, 13, 14, 15, 16, 17, 63):
            self.note("incompat_flags", 0x10000 + 188, 8, flags ^ 1 << bit)
        if flags & ~0x10F7F:
            raise Refused("features")
        if sb("num_devices", 136, 8, 0, 1, 2) != 1:
            raise Refused("devices")
        self.node = sb("nodesize", 148, 4, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
        self.sector = sb("sectorsize", 144, 4, 512, 4096, 8192, 16384, 32768, 65536)
        if self.sector not in (4096, 8192, 16384, 65536):
            raise Refused("sectors")
        if self.node not in (4096, 8192, 16384, 32768, 65536):
            raise Refused("nodes")
        size = sb("sys_chunk_array_size", 160, 4, 0, 64, 65, 96, 97, 98, 2048, 2049)
        if size > 2048:
            raise Refused("system chunks")
        base, at = 0x10000 + 811, 0
        while at + 17 + 48 <= size:
            address = self.number("chunk_offset", base + at + 9, 8)
            stripes = self.chunk(address, base + at + 17, size - at - 17)
            at += 17 + 48 + 32 * stripes
        tree = sb("chunk_root", 88, 8), sb("chunk_root_level", 199, 1, 0, 1, 8, 9)
        for key, at, size in self.all(tree, (256, 228, 0), (256, 228, _LAST)):
            self.chunk(key[2], at, size)
        self.roots = sb("root", 80, 8), sb("root_level", 198, 1, 0, 1, 8, 9)
        self.top = self.subvolume(5)
        self.home = self.first_root()

    def first_root(self) -> Node:
        default = 5
        for _, at, size in self.all(self.roots, (6, 84, 0), (6, 84, _LAST)):
            keys = [key[0] for name, key in self.named(at, size) if name == b"default"]
            if keys:
                default = keys[0]
                break
        if default != 5:
            return self.subvolume(default)
        inside = self.entries(self.top)
        if not {b"etc", b"boot", b"usr"} & inside.keys():
            for name in (b"@rootfs", b"root", b"@"):
                if name in inside and inside[name][1] == 132:
                    return self.subvolume(inside[name][0])
        return self.top

    def chunk(self, address: int, at: int, size: int) -> int:
        if size < 80 or len(self.chunks) >= 1 << 14:
            raise Refused("chunks")
        length = self.number("chunk_length", at, 8, 0, 1)
        kind = self.number("chunk_type", at + 24, 8, 1, 2, 4, 9, 0x11, 0x21, 0x41, 0x81, 0x101)
        stripes = self.number("num_stripes", at + 44, 2, 0, 1, 2)
        start = self.number("stripe_offset", at + 56, 8, 0)
        if not stripes or not length or (kind & 0x1C8 and stripes > 1):
            raise Refused("a chunk")
        self.chunks.add((address, length, start))
        return stripes

    def at(self, address: int, size: int) -> int:
        """Where on the disk that is."""
        start, length, byte = max((c for c in self.chunks if c[0] <= address), default=(0, -1, 0))
        if address + size > start + length or length < 0:
            raise Refused("no chunk")
        at = byte + address - start
        self.raw(at, size)
        return at

    def key(self, at: int) -> _Key:
        self.note("key_object", at, 8)
        self.note("key_type", at + 8, 1, 1, 84, 108, 132, 228)
        self.note("key_offset", at + 9, 8, 0)
        object, type, offset = struct.unpack("<QBQ", self.raw(at, 17))
        return object, type, offset

    def items(
        self, tree: tuple[int, int], first: _Key, last: _Key
    ) -> Iterator[tuple[_Key, int, int]]:
        """Key, place and size of those."""
        address, level = tree
        is_kept = address in self.kept
        self.take(4096 if is_kept else self.node)
        if not is_kept:
            self.kept = self.kept if len(self.kept) < 64 else set()
        at = self.at(address, self.node)
        self.kept.add(address)
        row = 33 if level else 25
        most = (self.node - 101) // row
        count = self.number("nritems", at + 96, 4, most, most + 1, 0, 1)
        self.note("nritems", at + 96, 4, *((count - 1,) if count else ()))
        said = self.number("level", at + 100, 1, 0, 1, 2, 7, 8, 9)
        if said != level or level > 8 or count > most:
            raise Refused("a node")
        if self.number("bytenr", at + 48, 8) != address:
            raise Refused("another node")
        rows = [at + 101 + row * index for index in range(count)]
        quiet, self.noted = self.noted, None
        keys = [self.key(one) for one in rows]
        self.noted = quiet
        if keys != sorted(keys):
            self.unsure = True
        if level:
            begin = max([index for index, one in enumerate(keys) if one <= first], default=0)
            for one, key in zip(rows[begin:], keys[begin:], strict=True):
                if self.noted is not None:
                    self.key(one)
                if key > last:
                    raise _Over
                yield from self.items(
                    (self.number("blockptr", one + 17, 8), level - 1), first, last
                )
            return
        for one, key in zip(rows, keys, strict=True):
            if key < first:
                continue
            if self.noted is not None:
                self.key(one)
            if key > last:
                raise _Over
            room = self.node - 101
            begin = self.number("item_offset", one + 17, 4, 0, room, room + 1)
            size = self.number("item_size", one + 21, 4, 0, 20, 21, 52, 53, 79, 80, 159, 160, 239)
            rest = room - begin
            self.note("item_size", one + 21, 4, *((rest, rest + 1) if rest > 0 else ()))
            if begin + size > room:
                raise Refused("an item")
            self.take(25 + size)
            yield key, at + 101 + begin, size

    def all(
        self, tree: tuple[int, int], first: _Key, last: _Key
    ) -> Iterator[tuple[_Key, int, int]]:
        try:
            yield from self.items(tree, first, last)
        except _Over:
            return

    def item(self, tree: tuple[int, int], number: int, type: int, least: int) -> int:
        for _, at, size in self.all(tree, (number, type, 0), (number, type, _LAST)):
            if size < least:
                raise Refused("short")
            return at
        raise Refused(f"no object {number}")

    def subvolume(self, number: int) -> Node:
        at = self.item(self.roots, number, 132, 239)
        tree = self.number("bytenr of root", at + 176, 8), self.number("level of root", at + 238, 1)
        return self.inode(tree, 256)

    def inode(self, tree: tuple[int, int], number: int) -> Node:
        at = self.item(tree, number, 1, 160)
        size = self.number("inode size", at + 16, 8)
        mode = self.number("inode mode", at + 52, 4, *MODES)
        edges = _sizes(mode, size, 4096, self.most)
        self.note(f"{_kind(mode)} size", at + 16, 8, *edges)
        return Node(mode, size, (*tree, number))

    def named(self, at: int, size: int) -> Iterator[tuple[bytes, _Key]]:
        end = at + size
        while at < end:
            if at + 30 > end:
                raise Refused("entries")
            rest = end - at - 30
            data = self.number("data_len", at + 25, 2, 0, min(rest, 65535), min(rest + 1, 65535))
            name = self.number("name_len", at + 27, 2, 0, min(rest, 65535), min(rest + 1, 65535))
            if name > rest:
                raise Refused("entries")
            yield self.raw(at + 30, name), self.key(at)
            at += 30 + name + data

    def entries(self, node: Node) -> dict[bytes, _Key]:
        address, level, number = node.more
        found: dict[bytes, _Key] = {}
        total = 0
        for _, at, size in self.all((address, level), (number, 84, 0), (number, 84, _LAST)):
            total += size
            if total > MOST_DIRECTORY:
                raise Refused("large")
            found.update(self.named(at, size))
        return found

    def root(self) -> Node:
        return self.home

    def child(self, directory: Node, name: bytes) -> Node | None:
        key = self.entries(directory).get(name)
        if key is None:
            return None
        if key[1] == 132:
            return self.subvolume(key[0])
        return self.inode(directory.more[:2], key[0])  # type: ignore[arg-type]

    def find(self, path: str) -> Node:
        try:
            return super().find(path)
        except FileNotFoundError:
            if self.home == self.top:
                raise
        home, self.home = self.home, self.top
        try:
            return super().find(path)
        finally:
            self.home = home

    def all_names(self, directory: Node) -> list[str]:
        return _texts(list(self.entries(directory)))

    def target(self, link: Node) -> bytes:
        return b"".join(self.content(link))[:MOST_PATH]

    def content(self, node: Node) -> Iterator[bytes]:
        address, level, number = node.more
        left, ending = node.size, 0
        items = self.all((address, level), (number, 108, 0), (number, 108, _LAST))
        for count, (key, at, size) in enumerate(items, 1):
            if key[2] < ending or size < 21 or count > MOST_PIECES:
                raise Refused("extents")
            hole = min(left, key[2] - ending)
            yield bytes(hole)
            left -= hole
            if not left:
                return
            length, data = self.extent(at, size, left)
            yield data
            left -= len(data)
            if not left:
                return
            ending = key[2] + length
        yield bytes(left)

    def extent(self, at: int, size: int, left: int) -> tuple[int, bytes]:
        """How much of the file it is, and as much of that as is wanted."""
        whole = self.number("ram_bytes", at + 8, 8, 0, 1, 131072, 131073)
        compression = self.number("compression", at + 16, 1, 0, 1, 2, 3, 4)
        others = self.number("encryption", at + 17, 1, 1)
        others |= self.number("other_encoding", at + 18, 2, 1)
        kind = self.number("extent type", at + 20, 1, 0, 1, 2, 3)
        if others:
            raise Refused("encrypted")
        if kind == 0:
            data = self.unpacked(self.raw(at + 21, size - 21), compression, whole, 0, whole)
            return len(data), data[:left]
        if size < 53 or kind > 2:
            raise Refused("extent")
        address = self.number("disk_bytenr", at + 21, 8, 0)
        on_disk = self.number(
            "disk_num_bytes", at + 29, 8, 0, *(131072 + self.sector + n for n in (0, 1))
        )
        offset = self.number("offset", at + 37, 8, 0, 1, 4096)
        count = self.number("num_bytes", at + 45, 8, 0, 1, left, left - 1, left + 1)
        self.note("num_bytes", at + 45, 8, *((whole - offset + n) % (1 << 64) for n in (0, 1)))
        self.note("offset", at + 37, 8, *((whole - count + n) % (1 << 64) for n in (0, 1)))
        self.note("ram_bytes", at + 8, 8, *(max(0, offset + count - n) for n in (0, 1)))
        if not count:
            raise Refused("nothing")
        if kind == 2 or not address:
            return count, bytes(min(left, count))
        if compression:
            if on_disk > 131072 + self.sector:
                raise Refused("large")
            raw = self.raw(self.at(address, on_disk), on_disk)
            return count, self.unpacked(raw, compression, whole, offset, count)[:left]
        data = b""
        while len(data) < min(left, count):
            some = min(MIB, count - len(data))
            data += self.raw(self.at(address + offset + len(data), some), some)
        return count, data[:left]

    def unpacked(self, raw: bytes, compression: int, size: int, offset: int, count: int) -> bytes:
        if compression not in (0, 1, 3) or size > 131072 or offset + count > size:
            raise Refused("compressed")
        self.take(max(size, len(raw)) - count)
        data = raw[:size]
        try:
            if compression == 1:
                data = zlib.decompressobj().decompress(raw, size) if size else b""
            elif compression == 3:
                data = (
                    zstandard.ZstdDecompressor(max_window_size=262144).stream_reader(raw).read(size)
                )
        except (zlib.error, zstandard.ZstdError):
            raise Refused("compressed") from None
        return data[offset : offset + count] + bytes(count - len(data[offset : offset + count]))


class _Over(Exception):
    """There are no more items."""


# --- FAT ------------------------------------------------------------------------------------------


class Fat(Model):
    def open(self) -> None:
        number = self.number
        self.tables: set[int] = set()
        sector = number("bytes_per_sector", 11, 2, 256, 512, 1024, 2048, 4096, 8192)
        per_cluster = number("sectors_per_cluster", 13, 1, 0, 1, 2, 3, 64, 128)
        reserved = number("reserved", 14, 2, 0, 1)
        tables = number("fats", 16, 1, 0, 1, 2)
        entries = number("root_entries", 17, 2, 0, 16, 17, 512)
        sectors = number("sectors_16", 19, 2, 0) or number("sectors_32", 32, 4, 0)
        table = number("fat_16", 22, 2, 0) or number("fat_32", 36, 4, 0)
        if sector not in (512, 1024, 2048, 4096):
            raise Refused("sectors")
        if bin(per_cluster).count("1") != 1 or 0 in (reserved, tables, table):
            raise Refused("sizes")
        self.cluster = sector * per_cluster
        self.table = reserved * sector
        self.fixed = (reserved + tables * table) * sector, entries * 32
        self.data = self.fixed[0] + -(-entries * 32 // sector) * sector
        self.clusters = (sectors * sector - self.data) // self.cluster
        self.width = 4 if self.clusters >= 65525 else 2
        room = table * sector // self.width
        for most in (4084, 4085, 65524, 65525, room - 1, room, room + 1):
            for n in (0, self.cluster - 1):
                wanted = -(-(self.data + most * self.cluster + n) // sector)
                self.note("sectors_32", 32, 4, wanted)
                if wanted < 65536:
                    self.note("sectors_16", 19, 2, wanted)
        needed = self.clusters * self.width
        if needed > 0:
            for name, at, size in (("fat_16", 22, 2), ("fat_32", 36, 4)):
                edges = (needed // sector, -(-needed // sector), -(-needed // sector) - 1)
                self.note(name, at, size, *(one for one in edges if 0 <= one < 65536))
        if self.clusters < 4085 or table * sector < needed:
            raise Refused("FAT12")
        self.first = number("root_cluster", 44, 4, 0, 1, 2) if self.width == 4 else 0

    def root(self) -> Node:
        return Node(0o040755, 0, (self.first,))

    def following(self, cluster: int) -> int:
        piece = cluster * self.width // 65536
        if piece not in self.tables:
            if len(self.tables) == 64:
                self.tables = set()
            begin = self.table + piece * 65536
            if begin > self._size:
                raise Refused("its table")
            self.take(min(65536, self._size - begin))
            self.tables.add(piece)
        at = self.table + cluster * self.width
        if at + self.width > self._size:
            raise Refused("its table")
        last = self.clusters + 1
        top = 0xFFFF if self.width == 2 else 0x0FFFFFFF
        edges = (0, 1, 2, last, last + 1, cluster, cluster + 1, top - 8, top - 7, top)
        value = self.number("table", at, self.width, *edges)
        if self.width == 4:
            self.note("table", at, 4, value | 0xF0000000)
            value %= 1 << 28
        return value

    def runs(self, cluster: int) -> Iterator[tuple[int, int]]:
        run: list[int] = []
        ending = 0xFFF8 if self.width == 2 else 0x0FFFFFF8
        for _ in range(self.clusters):
            if cluster < 2 or cluster > self.clusters + 1:
                raise Refused("no cluster")
            if run and (cluster != run[-1] + 1 or (len(run) + 1) * self.cluster > MIB):
                yield self.data + (run[0] - 2) * self.cluster, len(run) * self.cluster
                run = []
            run.append(cluster)
            cluster = self.following(cluster)
            if cluster >= ending:
                yield self.data + (run[0] - 2) * self.cluster, len(run) * self.cluster
                return
        raise Refused("no end")

    def directory(self, node: Node) -> Iterator[int]:
        """Where each entry is."""
        cluster = node.more[0] or self.first
        if not cluster:
            at, size = self.fixed
            self.raw(at, size)
            self.take(size)
            yield from range(at, at + size, 32)
            return
        found: list[int] = []
        total = 0
        for at, size in self.runs(cluster):
            total += size
            if total > MOST_DIRECTORY:
                raise Refused("large")
            self.take(size)
            self.raw(at, size)
            found += range(at, at + size, 32)
        yield from found

    def entries(self, node: Node) -> list[tuple[str, Node]]:
        found: list[tuple[str, Node]] = []
        long: dict[int, bytes] = {}
        for at in list(self.directory(node)):
            raw = self.raw(at, 32)
            self.note("first byte", at, 1, 0, 0xE5, 0x05, 0x2E, 0x41, 0x42)
            if raw[0] == 0:
                break
            attributes = self.number(
                "attributes", at + 11, 1, 0x0F, 0x10, 0x20, 8, 0x18, 0x3F, 0x4F
            )
            if raw[0] == 0xE5:
                long = {}
                continue
            if attributes % 64 == 15:
                self.note("order", at, 1, 0x41, 0x42, 0x61, 0x01, 0x02)
                long[raw[0] % 32] = raw[1:11] + raw[14:26] + raw[28:32]
                continue
            name = "".join(
                part.decode("utf-16-le", "replace") for _, part in sorted(long.items())
            ).split("\0")[0]
            long = {}
            if attributes & 8:
                continue
            case = self.number("case", at + 12, 1, 0, 8, 0x10, 0x18)
            stem, end = raw[:8].decode("cp437").rstrip(" "), raw[8:11].decode("cp437").rstrip(" ")
            stem, end = stem.lower() if case & 8 else stem, end.lower() if case & 16 else end
            cluster = self.number("cluster_lo", at + 26, 2, 0, 1, 2)
            high = self.number("cluster_hi", at + 20, 2, 1)
            cluster += high << 16 if self.width == 4 else 0
            mode = 0o040755 if attributes & 16 else 0o100644
            size = self.number("size", at + 28, 4)
            edges = _sizes(mode, size, self.cluster, self.most)
            self.note(f"{_kind(mode)} size", at + 28, 4, *edges)
            name = name or (f"{stem}.{end}" if end else stem)
            found.append((name, Node(mode, size, (cluster,))))
        return found

    def find(self, path: str) -> Node:
        node, is_root = self.root(), True
        for name in path.split("/"):
            if not name:
                continue
            if not node.is_directory:
                raise FileNotFoundError
            if name == "." or (name == ".." and is_root):
                continue
            inside = self.entries(node)
            same = [one for one in inside if one[0].casefold() == name.casefold()]
            if not same:
                raise FileNotFoundError
            node, is_root = same[0][1], same[0][0] == "/"
        return node

    def content(self, node: Node) -> Iterator[bytes]:
        left = node.size
        if not left:
            return
        for at, size in self.runs(node.more[0]):
            size = min(size, left)
            yield self.raw(at, size)
            left -= size
            if not left:
                return
        raise Refused("short")

    def all_names(self, directory: Node) -> list[str]:
        return [name for name, _ in self.entries(directory)]
