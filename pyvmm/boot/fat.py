"""Reads files out of a FAT16 or FAT32 file system: what an EFI System Partition, or a /boot of that
kind, says of kernels.

As little as that needs, of bytes that may be anybody's: every chain of clusters and every directory
is bounded, and nothing is written. Source: Microsoft, "FAT: General Overview of On-Disk Format",
1.03; a volume of fewer than 4,085 clusters is FAT12, which is not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pyvmm.boot.file_system import MOST_DIRECTORY, FileSystem, Read, Search

_PIECE = 1 << 20
_TABLE_PIECE = 1 << 16
_MOST_PIECES = 64  # of the table that are kept
_FAT16_FROM, _FAT32_FROM = 4085, 65525  # clusters
_ENTRY = 32
_LONG, _LABEL, _DIRECTORY = 0x0F, 0x08, 0x10
_LOWER_NAME, _LOWER_SUFFIX = 0x08, 0x10  # as Windows NT and Linux note it


class _Entry(NamedTuple):
    name: str
    is_directory: bool
    cluster: int
    size: int

    @property
    def is_file(self) -> bool:
        return not self.is_directory


class Fat(FileSystem[_Entry]):
    """A FAT16 or FAT32 file system. Names are the same whatever the case of their letters."""

    repair = "fsck.fat"

    def __init__(self, read: Read, size: int, where: str, search: Search | None = None) -> None:
        super().__init__(read, size, where, search)
        self._pieces: dict[int, bytes] = {}
        raw = read(0, 512)
        if len(raw) < 512:
            raise self._damaged("it is cut short")
        sector, per_cluster, reserved = _number(raw, 11, 2), raw[13], _number(raw, 14, 2)
        tables, root_entries = raw[16], _number(raw, 17, 2)
        sectors = _number(raw, 19, 2) or _number(raw, 32, 4)
        table = _number(raw, 22, 2) or _number(raw, 36, 4)
        if (
            sector not in (512, 1024, 2048, 4096)
            or not per_cluster
            or per_cluster & (per_cluster - 1)
            or not (reserved and tables and table)
        ):
            raise self._damaged("impossible sizes in its first sector")
        self._cluster = sector * per_cluster
        self._table = reserved * sector
        self._root = self._table + tables * table * sector
        self._root_size = root_entries * _ENTRY
        self._data = self._root + -(-self._root_size // sector) * sector
        self._clusters = (sectors * sector - self._data) // self._cluster
        self._width = 4 if self._clusters >= _FAT32_FROM else 2
        self._root_cluster = _number(raw, 44, 4) if self._width == 4 else 0
        if self._clusters < _FAT16_FROM or table * sector < self._clusters * self._width:
            raise self._damaged("it is neither FAT16 nor FAT32")

    def _find(self, path: str) -> _Entry:
        found = _Entry("/", True, self._root_cluster, 0)
        for name in filter(None, path.split("/")):
            if not found.is_directory:
                raise FileNotFoundError(path)
            wanted = name.casefold()
            if name == "." or (name == ".." and found.name == "/"):
                continue
            inside = self._entries(found)
            entry = next((one for one in inside if one.name.casefold() == wanted), None)
            if entry is None:
                raise FileNotFoundError(path)
            found = entry
        return found

    # --- directories ------------------------------------------------------------------------------

    def _entries(self, folder: _Entry) -> list[_Entry]:
        found = []
        long: dict[int, str] = {}
        data = self._directory(folder.cluster)
        for at in range(0, len(data) - _ENTRY + 1, _ENTRY):
            raw = data[at : at + _ENTRY]
            if not raw[0]:
                break
            if raw[0] == 0xE5:
                long = {}
            elif raw[11] & 0x3F == _LONG:
                text = raw[1:11] + raw[14:26] + raw[28:32]
                long[raw[0] & 0x1F] = text.decode("utf-16-le", "replace")
            else:
                if not raw[11] & _LABEL:
                    entry = _entry(raw, "".join(long[n] for n in sorted(long)))
                    if self._width == 2:
                        entry = entry._replace(cluster=entry.cluster & 0xFFFF)
                    found.append(entry)
                long = {}
        return found

    def _names(self, directory: _Entry) -> Iterable[str]:
        return (entry.name for entry in self._entries(directory))

    def _directory(self, cluster: int) -> bytes:
        cluster = cluster or self._root_cluster  # ".." says 0 for the root
        if not cluster:  # the root of FAT16 has a place of its own
            data = self._bytes(self._root, self._root_size)
            self._search.take(len(data), self.where)
            return data
        pieces = []
        left = MOST_DIRECTORY  # the format's own limit
        for at, size in self._runs(cluster):
            if size > left:
                raise self._damaged("a directory of more than 2 MiB")
            left -= size
            self._search.take(size, self.where)
            pieces.append(self._bytes(at, size))
        return b"".join(pieces)

    # --- clusters ---------------------------------------------------------------------------------

    def _content(self, node: _Entry) -> Iterator[bytes]:
        size = node.size
        if not size:
            return
        for at, length in self._runs(node.cluster):
            length = min(length, size)
            for begin in range(0, length, _PIECE):
                yield self._bytes(at + begin, min(_PIECE, length - begin))
            size -= length
            if not size:
                return
        raise self._damaged("a file is longer than its clusters")

    def _runs(self, cluster: int) -> Iterator[tuple[int, int]]:
        """The pieces of a chain, as offset and bytes; clusters that are neighbours are one, as far
        as a directory may be long."""
        first = count = 0
        for _ in range(self._clusters):
            if not 2 <= cluster < self._clusters + 2:
                raise self._damaged(f"there is no cluster {cluster}")
            if count and cluster == first + count and (count + 1) * self._cluster <= _PIECE:
                count += 1
            else:
                if count:
                    yield self._data + (first - 2) * self._cluster, count * self._cluster
                first, count = cluster, 1
            cluster = self._next(cluster)
            if cluster >= (0x0FFFFFF8 if self._width == 4 else 0xFFF8):
                yield self._data + (first - 2) * self._cluster, count * self._cluster
                return
        raise self._damaged("a chain of clusters has no end")

    def _next(self, cluster: int) -> int:
        number, at = divmod(cluster * self._width, _TABLE_PIECE)
        piece = self._pieces.get(number)
        if piece is None:
            if len(self._pieces) == _MOST_PIECES:
                self._pieces.clear()
            begin = self._table + number * _TABLE_PIECE
            piece = self._bytes(begin, min(_TABLE_PIECE, self._size - begin))
            # A chain may go to and fro, so that each of its clusters costs a piece.
            self._search.take(len(piece), self.where)
            self._pieces[number] = piece
        if at + self._width > len(piece):
            raise self._damaged("its table is cut short")
        return _number(piece, at, self._width) & (0x0FFFFFFF if self._width == 4 else 0xFFFF)


def _entry(raw: bytes, long: str) -> _Entry:
    name, suffix = (part.decode("cp437").rstrip(" ") for part in (raw[:8], raw[8:11]))
    if raw[12] & _LOWER_NAME:
        name = name.lower()
    if raw[12] & _LOWER_SUFFIX:
        suffix = suffix.lower()
    short = f"{name}.{suffix}" if suffix else name
    cluster = _number(raw, 20, 2) << 16 | _number(raw, 26, 2)
    long = long.partition("\0")[0]
    return _Entry(long or short, bool(raw[11] & _DIRECTORY), cluster, _number(raw, 28, 4))


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")
