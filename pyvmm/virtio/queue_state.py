"""What a virtqueue is made of, as plain data: the driver's configuration and the saved state.

Both come from outside (a driver's register writes, a snapshot file) and are checked before use.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyvmm.errors import DriverError, GuestMemoryError
from pyvmm.memory import GuestMemory

QUEUE_SIZE_LIMIT = 32768  # 2.7.13: the highest power of two that a 16-bit index can tell full from
_SECTION = "2.7 Split Virtqueues"
_ALIGNMENT_SECTION = "2.7.1 Driver Requirements: Virtqueues"

DESC_ALIGN, AVAIL_ALIGN, USED_ALIGN = 16, 2, 4


def desc_bytes(size: int) -> int:
    """Bytes of a descriptor table of `size` entries (2.7 Split Virtqueues)."""
    return 16 * size


def avail_bytes(size: int) -> int:
    """Bytes of an available ring, its used_event field included (2.7 Split Virtqueues)."""
    return 6 + 2 * size


def used_bytes(size: int) -> int:
    """Bytes of a used ring, its avail_event field included (2.7 Split Virtqueues)."""
    return 6 + 8 * size


def is_valid_size(size: int, max_size: int) -> bool:
    """Whether `size` is a power of two from 1 to `max_size` (2.7 Split Virtqueues)."""
    return 0 < size <= min(max_size, QUEUE_SIZE_LIMIT) and size & (size - 1) == 0


@dataclass
class QueueConfig:
    """What the driver writes to a queue's registers; changes until the queue is ready.

    `max_size` is the device's limit, `size` the number of descriptors. The addresses are
    guest-physical: the descriptor table, the available ring ("driver area") and the used ring
    ("device area").
    """

    max_size: int
    size: int = 0
    desc_addr: int = 0
    avail_addr: int = 0
    used_addr: int = 0
    ready: bool = False

    def validate(self, memory: GuestMemory) -> None:
        """Check that a queue can be built from this.

        Raises DriverError for a size that is not a power of two or exceeds `max_size`, for a
        misaligned part, and GuestMemoryError for a part that does not lie in one region of RAM
        (2.7 Split Virtqueues, 2.7.1 Driver Requirements: Virtqueues).
        """
        size = self.size
        if not is_valid_size(size, self.max_size):
            raise DriverError(
                f"queue size {size} is not a power of two from 1 to {self.max_size}",
                section=_SECTION,
            )
        parts = (
            ("descriptor table", self.desc_addr, DESC_ALIGN, desc_bytes(size)),
            ("available ring", self.avail_addr, AVAIL_ALIGN, avail_bytes(size)),
            ("used ring", self.used_addr, USED_ALIGN, used_bytes(size)),
        )
        for name, addr, alignment, length in parts:
            if addr % alignment:
                raise DriverError(
                    f"{name} at {addr:#x} is not aligned to {alignment} bytes",
                    section=_ALIGNMENT_SECTION,
                )
            # Python's integers do not wrap, so a part that wraps 2^64 is simply outside RAM.
            if not memory.contains(addr, length):
                raise GuestMemoryError(addr, length)


@dataclass(frozen=True)
class QueueState:
    """A queue at rest, enough to build it again: for snapshots and for handing a queue over.

    `next_avail` and `next_used` are the free-running 16-bit positions in the rings; `in_flight`
    are the heads of chains that were taken but not yet returned.
    """

    max_size: int
    size: int
    desc_addr: int
    avail_addr: int
    used_addr: int
    next_avail: int
    next_used: int
    in_flight: tuple[int, ...] = ()

    def config(self) -> QueueConfig:
        """The configuration in it."""
        return QueueConfig(
            self.max_size, self.size, self.desc_addr, self.avail_addr, self.used_addr, True
        )

    def validate(self, memory: GuestMemory) -> None:
        """Check everything: a saved state is untrusted input.

        Raises DriverError, or GuestMemoryError for a ring outside RAM.
        """
        self.config().validate(memory)
        for name, index in (("next_avail", self.next_avail), ("next_used", self.next_used)):
            if not 0 <= index <= 0xFFFF:
                raise DriverError(f"{name} {index} is not a 16-bit index", section=_SECTION)
        heads = self.in_flight
        if len(set(heads)) != len(heads) or any(not 0 <= h < self.size for h in heads):
            raise DriverError("chains in flight are not distinct heads", section=_SECTION)
        if (self.next_avail - self.next_used) & 0xFFFF != len(heads):
            raise DriverError(
                f"{len(heads)} chains in flight do not fit between used {self.next_used}"
                f" and available {self.next_avail}",
                section=_SECTION,
            )
