"""A virtqueue as a device sees it, whatever its layout in memory."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Protocol

from pyvmm.host.syscalls import EventFd
from pyvmm.virtio.chain import DescriptorChain
from pyvmm.virtio.queue_state import QueueState


class Queue(Protocol):
    """The device's end of one virtqueue.

    `lock` is held by whoever works on the ring, for one batch at a time; `ready` is False once the
    driver stopped the queue, the device failed or was reset: no ring access after that. `halt` asks
    an iteration to end after the chain at hand; the ring stays in use. `kick` becomes readable when
    the driver notifies the device.
    """

    index: int
    size: int
    kick: EventFd
    lock: Lock
    ready: bool
    halt: bool

    def pop(self) -> DescriptorChain | None:
        """The next available chain, or None. Raises DriverError for a broken ring or chain."""

    def __iter__(self) -> Iterator[DescriptorChain]:
        """The available chains in order, at most `size` of them, until there are no more."""

    def step_back(self) -> None:
        """Undo the last `pop`: the same chain is available again."""

    def add_used(self, chain: DescriptorChain, written: int) -> None:
        """Return `chain` with `written` bytes written from its first writable byte on. The driver
        sees it at the next `publish_used`."""

    def publish_used(self) -> bool:
        """Make all added used elements visible; whether the driver wants a notification now."""

    def disable_notification(self) -> None:
        """Tell the driver that kicks are not needed for now."""

    def enable_notification(self) -> bool:
        """Ask for kicks again; True if more became available meanwhile, so that it must be
        processed before waiting. Chains left in the ring on purpose count once only."""

    def remap(self) -> None:
        """The memory has other regions now: find the rings in it again, with `lock` held. Raises
        GuestMemoryError if they are no longer RAM; the queue cannot be used then."""

    def state(self) -> QueueState:
        """The queue as plain data; the device must be at rest, and used chains published."""
