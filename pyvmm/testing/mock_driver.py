"""The driver's end of a split virtqueue, for tests: lawful when asked nicely, hostile on demand.

The layouts are those of virtio 1.3, 2.7 Split Virtqueues, written down here a second time on
purpose.

    driver = MockSplitDriver(memory, size=8)
    chain = driver.add([b"header"], [512, 1])  # two buffers to write: 512 bytes and 1 byte
    driver.publish()
    … the device works …
    used = driver.pop_used()
    assert (used.head, used.written) == (chain.head, 513)
    assert driver.contents(chain) == …
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pyvmm.host.fences import full_fence
from pyvmm.memory import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = NO_NOTIFY = 1


class Buffer(NamedTuple):
    """A range of guest-physical memory, in bytes; it may be one that does not exist."""

    addr: int
    length: int


class Desc(NamedTuple):
    """The raw fields of a struct virtq_desc."""

    addr: int
    length: int
    flags: int = 0
    next: int = 0

    def pack(self) -> bytes:
        return struct.pack("<QLHH", *self)


class Used(NamedTuple):
    """One struct virtq_used_elem: the chain's head, and how many bytes the device wrote."""

    head: int
    written: int


@dataclass(frozen=True)
class Chain:
    """A chain that `MockSplitDriver` built: what it gave the device, and in which descriptors."""

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


class MockSplitDriver:
    """Lays a split virtqueue of `size` descriptors out in guest memory and drives it.

    With `event_idx` the driver behaves as if VIRTIO_F_EVENT_IDX was negotiated; while
    `want_interrupts` it then asks for one with the next used buffer whenever it took one. Addresses
    are guest-physical: `desc_addr`, `avail_addr`, `used_addr`.
    """

    want_interrupts = True

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        arena: Arena | None = None,
        event_idx: bool = False,
        start_index: int = 0,
    ) -> None:
        """`start_index` is where both rings begin; anything but 0 needs a device that was told."""
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.arena = Arena(memory) if arena is None else arena
        self.desc_addr = self.arena.alloc(16 * size, 16)
        self.avail_addr = self.arena.alloc(2 + 2 + 2 * size + 2, 2)
        self.used_addr = self.arena.alloc(2 + 2 + 8 * size + 2, 4)
        # Indices are shared with a device in another thread: one aligned access each, not struct's
        # byte by byte.
        self._avail = memory.view(self.avail_addr, 6 + 2 * size).cast("H")
        self._used = memory.view(self.used_addr, 6 + 8 * size)[:4].cast("H")
        self._free = list(range(size - 1, -1, -1))
        self._chains: dict[int, Chain] = {}
        self._next_slot = start_index
        self._last_used = start_index
        self._last_published = start_index
        self._avail[1] = self._used[1] = start_index
        if event_idx:
            self.used_event = start_index

    # --- descriptors -----------------------------------------------------------------------------

    def write_desc(self, index: int, desc: Desc) -> None:
        """Write one entry of the descriptor table."""
        self.memory.write(self.desc_addr + 16 * index, desc.pack())

    def write_table(self, addr: int, descs: Iterable[Desc]) -> None:
        """Write a table of descriptors anywhere in memory: for indirect ones."""
        self.memory.write(addr, b"".join(desc.pack() for desc in descs))

    def add(
        self,
        readable: Sequence[bytes | Buffer] = (),
        writable: Sequence[int | Buffer] = (),
        *,
        indirect: bool = False,
    ) -> Chain:
        """Build a chain and put it into the available ring; `publish` makes it visible.

        Each of `readable` is the contents of a buffer to be allocated, each of `writable` the
        length of one; or a Buffer where it is to lie elsewhere. With `indirect` the descriptors go
        into a table of their own. Raises RuntimeError if no descriptor is free.
        """
        to_read = [self._readable_buffer(item) for item in readable]
        to_write = [
            item if isinstance(item, Buffer) else Buffer(self.arena.alloc(item), item)
            for item in writable
        ]
        flagged = [(buffer, 0) for buffer in to_read] + [(buffer, WRITE) for buffer in to_write]
        if indirect:
            descs = _linked(flagged, range(len(flagged)))
            table = self.arena.alloc(16 * len(descs))
            self.write_table(table, descs)
            indices = self._take(1)
            self.write_desc(indices[0], Desc(table, 16 * len(descs), INDIRECT))
        else:
            indices = self._take(len(flagged))
            for index, desc in zip(indices, _linked(flagged, indices), strict=True):
                self.write_desc(index, desc)
        chain = Chain(indices[0], to_read, to_write, indices)
        self._chains[chain.head] = chain
        self.offer(chain.head)
        return chain

    def add_raw(self, descs: Sequence[Desc], *, at: int = 0) -> int:
        """Write `descs` to the table from index `at` on, as they are, and offer the first one.

        For chains that break the rules; `next` is as given, and no descriptor counts as taken.
        """
        for index, desc in enumerate(descs, at):
            self.write_desc(index, desc)
        self.offer(at)
        return at

    def _readable_buffer(self, item: bytes | Buffer) -> Buffer:
        if isinstance(item, Buffer):
            return item
        addr = self.arena.alloc(len(item))
        self.memory.write(addr, item)
        return Buffer(addr, len(item))

    def _take(self, count: int) -> list[int]:
        if not 0 < count <= len(self._free):
            raise RuntimeError(f"{count} descriptors wanted, {len(self._free)} are free")
        return [self._free.pop() for _ in range(count)]

    # --- the available ring ----------------------------------------------------------------------

    def offer(self, head: int) -> None:
        """Put `head` into the next slot of the available ring, without moving its index."""
        self._avail[2 + self._next_slot % self.size] = head
        self._next_slot = (self._next_slot + 1) % 0x10000

    def publish(self) -> bool:
        """Move the available index past all that was offered; whether the device wants a kick."""
        old, self._last_published = self._last_published, self._next_slot
        self._avail[1] = self._next_slot
        full_fence()
        if not self.event_idx:
            return not self._used[0] & NO_NOTIFY
        published = (self._next_slot - old) % 0x10000
        return (self.avail_event - old) % 0x10000 < published

    @property
    def avail_idx(self) -> int:
        """The available index; settable, to anything."""
        return self._avail[1]

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        self._avail[1] = value

    @property
    def avail_flags(self) -> int:
        """The available ring's flags; 1 asks for no interrupts."""
        return self._avail[0]

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self._avail[0] = value

    @property
    def used_event(self) -> int:
        """Ask to be interrupted once the used element of this index was written."""
        return self._avail[2 + self.size]

    @used_event.setter
    def used_event(self, value: int) -> None:
        self._avail[2 + self.size] = value

    # --- the used ring ---------------------------------------------------------------------------

    @property
    def used_idx(self) -> int:
        """The used index, as the device last stored it."""
        return self._used[1]

    @property
    def used_flags(self) -> int:
        """The used ring's flags; 1 means that the device needs no kicks."""
        return self._used[0]

    @property
    def avail_event(self) -> int:
        """The device wants a kick once the available slot of this index was filled."""
        return int.from_bytes(self.memory.read(self.used_addr + 4 + 8 * self.size, 2), "little")

    def has_used(self) -> bool:
        """Whether `pop_used` would find something."""
        return self._used[1] != self._last_used

    def pop_used(self) -> Used | None:
        """The next element that the device returned, or None. Its descriptors are free again."""
        if not self.has_used():
            return None
        place = self.used_addr + 4 + 8 * (self._last_used % self.size)
        used = Used(*struct.unpack("<LL", self.memory.read(place, 8)))
        self._last_used = (self._last_used + 1) % 0x10000
        if self.event_idx and self.want_interrupts:
            self.used_event = self._last_used
            full_fence()
        chain = self._chains.pop(used.head, None)
        if chain is not None:
            self._free.extend(reversed(chain.descriptors))
        return used

    def contents(self, chain: Chain) -> bytes:
        """What lies in the chain's writable buffers now, joined."""
        return b"".join(self.memory.read(*buffer) for buffer in chain.writable)

    def dump(self) -> str:
        """The queue's state in a few lines, for a test that failed."""
        return (
            f"queue of {self.size}: available index {self.avail_idx} flags {self.avail_flags}"
            f" used_event {self.used_event}; used index {self.used_idx} flags {self.used_flags}"
            f" avail_event {self.avail_event}; taken from it up to {self._last_used};"
            f" chains out: {sorted(self._chains)}"
        )


def _linked(flagged: Sequence[tuple[Buffer, int]], indices: Sequence[int]) -> list[Desc]:
    descs = []
    for place, (buffer, flags) in enumerate(flagged):
        if place + 1 < len(flagged):
            descs.append(Desc(*buffer, flags | NEXT, indices[place + 1]))
        else:
            descs.append(Desc(*buffer, flags))
    return descs
