"""The device's end of a split virtqueue (virtio 1.3, 2.7 Split Virtqueues).

The rings lie in guest RAM, shared with a driver that may be hostile and writes at the same time.
So each field is read once, checked, and the copy used; positions and sizes are ours and never read
back; a walk is bounded by the queue size. Where the driver broke a rule, DriverError is raised and
nothing has been consumed.

16-bit indices go through `memoryview.cast("H")`, one aligned load or store, never torn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from struct import Struct
from threading import Lock

from pyvmm.errors import DriverError
from pyvmm.host.fences import full_fence
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.virtio import features as feature_bits
from pyvmm.virtio.chain import DescriptorChain, Part, RamWindow
from pyvmm.virtio.queue_state import (
    QueueConfig,
    QueueState,
    avail_bytes,
    desc_bytes,
    used_bytes,
)

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

_DESC_SIZE = 16
_CHAIN_FLAGS = DESC_F_NEXT | DESC_F_WRITE
_unpack_desc = Struct("<QIHH").unpack_from  # struct virtq_desc: addr, len, flags, next
_MAX_CHAIN_BYTES = 1 << 32
_IN_FLIGHT = 1 << 62  # later than any batch

_TABLE = "2.7.5 The Virtqueue Descriptor Table"
_TABLE_DRIVER = "2.7.5.2 Driver Requirements: The Virtqueue Descriptor Table"
_INDIRECT = "2.7.5.3.1 Driver Requirements: Indirect Descriptors"
_FRAMING = "2.7.4.2 Driver Requirements: Message Framing"
_AVAIL = "2.7.6.1 Driver Requirements: The Virtqueue Available Ring"
_SUPPLY = "2.7.13 Supplying Buffers to The Device"


class SplitQueue:
    """A split virtqueue as its device sees it; see `pyvmm.virtio.queue.Queue` for the operations.

    Not thread-safe by itself: hold `lock` for a batch of operations.
    """

    def __init__(
        self,
        memory: GuestMemory,
        config: QueueConfig,
        features: int,
        index: int,
        kick: EventFd,
    ) -> None:
        """Build queue `index` as the driver configured it, at position 0 of both rings.

        `features` are the negotiated bits. Raises DriverError for a configuration that cannot be.
        The configuration is copied: what the driver writes to the registers later changes nothing.
        """
        config = replace(config)
        config.validate(memory)
        size = config.size
        self.index = index
        self.size = size
        self.kick = kick
        self.lock = Lock()
        self.ready = True
        self.halt = False
        self._config = config
        self._ram = RamWindow(memory)
        self._indirect = bool(features >> feature_bits.VIRTIO_RING_F_INDIRECT_DESC & 1)
        self._event_idx = bool(features >> feature_bits.VIRTIO_RING_F_EVENT_IDX & 1)
        self._find_rings()

        self._mask = size - 1
        self._next_avail = 0  # free-running, of the next chain to take
        self._seen_avail = 0  # avail.idx as last read
        self._next_used = 0  # free-running, of the next used element to write
        self._published = 0  # used.idx as last written
        # By head: _IN_FLIGHT between pop and add_used, then the batch that it is published with.
        # The driver may offer a head again once it can know that it was used, not earlier.
        self._busy_until = [-1] * size
        self._batch = 0
        self._last_head = -1  # of the last pop, until it is stepped back or returned
        self._settled = (-1, -1)  # (avail.idx, _next_avail) at the last enable_notification

    def _find_rings(self) -> None:
        memory, config, size = self._ram.memory, self._config, self.size
        self._table = memory.view(config.desc_addr, desc_bytes(size)).toreadonly()
        # Element 0 is flags, 1 idx, 2… ring, the last one used_event.
        self._avail = memory.view(config.avail_addr, avail_bytes(size)).toreadonly().cast("H")
        used = memory.view(config.used_addr, used_bytes(size))
        self._used = used[:4].cast("H")  # flags, idx
        self._used_ring = used[4 : 4 + 8 * size].cast("Q")  # id in the low half, len in the high
        self._avail_event = used[4 + 8 * size :].cast("H")

    def remap(self) -> None:
        """The memory has other regions now: find the rings in it again. `lock` must be held.

        Raises GuestMemoryError if they are no longer RAM; the queue cannot be used then.
        """
        self._find_rings()
        self._ram.refresh()

    # --- taking chains ---------------------------------------------------------------------------

    def pop(self) -> DescriptorChain | None:
        """The next available chain, or None. Raises DriverError, and then nothing is consumed."""
        if not self.ready:
            return None
        position = self._next_avail
        if position == self._seen_avail and self._read_avail_idx() == position:
            return None
        head = self._avail[2 + (position & self._mask)]
        if head >= self.size:
            raise DriverError(f"available head {head} in a queue of {self.size}", section=_TABLE)
        busy_until = self._busy_until
        if busy_until[head] >= self._batch:
            raise DriverError(
                f"chain {head} was made available again before it was used", section=_SUPPLY
            )
        chain = self._parse(head)
        busy_until[head] = _IN_FLIGHT
        self._last_head = head
        self._next_avail = (position + 1) & 0xFFFF
        return chain

    def __iter__(self) -> Iterator[DescriptorChain]:
        """The available chains in order, at most `size`; ends early once `halt` is set."""
        for _ in range(self.size):
            if self.halt or not self.ready:
                return
            chain = self.pop()
            if chain is None:
                return
            yield chain

    def step_back(self) -> None:
        """Undo the last `pop`. Raises ValueError where there is none to undo."""
        head = self._last_head
        if head < 0:
            raise ValueError("no chain to step back to")
        self._busy_until[head] = -1
        self._last_head = -1
        self._next_avail = (self._next_avail - 1) & 0xFFFF

    def _read_avail_idx(self) -> int:
        idx = self._avail[1]
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

    def _parse(self, head: int) -> DescriptorChain:
        readable: list[Part] = []
        writable: list[Part] = []
        table, unpack = self._table, _unpack_desc
        bound = left = self.size
        to_read = to_write = 0
        writing = indirect = False
        index = head
        while True:
            addr, length, flags, following = unpack(table, index * _DESC_SIZE)
            if flags > _CHAIN_FLAGS:
                if flags & DESC_F_INDIRECT:
                    if indirect:
                        raise DriverError("indirect table in an indirect table", section=_INDIRECT)
                    table = self._indirect_table(addr, length, flags)
                    bound, indirect, index = length // _DESC_SIZE, True, 0
                    continue
                flags &= _CHAIN_FLAGS  # bits without a meaning are ignored
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
        if to_read + to_write > _MAX_CHAIN_BYTES:
            raise DriverError("chain of more than 2^32 bytes", section=_TABLE_DRIVER)
        return DescriptorChain(head, readable, writable, to_read, to_write, self._ram)

    def _indirect_table(self, addr: int, length: int, flags: int) -> memoryview:
        # The write flag of a descriptor that refers to a table means nothing (2.7.5.3.2).
        if not self._indirect:
            raise DriverError(
                "indirect descriptor, but INDIRECT_DESC was not negotiated", section=_INDIRECT
            )
        if flags & DESC_F_NEXT:
            raise DriverError("descriptor with both INDIRECT and NEXT", section=_INDIRECT)
        if not length or length % _DESC_SIZE:
            raise DriverError(f"indirect table of {length} bytes", section=_INDIRECT)
        return self._ram.readable(addr, length)

    # --- returning chains ------------------------------------------------------------------------

    def add_used(self, chain: DescriptorChain, written: int) -> None:
        """Return `chain`; seen by the driver at the next `publish_used`.

        Raises ValueError if the chain is not in flight.
        """
        head = chain.head
        if self._busy_until[head] != _IN_FLIGHT:
            raise ValueError(f"chain {head} is not in flight")
        self._busy_until[head] = self._batch
        self._last_head = -1
        if not self.ready:
            return
        position = self._next_used
        self._used_ring[position & self._mask] = written << 32 | head
        self._next_used = (position + 1) & 0xFFFF

    def publish_used(self) -> bool:
        """Store used.idx once for all that was added; whether the driver wants to be notified."""
        new, old = self._next_used, self._published
        if new == old or not self.ready:
            return False
        self._used[1] = new
        self._published = new
        self._batch += 1
        # used.idx must be out before we look whether the driver wants to hear of it.
        full_fence()
        if self._event_idx:
            # Whether used_event lies in what was just published: in [old, new), modulo 2^16.
            return (new - self._avail[-1] - 1) & 0xFFFF < (new - old) & 0xFFFF
        return not self._avail[0] & AVAIL_F_NO_INTERRUPT

    # --- asking for kicks ------------------------------------------------------------------------

    def disable_notification(self) -> None:
        """Tell the driver that kicks are not needed for now (2.7.10.2)."""
        # With EVENT_IDX avail_event lies behind already: the driver passed it when it kicked.
        if self.ready and not self._event_idx:
            self._used[0] = USED_F_NO_NOTIFY

    def enable_notification(self) -> bool:
        """Ask for kicks again; True if there is something to process first.

        A chain that the device has left in the ring, or stepped back to, counts once: a device that
        waits for something else than buffers is not called for the same buffers for ever. Raises
        DriverError for a broken available index.
        """
        if not self.ready:
            return False
        if self._event_idx:
            self._used[0] = 0
            self._avail_event[0] = self._avail[1]
        else:
            self._used[0] = 0
        # The wish must be out before we look for the last time, or a kick could get lost.
        full_fence()
        idx = self._read_avail_idx()
        before = self._settled
        # Kept at every call: between two calls the indices cannot go round and come back to where
        # they were, over many they can.
        self._settled = idx, self._next_avail
        return idx != self._next_avail and self._settled != before

    # --- state -----------------------------------------------------------------------------------

    def state(self) -> QueueState:
        """The queue as plain data; the device must be at rest, and used chains published."""
        config = self._config
        return QueueState(
            max_size=config.max_size,
            size=config.size,
            desc_addr=config.desc_addr,
            avail_addr=config.avail_addr,
            used_addr=config.used_addr,
            next_avail=self._next_avail,
            next_used=self._next_used,
            in_flight=tuple(
                head for head, until in enumerate(self._busy_until) if until == _IN_FLIGHT
            ),
        )

    @classmethod
    def from_state(
        cls,
        memory: GuestMemory,
        state: QueueState,
        features: int,
        index: int,
        kick: EventFd,
    ) -> SplitQueue:
        """A queue that goes on where `state` was taken. Raises DriverError for a state that cannot
        be, which includes an available index in memory that is too far ahead."""
        state.validate(memory)
        queue = cls(memory, state.config(), features, index, kick)
        queue._next_avail = queue._seen_avail = state.next_avail
        queue._next_used = queue._published = state.next_used
        for head in state.in_flight:
            queue._busy_until[head] = _IN_FLIGHT
        queue._read_avail_idx()
        return queue

    def chain_in_flight(self, head: int) -> DescriptorChain:
        """The chain of a head that is in flight, parsed again: for a device restored with it.

        Raises ValueError if it is not in flight, DriverError if it has become malformed.
        """
        if not 0 <= head < self.size or self._busy_until[head] != _IN_FLIGHT:
            raise ValueError(f"chain {head} is not in flight")
        return self._parse(head)
