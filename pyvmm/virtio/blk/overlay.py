"""Copy on write: what the guest writes goes to a file of its own, the base stays as it is.

The file has the base's bytes at the same offsets, but sparse, with a bitmap that says for each
cluster whether it counts. There is no table of places to keep consistent: a cluster's bit goes from
0 to 1 once, and both are right as long as its data was there first.

    | header 4 KiB | bitmap, and room for a larger one | data: the disk, in whole clusters |

`overlay_file` has the header. Without one (a snapshot, thrown away at the end) the bitmap lives in
memory only.

The disk may become larger or smaller than its base. What lies behind the base's end, or behind the
smallest end that the disk ever had, reads as zeroes until it is written.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from threading import Lock

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import handed, log
from pyvmm.host.files import SECTOR, ImageFile, pwritev_all, use_handed
from pyvmm.virtio.blk.backend import Backend, FileBackend, cut
from pyvmm.virtio.blk.overlay_layout import PAGE, Layout, layout_for

SCRATCH = "scratch"
_WINDOW = 1024  # clusters looked at in one go; bounds the work for a bitmap of alternating bits


class OverlayBackend(Backend):
    """`base` with changes. `image` is the file for them, of `layout`'s size.

    `bitmap` says what is in it already, one bit for each cluster, lowest first. `write_header`
    stores a new layout; with it changes are kept, and the bitmap is written back. `image` is closed
    with the overlay, `base` is not.
    """

    can_discard = True
    can_resize = True

    def __init__(
        self,
        base: Backend,
        image: ImageFile,
        layout: Layout,
        bitmap: bytearray,
        write_header: Callable[[Layout], None] | None = None,
    ) -> None:
        self._base = base
        self._layout = layout
        self._bits = layout.cluster_bits
        self._bitmap: bytearray | mmap.mmap = bitmap
        self._clear_behind(layout.size)  # left by a shrink that was interrupted
        self._image = image
        self._file = FileBackend(image)
        self._write_header = write_header
        self._keep = write_header is not None
        self._dirty: set[int] = set()  # pages of the bitmap that the file does not have yet
        self._lock = Lock()  # held by whoever changes the bitmap, and by writers to the file
        self._flushing = Lock()
        self.size_sectors = layout.size // SECTOR
        self.block_sizes = base.block_sizes

    @property
    def fd(self) -> int:
        """The open file of the changes, whose lock lives as long as it is open somewhere."""
        return self._image.fd

    def changes(self) -> tuple[Layout, bytearray]:
        """The difference from the lowest base, as an overlay of its own would have it: the layout
        of that, and its bitmap. Nobody writes meanwhile. Raises HostError if it cannot be said
        so."""
        layout, bitmap = self._layout, bytearray(self._bitmap)
        if not isinstance(self._base, OverlayBackend):
            return layout, bitmap
        below, under = self._base.changes()
        if below.cluster_bits != layout.cluster_bits:
            raise HostError(errno.EOPNOTSUPP, "joining overlays with clusters of two sizes")
        # Of what is below only that counts which shows through.
        clusters = layout.shown + (1 << self._bits) - 1 >> self._bits
        shown = int.from_bytes(under, "little") & (1 << clusters) - 1
        both = int.from_bytes(bitmap, "little") | shown
        merged = both.to_bytes(max(len(bitmap), len(under)), "little")[: len(bitmap)]
        return layout._replace(shown=min(layout.shown, below.shown)), bytearray(merged)

    @property
    def lowest(self) -> Backend:
        """The storage under all overlays."""
        base = self._base
        return base.lowest if isinstance(base, OverlayBackend) else base

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
                self._read_base(pieces, length, start)

    @property
    def misses(self) -> int:  # type: ignore[override]
        """See Backend."""
        return self._file.misses + self._base.misses

    def expect(self, size: int, offset: int) -> None:
        """See Backend."""
        for start, length, inside in self._runs(offset, size):
            if inside:
                self._file.expect(length, start + self._layout.data_offset)
            elif (shown := min(length, self._layout.shown - start)) > 0:
                self._base.expect(shown, start)

    def _read_base(self, views: list[memoryview], size: int, offset: int) -> None:
        shown = max(0, min(size, self._layout.shown - offset))
        if shown == size:
            self._base.readv(views, size, offset)
            return
        if shown:
            self._base.readv(cut(views, 0, shown), shown, offset)
        for view in cut(views, shown, size - shown):
            view[:] = bytes(len(view))

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
            self._read_base([data], len(data), start)
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

    # --- other processes ----------------------------------------------------------------------

    def share(self) -> None:
        """See Backend: what counts is known to all of them, flushed or not."""
        self._base.share()
        try:
            shared = mmap.mmap(-1, len(self._bitmap))  # MAP_SHARED
        except OSError as error:
            raise HostError(error.errno or 0, "mmap of a bitmap") from None
        shared[:] = bytes(self._bitmap)
        self._bitmap = shared
        # None of them knows which pages the ones before it have left to be written.
        self._dirty = set(range(len(shared) // PAGE))
        self.can_resize = False

    # --- another size -------------------------------------------------------------------------

    def storage_for(self, size: int) -> int:
        """See Backend."""
        return self._layout.resized(size).file_size

    def resize(self, size: int | None) -> None:
        """See Backend. A file that is a block device must be as long as `storage_for` says."""
        if size is None:
            raise HostError(errno.EINVAL, "resize of an overlay", cure="say which size it gets")
        layout = self._layout.resized(size)
        with self._flushing, self._lock:
            if size < self._layout.size:
                self._shrink(layout)
            elif size > self._layout.size:
                self._grow(layout)
        self.size_sectors = size // SECTOR

    def _shrink(self, layout: Layout) -> None:
        """The header first: where the disk ends, what is behind it does not count."""
        old = self._layout
        self._store(layout)
        self._layout = layout
        self._clear_behind(layout.size)
        pages = range(layout.bitmap_size // PAGE)[-1:]  # those behind it are written as it grows
        self._dirty = {page for page in self._dirty if page <= pages[0]} | set(pages)
        del self._bitmap[layout.bitmap_size :]
        if freed := old.file_size - layout.file_size:
            with suppress(HostError):  # what the host does not take back is in nobody's way
                self._file.discard(layout.file_size, freed)

    def _grow(self, layout: Layout) -> None:
        """The header last: by then there is nothing behind the old end but zeroes."""
        old = self._layout
        if os.lseek(self._image.fd, 0, os.SEEK_END) < layout.file_size:
            self._lengthen(layout.file_size)
        self._zero_tail(old)
        first = old.bitmap_size // PAGE - 1
        # Longer already, if a larger size could not be had.
        more = max(0, layout.bitmap_size - len(self._bitmap))
        self._bitmap = bytearray(self._bitmap) + bytes(more)
        if self._keep:
            # Data before the bits that say so, as in flush.
            self._file.flush()
            pages = self._dirty | set(range(first, layout.bitmap_size // PAGE))
            self._write_pages({n: self._bitmap[n * PAGE : (n + 1) * PAGE] for n in pages})
            self._dirty = set()
        self._store(layout)
        self._layout = layout

    def _lengthen(self, size: int) -> None:
        if self._image.is_block_device:
            raise HostError(errno.EINVAL, f"resize of {self._image.path}, a block device")
        try:
            os.ftruncate(self._image.fd, size)
        except OSError as error:
            raise HostError(error.errno or 0, f"resize of {self._image.path}") from None

    def _zero_tail(self, old: Layout) -> None:
        """Clear the last cluster behind the old end, which may hold bytes from before a shrink."""
        left = -old.size % (1 << self._bits)
        if left and self._has(old.size >> self._bits):
            self._file.write_zeroes(old.size + old.data_offset, left, True)

    def _store(self, layout: Layout) -> None:
        """Raises HostError, and then the file is to have the old one still."""
        if self._write_header is None:
            return
        self._file.flush()
        try:
            self._write_header(layout)
            self._file.flush()
        except BaseException:
            with suppress(HostError):
                self._write_header(self._layout)
            raise

    def _clear_behind(self, size: int) -> None:
        """Unset the bits of clusters that are wholly behind `size`."""
        clusters = size + (1 << self._bits) - 1 >> self._bits
        whole, some = divmod(clusters, 8)
        if some:
            self._bitmap[whole] &= (1 << some) - 1
            whole += 1
        self._bitmap[whole:] = bytes(len(self._bitmap) - whole)

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

    def _write_pages(self, copies: Mapping[int, bytes | bytearray]) -> None:
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


def open_snapshot(base: Backend, path: str | None = None) -> OverlayBackend:
    """Changes to `base` that are forgotten when it is closed, or the process ends.

    They go to an unlinked temporary file (in $TMPDIR, or else /var/tmp), or to the file at `path`,
    or to the one that was handed over as SCRATCH; these must be large enough. Raises HostError,
    ConfigError for one that was handed over and cannot serve.
    """
    layout = layout_for(base.size_sectors * SECTOR)
    try:
        if (given := handed.take(SCRATCH)) is not None:
            fd = _checked(given, layout.file_size)
        elif path is None:
            fd = scratch_file(layout.file_size)
        else:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(error.errno or 0, "temporary file for a disk's changes") from None
    is_block_device = stat.S_ISBLK(os.fstat(fd).st_mode)
    image = ImageFile("the snapshot", fd, layout.file_size, False, is_block_device=is_block_device)
    return OverlayBackend(base, image, layout, bytearray(layout.bitmap_size))


def _checked(fd: int, size: int) -> int:
    """`fd`, which somebody has handed over for changes, for `size` bytes. Raises ConfigError,
    OSError; it is closed then."""
    try:
        use_handed("the file for changes", fd)
        if os.lseek(fd, 0, os.SEEK_END) < size:
            raise ConfigError(f"the file for changes has less than {size} bytes")
    except BaseException:
        os.close(fd)
        raise
    return fd


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
