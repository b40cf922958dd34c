"""Files of an ext2, ext3 or ext4 file system, read as data: nothing is mounted and nothing written.

For the few files by which a disk boots. The file system is a stranger's: every number in it is
checked, every walk is bounded, and what is not understood is refused. Its journal is not replayed,
as a boot loader does not either. Source: Linux Documentation/filesystems/ext4 ("Super Block",
"Block Group Descriptors", "Index Nodes", "The Contents of inode.i_block", "Directory Entries").
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pyvmm.boot.file_system import (
    CHUNK,
    MOST_DIRECTORY,
    MOST_PIECES,
    Read,
    Search,
    UnixFileSystem,
    readable,
    too_large,
)
from pyvmm.errors import ConfigError

_SUPERBLOCK, _MAGIC = 1024, 0xEF53
_ROOT = 2
# Incompatible features: what is known, or has no bearing on reading files.
_FILETYPE, _RECOVER, _EXTENTS, _64BIT, _MMP, _FLEX_BG = 0x2, 0x4, 0x40, 0x80, 0x100, 0x200
_EA_INODE, _CSUM_SEED, _LARGEDIR, _INLINE, _ENCRYPT, _CASEFOLD = (
    *(0x400, 0x2000, 0x4000, 0x8000, 0x10000, 0x20000),
)
_KNOWN = _FILETYPE | _RECOVER | _EXTENTS | _64BIT | _MMP | _FLEX_BG | _EA_INODE | _CSUM_SEED
_KNOWN |= _LARGEDIR | _INLINE | _ENCRYPT | _CASEFOLD
_IN_EXTENTS, _IN_INLINE, _IN_ENCRYPTED = 0x80000, 0x10000000, 0x800
_EXTENT_MAGIC = 0xF30A
_EXTENT, _INDEX = struct.Struct("<IHHI"), struct.Struct("<IIHxx")
_DIRENT = struct.Struct("<IHBB")
_MOST_DEPTH = 5  # of a tree of extents, as the kernel


class _Inode(NamedTuple):
    number: int
    mode: int
    size: int
    flags: int
    block: bytes  # i_block

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


class _Piece(NamedTuple):
    """So many `blocks` of a file from block `logical` on: at block `physical` of the file system,
    or zeros if that is 0."""

    logical: int
    blocks: int
    physical: int


class Ext4(UnixFileSystem[_Inode]):
    """An ext2, ext3 or ext4 file system."""

    repair = "e2fsck -f"

    def __init__(self, read: Read, size: int, where: str, search: Search | None = None) -> None:
        super().__init__(read, size, where, search)
        raw = read(_SUPERBLOCK, 1024)
        if len(raw) < 1024 or _u16(raw, 0x38) != _MAGIC:
            raise self._damaged("no superblock")
        shift = _u32(raw, 0x18)
        if shift > 6:
            raise self._damaged(f"blocks of 2**{shift + 10} bytes")
        self._block = 1024 << shift
        self._per_group = _u32(raw, 0x28)
        self._inodes = _u32(raw, 0)
        self._first = _u32(raw, 0x14)
        dynamic = _u32(raw, 0x4C) > 0
        self._inode_size = _u16(raw, 0x58) if dynamic else 128
        features = _u32(raw, 0x60) if dynamic else 0
        if features & ~_KNOWN:
            raise ConfigError(
                f"{where} has features that are not understood: {features & ~_KNOWN:#x}",
                cure="give --kernel and --initrd",
            )
        self._descriptor = _u16(raw, 0xFE) if features & _64BIT else 32
        if (
            not self._per_group
            or not 128 <= self._inode_size <= self._block
            or self._inode_size & (self._inode_size - 1)
            or not 32 <= self._descriptor <= 1024
            or self._first > 1
        ):
            raise self._damaged("impossible sizes in its superblock")

    # --- from a path to an inode ------------------------------------------------------------------

    def _root(self) -> _Inode:
        return self._inode(_ROOT)

    def _child(self, directory: _Inode, name: bytes) -> _Inode | None:
        number = self._entries(directory).get(name)
        return None if number is None else self._inode(number)

    def _target(self, link: _Inode) -> bytes:
        if link.size < len(link.block):  # a short one is in the inode itself
            return link.block[: link.size]
        return b"".join(self._content(link))

    def _inode(self, number: int) -> _Inode:
        if not 0 < number <= self._inodes:
            raise self._damaged(f"inode {number}")
        group, index = divmod(number - 1, self._per_group)
        raw = self._bytes((self._first + 1) * self._block + group * self._descriptor, 64)
        table = _u32(raw, 8)
        if self._descriptor >= 64:
            table |= _u32(raw, 0x28) << 32
        raw = self._bytes(table * self._block + index * self._inode_size, 128)
        size = _u32(raw, 4) | _u32(raw, 0x6C) << 32
        return _Inode(number, _u16(raw, 0), size, _u32(raw, 0x20), raw[0x28:0x64])

    def _entries(self, inode: _Inode) -> dict[bytes, int]:
        if inode.size > MOST_DIRECTORY:
            raise too_large(self.where)
        self._search.take(inode.size, self.where)
        data = b"".join(self._content(inode))
        found: dict[bytes, int] = {}
        at = 0
        # The inner nodes of an indexed directory look like entries that are not used.
        while at + _DIRENT.size <= len(data):
            number, length, name, _ = _DIRENT.unpack_from(data, at)
            length = length or 65536  # of a block of 64 KiB
            if length < 8 or at + length > len(data) or name > length - 8:
                raise self._damaged("a directory's entries")
            if number and name:
                found[data[at + 8 : at + 8 + name]] = number
            at += length
        return found

    def _names(self, directory: _Inode) -> Iterable[str]:
        return readable(self._entries(directory))

    # --- from an inode to bytes -------------------------------------------------------------------

    def _content(self, node: _Inode) -> Iterator[bytes]:
        if node.flags & (_IN_INLINE | _IN_ENCRYPTED):
            raise ConfigError(
                f"a file in {self.where} is encrypted, or in its inode, which is not understood",
                cure="give --kernel and --initrd",
            )
        by_extents = node.flags & _IN_EXTENTS
        pieces: Iterable[_Piece]
        pieces = self._by_extents(node) if by_extents else self._by_blocks(node)
        left, at = node.size, 0
        for piece in pieces:
            if piece.logical < at:
                raise self._damaged("a file's blocks are in no order")
            yield from self._zeros(min(left, (piece.logical - at) * self._block))
            left -= min(left, (piece.logical - at) * self._block)
            at = piece.logical + piece.blocks
            wanted = min(left, piece.blocks * self._block)
            left -= wanted
            if not piece.physical:
                yield from self._zeros(wanted)
                continue
            start = piece.physical * self._block
            for offset in range(0, wanted, CHUNK):
                yield self._bytes(start + offset, min(CHUNK, wanted - offset))
            if not left:
                return
        yield from self._zeros(left)

    def _by_extents(self, inode: _Inode) -> list[_Piece]:
        pieces: list[_Piece] = []
        nodes = [(0, _MOST_DEPTH + 1)]  # a block, and the depth that it must be below
        seen = 0
        while nodes:
            block, above = nodes.pop()
            if seen:
                self._search.take(self._block, self.where)
            node = self._bytes(block * self._block, self._block) if seen else inode.block
            seen += 1
            magic, count, _, depth = struct.unpack_from("<HHHH", node)
            if magic != _EXTENT_MAGIC or depth >= above or 12 * (count + 1) > len(node):
                raise self._damaged("a tree of extents")
            if seen + len(nodes) + len(pieces) + count > MOST_PIECES:
                raise self._damaged("a file in too many pieces")
            inner = []
            for index in range(count):
                at = 12 * (index + 1)
                if depth:
                    _, low, high = _INDEX.unpack_from(node, at)
                    inner.append((low | high << 32, depth))
                    continue
                logical, length, high, low = _EXTENT.unpack_from(node, at)
                physical = low | high << 32
                if length > 32768:  # not written yet: zeros
                    length, physical = length - 32768, 0
                pieces.append(_Piece(logical, length, physical))
            nodes += reversed(inner)
        return pieces

    def _by_blocks(self, inode: _Inode) -> Iterator[_Piece]:
        """ext2's way: twelve blocks, and three that have the numbers of more."""
        needed = -(-inode.size // self._block)
        numbers = struct.unpack("<15I", inode.block)
        logical = 0
        for number in numbers[:12]:
            if logical >= needed:
                return
            yield _Piece(logical, 1, number)
            logical += 1
        for level, number in enumerate(numbers[12:], 1):
            for found in self._indirect(number, level, needed - logical):
                yield _Piece(logical, 1, found)
                logical += 1
            if logical >= needed:
                return

    def _indirect(self, number: int, level: int, needed: int) -> Iterator[int]:
        fan = self._block // 4
        if number:
            numbers = struct.unpack(f"<{fan}I", self._bytes(number * self._block, self._block))
        else:
            numbers = (0,) * fan
        for one in numbers:
            if needed <= 0:
                return
            if level == 1:
                yield one
                needed -= 1
                continue
            below = fan ** (level - 1)
            yield from self._indirect(one, level - 1, min(needed, below))
            needed -= below


def _u16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "little")


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")
