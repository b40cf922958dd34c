"""The common part of split and packed virtqueues: bounds, chains in flight, batches, state.

The walks over descriptors are written out in each layout: they are most of what a request costs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from os import sched_yield
from threading import Lock
from time import perf_counter_ns
from typing import TypeVar

from pyvmm.errors import DriverError
from pyvmm.host.fences import new_fence
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.virtio import features as feature_bits
from pyvmm.virtio.queue.chain import DescriptorChain, PackedChain, Places, RamWindow, Usual
from pyvmm.virtio.queue.protocol import QueueLock, QueueStats
from pyvmm.virtio.queue.state import InFlight, QueueConfig, QueueState

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4

DESC_SIZE = 16
CHAIN_FLAGS = DESC_F_NEXT | DESC_F_WRITE
MAX_CHAIN_BYTES = 1 << 32
LARGE_PART = MAX_CHAIN_BYTES // 4  # three of them cannot be too long a chain
MAX_PEEKED = 128  # chains at a time
MAX_USED_LENGTH = 0xFFFF_FFFF  # a used element's length is a le32
IN_FLIGHT = 1 << 62  # later than any batch
UNSETTLED = (-1, -1)
_LOOKS = 16  # at the ring, some 1 µs, before another thread may run


Self = TypeVar("Self", bound="Ring")

# A buffer that `pop_buffers` took: address, length in bytes, position in the ring
PlainBuffer = tuple[int, int, int]


class Ring(ABC):
    """The common part of the two layouts. Not thread-safe: hold `lock` for a batch of operations.

    Positions are where in the ring the next chain is taken, `_next_avail`, and where the next one
    is returned, `_next_used`; the layouts count them differently.
    """

    packed: bool
    table_section: str  # where the specification says what an indirect table is like
    supply_section: str  # … and how buffers are supplied

    def __init__(
        self,
        memory: GuestMemory,
        config: QueueConfig,
        features: int,
        index: int,
        kick: EventFd,
    ) -> None:
        """Build queue `index` as the driver configured it, at the start of its rings.

        `features` are the negotiated bits. Raises DriverError for a configuration that cannot be.
        The configuration is copied: what the driver writes to the registers later changes nothing.
        """
        config = copy(config)
        config.validate(memory, packed=self.packed)
        self.index = index
        self.size = config.size
        self.kick = kick
        self.lock: QueueLock = Lock()
        self.ready = True
        self.halt = False
        self._ended = False
        self._claims = 0
        self._halting = Lock()  # for the two above: `halt` follows from them
        self.stats = QueueStats()
        self._config = config
        self._ram = RamWindow(memory)
        self._fence = new_fence()
        self._indirect = feature_bits.has(features, feature_bits.VIRTIO_RING_F_INDIRECT_DESC)
        self._event_idx = feature_bits.has(features, feature_bits.VIRTIO_RING_F_EVENT_IDX)
        self._in_order = feature_bits.has(features, feature_bits.VIRTIO_F_IN_ORDER)
        self._next_avail = 0
        self._next_used = 0
        self._published = 0  # _next_used as the driver knows it
        # In flight, by head
        self._taken: list[DescriptorChain | PlainBuffer | None] = [None] * config.size
        # By head: IN_FLIGHT between pop and add_used, then the batch that it is published with.
        # The driver may offer a head again once it can know that it was used, not earlier.
        self._busy_until = [-1] * config.size
        self._batch = 0
        self._last: DescriptorChain | None = None  # of the last pop
        # With IN_ORDER, what was returned but not yet published: head, bytes written, slots, and
        # whether it was used completely.
        self._returned: list[tuple[int, int, int, bool]] = []
        # (_first_unavailable, _next_avail) at the last enable, forgotten when chains are returned:
        # without that the positions could go round and come back to where they were.
        self._settled = UNSETTLED
        self._outer: dict[tuple[int, int], tuple[Places, Places]] = {}
        self._find_rings()

    # --- what the layouts do ---------------------------------------------------------------------

    @abstractmethod
    def _find_rings(self) -> None:
        """Views of the queue's parts. Raises GuestMemoryError if one is not in RAM."""

    @abstractmethod
    def pop(self) -> DescriptorChain | None:
        """The next available chain, or None. Raises DriverError, and then nothing is consumed."""

    @abstractmethod
    def add_used(self, chain: DescriptorChain, written: int) -> None:
        """Return `chain`; seen by the driver at the next `publish_used`."""

    @abstractmethod
    def publish_used(self) -> bool:
        """Show the driver all that was added; whether it wants to be notified."""

    @abstractmethod
    def disable_notification(self) -> None:
        """Tell the driver that kicks are not needed for now."""

    @abstractmethod
    def _ask_for_kicks(self) -> None:
        """Have the driver kick for what it makes available from now on."""

    @abstractmethod
    def _first_unavailable(self) -> int:
        """The position behind all that the driver has made available. Raises DriverError."""

    @abstractmethod
    def _has_more(self) -> bool:
        """True if the driver seems to have made more available than was seen; a hint."""

    @abstractmethod
    def _advance(self, position: int, slots: int) -> int:
        """The position `slots` entries of the ring further."""

    def _retract(self, chain: DescriptorChain) -> None:  # noqa: B027 - most have nothing to do
        """The pop of `chain` is undone."""

    @abstractmethod
    def _resume(self, state: QueueState) -> None:
        """Go on at the positions in `state`, which was validated. Raises DriverError."""

    @abstractmethod
    def _encode(self, position: int) -> int:
        """A position as QueueState has it."""

    def remap(self) -> None:
        """The memory has other regions now: find the rings in it again. `lock` must be held.

        Raises GuestMemoryError if they are no longer RAM; the queue cannot be used then.
        """
        self._find_rings()
        self._ram.refresh()

    # --- who may work on the ring ----------------------------------------------------------------

    def begin_serving(self) -> None:
        """See Queue."""
        with self._halting:
            self._ended = False
            self.halt = self._claims > 0

    def end_serving(self) -> None:
        """See Queue."""
        with self._halting:
            self._ended = self.halt = True

    def claim(self, timeout: float = -1) -> bool:
        """See Queue."""
        with self._halting:
            self._claims += 1
            self.halt = True
        try:
            return self.lock.acquire(timeout=timeout)
        finally:
            with self._halting:
                self._claims -= 1
                self.halt = self._ended or self._claims > 0

    # --- taking chains ---------------------------------------------------------------------------

    def __iter__(self) -> Iterator[DescriptorChain]:
        """The available chains in order, at most `size`; ends early once `halt` is set."""
        for _ in range(self.size):
            if self.halt or not self.ready:
                return
            chain = self.pop()
            if chain is None:
                return
            yield chain

    @abstractmethod
    def peek_usual(self, first: int, last: int, most: int) -> tuple[list[Usual], bool]:
        """The next chains as far as they are of the usual form; see Queue."""

    @abstractmethod
    def use_peeked(self, written: Sequence[int]) -> None:
        """Take and return chains that `peek_usual` gave; see Queue."""

    def _outer_places(self, first: int, last: int) -> tuple[Places, Places]:
        """Views for the outer parts of chains of the usual form, by address."""
        found = self._outer.get((first, last))
        if found is None:
            ram = self._ram
            found = self._outer[first, last] = (
                ram.places(ram.readable_views, first),
                ram.places(ram.writable_views, last),
            )
        return found

    def pop_buffers(
        self, views: list[memoryview], wanted: int, most: int, least: int = 1
    ) -> list[int]:
        """Take chains of one buffer to write; see Queue. A layout or a mode that has no quick way
        for this never takes any."""
        return []

    def add_used_buffers(self, heads: list[int], last_written: int) -> None:
        """Return what `pop_buffers` took; see Queue."""
        raise ValueError("this queue has given no buffers")

    def step_back(self, chain: DescriptorChain | None = None) -> None:
        """Undo the last `pop`, or that of `chain`, which must be the youngest one in flight.

        Raises ValueError where that is not so.
        """
        if chain is None:
            chain = self._last
        if (
            chain is None
            or self._taken[chain.head] is not chain
            or chain.position < 0
            or self._advance(chain.position, chain.slots) != self._next_avail
        ):
            raise ValueError("no chain to step back to")
        self._taken[chain.head] = None
        self._busy_until[chain.head] = -1
        self._last = None
        self._next_avail = chain.position
        self._retract(chain)

    def _again(self, head: int) -> DriverError:
        return DriverError(
            f"chain {head} was made available again before it was used", section=self.supply_section
        )

    def _indirect_table(self, addr: int, length: int, flags: int) -> memoryview:
        # The write flag of a descriptor that refers to a table means nothing (2.7.5.3.2, 2.8.7).
        if not self._indirect:
            raise DriverError(
                "indirect descriptor, but INDIRECT_DESC was not negotiated",
                section=self.table_section,
            )
        if flags & DESC_F_NEXT:
            raise DriverError("descriptor with both INDIRECT and NEXT", section=self.table_section)
        if not length or length % DESC_SIZE:
            raise DriverError(f"indirect table of {length} bytes", section=self.table_section)
        return self._ram.readable((addr, length))

    # --- returning chains ------------------------------------------------------------------------

    def _return_in_order(self, chain: DescriptorChain, written: int) -> None:
        # 6.2 Device Requirements: Reserved Feature Bits
        if chain.position != self._next_used:
            raise ValueError(f"chain {chain.head} is returned out of order")
        complete = written == chain.writable_size
        self._returned.append((chain.head, written, chain.slots, complete))
        self._next_used = self._advance(self._next_used, chain.slots)

    def _elements_in_order(self) -> Iterator[tuple[int, int, int]]:
        """The used elements that stand for all that was returned: position, head, bytes written.

        One stands for all chains in front of it as well, if those were used completely: the driver
        takes that for granted (2.7.9, 2.8.8 In-order use of descriptors).
        """
        returned, self._returned = self._returned, []
        start = position = self._published
        last = len(returned) - 1
        for place, (head, written, slots, complete) in enumerate(returned):
            position = self._advance(position, slots)
            if not complete or place == last:
                yield start, head, written
                start = position

    # --- asking for kicks ------------------------------------------------------------------------

    def enable_notification(self) -> bool:
        """Ask for kicks again; True if there is something to process first.

        A chain that the device has left in the ring, or stepped back to, counts once: a device that
        waits for something else than buffers is not called for the same buffers for ever. Raises
        DriverError for a broken ring.
        """
        if not self.ready:
            return False
        self._ask_for_kicks()
        end = self._first_unavailable()
        before, self._settled = self._settled, (end, self._next_avail)
        return end != self._next_avail and self._settled != before

    def is_drained(self) -> bool:
        """See Queue."""
        if not self.ready:
            return True
        return self._first_unavailable() == self._next_avail == self._next_used

    def poll(self, until: int, patience: int) -> bool:
        """See Queue."""
        look = self._has_more
        now = perf_counter_ns()
        while self.ready and not self.halt:
            for _ in range(_LOOKS):
                if look():
                    return True
            # The interpreter's lock, and the processor, go to whoever wants them: a vCPU's exit.
            sched_yield()
            before, now = now, perf_counter_ns()
            if now > until or now - before > patience:
                return False
        return False

    # --- state -----------------------------------------------------------------------------------

    def state(self) -> QueueState:
        """The queue as plain data; the device must be at rest, and used chains published."""
        config = self._config
        heads = [head for head, chain in enumerate(self._taken) if chain is not None]
        chains = [self.chain_in_flight(head) for head in heads]
        return QueueState(
            max_size=config.max_size,
            size=config.size,
            desc_addr=config.desc_addr,
            avail_addr=config.avail_addr,
            used_addr=config.used_addr,
            next_avail=self._encode(self._next_avail),
            next_used=self._encode(self._next_used),
            in_flight=tuple(
                InFlight(chain.head, chain.slots, tuple(chain.readable), tuple(chain.writable))
                for chain in sorted(chains, key=self._age, reverse=True)
            ),
            packed=self.packed,
        )

    def rewound(self) -> QueueState:
        """The queue as plain data, with the chains in flight in the ring again, to be taken anew;
        the queue itself stays as it is. See Queue."""
        config = self._config
        start, ahead = self._next_used, self._distance_to(self._next_avail)
        slots = 0
        for taken in self._taken:
            if taken is None:
                continue
            if isinstance(taken, tuple):
                position, entries = taken[2], 1
            else:
                position, entries = taken.position, taken.slots
            slots += entries
            if position < 0 or self._distance_to(position) >= ahead:
                slots = -1
                break
        if slots != ahead:
            raise DriverError(
                "chains in flight are not the last that were taken", section=self.table_section
            )
        place = self._encode(start)
        return QueueState(
            max_size=config.max_size,
            size=config.size,
            desc_addr=config.desc_addr,
            avail_addr=config.avail_addr,
            used_addr=config.used_addr,
            next_avail=place,
            next_used=place,
            packed=self.packed,
        )

    def _distance_to(self, position: int) -> int:
        """Ring entries from the place of the next used one on."""
        span = 2 * self.size if self.packed else 0x10000
        return (position - self._next_used) % span

    def served_to(self, position: int) -> None:
        """Another has served the ring; see Queue."""
        state = self.state()._replace(next_avail=position, next_used=position)
        self._settled = UNSETTLED
        self._resume(state)

    @abstractmethod
    def _age(self, chain: DescriptorChain) -> int:
        """Its distance behind the next chain to be taken; those of a saved state come first."""

    @classmethod
    def from_state(
        cls: type[Self],
        memory: GuestMemory,
        state: QueueState,
        features: int,
        index: int,
        kick: EventFd,
    ) -> Self:
        """A queue that goes on where `state` was taken. Raises DriverError for a state that cannot
        be, which includes one that does not fit to what lies in memory."""
        if state.packed is not cls.packed:
            raise DriverError(
                "a queue's layout is not the one negotiated", section="2.6 Virtqueues"
            )
        state.validate(memory)
        queue = cls(memory, state.config(), features, index, kick)
        queue._resume(state)
        queue._take_again(state.in_flight)
        return queue

    def _rebuilt(self, saved: InFlight, position: int) -> DescriptorChain:
        """A chain of a saved state."""
        readable, writable = list(saved.readable), list(saved.writable)
        sizes = (sum(length for _, length in readable), sum(length for _, length in writable))
        if self.packed:
            return PackedChain(
                saved.head, readable, writable, *sizes, self._ram, position, saved.slots
            )
        return DescriptorChain(saved.head, readable, writable, *sizes, self._ram, position)

    def _take_again(self, in_flight: tuple[InFlight, ...]) -> None:
        position = self._next_used
        for place, saved in enumerate(in_flight):
            # Where chains may come back in any order, nobody knows where each was taken: numbers
            # below 0 tell which of them were taken before which.
            known = position if self._in_order else place - len(in_flight)
            self._taken[saved.head] = self._rebuilt(saved, known)
            self._busy_until[saved.head] = IN_FLIGHT
            position = self._advance(position, saved.slots)

    def chain_in_flight(self, head: int) -> DescriptorChain:
        """The chain with this head that is in flight: for a device restored with it.

        Raises ValueError if it is not in flight.
        """
        chain = self._taken[head] if 0 <= head < self.size else None
        if chain is None:
            raise ValueError(f"chain {head} is not in flight")
        if isinstance(chain, tuple):
            addr, length, position = chain
            chain = DescriptorChain(head, [], [(addr, length)], 0, length, self._ram, position)
            self._taken[head] = chain
        return chain
