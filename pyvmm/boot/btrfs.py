"""Files of a Btrfs file system on one device, read as data: nothing is mounted and nothing written.

For the few files by which a disk boots, as in pyvmm.boot.ext4: a stranger's bytes, every number
checked, every walk bounded. Its log tree is not replayed, as by boot loaders, and sums are not
checked. Sources: the Btrfs documentation ("On-disk Format", "Subvolumes"); names as in Linux
include/uapi/linux/btrfs_tree.h.
"""

from __future__ import annotations

import bisect
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from pyvmm.boot.file_system import (
    CHUNK,
    MOST_DIRECTORY,
    MOST_PATH,
    Read,
    Search,
    UnixFileSystem,
    readable,
    too_large,
)
from pyvmm.errors import ConfigError

SUPERBLOCK = 0x1_0000
_MAGIC_AT, _MAGIC = 64, b"_BHRfS_M"
_SYSTEM_CHUNKS, _MOST_SYSTEM_CHUNKS = 811, 2048  # sys_chunk_array
# incompat_flags: what is known, or has no bearing on reading files of one device. Not among them:
# RAID56, ZONED, EXTENT_TREE_V2, RAID_STRIPE_TREE, and what comes later.
_KNOWN = 0x1_0F7F
# Objects and types of items.
_ROOT_DIRECTORY, _TOP_LEVEL, _CHUNK_TREE, _FIRST_OBJECT = 6, 5, 256, 256
_INODE_ITEM, _DIR_ITEM, _EXTENT_DATA, _ROOT_ITEM, _CHUNK_ITEM = 1, 84, 108, 132, 228
_KEY = struct.Struct("<QBQ")
_LAST = (1 << 64) - 1
_NODE_HEADER, _MOST_LEVEL = 101, 8
_STRIPED = 0x8 | 0x40 | 0x80 | 0x100  # RAID0, RAID10, RAID5, RAID6
_MOST_CHUNKS = 1 << 14
_MOST_ITEMS = 1 << 16  # of one directory or file
_KEPT = 64  # nodes
_VISIT = 4096  # what a visit to a node that is kept counts for, in bytes
_INLINE, _REGULAR, _UNWRITTEN = 0, 1, 2
_COMPRESSIONS = {0: "", 1: "zlib", 2: "lzo", 3: "zstd"}
_MOST_PACKED = 128 << 10  # bytes that are compressed at once (BTRFS_MAX_UNCOMPRESSED)
# Installers' names of the subvolume that is the root: Debian's, Fedora's, Ubuntu's and SUSE's.
_ROOT_NAMES = ("@rootfs", "root", "@")
_ROOT_HAS = ("etc", "boot", "usr")


class Key(NamedTuple):
    """The name of an item in a tree; items are sorted by it."""

    object: int
    type: int
    offset: int


class _Tree(NamedTuple):
    """A tree by the logical address of its top node."""

    address: int
    level: int


class _Inode(NamedTuple):
    tree: _Tree
    number: int
    mode: int
    size: int

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


class Btrfs(UnixFileSystem[_Inode]):
    """A Btrfs file system on one device.

    Paths are those of its root: the default subvolume, or one that an installer calls so, which
    `subvolume` is the path of ("" for the one that a mount without options has). What is not
    there is looked for from the top level, as GRUB does.
    """

    repair = "btrfs check"

    def __init__(self, read: Read, size: int, where: str, search: Search | None = None) -> None:
        super().__init__(read, size, where, search)
        self._kept: dict[int, bytes] = {}
        raw = read(SUPERBLOCK, 4096)
        if len(raw) < 4096 or raw[_MAGIC_AT : _MAGIC_AT + 8] != _MAGIC:
            raise self._damaged("no superblock")
        unknown = _u64(raw, 188) & ~_KNOWN
        if unknown:
            raise ConfigError(
                f"{where} has features that are not understood: {unknown:#x}",
                cure="give --kernel and --initrd",
            )
        if _u64(raw, 136) != 1:
            raise ConfigError(
                f"{where} is one of {_u64(raw, 136)} devices of a btrfs, which is not read",
                cure="give --kernel and --initrd",
            )
        self._node, sector = _u32(raw, 148), _u32(raw, 144)
        if sector not in (4096, 8192, 16384, 65536) or self._node not in (
            *(4096, 8192, 16384, 32768, 65536),
        ):
            raise self._damaged("impossible sizes in its superblock")
        self._sector = sector
        self._chunks: list[tuple[int, int, int]] = []  # address, bytes, byte; in order
        self._add_system_chunks(raw)
        chunk_tree = _Tree(_u64(raw, 88), raw[199])
        range = Key(_CHUNK_TREE, _CHUNK_ITEM, 0), Key(_CHUNK_TREE, _CHUNK_ITEM, _LAST)
        for key, item in self._items(chunk_tree, *range):
            self._add_chunk(key.offset, item)
        self._roots = _Tree(_u64(raw, 80), raw[198])
        self._top = self._subvolume(_TOP_LEVEL)
        self.subvolume, self._home = self._choose_root()

    def _choose_root(self) -> tuple[str, _Inode]:
        default = self._default()
        if default != _TOP_LEVEL:
            return "", self._subvolume(default)
        inside = self._entries(self._top)
        if not any(name.encode() in inside for name in _ROOT_HAS):
            for name in _ROOT_NAMES:
                found = inside.get(name.encode())
                if found is not None and found.type == _ROOT_ITEM:
                    with suppress(FileNotFoundError):
                        return name, self._subvolume(found.object)
        return "", self._top

    def _default(self) -> int:
        """The subvolume that a mount without options has."""
        first, last = Key(_ROOT_DIRECTORY, _DIR_ITEM, 0), Key(_ROOT_DIRECTORY, _DIR_ITEM, _LAST)
        for _, item in self._items(self._roots, first, last):
            for name, key in self._named(item):
                if name == b"default":
                    return key.object
        return _TOP_LEVEL

    def _find(self, path: str) -> _Inode:
        try:
            return super()._find(path)
        except FileNotFoundError:
            if self._home == self._top:
                raise
        home, self._home = self._home, self._top
        try:
            return super()._find(path)
        finally:
            self._home = home

    # --- where bytes are --------------------------------------------------------------------------

    def _add_system_chunks(self, raw: bytes) -> None:
        """The chunks that the chunk tree is in."""
        size = _u32(raw, 160)
        if size > _MOST_SYSTEM_CHUNKS:
            raise self._damaged("its system chunks")
        array = raw[_SYSTEM_CHUNKS : _SYSTEM_CHUNKS + size]
        at = 0
        while at + _KEY.size + 48 <= len(array):
            key = Key(*_KEY.unpack_from(array, at))
            item = array[at + _KEY.size :]
            self._add_chunk(key.offset, item)
            at += _KEY.size + 48 + 32 * _u16(item, 44)

    def _add_chunk(self, address: int, item: bytes) -> None:
        if len(item) < 80 or len(self._chunks) >= _MOST_CHUNKS:
            raise self._damaged("its chunks")
        length, kind, stripes = _u64(item, 0), _u64(item, 24), _u16(item, 44)
        if not stripes or not length:
            raise self._damaged("its chunks")
        if kind & _STRIPED and stripes > 1:
            raise ConfigError(
                f"{self.where} is striped, which is not read", cure="give --kernel and --initrd"
            )
        chunk = (address, length, _u64(item, 56))
        at = bisect.bisect_left(self._chunks, chunk)
        if self._chunks[at : at + 1] != [chunk]:  # system chunks are in the tree as well
            self._chunks.insert(at, chunk)

    def _logical(self, address: int, size: int) -> bytes:
        """The bytes at a logical address; of copies, the first."""
        at = bisect.bisect_right(self._chunks, (address, _LAST, _LAST)) - 1
        if at >= 0:
            start, length, byte = self._chunks[at]
            if address + size <= start + length:
                return self._bytes(byte + address - start, size)
        raise self._damaged(f"there is nothing at {address:#x}")

    # --- trees ------------------------------------------------------------------------------------

    def _items(self, tree: _Tree, first: Key, last: Key) -> Iterator[tuple[Key, bytes]]:
        """The items of a tree from `first` to `last`, in their order."""
        left = [iter((tree,))]
        while left:
            node = next(left[-1], None)
            if node is None:
                left.pop()
                continue
            address, level = node
            raw = self._read_node(address)
            count = _u32(raw, 96)
            row = 33 if level else 25
            if (
                raw[100] != level
                or level > _MOST_LEVEL
                or _u64(raw, 48) != address
                or count * row > len(raw) - _NODE_HEADER
            ):
                raise self._damaged("a node of a tree")
            rows = range(_NODE_HEADER, _NODE_HEADER + count * row, row)
            if level:
                left.append(self._below(raw, rows, level, first, last))
                continue
            for at in rows[bisect.bisect_left(rows, first, key=partial(_key, raw)) :]:
                key = _key(raw, at)
                if key > last:
                    return
                begin = _NODE_HEADER + _u32(raw, at + 17)
                end = begin + _u32(raw, at + 21)
                if end > len(raw) or key < first:
                    raise self._damaged("an item of a tree")
                # Any number of them may be the same bytes, or none.
                self._search.take(row + end - begin, self.where)
                yield key, raw[begin:end]

    def _below(self, raw: bytes, rows: range, level: int, first: Key, last: Key) -> Iterator[_Tree]:
        """The nodes below one that may have items from `first` to `last`."""
        # What comes before `first` may be in the same node as `first`.
        begin = bisect.bisect_right(rows, first, key=partial(_key, raw)) - 1
        for at in rows[max(0, begin) :]:
            if _key(raw, at) > last:
                return
            yield _Tree(_u64(raw, at + 17), level - 1)

    def _read_node(self, address: int) -> bytes:
        raw = self._kept.get(address)
        if raw is not None:
            self._search.take(_VISIT, self.where)
            return raw
        self._search.take(self._node, self.where)
        if len(self._kept) == _KEPT:
            self._kept.clear()
        raw = self._kept[address] = self._logical(address, self._node)
        return raw

    def _item(self, tree: _Tree, number: int, type: int) -> bytes:
        for _, item in self._items(tree, Key(number, type, 0), Key(number, type, _LAST)):
            return item
        raise self._damaged(f"there is no object {number}")

    # --- inodes and directories -------------------------------------------------------------------

    def _root(self) -> _Inode:
        return self._home

    def _subvolume(self, number: int) -> _Inode:
        item = self._item(self._roots, number, _ROOT_ITEM)
        if len(item) < 239:
            raise self._damaged("a subvolume")
        return self._inode(_Tree(_u64(item, 176), item[238]), _FIRST_OBJECT)

    def _inode(self, tree: _Tree, number: int) -> _Inode:
        item = self._item(tree, number, _INODE_ITEM)
        if len(item) < 160:
            raise self._damaged(f"inode {number}")
        return _Inode(tree, number, _u32(item, 52), _u64(item, 16))

    def _child(self, directory: _Inode, name: bytes) -> _Inode | None:
        key = self._entries(directory).get(name)
        if key is None:
            return None
        if key.type == _ROOT_ITEM:
            return self._subvolume(key.object)
        return self._inode(directory.tree, key.object)

    def _names(self, directory: _Inode) -> Iterable[str]:
        return readable(self._entries(directory))

    def _entries(self, directory: _Inode) -> dict[bytes, Key]:
        number = directory.number
        found: dict[bytes, Key] = {}
        left = MOST_DIRECTORY
        range = Key(number, _DIR_ITEM, 0), Key(number, _DIR_ITEM, _LAST)
        for _, item in self._items(directory.tree, *range):
            left -= len(item)
            if left < 0:
                raise too_large(self.where)
            found.update(self._named(item))
        return found

    def _named(self, item: bytes) -> Iterator[tuple[bytes, Key]]:
        """The names in an item of a directory; those with the same hash share one."""
        at = 0
        while at < len(item):
            if at + 30 > len(item):
                raise self._damaged("a directory's entries")
            data, name = _u16(item, at + 25), _u16(item, at + 27)
            if at + 30 + name > len(item):
                raise self._damaged("a directory's entries")
            yield item[at + 30 : at + 30 + name], Key(*_KEY.unpack_from(item, at))
            at += 30 + name + data

    def _target(self, link: _Inode) -> bytes:
        return b"".join(self._content(link))[:MOST_PATH]

    # --- from an inode to bytes -------------------------------------------------------------------

    def _content(self, node: _Inode) -> Iterator[bytes]:
        left, at = node.size, 0
        first = Key(node.number, _EXTENT_DATA, 0)
        items = self._items(node.tree, first, first._replace(offset=_LAST))
        for number, (key, item) in enumerate(items):
            if key.offset < at or len(item) < 21 or number >= _MOST_ITEMS:
                raise self._damaged("a file's extents")
            hole = min(left, key.offset - at)
            yield from self._zeros(hole)
            left -= hole
            if not left:
                return
            length = 0
            for piece in self._extent(item):
                length += len(piece)
                yield piece[:left]
                left -= min(left, len(piece))
                if not left:
                    return
            at = key.offset + length
        yield from self._zeros(left)

    def _extent(self, item: bytes) -> Iterator[bytes]:
        """The bytes of a part of a file, which may be more than the file has."""
        size, compression, kind = _u64(item, 8), item[16], item[20]
        if item[17] or item[18:20] != b"\0\0":
            raise self._damaged("a file's extents are encrypted")
        if kind == _INLINE:
            yield self._unpack(item[21:], compression, size, 0, size)
            return
        if len(item) < 53 or kind not in (_REGULAR, _UNWRITTEN):
            raise self._damaged("a file's extents")
        address, on_disk, offset, count = struct.unpack_from("<4Q", item, 21)
        if not count:
            raise self._damaged("a file's extents")
        if kind == _UNWRITTEN or not address:
            yield from self._zeros(count)
        elif compression:
            if on_disk > _MOST_PACKED + self._sector:
                raise self._damaged("a file's extents")
            raw = self._logical(address, on_disk)
            yield self._unpack(raw, compression, size, offset, count)
        else:
            for begin in range(0, count, CHUNK):
                yield self._logical(address + offset + begin, min(CHUNK, count - begin))

    def _unpack(self, raw: bytes, compression: int, size: int, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on of the `size` bytes that `raw` stands for."""
        name = _COMPRESSIONS.get(compression, str(compression))
        if name in ("", "zlib", "zstd"):
            if size > _MOST_PACKED or offset + count > size:
                raise self._damaged("a file's extents")
            # Whoever reads or unpacks much for a little of it does not do so for long.
            self._search.take(max(size, len(raw)) - count, self.where)
        if not name:
            data = raw[:size]
        elif name == "zlib":
            data = self._inflate(raw, size)
        elif name == "zstd":
            data = self._from_zstd(raw, size)
        else:
            raise ConfigError(
                f"a file in {self.where} is compressed with {name}, which is not read",
                cure="give --kernel and --initrd",
            )
        # A last piece of a file may be stored short; the rest of it is zeros.
        return data[offset : offset + count].ljust(count, b"\0")

    def _inflate(self, raw: bytes, size: int) -> bytes:
        import zlib

        if not size:
            return b""  # which zlib would take for no limit
        try:
            return zlib.decompressobj().decompress(raw, size)
        except zlib.error as error:
            raise self._damaged(f"a compressed file: {error}") from None

    def _from_zstd(self, raw: bytes, size: int) -> bytes:
        import zstandard

        unpacker = zstandard.ZstdDecompressor(max_window_size=2 * _MOST_PACKED)
        try:
            return bytes(unpacker.stream_reader(raw).read(size))
        except zstandard.ZstdError as error:
            raise self._damaged(f"a compressed file: {error}") from None


def _key(node: bytes, at: int) -> Key:
    return Key(*_KEY.unpack_from(node, at))


def _u16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "little")


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def _u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")
