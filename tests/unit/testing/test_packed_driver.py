"""The mock driver for packed rings against literal bytes: virtio 1.3, 2.8 Packed Virtqueues.

What a device does is done here by hand: bytes written into the ring. A descriptor is le64 address,
le32 length, le16 id, le16 flags; flags 0x80 is AVAIL, 0x8000 USED, 1 NEXT, 2 WRITE, 4 INDIRECT.
"""

from __future__ import annotations

import pytest

from pyvmm.memory import GuestMemory
from pyvmm.testing import (
    Arena,
    Buffer,
    Element,
    EventSuppression,
    MmioDriver,
    MockPackedDriver,
    PackedDesc,
    Used,
)

RING = 0x1000


@pytest.fixture
def memory():
    memory = GuestMemory([(0, 1 << 20)])
    yield memory
    memory.close()


@pytest.fixture
def make(memory):
    return lambda size=4, **options: MockPackedDriver(
        memory, size, arena=Arena(memory, RING), **options
    )


@pytest.fixture
def driver(make):
    return make()


def flags_of(memory, size=4):
    return [memory.read(RING + 16 * place + 14, 2).hex() for place in range(size)]


def use(memory, place, id, flags, written=0):
    """A device's writes when it uses a buffer: id, length, and last the flags."""
    memory.write(RING + 16 * place + 8, written.to_bytes(4, "little") + id.to_bytes(2, "little"))
    memory.write(RING + 16 * place + 14, flags.to_bytes(2, "little"))


def test_the_areas_lie_aligned_and_apart(driver, memory):
    assert (driver.desc_addr, driver.driver_addr, driver.device_addr) == (0x1000, 0x1040, 0x1044)
    assert memory.read(RING, 0x48) == bytes(0x48)  # 2.8.13: the ring is zero-initialized


def test_a_list_of_three_in_bytes(memory, driver):
    chain = driver.add([b"ab", Buffer(0x1_2345, 0x67)], [0x200])
    driver.publish()
    first, last = chain.readable[0].addr, chain.writable[0].addr
    assert memory.read(first, 2) == b"ab"
    assert memory.read(RING, 64) == (
        first.to_bytes(8, "little") + bytes.fromhex("02000000 ffff 8100")
        + bytes.fromhex("4523010000000000 67000000 ffff 8100")
        + last.to_bytes(8, "little") + bytes.fromhex("00020000 0000 8200")
        + bytes(16)
    )  # fmt: skip
    assert (chain.head, chain.descriptors) == (0, [0, 1, 2])


def test_nothing_is_available_before_publish(memory, driver):
    driver.add([b"a"], [1])
    assert flags_of(memory) == ["0000", "8200", "0000", "0000"]  # the first one's flags come last
    driver.add([b"b"])
    driver.publish()
    assert flags_of(memory) == ["8100", "8200", "8000", "0000"]
    assert memory.read(RING + 2 * 16 + 12, 2) == b"\1\0"  # the next id


def test_an_indirect_list_in_bytes(memory, driver):
    driver.add([b"a"], [1], indirect=True)
    driver.publish()
    table = int.from_bytes(memory.read(RING, 8), "little")
    assert memory.read(RING + 8, 8) == bytes.fromhex("20000000 0000 8400")
    # 2.8.7: WRITE is the only flag in a table, entries follow each other, ids mean nothing
    assert memory.read(table + 8, 8) == bytes.fromhex("01000000 ffff 0000")
    assert memory.read(table + 24, 8) == bytes.fromhex("01000000 ffff 0200")


def test_raw_descriptors_in_bytes(memory, driver):
    driver.add_raw([PackedDesc(0x0102030405060708, 0x0A0B0C0D, 0x1234, 0xABCD)])
    driver.publish()
    assert memory.read(RING, 16) == bytes.fromhex("0807060504030201 0d0c0b0a cdab b412")


def test_used_descriptors_in_bytes(memory, driver):
    first = driver.add([b"a"], [512])  # two descriptors
    second = driver.add([b"b"])
    driver.publish()
    assert driver.pop_used() is None
    # The second was ready first: used elements come in the order of completion (2.8).
    use(memory, 0, second.head, 0x8080, 0x777)
    assert driver.pop_used() == Used(second.head, 0)  # 2.8.4: no WRITE flag, no length
    assert driver.pop_used() is None
    # It had one descriptor, so the next used one is at 1.
    use(memory, 1, first.head, 0x8082, 0x100)
    assert driver.pop_used() == Used(first.head, 0x100)
    assert driver.pop_used() is None
    assert driver.outstanding == frozenset()
    assert driver.room == 4


def test_both_wrap_counters_over_three_rounds(memory, make):
    driver = make(3)  # 2.8.10.1: the size need not be a power of two
    # Lists of two in a ring of three: each round the wrap falls into another place.
    available, used = (0x80, 0x8000), (0x8080, 0x0000)
    place, wraps = 0, 0
    for _ in range(9):
        chain = driver.add([b"a"], [1])
        driver.publish()
        expected = {}
        for step in (0, 1):
            number = 3 * wraps + place + step
            expected[number % 3] = available[number // 3 % 2] | (1, 2)[step]
        assert {at: driver.read_desc(at).flags for at in expected} == expected
        assert chain.descriptors == list(expected)
        assert not driver.has_used()
        use(memory, place, chain.head, used[wraps % 2] | 2, 1)
        assert driver.pop_used() == Used(chain.head, 1)
        assert not driver.has_used()
        place += 2
        if place >= 3:
            place -= 3
            wraps += 1
    assert wraps == 6


def test_a_list_around_the_end_in_bytes(memory, driver):
    for _ in range(3):
        chain = driver.add([], [1])
        driver.publish()
        use(memory, chain.descriptors[0], chain.head, 0x8082, 1)
        driver.pop_used()
    assert driver.next_position == 0x8003
    chain = driver.add([b"a", b"b"], [1])
    driver.publish()
    assert chain.descriptors == [3, 0, 1]
    # 2.8.1: at 3 the counter is still 1, from 0 on it is 0: AVAIL clear, USED set
    assert flags_of(memory) == ["0180", "0280", "8280", "8100"]
    assert driver.next_position == 0x0002
    use(memory, 3, chain.head, 0x8082, 1)  # the device's own counter is 1 at 3 as well
    assert driver.pop_used() == Used(chain.head, 1)
    chain = driver.add([], [1])
    driver.publish()
    assert flags_of(memory)[2] == "0280"
    use(memory, 2, chain.head, 0x0002, 1)  # in the second round used is both bits clear
    assert driver.pop_used() == Used(chain.head, 1)


@pytest.mark.parametrize(
    "start, flags",
    [
        (0x8000, ["0000", "0000", "0000", "0000"]),
        (0x8002, ["8080", "8080", "0000", "0000"]),
        (0x0000, ["8080", "8080", "8080", "8080"]),
        (0x0003, ["0000", "0000", "0000", "8080"]),
    ],
)
def test_a_ring_that_goes_on_from_somewhere(memory, make, start, flags):
    driver = make(start_index=start)
    assert flags_of(memory) == flags
    assert driver.next_position == start
    assert not driver.has_used()
    driver.add([], [1])
    driver.publish()
    assert not driver.has_used()
    place = start & 0x7FFF
    assert flags_of(memory)[place] == ("8200" if start & 0x8000 else "0280")


def test_a_full_ring_takes_no_more(memory, driver):
    driver.add([b"a", b"b", b"c"])
    with pytest.raises(RuntimeError):
        driver.add([b"d"], [1])
    driver.publish()
    use(memory, 0, 0, 0x8080)
    driver.pop_used()
    driver.add([b"d"] * 4)


def test_ids_are_free_again_only_with_their_buffer(memory, driver):
    first, second = driver.add([b"a"]), driver.add([b"b"])
    driver.publish()
    use(memory, 0, second.head, 0x8080)
    driver.pop_used()
    third = driver.add([b"c"])
    assert third.head not in (first.head,)
    assert driver.outstanding == {first.head, third.head}


def test_scrambled_takes_ids_in_an_odd_order(driver):
    assert [driver.add([b"a"], scrambled=True).head for _ in range(4)] != [0, 1, 2, 3]


def test_contents_joins_the_writable_buffers(memory, driver):
    chain = driver.add([b"in"], [3, 2])
    memory.write(chain.writable[0].addr, b"abc")
    memory.write(chain.writable[1].addr, b"de")
    assert driver.contents(chain) == b"abcde"


def test_in_order_one_used_descriptor_ends_a_batch(memory, make):
    driver = make(8, in_order=True)
    chains = [driver.add([b"x"], [5]), driver.add([], [6]), driver.add([], [7])]
    driver.publish()
    # 2.8.8: the id of the last of the batch, at the place of its first
    use(memory, 0, chains[1].head, 0x8082, 2)
    assert [driver.pop_used(), driver.pop_used(), driver.pop_used()] == [
        Used(chains[0].head, 5), Used(chains[1].head, 2), None,
    ]  # fmt: skip
    use(memory, 3, chains[2].head, 0x8082, 7)
    assert driver.pop_used() == Used(chains[2].head, 7)


# --- event suppression: 2.8.10, 2.8.14 -----------------------------------------------------------


def test_the_drivers_event_suppression_in_bytes(memory, driver):
    assert memory.read(0x1040, 4) == bytes.fromhex("0000 0000")  # enabled
    driver.disable_interrupts()
    assert memory.read(0x1042, 2) == b"\1\0"
    driver.enable_interrupts()
    assert memory.read(0x1042, 2) == b"\0\0"
    driver.driver_event = EventSuppression(3, 1, 2)
    assert memory.read(0x1040, 4) == bytes.fromhex("0380 0200")
    driver.driver_event = EventSuppression(0x7FFF, 0, 3)
    assert memory.read(0x1040, 4) == bytes.fromhex("ff7f 0300")


def test_an_event_idx_driver_asks_for_the_next_buffer_it_takes(memory, make):
    driver = make(event_idx=True)
    assert memory.read(0x1040, 4) == bytes.fromhex("0080 0200")
    for expected in ("0280 0200", "0000 0200", "0200 0200", "0080 0200"):
        chain = driver.add([b"a"], [1])
        driver.publish()
        place = chain.descriptors[0]
        used = 0x8080 if driver.read_desc(place).flags & 0x80 else 0
        use(memory, place, chain.head, used | 2, 1)
        driver.pop_used()
        assert memory.read(0x1040, 4) == bytes.fromhex(expected)
    driver.want_interrupts = False
    chain = driver.add([], [1])
    driver.publish()
    use(memory, 0, chain.head, 0x8082, 1)
    driver.pop_used()
    assert memory.read(0x1040, 4) == bytes.fromhex("0080 0200")


def test_it_can_ask_for_the_interrupt_of_a_later_buffer(memory, make):
    driver = make(event_idx=True)
    driver.add([b"a"], [1, 1])
    driver.add([b"b"])
    driver.publish()
    driver.interrupt_after(2)
    assert memory.read(0x1040, 4) == bytes.fromhex("0380 0200")
    driver.interrupt_after(3)
    assert memory.read(0x1040, 4) == bytes.fromhex("0000 0200")


@pytest.mark.parametrize(
    "event_idx, device, wanted",
    [
        (False, "0000 0000", True),
        (False, "0000 0100", False),
        (False, "ffff 0000", True),
        (True, "0000 0000", True),
        (True, "0180 0100", False),
        (True, "0180 0200", False),  # before what was made available
        (True, "0280 0200", True),
        (True, "0380 0200", True),
        (True, "0000 0200", True),  # the list goes around the end
        (True, "0100 0200", False),  # the first that is not available yet
        (True, "0080 0200", False),  # the right place, in the round before
        (True, "0200 0200", False),
    ],
)
def test_whether_a_kick_is_wanted(memory, make, event_idx, device, wanted):
    driver = make(event_idx=event_idx)
    driver.add([b"a", b"a"])
    driver.publish()
    use(memory, 0, 0, 0x8080)
    driver.pop_used()
    memory.write(0x1044, bytes.fromhex(device))
    driver.add([b"a"], [1, 1])
    assert driver.publish() is wanted
    assert driver.device_wants_kicks is (device[5:] != "0100")


def test_publishing_nothing_needs_no_kick(driver):
    assert driver.publish() is False


def test_odd_elements_go_in_as_they_are(memory, driver):
    driver.add_elements([Element(1, 2, 0x40 | 1), Element(3, 4, 2)])
    driver.publish()
    assert memory.read(RING, 32) == bytes.fromhex(
        "0100000000000000 02000000 ffff c100 0300000000000000 04000000 0000 8200"
    )


def test_the_mmio_driver_lays_a_packed_queue_out(memory):
    writes = []
    values = {}

    class Registers:
        def read(self, offset, size):
            if offset == 0x010:
                return (1 << 34 | 1 << 32 | 1 << 29 | 1 << 35) >> 32 * values.get(0x014, 0) & (
                    0xFFFF_FFFF
                )
            if offset == 0x034:
                return 16 if values.get(0x030, 0) == 0 else 0
            return {0: 0x74726976, 4: 2}.get(offset, values.get(offset, 0))

        def write(self, offset, size, value):
            writes.append((offset, value))
            values[offset] = value

    driver = MmioDriver(Registers(), memory, arena=Arena(memory, RING), ring="packed")
    [queue] = driver.start()
    assert isinstance(queue, MockPackedDriver)
    assert queue.event_idx and not queue.in_order
    assert (0x020, 1 << 2 | 1 << 0) in writes  # RING_PACKED and VERSION_1 in the upper half
    assert writes[writes.index((0x080, 0x1000)) :][:7] == [
        (0x080, 0x1000), (0x084, 0), (0x090, 0x1100), (0x094, 0), (0x0A0, 0x1104), (0x0A4, 0),
        (0x044, 1),
    ]  # fmt: skip
    values.clear()
    split = MmioDriver(Registers(), memory, arena=Arena(memory, RING))
    assert not isinstance(split.start()[0], MockPackedDriver)
