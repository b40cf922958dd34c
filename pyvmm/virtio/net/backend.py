"""Backends of network devices: they send and receive frames, and know nothing of rings.

Each frame is preceded by a struct virtio_net_hdr_v1 (`pyvmm.virtio.net.header`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pyvmm.host.poller import Source


class LinkLost(Exception):
    """Nothing will come from here any more; the message says why, for the user."""


class Channel(Protocol):
    """One pair of directions, for one pair of queues. One thread receives, one sends.

    `readable` wakes the receiver, `writable` the sender. `unsent` is True while a part of a frame
    is kept that the host did not take at once.
    """

    readable: Source
    writable: Source
    unsent: bool

    def receive(self, views: list[memoryview]) -> int:
        """Put one header and frame into `views`, in order; how long both are together.

        0 if there is none now. What does not fit into `views` is lost, so they end in one that
        nothing should reach. More than HEADER_SIZE + LARGEST_FRAME means a frame longer than any
        may be: it is lost, and the next one can be had. Raises LinkLost.
        """

    def send(self, header: bytes, frame: list[memoryview], length: int) -> bool:
        """Send one frame of `length` bytes. False if it must wait for `writable`; nothing has
        been sent of it then. Raises HostError for a frame that the host does not take, LinkLost."""

    def flush(self) -> None:
        """Try to send what is `unsent`. Raises LinkLost."""


class Backend(Protocol):
    """The network that a device is connected to. `offloads` are the feature bits that it can do,
    `mtu` the largest payload of a frame, in bytes."""

    offloads: int
    mtu: int

    @property
    def channels(self) -> Sequence[Channel]:
        """One for each pair of queues."""

    def set_offloads(self, features: int) -> None:
        """From now on frames come as a driver that negotiated `features` understands them; the
        GUEST_ bits count. Raises HostError, LinkLost."""

    def set_active(self, pairs: int) -> None:
        """Let frames come through the first `pairs` channels only. Raises HostError."""

    def close(self) -> None:
        """Give everything up; no call may be in progress or follow."""
