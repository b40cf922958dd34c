"""An entropy device (virtio 1.3, 5.4): what docs/tutorial/02-a-device.md builds.

pyvmm run … --device examples/entropy.py:Entropy
"""

import os

from pyvmm.virtio.queue import Queue
from pyvmm.virtio.worker import QueueDevice


class Entropy(QueueDevice):
    """Fills the driver's buffers from `source`: the host's random numbers, or a file's bytes."""

    name = "entropy"
    device_type = 4  # 5 Device Types: entropy source
    queue_sizes = (8,)  # 5.4.2 Virtqueues: 0 is requestq

    def __init__(self, source: str = "/dev/urandom") -> None:
        self.source = os.open(source, os.O_RDONLY)

    def serve(self, queue: Queue) -> None:
        for chain in queue:
            writer = chain.writer()
            data = os.read(self.source, min(writer.available, 4096))
            writer.write(data)  # 5.4.6.2: one or more bytes, random all of them
            queue.add_used(chain, writer.written)
