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
from typing import NamedTuple

from pyvmm.memory import GuestMemory
from pyvmm.testing.ring import (
    INDIRECT,
    NEXT,
    WRITE,
    Arena,
    Buffer,
    Chain,
    Element,
    MockDriver,
    Used,
    link,
)

__all__ = [
    "INDIRECT",
    "NEXT",
    "WRITE",
    "Arena",
    "Buffer",
    "Chain",
    "Desc",
    "MockSplitDriver",
    "Used",
]

NO_INTERRUPT = NO_NOTIFY = 1


class Desc(NamedTuple):
    """The raw fields of a struct virtq_desc."""

    addr: int
    length: int
    flags: int = 0
    next: int = 0

    def pack(self) -> bytes:
        """Its 16 bytes: le64 addr, le32 len, le16 flags, le16 next (2.7.5)."""
        return struct.pack("<QLHH", *self)


class MockSplitDriver(MockDriver):
    """Lays a split virtqueue of `size` descriptors out in guest memory and drives it.

    `avail_addr` and `used_addr` are other names of `driver_addr` and `device_addr`.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        arena: Arena | None = None,
        event_idx: bool = False,
        in_order: bool = False,
        start_index: int = 0,
    ) -> None:
        """`start_index` is where both rings begin; anything but 0 needs a device that was told."""
        super().__init__(memory, size, arena, event_idx, in_order)
        self.desc_addr = self.arena.alloc(16 * size, 16)
        self.driver_addr = self.avail_addr = self.arena.alloc(2 + 2 + 2 * size + 2, 2)
        self.device_addr = self.used_addr = self.arena.alloc(2 + 2 + 8 * size + 2, 4)
        # Indices are shared with a device in another thread: one aligned access each, not struct's
        # byte by byte.
        self._avail = memory.view(self.avail_addr, 6 + 2 * size).cast("H")
        self._used = memory.view(self.used_addr, 6 + 8 * size)[:4].cast("H")
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
        """Write descriptors as they are anywhere in memory: for indirect tables."""
        self.memory.write(addr, b"".join(desc.pack() for desc in descs))

    def make_table(self, elements: Sequence[Element], *, scrambled: bool = False) -> int:
        # An indirect table is walked from its entry 0 on (2.7.5.3).
        places = list(range(len(elements)))
        if scrambled:
            places[1:] = reversed(places[1:])
        table = self.arena.alloc(16 * len(elements))
        for place, desc in self._chained(link(elements), places):
            self.write_table(table + 16 * place, [desc])
        return table

    def _place(self, elements: Sequence[Element], *, scrambled: bool) -> tuple[int, list[int]]:
        places = self._take(len(elements))
        if scrambled:
            places.reverse()
        for index, desc in self._chained(elements, places):
            self.write_desc(index, desc)
        self.offer(places[0])
        return places[0], places

    @staticmethod
    def _chained(elements: Sequence[Element], places: Sequence[int]) -> list[tuple[int, Desc]]:
        following = [*places[1:], 0]
        return [
            (place, Desc(*element, next))
            for place, element, next in zip(places, elements, following, strict=True)
        ]

    def add_raw(self, descs: Sequence[Desc], *, at: int = 0) -> int:
        """Write `descs` to the table from index `at` on, as they are, and offer the first one.

        For chains that break the rules; `next` is as given, and no descriptor counts as taken.
        """
        for index, desc in enumerate(descs, at):
            self.write_desc(index, desc)
        self.offer(at)
        return at

    # --- the available ring ----------------------------------------------------------------------

    def offer(self, head: int) -> None:
        """Put `head` into the next slot of the available ring, without moving its index."""
        self._avail[2 + self._next_slot % self.size] = head
        self._next_slot = (self._next_slot + 1) % 0x10000

    def publish(self) -> bool:
        """Move the available index past all that was offered; whether the device wants a kick."""
        old, self._last_published = self._last_published, self._next_slot
        self._avail[1] = self._next_slot
        self._fence()
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

    def disable_interrupts(self) -> None:
        self.want_interrupts = False
        if self.event_idx:
            self.used_event = (self._last_used - 1) % 0x10000  # has been passed already
        else:
            self.avail_flags = NO_INTERRUPT

    def enable_interrupts(self) -> None:
        self.want_interrupts = True
        if self.event_idx:
            self.used_event = self._last_used
        else:
            self.avail_flags = 0
        self._fence()

    def interrupt_after(self, count: int) -> None:
        self.want_interrupts = True
        self.used_event = (self._last_used + count - 1) % 0x10000
        self._fence()

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

    @property
    def device_wants_kicks(self) -> bool:
        return self.event_idx or not self.used_flags & NO_NOTIFY

    def _device_used(self) -> bool:
        return self._used[1] != self._last_used

    def _take_used(self) -> None:
        place = self.used_addr + 4 + 8 * (self._last_used % self.size)
        ended = self._finish(Used(*struct.unpack("<LL", self.memory.read(place, 8))))
        self._last_used = (self._last_used + max(1, len(ended))) % 0x10000
        if self.event_idx and self.want_interrupts:
            self.used_event = self._last_used
            self._fence()

    def _release(self, chain: Chain) -> None:
        self._give_back(chain.descriptors)

    def dump(self) -> str:
        return (
            f"queue of {self.size}: available index {self.avail_idx} flags {self.avail_flags}"
            f" used_event {self.used_event}; used index {self.used_idx} flags {self.used_flags}"
            f" avail_event {self.avail_event}; taken from it up to {self._last_used};"
            f" chains out: {sorted(self._chains)}"
        )
