"""The configuration space of a block device: struct virtio_blk_config of <linux/virtio_blk.h>.

Virtio 1.3, 5.2.4 Device configuration layout. Fields that belong to features we do not offer are
zero, and so is the padding, as 5.2.5.2 Device Requirements: Device Initialization demands.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from pyvmm.host.files import SECTOR

# Limits on what one DISCARD or WRITE_ZEROES may ask for (5.2.4), so that a single request cannot
# hold up its queue, and a reset that waits for it, for long. Sectors of 512 bytes, per segment.
MAX_RANGE_SEGMENTS = 32
MAX_DISCARD_SECTORS = (1 << 30) // SECTOR
MAX_WRITE_ZEROES_SECTORS = (128 << 20) // SECTOR

BLK_SIZE_OFFSET = 20
WRITEBACK_OFFSET = 32  # of `wce`, the one field that a driver may write

# (name, struct code) in order; little endian and packed.
_FIELDS = (
    ("capacity", "Q"),
    ("size_max", "I"),
    ("seg_max", "I"),
    ("cylinders", "H"),
    ("heads", "B"),
    ("sectors", "B"),
    ("blk_size", "I"),
    ("physical_block_exp", "B"),
    ("alignment_offset", "B"),
    ("min_io_size", "H"),
    ("opt_io_size", "I"),
    ("wce", "B"),
    ("unused", "B"),
    ("num_queues", "H"),
    ("max_discard_sectors", "I"),
    ("max_discard_seg", "I"),
    ("discard_sector_alignment", "I"),
    ("max_write_zeroes_sectors", "I"),
    ("max_write_zeroes_seg", "I"),
    ("write_zeroes_may_unmap", "B"),
    ("unused1", "3s"),
    ("max_secure_erase_sectors", "I"),
    ("max_secure_erase_seg", "I"),
    ("secure_erase_sector_alignment", "I"),
)


def layout() -> dict[str, tuple[int, int]]:
    """Each field's (offset, size) in bytes, as the encoding below uses them."""
    places = {}
    offset = 0
    for name, code in _FIELDS:
        size = struct.calcsize("<" + code)
        places[name] = (offset, size)
        offset += size
    return places


class BlockSizes(NamedTuple):
    """Of which sizes a disk likes its requests, all in bytes: what TOPOLOGY and BLK_SIZE tell.

    `logical` is the unit of addressing, `physical` what the storage writes in one piece, both
    powers of two; `minimum` and `optimal` are whole logical blocks, 0 where there is nothing to
    say.
    """

    logical: int = 512
    physical: int = 4096
    minimum: int = 4096
    optimal: int = 0

    def with_logical(self, logical: int) -> BlockSizes:
        """The same with another logical block, to which the others are raised."""
        return BlockSizes(
            logical,
            max(logical, self.physical),
            max(logical, self.minimum - self.minimum % logical),
            self.optimal - self.optimal % logical,
        )


class BlockConfig(NamedTuple):
    """The disk's configuration, as the driver reads it.

    `capacity` is in sectors of 512 bytes; `seg_max` the most data segments of a request; `blk_size`
    the logical block in bytes; `physical_block_exp` says that a physical block is 2**exp logical
    ones, and `min_io_size` and `opt_io_size` are in logical blocks. `wce` is 1 for a writeback
    cache. A `num_queues` of 0 means that there is no choice. Discards and write zeroes are limited
    in sectors of 512 bytes per segment, and in segments; zero where they are not offered.
    """

    capacity: int
    seg_max: int
    blk_size: int = 512
    physical_block_exp: int = 3
    min_io_size: int = 8
    opt_io_size: int = 0
    wce: int = 0
    num_queues: int = 0
    max_discard_sectors: int = 0
    max_discard_seg: int = 0
    discard_sector_alignment: int = 0
    max_write_zeroes_sectors: int = 0
    max_write_zeroes_seg: int = 0
    write_zeroes_may_unmap: int = 0

    def encode(self) -> bytes:
        """The configuration space, whole."""
        values = dict.fromkeys((name for name, _ in _FIELDS), 0)
        for name, value in self._asdict().items():
            values[name] = value
        return b"".join(
            struct.pack("<" + code, b"" if code.endswith("s") else values[name])
            for name, code in _FIELDS
        )


def read_zero_filled(encoded: bytes, offset: int, length: int) -> bytes:
    """`length` bytes of a configuration space at `offset`, zero past its end (2.5)."""
    return encoded[offset : offset + length].ljust(length, b"\0")


def topology(sizes: BlockSizes) -> dict[str, int]:
    """The fields of `BlockConfig` that say `sizes` (5.2.4)."""
    logical = sizes.logical
    return {
        "blk_size": logical,
        "physical_block_exp": (sizes.physical // logical).bit_length() - 1,
        "min_io_size": min(sizes.minimum // logical, 0xFFFF),
        "opt_io_size": min(sizes.optimal // logical, 0xFFFF_FFFF),
    }
