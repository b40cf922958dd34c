"""The split virtqueue with a driver that keeps the rules."""

from __future__ import annotations

import pytest
from queue_rig import Rig

from pyvmm.errors import DriverError
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


def test_chains_come_in_the_order_in_which_they_were_offered(rig):
    chains = [rig.driver.add([bytes([i])]) for i in range(5)]
    rig.driver.publish()
    assert [chain.head for chain in rig.queue] == [chain.head for chain in chains]
    assert rig.queue.pop() is None


def test_chains_that_are_not_published_are_not_seen(rig):
    rig.driver.add([b"x"])
    assert rig.queue.pop() is None
    rig.driver.publish()
    assert rig.queue.pop() is not None


def test_used_elements_show_at_publish_and_all_at_once(rig):
    chains = [rig.driver.add([], [16]) for _ in range(3)]
    rig.driver.publish()
    for written, chain in enumerate(rig.queue):
        rig.queue.add_used(chain, written)
        assert rig.driver.used_idx == 0
    rig.queue.publish_used()
    assert [rig.driver.pop_used() for _ in range(3)] == [
        Used(chain.head, written) for written, chain in enumerate(chains)
    ]


def test_chains_may_be_returned_in_another_order(rig):
    first, second = rig.driver.add([], [1]), rig.driver.add([], [2])
    rig.driver.publish()
    taken = list(rig.queue)
    rig.queue.add_used(taken[1], 2)
    rig.queue.add_used(taken[0], 1)
    rig.queue.publish_used()
    assert [rig.driver.pop_used().head for _ in range(2)] == [second.head, first.head]


def test_used_lengths_of_up_to_32_bits_arrive(rig):
    rig.driver.add([], [1])
    rig.driver.publish()
    rig.queue.add_used(rig.queue.pop(), 0xFFFF_FFFF)
    rig.queue.publish_used()
    assert rig.driver.pop_used().written == 0xFFFF_FFFF


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


def test_row25_a_full_ring_across_the_wrap():
    rig = Rig(size=8, start=65532)
    heads = [rig.driver.add([b"x"]).head for _ in range(8)]
    rig.driver.publish()
    assert [chain.head for chain in rig.queue] == heads
    rig.close()


def test_a_queue_of_one_descriptor_goes_round():
    rig = Rig(size=1)
    for _ in range(3):
        rig.driver.add([], [4])
        rig.driver.publish()
        assert rig.serve(4) == 1
        rig.queue.publish_used()
        assert rig.driver.pop_used() == Used(0, 4)
    rig.close()


def test_iteration_is_bounded_by_the_size_though_the_driver_refills(rig):
    for _ in range(8):
        rig.driver.add([], [1])
    rig.driver.publish()
    count = 0
    for chain in rig.queue:
        rig.queue.add_used(chain, 1)
        rig.queue.publish_used()
        rig.driver.pop_used()
        rig.driver.add([], [1])
        rig.driver.publish()
        count += 1
    assert count == 8
    assert rig.queue.enable_notification()  # the rest is announced


def test_halt_ends_an_iteration_after_the_chain_at_hand(rig):
    for _ in range(3):
        rig.driver.add([], [1])
    rig.driver.publish()
    for chain in rig.queue:
        rig.queue.halt = True
        rig.queue.add_used(chain, 1)
    rig.queue.publish_used()
    assert rig.driver.used_idx == 1
    rig.queue.halt = False
    assert rig.serve() == 2


def test_step_back_makes_the_same_chain_available_again(rig):
    first, second = rig.driver.add([b"1"]), rig.driver.add([b"2"])
    rig.driver.publish()
    rig.queue.pop()
    rig.queue.step_back()
    assert [chain.head for chain in rig.queue] == [first.head, second.head]


def test_step_back_at_the_wrap():
    rig = Rig(size=2, start=0xFFFF)
    chain = rig.driver.add([b"1"])
    rig.driver.publish()
    assert rig.queue.pop().head == chain.head
    rig.queue.step_back()
    assert rig.queue.pop().head == chain.head
    rig.close()


def test_step_back_only_undoes_one_pop_that_was_not_returned(rig):
    with pytest.raises(ValueError):
        rig.queue.step_back()
    rig.driver.add([b"1"])
    rig.driver.publish()
    chain = rig.queue.pop()
    rig.queue.add_used(chain, 0)
    with pytest.raises(ValueError):
        rig.queue.step_back()


def test_a_chain_is_returned_once(rig):
    rig.driver.add([b"1"])
    rig.driver.publish()
    chain = rig.queue.pop()
    rig.queue.add_used(chain, 0)
    with pytest.raises(ValueError):
        rig.queue.add_used(chain, 0)
    rig.queue.publish_used()
    assert rig.driver.used_idx == 1


@pytest.mark.parametrize("operation", ["pop", "iterate", "publish", "disable", "enable"])
def test_row18_a_stopped_queue_touches_no_ring(rig, operation):
    rig.driver.add([], [4])
    rig.driver.add([], [4])
    rig.driver.publish()
    chain = rig.queue.pop()
    rig.queue.ready = False
    before = rig.snapshot()
    if operation == "pop":
        assert rig.queue.pop() is None  # though the second chain was seen already
    elif operation == "iterate":
        assert list(rig.queue) == []
    elif operation == "publish":
        rig.queue.add_used(chain, 4)
        assert rig.queue.publish_used() is False
    elif operation == "disable":
        rig.queue.disable_notification()
    else:
        assert rig.queue.enable_notification() is False
    assert rig.snapshot() == before


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


def test_nothing_used_is_nothing_to_tell(rig, event_rig):
    assert rig.queue.publish_used() is False
    assert event_rig.queue.publish_used() is False


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


@pytest.mark.parametrize("event_idx", [False, True])
def test_what_came_while_kicks_were_off_is_announced(event_idx):
    rig = Rig(size=8, event_idx=event_idx)
    rig.queue.disable_notification()
    assert rig.serve() == 0
    rig.driver.add([b"raced in"])
    rig.driver.publish()
    assert rig.queue.enable_notification() is True
    assert rig.serve() == 1
    assert rig.queue.enable_notification() is False
    rig.close()


@pytest.mark.parametrize("event_idx", [False, True])
def test_chains_left_on_purpose_are_announced_once(event_idx):
    rig = Rig(size=8, event_idx=event_idx)
    rig.driver.add([], [1])
    rig.driver.publish()
    rig.queue.pop()
    rig.queue.step_back()
    assert rig.queue.enable_notification() is True
    rig.queue.pop()
    rig.queue.step_back()
    assert rig.queue.enable_notification() is False
    rig.driver.add([], [1])
    assert rig.driver.publish() is True  # the news still kicks
    assert rig.queue.enable_notification() is True
    assert rig.serve() == 2
    rig.close()


def test_a_stepped_back_chain_is_found_when_its_time_comes(rig):
    """CVE-2020-16843: a receive queue must go on after it was starved."""
    chain = rig.driver.add([], [1])
    rig.driver.publish()
    for _ in range(5):
        assert rig.queue.pop().head == chain.head
        rig.queue.step_back()
        rig.queue.enable_notification()
    assert rig.serve(1) == 1
    rig.queue.publish_used()
    assert rig.driver.pop_used() == Used(chain.head, 1)


# --- indirect descriptors ------------------------------------------------------------------------


def test_an_indirect_table_is_walked(rig):
    given = rig.driver.add([b"header", b"data"], [512, 1], indirect=True)
    rig.driver.publish()
    chain = rig.queue.pop()
    assert chain.head == given.head
    assert chain.readable == given.readable
    assert chain.writable == given.writable


def test_an_indirect_chain_may_be_as_long_as_the_queue(rig):
    rig.driver.add([b"x"] * 8, indirect=True)
    rig.driver.publish()
    assert len(rig.queue.pop().readable) == 8


def test_a_direct_chain_may_be_as_long_as_the_queue(rig):
    rig.driver.add([b"x"] * 4, [1] * 4)
    rig.driver.publish()
    chain = rig.queue.pop()
    assert (chain.readable_size, chain.writable_size) == (4, 4)


# --- state ---------------------------------------------------------------------------------------


def test_a_queue_goes_on_from_its_state(rig):
    for _ in range(3):
        rig.driver.add([], [1])
    rig.driver.publish()
    rig.serve(1)
    rig.queue.publish_used()
    state = rig.queue.state()
    assert (state.next_avail, state.next_used, state.in_flight) == (3, 3, ())
    last = rig.driver.add([], [1])
    rig.driver.publish()
    again = type(rig.queue).from_state(rig.memory, state, rig.features, 0, rig.kick)
    assert [chain.head for chain in again] == [last.head]


def test_chains_in_flight_are_part_of_the_state(rig):
    rig.driver.add([b"first"], [1])
    second = rig.driver.add([b"second"], [1])
    rig.driver.publish()
    first, _ = list(rig.queue)
    rig.queue.add_used(first, 0)
    rig.queue.publish_used()
    state = rig.queue.state()
    assert [chain.head for chain in state.in_flight] == [second.head]
    again = type(rig.queue).from_state(rig.memory, state, rig.features, 0, rig.kick)
    assert again.pop() is None
    chain = again.chain_in_flight(second.head)
    assert chain.reader().read(6) == b"second"
    again.add_used(chain, 1)
    again.publish_used()
    assert rig.driver.used_idx == 2
    with pytest.raises(ValueError):
        again.chain_in_flight(second.head)


def test_a_restored_queue_refuses_an_available_index_that_is_too_far_ahead(rig):
    state = rig.queue.state()
    rig.driver.avail_idx = 9
    with pytest.raises(DriverError):
        type(rig.queue).from_state(rig.memory, state, rig.features, 0, rig.kick)
