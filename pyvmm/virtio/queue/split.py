"""The device's end of a split virtqueue (virtio 1.3, 2.7 Split Virtqueues).

The rings lie in guest RAM, shared with a driver that may be hostile and writes at the same time.
So each field is read once, checked, and the copy used; positions and sizes are ours and never read
back; a walk is bounded by the queue size. Where the driver broke a rule, DriverError is raised and
nothing has been consumed.

16-bit indices go through `memoryview.cast("H")`, one aligned load or store, never torn.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import TYPE_CHECKING

from pyvmm.errors import DriverError, GuestMemoryError
from pyvmm.host.fences import WEAKLY_ORDERED
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.memory.guest_memory import Region
from pyvmm.virtio.queue.chain import DescriptorChain, Part, Usual
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
    QUEUE_SIZE_LIMIT,
    QueueConfig,
    QueueState,
    avail_bytes,
    desc_bytes,
    used_bytes,
)

if TYPE_CHECKING:
    from pyvmm.virtio.queue.protocol import Journal

AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

_unpack_desc = Struct("<QIHH").unpack_from  # struct virtq_desc: addr, len, flags, next
_unpack_three = Struct("<" + 3 * "QIHH").unpack_from

_TABLE = "2.7.5 The Virtqueue Descriptor Table"
_TABLE_DRIVER = "2.7.5.2 Driver Requirements: The Virtqueue Descriptor Table"
_INDIRECT = "2.7.5.3.1 Driver Requirements: Indirect Descriptors"
_FRAMING = "2.7.4.2 Driver Requirements: Message Framing"
_AVAIL = "2.7.6.1 Driver Requirements: The Virtqueue Available Ring"


class SplitQueue(Ring):
    """A split virtqueue as its device sees it; see `protocol.Queue` for the operations.

    Positions are free-running 16-bit indices, as in the rings.
    """

    packed = False
    table_section = _INDIRECT
    supply_section = "2.7.13 Supplying Buffers to The Device"

    def __init__(
        self,
        memory: GuestMemory,
        config: QueueConfig,
        features: int,
        index: int,
        kick: EventFd,
    ) -> None:
        super().__init__(memory, config, features, index, kick)
        self._mask = self.size - 1
        self._seen_avail = 0  # avail.idx as last read
        self._peeked: list[int] = []  # the heads of what peek_usual gave
        self._journal: Journal | None = None
        self._unpublished: list[int] = []  # for the journal: heads that were returned,
        self._unmarked: list[int] = []  # and which of them it does not know of
        self._resubmitted: dict[int, int] = {}  # heads by position, instead of the ring's

    def _find_rings(self) -> None:
        memory, config, size = self._ram.memory, self._config, self.size
        self._table = memory.view(config.desc_addr, desc_bytes(size)).toreadonly()
        # Element 0 is flags, 1 idx, 2… ring, the last one used_event.
        self._avail = memory.view(config.avail_addr, avail_bytes(size)).toreadonly().cast("H")
        self._heads = self._avail[2 : 2 + size]
        used = memory.view(config.used_addr, used_bytes(size))
        self._used = used[:4].cast("H")  # flags, idx
        self._used_ring = used[4 : 4 + 8 * size].cast("Q")  # id in the low half, len in the high
        self._avail_event = used[4 + 8 * size :].cast("H")

    # --- taking chains ---------------------------------------------------------------------------

    def pop(self) -> DescriptorChain | None:
        """The next available chain, or None. Raises DriverError, and then nothing is consumed."""
        if not self.ready:
            return None
        position = self._next_avail
        if position == self._seen_avail and self._read_avail_idx() == position:
            return None
        head = self._avail[2 + (position & self._mask)]
        if self._resubmitted:
            head = self._resubmitted.get(position, head)
        if head >= self.size:
            raise DriverError(f"available head {head} in a queue of {self.size}", section=_TABLE)
        if self._busy_until[head] >= self._batch:
            raise self._again(head)
        self._last = chain = self._walk(head, position)
        self._taken[head] = chain
        self._busy_until[head] = IN_FLIGHT
        self._next_avail = (position + 1) & 0xFFFF
        if self._journal is not None:
            self._note_taken(self._journal, head)
        return chain

    def pop_buffers(
        self, views: list[memoryview], wanted: int, most: int, least: int = 1
    ) -> list[int]:
        """See Ring. Each chain is checked as `pop` does it; no object is made of it, as a large
        frame takes seventeen."""
        heads: list[int] = []
        if not self.ready or self._in_order or self._journal is not None:
            return heads  # for `pop`
        regions = self._ram.memory.regions
        start = end = 0
        avail, table, mask, size = self._avail, self._table, self._mask, self.size
        busy, batch, taken, unpack = self._busy_until, self._batch, self._taken, _unpack_desc
        position = self._next_avail
        unseen = (self._seen_avail - position) & 0xFFFF
        if unseen < most:
            unseen = (self._read_avail_idx() - position) & 0xFFFF
        for _ in range(min(unseen, most)):
            head = avail[2 + (position & mask)]
            if head >= size or busy[head] >= batch:
                break  # an error, which `pop` raises
            addr, length, flags, _ = unpack(table, head * DESC_SIZE)
            if flags != DESC_F_WRITE or length < least:
                break
            if addr < start or addr + length > end:  # nearly all lie in one region
                region = _region_of(regions, addr, length)
                if region is None:
                    break
                start, end, ram = region.guest_addr, region.end, region.view
            views.append(ram[addr - start : addr - start + length])
            heads.append(head)
            taken[head] = (addr, length, position)
            busy[head] = IN_FLIGHT
            position = (position + 1) & 0xFFFF
            wanted -= length
            if wanted <= 0:
                break
        if heads:
            self._next_avail = position
        return heads

    def _note_taken(self, journal: Journal, head: int) -> None:
        # Whoever goes on after us takes it that all in front of this one was either taken or
        # published, so a batch that is in between has to be known of as well.
        for earlier in self._unmarked:
            journal.taken(earlier)
        self._unmarked.clear()
        journal.taken(head)

    def _retract(self, chain: DescriptorChain) -> None:
        # One that was taken a second time has no place of its own in the ring any more.
        if self._journal is not None and chain.position not in self._resubmitted:
            self._journal.given_back(chain.head)

    def keep_journal(self, journal: Journal, in_flight: Sequence[int]) -> None:
        """Note in `journal` what is in flight from now on; to be called before anything is.

        `in_flight` are the heads of what was when the process before this one ended. They are
        available again, before all else: they take the places in the available ring between what
        was returned and what had not been taken yet, wherever they were offered.
        """
        self._journal = journal
        first = self._next_avail
        self._resubmitted = {(first + n) & 0xFFFF: head for n, head in enumerate(in_flight)}

    def _read_avail_idx(self) -> int:
        idx = self._avail[1]
        if WEAKLY_ORDERED:
            # Acquire: idx before the ring entries and descriptors that it makes visible. Pairs with
            # the driver's release between them and its store to idx (2.7.13.3.1).
            self._fence()
        # A driver can have no more than `size` chains outstanding, so a larger step is an index
        # that jumped, or one that went backwards: behind us, or only behind what we saw before.
        size = self.size
        if (idx - self._next_avail) & 0xFFFF > size or (idx - self._seen_avail) & 0xFFFF > size:
            raise DriverError(
                f"available index went from {self._seen_avail} to {idx} in a queue of {size}",
                section=_AVAIL,
            )
        self._seen_avail = idx
        return idx

    # --- walking descriptors ---------------------------------------------------------------------

    def _walk(self, head: int, position: int) -> DescriptorChain:
        readable: list[Part] = []
        writable: list[Part] = []
        table, unpack = self._table, _unpack_desc
        bound = left = self.size
        to_read = to_write = 0
        writing = indirect = False
        index = head
        while True:
            addr, length, flags, following = unpack(table, index * DESC_SIZE)
            if flags > CHAIN_FLAGS:
                if flags & DESC_F_INDIRECT:
                    if indirect:
                        raise DriverError("indirect table in an indirect table", section=_INDIRECT)
                    table = self._indirect_table(addr, length, flags)
                    bound, indirect, index = length // DESC_SIZE, True, 0
                    continue
                flags &= CHAIN_FLAGS  # bits without a meaning are ignored
            if flags >= DESC_F_WRITE:
                writing = True
                if length:
                    writable.append((addr, length))
                    to_write += length
            elif writing:
                raise DriverError("readable descriptor after a writable one", section=_FRAMING)
            elif length:
                readable.append((addr, length))
                to_read += length
            if flags == DESC_F_WRITE or flags == 0:
                break
            left -= 1
            if not left:
                raise DriverError(f"chain of more than {self.size} descriptors", section=_INDIRECT)
            if following >= bound:
                raise DriverError(
                    f"descriptor {following} in a table of {bound}", section=_TABLE_DRIVER
                )
            index = following
        if to_read + to_write > MAX_CHAIN_BYTES:
            raise DriverError("chain of more than 2^32 bytes", section=_TABLE_DRIVER)
        return DescriptorChain(head, readable, writable, to_read, to_write, self._ram, position)

    # --- returning chains ------------------------------------------------------------------------

    def add_used(self, chain: DescriptorChain, written: int) -> None:
        """Return `chain`; seen by the driver at the next `publish_used`.

        Raises ValueError if the chain is not in flight, or with IN_ORDER not the next one.
        """
        head = chain.head
        if self._taken[head] is not chain:
            raise ValueError(f"chain {head} is not in flight")
        if self._in_order:
            self._return_in_order(chain, written)
        elif self.ready:
            position = self._next_used
            if written > MAX_USED_LENGTH:
                written = MAX_USED_LENGTH
            self._used_ring[position & self._mask] = written << 32 | head
            self._next_used = (position + 1) & 0xFFFF
        self._taken[head] = None
        self._busy_until[head] = self._batch
        if self._journal is not None:
            self._unpublished.append(head)

    def add_used_buffers(self, heads: list[int], last_written: int) -> None:
        """See Ring."""
        taken, busy, batch = self._taken, self._busy_until, self._batch
        ring, mask, position = self._used_ring, self._mask, self._next_used
        last = len(heads) - 1
        for place, head in enumerate(heads):
            buffer = taken[head]
            if not isinstance(buffer, tuple):
                raise ValueError(f"buffer {head} is not in flight")
            if self.ready:
                written = last_written if place == last else buffer[1]
                ring[position & mask] = written << 32 | head
                position = self._next_used = (position + 1) & 0xFFFF
            taken[head] = None
            busy[head] = batch

    def publish_used(self) -> bool:
        """Store used.idx once for all that was added; whether the driver wants to be notified."""
        new, old = self._next_used, self._published
        if new == old or not self.ready:
            return False
        if self._in_order:
            for position, head, written in self._elements_in_order():
                self._used_ring[position & self._mask] = min(written, MAX_USED_LENGTH) << 32 | head
        journal = self._journal
        if journal is not None:
            journal.publishing(self._unpublished)
        if WEAKLY_ORDERED:
            # Release: used elements and what was written to buffers before idx, which shows them.
            # Pairs with the driver's acquire after it has read idx (2.7.8.2, 2.7.14).
            self._fence()
        self._used[1] = new
        self._published = new
        self.stats.requests += (new - old) & 0xFFFF
        self._batch += 1
        self._settled = UNSETTLED
        if journal is not None:
            self._end_of_batch(journal, new)
        # StoreLoad: used.idx before the look at used_event or flags. Pairs with the driver, which
        # stores those and then looks at used.idx again: one of the two sees the other (2.7.7.2).
        self._fence()
        if self._event_idx:
            # Whether used_event lies in what was just published: in [old, new), modulo 2^16.
            return (new - self._avail[-1] - 1) & 0xFFFF < (new - old) & 0xFFFF
        return not self._avail[0] & AVAIL_F_NO_INTERRUPT

    def _end_of_batch(self, journal: Journal, position: int) -> None:
        journal.published(self._unpublished, position)
        self._unpublished.clear()
        self._unmarked.clear()
        if self._resubmitted:
            # All chains that were taken at earlier places have been returned.
            self._resubmitted = {
                place: head
                for place, head in self._resubmitted.items()
                if (place - position) & 0xFFFF < QUEUE_SIZE_LIMIT
            }

    # --- usual chains, a batch at a time ----------------------------------------------------------

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
                    a, la, fa, na = _unpack_desc(table, head * DESC_SIZE)
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

    # --- asking for kicks ------------------------------------------------------------------------

    def poll(self, until: int, patience: int) -> bool:
        """See Queue."""
        # What was seen and left in the ring, for there was enough for one batch, counts once.
        left = self._seen_avail, self._next_avail
        if left[0] != left[1] and left != self._settled and self.ready and not self.halt:
            self._settled = left
            return True
        return super().poll(until, patience)

    def disable_notification(self) -> None:
        """Tell the driver that kicks are not needed for now (2.7.10.2)."""
        # With EVENT_IDX avail_event lies behind already: the driver passed it when it kicked.
        if self.ready and not self._event_idx:
            self._used[0] = USED_F_NO_NOTIFY

    def _ask_for_kicks(self) -> None:
        self._used[0] = 0
        if self._event_idx:
            self._avail_event[0] = self._avail[1]
        # StoreLoad: the wish before the last look at avail.idx. Pairs with the driver, which stores
        # idx and then looks whether a kick is wanted; without both one could get lost (2.7.13.4).
        self._fence()

    _first_unavailable = _read_avail_idx

    def _has_more(self) -> bool:
        return self._avail[1] != self._seen_avail

    # --- positions and state ---------------------------------------------------------------------

    def _advance(self, position: int, slots: int) -> int:
        return (position + slots) & 0xFFFF

    def _encode(self, position: int) -> int:
        return position

    def _age(self, chain: DescriptorChain) -> int:
        position = chain.position
        return 0x10000 - position if position < 0 else (self._next_avail - position) & 0xFFFF

    def _resume(self, state: QueueState) -> None:
        self._next_avail = self._seen_avail = state.next_avail
        self._next_used = self._published = state.next_used
        self._read_avail_idx()


def _region_of(regions: tuple[Region, ...], addr: int, length: int) -> Region | None:
    for region in regions:
        if region.guest_addr <= addr and addr + length <= region.end:
            return region
    return None
