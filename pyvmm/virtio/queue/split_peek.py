"""A split virtqueue's usual chains, taken and returned a batch at a time.

`pyvmm.virtio.queue.split` says how the rings are read, and has the way of one chain at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from struct import Struct
from typing import TYPE_CHECKING

from pyvmm.errors import GuestMemoryError
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

if TYPE_CHECKING:
    from pyvmm.virtio.queue.protocol import Journal

unpack_desc = Struct("<QIHH").unpack_from  # struct virtq_desc: addr, len, flags, next
_unpack_three = Struct("<" + 3 * "QIHH").unpack_from


class SplitPeek(Ring):
    """What of a split queue works on batches."""

    _table: memoryview  # the descriptors
    _heads: memoryview  # the available ring's entries
    _used_ring: memoryview  # the used ring's: id in the low half, len in the high
    _mask: int
    _seen_avail: int  # avail.idx as last read
    _peeked: list[int]  # the heads of what peek_usual gave
    _journal: Journal | None
    _unpublished: list[int]  # for the journal: heads that were returned,
    _unmarked: list[int]  # and which of them it does not know of
    _resubmitted: dict[int, int]  # heads by position, instead of the ring's

    @abstractmethod
    def _read_avail_idx(self) -> int:
        """The available ring's index, checked. Raises DriverError."""

    def peek_usual(self, first: int, last: int, most: int) -> tuple[list[Usual], bool]:
        """The next chains as far as they are of the usual form; see Queue."""
        usual: list[Usual] = []
        self._peeked = []
        if not self.ready:
            return usual, False
        heads = self._next_heads(MAX_PEEKED)
        if not heads:
            return usual, False
        # A head that cannot be, or that stands there twice, is for `pop` to find. One that is in
        # flight as well, or was returned and the driver cannot know it yet.
        if (
            self._in_order
            or self._resubmitted
            or self.size < 3
            or max(heads) >= self.size
            or len(set(heads)) < len(heads)
        ):
            return usual, True
        self._peeked = heads
        table, unpack, three = self._table, _unpack_three, 3 * DESC_SIZE
        readable, writable = self._ram.readable_views, self._ram.writable_views
        firsts, lasts = self._outer_places(first, last)
        busy_until, batch, beyond = self._busy_until, self._batch, self.size - 2
        indirect = DESC_F_INDIRECT if self._indirect else -1
        left = most
        try:
            for head in heads:
                if busy_until[head] >= batch:
                    return usual, True
                if head < beyond:
                    place = head
                    a, la, fa, na, b, lb, fb, nb, c, lc, fc, _ = unpack(table, head * DESC_SIZE)
                else:
                    a, la, fa, na = unpack_desc(table, head * DESC_SIZE)
                if fa == indirect and la == three:
                    place = 0
                    a, la, fa, na, b, lb, fb, nb, c, lc, fc, _ = unpack(readable[a, la])
                elif head >= beyond:
                    return usual, True
                if (
                    fa != DESC_F_NEXT or na != place + 1 or nb != place + 2 or fc != DESC_F_WRITE
                    or la != first or lc != last or not 0 < lb < LARGE_PART
                ):  # fmt: skip
                    return usual, True
                if fb == CHAIN_FLAGS:  # NEXT and WRITE
                    usual.append((firsts[a], writable[b, lb], lasts[c], lb, False))
                elif fb == DESC_F_NEXT:
                    usual.append((firsts[a], readable[b, lb], lasts[c], lb, True))
                else:
                    return usual, True
                left -= lb
                if left <= 0:
                    break
        except GuestMemoryError:
            return usual, True
        return usual, False

    def _next_heads(self, most: int) -> list[int]:
        """The next heads in the available ring, each read once; nothing is checked."""
        position = self._next_avail
        count = (self._read_avail_idx() - position) & 0xFFFF
        if count > most:
            count = most
        start = position & self._mask
        heads: list[int] = self._heads[start : start + count].tolist()
        if len(heads) < count:
            heads += self._heads[: count - len(heads)].tolist()
        return heads

    def use_peeked(self, written: Sequence[int]) -> None:
        """Take and return chains that `peek_usual` gave; see Queue."""
        heads, self._peeked = self._peeked, []
        if not self.ready:
            return
        used_ring, mask, position = self._used_ring, self._mask, self._next_used
        busy_until, batch = self._busy_until, self._batch
        for head, length in zip(heads, written, strict=False):
            used_ring[position & mask] = length << 32 | head
            busy_until[head] = batch
            position += 1
        self._next_used = position & 0xFFFF
        self._next_avail = (self._next_avail + len(written)) & 0xFFFF
        if self._journal is not None:
            self._unpublished += heads[: len(written)]
            self._unmarked += heads[: len(written)]
