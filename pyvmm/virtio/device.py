"""A virtio device: a type, queues, features, a configuration space, activate and reset.

Negotiation, queue addresses, the status register and interrupts are the transport's business; see
`pyvmm.virtio.negotiation` and `pyvmm.transport`. Most devices derive from `QueueDevice` in
`pyvmm.virtio.worker`, which runs a thread per queue, and only say what to do with a queue.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.host.saved import Saved
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.virtio.queue.protocol import Queue, QueueLock


class Interrupt(Protocol):
    """A device's way to reach its driver: the transport's part, called from any thread."""

    def signal_used(self, *queue_indexes: int) -> None:
        """The device used a buffer of each of these queues (2.3 Notifications). Queues that share
        an interrupt get one for all."""

    def eventfd(self, index: int) -> EventFd | None:
        """The eventfd that the kernel signals for queue `index` in place of `signal_used`, where it
        uses buffers by itself. None while the driver wants no interrupt for it. Raises HostError
        where the transport has none."""

    def signal_config_change(self) -> None:
        """The configuration space changed; also raises the configuration generation (2.3)."""


class Activation(NamedTuple):
    """The driver's set-up, handed to the device when the driver sets DRIVER_OK.

    `features` are the negotiated feature bits, `queues` has one entry per device queue, None where
    the driver did not enable it. `fail` reports a rule that the driver broke, or a host that
    failed; the transport then sets DEVICE_NEEDS_RESET and no ring is touched until reset.
    """

    memory: GuestMemory
    features: int
    queues: tuple[Queue | None, ...]
    interrupt: Interrupt
    fail: Callable[[PyvmmError], None]


class SharedMemory(NamedTuple):
    """Memory that driver and device share for good (2.10 Shared Memory Regions): `size` bytes from
    the guest-physical address `base` on."""

    base: int
    size: int


class VirtioDevice(ABC):
    """A virtio device as every transport sees it.

    `name` appears in logs and traces. `device_type` is its number in chapter 5, `queue_sizes` the
    largest size of each of its queues. `features` are the bits it offers, those of the ring
    included; VERSION_1 is added for it. `feature_names` are those of its type's own bits, by
    number, for traces. `config_always_writable` lets the configuration space be written whatever
    the status (5.3.5.1 Device Requirements: Device Initialization). `shared_memory` are its regions
    of shared memory by their `shmid`, where they are at first; over PCI there can be one.
    `shared_memory_features` are the bits that mean something only where a transport shows them.
    A device that `lends_memory` has another process read and write the guest's.
    """

    name: str
    device_type: int
    queue_sizes: tuple[int, ...]
    features: int = 0
    feature_names: Mapping[int, str] = MappingProxyType({})
    config_always_writable: bool = False
    shared_memory: Mapping[int, SharedMemory] = MappingProxyType({})
    shared_memory_features: int = 0
    lends_memory: bool = False

    def read_config(self, offset: int, length: int) -> bytes:
        """`length` bytes of the configuration space at `offset`, zero past its end (2.5)."""
        return bytes(length)

    def write_config(self, offset: int, data: bytes) -> None:  # noqa: B027 - a choice, not a duty
        """The driver wrote `data` to the configuration space; ignored unless overridden."""

    def accept_features(self, features: int) -> None:  # noqa: B027 - a choice, not a duty
        """The driver has set FEATURES_OK with `features`: for configuration fields that depend on
        what was negotiated, which the driver may read before `activate` (2.2 Feature Bits)."""

    def shared_memory_moved(self, shmid: int, base: int) -> None:  # noqa: B027 - likewise
        """Region `shmid` is at guest-physical `base` from now on: at the start, and where its
        driver moves it, as over PCI. Any thread calls it, and it must not wait."""

    def queue_lock(self) -> QueueLock:
        """The lock of a queue that is being built, which it keeps for life. Another kind than
        Python's is for queues that somebody else serves at times (`pyvmm.virtio.offload`)."""
        return Lock()

    def look(self) -> None:  # noqa: B027 - likewise
        """About every second while the guest runs: tell what went wrong without a driver's doing.
        It must not wait."""

    def stats(self) -> Mapping[str, object]:
        """Counters since the start, plain data fit for JSON; any thread may ask."""
        return {}

    @abstractmethod
    def activate(self, activation: Activation) -> None:
        """Start serving: the driver has set DRIVER_OK (3.1.1 Driver Requirements, step 8)."""

    def start_queue(self, queue: Queue) -> None:
        """Serve `queue`, which the driver set up anew after `reset_queue` (2.6.1.2 Virtqueue
        Re-enable). A device that offers VIRTIO_F_RING_RESET has this and `reset_queue`."""
        raise NotImplementedError

    def reset_queue(self, index: int) -> None:
        """Stop serving queue `index` alone: when this returns nothing of it is in flight (2.6.1.1
        Virtqueue Reset). Also called for a queue that was never enabled."""
        raise NotImplementedError

    def fail_requests(self) -> bool:
        """Answer requests with an error from now on, those that wait as well, and soon: the device
        is to be taken away from a driver that may wait for them. False if none does, as for most
        types. Any thread may call it."""
        return False

    def save(self) -> dict[str, Any]:
        """The device's own state, as plain data: what its driver has set beyond the
        negotiation, and what its driver knows that a new device would not. It is at rest: the locks
        of its queues are held. Raises ConfigError if it cannot be saved, as here."""
        raise unsaveable(self)

    def restore(self, saved: Saved) -> None:
        """Be as what `save` gave says; if the device was live then, `activate` comes next, and has
        it go on from there. Features are accepted already. Raises ConfigError."""
        raise unsaveable(self)

    @abstractmethod
    def reset(self) -> None:
        """Stop: when this returns no request is in flight, no guest memory is written and no
        interrupt is sent until the next `activate` (2.4 Device Reset). Also called when the
        device was never activated."""


def unsaveable(device: VirtioDevice, why: str = "nobody knows what state it has") -> ConfigError:
    """The refusal of a device that cannot be saved."""
    return ConfigError(
        f"{device.name} cannot be in a snapshot: {why}", cure="use a VM without it for that"
    )
