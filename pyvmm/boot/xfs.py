"""Files of an XFS file system, read as data: nothing is mounted and nothing written.

For the few files by which a disk boots, as in pyvmm.boot.ext4: a stranger's bytes, every number
checked, every walk bounded. Its log is not replayed, as by boot loaders. Numbers are big-endian.
Sources: "XFS Algorithms & Data Structures", 3rd edition ("Superblocks", "Inode Core", "Data
Extents", "Directories", "Symbolic Links"); names as in Linux fs/xfs/libxfs/xfs_format.h and
xfs_da_format.h.
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

# sb_versionnum and sb_features2 of version 4, sb_features_incompat of version 5.
_VERSION_BITS, _OLD_FTYPE = 0xF, 0x200
_FTYPE, _SPINODES, _META_UUID, _BIGTIME, _NEEDSREPAIR, _NREXT64, _EXCHRANGE, _PARENT, _METADIR = (
    1 << bit for bit in range(9)
)
_KNOWN = _FTYPE | _SPINODES | _META_UUID | _BIGTIME | _NREXT64 | _EXCHRANGE | _PARENT | _METADIR
_LOCAL, _EXTENTS, _BTREE = 1, 2, 3  # di_format
_REALTIME = 0x1  # of di_flags
_LARGE_COUNTS = 0x10  # of di_flags2: the number of extents has 64 bits
_LEAF_BYTES = 1 << 35  # from here on a directory has hashes of names (XFS_DIR2_LEAF_OFFSET)
_DIRECTORY_MAGICS = {b"XD2B": 16, b"XD2D": 16, b"XDB3": 64, b"XDD3": 64}  # header bytes
_ENDS_WITH_HASHES = (b"XD2B", b"XDB3")
_TREE_MAGICS = {b"BMAP": 24, b"BMA3": 72}
_LINK_MAGIC, _LINK_HEADER = b"XSLM", 56
_UNUSED = 0xFFFF
_MOST_LEVELS = 9  # of a tree of extents (XFS_BM_MAXLEVELS)


class _Inode(NamedTuple):
    number: int
    mode: int
    size: int
    format: int
    extents: int
    fork: bytes  # the data fork

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


class _Piece(NamedTuple):
    """So many `blocks` of a file from block `logical` on: at byte `start` of the file system, or
    zeros if that is None."""

    logical: int
    blocks: int
    start: int | None


class Xfs(UnixFileSystem[_Inode]):
    """An XFS file system of version 4 or 5."""

    repair = "xfs_repair"

    def __init__(self, read: Read, size: int, where: str, search: Search | None = None) -> None:
        super().__init__(read, size, where, search)
        raw = read(0, 512)
        if len(raw) < 512 or raw[:4] != b"XFSB":
            raise self._damaged("no superblock")
        self._block, self._group, self._groups = _u32(raw, 4), _u32(raw, 84), _u32(raw, 88)
        self._root_number = _u64(raw, 56)
        self._inode_size = _u16(raw, 104)
        block_log, self._per_block_log, self._group_log = raw[120], raw[123], raw[124]
        directory_log = raw[192]
        version = _u16(raw, 100) & _VERSION_BITS
        if version not in (4, 5):
            raise ConfigError(
                f"{where} is XFS of version {version}", cure="give --kernel, --initrd"
            )
        incompatible = _u32(raw, 216) if version == 5 else 0
        if incompatible & _NEEDSREPAIR:
            raise self._damaged("it says so itself")
        if incompatible & ~_KNOWN:
            raise ConfigError(
                f"{where} has features that are not understood: {incompatible & ~_KNOWN:#x}",
                cure="give --kernel and --initrd",
            )
        self._has_types = bool(
            incompatible & _FTYPE if version == 5 else _u32(raw, 200) & _OLD_FTYPE
        )
        if (
            not 9 <= block_log <= 16
            or self._block != 1 << block_log
            or self._inode_size != self._block >> self._per_block_log
            or not 256 <= self._inode_size <= 2048
            or not 0 < self._group <= 1 << self._group_log <= 1 << 31
            or not self._groups
            or block_log + directory_log > 16
        ):
            raise self._damaged("impossible sizes in its superblock")
        self._directory_block = self._block << directory_log

    # --- inodes -----------------------------------------------------------------------------------

    def _root(self) -> _Inode:
        return self._inode(self._root_number)

    def _inode(self, number: int) -> _Inode:
        within = number & ((1 << self._per_block_log) - 1)
        at = self._place(number >> self._per_block_log) + within * self._inode_size
        raw = self._bytes(at, self._inode_size)
        version, format = raw[4], raw[5]
        core = 176 if version == 3 else 100
        if raw[:2] != b"IN" or not 1 <= version <= 3 or raw[82] * 8 > len(raw) - core:
            raise self._damaged(f"inode {number}")
        if _u16(raw, 90) & _REALTIME:
            raise ConfigError(
                f"a file in {self.where} is on a realtime device, which is not read",
                cure="give --kernel and --initrd",
            )
        extents = _u32(raw, 76)
        if version == 3 and _u64(raw, 120) & _LARGE_COUNTS:
            extents = _u64(raw, 24)
        fork = raw[core : core + raw[82] * 8] if raw[82] else raw[core:]
        return _Inode(number, _u16(raw, 2), _u64(raw, 56), format, extents, fork)

    def _place(self, block: int) -> int:
        """The byte where block `block` is; its upper bits are the number of an allocation group."""
        group, within = block >> self._group_log, block & ((1 << self._group_log) - 1)
        if group >= self._groups or within >= self._group:
            raise self._damaged(f"there is no block {block}")
        return (group * self._group + within) * self._block

    def _target(self, link: _Inode) -> bytes:
        if link.format == _LOCAL:
            return self._inline(link)
        found, left = b"", link.size
        for piece in self._pieces(link):
            length = min(piece.blocks * self._block, _LINK_HEADER + left)
            data = self._bytes(self._start(piece), length)
            data = data[_LINK_HEADER:] if data[:4] == _LINK_MAGIC else data
            found += data[:left]
            left = link.size - len(found)
            if not left:
                break
        return found

    def _inline(self, node: _Inode) -> bytes:
        if node.size > len(node.fork):
            raise self._damaged(f"inode {node.number} has more than there is room for")
        return node.fork[: node.size]

    # --- directories ------------------------------------------------------------------------------

    def _child(self, directory: _Inode, name: bytes) -> _Inode | None:
        number = self._entries(directory).get(name)
        return None if number is None else self._inode(number)

    def _names(self, directory: _Inode) -> Iterable[str]:
        return readable(self._entries(directory))

    def _entries(self, directory: _Inode) -> dict[bytes, int]:
        if directory.size > MOST_DIRECTORY:
            raise too_large(self.where)
        if directory.format == _LOCAL:
            return self._short_entries(self._inline(directory))
        found: dict[bytes, int] = {}
        size = self._directory_block
        part = b""
        for piece in self._pieces(directory):
            if piece.logical * self._block >= min(directory.size, _LEAF_BYTES):
                break
            length = piece.blocks * self._block
            if length > MOST_DIRECTORY:
                raise too_large(self.where)
            self._search.take(length, self.where)
            start = self._start(piece)
            for offset in range(0, length, self._block):
                part += self._bytes(start + offset, self._block)
                if len(part) == size:  # a block of a directory may be of several pieces
                    self._add_entries(part, found)
                    part = b""
        return found

    def _short_entries(self, raw: bytes) -> dict[bytes, int]:
        if len(raw) < 2:
            raise self._damaged("a directory's entries")
        count, width = raw[0], 8 if raw[1] else 4
        at = 2 + width
        found = {}
        for _ in range(count):
            if at >= len(raw):
                raise self._damaged("a directory's entries")
            name = raw[at + 3 : at + 3 + raw[at]]
            at += 3 + raw[at] + self._has_types
            if at + width > len(raw):
                raise self._damaged("a directory's entries")
            found[name] = int.from_bytes(raw[at : at + width], "big")
            at += width
        return found

    def _add_entries(self, raw: bytes, found: dict[bytes, int]) -> None:
        at = _DIRECTORY_MAGICS.get(raw[:4])
        if at is None:
            raise self._damaged("a directory's blocks")
        end = len(raw)
        if raw[:4] in _ENDS_WITH_HASHES:
            end -= 8 + 8 * _u32(raw, len(raw) - 8)
        while at + 11 <= end:
            if _u16(raw, at) == _UNUSED:
                length = _u16(raw, at + 2)
            else:
                length = -(-(11 + raw[at + 8] + self._has_types) // 8) * 8
                found[raw[at + 9 : at + 9 + raw[at + 8]]] = _u64(raw, at)
            if length < 8 or at + length > end:
                raise self._damaged("a directory's entries")
            at += length

    # --- from an inode to bytes -------------------------------------------------------------------

    def _start(self, piece: _Piece) -> int:
        if piece.start is None:
            raise self._damaged("a directory or a link that was never written")
        return piece.start

    def _content(self, node: _Inode) -> Iterator[bytes]:
        if node.format == _LOCAL:
            yield self._inline(node)
            return
        left, at = node.size, 0
        for piece in self._pieces(node):
            hole = min(left, (piece.logical - at) * self._block)
            yield from self._zeros(hole)
            left -= hole
            at = piece.logical + piece.blocks
            wanted = min(left, piece.blocks * self._block)
            left -= wanted
            if piece.start is None:
                yield from self._zeros(wanted)
                continue
            for offset in range(0, wanted, CHUNK):
                yield self._bytes(piece.start + offset, min(CHUNK, wanted - offset))
            if not left:
                return
        yield from self._zeros(left)

    def _pieces(self, node: _Inode) -> Iterator[_Piece]:
        """The pieces of a file, in their order."""
        at = number = 0
        for raw in self._records(node):
            for index in range(0, len(raw), 16):
                high, low = struct.unpack_from(">QQ", raw, index)
                logical = high >> 9 & (1 << 54) - 1
                block, count = (high & 0x1FF) << 43 | low >> 21, low & (1 << 21) - 1
                number += 1
                if logical < at or not count or number > MOST_PIECES:
                    raise self._damaged("a file's blocks")
                at = logical + count
                # What was allocated and never written is zeros.
                yield _Piece(logical, count, None if high >> 63 else self._place(block))

    def _records(self, node: _Inode) -> Iterator[bytes]:
        """The extents of a file, as they stand in its inode or in the leaves of its tree."""
        if node.format == _EXTENTS:
            if node.extents * 16 > len(node.fork):
                raise self._damaged(f"inode {node.number} has more than there is room for")
            yield node.fork[: node.extents * 16]
            return
        if node.format != _BTREE or len(node.fork) < 4:
            raise self._damaged(f"inode {node.number} has no content")
        level, count = struct.unpack_from(">HH", node.fork)
        if not 0 < level < _MOST_LEVELS:
            raise self._damaged("a tree of extents")
        blocks = self._below(node.fork, 4, count)
        left = [(block, level - 1) for block in reversed(blocks)]
        while left:
            block, level = left.pop()
            self._search.take(self._block, self.where)
            raw = self._bytes(self._place(block), self._block)
            header = _TREE_MAGICS.get(raw[:4])
            own_level, count = struct.unpack_from(">HH", raw, 4)
            if header is None or own_level != level or len(left) + count > MOST_PIECES:
                raise self._damaged("a tree of extents")
            if level:
                left += [(one, level - 1) for one in reversed(self._below(raw, header, count))]
                continue
            if header + 16 * count > len(raw):
                raise self._damaged("a tree of extents")
            yield raw[header : header + 16 * count]

    def _below(self, raw: bytes, header: int, count: int) -> tuple[int, ...]:
        """The blocks below a node: as many numbers behind the room for as many keys."""
        most = (len(raw) - header) // 16
        if not 0 < count <= most:
            raise self._damaged("a tree of extents")
        return struct.unpack_from(f">{count}Q", raw, header + 8 * most)


def _u16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "big")


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def _u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "big")
