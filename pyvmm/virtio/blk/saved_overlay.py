"""The difference of a disk with an overlay from its image, as pieces of an overlay's file; and such
a file as a layer that is only read."""

from __future__ import annotations

from collections.abc import Iterator

from pyvmm.errors import HostError
from pyvmm.host.files import SECTOR, open_image, preadv_all
from pyvmm.virtio.blk.backend import Backend
from pyvmm.virtio.blk.overlay import OverlayBackend
from pyvmm.virtio.blk.overlay_file import header, identity, read_header
from pyvmm.virtio.blk.overlay_layout import PAGE, layout_for

_PIECE = 1 << 20


def file_of(overlay: OverlayBackend) -> tuple[int, Iterator[tuple[int, bytes | bytearray]]]:
    """The size of the file, and its pieces with their offsets; between them are holes. Nobody
    writes to the disk meanwhile. Raises HostError."""
    layout, bitmap = overlay.changes()
    base = overlay.lowest
    base_size = base.size_sectors * SECTOR
    places = layout_for(base_size)
    if places.cluster_bits != layout.cluster_bits:
        raise HostError(0, "an overlay with clusters of another size than its image gives it")
    layout = places.resized(layout.size)._replace(shown=layout.shown)

    def pieces() -> Iterator[tuple[int, bytes | bytearray]]:
        yield 0, header(layout, base_size, identity(base))
        yield PAGE, bitmap[: layout.bitmap_size]
        bits = layout.cluster_bits
        for start, end in _runs(bitmap):
            at, stop = start << bits, min(end << bits, layout.size)
            while at < stop:
                data = bytearray(min(_PIECE, stop - at))
                overlay.readv([memoryview(data)], len(data), at)
                yield layout.data_offset + at, data
                at += len(data)

    return layout.file_size, pieces()


def _runs(bitmap: bytearray) -> Iterator[tuple[int, int]]:
    """The ranges of bits that are set."""
    start = -1
    for place, byte in enumerate(bitmap):
        if byte in (0, 0xFF) and (start >= 0) == bool(byte):
            continue
        for bit in range(8):
            if byte >> bit & 1:
                if start < 0:
                    start = 8 * place + bit
            elif start >= 0:
                yield start, 8 * place + bit
                start = -1
    if start >= 0:
        yield start, 8 * len(bitmap)


def open_saved(base: Backend, path: str) -> OverlayBackend:
    """`base` with the changes in the file at `path`, which is only read, and may be by others as
    well. Raises ConfigError for a file that is not one, or for another base; HostError."""
    size = base.size_sectors * SECTOR
    mark = identity(base)
    image = open_image(path, read_only=True)
    try:
        layout = read_header(path, image.fd, size, mark)
        bitmap = bytearray(layout.bitmap_size)
        preadv_all(image.fd, [memoryview(bitmap)], PAGE)
    except OSError as error:
        image.close()
        raise HostError(error.errno or 0, f"read of {path}") from None
    except BaseException:
        image.close()
        raise
    return OverlayBackend(base, image, layout, bitmap)
