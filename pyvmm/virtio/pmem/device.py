"""The pmem device: tells the driver where its memory is, and makes durable what was written to it.

Reads and writes of that memory are the guest's own, without a request; what maps it into the guest
is the machine's business (`pyvmm.machine`). A byte of it is touched here for a snapshot only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pyvmm.errors import GuestMemoryError, HostError
from pyvmm.host.holes import data_of
from pyvmm.host.log import RateLimited
from pyvmm.host.saved import Saved
from pyvmm.memory.private_memory import PrivateMemory
from pyvmm.virtio.device import SharedMemory
from pyvmm.virtio.features import RING_FEATURES, mask
from pyvmm.virtio.pmem import uapi
from pyvmm.virtio.queue.chain import DescriptorChain
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.worker import QueueDevice

QUEUE_SIZE = 64
_PIECE = 1 << 20  # bytes that are read at once for a snapshot
_SHMEM_REGION = mask(uapi.VIRTIO_PMEM_F_SHMEM_REGION)


class PmemDevice(QueueDevice):
    """Memory of the guest that a file of the host holds (5.19 PMEM Device)."""

    device_type = uapi.VIRTIO_ID_PMEM
    queue_sizes = (QUEUE_SIZE,)
    features = RING_FEATURES | _SHMEM_REGION
    shared_memory_features = _SHMEM_REGION
    feature_names = uapi.FEATURE_NAMES

    def __init__(
        self,
        fd: int,
        memory: SharedMemory,
        *,
        name: str = "pmem",
        log: Callable[[str], None] | None = None,
        sync: Callable[[int], None] = os.fdatasync,
        private: PrivateMemory | None = None,
    ) -> None:
        """`memory` is where the guest sees what is in the file `fd`, which stays the caller's.
        `sync` writes the file's changes to its storage, or raises OSError. With `private` the guest
        sees that instead, and there is no storage."""
        self.name = name
        self.shared_memory = {uapi.VIRTIO_PMEM_SHMEM_REGION_ID: memory}
        self._fd = fd
        self._sync = _no_storage if private else sync
        self._private = private
        self._place = memory
        self._knows_regions = False  # the driver does
        self._log = log or RateLimited(prefix=f"{name}: ", device=name, error="io")
        self._flushes = self._syncs = self._failed = 0
        self._has_lost = False

    def read_config(self, offset: int, length: int) -> bytes:
        """5.19.4 Device configuration layout: start and size of the memory."""
        config = uapi.CONFIG.pack(*((0, 0) if self._knows_regions else self._place))
        return config[offset : offset + length].ljust(length, b"\0")

    def accept_features(self, features: int) -> None:
        """5.19.5.1 Device Requirements: Device Initialization: a driver that knows of shared memory
        regions finds zeros in the configuration."""
        self._knows_regions = bool(features & _SHMEM_REGION)

    def shared_memory_moved(self, shmid: int, base: int) -> None:
        """A driver that does not know of regions finds it by the configuration all the same."""
        self._place = self._place._replace(base=base)

    def reset(self) -> None:
        """2.4 Device Reset; the next driver may want the configuration."""
        super().reset()
        self._knows_regions = False

    def stats(self) -> Mapping[str, object]:
        """Flushes asked for, how often the file was written out for them, and those that failed."""
        return {"flushes": self._flushes, "syncs": self._syncs, "failed": self._failed}

    # --- saved and restored -----------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """See VirtioDevice: nothing; `contents` are stored by themselves, or the file stays."""
        return {}

    def restore(self, saved: Saved) -> None:
        """See VirtioDevice. A flush that failed is of no concern any more: all that the guest has
        seen is there."""

    @property
    def size(self) -> int:
        """The bytes of its memory."""
        return self._place.size

    def contents(self) -> Iterator[tuple[int, memoryview]]:
        """All of its memory that may not be zero, in pieces, each with its offset; nobody writes
        meanwhile. Raises HostError."""
        if self._private is None:
            yield from self._contents_of_file()
            return
        offset = 0
        for piece in self._private.touched():
            if isinstance(piece, int):
                offset += piece
                continue
            for at in range(0, len(piece), _PIECE):
                yield offset + at, piece[at : at + _PIECE]
            offset += len(piece)

    def _contents_of_file(self) -> Iterator[tuple[int, memoryview]]:
        """By read(2), which sees what the guest has written to the mapping, and fails where the
        file was cut short."""
        for start, end in data_of(self._fd, 0, self.size):
            while start < end:
                try:
                    data = os.pread(self._fd, min(_PIECE, end - start), start)
                except OSError as error:
                    raise HostError(error.errno or 0, f"read of {self.name}'s file") from None
                if not data:
                    raise HostError(0, f"read of {self.name}'s file: it has been cut short")
                yield start, memoryview(data)
                start += len(data)

    # --- requests: 5.19.6 Driver Operations, 5.19.7 Device Operations ----------------------------

    def serve(self, queue: Queue) -> None:
        """One fdatasync answers all flushes that are there: each was asked for before it began.
        Chains come back in their order, as VIRTIO_F_IN_ORDER has it."""
        taken: list[tuple[DescriptorChain, bool]] = []
        try:
            for chain in queue:
                taken.append((chain, _is_flush(chain)))
        finally:  # also if the driver broke a rule behind them
            flushes = sum(is_flush for _, is_flush in taken)
            result = self._flush(flushes) if flushes else uapi.FAILED
            for chain, is_flush in taken:
                _answer(queue, chain, result if is_flush else uapi.FAILED)

    def _flush(self, count: int) -> int:
        self._flushes += count
        if not self._has_lost:
            self._syncs += 1
            try:
                self._sync(self._fd)
                return uapi.OK
            except OSError as error:
                # The kernel tells of a page that could not be written once, and forgets it: no
                # later success would mean that all is there.
                self._has_lost = True
                reason = HostError(error.errno or 0, "fdatasync")
                self._log(f"a flush failed, and so will all that follow: {reason}")
        self._failed += count
        return uapi.FAILED


def _no_storage(fd: int) -> None:
    return


def _is_flush(chain: DescriptorChain) -> bool:
    reader = chain.reader()
    if reader.available < uapi.REQ.size:
        return False
    try:
        (kind,) = reader.unpack(uapi.REQ)
    except GuestMemoryError:
        return False
    return bool(kind == uapi.VIRTIO_PMEM_REQ_TYPE_FLUSH)


def _answer(queue: Queue, chain: DescriptorChain, result: int) -> None:
    """A driver that has left no room for the answer, or none in RAM, sees a length of 0."""
    writer = chain.writer()
    if writer.available >= uapi.RESP.size:
        try:
            writer.write(uapi.RESP.pack(result))
        except GuestMemoryError:
            queue.add_used(chain, 0)
            return
    queue.add_used(chain, writer.written)
