"""The configuration space of a block device: struct virtio_blk_config of <linux/virtio_blk.h>.

Virtio 1.3, 5.2.4 Device configuration layout. Fields that belong to features we do not offer are
zero, and so is the padding, as 5.2.5.2 Device Requirements: Device Initialization demands.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass

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


@dataclass(frozen=True)
class BlockConfig:
    """What the driver may learn about the disk.

    `capacity` is in sectors of 512 bytes; `seg_max` the most data segments of a request; `blk_size`
    the logical block in bytes; `physical_block_exp` says that a physical block is 2**exp logical
    ones, and `min_io_size` is in logical blocks. A `num_queues` of 0 means that there is no choice.
    """

    capacity: int
    seg_max: int
    blk_size: int = 512
    physical_block_exp: int = 3
    min_io_size: int = 8
    num_queues: int = 0

    def encode(self) -> bytes:
        """The configuration space, whole."""
        values = dict.fromkeys((name for name, _ in _FIELDS), 0)
        for name, value in zip(self.__dataclass_fields__, astuple(self), strict=True):
            values[name] = value
        return b"".join(
            struct.pack("<" + code, b"" if code.endswith("s") else values[name])
            for name, code in _FIELDS
        )


def read_zero_filled(encoded: bytes, offset: int, length: int) -> bytes:
    """`length` bytes of a configuration space at `offset`, zero past its end (2.5)."""
    return encoded[offset : offset + length].ljust(length, b"\0")
