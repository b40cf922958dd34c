"""What the readers of a disk's file systems have in common: files by their paths, within bounds."""

from __future__ import annotations

import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from pyvmm.errors import ConfigError

Read = Callable[[int, int], bytes]  # (offset, bytes): as many bytes, fewer past the end

MOST_DIRECTORY = 2 << 20  # bytes
MOST_PATH = 4095  # bytes, as the kernel
MOST_PIECES = 1 << 16  # of one file
CHUNK = 1 << 20  # bytes that are read at once
_MOST_LINKS = 16
_MOST_LOOKED_AT = 64 << 20  # bytes of directories, texts and trees, in all
_STEP = 4096  # what each name of a path counts for, in bytes: a small directory may be in no block


class Node(Protocol):
    """What there is at a path."""

    @property
    def is_file(self) -> bool: ...
    @property
    def is_directory(self) -> bool: ...
    @property
    def size(self) -> int: ...


N = TypeVar("N", bound=Node)


class Search:
    """The bytes that may be read to find something, in all file systems of a disk: a disk may have
    many, and a small directory a large tree."""

    def __init__(self) -> None:
        self.left = _MOST_LOOKED_AT

    def take(self, size: int, where: str) -> None:
        """Count `size` bytes more, in `where`. Raises ConfigError when it is too much."""
        self.left -= size
        if self.left < 0:
            raise too_large(where)


class FileSystem(ABC, Generic[N]):
    """A file system of `size` bytes, which `read` reads. Raises ConfigError for one that is
    damaged, or has features that are not understood; methods do as well, and what `read` raises."""

    repair: str  # the command that mends a damaged one

    def __init__(self, read: Read, size: int, where: str, search: Search | None = None) -> None:
        """`where` is what it is called in messages; `search` is one with the other file systems of
        its disk."""
        self._read = read
        self._size = size
        self.where = where
        self._search = search or Search()

    def read_file(self, path: str, most: int) -> Iterator[bytes]:
        """The content of the regular file at `path`, in pieces; links are followed within the file
        system. Raises FileNotFoundError, and ConfigError for one of more than `most` bytes."""
        node = self._at(path)
        if not node.is_file:
            raise ConfigError(f"{shown(path)} in {self.where} is not a file")
        if node.size > most:
            raise ConfigError(
                f"{shown(path)} in {self.where} has {node.size} bytes, more than the {most} it may "
                "have"
            )
        return self._content(node)

    def read_text(self, path: str, most: int) -> str:
        """The same as a text."""
        pieces = []
        for piece in self.read_file(path, most):
            self._search.take(len(piece), self.where)
            pieces.append(piece)
        return b"".join(pieces).decode("utf-8", "replace")

    def names(self, path: str) -> list[str]:
        """The names in the directory at `path`, sorted, without names that are not printable;
        nothing if there is none."""
        try:
            node = self._at(path)
        except FileNotFoundError:
            return []
        if not node.is_directory:
            return []
        return sorted(name for name in self._names(node) if name.isprintable())

    def has(self, path: str) -> bool:
        """True if there is anything at `path`."""
        try:
            self._at(path)
        except FileNotFoundError:
            return False
        return True

    def _at(self, path: str) -> N:
        if len(path) > MOST_PATH:
            raise FileNotFoundError(path[:MOST_PATH])
        return self._find(path)

    @abstractmethod
    def _find(self, path: str) -> N:
        """What is at `path`. Raises FileNotFoundError."""

    @abstractmethod
    def _content(self, node: N) -> Iterator[bytes]:
        """The bytes of a file, in pieces."""

    @abstractmethod
    def _names(self, directory: N) -> Iterable[str]:
        """The names in a directory."""

    def _bytes(self, offset: int, size: int) -> bytes:
        if size < 0 or offset + size > self._size:
            raise self._damaged(f"it refers to byte {offset}, which is past its end")
        data = self._read(offset, size)
        if len(data) < size:
            raise self._damaged("it is cut short")
        return data

    def _damaged(self, what: str) -> ConfigError:
        return ConfigError(
            f"the file system in {self.where} is damaged: {what}",
            cure=f"give --kernel and --initrd, or repair it ({self.repair})",
        )


class Inode(Node, Protocol):
    """What Unix has at a path."""

    @property
    def mode(self) -> int: ...


U = TypeVar("U", bound=Inode)


class UnixFileSystem(FileSystem[U]):
    """A file system with symbolic links, of which the paths are followed here."""

    @abstractmethod
    def _root(self) -> U:
        """The directory "/"."""

    @abstractmethod
    def _child(self, directory: U, name: bytes) -> U | None:
        """What is called `name` in `directory`."""

    @abstractmethod
    def _target(self, link: U) -> bytes:
        """Where a symbolic link, which has no more than MOST_PATH bytes, leads."""

    def _find(self, path: str) -> U:
        trail = [self._root()]
        left = [part for part in path.encode().split(b"/") if part]
        links = 0
        while left:
            part = left.pop(0)
            if part in (b".", b".."):
                # As for a process whose root this is, nothing is above the root.
                if part == b".." and len(trail) > 1:
                    trail.pop()
                continue
            if not trail[-1].is_directory:
                raise FileNotFoundError(path)
            self._search.take(_STEP, self.where)
            node = self._child(trail[-1], part)
            if node is None:
                raise FileNotFoundError(path)
            if stat.S_ISLNK(node.mode):
                links += 1
                if links > _MOST_LINKS:
                    raise ConfigError(
                        f"{shown(path)} in {self.where} is a chain of links without end"
                    )
                if node.size > MOST_PATH:
                    raise self._damaged(f"a link of {node.size} bytes")
                target = self._target(node)
                if target.startswith(b"/"):
                    trail = trail[:1]
                left = [one for one in target.split(b"/") if one] + left
                continue
            trail.append(node)
        return trail[-1]

    def _zeros(self, count: int) -> Iterator[bytes]:
        for offset in range(0, count, CHUNK):
            yield bytes(min(CHUNK, count - offset))


def shown(path: str) -> str:
    """A path that a stranger's file names, as a part of a line."""
    return f"{path if path.isprintable() else ascii(path):.200}"


def readable(names: Iterable[bytes]) -> Iterator[str]:
    """Those of `names` that are UTF-8."""
    found = (name.decode("utf-8", "replace") for name in names)
    return (name for name in found if "\ufffd" not in name)


def too_large(where: str) -> ConfigError:
    """The error for more than anything that boots needs to have looked at."""
    return ConfigError(
        f"directories and texts in {where} are too large to be searched",
        cure="give --kernel and --initrd, and root= in --cmdline",
    )
