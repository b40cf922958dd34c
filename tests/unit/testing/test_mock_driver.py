"""The mock driver against literal bytes: what it writes is what the specification draws."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pyvmm.testing
from pyvmm.memory import GuestMemory
from pyvmm.testing import Arena, Buffer, Desc, DriverTimeout, MmioDriver, MockSplitDriver, Used
from pyvmm.testing import mmio_driver as mmio_module


@pytest.fixture
def memory():
    memory = GuestMemory([(0, 1 << 20)])
    yield memory
    memory.close()


@pytest.fixture
def driver(memory):
    return MockSplitDriver(memory, 4, arena=Arena(memory, 0x1000))


def test_it_does_not_use_the_code_that_it_tests():
    for path in Path(pyvmm.testing.__file__).parent.glob("*.py"):
        if path.name == "attached.py":  # joins the two sides, and makes no claims of its own
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.startswith("pyvmm.virtio") for name in names), path


def test_the_parts_lie_aligned_and_apart(driver):
    # 4 descriptors of 16 bytes; flags, idx, 4 heads, used_event; flags, idx, 4 pairs, avail_event
    assert driver.desc_addr == 0x1000
    assert driver.avail_addr == 0x1040
    assert driver.used_addr == 0x1050  # 0x1040 + 14, rounded up to a multiple of 4
    assert driver.arena.next == 0x1050 + 4 + 8 * 4 + 2


def test_a_chain_of_three_in_bytes(memory, driver):
    chain = driver.add([b"ab", Buffer(0x1_2345, 0x67)], [0x200])
    assert memory.read(chain.readable[0].addr, 2) == b"ab"
    first, last = chain.readable[0].addr, chain.writable[0].addr
    assert memory.read(0x1000, 48) == (
        first.to_bytes(8, "little") + bytes([2, 0, 0, 0, 1, 0, 1, 0])
        + bytes([0x45, 0x23, 1, 0, 0, 0, 0, 0]) + bytes([0x67, 0, 0, 0, 1, 0, 2, 0])
        + last.to_bytes(8, "little") + bytes([0, 2, 0, 0, 2, 0, 0, 0])
    )  # fmt: skip
    assert chain.descriptors == [0, 1, 2]


def test_an_indirect_chain_in_bytes(memory, driver):
    driver.add([b"a"], [1], indirect=True)
    pointer = memory.read(0x1000, 16)
    table = int.from_bytes(pointer[:8], "little")
    assert pointer[8:] == bytes([32, 0, 0, 0, 4, 0, 0, 0])
    assert memory.read(table + 8, 8) == bytes([1, 0, 0, 0, 1, 0, 1, 0])
    assert memory.read(table + 24, 8) == bytes([1, 0, 0, 0, 2, 0, 0, 0])


def test_raw_descriptors_in_bytes(memory, driver):
    driver.add_raw([Desc(0x0102030405060708, 0x0A0B0C0D, 0xABCD, 0x1234)], at=2)
    assert memory.read(0x1020, 16) == bytes.fromhex("0807060504030201 0d0c0b0a cdab 3412")
    assert memory.read(0x1044, 2) == b"\2\0"


def test_the_available_ring_in_bytes(memory, driver):
    driver.add([b"a"])
    driver.add([b"b"])
    assert memory.read(0x1040, 14) == bytes([0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    driver.publish()
    driver.avail_flags = 1
    driver.used_event = 0x1234
    assert memory.read(0x1040, 14) == bytes([1, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0x34, 0x12])
    driver.avail_idx = 0xFFFE
    assert memory.read(0x1042, 2) == b"\xfe\xff"


def test_the_used_ring_in_bytes(memory, driver):
    assert driver.pop_used() is None
    memory.write(0x1050, bytes.fromhex("0100 0200 03000000 00010000 01000000 ffffffff"))
    memory.write(0x1050 + 36, b"\x78\x56")
    assert (driver.used_flags, driver.used_idx, driver.avail_event) == (1, 2, 0x5678)
    assert driver.pop_used() == Used(3, 0x100)
    assert driver.pop_used() == Used(1, 0xFFFF_FFFF)
    assert driver.pop_used() is None


def test_descriptors_come_back_with_their_used_element(memory, driver):
    driver.add([b"a"] * 3)
    with pytest.raises(RuntimeError):
        driver.add([b"b"] * 2)
    memory.write(0x1050, bytes.fromhex("0000 0100 00000000 00000000"))
    driver.pop_used()
    driver.add([b"b"] * 4)


def test_contents_joins_the_writable_buffers(memory, driver):
    chain = driver.add([b"in"], [3, 2])
    memory.write(chain.writable[0].addr, b"abc")
    memory.write(chain.writable[1].addr, b"de")
    assert driver.contents(chain) == b"abcde"


def test_whether_a_kick_is_wanted_without_event_idx(memory, driver):
    driver.add([b"a"])
    assert driver.publish() is True
    memory.write(0x1050, b"\1\0")
    driver.add([b"a"])
    assert driver.publish() is False


@pytest.mark.parametrize(
    "start, added, event, wanted",
    [
        (0, 1, 0, True), (0, 1, 1, False), (0, 3, 2, True), (0, 3, 3, False),
        (0, 1, 0xFFFF, False), (0xFFFF, 1, 0xFFFF, True), (0xFFFE, 4, 1, True),
        (0xFFFE, 4, 2, False), (0xFFFE, 4, 0xFFFD, False),
    ],
)  # fmt: skip
def test_whether_a_kick_is_wanted_with_event_idx(memory, start, added, event, wanted):
    driver = MockSplitDriver(
        memory, 4, arena=Arena(memory, 0x1000), event_idx=True, start_index=start
    )
    memory.write(0x1050 + 36, event.to_bytes(2, "little"))
    for _ in range(added):
        driver.offer(0)
    assert driver.publish() is wanted


def test_an_event_idx_driver_asks_for_the_next_buffer_it_takes(memory):
    driver = MockSplitDriver(memory, 4, arena=Arena(memory, 0x1000), event_idx=True)
    memory.write(0x1050, bytes.fromhex("0000 0200"))
    driver.pop_used()
    assert driver.used_event == 1
    driver.want_interrupts = False
    driver.pop_used()
    assert driver.used_event == 1


def test_an_arena_ends_where_it_ends(memory):
    arena = Arena(memory, 0x1000, 0x1010)
    assert arena.alloc(1) == 0x1000
    assert arena.alloc(2, 4) == 0x1004
    with pytest.raises(MemoryError):
        arena.alloc(16)


class FakeDevice:
    """Registers that remember the writes; features and the queue's size are fixed."""

    def __init__(self, offered, queue_size=16):
        self.offered = offered
        self.queue_size = queue_size
        self.writes = []
        self.values = {}

    def read(self, offset, size):
        assert size == 4 or offset >= 0x100
        if offset == 0x000:
            return 0x74726976
        if offset == 0x004:
            return 2
        if offset == 0x010:
            return self.offered >> 32 * self.values.get(0x014, 0) & 0xFFFF_FFFF
        if offset == 0x034:
            return self.queue_size if self.values.get(0x030, 0) == 0 else 0
        if offset >= 0x100:
            return offset & 0xFF
        return self.values.get(offset, 0)

    def write(self, offset, size, value):
        assert size == 4
        self.writes.append((offset, value))
        self.values[offset] = value


def test_initialisation_writes_the_registers_in_the_order_of_the_specification(memory):
    device = FakeDevice(1 << 32 | 1 << 29)
    driver = MmioDriver(device, memory, arena=Arena(memory, 0x1000))
    (queue,) = driver.start()
    assert queue.event_idx and queue.size == 16
    assert device.writes == [
        (0x070, 0), (0x070, 1), (0x070, 3),
        (0x014, 0), (0x014, 1),
        (0x024, 0), (0x020, 1 << 29), (0x024, 1), (0x020, 1),
        (0x070, 11),
        (0x030, 0), (0x030, 0), (0x038, 16),
        (0x080, 0x1000), (0x084, 0), (0x090, 0x1100), (0x094, 0), (0x0A0, 0x1128), (0x0A4, 0),
        (0x044, 1),
        (0x030, 1),
        (0x070, 15),
    ]  # fmt: skip
    driver.kick(0)
    assert device.writes[-1] == (0x050, 0)
    assert driver.config(2, 3) == bytes([2, 3, 4])


def test_a_refusal_of_features_is_an_error(memory):
    device = FakeDevice(0)
    device.write = lambda offset, size, value: None
    with pytest.raises(AssertionError, match="refused"):
        MmioDriver(device, memory).negotiate()


def test_a_device_that_hangs_fails_with_a_dump(memory, monkeypatch):
    monkeypatch.setattr(mmio_module, "SAFETY_TIMEOUT", 0.0)
    driver = MmioDriver(FakeDevice(1 << 32), memory)
    driver.start()
    with pytest.raises(DriverTimeout, match=r"(?s)queue 0 to return.*status 0xf.*queue of 16"):
        driver.request(0, [b"x"])
