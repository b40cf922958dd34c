"""The driver's side of a block device, for tests: virtio 1.3, 5.2 Block Device.

    driver = MmioDriver(transport, memory)
    driver.start()
    disk = BlockDriver(driver)
    assert disk.write(8, b"x" * 512).status == OK
    assert disk.read(8, 512).data == b"x" * 512

`call` takes any parts, lawful or not; a part that is a `Buffer` lies where it says.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from pyvmm.testing.mmio_driver import MmioDriver
from pyvmm.testing.mock_driver import Buffer
from pyvmm.testing.vhost_user_driver import VhostUserDriver

# 5.2.6 Device Operation
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, SECURE_ERASE = 0, 1, 4, 8, 11, 13, 14
OK, IOERR, UNSUPP = 0, 1, 2
UNTOUCHED = 0xEE  # what the status byte holds before the device answers

# 5.2.3 Feature bits
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH = 1 << 2, 1 << 5, 1 << 6, 1 << 9
F_TOPOLOGY, F_CONFIG_WCE, F_MQ = 1 << 10, 1 << 11, 1 << 12
F_DISCARD, F_WRITE_ZEROES = 1 << 13, 1 << 14
WRITEBACK = 32  # offset of the field in the configuration space
UNMAP = 1  # the flag of a WRITE_ZEROES segment


class Answer(NamedTuple):
    """The status byte, the writable bytes in front of it, and the used length."""

    status: int
    data: bytes
    written: int


def header(type: int, sector: int = 0) -> bytes:
    """The 16 bytes in front of every request: le32 type, le32 reserved, le64 sector."""
    return struct.pack("<LLQ", type, 0, sector)


class BlockDriver:
    """Sends requests to queue `queue` of a block device that is up and running."""

    def __init__(self, driver: MmioDriver | VhostUserDriver, queue: int = 0) -> None:
        self.driver = driver
        self.queue = queue

    def call(
        self,
        type: int,
        sector: int = 0,
        readable: Sequence[bytes | Buffer] = (),
        writable: Sequence[int | Buffer] = (),
        *,
        indirect: bool = False,
    ) -> Answer:
        """One request with these data parts, a header in front of them and a status behind."""
        return self.raw([header(type, sector), *readable], [*writable, 1], indirect=indirect)

    def raw(
        self,
        readable: Sequence[bytes | Buffer],
        writable: Sequence[int | Buffer],
        *,
        indirect: bool = False,
    ) -> Answer:
        """One request made of exactly these parts; the last writable byte is its status."""
        memory = self.driver.memory
        parts = [
            item
            if isinstance(item, Buffer)
            else Buffer(self.driver.arena.alloc(item, align=1), item)
            for item in writable
        ]
        if parts and parts[-1].length:
            last = parts[-1].addr + parts[-1].length - 1
            if memory.contains(last, 1):
                memory.write(last, bytes([UNTOUCHED]))
        chain = self.driver.submit(self.queue, readable, parts, indirect=indirect)
        used = self.driver.wait_used(self.queue, chain)
        known = [part for part in parts if memory.contains(*part)]
        contents = b"".join(memory.read(*part) for part in known)
        status = contents[-1] if contents and known[-1] == parts[-1] else UNTOUCHED
        return Answer(status, contents[:-1], used.written)

    def read(self, sector: int, size: int) -> Answer:
        """VIRTIO_BLK_T_IN of `size` bytes into one buffer."""
        return self.call(IN, sector, writable=[size])

    def write(self, sector: int, data: bytes) -> Answer:
        """VIRTIO_BLK_T_OUT of `data` from one buffer."""
        return self.call(OUT, sector, readable=[data])

    def flush(self) -> Answer:
        """VIRTIO_BLK_T_FLUSH."""
        return self.call(FLUSH)

    def discard(self, *segments: tuple[int, int, int]) -> Answer:
        """VIRTIO_BLK_T_DISCARD of (sector, number of sectors, flags)."""
        return self._ranges(DISCARD, segments)

    def write_zeroes(self, *segments: tuple[int, int, int]) -> Answer:
        """VIRTIO_BLK_T_WRITE_ZEROES of (sector, number of sectors, flags)."""
        return self._ranges(WRITE_ZEROES, segments)

    def _ranges(self, type: int, segments: Sequence[tuple[int, int, int]]) -> Answer:
        data = b"".join(struct.pack("<QLL", *segment) for segment in segments)
        return self.call(type, readable=[data])

    def get_id(self, size: int = 20) -> Answer:
        """VIRTIO_BLK_T_GET_ID into a buffer of `size` bytes."""
        return self.call(GET_ID, writable=[size])
