"""Buffers taken and returned many at a time: what `pop` would refuse is not taken."""

from __future__ import annotations

import pytest
from queue_rig import HOLE_END, RAM, Rig

from pyvmm.errors import DriverError
from pyvmm.testing import Buffer, Desc
from pyvmm.testing.mock_driver import INDIRECT, NEXT, WRITE

DATA = 0x8000


@pytest.fixture
def rig():
    rig = Rig(size=8, event_idx=True)
    yield rig
    rig.close()


def taken(rig, wanted=1 << 20, most=64, least=1):
    views = []
    heads = rig.queue.pop_buffers(views, wanted, most, least)
    assert len(views) == len(heads)
    return heads, views


def test_buffers_come_in_order_and_are_the_drivers(rig):
    chains = [rig.driver.add([], [size]) for size in (100, 200, 300)]
    rig.driver.publish()
    heads, views = taken(rig)
    assert heads == [chain.head for chain in chains]
    assert [len(view) for view in views] == [100, 200, 300]
    for view in views:
        view[:] = b"x" * len(view)
    rig.queue.add_used_buffers(heads, 7)
    assert not rig.driver.has_used(), "nothing is seen before it is published"
    assert rig.queue.publish_used(), "the driver wants to hear of it"
    used = [rig.driver.pop_used() for _ in chains]
    assert [(one.head, one.written) for one in used] == list(zip(heads, [100, 200, 7], strict=True))
    assert rig.driver.contents(chains[1]) == b"x" * 200


def test_it_ends_once_there_is_enough(rig):
    for _ in range(6):
        rig.driver.add([], [100])
    rig.driver.publish()
    assert len(taken(rig, wanted=250)[0]) == 3
    assert len(taken(rig, most=2)[0]) == 2
    assert len(taken(rig)[0]) == 1
    assert taken(rig) == ([], [])


def test_the_ring_goes_round_many_times(rig):
    for turn in range(20_000):
        place = Buffer(DATA, 64)
        chains = [rig.driver.add([], [place]) for _ in range(1 + turn % 8)]
        rig.driver.publish()
        heads, _ = taken(rig)
        assert heads == [chain.head for chain in chains]
        rig.queue.add_used_buffers(heads, 1)
        rig.queue.publish_used()
        assert [rig.driver.pop_used().head for _ in chains] == heads


def test_only_what_is_available_is_taken_where_the_positions_come_round():
    rig = Rig(size=8, start=65522)
    for _ in range(6):
        chains = [rig.driver.add([], [64]) for _ in range(3)]
        rig.driver.publish()
        heads = taken(rig, most=1)[0] + taken(rig)[0]
        assert heads == [chain.head for chain in chains]
        rig.queue.add_used_buffers(heads, 64)
        rig.queue.publish_used()
        assert len(rig.all_used()) == 3
    rig.close()


def test_chains_of_other_kinds_are_left_for_pop(rig):
    driver = rig.driver
    first = driver.add([], [64])
    two_parts = driver.add([], [64, 64])
    table = driver.add([], [64], indirect=True)
    small = driver.add([], [8])
    last = driver.add([], [64])
    driver.publish()
    assert taken(rig, least=12)[0] == [first.head]
    for chain in (two_parts, table, small):
        assert taken(rig, least=12)[0] == []
        assert rig.queue.pop().head == chain.head
    assert taken(rig, least=64)[0] == [last.head]


def test_buffers_in_another_region_of_ram(rig):
    for addr in (DATA, HOLE_END + 0x100, DATA + 0x100):
        rig.driver.add([], [Buffer(addr, 64)])
    rig.driver.publish()
    _, views = taken(rig)
    views[1][:4] = b"high"
    assert rig.memory.read(HOLE_END + 0x100, 4) == b"high"
    assert [len(view) for view in views] == [64, 64, 64]


@pytest.mark.parametrize(
    "desc",
    [
        Desc(RAM - 32, 64, WRITE),  # straddles the hole
        Desc(RAM, 64, WRITE),
        Desc((1 << 64) - 32, 64, WRITE),
        Desc(DATA, 0, WRITE),
        Desc(DATA, 64, 0),
        Desc(DATA, 64, WRITE | NEXT, 9),
        Desc(DATA, 64, WRITE | INDIRECT),
        Desc(DATA, 0xFFFF_FFFF, WRITE),
    ],
)
def test_rows_27_to_34_bad_buffers_are_not_taken_and_what_came_before_is(rig, desc):
    good = rig.driver.add([], [64])
    rig.driver.add_raw([desc], at=5)
    rig.driver.publish()
    before = rig.snapshot()
    assert taken(rig)[0] == [good.head]
    assert taken(rig)[0] == []
    assert rig.snapshot() == before


def test_rows_26_and_36_a_bad_head_is_refused_by_pop(rig):
    chain = rig.driver.add([], [64])
    rig.driver.offer(chain.head)  # a second time, while it is in flight
    rig.driver.offer(8)
    rig.driver.publish()
    assert taken(rig)[0] == [chain.head]
    assert taken(rig)[0] == []
    with pytest.raises(DriverError, match="again"):
        rig.queue.pop()


@pytest.mark.parametrize("head", [8, 9, 0xFFFF])
def test_row26_a_head_past_the_table_is_refused_by_pop(rig, head):
    rig.driver.offer(head)
    rig.driver.publish()
    assert taken(rig)[0] == []
    with pytest.raises(DriverError, match=f"available head {head}"):
        rig.queue.pop()


def test_row36_a_head_returned_but_not_published_cannot_be_taken_again(rig):
    chain = rig.driver.add([], [64])
    rig.driver.publish()
    heads, _ = taken(rig)
    rig.queue.add_used_buffers(heads, 1)
    rig.driver.offer(chain.head)
    rig.driver.publish()
    assert taken(rig)[0] == []
    with pytest.raises(DriverError, match="again"):
        rig.queue.pop()
    rig.queue.publish_used()
    assert taken(rig)[0] == heads


@pytest.mark.parametrize("idx", [9, 0xFFFF, 0x8000])
def test_rows_23_and_24_an_index_that_jumped(rig, idx):
    rig.driver.avail_idx = idx
    with pytest.raises(DriverError):
        taken(rig)


def test_what_is_not_in_flight_cannot_be_returned(rig):
    chain = rig.driver.add([], [64])
    rig.driver.publish()
    with pytest.raises(ValueError, match="not in flight"):
        rig.queue.add_used_buffers([chain.head], 1)
    heads, _ = taken(rig)
    rig.queue.add_used_buffers(heads, 1)
    with pytest.raises(ValueError, match="not in flight"):
        rig.queue.add_used_buffers(heads, 1)


def test_a_saved_state_has_them_like_any_chain(rig):
    chains = [rig.driver.add([], [64]) for _ in range(3)]
    rig.driver.publish()
    heads, _ = taken(rig, most=2)
    state = rig.queue.state()
    assert [one.head for one in state.in_flight] == heads
    assert [one.writable for one in state.in_flight] == [
        tuple((buffer.addr, buffer.length) for buffer in chain.writable) for chain in chains[:2]
    ]
    again = rig.restored(state)
    assert again.pop().head == chains[2].head
    for head in heads:
        chain = rig.queue.chain_in_flight(head)
        assert (chain.readable_size, chain.writable_size) == (0, 64)
        again.add_used(again.chain_in_flight(head), 64)


@pytest.mark.parametrize("ready", [False, True])
def test_a_stopped_queue_gives_nothing_and_its_ring_is_not_touched(rig, ready):
    rig.driver.add([], [64])
    rig.driver.add([], [64])
    rig.driver.publish()
    heads, _ = taken(rig, most=1)
    rig.queue.ready = ready
    before = rig.snapshot()
    assert len(taken(rig)[0]) == (1 if ready else 0)
    rig.queue.add_used_buffers(heads, 1)
    assert (rig.snapshot() == before) is not ready


@pytest.mark.parametrize("options", [{"in_order": True}, {"layout": "packed"}])
def test_where_there_is_no_quick_way_none_are_taken(options):
    rig = Rig(size=8, **options)
    chain = rig.driver.add([], [64])
    rig.driver.publish()
    assert taken(rig)[0] == []
    assert rig.queue.pop().head == chain.head
    with pytest.raises(ValueError):
        rig.queue.add_used_buffers([chain.head], 64)
    rig.close()
