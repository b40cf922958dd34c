"""A virtqueue in the layout that the driver negotiated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.virtio import features as feature_bits
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.queue.state import QueueConfig, QueueState

if TYPE_CHECKING:
    from pyvmm.virtio.queue.ring import Ring


def build_queue(
    memory: GuestMemory, config: QueueConfig, features: int, index: int, kick: EventFd
) -> Queue:
    """Queue `index` as the driver configured it, in the layout that `features` ask for.

    Raises DriverError for a configuration that cannot be.
    """
    return _layout(features)(memory, config, features, index, kick)


def restore_queue(
    memory: GuestMemory, state: QueueState, features: int, index: int, kick: EventFd
) -> Queue:
    """Queue `index`, going on where `state` was taken. Raises DriverError for a state that cannot
    be, or that is not of the layout which `features` ask for."""
    return _layout(features).from_state(memory, state, features, index, kick)


def load_layouts(offered: int) -> None:
    """Import what the queues of a device that offers these features may need: not when a guest's
    vCPU waits for it."""
    _layout(0)
    _layout(offered)


def _layout(features: int) -> type[Ring]:
    # A machine that has no packed queue does not load the code for it.
    if features >> feature_bits.VIRTIO_F_RING_PACKED & 1:
        from pyvmm.virtio.queue.packed import PackedQueue

        return PackedQueue
    from pyvmm.virtio.queue.split import SplitQueue

    return SplitQueue
