"""Frames from the backend into the driver's buffers: one receive queue.

Virtio 1.3, 5.1.6.4 Processing of Incoming Packets. Buffers are taken from the ring ahead of the
frames, because how large a frame is shows only when it has been read, straight into them. With
VIRTIO_NET_F_MRG_RXBUF a frame goes over as many buffers as it needs; what does not fit into those
at hand lies in `_spill` until the driver has given more.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, cast

from pyvmm.errors import GuestMemoryError
from pyvmm.virtio.net.backend import Channel
from pyvmm.virtio.net.counters import Counters
from pyvmm.virtio.net.filter import ReceiveFilter
from pyvmm.virtio.net.header import (
    ETH_HEADER,
    HEADER_SIZE,
    LARGEST_FRAME,
    NUM_BUFFERS_AT,
    SMALLEST_BUFFER,
    VLAN_TAG,
)
from pyvmm.virtio.queue.chain import DescriptorChain
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.worker import AT_ONCE, FOR_SOURCE, Rest

if TYPE_CHECKING:
    from pyvmm.virtio.net.limits import Limits


# After so many frames, or so many bytes, the driver gets to see them: a large one at once, so that
# the guest works on it while the next is read.
BATCH_FRAMES = 64
BATCH_BYTES = 32 << 10
SMALL = 2048  # room to have at hand where frames are small
STOCK = 16 << 10  # what is taken then: one look at the ring for several frames
LARGE = HEADER_SIZE + LARGEST_FRAME
# Frames since the last large one, after which they count as small.
_SMALL_AGAIN = 256
# More than this is never given to one readv(2), which takes 1,024 (IOV_MAX).
_MOST_VIEWS = 1000
PATIENCE = 0.25  # seconds that a frame waits for the driver to give buffers
_DESTINATION = slice(HEADER_SIZE, HEADER_SIZE + 6)


class _Buffer(NamedTuple):
    """A chain from the ring that is not just one buffer: its `size` in bytes, how many `views` it
    is seen through."""

    chain: DescriptorChain
    size: int
    views: int


class _Waiting(NamedTuple):
    """A frame of `length` bytes that was read when there was only `room` for it."""

    length: int
    room: int
    since: float


class Rules(NamedTuple):
    """The negotiated rules of receiving. `largest` is the largest frame without
    segmentation, or 0 for no limit."""

    mergeable: bool
    guest_csum: bool
    largest: int


class Receiver:
    """One receive queue. `accepts` gives the filter in force, or None while nothing may come."""

    def __init__(
        self,
        channel: Channel,
        rules: Rules,
        filter_in_force: Callable[[], ReceiveFilter | None],
        counters: Counters,
        note: Callable[[int, str], None] | None,
        limits: Limits | None = None,
    ) -> None:
        self._receive = channel.receive
        self._rules = rules
        self._filter = filter_in_force
        self._counters = counters
        self._note = note
        self._limits = limits
        # Chains in hand: by head those that are just one buffer with one view.
        self._buffers: list[int | _Buffer] = []
        self._plain = True  # all of them are such
        self._views: list[memoryview] = []  # of all _buffers, and _spill behind them
        self._room = 0  # in _buffers, in bytes
        # Without merging, one byte too many shows that a frame was too large.
        self._spill = memoryview(bytearray(LARGE if rules.mergeable else 1))
        self._views.append(self._spill)
        self._target = SMALL
        self._since_large = 0
        self._waiting: _Waiting | None = None

    def serve(self, queue: Queue) -> Rest | None:
        """Fill buffers with frames until there are no more of the one or the other. Raises
        LinkLost, and then what was filled before stays filled."""
        bytes_left = BATCH_BYTES
        limits = self._limits
        for _ in range(BATCH_FRAMES):
            waiting = self._waiting
            if waiting is None:
                if limits is not None and (wait := limits.ready()):
                    return Rest(kicks=False, seconds=wait, sources=False)
                if self._room < self._target:
                    self._take_buffers(queue, max(self._target, STOCK))
                if not self._buffers:
                    return None  # A kick tells of new ones; frames wait where they are.
                room = self._room
                length = self._receive(self._views)
                if not length:
                    return FOR_SOURCE
            else:
                length, room = waiting.length, waiting.room
            if not self._place(queue, length, room):
                return Rest(seconds=PATIENCE)
            bytes_left -= length
            if bytes_left <= 0:
                break
        return AT_ONCE

    # --- buffers ---------------------------------------------------------------------------------

    def _take_buffers(self, queue: Queue, wanted: int) -> None:
        """Have room for `wanted` bytes at hand if the driver gives so much."""
        if self._rules.mergeable:
            self._take_plain(queue, wanted)
            if self._room < wanted:
                self._take_chains(queue, wanted)
        elif not self._buffers:
            self._take_chains(queue, 1)

    def _take_plain(self, queue: Queue, wanted: int) -> None:
        views = self._views
        before = len(views) - 1
        if before >= _MOST_VIEWS:
            return
        views.pop()  # _spill, which stays last
        try:
            self._buffers += queue.pop_buffers(
                views, wanted - self._room, _MOST_VIEWS - before, SMALLEST_BUFFER
            )
            self._room += sum(map(len, views[before:]))
        finally:
            views.append(self._spill)

    def _take_chains(self, queue: Queue, wanted: int) -> None:
        for chain in queue:
            try:
                views = chain.writable_views()
            except GuestMemoryError:
                views = []
            size = chain.writable_size
            if not views or size < SMALLEST_BUFFER:
                self._counters.drop("a buffer that is not RAM or has no room for a header")
                queue.add_used(chain, 0)
                continue
            self._buffers.append(_Buffer(chain, size, len(views)))
            self._plain = False
            self._views[-1:] = (*views, self._spill)
            self._room += size
            if self._room >= wanted or len(self._views) >= _MOST_VIEWS:
                return

    def _place(self, queue: Queue, length: int, room: int) -> bool:
        """Hand a frame to the driver, or drop it; False if it must wait for more buffers. It was
        read when there was `room`; the rest of it is in `_spill`."""
        why: str | None = self._unwanted(length)
        if not why and length > room:
            why = self._fit(queue, length, room)
            if why is None:
                return False
        self._waiting = None
        if why:
            self._counters.drop(why)
        else:
            self._give(queue, length)
            self._adapt(length)
            self._counters.frames += 1
            self._counters.bytes += length - HEADER_SIZE
            if self._limits is not None:
                self._limits.charge(length - HEADER_SIZE)
        if self._note is not None:
            self._note(length - HEADER_SIZE, why or "")
        return True

    def _fit(self, queue: Queue, length: int, room: int) -> str | None:
        """Copy what has spilled over into further buffers: "", or why that cannot be, or None if it
        cannot be yet."""
        if not self._rules.mergeable:
            return "larger than the buffer"
        self._take_buffers(queue, length)
        if self._room >= length:
            _copy_into(self._views[:-1], room, self._spill[: length - room])
            return ""
        now = monotonic()
        if self._waiting is None:
            self._waiting = _Waiting(length, room, now)
        # Once all of the ring is in our hands, more cannot come.
        if len(self._buffers) >= queue.size or now - self._waiting.since >= PATIENCE:
            return "no buffers"
        return None

    def _give(self, queue: Queue, length: int) -> None:
        first = self._views[0]
        count, covered, views = self._needed(length)
        if len(first) >= HEADER_SIZE:
            first[NUM_BUFFERS_AT] = count & 0xFF
            first[NUM_BUFFERS_AT + 1] = count >> 8
            if not self._rules.guest_csum:
                first[0] = 0
        else:
            _copy_into(self._views, NUM_BUFFERS_AT, count.to_bytes(2, "little"))
            if not self._rules.guest_csum:
                _copy_into(self._views, 0, b"\0")
        if self._plain:
            heads = cast("list[int]", self._buffers[:count])
            queue.add_used_buffers(heads, length - covered + len(self._views[count - 1]))
        else:
            self._return(queue, self._buffers[:count], length)
        del self._buffers[:count]
        del self._views[:views]
        self._room -= covered
        self._plain |= not self._buffers

    def _needed(self, length: int) -> tuple[int, int, int]:
        """The numbers of buffers that a frame takes, of bytes in them, and of views."""
        covered = count = views = 0
        if self._plain:
            first = len(self._views[0])
            if first >= length:
                return 1, first, 1
            for view in self._views:
                covered += len(view)
                count += 1
                if covered >= length:
                    break
            return count, covered, count
        while covered < length:
            buffer = self._buffers[count]
            if isinstance(buffer, _Buffer):
                covered += buffer.size
                views += buffer.views
            else:
                covered += len(self._views[views])
                views += 1
            count += 1
        return count, covered, views

    def _return(self, queue: Queue, buffers: list[int | _Buffer], length: int) -> None:
        """Hand `buffers` of all kinds back, the first `length` bytes of which were written."""
        at = 0
        for buffer in buffers:
            if isinstance(buffer, _Buffer):
                written = min(length, buffer.size)
                queue.add_used(buffer.chain, written)
                at += buffer.views
            else:
                written = min(length, len(self._views[at]))
                queue.add_used_buffers([buffer], written)
                at += 1
            length -= written

    def _adapt(self, length: int) -> None:
        """Have as much room at hand as frames need these days."""
        if length > SMALL:
            self._target = LARGE
            self._since_large = 0
        elif self._target != SMALL:
            self._since_large += 1
            if self._since_large > _SMALL_AGAIN:
                self._target = SMALL

    # --- frames ----------------------------------------------------------------------------------

    def _unwanted(self, length: int) -> str:
        """The reason why the frame is not for the driver, or ""."""
        if length < HEADER_SIZE + ETH_HEADER:
            return "too short"
        if length > LARGE:
            return "larger than any frame"
        filter = self._filter()
        if filter is None:
            return "the link is down"
        largest = self._rules.largest
        if largest and length > largest and self._is_oversized(length):
            return "larger than the MTU"
        if filter.promisc:
            return ""
        first = self._views[0]
        if len(first) >= HEADER_SIZE + 6:
            destination = bytes(first[_DESTINATION])
        else:
            destination = _gather(self._views, HEADER_SIZE, 6)
        return "" if filter.accepts(destination) else "not addressed to the guest"

    def _is_oversized(self, length: int) -> bool:
        head = _gather(self._views, 0, HEADER_SIZE + ETH_HEADER)
        if head[1] & 0x7F:  # gso_type without ECN: to be cut up by whoever receives it
            return False
        tagged = head[-2:] in (b"\x81\x00", b"\x88\xa8")  # <linux/if_ether.h> ETH_P_8021Q, 8021AD
        return length > self._rules.largest + (VLAN_TAG if tagged else 0)


def _gather(views: list[memoryview], start: int, size: int) -> bytes:
    """`size` bytes from `start` on, whatever views they lie in."""
    found = b""
    for view in views:
        if len(found) == size:
            break
        found += bytes(view[start : start + size - len(found)])
        start = max(0, start - len(view))
    return found


def _copy_into(views: list[memoryview], start: int, data: bytes | memoryview) -> None:
    """Write `data` at `start`, over as many views as it takes."""
    for view in views:
        if not data:
            return
        if start < len(view):
            part = data[: len(view) - start]
            view[start : start + len(part)] = part
            data = data[len(part) :]
            start = 0
        else:
            start -= len(view)
