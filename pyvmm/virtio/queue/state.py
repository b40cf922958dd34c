"""A virtqueue as plain data: the driver's configuration and the saved state.

Both come from outside (a driver's register writes, a snapshot file, a vhost-user master) and are
checked before use. The two layouts share the names of the split one: `avail_addr` is the driver
area and `used_addr` the device area of a packed queue (virtio 1.3, 2.6 Virtqueues).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pyvmm.errors import DriverError, GuestMemoryError
from pyvmm.memory import GuestMemory

QUEUE_SIZE_LIMIT = 32768  # 2.7.13: the highest power of two that a 16-bit index can tell full from
WRAP = 1 << 15  # in a packed queue's position: its wrap counter, above the offset
_SPLIT = "2.7 Split Virtqueues"
_PACKED = "2.8 Packed Virtqueues"
_SPLIT_ALIGNMENT = "2.7.1 Driver Requirements: Virtqueues"
_PACKED_ALIGNMENT = "2.8.11 Driver Requirements: Virtqueues"

DESC_ALIGN, AVAIL_ALIGN, USED_ALIGN = 16, 2, 4
EVENT_ALIGN = EVENT_BYTES = 4  # 2.8.10.1 Structure Size and Alignment


def desc_bytes(size: int) -> int:
    """Bytes of a descriptor table or ring of `size` entries (2.7 Split Virtqueues, 2.8.10.1)."""
    return 16 * size


def avail_bytes(size: int) -> int:
    """Bytes of an available ring, its used_event field included (2.7 Split Virtqueues)."""
    return 6 + 2 * size


def used_bytes(size: int) -> int:
    """Bytes of a used ring, its avail_event field included (2.7 Split Virtqueues)."""
    return 6 + 8 * size


def is_valid_size(size: int, max_size: int, *, packed: bool = False) -> bool:
    """True if a queue may have `size` entries: 1 to `max_size`, and in a split one a power of two
    (2.7 Split Virtqueues; 2.8.10.1 Structure Size and Alignment)."""
    return 0 < size <= min(max_size, QUEUE_SIZE_LIMIT) and (packed or size & (size - 1) == 0)


def size_rule(max_size: int, *, packed: bool = False) -> str:
    """The rule of `is_valid_size`, for a message."""
    return f"{'a number' if packed else 'a power of two'} from 1 to {max_size}"


class QueueConfig:
    """A queue's registers, as the driver writes them; they change until the queue is ready.

    `max_size` is the device's limit, `size` the number of descriptors. The addresses are
    guest-physical: descriptors, driver area and device area. `was_reset` says that the driver reset
    the queue by itself, and so may set it up while the device is live; `resetting` that this is
    going on (2.6.1 Virtqueue Reset).
    """

    def __init__(
        self,
        max_size: int,
        size: int = 0,
        desc_addr: int = 0,
        avail_addr: int = 0,
        used_addr: int = 0,
        ready: bool = False,
        was_reset: bool = False,
        resetting: bool = False,
    ) -> None:
        self.max_size = max_size
        self.size = size
        self.desc_addr = desc_addr
        self.avail_addr = avail_addr
        self.used_addr = used_addr
        self.ready = ready
        self.was_reset = was_reset
        self.resetting = resetting

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QueueConfig) and vars(self) == vars(other)

    def validate(self, memory: GuestMemory, *, packed: bool = False) -> None:
        """Check that a queue can be built from this.

        Raises DriverError for a size that the layout does not allow or that exceeds `max_size`, for
        a misaligned part, and GuestMemoryError for a part that does not lie in one region of RAM
        (2.7 Split Virtqueues, 2.7.1 Driver Requirements: Virtqueues; 2.8.10.1, 2.8.11).
        """
        size = self.size
        if not is_valid_size(size, self.max_size, packed=packed):
            raise DriverError(
                f"queue size {size} is not {size_rule(self.max_size, packed=packed)}",
                section=_PACKED if packed else _SPLIT,
            )
        for name, addr, alignment, length in self._parts(packed):
            if addr % alignment:
                raise DriverError(
                    f"{name} at {addr:#x} is not aligned to {alignment} bytes",
                    section=_PACKED_ALIGNMENT if packed else _SPLIT_ALIGNMENT,
                )
            # Python's integers do not wrap, so a part that wraps 2^64 is simply outside RAM.
            if not memory.contains(addr, length):
                raise GuestMemoryError(addr, length)

    def _parts(self, packed: bool) -> tuple[tuple[str, int, int, int], ...]:
        """Name, address, alignment and bytes of each part."""
        desc, avail, used, size = self.desc_addr, self.avail_addr, self.used_addr, self.size
        if packed:
            return (
                ("descriptor ring", desc, DESC_ALIGN, desc_bytes(size)),
                ("driver event suppression", avail, EVENT_ALIGN, EVENT_BYTES),
                ("device event suppression", used, EVENT_ALIGN, EVENT_BYTES),
            )
        return (
            ("descriptor table", desc, DESC_ALIGN, desc_bytes(size)),
            ("available ring", avail, AVAIL_ALIGN, avail_bytes(size)),
            ("used ring", used, USED_ALIGN, used_bytes(size)),
        )


class InFlight(NamedTuple):
    """A chain that the device has taken and not yet returned: its `head` (a packed queue's buffer
    id), the ring entries that it takes, and its parts as (guest-physical address, length)."""

    head: int
    slots: int = 1
    readable: tuple[tuple[int, int], ...] = ()
    writable: tuple[tuple[int, int], ...] = ()

    def _check(self, size: int, section: str) -> None:
        if not (_is_int(self.head, size - 1) and _is_int(self.slots, size) and self.slots):
            raise DriverError(f"chain {self.head!r} in flight cannot be", section=section)
        parts = (*self.readable, *self.writable)
        for part in parts:
            if len(part) != 2 or not (_is_int(part[0], 2**64 - 1) and _is_int(part[1], 2**32 - 1)):
                raise DriverError(f"{part!r} is not a part of a chain", section=section)
        if len(parts) > size or sum(length for _, length in parts) > 1 << 32:
            raise DriverError(f"chain {self.head} in flight is too long", section=section)


class QueueState(NamedTuple):
    """A queue at rest, enough to build it again: for snapshots and for handing a queue over.

    `next_avail` and `next_used` are where the device takes the next chain and returns the next one:
    the free-running 16-bit indices of a split queue; in a `packed` one the offset in bits 0 to 14
    and the wrap counter in bit 15. `in_flight` are the chains that were taken but not yet returned,
    with IN_ORDER in the order in which they were taken.
    """

    max_size: int
    size: int
    desc_addr: int
    avail_addr: int
    used_addr: int
    next_avail: int
    next_used: int
    in_flight: tuple[InFlight, ...] = ()
    packed: bool = False

    def config(self) -> QueueConfig:
        """The configuration in it."""
        return QueueConfig(
            self.max_size, self.size, self.desc_addr, self.avail_addr, self.used_addr, True
        )

    # --- handing over by numbers -----------------------------------------------------------------

    def vring_base(self) -> int:
        """The positions as VHOST_USER_GET_VRING_BASE returns them: the available index of a split
        queue; of a packed one both positions, the used one in the upper 16 bits."""
        return self.next_avail | self.next_used << 16 if self.packed else self.next_avail

    @classmethod
    def from_vring_base(cls, config: QueueConfig, base: int, *, packed: bool = False) -> QueueState:
        """A queue with nothing in flight at `base`, a number as of `vring_base`. Check it with
        `validate`, as any state."""
        next_avail = base & 0xFFFF if packed else base
        next_used = base >> 16 if packed else base
        return cls(
            config.max_size,
            config.size,
            config.desc_addr,
            config.avail_addr,
            config.used_addr,
            next_avail,
            next_used,
            packed=packed,
        )

    def to_plain(self) -> dict[str, Any]:
        """As dict, lists, numbers: for JSON and the like."""
        in_flight = tuple(chain._asdict() for chain in self.in_flight)
        return {**self._asdict(), "in_flight": in_flight}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> QueueState:
        """The state that `to_plain` gave, its form checked but not yet its contents (`validate`).

        Raises DriverError for anything else.
        """
        try:
            in_flight = tuple(
                InFlight(
                    chain["head"],
                    chain["slots"],
                    tuple((addr, length) for addr, length in chain["readable"]),
                    tuple((addr, length) for addr, length in chain["writable"]),
                )
                for chain in plain["in_flight"]
            )
            return cls(**{**plain, "in_flight": in_flight})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DriverError(f"not the state of a queue: {error}", section=_SPLIT) from None

    # --- checking --------------------------------------------------------------------------------

    def validate(self, memory: GuestMemory) -> None:
        """Check everything: a saved state is untrusted input.

        Raises DriverError, or GuestMemoryError for a ring outside RAM.
        """
        section = _PACKED if self.packed else _SPLIT
        for name in ("max_size", "size", "desc_addr", "avail_addr", "used_addr"):
            if not _is_int(getattr(self, name), 2**64 - 1):
                raise DriverError(f"{name} is {getattr(self, name)!r}", section=section)
        self.config().validate(memory, packed=self.packed)
        for name, index in (("next_avail", self.next_avail), ("next_used", self.next_used)):
            if not _is_int(index, 0xFFFF) or (self.packed and index % WRAP >= self.size):
                raise DriverError(f"{name} {index!r} is not a place in the ring", section=section)
        self._check_in_flight(section)

    def _check_in_flight(self, section: str) -> None:
        slots = 0
        heads = set()
        for chain in self.in_flight:
            chain._check(self.size, section)
            heads.add(chain.head)
            slots += chain.slots
            if not self.packed and chain.slots != 1:
                raise DriverError(f"chain {chain.head} takes {chain.slots} slots", section=section)
        if len(heads) != len(self.in_flight):
            raise DriverError("a chain is in flight twice", section=section)
        if slots != self._distance() or slots > self.size:
            raise DriverError(
                f"{len(heads)} chains in flight do not fit between used {self.next_used:#x}"
                f" and available {self.next_avail:#x}",
                section=section,
            )

    def _distance(self) -> int:
        """Ring entries from `next_used` to `next_avail`."""
        if not self.packed:
            return (self.next_avail - self.next_used) & 0xFFFF
        avail, used = (unpack_position(at, self.size) for at in (self.next_avail, self.next_used))
        return (avail - used) % (2 * self.size)


def pack_position(position: int, size: int) -> int:
    """The offset, and in bit 15 the wrap counter, of a place in a packed ring that counts the
    entries of two rounds: of the one where the wrap counter is 1, then of the other."""
    return position | WRAP if position < size else position - size


def unpack_position(packed: int, size: int) -> int:
    """The inverse of `pack_position`."""
    return packed - WRAP if packed >= WRAP else packed + size


def _is_int(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
