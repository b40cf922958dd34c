"""The entropy device: every buffer comes back with random bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pyvmm.errors import GuestMemoryError
from pyvmm.host.saved import Saved
from pyvmm.virtio.features import RING_FEATURES
from pyvmm.virtio.queue.chain import DescriptorChain
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.worker import QueueDevice

VIRTIO_ID_RNG = 4  # virtio 1.3, 5 Device Types; linux/virtio_ids.h
QUEUE_SIZE = 64

# A driver may offer buffers as large as its memory. One random byte is all the device owes it
# (5.4.6.2 Device Requirements); this many keep a single request short.
MOST_BYTES = 1 << 16


class EntropyDevice(QueueDevice):
    """Fills the driver's buffers from the host's random number generator (5.4.6 Device Operation).

    It has no features of its own and no configuration space (5.4.3, 5.4.4).
    """

    device_type = VIRTIO_ID_RNG
    queue_sizes = (QUEUE_SIZE,)
    features = RING_FEATURES

    def __init__(self, name: str = "rng") -> None:
        self.name = name
        self._bytes = 0

    def stats(self) -> Mapping[str, object]:
        """Bytes given to the driver."""
        return {"bytes_to_guest": self._bytes}

    def save(self) -> dict[str, Any]:
        """See VirtioDevice: there is nothing to be saved."""
        return {}

    def restore(self, saved: Saved) -> None:
        """Likewise."""

    def size_of(self, chain: DescriptorChain) -> int:
        """The number of bytes that `serve` makes for it; a limit counts them."""
        return min(chain.writable_size, MOST_BYTES)

    def serve(self, queue: Queue) -> None:
        """Return each buffer with up to MOST_BYTES random bytes; with none if it is not in RAM."""
        for chain in queue:
            writer = chain.writer()
            written = min(writer.available, MOST_BYTES)
            try:
                writer.write(os.urandom(written))
            except GuestMemoryError:
                written = 0
            self._bytes += written
            queue.add_used(chain, written)
