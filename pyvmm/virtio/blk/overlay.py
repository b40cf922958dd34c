"""Copy on write: what the guest writes goes to a file of its own, the base stays as it is.

The file has the base's bytes at the same offsets, but sparse, with a bitmap that says for each
cluster whether it counts. There is no table of places to keep consistent: a cluster's bit goes from
0 to 1 once, and both are right as long as its data was there first.

    | header 4 KiB | bitmap, whole 4 KiB pages | data: as long as the base, in whole clusters |

`overlay_file` has the header. Without one (a snapshot, thrown away at the end) the bitmap lives in
memory only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from threading import Lock
from typing import NamedTuple

from pyvmm.errors import HostError
from pyvmm.host import log
from pyvmm.host.files import SECTOR, ImageFile, pwritev_all
from pyvmm.virtio.blk.backend import Backend, FileBackend

PAGE = 4096
_MIN_CLUSTER_BITS = 12
_WINDOW = 1024  # clusters looked at in one go; bounds the work for a bitmap of alternating bits
_MAX_BITMAP = 1 << 20  # bytes; 32 GiB have clusters of 4 KiB, larger disks larger ones


class Layout(NamedTuple):
    """Where things are in an overlay's file, in bytes, for a base of `size` bytes."""

    size: int
    cluster_bits: int
    bitmap_size: int
    data_offset: int
    file_size: int


def layout_for(size: int) -> Layout:
    """The layout of an overlay over `size` bytes; the same for the same size."""
    bits = _MIN_CLUSTER_BITS
    while size >> bits > _MAX_BITMAP * 8:
        bits += 1
    clusters = size + (1 << bits) - 1 >> bits
    bitmap_size = -(-clusters // (8 * PAGE)) * PAGE
    data_offset = PAGE + bitmap_size
    return Layout(size, bits, bitmap_size, data_offset, data_offset + (clusters << bits))


class OverlayBackend(Backend):
    """`base` with changes. `image` is the file for them, of `layout_for`'s size.

    `bitmap` says what is in it already, one bit for each cluster, lowest first; it is written back
    if `keep`. `image` is closed with the overlay, `base` is not.
    """

    can_discard = True

    def __init__(self, base: Backend, image: ImageFile, bitmap: bytearray, *, keep: bool) -> None:
        self._base = base
        self._layout = layout_for(base.size_sectors * SECTOR)
        self._bits = self._layout.cluster_bits
        self._bitmap = bitmap
        self._image = image
        self._file = FileBackend(image)
        self._keep = keep
        self._dirty: set[int] = set()  # pages of the bitmap that the file does not have yet
        self._lock = Lock()  # held by whoever changes the bitmap, and by writers to the file
        self._flushing = Lock()
        self.size_sectors = base.size_sectors
        self.block_sizes = base.block_sizes

    @property
    def fd(self) -> int:
        """The open file of the changes, whose lock lives as long as it is open somewhere."""
        return self._image.fd

    # --- which bytes are where ----------------------------------------------------------------

    def _runs(self, offset: int, size: int) -> Iterator[tuple[int, int, bool]]:
        """The pieces (offset, size, whether the overlay has it) that make up the range."""
        end = offset + size
        while offset < end:
            window = min(end, (offset >> self._bits) + _WINDOW << self._bits)
            yield from self._runs_in_window(offset, window)
            offset = window

    def _runs_in_window(self, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
        bits = self._bits
        first, last = offset >> bits, end - 1 >> bits
        left = last - first + 1
        window = self._bitmap[first >> 3 : (last >> 3) + 1]
        field = int.from_bytes(window, "little") >> (first & 7) & (1 << left) - 1
        while offset < end:
            inside = bool(field & 1)
            # How many bits from the lowest on are alike: up to the first that differs.
            other = ~field & (1 << left) - 1 if inside else field
            alike = (other & -other).bit_length() - 1 if other else left
            stop = min(end, first + alike << bits)
            yield offset, stop - offset, inside
            offset, first, left = stop, first + alike, left - alike
            field >>= alike

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        """See Backend."""
        shift = self._layout.data_offset
        for start, length, inside in self._runs(offset, size):
            pieces = views if length == size else cut(views, start - offset, length)
            if inside:
                self._file.readv(pieces, length, start + shift)
            else:
                self._base.readv(pieces, length, start)

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        """See Backend."""
        with self._lock:
            self._fill_edges(offset, size)
            self._file.writev(views, size, offset + self._layout.data_offset)
            self._set(offset, size)

    def write_zeroes(self, offset: int, size: int, may_unmap: bool) -> None:
        """See Backend."""
        with self._lock:
            self._fill_edges(offset, size)
            self._file.write_zeroes(offset + self._layout.data_offset, size, may_unmap)
            self._set(offset, size)

    def discard(self, offset: int, size: int) -> None:
        """See Backend: frees what the overlay has of it."""
        with self._lock:
            for start, length, inside in self._runs(offset, size):
                if inside:
                    self._file.discard(start + self._layout.data_offset, length)

    def _fill_edges(self, offset: int, size: int) -> None:
        """Copy what the base has in the first and the last cluster beside the range."""
        bits, end = self._bits, offset + size
        cluster = (1 << bits) - 1
        if offset & cluster and not self._has(offset >> bits):
            self._copy(offset & ~cluster, offset)
        last = end >> bits
        if end & cluster and not self._has(last):
            self._copy(end, min(last + 1 << bits, self._layout.size))

    def _copy(self, start: int, end: int) -> None:
        data = memoryview(bytearray(end - start))
        if data:
            self._base.readv([data], len(data), start)
            self._file.writev([data], len(data), start + self._layout.data_offset)

    def _has(self, cluster: int) -> bool:
        return bool(self._bitmap[cluster >> 3] >> (cluster & 7) & 1)

    def _set(self, offset: int, size: int) -> None:
        bits = self._bits
        first, last = offset >> bits, offset + size - 1 >> bits
        start, stop = first >> 3, (last >> 3) + 1
        before = int.from_bytes(self._bitmap[start:stop], "little")
        after = before | (1 << last - first + 1) - 1 << (first & 7)
        if after != before:
            self._bitmap[start:stop] = after.to_bytes(stop - start, "little")
            self._dirty.update(range(start // PAGE, (stop - 1) // PAGE + 1))

    # --- durability ---------------------------------------------------------------------------

    def flush(self) -> None:
        """See Backend. The data is stable before the bitmap says that it is there.

        A snapshot has nothing to keep, so nothing to wait for.
        """
        if not self._keep:
            return
        with self._flushing:  # or an older copy of a page could be written over a newer one
            with self._lock:
                pages, self._dirty = self._dirty, set()
                copies = {page: self._bitmap[page * PAGE : (page + 1) * PAGE] for page in pages}
            try:
                self._file.flush()
                if copies:
                    self._write_pages(copies)
                    self._file.flush()
            except BaseException:
                with self._lock:
                    self._dirty |= pages
                raise

    def _write_pages(self, copies: dict[int, bytearray]) -> None:
        for page, copy in sorted(copies.items()):
            try:
                pwritev_all(self._image.fd, [memoryview(copy)], (page + 1) * PAGE)
            except OSError as error:
                raise HostError(error.errno or 0, "write of the overlay's bitmap") from None

    def close(self) -> None:
        """See Backend; what was written is kept, if it is to be."""
        try:
            self.flush()
        except HostError as error:
            log.to_stderr(f"{self._image.path}: the last changes are lost: {error}")
        self._file.close()


def cut(views: list[memoryview], start: int, size: int) -> list[memoryview]:
    """The part of `views` from byte `start` on, `size` bytes long."""
    part = []
    for view in views:
        if start >= len(view):
            start -= len(view)
            continue
        piece = view[start : start + size]
        part.append(piece)
        size -= len(piece)
        start = 0
        if not size:
            break
    return part


def open_snapshot(base: Backend, path: str | None = None) -> OverlayBackend:
    """Changes to `base` that are forgotten when it is closed, or the process ends.

    They go to an unlinked temporary file (in $TMPDIR, or else /var/tmp), or to the file at `path`,
    which must be large enough. Raises HostError.
    """
    layout = layout_for(base.size_sectors * SECTOR)
    try:
        if path is None:
            fd = scratch_file(layout.file_size)
        else:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(error.errno or 0, "temporary file for a disk's changes") from None
    image = ImageFile("the snapshot", fd, layout.file_size, False)
    return OverlayBackend(base, image, bytearray(layout.bitmap_size), keep=False)


def scratch_file(size: int) -> int:
    """A descriptor of a new, sparse file without a name. Raises OSError."""
    folder = os.environ.get("TMPDIR") or "/var/tmp"
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        fd = os.open(folder, flags | os.O_TMPFILE, 0o600)
    except OSError:  # a file system without O_TMPFILE
        name = os.path.join(folder, f"pyvmm-{os.getpid()}-{os.urandom(8).hex()}")
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600)
        os.unlink(name)
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd
