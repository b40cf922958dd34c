"""The common part of the driver's ends of split and packed virtqueues: one interface for both.

A test that is written against `MockDriver` runs over both rings:

    @pytest.mark.parametrize("make", [MockSplitDriver, MockPackedDriver])
    def test_echo(make): …
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pyvmm.host.fences import new_fence
from pyvmm.memory import GuestMemory

# Descriptor flags, the same in both rings (virtio 1.3, 2.7.5 and 2.8.3 to 2.8.7).
NEXT, WRITE, INDIRECT = 1, 2, 4


class Buffer(NamedTuple):
    """A range of guest-physical memory, in bytes; it may be one that does not exist."""

    addr: int
    length: int


class Element(NamedTuple):
    """One descriptor as a test wants it, right or wrong: address, length in bytes, flags."""

    addr: int
    length: int
    flags: int = 0


class Used(NamedTuple):
    """A buffer that the device returned: its head (split) or id (packed), and how many bytes the
    device wrote."""

    head: int
    written: int


@dataclass(frozen=True)
class Chain:
    """A chain that a driver built: what it gave the device, and in which descriptors.

    `head` is what the device returns it by: the first descriptor's index in a split ring, the
    buffer's id in a packed one. `descriptors` are places in the table or ring, in chain order.
    """

    head: int
    readable: list[Buffer] = field(default_factory=list)
    writable: list[Buffer] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)


class Arena:
    """Hands out guest memory from `start` to `end`, one piece after the other, zeroed."""

    def __init__(self, memory: GuestMemory, start: int = 0x1_0000, end: int | None = None) -> None:
        self.memory = memory
        self.next = start
        self.end = memory.regions[0].end if end is None else end

    def alloc(self, length: int, align: int = 16) -> int:
        """The guest-physical address of `length` fresh bytes. Raises MemoryError."""
        addr = -(-self.next // align) * align
        if addr + length > self.end:
            raise MemoryError(f"{length} bytes do not fit below {self.end:#x}")
        self.next = addr + length
        self.memory.write(addr, bytes(length))
        return addr


class MockDriver(ABC):
    """The driver's end of a virtqueue of `size` descriptors.

    `desc_addr`, `driver_addr` and `device_addr` are the guest-physical addresses of the Descriptor
    Area, the Driver Area and the Device Area (virtio 1.3, 2.6 Virtqueues). With `event_idx` the
    driver behaves as if VIRTIO_F_EVENT_IDX was negotiated: while `want_interrupts` it asks for one
    with the next used buffer whenever it took one. With `in_order` it does as VIRTIO_F_IN_ORDER
    has it: the device may return many buffers by naming the last.
    """

    desc_addr: int
    driver_addr: int
    device_addr: int
    want_interrupts = True

    def __init__(
        self, memory: GuestMemory, size: int, arena: Arena | None, event_idx: bool, in_order: bool
    ) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.in_order = in_order
        self.arena = Arena(memory) if arena is None else arena
        self._fence = new_fence()
        self._chains: dict[int, Chain] = {}
        self._order: deque[int] = deque()  # heads in the order in which they were made available
        self._implied: deque[Used] = deque()  # returned by a later buffer's used element
        # The supply of `_take`: descriptors of a table, or ids of buffers.
        self._free: deque[int] = deque(range(size))

    # --- making chains ---------------------------------------------------------------------------

    def add(
        self,
        readable: Sequence[bytes | Buffer] = (),
        writable: Sequence[int | Buffer] = (),
        *,
        indirect: bool = False,
        scrambled: bool = False,
    ) -> Chain:
        """Build a chain and put it into the ring; `publish` makes it visible.

        Each of `readable` is the contents of a buffer to be allocated, each of `writable` the
        length of one; or a Buffer where it is to lie elsewhere. With `indirect` the descriptors go
        into a table of their own. `scrambled` chains them in an odd order, as far as the ring
        leaves a choice. Raises RuntimeError if no descriptor is free.
        """
        to_read = [self._readable_buffer(item) for item in readable]
        to_write = [
            item if isinstance(item, Buffer) else Buffer(self.arena.alloc(item), item)
            for item in writable
        ]
        elements = [Element(*buffer) for buffer in to_read]
        elements += [Element(*buffer, WRITE) for buffer in to_write]
        if indirect:
            table = self.make_table(elements, scrambled=scrambled)
            elements = [Element(table, 16 * len(elements), INDIRECT)]
        head, places = self._place(link(elements), scrambled=scrambled)
        return self._remember(Chain(head, to_read, to_write, places))

    def add_elements(
        self,
        elements: Sequence[Element],
        readable: Sequence[Buffer] = (),
        writable: Sequence[Buffer] = (),
    ) -> Chain:
        """Put a chain of just these descriptors into the ring, flags and all, lawful or not.

        Each is chained to the one behind it, which counts if its flags have NEXT. `readable` and
        `writable` are what the Chain shall say of its buffers.
        """
        head, places = self._place(elements, scrambled=False)
        return self._remember(Chain(head, [*readable], [*writable], places))

    @abstractmethod
    def make_table(self, elements: Sequence[Element], *, scrambled: bool = False) -> int:
        """Write an indirect table that lists `elements`, their flags WRITE or odd ones; its
        address."""

    @abstractmethod
    def _place(self, elements: Sequence[Element], *, scrambled: bool) -> tuple[int, list[int]]:
        """Put one chain into the ring: its head, and the places of its descriptors."""

    def _readable_buffer(self, item: bytes | Buffer) -> Buffer:
        if isinstance(item, Buffer):
            return item
        addr = self.arena.alloc(len(item))
        self.memory.write(addr, item)
        return Buffer(addr, len(item))

    def _take(self, count: int) -> list[int]:
        if not 0 < count <= len(self._free):
            raise RuntimeError(f"{count} descriptors wanted, {len(self._free)} are free")
        return [self._free.popleft() for _ in range(count)]

    def _give_back(self, indices: Sequence[int]) -> None:
        if self.in_order:  # 2.7.9: descriptors are taken in ring order
            self._free.extend(indices)
        else:
            self._free.extendleft(reversed(indices))

    def _remember(self, chain: Chain) -> Chain:
        self._chains[chain.head] = chain
        self._order.append(chain.head)
        return chain

    # --- handing them over, taking them back -----------------------------------------------------

    @abstractmethod
    def publish(self) -> bool:
        """Make all that was added visible; whether the device wants a kick."""

    @property
    @abstractmethod
    def device_wants_kicks(self) -> bool:
        """True if the device has not switched its kicks off (with EVENT_IDX: not altogether)."""

    @property
    def outstanding(self) -> frozenset[int]:
        """The heads of chains that the device has not returned yet."""
        return frozenset(self._chains)

    @property
    def room(self) -> int:
        """The number of free descriptors."""
        return len(self._free)

    def has_used(self) -> bool:
        """True if `pop_used` would find something."""
        return bool(self._implied) or self._device_used()

    def pop_used(self) -> Used | None:
        """The next buffer that the device returned, or None. Its descriptors are free again."""
        if not self._implied:
            if not self._device_used():
                return None
            self._take_used()
        return self._implied.popleft()

    @abstractmethod
    def _device_used(self) -> bool:
        """True if the ring holds a used element that was not taken."""

    @abstractmethod
    def _take_used(self) -> None:
        """Take it: append to `_implied`, move past it, say when to interrupt next."""

    def _finish(self, used: Used) -> list[Chain]:
        """Forget the chains that `used` ends; one, but for a batch that was used in order."""
        ended = [used.head]
        if self.in_order and used.head in self._order:
            ended = [self._order.popleft()]
            while ended[-1] != used.head:
                ended.append(self._order.popleft())
        elif used.head in self._order:
            self._order.remove(used.head)
        chains = [self._chains.pop(head) for head in ended if head in self._chains]
        for chain in chains:
            if chain.head != used.head:
                # 2.7.9, 2.8.8: those without an element of their own were used completely.
                whole = sum(buffer.length for buffer in chain.writable)
                self._implied.append(Used(chain.head, whole))
            self._release(chain)
        self._implied.append(used)
        return chains

    @abstractmethod
    def _release(self, chain: Chain) -> None:
        """The chain's descriptors may be used again."""

    def contents(self, chain: Chain) -> bytes:
        """The present contents of the chain's writable buffers, joined."""
        return b"".join(self.memory.read(*buffer) for buffer in chain.writable)

    # --- interrupts ------------------------------------------------------------------------------

    @abstractmethod
    def disable_interrupts(self) -> None:
        """Ask for no interrupts, until `enable_interrupts`."""

    @abstractmethod
    def enable_interrupts(self) -> None:
        """Ask for interrupts: for all, with EVENT_IDX for the next used buffer."""

    @abstractmethod
    def interrupt_after(self, count: int) -> None:
        """Ask for an interrupt with the `count`-th used buffer from now on, if the device uses
        them in order. Needs EVENT_IDX."""

    @abstractmethod
    def dump(self) -> str:
        """The queue's state in a few lines, for a test that failed."""


def link(elements: Sequence[Element]) -> list[Element]:
    """`elements` with NEXT in the flags of all but the last."""
    return [
        element._replace(flags=element.flags | NEXT) if place + 1 < len(elements) else element
        for place, element in enumerate(elements)
    ]
