"""The split virtqueue with a driver that keeps the rules."""

from __future__ import annotations

import struct

import pytest
from queue_rig import Rig

from pyvmm.testing import Used


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


def test_row25_order_is_kept_where_the_indices_wrap():
    rig = Rig(size=4, start=65534)
    for turn in range(9):
        chain = rig.driver.add([bytes([turn])], [1])
        rig.driver.publish()
        taken = rig.queue.pop()
        assert taken.reader().read(1) == bytes([turn])
        rig.queue.add_used(taken, turn)
        rig.queue.publish_used()
        assert rig.driver.pop_used() == Used(chain.head, turn)
    assert rig.driver.used_idx == (65534 + 9) % 65536
    rig.close()


# --- interrupts: 2.7.7 Used Buffer Notification Suppression --------------------------------------


def serve_one(rig):
    rig.driver.add([], [1])
    rig.driver.publish()
    rig.serve(1)
    notify = rig.queue.publish_used()
    rig.driver.pop_used()
    return notify


def test_row38_flags_of_the_driver_decide_without_event_idx(rig):
    assert serve_one(rig) is True
    rig.driver.avail_flags = 1
    assert serve_one(rig) is False
    rig.driver.avail_flags = 0
    assert serve_one(rig) is True


@pytest.mark.parametrize("start", [0, 65530])
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("ahead", [-3, -1, 0, 1, 4, 7, 8, 0x7FFF, 0x8000])
def test_row38_an_interrupt_just_when_used_event_lies_in_the_batch(start, batch, ahead):
    rig = Rig(size=8, event_idx=True, start=start)
    rig.driver.want_interrupts = False
    rig.driver.used_event = (start + ahead) & 0xFFFF
    for _ in range(batch):
        rig.driver.add([], [1])
    rig.driver.publish()
    assert rig.serve(1) == batch
    assert rig.queue.publish_used() is (0 <= ahead < batch)
    rig.close()


def test_row38_arbitrary_used_event_loses_no_interrupt_over_many_batches():
    rig = Rig(size=8, event_idx=True, start=65500)
    rig.driver.want_interrupts = False
    position = 65500
    for batch in [3, 1, 8, 5, 2, 7, 8, 8, 1, 6]:
        event = position + (batch * 5) % 9  # sometimes in the batch, sometimes after it
        rig.driver.used_event = event & 0xFFFF
        for _ in range(batch):
            rig.driver.add([], [1])
        rig.driver.publish()
        rig.serve(1)
        assert rig.queue.publish_used() is (event < position + batch)
        while rig.driver.pop_used():
            pass
        position += batch
    rig.close()


# --- kicks: 2.7.10 Available Buffer Notification Suppression --------------------------------------


def test_kicks_are_suppressed_by_flags(rig):
    rig.queue.disable_notification()
    assert rig.driver.used_flags == 1
    rig.driver.add([b"x"])
    assert rig.driver.publish() is False
    rig.serve()
    assert rig.queue.enable_notification() is False
    assert rig.driver.used_flags == 0
    rig.driver.add([b"x"])
    assert rig.driver.publish() is True


def test_kicks_are_suppressed_by_avail_event(event_rig):
    rig = event_rig
    rig.driver.add([b"x"])
    assert rig.driver.publish() is True  # avail_event starts at 0
    rig.queue.disable_notification()
    rig.driver.add([b"x"])
    assert rig.driver.publish() is False
    assert rig.serve() == 2
    assert rig.queue.enable_notification() is False
    rig.driver.add([b"x"])
    assert rig.driver.publish() is True


# --- 2.7.9 In-order use of descriptors -----------------------------------------------------------


def test_in_order_one_used_element_stands_for_a_batch():
    rig = Rig(size=8, in_order=True)
    heads = [rig.driver.add([], [4]).head for _ in range(5)]
    rig.driver.publish()
    # The third was not filled, so its length has to be told: the first batch ends there.
    for written in (4, 4, 3, 4, 4):
        rig.queue.add_used(rig.queue.pop(), written)
    assert rig.driver.used_idx == 0
    rig.queue.publish_used()
    assert rig.driver.used_idx == 5
    ring = struct.unpack("<10I", rig.memory.read(rig.driver.used_addr + 4, 40))
    assert ring == (heads[2], 3, 0, 0, 0, 0, heads[4], 4, 0, 0)
    rig.close()


def test_a_journal_hears_of_each_chain_that_is_taken_and_given_back():
    class Journal:
        def __init__(self):
            self.heard = []

        def taken(self, head):
            self.heard.append(("taken", head))

        def given_back(self, head):
            self.heard.append(("given back", head))

        def publishing(self, heads):
            self.heard.append(("publishing", *heads))

        def published(self, heads, position):
            self.heard.append(("published", *heads, position))

    rig, journal = Rig(8), Journal()
    rig.queue.keep_journal(journal, [])
    heads = [rig.driver.add([], [1]).head for _ in range(2)]
    rig.driver.publish()
    rig.queue.pop()
    rig.queue.step_back()
    assert journal.heard == [("taken", heads[0]), ("given back", heads[0])]
    journal.heard.clear()
    assert rig.serve(1) == 2
    rig.queue.publish_used()
    assert journal.heard == [
        *(("taken", head) for head in heads), ("publishing", *heads), ("published", *heads, 2),
    ]  # fmt: skip
    journal.heard.clear()
    later = rig.driver.add([], [1]).head
    rig.driver.publish()
    assert rig.serve(1) == 1
    rig.queue.publish_used()
    # Of the batch before, nothing: its heads may be in flight once more.
    assert journal.heard == [("taken", later), ("publishing", later), ("published", later, 3)]
    journal.heard.clear()
    usual = rig.driver.add([bytes(16)], [512, 1]).head
    rig.driver.publish()
    assert len(rig.queue.peek_usual(16, 1, 1 << 20)[0]) == 1
    rig.queue.use_peeked([513])
    rig.queue.publish_used()
    assert journal.heard == [("publishing", usual), ("published", usual, 4)]
    journal.heard.clear()
    assert len(rig.all_used()) == 4
    usual = rig.driver.add([bytes(16)], [512, 1]).head
    heads = [rig.driver.add([], [1]).head for _ in range(2)]
    rig.driver.publish()
    rig.queue.peek_usual(16, 1, 512)
    rig.queue.use_peeked([513])
    assert len(list(rig.queue)) == 2
    # What stands in front of them in the ring, once.
    assert journal.heard == [("taken", head) for head in (usual, *heads)]
    rig.close()
