"""Each MUST of virtio 1.3, 2.7 Split Virtqueues, that binds the device: one test, named after its
section, with the sentence in short."""

from __future__ import annotations

import pytest
from queue_rig import Rig

from pyvmm.testing import Desc
from pyvmm.testing.mock_driver import INDIRECT, NEXT, WRITE

BUFFER = 0x8000
TABLE = 0x9000


@pytest.fixture
def rig():
    rig = Rig(size=8)
    yield rig
    rig.close()


@pytest.fixture
def event_rig():
    rig = Rig(size=8, event_idx=True)
    yield rig
    rig.close()


def upper(rig: Rig) -> None:
    """A device that answers each chain with its input in capitals."""
    for chain in rig.queue:
        reader, writer = chain.reader(), chain.writer()
        writer.write(reader.read(reader.available).upper()[: writer.available])
        rig.queue.add_used(chain, writer.written)


def use_one(rig: Rig) -> bool:
    rig.driver.add([], [1])
    rig.driver.publish()
    rig.serve(1)
    return rig.queue.publish_used()


@pytest.mark.parametrize(
    "readable, writable",
    [
        ([b"message"], [7]),
        ([b"mess", b"age"], [1, 6]),
        ([b"m", b"e", b"s", b"sage"], [3, 4]),
        ([b"", b"message", b""], [0, 7]),
    ],
)
@pytest.mark.parametrize("indirect", [False, True])
def test_2_7_4_1_no_assumptions_about_the_arrangement_of_descriptors(
    rig, readable, writable, indirect
):
    """2.7.4.1 Device Requirements: Message Framing"""
    chain = rig.driver.add(readable, writable, indirect=indirect)
    rig.driver.publish()
    upper(rig)
    rig.queue.publish_used()
    assert rig.driver.contents(chain) == b"MESSAGE"
    assert rig.driver.pop_used() == (chain.head, 7)


def test_2_7_5_1_no_write_to_a_device_readable_buffer(rig):
    """2.7.5.1 Device Requirements: The Virtqueue Descriptor Table"""
    chain = rig.driver.add([b"read", b"only"], [8])
    rig.driver.publish()
    taken = rig.queue.pop()
    for view in taken.readable_views() + taken.reader().take(8):
        assert view.readonly
    rig.queue.step_back()
    upper(rig)
    assert b"".join(rig.memory.read(*part) for part in chain.readable) == b"readonly"


@pytest.mark.parametrize("indirect", [False, True])
def test_2_7_5_1_no_write_to_any_descriptor_table_entry(rig, indirect):
    """2.7.5.1 Device Requirements: The Virtqueue Descriptor Table"""
    for _ in range(3):
        chain = rig.driver.add([b"in"], [2], indirect=indirect)
        rig.driver.publish()
        table = rig.memory.read(rig.driver.desc_addr, 16 * 8)
        # An indirect table was allocated behind its buffers.
        second = rig.memory.read(chain.writable[0].addr + 16, 32)
        upper(rig)
        rig.queue.publish_used()
        rig.queue.enable_notification()
        rig.driver.pop_used()
        assert rig.memory.read(rig.driver.desc_addr, 16 * 8) == table
        assert rig.memory.read(chain.writable[0].addr + 16, 32) == second


def test_2_7_5_3_2_write_is_ignored_on_a_descriptor_that_refers_to_a_table(rig):
    """2.7.5.3.2 Device Requirements: Indirect Descriptors"""
    rig.memory.write(BUFFER, b"ab")
    rig.driver.write_table(TABLE, [Desc(BUFFER, 2, NEXT, 1), Desc(BUFFER + 2, 2, WRITE)])
    rig.driver.add_raw([Desc(TABLE, 32, INDIRECT | WRITE)])
    rig.driver.publish()
    upper(rig)
    assert rig.memory.read(BUFFER, 4) == b"abAB"


@pytest.mark.parametrize("direct", [0, 1, 3])
def test_2_7_5_3_2_direct_descriptors_may_come_before_an_indirect_one(rig, direct):
    """2.7.5.3.2 Device Requirements: Indirect Descriptors"""
    rig.memory.write(BUFFER, b"xyz" + b"t")
    rig.driver.write_table(TABLE, [Desc(BUFFER + 3, 1, NEXT, 1), Desc(BUFFER + 8, 4, WRITE)])
    prefix = [Desc(BUFFER + i, 1, NEXT, i + 1) for i in range(direct)]
    rig.driver.add_raw([*prefix, Desc(TABLE, 32, INDIRECT)])
    rig.driver.publish()
    upper(rig)
    assert rig.memory.read(BUFFER + 8, direct + 1) == b"XYZ"[:direct] + b"T"


@pytest.mark.parametrize("used_event", [0, 1, 0x7FFF, 0xFFFF])
def test_2_7_7_2_used_event_is_ignored_without_event_idx(rig, used_event):
    """2.7.7.2 Device Requirements: Used Buffer Notification Suppression"""
    rig.driver.used_event = used_event
    assert use_one(rig) is True
    rig.driver.avail_flags = 1
    assert use_one(rig) is False


def test_2_7_7_2_flags_0_get_a_notification(rig):
    """2.7.7.2: if flags is 0, the device MUST send a notification."""
    assert [use_one(rig) for _ in range(4)] == [True] * 4


@pytest.mark.parametrize("flags", [0, 1])
def test_2_7_7_2_the_lower_bit_of_flags_is_ignored_with_event_idx(event_rig, flags):
    """2.7.7.2 Device Requirements: Used Buffer Notification Suppression"""
    rig = event_rig
    rig.driver.avail_flags = flags
    rig.driver.used_event = 1
    assert [use_one(rig) for _ in range(3)] == [False, True, False]


@pytest.mark.parametrize("start", [0, 41, 0xFFFF])
def test_2_7_7_2_a_notification_when_the_index_was_used_event(start):
    """2.7.7.2: if idx was equal to used_event, the device MUST send a notification."""
    rig = Rig(size=8, event_idx=True, start=start)
    rig.driver.used_event = start
    assert use_one(rig) is True
    rig.close()


def test_2_7_8_2_len_is_set_before_the_used_index(rig):
    """2.7.8.2 Device Requirements: The Virtqueue Used Ring"""
    chain = rig.driver.add([], [9])
    rig.driver.publish()
    rig.queue.add_used(rig.queue.pop(), 9)
    element = rig.memory.read(rig.driver.used_addr + 4, 8)
    assert element == chain.head.to_bytes(4, "little") + b"\x09\0\0\0"
    assert rig.driver.used_idx == 0
    rig.queue.publish_used()
    assert rig.driver.used_idx == 1


def test_2_7_8_2_at_least_len_bytes_are_written_before_the_used_index(rig):
    """2.7.8.2 Device Requirements: The Virtqueue Used Ring"""
    chain = rig.driver.add([b"abcd"], [1, 8])
    rig.driver.publish()
    upper(rig)
    assert rig.driver.used_idx == 0
    content = rig.driver.contents(chain)
    rig.queue.publish_used()
    assert content[: rig.driver.pop_used().written] == b"ABCD"


def test_2_7_10_2_flags_are_0_or_1_without_event_idx(rig):
    """2.7.10.2 Device Requirements: Available Buffer Notification Suppression"""
    seen = []
    for step in (rig.queue.disable_notification, rig.queue.enable_notification) * 2:
        step()
        seen.append(rig.driver.used_flags)
    assert seen == [1, 0, 1, 0]


def test_2_7_10_2_flags_are_0_with_event_idx(event_rig):
    """2.7.10.2 Device Requirements: Available Buffer Notification Suppression"""
    rig = event_rig
    # A driver that forgot to clear them (2.7.10.1 wants them 0) must still read 0 in the end.
    rig.memory.write(rig.driver.used_addr, b"\1\0")
    rig.queue.enable_notification()
    assert rig.driver.used_flags == 0
    rig.queue.disable_notification()
    assert rig.driver.used_flags == 0


@pytest.mark.parametrize("event_idx", [False, True])
def test_2_7_10_2_notifications_without_a_reason_are_harmless(event_idx):
    """2.7.10.2: the device MUST handle spurious notifications from the driver."""
    rig = Rig(size=8, event_idx=event_idx)
    for _ in range(5):  # what a worker does on a kick
        rig.queue.disable_notification()
        assert rig.serve() == 0
        assert rig.queue.publish_used() is False
        assert rig.queue.enable_notification() is False
    assert use_one(rig) is True
    rig.close()
