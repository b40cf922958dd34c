"""A packed virtqueue's usual chains, taken and returned a batch at a time.

`pyvmm.virtio.queue.packed` says how the ring works, and has the way of one chain at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

from pyvmm.errors import GuestMemoryError
from pyvmm.host.fences import WEAKLY_ORDERED
from pyvmm.virtio.queue.chain import Usual
from pyvmm.virtio.queue.ring import (
    CHAIN_FLAGS,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
    LARGE_PART,
    MAX_PEEKED,
    Ring,
)

DESC_F_AVAIL = 1 << 7  # 2.8.1 Driver and Device Ring Wrap Counters
DESC_F_USED = 1 << 15
OWNER = DESC_F_AVAIL | DESC_F_USED
_three = Struct("<" + 3 * "QIHH")  # struct pvirtq_desc: addr, len, id, flags
_unpack_three = _three.unpack_from
# The upper half of a used descriptor, without its id and len: in the round where the wrap counter
# is 1, and in the other.
USED_1 = OWNER << 48
WRITTEN_1 = (OWNER | DESC_F_WRITE) << 48
USED_0 = 0
WRITTEN_0 = DESC_F_WRITE << 48


class PackedPeek(Ring):
    """What of a packed queue works on batches."""

    _ring: memoryview  # the descriptors
    _flags: memoryview  # of each descriptor
    _room: int  # entries of the ring that the device does not hold
    _left: int  # entries from _next_avail on that are known to be available
    _pending: dict[int, int]  # used descriptors to be published: what to store, by place
    _peeked: dict[int, int]  # what peek_usual gave: entries of the ring, by head

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
