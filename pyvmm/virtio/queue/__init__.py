"""A device's end of a virtqueue: a split or a packed ring, and the chains in it."""

from pyvmm.virtio.queue.protocol import Queue

__all__ = ["Queue"]
