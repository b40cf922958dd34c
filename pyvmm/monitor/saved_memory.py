"""The memory of a snapshot: one file with all of it, or several that lie over one another.

A snapshot of what has changed since another one has its own pages in `memory`. The files below it
are links to those of the other one, which may be removed or not: nothing depends on its name. The
state has, as `pages`, the set of those in `memory` (a bitmap), and as `below` the other files, the
next one first, each with its set; the last one has none, because it has all of memory.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from pyvmm.control import snapshot_store as store
from pyvmm.errors import ConfigError, HostError
from pyvmm.host import syscalls
from pyvmm.host.holes import data_of
from pyvmm.host.saved import Saved
from pyvmm.host.syscalls import Closable
from pyvmm.memory import GuestMemory, pages
from pyvmm.memory.guest_memory import PAGE_SIZE
from pyvmm.memory.private_memory import read_into

MOST_LAYERS = 32
_PIECE = 1 << 20
_ZEROES = bytes(PAGE_SIZE)


class Layer(NamedTuple):
    """A file of a snapshot's directory, and the set of pages that count in it; None is all."""

    file: str
    pages: bytes | None


def layer_file(number: int) -> str:
    """The name of layer `number` from the top."""
    return f"{store.MEMORY}-{number}" if number else store.MEMORY


def layers_of(state: Mapping[str, Any], size: int) -> list[Layer]:
    """The layers of `size` bytes of memory, the highest first. Raises ConfigError for a state that
    cannot be."""
    saved = Saved(dict(state), "memory")
    if "below" not in state:
        return [Layer(store.MEMORY, None)]
    count = size // PAGE_SIZE
    rows = [saved, *saved.tables("below", MOST_LAYERS - 1)]
    layers = []
    for number, row in enumerate(rows):
        file = layer_file(number)
        if number and row.text("file") != file:
            raise row.wrong(f"file is not {file}")
        if number == len(rows) - 1:
            if row.get("pages") is not None:
                raise row.wrong("nothing is below the last file")
            layers.append(Layer(file, None))
        else:
            bitmap = row.data("pages", -(-count // 8), most=count)
            layers.append(Layer(file, pages.from_bitmap(bitmap, count)))
    return layers


def below(path: str, state: Mapping[str, Any], size: int) -> list[tuple[str, dict[str, Any]]]:
    """The files that a snapshot has below its own pages if it is taken of what has changed since
    the one in the directory `path`, which has `state`: each file's path, and what the new state
    says of it. Raises ConfigError."""
    layers = layers_of(state, size)
    if len(layers) >= MOST_LAYERS:
        raise ConfigError(
            f"the snapshot {os.path.basename(path)} has {len(layers)} files of memory already",
            cure="make one of it: pyvmm snapshot merge NAME NEW",
        )
    return [
        (
            os.path.join(path, layer.file),
            {
                "file": layer_file(number),
                "pages": None if layer.pages is None else pages.to_bitmap(layer.pages).hex(),
            },
        )
        for number, layer in enumerate(layers, 1)
    ]


class SavedMemory(Closable):
    """The open files of a snapshot's memory. `files` are their descriptors, each with the set of
    the pages that count in it, the lowest first, which has all of them and no set; `size` is in
    bytes."""

    def __init__(self, path: str, state: Mapping[str, Any], size: int) -> None:
        """Raises ConfigError."""
        self.size = size
        self._closing = ExitStack()
        self.files: list[tuple[int, bytes]] = []
        count = size // PAGE_SIZE
        try:
            for layer in reversed(layers_of(state, size)):
                fd = self._open(os.path.join(path, layer.file))
                self._closing.callback(os.close, fd)
                if os.fstat(fd).st_size != size:
                    raise ConfigError(f"{layer.file} is not as large as it was", cure=_CURE)
                self.files.append((fd, layer.pages or b""))
        except BaseException:
            self.close()
            raise
        self._extents = list(pages.extents(count, [which for _, which in self.files[1:]]))
        self._starts = [first for first, _, _ in self._extents]

    @staticmethod
    def _open(path: str) -> int:
        try:
            return syscalls.open_file(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except HostError as error:
            raise ConfigError(f"the snapshot's memory: {error}", cure=_CURE) from None

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on. Raises HostError."""
        found = bytearray()
        while len(found) < length:
            at = offset + len(found)
            first, count, layer = self._extents[bisect_right(self._starts, at // PAGE_SIZE) - 1]
            most = min(length - len(found), (first + count) * PAGE_SIZE - at, _PIECE)
            try:
                data = os.pread(self.files[layer][0], most, at)
            except OSError as error:
                raise HostError(error.errno or 0, "reading of a snapshot's memory") from None
            if not data:
                raise HostError(0, "reading of a snapshot's memory: it has been cut short")
            found += data
        return bytes(found)

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """All that is not zero: where it is, and what. Raises HostError."""
        for _, start, end in self._data():
            for at in range(start, end, _PIECE):
                data = self.read(at, min(_PIECE, end - at))
                yield from ((at + skipped, part) for skipped, part in _without_zeroes(data))

    def _data(self) -> Iterator[tuple[int, int, int]]:
        """The ranges that may not be zero: the file that has each, its start and its end."""
        for first, count, layer in self._extents:
            fd = self.files[layer][0]
            for start, end in data_of(fd, first * PAGE_SIZE, (first + count) * PAGE_SIZE):
                yield fd, start, end

    def fetch_ahead(self, runs: Iterable[tuple[int, int]]) -> None:
        """Have the kernel read these runs of pages, if it has not, and do not wait for it."""
        for first, count in runs:
            end = min(first + count, self.size // PAGE_SIZE)
            while first < end:
                start, length, layer = self._extents[bisect_right(self._starts, first) - 1]
                part = min(end, start + length) - first
                os.posix_fadvise(
                    self.files[layer][0],
                    first * PAGE_SIZE,
                    part * PAGE_SIZE,
                    os.POSIX_FADV_WILLNEED,
                )
                first += part

    def copy_to(self, memory: GuestMemory) -> None:
        """Have `memory`, of this size and all zeroes, be the same. Raises HostError."""
        for fd, start, end in self._data():
            for region in memory.regions:
                low = max(start, region.fd_offset)
                high = min(end, region.fd_offset + region.size)
                if low < high:
                    here = region.view[low - region.fd_offset : high - region.fd_offset]
                    read_into(here, fd, low)

    def differing(self, offset: int, data: bytes) -> list[int]:
        """The places in `data` of its whole pages that differ from those from `offset` on."""
        here = self.read(offset, len(data))
        if here == data:
            return []
        return [
            at
            for at in range(0, len(data), PAGE_SIZE)
            if here[at : at + PAGE_SIZE] != data[at : at + PAGE_SIZE]
        ]

    def close(self) -> None:
        self._closing.close()


_CURE = "take a new one"


def _without_zeroes(data: bytes) -> Iterator[tuple[int, bytes]]:
    for at in range(0, len(data), PAGE_SIZE):
        if not data.startswith(_ZEROES, at):
            yield at, data[at : at + PAGE_SIZE]


def is_zero(page: bytes) -> bool:
    """True if a page has nothing in it."""
    return page == _ZEROES
