"""The packed virtqueue against bytes written by hand from virtio 1.3, 2.8, for both wrap counters.

Neither the mock driver nor any number of the device's code is used here.
"""

from __future__ import annotations

import struct

import pytest

from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.virtio.features import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_PACKED,
    mask,
)
from pyvmm.virtio.queue.packed import PackedQueue
from pyvmm.virtio.queue.state import QueueConfig

RING, DRIVER, DEVICE, DATA, TABLE = 0x1000, 0x2000, 0x2010, 0x8000, 0x9000
NEXT, WRITE, INDIRECT = 0x0001, 0x0002, 0x0004
# An available descriptor in a round with wrap counter 1, and in one with wrap counter 0.
AVAIL_1, AVAIL_0 = 0x0080, 0x8000
USED_1, USED_0 = 0x8080, 0x0000
SIZE = 4


class Bytes:
    """A ring of four descriptors (three if so told), filled byte by byte."""

    def __init__(self, *features: int, size: int = SIZE) -> None:
        self.memory = GuestMemory([(0, 1 << 16)])
        self.kick = EventFd()
        bits = mask(VIRTIO_F_RING_PACKED, VIRTIO_F_INDIRECT_DESC, *features)
        config = QueueConfig(256, size, RING, DRIVER, DEVICE, True)
        self.queue = PackedQueue(self.memory, config, bits, 0, self.kick)

    def put(self, slot: int, addr: int, length: int, ident: int, flags: int, ring=RING) -> None:
        self.memory.write(ring + 16 * slot, struct.pack("<QIHH", addr, length, ident, flags))

    def get(self, slot: int) -> tuple[int, int, int]:
        """len, id and flags."""
        return struct.unpack("<IHH", self.memory.read(RING + 16 * slot + 8, 8))

    def wish(self, offset: int, wrap: int, flags: int) -> None:
        """The driver's event suppression structure."""
        self.memory.write(DRIVER, struct.pack("<HH", offset | wrap << 15, flags))

    def device_event(self) -> bytes:
        return self.memory.read(DEVICE, 4)

    def use(self, count: int, written: int = 1) -> bool:
        for _ in range(count):
            self.queue.add_used(self.queue.pop(), written)
        return self.queue.publish_used()

    def go_round(self, first_id: int = 0) -> None:
        """One round of single descriptors, with wrap counter 1."""
        for slot in range(SIZE):
            self.put(slot, DATA, 1, first_id, AVAIL_1 | WRITE)
            self.use(1)

    def close(self) -> None:
        self.kick.close()
        self.memory.close()


@pytest.fixture
def ring():
    ring = Bytes()
    yield ring
    ring.close()


@pytest.fixture
def event_ring():
    ring = Bytes(VIRTIO_F_EVENT_IDX)
    yield ring
    ring.close()


def test_a_ring_of_zeros_has_nothing(ring):
    assert ring.queue.pop() is None


def test_a_chain_of_two_with_its_id_in_the_last(ring):
    ring.put(0, DATA, 16, 0xFFFF, AVAIL_1 | NEXT)
    ring.put(1, DATA + 16, 512, 3, AVAIL_1 | WRITE)
    chain = ring.queue.pop()
    assert (chain.head, chain.slots) == (3, 2)
    assert chain.readable == [(DATA, 16)]
    assert chain.writable == [(DATA + 16, 512)]
    assert ring.queue.pop() is None


def test_the_used_descriptor_overwrites_the_first_of_the_chain(ring):
    ring.put(0, DATA, 16, 0xFFFF, AVAIL_1 | NEXT)
    ring.put(1, DATA + 16, 512, 3, AVAIL_1 | WRITE)
    second = ring.memory.read(RING + 16, 16)
    ring.use(1, 512)
    assert ring.get(0) == (512, 3, USED_1 | WRITE)
    assert ring.memory.read(RING + 16, 16) == second
    # The next one is two descriptors further on, for the driver too.
    ring.put(2, DATA, 1, 1, AVAIL_1)
    ring.use(1, 0)
    assert ring.get(2) == (0, 1, USED_1)


def test_the_wrap_counter_flips_at_the_end_of_the_ring_and_back(ring):
    ring.go_round()
    assert [ring.get(slot)[2] for slot in range(SIZE)] == [USED_1 | WRITE] * SIZE
    # In the second round, 1 in USED and 0 in AVAIL means available.
    assert ring.queue.pop() is None
    for slot in range(SIZE):
        ring.put(slot, DATA, 1, slot, AVAIL_0 | WRITE)
        ring.use(1)
        assert ring.get(slot) == (1, slot, USED_0 | WRITE)
    assert ring.queue.pop() is None
    ring.put(0, DATA, 9, 2, AVAIL_1 | WRITE)
    assert ring.queue.pop().writable == [(DATA, 9)]


def test_a_chain_across_the_end_of_the_ring_has_both_kinds_of_flags(ring):
    for slot in range(3):
        ring.put(slot, DATA, 1, 0, AVAIL_1)
        ring.use(1)
    ring.put(3, DATA, 5, 0xFFFF, AVAIL_1 | NEXT)
    ring.put(0, DATA + 5, 6, 0xFFFF, AVAIL_0 | NEXT | WRITE)
    ring.put(1, DATA + 11, 7, 2, AVAIL_0 | WRITE)
    chain = ring.queue.pop()
    assert chain.readable == [(DATA, 5)]
    assert chain.writable == [(DATA + 5, 6), (DATA + 11, 7)]
    ring.queue.add_used(chain, 13)
    ring.queue.publish_used()
    assert ring.get(3) == (13, 2, USED_1 | WRITE)
    ring.put(2, DATA, 1, 1, AVAIL_0)
    ring.use(1, 0)
    assert ring.get(2) == (0, 1, USED_0)


def test_a_size_that_is_no_power_of_two():
    ring = Bytes(size=3)
    for turn in range(10):
        available, used = ((AVAIL_1, USED_1), (AVAIL_0, USED_0))[turn // 3 % 2]
        ring.put(turn % 3, DATA, turn, 1, available)
        assert ring.queue.pop().readable_size == turn
        ring.queue.add_used(ring.queue.chain_in_flight(1), 0)
        ring.queue.publish_used()
        assert ring.get(turn % 3) == (0, 1, used)
    ring.close()


def test_returned_out_of_order_they_are_written_in_the_order_of_return(ring):
    ring.put(0, DATA, 1, 0xFFFF, AVAIL_1 | NEXT)
    ring.put(1, DATA, 1, 0, AVAIL_1 | WRITE)
    ring.put(2, DATA, 7, 1, AVAIL_1 | WRITE)
    first, second = ring.queue.pop(), ring.queue.pop()
    ring.queue.add_used(second, 7)
    ring.queue.publish_used()
    assert ring.get(0) == (7, 1, USED_1 | WRITE)
    ring.queue.add_used(first, 1)
    ring.queue.publish_used()
    assert ring.get(1) == (1, 0, USED_1 | WRITE)
    ring.put(3, DATA, 1, 1, AVAIL_1)
    assert ring.queue.pop().head == 1


def test_nothing_of_a_batch_shows_before_it_is_published(ring):
    for slot in range(3):
        ring.put(slot, DATA, 1, slot, AVAIL_1 | WRITE)
    before = ring.memory.read(RING, 64)
    for chain in ring.queue:
        ring.queue.add_used(chain, 1)
        assert ring.memory.read(RING, 64) == before
    ring.queue.publish_used()
    assert [ring.get(slot) for slot in range(3)] == [(1, i, USED_1 | WRITE) for i in range(3)]


def test_the_first_descriptor_of_a_batch_is_stored_last(ring):
    for slot in range(SIZE):
        ring.put(slot, DATA, 1, slot, AVAIL_1 | WRITE)
    stores = []
    used = ring.queue._used

    class Spy:
        def __setitem__(self, slot, word):
            stores.append(slot)
            used[slot] = word

    ring.queue._used = Spy()
    ring.use(SIZE)
    assert sorted(stores) == [0, 1, 2, 3]
    assert stores[-1] == 0


def test_indirect_tables_have_no_other_flag_than_write(ring):
    ring.put(0, DATA, 4, 0xAAAA, 0, ring=TABLE)
    # NEXT, INDIRECT, AVAIL and USED mean nothing in a table.
    ring.put(1, DATA + 4, 6, 0xBBBB, 0x8085, ring=TABLE)
    ring.put(2, DATA + 10, 8, 0xCCCC, 0x8080 | WRITE, ring=TABLE)
    ring.put(0, TABLE, 48, 2, AVAIL_1 | INDIRECT)
    chain = ring.queue.pop()
    assert (chain.head, chain.slots) == (2, 1)
    assert chain.readable == [(DATA, 4), (DATA + 4, 6)]
    assert chain.writable == [(DATA + 10, 8)]


def test_the_largest_ring_there_can_be():
    memory = GuestMemory([(0, 1 << 20)])
    with EventFd() as kick:
        config = QueueConfig(32768, 32768, 0, 0xF0000, 0xF0010, True)
        queue = PackedQueue(memory, config, 0, 0, kick)
        memory.write(0, struct.pack("<QIHH", DATA, 1, 32767, AVAIL_1) * 1)
        chain = queue.pop()
        assert chain.head == 32767
        queue.add_used(chain, 0)
        queue.publish_used()
        queue.enable_notification()
        state = queue.state()
        assert (state.next_avail, state.next_used) == (0x8001, 0x8001)
    memory.close()


# --- 2.8.10 Driver and Device Event Suppression --------------------------------------------------


def test_kicks_without_event_idx(ring):
    ring.queue.disable_notification()
    assert ring.device_event()[2:] == b"\1\0"  # RING_EVENT_FLAGS_DISABLE
    assert ring.queue.enable_notification() is False
    assert ring.device_event()[2:] == b"\0\0"  # RING_EVENT_FLAGS_ENABLE


@pytest.mark.parametrize(
    "used, expected",
    [(0, b"\x00\x80"), (3, b"\x03\x80"), (4, b"\0\0"), (6, b"\2\0"), (8, b"\0\x80")],
)
def test_kicks_with_event_idx_name_the_next_descriptor(event_ring, used, expected):
    for turn in range(used):
        event_ring.put(turn % 4, DATA, 1, 0, AVAIL_1 if turn < 4 else AVAIL_0)
        event_ring.use(1)
    event_ring.queue.disable_notification()
    assert event_ring.device_event()[2:] == b"\1\0"
    assert event_ring.queue.enable_notification() is False
    assert event_ring.device_event() == expected + b"\2\0"  # RING_EVENT_FLAGS_DESC


def test_what_is_left_in_the_ring_is_not_what_a_kick_is_asked_for(event_ring):
    for slot in range(3):
        event_ring.put(slot, DATA, 1, slot, AVAIL_1)
    assert event_ring.queue.enable_notification() is True
    assert event_ring.device_event() == b"\x03\x80\2\0"
    assert event_ring.queue.enable_notification() is False  # they count once


def test_kicks_when_the_whole_ring_is_left(event_ring):
    for slot in range(SIZE):
        event_ring.put(slot, DATA, 1, slot, AVAIL_1)
    assert event_ring.queue.enable_notification() is True
    # The one that the driver can fill next is the first, with the other wrap counter.
    assert event_ring.device_event() == b"\0\0\2\0"
    assert [chain.head for chain in event_ring.queue] == [0, 1, 2, 3]


@pytest.mark.parametrize("flags, wanted", [(0, True), (1, False), (2, True), (3, True)])
def test_interrupts_without_event_idx(ring, flags, wanted):
    """2 needs EVENT_IDX and 3 is reserved: neither loses an interrupt."""
    ring.wish(3, 1, flags)
    ring.put(0, DATA, 1, 0, AVAIL_1)
    assert ring.use(1) is wanted


@pytest.mark.parametrize("flags, wanted", [(0, True), (1, False), (3, True), (0xFFFC, True)])
def test_interrupts_with_event_idx_by_flags(event_ring, flags, wanted):
    event_ring.wish(3, 1, flags)
    event_ring.put(0, DATA, 1, 0, AVAIL_1)
    assert event_ring.use(1) is wanted


@pytest.mark.parametrize("begin", [0, 2, 3, 4, 7])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_interrupts_just_when_the_named_descriptor_is_used(begin, batch):
    for ahead in range(8):
        ring = Bytes(VIRTIO_F_EVENT_IDX)
        for turn in range(begin + batch):
            ring.wish(0, 1, 1)
            ring.put(turn % 4, DATA, 1, turn % 4, AVAIL_1 if turn // 4 % 2 == 0 else AVAIL_0)
            if turn < begin:
                ring.use(1)
        place = begin + ahead
        ring.wish(place % 4, 1 - place // 4 % 2, 2)
        assert ring.use(batch) is (ahead < batch), (begin, batch, ahead)
        ring.close()


def test_a_descriptor_in_the_middle_of_a_chain_may_be_named(event_ring):
    event_ring.wish(1, 1, 2)
    event_ring.put(0, DATA, 1, 0xFFFF, AVAIL_1 | NEXT)
    event_ring.put(1, DATA, 1, 0, AVAIL_1)
    assert event_ring.use(1) is True


def test_a_named_descriptor_that_does_not_exist_does_no_harm(event_ring):
    event_ring.wish(0x7FFF, 0, 2)
    event_ring.put(0, DATA, 1, 0, AVAIL_1)
    assert event_ring.use(1) in (True, False)


# --- 2.8.8 In-order use of descriptors -----------------------------------------------------------


def test_in_order_one_descriptor_stands_for_a_batch():
    ring = Bytes(VIRTIO_F_IN_ORDER)
    for slot in range(3):
        ring.put(slot, DATA, 4, slot, AVAIL_1 | WRITE)
    untouched = ring.memory.read(RING + 16, 48)
    ring.use(3, 4)
    assert ring.get(0) == (4, 2, USED_1 | WRITE)
    assert ring.memory.read(RING + 16, 48) == untouched
    ring.put(3, DATA, 4, 0, AVAIL_1 | WRITE)
    ring.use(1, 4)
    assert ring.get(3) == (4, 0, USED_1 | WRITE)
    ring.close()


def test_in_order_a_chain_that_was_not_filled_ends_a_batch():
    ring = Bytes(VIRTIO_F_IN_ORDER)
    for slot in range(4):
        ring.put(slot, DATA, 4, slot, AVAIL_1 | WRITE)
    for written in (4, 3, 4, 4):
        ring.queue.add_used(ring.queue.pop(), written)
    ring.queue.publish_used()
    assert ring.get(0) == (3, 1, USED_1 | WRITE)
    assert ring.get(2) == (4, 3, USED_1 | WRITE)
    ring.close()


def test_kicks_are_asked_for_where_the_ring_begins_again():
    """With EVENT_IDX, after the second round's last descriptor: at the third round's first."""
    ring = Bytes(VIRTIO_F_EVENT_IDX)
    for turn in range(2 * SIZE - 1):
        ring.put(turn % SIZE, DATA, 1, 0, WRITE | (AVAIL_1 if turn < SIZE else AVAIL_0))
        ring.use(1)
    ring.put(SIZE - 1, DATA, 1, 0, WRITE | AVAIL_0)
    assert ring.queue.enable_notification() is True
    assert ring.device_event() == struct.pack("<HH", 0 | 1 << 15, 2)
