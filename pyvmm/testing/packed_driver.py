"""The driver's end of a packed virtqueue, for tests: virtio 1.3, 2.8 Packed Virtqueues.

It is used as `MockSplitDriver` is, and was written from the specification alone:

    driver = MockPackedDriver(memory, size=8)
    chain = driver.add([b"header"], [512, 1])
    driver.publish()
    … the device works …
    used = driver.pop_used()
    assert (used.head, used.written) == (chain.head, 513)  # head is the buffer's id
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pyvmm.memory import GuestMemory
from pyvmm.testing.ring import WRITE, Arena, Chain, Element, MockDriver, Used

AVAIL, USED = 1 << 7, 1 << 15  # 2.8.1 Driver and Device Ring Wrap Counters
ENABLE, DISABLE, DESC = 0, 1, 2  # 2.8.10 Driver and Device Event Suppression
WRAP = 1 << 15  # bit 15 of a position: the wrap counter
NOBODYS_ID = 0xFFFF  # in descriptors whose id does not count: all but the last of a list (2.8.6)


class PackedDesc(NamedTuple):
    """The raw fields of a struct pvirtq_desc."""

    addr: int
    length: int
    flags: int = 0
    id: int = 0

    def pack(self) -> bytes:
        """Its 16 bytes: le64 addr, le32 len, le16 id, le16 flags (2.8.13)."""
        return struct.pack("<QLHH", self.addr, self.length, self.id, self.flags)


class EventSuppression(NamedTuple):
    """The fields of a struct pvirtq_event_suppress: a position in the ring, and flags."""

    offset: int
    wrap: int
    flags: int


class MockPackedDriver(MockDriver):
    """Lays a packed virtqueue of `size` descriptors out in guest memory and drives it.

    The size need not be a power of two. `driver_addr` and `device_addr` are where the event
    suppression structures lie.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        arena: Arena | None = None,
        event_idx: bool = False,
        in_order: bool = False,
        start_index: int = WRAP,
    ) -> None:
        """`start_index` is where both sides begin: an offset, and in bit 15 the wrap counter;
        anything but the default needs a device that was told."""
        super().__init__(memory, size, arena, event_idx, in_order)
        self.desc_addr = self.arena.alloc(16 * size, 16)
        self.driver_addr = self.arena.alloc(4, 4)
        self.device_addr = self.arena.alloc(4, 4)
        # Shared with a device in another thread: one aligned 16-bit access each.
        self._ring = memory.view(self.desc_addr, 16 * size).cast("H")
        self._driver_event = memory.view(self.driver_addr, 4).cast("H")
        self._device_event = memory.view(self.device_addr, 4).cast("H")
        # Positions count descriptors for ever: their offset is the remainder by `size`, and their
        # wrap counter 1 in every even round.
        self._next = start_index % WRAP + (0 if start_index & WRAP else size)
        self._published = self._last_used = self._next
        self._withheld: tuple[int, int] | None = None  # place and flags, until `publish`
        self._lengths: dict[int, int] = {}
        for offset in range(size):
            # As a ring looks that got here: every descriptor last used in its round. Before the
            # first round that is all zeros.
            past = self._next - self._next % size + offset
            wrap = self.wrap(past if past < self._next else past + size)
            self._ring[8 * offset + 7] = (AVAIL | USED) * wrap
        if event_idx:
            self._ask_for(self._last_used)

    # --- positions -------------------------------------------------------------------------------

    def wrap(self, position: int) -> int:
        """The wrap counter at a position that counts descriptors from the first on: 1 in the first
        round of the ring, then 0, and so on."""
        return 1 - position // self.size % 2

    @property
    def next_position(self) -> int:
        """The place of the next chain: offset, and the wrap counter in bit 15."""
        return self._encode(self._next)

    def _encode(self, position: int) -> int:
        return position % self.size | WRAP * self.wrap(position)

    # --- descriptors -----------------------------------------------------------------------------

    def write_desc(self, index: int, desc: PackedDesc) -> None:
        """Write one entry of the descriptor ring, its flags as they are."""
        self.memory.write(self.desc_addr + 16 * index, desc.pack())

    def read_desc(self, index: int) -> PackedDesc:
        """One entry of the descriptor ring."""
        addr, length, id, flags = struct.unpack(
            "<QLHH", self.memory.read(self.desc_addr + 16 * index, 16)
        )
        return PackedDesc(addr, length, flags, id)

    def write_table(self, addr: int, descs: Iterable[PackedDesc]) -> None:
        """Write descriptors as they are anywhere in memory: for indirect tables."""
        self.memory.write(addr, b"".join(desc.pack() for desc in descs))

    def make_table(self, elements: Sequence[Element], *, scrambled: bool = False) -> int:
        # A table is a plain list here (2.8.7), so there is no order to choose; the id is reserved.
        table = self.arena.alloc(16 * len(elements))
        self.write_table(table, [PackedDesc(*element, NOBODYS_ID) for element in elements])
        return table

    def _place(self, elements: Sequence[Element], *, scrambled: bool) -> tuple[int, list[int]]:
        if len(elements) > self.room:
            raise RuntimeError(f"{len(elements)} descriptors wanted, {self.room} are free")
        if scrambled:
            self._free.rotate(len(self._free) // 2)
        [id] = self._take(1)
        descs = [PackedDesc(*element, NOBODYS_ID) for element in elements]
        return id, self._append([*descs[:-1], descs[-1]._replace(id=id)])

    def add_raw(self, descs: Sequence[PackedDesc]) -> list[int]:
        """Write `descs` to the ring where its next chain belongs, as they are but for their AVAIL
        and USED bits, which are toggled where given; their places.

        For chains that break the rules; no descriptor and no id counts as taken. Where the device
        returns the id, as many descriptors as there are here are skipped.
        """
        return self._append(descs)

    def _append(self, descs: Sequence[PackedDesc]) -> list[int]:
        self._lengths[descs[-1].id] = len(descs)
        places = []
        for desc in descs:
            place = self._next % self.size
            flags = desc.flags ^ (AVAIL if self.wrap(self._next) else USED)
            if self._withheld is None:
                # The first one's flags make everything behind it visible, so they come last.
                self._withheld = place, flags
                flags = self._ring[8 * place + 7]
            self.write_desc(place, desc._replace(flags=flags))
            places.append(place)
            self._next += 1
        return places

    @property
    def room(self) -> int:
        """The number of free descriptors; there are as many ids."""
        return self.size - (self._next - self._last_used)

    # --- handing them over -----------------------------------------------------------------------

    def publish(self) -> bool:
        if self._withheld is None:
            return False
        place, flags = self._withheld
        self._withheld = None
        self._fence()
        self._ring[8 * place + 7] = flags
        old, self._published = self._published, self._next
        self._fence()
        event = self.device_event
        if event.flags == DESC and self.event_idx:
            return self._passes(event, old, self._next)
        return event.flags != DISABLE

    def _passes(self, event: EventSuppression, old: int, new: int) -> bool:
        """True if the descriptor that `event` names is one of those from `old` to before `new`."""
        round_start = old - old % self.size
        return any(
            old <= position < new and self.wrap(position) == event.wrap
            for position in (round_start + event.offset, round_start + self.size + event.offset)
        )

    @property
    def device_event(self) -> EventSuppression:
        """The device's wish for kicks (2.8.10)."""
        position, flags = self._device_event
        return EventSuppression(position % WRAP, position // WRAP, flags & 3)

    @property
    def device_wants_kicks(self) -> bool:
        return self.device_event.flags != DISABLE

    # --- interrupts ------------------------------------------------------------------------------

    @property
    def driver_event(self) -> EventSuppression:
        """The driver's wish for interrupts; settable, to anything."""
        position, flags = self._driver_event
        return EventSuppression(position % WRAP, position // WRAP, flags)

    @driver_event.setter
    def driver_event(self, event: EventSuppression) -> None:
        # The position first: a device that sees the new flags must not take the old position.
        self._driver_event[0] = event.offset | WRAP * event.wrap
        self._driver_event[1] = event.flags
        self._fence()

    def _ask_for(self, position: int) -> None:
        self.driver_event = EventSuppression(position % self.size, self.wrap(position), DESC)

    def disable_interrupts(self) -> None:
        self.want_interrupts = False
        self._driver_event[1] = DISABLE

    def enable_interrupts(self) -> None:
        self.want_interrupts = True
        if self.event_idx:
            self._ask_for(self._last_used)
        else:
            self._driver_event[1] = ENABLE
            self._fence()

    def interrupt_after(self, count: int) -> None:
        self.want_interrupts = True
        before = list(self._order)[: count - 1]
        lengths = [len(self._chains[head].descriptors) for head in before]
        self._ask_for(self._last_used + sum(lengths) + count - 1 - len(before))

    # --- taking them back ------------------------------------------------------------------------

    def _device_used(self) -> bool:
        if self._last_used >= self._published:
            return False
        flags = self._ring[8 * (self._last_used % self.size) + 7]
        wrap = self.wrap(self._last_used)
        return bool(flags & AVAIL) == bool(flags & USED) == bool(wrap)

    def _take_used(self) -> None:
        self._fence()
        desc = self.read_desc(self._last_used % self.size)
        written = desc.length if desc.flags & WRITE else 0  # 2.8.4: reserved without the flag
        ended = self._finish(Used(desc.id, written))
        skipped = sum(len(chain.descriptors) for chain in ended)
        self._last_used += skipped or self._lengths.get(desc.id, 1)
        if self.event_idx and self.want_interrupts:
            self._ask_for(self._last_used)

    def _release(self, chain: Chain) -> None:
        self._give_back([chain.head])

    def dump(self) -> str:
        return (
            f"packed queue of {self.size}: made available up to {self._published:#x}, taken back"
            f" up to {self._last_used:#x}, there {self.read_desc(self._last_used % self.size)};"
            f" driver's {self.driver_event}, device's {self.device_event};"
            f" buffers out: {sorted(self._chains)}"
        )
