"""The device's end of a packed virtqueue (virtio 1.3, 2.8 Packed Virtqueues).

One ring holds everything: the driver writes descriptors into it in order, and the device overwrites
them, from the start again, with the chains that it returns. Two bits in a descriptor's flags show
whose it is: each side compares them with a counter of its own, which it flips whenever it comes
round.

What `pyvmm.virtio.queue.split` says of a hostile driver holds here too. A chain is never longer
than what the ring has room for besides all that the device holds, so a driver that writes past its
own chains is found out. A used descriptor is one aligned 64-bit store (length, id and flags), and
those of a batch are stored last first, so that the driver gets to see all or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

from pyvmm.errors import DriverError, GuestMemoryError
from pyvmm.host.fences import WEAKLY_ORDERED
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.virtio.queue.chain import DescriptorChain, PackedChain, Part, Usual
from pyvmm.virtio.queue.ring import (
    CHAIN_FLAGS,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
    IN_FLIGHT,
    LARGE_PART,
    MAX_CHAIN_BYTES,
    MAX_PEEKED,
    MAX_USED_LENGTH,
    UNSETTLED,
    Ring,
)
from pyvmm.virtio.queue.state import (
    EVENT_BYTES,
    QueueConfig,
    QueueState,
    desc_bytes,
    pack_position,
    unpack_position,
)

DESC_F_AVAIL = 1 << 7  # 2.8.1 Driver and Device Ring Wrap Counters
DESC_F_USED = 1 << 15
OWNER = DESC_F_AVAIL | DESC_F_USED
RING_EVENT_FLAGS_ENABLE = 0  # 2.8.10 Driver and Device Event Suppression
RING_EVENT_FLAGS_DISABLE = 1
RING_EVENT_FLAGS_DESC = 2

# The upper half of a used descriptor, without its id and len: in the round where the wrap counter
# is 1, and in the other.
USED_1 = OWNER << 48
WRITTEN_1 = (OWNER | DESC_F_WRITE) << 48
USED_0 = 0
WRITTEN_0 = DESC_F_WRITE << 48

_TABLE_OR_NOT = OWNER | DESC_F_INDIRECT
_layout = Struct("<QIHH")  # struct pvirtq_desc: addr, len, id, flags
_unpack_desc = _layout.unpack_from
_unpack_table = _layout.iter_unpack
_three = Struct("<" + 3 * "QIHH")
_unpack_three = _three.unpack_from

_ID = "2.8.21.1 Placing Available Buffers Into The Descriptor Ring"
_LIST = "2.8.17 Driver Requirements: Scatter-Gather Support"
_INDIRECT = "2.8.19 Driver Requirements: Indirect Descriptors"
_CHANGED = "2.8.16 Driver Requirements: The Virtqueue Descriptor Table"


class PackedQueue(Ring):
    """A packed virtqueue as its device sees it; see `protocol.Queue` for the operations.

    Positions count the ring's entries over two rounds, one for each wrap counter: from 0 to
    2 * size - 1, and below size the wrap counter is 1.
    """

    packed = True
    table_section = _INDIRECT
    supply_section = _ID

    def __init__(
        self,
        memory: GuestMemory,
        config: QueueConfig,
        features: int,
        index: int,
        kick: EventFd,
    ) -> None:
        super().__init__(memory, config, features, index, kick)
        self._room = self.size  # entries of the ring that the device does not hold
        self._left = 0  # entries from _next_avail on that are known to be available
        # Used descriptors to be published: what to store, by place.
        self._pending: dict[int, int] = {}
        self._peeked: dict[int, int] = {}  # what peek_usual gave: entries of the ring, by head

    def _find_rings(self) -> None:
        memory, config = self._ram.memory, self._config
        ring = memory.view(config.desc_addr, desc_bytes(self.size))
        self._ring = ring.toreadonly()
        self._flags = self._ring.cast("H")[7::8]  # of each descriptor
        self._used = ring.cast("Q")[1::2]  # of each descriptor: len, id and flags
        # Offset and wrap counter in the lower half, flags in the upper one: one load or store.
        self._driver_event = memory.view(config.avail_addr, EVENT_BYTES).toreadonly().cast("I")
        self._device_event = memory.view(config.used_addr, EVENT_BYTES).cast("I")

    # --- taking chains ---------------------------------------------------------------------------

    def pop(self) -> DescriptorChain | None:
        """The next available chain, or None. Raises DriverError, and then nothing is consumed."""
        if not self.ready:
            return None
        position, size = self._next_avail, self.size
        if position < size:
            slot, available = position, DESC_F_AVAIL
        else:
            slot, available = position - size, DESC_F_USED
        if (self._flags[slot] ^ available) & OWNER:
            if self._left:
                raise DriverError(f"descriptor {slot} was taken back", section=_CHANGED)
            return None
        if WEAKLY_ORDERED:
            # Acquire: the first flags before the rest of the chain, which they make visible. Pairs
            # with the driver's barrier before it stores them (2.8.21.1.1).
            self._fence()
        # The flags were looked at before, but what counts is what is read here, once.
        addr, length, head, flags = _unpack_desc(self._ring, slot * DESC_SIZE)
        flags ^= available
        if flags & _TABLE_OR_NOT == DESC_F_INDIRECT and self._room:
            chain = self._parse_table(addr, length, flags, head, position)
        else:
            chain = self._parse_list(addr, length, head, flags, slot, available)
        head, slots = chain.head, chain.slots
        if head >= size:
            raise DriverError(f"buffer id {head} in a queue of {size}", section=_ID)
        if self._busy_until[head] >= self._batch:
            raise self._again(head)
        self._last = self._taken[head] = chain
        self._busy_until[head] = IN_FLIGHT
        self._room -= slots
        if self._left:
            self._left = max(0, self._left - slots)
        position += slots
        self._next_avail = position if position < 2 * size else position - 2 * size
        return chain

    def _retract(self, chain: DescriptorChain) -> None:
        self._room += chain.slots
        self._left += chain.slots

    # --- walking descriptors ---------------------------------------------------------------------

    def _parse_list(
        self, addr: int, length: int, head: int, flags: int, slot: int, available: int
    ) -> DescriptorChain:
        readable: list[Part] = []
        writable: list[Part] = []
        ring, unpack, size = self._ring, _unpack_desc, self.size
        room = left = self._room
        to_read = to_write = 0
        writing = False
        while left:
            if flags > CHAIN_FLAGS:
                if flags & OWNER:
                    raise DriverError(f"descriptor {slot} is not available", section=_LIST)
                if flags & DESC_F_INDIRECT:
                    raise DriverError("indirect descriptor in a list", section=_INDIRECT)
                flags &= CHAIN_FLAGS  # bits without a meaning are ignored
            if flags >= DESC_F_WRITE:
                writing = True
                if length:
                    writable.append((addr, length))
                    to_write += length
            elif writing:
                raise DriverError("readable descriptor after a writable one", section=_LIST)
            elif length:
                readable.append((addr, length))
                to_read += length
            left -= 1
            if flags == DESC_F_WRITE or flags == 0:
                break
            slot += 1
            if slot == size:
                slot, available = 0, available ^ OWNER
            if left:
                addr, length, head, flags = unpack(ring, slot * DESC_SIZE)
                flags ^= available
        else:
            raise DriverError(
                f"chain longer than the {room} descriptors that are free", section=_LIST
            )
        if to_read + to_write > MAX_CHAIN_BYTES:
            raise DriverError("chain of more than 2^32 bytes", section=_LIST)
        return PackedChain(
            head, readable, writable, to_read, to_write, self._ram, self._next_avail, room - left
        )

    def _parse_table(
        self, addr: int, length: int, flags: int, head: int, position: int
    ) -> DescriptorChain:
        table = self._indirect_table(addr, length, flags)
        # A table is a plain list: of flags and id only WRITE means something (2.8.7).
        if len(table) > self.size * DESC_SIZE:
            raise DriverError(f"chain of more than {self.size} descriptors", section=_INDIRECT)
        readable: list[Part] = []
        writable: list[Part] = []
        to_read = to_write = 0
        writing = False
        for addr, length, _, flags in _unpack_table(table):
            if flags & DESC_F_WRITE:
                writing = True
                if length:
                    writable.append((addr, length))
                    to_write += length
            elif writing:
                raise DriverError("readable descriptor after a writable one", section=_LIST)
            elif length:
                readable.append((addr, length))
                to_read += length
        if to_read + to_write > MAX_CHAIN_BYTES:
            raise DriverError("chain of more than 2^32 bytes", section=_LIST)
        return PackedChain(head, readable, writable, to_read, to_write, self._ram, position, 1)

    # --- returning chains ------------------------------------------------------------------------

    def add_used(self, chain: DescriptorChain, written: int) -> None:
        """Return `chain`; seen by the driver at the next `publish_used`.

        Raises ValueError if the chain is not in flight, or with IN_ORDER not the next one.
        """
        head = chain.head
        if self._taken[head] is not chain:
            raise ValueError(f"chain {head} is not in flight")
        if written > MAX_USED_LENGTH:
            written = MAX_USED_LENGTH
        if self._in_order:
            self._return_in_order(chain, written)
        else:
            position, size = self._next_used, self.size
            if position < size:
                flags = WRITTEN_1 if written else USED_1
                self._pending[position] = flags | head << 32 | written
            else:
                flags = WRITTEN_0 if written else USED_0
                self._pending[position - size] = flags | head << 32 | written
            position += chain.slots
            self._next_used = position if position < 2 * size else position - 2 * size
        self._taken[head] = None
        self._busy_until[head] = self._batch

    def publish_used(self) -> bool:
        """Store all that was added, the first last; whether the driver wants to be notified."""
        new, old = self._next_used, self._published
        if not (self._pending or self._returned) or not self.ready:
            return False
        if self._in_order:
            self.stats.requests += len(self._returned)
            self._pend_in_order()
        else:
            self.stats.requests += len(self._pending)
        self._store_pending()
        held = (new - old) % (2 * self.size)
        self._room += held
        self._published = new
        self._batch += 1
        self._settled = UNSETTLED
        # StoreLoad: the used descriptors before the look at the driver's wish. Pairs with the
        # driver, which stores its wish and then looks at the ring again (2.8.22).
        self._fence()
        event = self._driver_event[0]
        kind = event >> 16 & 3
        if kind == RING_EVENT_FLAGS_DESC and self._event_idx:
            # Whether the descriptor it names is one that was just used: in [old, new).
            place = unpack_position(event & 0xFFFF, self.size)
            return (place - old) % (2 * self.size) < held
        # No interrupt is lost by a reserved value, or one of a feature that was not negotiated.
        return kind != RING_EVENT_FLAGS_DISABLE

    def _pend_in_order(self) -> None:
        for position, head, written in self._elements_in_order():
            if position < self.size:
                flags = WRITTEN_1 if written else USED_1
            else:
                position -= self.size
                flags = WRITTEN_0 if written else USED_0
            self._pending[position] = flags | head << 32 | written

    def _store_pending(self) -> None:
        used, pending = self._used, self._pending
        if WEAKLY_ORDERED:
            first = next(iter(pending))
            for slot, word in reversed(pending.items()):
                if slot == first:
                    # Release: buffers and all other descriptors before the one that the driver
                    # looks at. Pairs with its barrier after it has seen its flags (2.8.22).
                    self._fence()
                used[slot] = word
        else:
            for slot, word in reversed(pending.items()):
                used[slot] = word
        pending.clear()

    # --- usual chains, a batch at a time ----------------------------------------------------------

    def peek_usual(self, first: int, last: int, most: int) -> tuple[list[Usual], bool]:
        """The next chains as far as they are of the usual form; see Queue."""
        usual: list[Usual] = []
        peeked: dict[int, int] = {}
        self._peeked = peeked
        if not self.ready:
            return usual, False
        if self._in_order or self.size < 3:
            return usual, True
        ring, flags_of, size, position = self._ring, self._flags, self.size, self._next_avail
        readable, writable = self._ram.readable_views, self._ram.writable_views
        firsts, lasts = self._outer_places(first, last)
        busy_until, batch, room, left = self._busy_until, self._batch, self._room, most
        indirect = DESC_F_INDIRECT if self._indirect else -1
        try:
            while left > 0 and len(peeked) < MAX_PEEKED:
                slot, available = (
                    (position, DESC_F_AVAIL) if position < size else (position - size, DESC_F_USED)
                )
                if (flags_of[slot] ^ available) & OWNER:
                    # Taken back if it was available before, as `pop` then says.
                    return usual, bool(self._left) and not usual
                if WEAKLY_ORDERED:
                    self._fence()  # Acquire, as in `pop`.
                three = (
                    _unpack_three(ring, slot * DESC_SIZE)
                    if slot + 3 <= size
                    else self._three_around(slot)
                )
                a, la, head, fa, b, lb, _, fb, c, lc, end_id, fc = three
                fa ^= available
                if fa == indirect and la == _three.size:
                    slots = 1
                    a, la, _, fa, b, lb, _, fb, c, lc, _, fc = _unpack_three(readable[a, la])
                    # A table has no NEXT, and only WRITE means something there (2.8.7).
                    fa, fb = fa & DESC_F_WRITE | DESC_F_NEXT, fb & DESC_F_WRITE | DESC_F_NEXT
                    fc &= DESC_F_WRITE
                else:
                    slots, head = 3, end_id
                    fb ^= available
                    fc ^= available
                if (
                    fa != DESC_F_NEXT or fc != DESC_F_WRITE or la != first or lc != last
                    or not 0 < lb < LARGE_PART or slots > room
                    or head >= size or busy_until[head] >= batch or head in peeked
                ):  # fmt: skip
                    return usual, True
                if fb == CHAIN_FLAGS:  # NEXT and WRITE
                    usual.append((firsts[a], writable[b, lb], lasts[c], lb, False))
                elif fb == DESC_F_NEXT:
                    usual.append((firsts[a], readable[b, lb], lasts[c], lb, True))
                else:
                    return usual, True
                peeked[head] = slots
                room -= slots
                left -= lb
                position += slots
                if position >= 2 * size:
                    position -= 2 * size
        except GuestMemoryError:
            return usual, True
        return usual, False

    def _three_around(self, slot: int) -> list[int]:
        """Three descriptors of which the last are at the ring's start again, with flags as if they
        were in the same round."""
        ring, size = self._ring, self.size
        raw = bytes(ring[slot * DESC_SIZE :]) + bytes(ring[: (slot + 3 - size) * DESC_SIZE])
        fields = list(_unpack_three(raw))
        for place in range(size - slot, 3):
            fields[4 * place + 3] ^= OWNER
        return fields

    def use_peeked(self, written: Sequence[int]) -> None:
        """Take and return chains that `peek_usual` gave; see Queue."""
        peeked, self._peeked = self._peeked, {}
        if not self.ready:
            return
        pending, size, position = self._pending, self.size, self._next_used
        busy_until, batch, total = self._busy_until, self._batch, 0
        for (head, slots), length in zip(peeked.items(), written, strict=False):
            if position < size:
                pending[position] = (WRITTEN_1 if length else USED_1) | head << 32 | length
            else:
                pending[position - size] = (WRITTEN_0 if length else USED_0) | head << 32 | length
            busy_until[head] = batch
            total += slots
            position += slots
            if position >= 2 * size:
                position -= 2 * size
        self._next_used = position
        self._next_avail = self._advance(self._next_avail, total)
        self._room -= total
        self._left = max(0, self._left - total)

    # --- asking for kicks ------------------------------------------------------------------------

    def disable_notification(self) -> None:
        """Tell the driver that kicks are not needed for now (2.8.10)."""
        if self.ready:
            self._device_event[0] = RING_EVENT_FLAGS_DISABLE << 16

    def _ask_for_kicks(self) -> None:
        if self._event_idx:
            place = self._encode(self._first_unavailable())
            self._device_event[0] = RING_EVENT_FLAGS_DESC << 16 | place
        else:
            self._device_event[0] = RING_EVENT_FLAGS_ENABLE << 16
        # StoreLoad: the wish before the last look at the ring. Pairs with the driver, which stores
        # its flags and then looks whether a kick is wanted (2.8.21.3.1).
        self._fence()

    def _first_unavailable(self) -> int:
        # Chains that were left in the ring are looked at once: the search goes on where it ended.
        size, room = self.size, self._room
        position = self._advance(self._next_avail, self._left)
        while self._left < room:
            slot = position if position < size else position - size
            available = DESC_F_AVAIL if position < size else DESC_F_USED
            if (self._flags[slot] ^ available) & OWNER:
                break
            self._left += 1
            position = position + 1 if position + 1 < 2 * size else 0
        return position

    def _has_more(self) -> bool:
        position = self._advance(self._next_avail, self._left)
        first_round = position < self.size
        flags = self._flags[position if first_round else position - self.size]
        available = DESC_F_AVAIL if first_round else DESC_F_USED
        return self._left < self._room and not (flags ^ available) & OWNER

    # --- positions and state ---------------------------------------------------------------------

    def _advance(self, position: int, slots: int) -> int:
        return (position + slots) % (2 * self.size)

    def _encode(self, position: int) -> int:
        return pack_position(position, self.size)

    def _age(self, chain: DescriptorChain) -> int:
        position, end = chain.position, 2 * self.size
        return end - position if position < 0 else (self._next_avail - position) % end

    def _resume(self, state: QueueState) -> None:
        self._next_avail = unpack_position(state.next_avail, self.size)
        self._next_used = self._published = unpack_position(state.next_used, self.size)
        self._room = self.size - sum(chain.slots for chain in state.in_flight)
        self._left = 0
