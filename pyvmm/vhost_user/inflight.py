"""Inflight I/O tracking: what a back end has taken and not returned, for the one that follows it.

The notes lie in memory that the front end holds on to. A back end that is killed in the middle of
its requests is followed by one that finds them there and takes them again, in whatever order they
were being returned. The layout is that of QEMU's docs/interop/vhost-user.rst, "Inflight I/O
tracking", for split virtqueues; all numbers in the machine's own byte order. Nothing in it is
trusted: the front end could write to it too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pyvmm.errors import HostError
from pyvmm.host.syscalls import create_memfd
from pyvmm.memory.lent_memory import LentMemory
from pyvmm.vhost_user.protocol import INFLIGHT, FrontEndError
from pyvmm.virtio.queue.state import is_valid_size

VERSION = 1  # of a region; 0 is one that nobody has used yet
_HEADER = 16  # QueueRegionSplit: features, version, desc_num, last_batch_head, used_idx
_STATE = 16  # DescStateSplit: inflight, padding, next, counter
_ALIGN = 64
# Places in a region as 16-bit numbers, and of what belongs to descriptor 0 in it.
_VERSION, _DESC_NUM, _LAST_BATCH_HEAD, _USED_IDX = 4, 5, 6, 7
_NEXT = (_HEADER + 6) // 2
_COUNTER = (_HEADER + 8) // 8  # as a 64-bit number
_COUNTERS = 1 << 64


def region_size(queue_size: int) -> int:
    """The bytes of one ring's region."""
    return -(-(_HEADER + _STATE * queue_size) // _ALIGN) * _ALIGN


class Inflight:
    """The memory with a region for each of `num_queues` rings of `queue_size` descriptors at the
    most. `fd` is ours, or -1 where the front end brought the memory."""

    def __init__(self, view: memoryview, num_queues: int, queue_size: int, fd: int = -1) -> None:
        self._view = view
        self.num_queues = num_queues
        self.queue_size = queue_size
        self.fd = fd

    @classmethod
    def create(cls, num_queues: int, queue_size: int) -> Inflight:
        """New memory, which cannot be made shorter. Raises FrontEndError, HostError."""
        size = _size(num_queues, queue_size)
        fd = create_memfd("pyvmm-inflight", size, fixed=True)
        try:
            return cls(LentMemory.map_region(0, size, fd, 0).view, num_queues, queue_size, fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def given(cls, payload: bytes, fd: int) -> Inflight:
        """The memory that a front end hands over, as SET_INFLIGHT_FD describes it. Raises
        PyvmmError."""
        size, offset, num_queues, queue_size = INFLIGHT.unpack_from(payload)
        needed = _size(num_queues, queue_size)
        if size < needed:
            raise FrontEndError(f"{size} bytes for {num_queues} rings of {queue_size}")
        view = LentMemory.map_region(offset, needed, fd, offset).view
        return cls(view, num_queues, queue_size)

    @classmethod
    def copy_of(cls, payload: bytes, fd: int) -> Inflight:
        """A copy of what is in the memory `fd` now, which a back end described by `payload`; it is
        nobody else's. `fd` is not mapped, as a back end may cut it short. Raises PyvmmError."""
        _, offset, num_queues, queue_size = INFLIGHT.unpack_from(payload)
        size = _size(num_queues, queue_size)
        try:
            notes = os.pread(fd, size, offset)
        except OSError as error:
            raise HostError(error.errno or 0, "reading the notes of requests in flight") from None
        except OverflowError:
            raise FrontEndError(f"notes of requests in flight at {offset:#x}") from None
        return cls(memoryview(bytearray(notes.ljust(size, b"\0"))), num_queues, queue_size)

    def describe(self) -> bytes:
        """The inflight description."""
        return INFLIGHT.pack(len(self._view), 0, self.num_queues, self.queue_size)

    def journal(self, index: int, size: int) -> Journal:
        """The notes on ring `index` of `size` descriptors. Raises FrontEndError if there is no room
        for them."""
        if index >= self.num_queues or size > self.queue_size:
            raise FrontEndError(f"no room for the requests in flight of ring {index} of {size}")
        room = region_size(self.queue_size)
        return Journal(self._view[index * room : (index + 1) * room], self.queue_size)

    def close(self) -> None:
        """Give up the memory; journals of it must be out of use."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _size(num_queues: int, queue_size: int) -> int:
    if not num_queues or not is_valid_size(queue_size, 1 << 15, packed=True):
        raise FrontEndError(f"{num_queues} rings of {queue_size} descriptors")
    return num_queues * region_size(queue_size)


class Journal:
    """The notes on one split ring: see `virtio.queue.protocol.Journal` for when what is called."""

    def __init__(self, view: memoryview, size: int) -> None:
        self._size = size
        self._bytes = view
        self._halves = view.cast("H")
        self._words = view.cast("Q")
        self._counter = 0
        self._flagged = 0  # how many descriptors are marked

    def resume(self, used_idx: int) -> list[int]:
        """The heads that were in flight when the notes ended, in the order in which they were
        taken; `used_idx` is the used ring's index now. Raises FrontEndError for notes that cannot
        be."""
        halves, size = self._halves, self._size
        if halves[_VERSION] == 0:
            halves[_DESC_NUM], halves[_USED_IDX] = size, used_idx
            halves[_VERSION] = VERSION
        if (halves[_VERSION], halves[_DESC_NUM]) != (VERSION, size):
            raise FrontEndError("notes of requests in flight that are not of this ring")
        self._settle(used_idx)
        found = [
            (self._words[_COUNTER + 2 * head], head) for head in range(size) if self._is_set(head)
        ]
        self._counter = (max(found)[0] + 1) % _COUNTERS if found else 0
        self._flagged = len(found)
        return [head for _, head in sorted(found)]

    def _settle(self, used_idx: int) -> None:
        """The last batch was published, and maybe its marks are still there."""
        halves, size = self._halves, self._size
        count = (used_idx - halves[_USED_IDX]) & 0xFFFF
        head = halves[_LAST_BATCH_HEAD]
        if count > size:  # not of this ring, but of one that was here before it
            for head in range(size):
                self._bytes[_HEADER + _STATE * head] = 0
            count = 0
        for _ in range(count):
            if head >= size:
                raise FrontEndError(f"descriptor {head} in notes on {size}")
            self._bytes[_HEADER + _STATE * head] = 0
            head = halves[_NEXT + 8 * head]
        halves[_USED_IDX] = used_idx

    def _is_set(self, head: int) -> bool:
        return self._bytes[_HEADER + _STATE * head] != 0

    # --- from the queue ---------------------------------------------------------------------------

    def taken(self, head: int) -> None:
        """See `pyvmm.virtio.queue.protocol.Journal`."""
        self._words[_COUNTER + 2 * head] = self._counter
        self._counter = (self._counter + 1) % _COUNTERS
        if not self._is_set(head):  # one that is taken again is marked already
            self._flagged += 1
            self._bytes[_HEADER + _STATE * head] = 1

    def given_back(self, head: int) -> None:
        """See `pyvmm.virtio.queue.protocol.Journal`."""
        self._unmark(head)

    def publishing(self, heads: Sequence[int]) -> None:
        """See `pyvmm.virtio.queue.protocol.Journal`."""
        if self._flagged:  # else there is no mark that the list could help to take away
            halves = self._halves
            for head in heads:
                halves[_NEXT + 8 * head] = halves[_LAST_BATCH_HEAD]
                halves[_LAST_BATCH_HEAD] = head

    def published(self, heads: Sequence[int], used_idx: int) -> None:
        """See `pyvmm.virtio.queue.protocol.Journal`."""
        if self._flagged:
            for head in heads:
                self._unmark(head)
        self._halves[_USED_IDX] = used_idx

    def _unmark(self, head: int) -> None:
        if self._is_set(head):
            self._bytes[_HEADER + _STATE * head] = 0
            self._flagged -= 1
