"""Split and packed virtqueues with a driver that keeps the rules: what devices rely on, whichever
ring they are served over."""

from __future__ import annotations

import json
import threading
import time

import pytest
from queue_rig import HOLE_END, LAYOUTS, RAM, Rig

from pyvmm.errors import DriverError, GuestMemoryError
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing import Buffer, Element, MockPackedDriver, MockSplitDriver, PackedDesc, Used
from pyvmm.testing.ring import INDIRECT, WRITE
from pyvmm.virtio.features import VIRTIO_F_RING_PACKED, mask
from pyvmm.virtio.queue import packed as packed_layout
from pyvmm.virtio.queue import split as split_layout
from pyvmm.virtio.queue.build import build_queue, restore_queue
from pyvmm.virtio.queue.state import InFlight, QueueConfig, QueueState, is_valid_size, size_rule

WRAP = 1 << 15
# Where the positions soon come round; for packed rings with either wrap counter.
NEAR_THE_END = [
    *(("split", 65536 - ahead) for ahead in (1, 3, 7)),
    *(("packed", wrap | offset) for wrap in (0, WRAP) for offset in (0, 1, 5, 7)),
]
SIZE = 8


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture
def make(layout):
    """Makes rigs with the layout at hand, and closes them."""
    rigs = []

    def make(size=SIZE, **options):
        rigs.append(Rig(size, layout=layout, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make):
    return make()


def offer(rig, count, readable=(), writable=(16,)):
    """Make `count` chains available; they."""
    chains = [rig.driver.add(readable, writable) for _ in range(count)]
    rig.driver.publish()
    return chains


# --- taking and returning ------------------------------------------------------------------------


def test_chains_come_in_the_order_in_which_they_were_offered(rig):
    chains = offer(rig, 5)
    assert [chain.head for chain in rig.queue] == [chain.head for chain in chains]
    assert rig.queue.pop() is None


def test_chains_that_are_not_published_are_not_seen(rig):
    rig.driver.add([b"x"])
    assert rig.queue.pop() is None
    rig.driver.publish()
    assert rig.queue.pop() is not None


def test_used_elements_show_at_publish_and_all_at_once(rig):
    chains = offer(rig, 3)
    for written, chain in enumerate(rig.queue):
        rig.queue.add_used(chain, written)
        assert not rig.driver.has_used()
    rig.queue.publish_used()
    assert rig.all_used() == [Used(chain.head, n) for n, chain in enumerate(chains)]


def test_chains_may_be_returned_in_another_order(rig):
    chains = offer(rig, 4)
    taken = list(rig.queue)
    for place in (2, 0):
        rig.queue.add_used(taken[place], place)
    rig.queue.publish_used()
    for place in (3, 1):
        rig.queue.add_used(taken[place], place)
    rig.queue.publish_used()
    assert rig.all_used() == [Used(chains[place].head, place) for place in (2, 0, 3, 1)]


def test_chains_of_many_lengths_go_round_and_come_back_in_odd_order(make):
    rig = make(16)
    for turn in range(40):
        chains = [rig.driver.add([b"r"] * (1 + turn % 3), [turn + 1, 1]) for _ in range(3)]
        rig.driver.publish()
        taken = list(rig.queue)
        order = [0, 1, 2][turn % 3 :] + [0, 1, 2][: turn % 3]
        for place in order:
            rig.queue.add_used(taken[place], turn + 2)
        rig.queue.publish_used()
        assert rig.all_used() == [Used(chains[place].head, turn + 2) for place in order]


@pytest.mark.parametrize("written", [0, 1, 0xFFFF_FFFF])
def test_used_lengths_of_up_to_32_bits_arrive(rig, written):
    offer(rig, 1)
    rig.queue.add_used(rig.queue.pop(), written)
    rig.queue.publish_used()
    assert rig.driver.pop_used().written == written


def test_a_used_length_that_no_used_element_can_hold_is_the_largest(rig):
    offer(rig, 2)
    rig.queue.add_used(rig.queue.pop(), 1 << 32)
    rig.queue.publish_used()
    assert rig.driver.pop_used().written == 0xFFFF_FFFF
    assert rig.serve(3) == 1


@pytest.mark.parametrize("layout, start", NEAR_THE_END)
def test_row25_order_is_kept_where_the_positions_come_round(layout, start):
    rig = Rig(SIZE, layout=layout, start=start)
    for turn in range(3 * SIZE):
        chain = rig.driver.add([bytes([turn])], [1])
        rig.driver.publish()
        taken = rig.queue.pop()
        assert taken.reader().read(1) == bytes([turn])
        rig.queue.add_used(taken, turn)
        rig.queue.publish_used()
        assert rig.driver.pop_used() == Used(chain.head, turn)
    rig.close()


@pytest.mark.parametrize("layout, start", NEAR_THE_END)
def test_row25_a_full_ring_from_any_place(layout, start):
    rig = Rig(SIZE, layout=layout, start=start)
    for _ in range(3):
        heads = [chain.head for chain in offer(rig, SIZE)]
        assert rig.queue.enable_notification() is True
        assert [chain.head for chain in rig.queue] == heads
        assert rig.queue.pop() is None
        for head in heads:
            rig.queue.add_used(rig.queue.chain_in_flight(head), 1)
        rig.queue.publish_used()
        assert [used.head for used in rig.all_used()] == heads
    rig.close()


def test_a_queue_of_one_descriptor_goes_round(make):
    rig = make(1)
    for _ in range(5):
        [chain] = offer(rig, 1)
        assert rig.serve(4) == 1
        rig.queue.publish_used()
        assert rig.driver.pop_used() == Used(chain.head, 4)


def test_the_largest_queue_of_all(layout):
    memory = GuestMemory([(0, 4 << 20)])
    driver = (MockPackedDriver if layout == "packed" else MockSplitDriver)(memory, 32768)
    parts = (driver.desc_addr, driver.driver_addr, driver.device_addr)
    features = mask(VIRTIO_F_RING_PACKED) if layout == "packed" else 0
    buffer = Buffer(driver.arena.alloc(16), 16)
    with EventFd() as kick:
        queue = build_queue(memory, QueueConfig(32768, 32768, *parts, True), features, 0, kick)
        for _ in range(2):
            for _ in range(32768):
                driver.add([], [buffer])
            driver.publish()
            for chain in queue:
                queue.add_used(chain, 1)
            queue.publish_used()
            assert sum(1 for _ in iter(driver.pop_used, None)) == 32768
    memory.close()


def test_iteration_is_bounded_by_the_size_though_the_driver_refills(rig):
    offer(rig, SIZE)
    count = 0
    for chain in rig.queue:
        rig.queue.add_used(chain, 1)
        rig.queue.publish_used()
        rig.driver.pop_used()
        offer(rig, 1)
        count += 1
    assert count == SIZE
    assert rig.queue.enable_notification()  # the rest is announced


def test_halt_ends_an_iteration_after_the_chain_at_hand(rig):
    offer(rig, 3)
    for chain in rig.queue:
        rig.queue.halt = True
        rig.queue.add_used(chain, 1)
    rig.queue.publish_used()
    assert len(rig.all_used()) == 1
    rig.queue.halt = False
    assert rig.serve() == 2


def test_a_chain_is_returned_once(rig):
    offer(rig, 1)
    chain = rig.queue.pop()
    rig.queue.add_used(chain, 0)
    with pytest.raises(ValueError, match="not in flight"):
        rig.queue.add_used(chain, 0)
    rig.queue.publish_used()
    with pytest.raises(ValueError, match="not in flight"):
        rig.queue.add_used(chain, 0)
    assert len(rig.all_used()) == 1


def test_a_chain_of_an_earlier_round_is_not_taken_for_the_one_in_flight(rig):
    offer(rig, 1)
    old = rig.queue.pop()
    rig.queue.add_used(old, 0)
    rig.queue.publish_used()
    rig.driver.pop_used()
    offer(rig, 1)
    new = rig.queue.pop()
    assert new.head == old.head
    with pytest.raises(ValueError, match="not in flight"):
        rig.queue.add_used(old, 0)


# --- stepping back -------------------------------------------------------------------------------


def test_step_back_makes_the_same_chain_available_again(rig):
    heads = [chain.head for chain in offer(rig, 2)]
    rig.queue.pop()
    rig.queue.step_back()
    assert [chain.head for chain in rig.queue] == heads


@pytest.mark.parametrize("layout, start", NEAR_THE_END)
def test_several_chains_can_be_stepped_back_the_youngest_first(layout, start):
    rig = Rig(SIZE, layout=layout, start=start)
    chains = [rig.driver.add([b"ab"], [9]) for _ in range(3)]
    rig.driver.publish()
    taken = list(rig.queue)
    rig.queue.add_used(taken[0], 1)
    with pytest.raises(ValueError, match="no chain"):
        rig.queue.step_back(taken[0])
    with pytest.raises(ValueError, match="no chain"):
        rig.queue.step_back(taken[1])
    rig.queue.step_back(taken[2])
    rig.queue.step_back(taken[1])
    assert [chain.head for chain in rig.queue] == [chain.head for chain in chains[1:]]
    rig.close()


def test_step_back_undoes_only_what_was_not_returned(rig):
    with pytest.raises(ValueError):
        rig.queue.step_back()
    offer(rig, 1)
    chain = rig.queue.pop()
    rig.queue.step_back()
    with pytest.raises(ValueError):
        rig.queue.step_back()
    chain = rig.queue.pop()
    rig.queue.add_used(chain, 0)
    with pytest.raises(ValueError):
        rig.queue.step_back()


@pytest.mark.parametrize("layout, start", NEAR_THE_END)
def test_step_back_leaves_what_was_returned_in_the_same_batch(layout, start):
    rig = Rig(SIZE, layout=layout, start=start)
    chains = [rig.driver.add([b"ab"], [9]) for _ in range(4)]
    rig.driver.publish()
    before = rig.snapshot()
    taken = list(rig.queue)
    rig.queue.add_used(taken[0], 9)
    for chain in reversed(taken[1:]):
        rig.queue.step_back(chain)
    if rig.packed:
        assert rig.snapshot() == before
    rig.queue.publish_used()
    assert rig.all_used() == [Used(chains[0].head, 9)]
    assert rig.serve(7) == 3
    rig.queue.publish_used()
    assert rig.all_used() == [Used(chain.head, 7) for chain in chains[1:]]
    rig.close()


# --- stopped -------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["pop", "iterate", "publish", "disable", "enable"])
def test_row18_a_stopped_queue_touches_no_ring(rig, operation):
    offer(rig, 2)
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


def test_row18_what_was_returned_before_the_stop_is_not_shown_after_it(rig):
    offer(rig, 1)
    rig.queue.add_used(rig.queue.pop(), 4)
    rig.queue.ready = False
    before = rig.snapshot()
    assert rig.queue.publish_used() is False
    assert rig.snapshot() == before


# --- interrupts ----------------------------------------------------------------------------------


def serve_one(rig):
    offer(rig, 1)
    rig.serve(1)
    notify = rig.queue.publish_used()
    rig.driver.pop_used()
    return notify


@pytest.mark.parametrize("event_idx", [False, True])
def test_row38_the_driver_decides_about_interrupts(make, event_idx):
    rig = make(event_idx=event_idx)
    assert serve_one(rig) is True
    rig.driver.disable_interrupts()
    # With EVENT_IDX a split ring has no way to say "none": it names one that lies behind.
    assert serve_one(rig) is False
    rig.driver.enable_interrupts()
    assert serve_one(rig) is True


@pytest.mark.parametrize("event_idx", [False, True])
def test_nothing_used_is_nothing_to_tell(make, event_idx):
    assert make(event_idx=event_idx).queue.publish_used() is False


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("layout, start", NEAR_THE_END)
def test_row38_an_interrupt_just_when_the_buffer_asked_for_is_used(layout, start, batch):
    for after in range(1, SIZE + 1):
        rig = Rig(SIZE, event_idx=True, layout=layout, start=start)
        rig.driver.interrupt_after(after)
        rig.driver.want_interrupts = False
        offer(rig, batch)
        assert rig.serve(1) == batch
        assert rig.queue.publish_used() is (after <= batch)
        rig.close()


# --- kicks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_idx", [False, True])
def test_kicks_are_suppressed_and_asked_for_again(make, event_idx):
    rig = make(event_idx=event_idx)
    assert rig.queue.enable_notification() is False
    rig.driver.add([b"x"])
    assert rig.driver.publish() is True
    rig.queue.disable_notification()
    rig.driver.add([b"x"])
    assert rig.driver.publish() is False
    assert rig.serve() == 2
    assert rig.queue.enable_notification() is False
    rig.driver.add([b"x"])
    assert rig.driver.publish() is True


@pytest.mark.parametrize("event_idx", [False, True])
def test_what_came_while_kicks_were_off_is_announced(make, event_idx):
    rig = make(event_idx=event_idx)
    rig.queue.disable_notification()
    assert rig.serve() == 0
    offer(rig, 1)
    assert rig.queue.enable_notification() is True
    assert rig.serve() == 1
    assert rig.queue.enable_notification() is False


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("left", [1, 3, 7])
def test_chains_left_on_purpose_are_announced_once(make, event_idx, left):
    rig = make(event_idx=event_idx)
    offer(rig, left)
    rig.queue.pop()
    rig.queue.step_back()
    assert rig.queue.enable_notification() is True
    rig.queue.pop()
    rig.queue.step_back()
    assert rig.queue.enable_notification() is False
    rig.driver.add([], [1])
    assert rig.driver.publish() is True  # the news still kicks
    assert rig.queue.enable_notification() is True
    assert rig.serve() == left + 1


@pytest.mark.parametrize("indirect", [False, True])
def test_row30_empty_parts_are_left_out(rig, indirect):
    rig.driver.add([b"", b"ab", b""], [0, 3, 0], indirect=indirect)
    rig.driver.publish()
    chain = rig.queue.pop()
    assert [length for _, length in chain.readable] == [2]
    assert [length for _, length in chain.writable] == [3]
    assert (chain.readable_size, chain.writable_size) == (2, 3)
    assert bytes(chain.reader().read(2)) == b"ab"


def at_the_fence(rig, monkeypatch, race):
    """Have `race` happen at the device's next fence: at the very moment when what the device has
    stored becomes visible, and before it looks at what the driver stores. How often it did."""
    fence = rig.queue._fence
    raced = []

    def raced_at():
        monkeypatch.setattr(rig.queue, "_fence", fence)
        race()
        raced.append(True)
        fence()

    monkeypatch.setattr(rig.queue, "_fence", raced_at)
    return raced


@pytest.mark.parametrize("event_idx", [False, True])
def test_what_races_in_beside_chains_that_were_left_is_announced(make, event_idx, monkeypatch):
    """The driver looked whether a kick is wanted just before it was asked for."""
    rig = make(event_idx=event_idx)
    offer(rig, 2)
    assert rig.queue.enable_notification() is True
    raced = at_the_fence(rig, monkeypatch, lambda: offer(rig, 1))
    assert rig.queue.enable_notification() is True
    assert raced
    assert rig.serve() == 3


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_driver_that_asks_for_an_interrupt_as_a_chain_is_returned_gets_it(
    make, event_idx, monkeypatch
):
    """It has seen the chain before it sleeps, or else the device has seen its wish."""
    rig = make(event_idx=event_idx)
    rig.driver.disable_interrupts()
    offer(rig, 1)
    assert rig.serve() == 1
    seen = []

    def ask():
        # The driver asks, then looks at the ring a last time.
        rig.driver.enable_interrupts()
        seen.append(rig.driver.has_used())

    raced = at_the_fence(rig, monkeypatch, ask)
    assert rig.queue.publish_used() is True
    assert (raced, seen) == ([True], [True])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_news_are_not_taken_for_what_was_left_when_the_positions_have_gone_round(make, size):
    rig = make(size)
    offer(rig, 1)
    assert rig.queue.enable_notification() is True
    # Twice round a packed ring, by a device that sees for itself that there is more to do.
    for _ in range(2 * size - 1):
        assert rig.serve(1) == 1
        rig.queue.publish_used()
        rig.all_used()
        offer(rig, 1)
    assert rig.serve(1) == 1
    rig.queue.publish_used()
    rig.all_used()
    offer(rig, 1)
    assert rig.queue.enable_notification() is True


def test_news_are_news_when_the_indices_of_a_split_ring_have_gone_round():
    rig = Rig(256)
    offer(rig, 1)
    assert rig.queue.enable_notification() is True
    for count in (255, *[256] * 255, 1):
        rig.serve(1)
        rig.queue.publish_used()
        rig.all_used()
        offer(rig, count, writable=[Buffer(0x8000, 1)])
    assert rig.queue.state().next_avail == 0
    assert rig.queue.enable_notification() is True
    rig.close()


def test_a_halted_queue_is_not_looked_at_again(rig):
    offer(rig, 2)
    rig.queue.pop()
    rig.queue.halt = True
    assert rig.queue.poll(0, 0) is False
    rig.queue.halt = False
    assert rig.queue.poll(0, 0) is True


def test_what_was_left_is_news_again_after_another_has_served_the_ring(rig):
    offer(rig, 1)
    assert rig.queue.enable_notification() is True
    assert rig.queue.enable_notification() is False
    rig.queue.served_to(rig.queue.state().next_avail)  # as often as it takes to come round
    assert rig.queue.enable_notification() is True


def test_what_was_seen_before_another_served_the_ring_is_forgotten(rig):
    offer(rig, 3)
    assert rig.queue.enable_notification() is True
    end = rig.queue._encode(rig.queue._first_unavailable())
    rig.queue.served_to(end)
    assert rig.queue.is_drained()
    assert rig.queue.pop() is None


def test_a_stepped_back_chain_is_found_when_its_time_comes(rig):
    """CVE-2020-16843: a receive queue must go on after it was starved."""
    [chain] = offer(rig, 1)
    for _ in range(5):
        assert rig.queue.pop().head == chain.head
        rig.queue.step_back()
        rig.queue.enable_notification()
    assert rig.serve(1) == 1
    rig.queue.publish_used()
    assert rig.driver.pop_used() == Used(chain.head, 1)


# --- descriptors ---------------------------------------------------------------------------------


def test_an_indirect_table_is_walked(rig):
    given = rig.driver.add([b"header", b"data"], [512, 1], indirect=True)
    rig.driver.publish()
    chain = rig.queue.pop()
    assert (chain.head, chain.slots) == (given.head, 1)
    assert chain.readable == given.readable
    assert chain.writable == given.writable


@pytest.mark.parametrize("indirect", [False, True])
def test_a_chain_may_be_as_long_as_the_queue(rig, indirect):
    rig.driver.add([b"x"] * 4, [1] * 4, indirect=indirect)
    rig.driver.publish()
    chain = rig.queue.pop()
    assert (chain.readable_size, chain.writable_size) == (4, 4)


def test_an_indirect_table_may_lie_in_another_region(rig):
    rig.memory.write(HOLE_END, b"abc")
    table = rig.driver.make_table([Element(HOLE_END, 3)])
    rig.memory.write(HOLE_END + 0x1000, rig.memory.read(table, 16))
    rig.driver.add_elements([Element(HOLE_END + 0x1000, 16, INDIRECT)])
    rig.driver.publish()
    assert rig.queue.pop().reader().read(3) == b"abc"


# --- in order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_in_order_every_buffer_is_accounted_for(layout, indirect, batch):
    rig = Rig(16, layout=layout, in_order=True)
    for turn in range(20):
        given = [rig.driver.add([b"r"], [3, 4], indirect=indirect) for _ in range(batch)]
        rig.driver.publish()
        lengths = [7 if (turn + n) % 3 else n % 7 for n in range(batch)]
        for chain, written in zip(rig.queue, lengths, strict=True):
            rig.queue.add_used(chain, written)
        rig.queue.publish_used()
        expected = [Used(chain.head, n) for chain, n in zip(given, lengths, strict=True)]
        assert rig.all_used() == expected
    rig.close()


def test_in_order_a_chain_cannot_overtake(layout):
    rig = Rig(SIZE, layout=layout, in_order=True)
    offer(rig, 2)
    first, second = list(rig.queue)
    with pytest.raises(ValueError, match="out of order"):
        rig.queue.add_used(second, 0)
    rig.queue.add_used(first, 0)
    rig.queue.step_back(second)
    rig.queue.publish_used()
    assert len(rig.all_used()) == 1
    assert rig.queue.pop().head == second.head
    rig.close()


# --- state ---------------------------------------------------------------------------------------


def through_json(state: QueueState) -> QueueState:
    return QueueState.from_plain(json.loads(json.dumps(state.to_plain())))


@pytest.mark.parametrize("done", [0, 3, 8, 13])
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_queue_goes_on_from_its_state(make, done, event_idx):
    rig = make(event_idx=event_idx)
    for _ in range(done):
        serve_one(rig)
    state = through_json(rig.queue.state())
    assert state == rig.queue.state()
    assert state.in_flight == ()
    [last] = offer(rig, 1)
    rig.queue = rig.restored(state)
    assert rig.queue.pop().head == last.head
    rig.queue.add_used(rig.queue.chain_in_flight(last.head), 3)
    rig.queue.publish_used()
    assert rig.driver.pop_used() == Used(last.head, 3)
    assert serve_one(rig) is True


def test_row36_a_chain_of_a_restored_queue_is_not_offered_again(rig):
    [chain] = offer(rig, 1)
    rig.queue.pop()
    again = rig.restored(rig.queue.state())
    if rig.packed:
        rig.driver.add_raw([PackedDesc(0x8000, 16, WRITE, chain.head)])
    else:
        rig.driver.offer(chain.head)
    rig.driver.publish()
    with pytest.raises(DriverError, match="again before it was used"):
        again.pop()


@pytest.mark.parametrize("in_order", [False, True])
def test_requests_are_counted_as_they_are_shown(make, in_order):
    rig = make(in_order=in_order)
    for total in (3, 6):
        offer(rig, 3)
        assert rig.serve(1) == 3
        rig.queue.publish_used()
        assert rig.queue.stats.requests == total
        rig.all_used()


def test_who_begins_to_serve_does_not_end_somebody_elses_claim(rig):
    queue = rig.queue
    for _ in range(2):
        assert queue.claim()
        queue.lock.release()
        assert not queue.halt
    with queue.lock:
        claim = threading.Thread(target=queue.claim, daemon=True)
        claim.start()
        deadline = time.monotonic() + 30
        while not queue.halt and time.monotonic() < deadline:
            time.sleep(0.001)
        assert queue.halt, "whoever serves the queue is to make room"
        queue.begin_serving()
        assert queue.halt
    claim.join(30)
    assert not claim.is_alive() and not queue.halt
    queue.lock.release()


def test_of_two_claims_the_second_one_lasts_when_the_first_is_given_up(rig):
    queue = rig.queue
    with queue.lock:
        claim = threading.Thread(target=queue.claim, daemon=True)
        claim.start()
        deadline = time.monotonic() + 30
        while not queue.halt and time.monotonic() < deadline:
            time.sleep(0.001)
        assert queue.claim(timeout=0) is False
        assert queue.halt
    claim.join(30)
    assert not claim.is_alive() and not queue.halt
    queue.lock.release()


def test_chains_in_flight_are_part_of_the_state(rig):
    chains = [rig.driver.add([b"chain%d" % n], [5]) for n in range(3)]
    rig.driver.publish()
    taken = list(rig.queue)
    # The one in the middle comes back first; a packed ring has then overwritten the first.
    rig.queue.add_used(taken[1], 5)
    rig.queue.publish_used()
    state = through_json(rig.queue.state())
    assert [chain.head for chain in state.in_flight] == [chains[0].head, chains[2].head]
    again = rig.restored(state)
    assert again.pop() is None
    assert again.state() == state
    for place in (2, 0):
        chain = again.chain_in_flight(chains[place].head)
        assert chain.reader().read(6) == b"chain%d" % place
        chain.writer().write(b"%05d" % place)
        again.add_used(chain, 5)
    again.publish_used()
    assert rig.all_used() == [Used(chains[place].head, 5) for place in (1, 2, 0)]
    assert rig.driver.contents(chains[2]) == b"00002"
    with pytest.raises(ValueError, match="not in flight"):
        again.chain_in_flight(chains[0].head)
    with pytest.raises(ValueError):
        again.chain_in_flight(SIZE)


@pytest.mark.parametrize("layout, start", NEAR_THE_END)
def test_chains_may_be_in_flight_across_the_rings_end(layout, start):
    rig = Rig(SIZE, layout=layout, start=start)
    chains = offer(rig, 3)
    assert len(list(rig.queue)) == 3
    again = rig.restored(through_json(rig.queue.state()))
    for chain in chains:
        again.add_used(again.chain_in_flight(chain.head), 16)
    again.publish_used()
    assert rig.all_used() == [Used(chain.head, 16) for chain in chains]
    rig.close()


@pytest.mark.parametrize("layout, start", NEAR_THE_END)
def test_chains_of_a_restored_queue_are_older_than_those_taken_since(layout, start):
    rig = Rig(SIZE, layout=layout, start=start)
    chains = offer(rig, 5)
    queue = rig.queue
    for taken in range(1, 6):
        queue.pop()
        state = queue.state()
        assert [one.head for one in state.in_flight] == [one.head for one in chains[:taken]]
        if taken == 2:
            queue = rig.restored(through_json(state))
    rig.close()


def test_in_order_a_restored_chain_can_be_returned_and_stepped_back(layout):
    rig = Rig(SIZE, layout=layout, in_order=True)
    chains = offer(rig, 2)
    assert len(list(rig.queue)) == 2
    again = rig.restored(through_json(rig.queue.state()))
    again.step_back(again.chain_in_flight(chains[1].head))
    again.add_used(again.chain_in_flight(chains[0].head), 16)
    again.publish_used()
    assert rig.all_used() == [Used(chains[0].head, 16)]
    assert again.pop().head == chains[1].head
    rig.close()


def test_a_restored_chain_whose_place_nobody_knows_cannot_be_stepped_back(rig):
    [chain] = offer(rig, 1)
    rig.queue.pop()
    again = rig.restored(rig.queue.state())
    with pytest.raises(ValueError, match="no chain"):
        again.step_back(again.chain_in_flight(chain.head))


def test_a_state_has_the_configuration(rig):
    assert rig.queue.state().config() == rig.config


def test_the_numbers_of_vhost_user(rig):
    """VHOST_USER_GET_VRING_BASE: 16 bits for a split queue, 32 for a packed one."""
    for _ in range(5):
        serve_one(rig)
    state = rig.queue.state()
    assert state.vring_base() == (0x8005_8005 if rig.packed else 5)
    same = QueueState.from_vring_base(rig.config, state.vring_base(), packed=rig.packed)
    assert same == state


def test_a_configuration_is_a_split_queues_if_nobody_says_otherwise(rig):
    config = QueueConfig(8, 8, 0x4000, 0x5000, 0x6000)
    state = QueueState.from_vring_base(config, 7)
    assert (state.packed, state.next_avail, state.next_used) == (False, 7, 7)
    config.size = 3
    config.validate(rig.memory, packed=True)
    with pytest.raises(DriverError, match="power of two"):
        config.validate(rig.memory)
    assert not is_valid_size(3, 8) and is_valid_size(3, 8, packed=True)
    assert size_rule(8) == "a power of two from 1 to 8"


def test_a_packed_base_has_the_wrap_counters():
    config = QueueConfig(8, 8, 0, 0x1000, 0x2000)
    state = QueueState.from_vring_base(config, 0x8007_0003, packed=True)
    assert (state.next_avail, state.next_used) == (3, 0x8007)


def test_a_state_is_of_one_layout(rig):
    state = rig.queue.state()
    other = rig.features ^ mask(VIRTIO_F_RING_PACKED)
    with pytest.raises(DriverError, match="layout"):
        restore_queue(rig.memory, state, other, 0, rig.kick)


def test_a_queue_finds_its_rings_again_after_the_memory_has_moved(rig):
    offer(rig, 1)
    assert rig.serve(1) == 1
    rig.queue.remap()
    rig.queue.publish_used()
    assert len(rig.all_used()) == 1
    assert serve_one(rig) is True


# --- processors that let loads and stores overtake each other ------------------------------------


@pytest.fixture
def weakly_ordered(rig, monkeypatch):
    """A rig as on such a processor; what its fences do is the test's."""
    monkeypatch.setattr(packed_layout if rig.packed else split_layout, "WEAKLY_ORDERED", True)
    return rig


def show_at_the_next_fence(rig):
    """Have the device see the flags of descriptors, and the rest of them from a fence on."""
    table = rig.memory.read(rig.driver.desc_addr, 16 * SIZE)
    keep = slice(14, 16) if rig.packed else slice(12, 16)
    for place in range(SIZE):
        desc = table[16 * place : 16 * place + 16]
        rig.memory.write(rig.driver.desc_addr + 16 * place, bytes(keep.start) + desc[keep])
    rig.queue._fence = lambda: rig.memory.write(rig.driver.desc_addr, table)


def test_descriptors_are_read_after_what_made_them_available(weakly_ordered):
    rig = weakly_ordered
    offer(rig, 1, [b"late"])
    show_at_the_next_fence(rig)
    assert rig.queue.pop().reader().read(4) == b"late"


def test_so_they_are_a_batch_at_a_time(weakly_ordered):
    rig = weakly_ordered
    offer(rig, 1, [b"late"], [512, 1])
    show_at_the_next_fence(rig)
    [(header, *_)], _ = rig.queue.peek_usual(4, 1, 1 << 20)
    assert bytes(header) == b"late"


def test_used_elements_are_stored_before_what_shows_them(weakly_ordered):
    rig = weakly_ordered
    offer(rig, 2)
    before, seen = rig.snapshot(), []
    for chain in rig.queue:
        rig.queue.add_used(chain, 16)
    rig.queue._fence = lambda: seen.append((rig.driver.has_used(), rig.snapshot() != before))
    rig.queue.publish_used()
    # Elements are there and not shown; then they are, before the look at the driver's wish.
    assert seen == [(False, True), (True, True)]


def test_the_wish_for_kicks_is_stored_before_the_last_look(rig):
    """On any processor: the driver stores first and then looks at the wish."""
    wished = []

    def driver_comes_now():
        wished.append(rig.driver.device_wants_kicks)
        rig.queue._fence = int
        offer(rig, 1)

    rig.queue.disable_notification()
    rig.queue._fence = driver_comes_now
    assert rig.queue.enable_notification() is True
    assert wished == [True]


# --- states that nobody should believe: row 58, CVE-2013-4151 ------------------------------------

BOTH = [
    {"size": 0},
    {"size": 512},
    {"size": "8"},
    {"size": True},
    {"max_size": 8.0},
    {"max_size": None},
    {"desc_addr": 8},
    {"desc_addr": -16},
    {"avail_addr": RAM},
    {"used_addr": 2**64 - 4},
    {"used_addr": 1 << 70},
    {"next_avail": 65536},
    {"next_avail": "0"},
    {"next_used": -1},
    {"next_used": None},
    {"in_flight": (InFlight(0),)},
    {"in_flight": (InFlight(0, 0),)},
]
SPLIT = [
    {"size": 3},
    {"next_avail": 9},
    {"next_avail": 1},
    {"next_used": 1},
    {"next_avail": 1, "in_flight": (InFlight(8),)},
    {"next_avail": 1, "in_flight": (InFlight(-1),)},
    {"next_avail": 1, "in_flight": (InFlight(0, 2),)},
    {"next_avail": 2, "in_flight": (InFlight(1), InFlight(1))},
]
PACKED = [
    {"next_avail": 0x8008},
    {"next_avail": 0x8001},
    {"next_avail": 0x8008, "next_used": 0x8008},
    {"next_used": 0x0007},
    {"next_avail": 0x7FFF},
    {"next_avail": 0x8001, "in_flight": (InFlight(8, 1),)},
    {"next_avail": 0x8001, "in_flight": (InFlight("0", 1),)},
    {"next_avail": 0x8001, "in_flight": (InFlight(0, 2),)},
    {"next_avail": 0x8001, "in_flight": (InFlight(0, -1), InFlight(1, 2))},
    {"next_avail": 0x0004, "in_flight": (InFlight(0, 8), InFlight(1, 4))},
    {"next_avail": 0x8002, "in_flight": (InFlight(1, 1), InFlight(1, 1))},
    {"next_avail": 0x8001, "in_flight": (InFlight(0, 1, ((1 << 64, 1),)),)},
    {"next_avail": 0x8001, "in_flight": (InFlight(0, 1, ((0, 1 << 32),)),)},
    {"next_avail": 0x8001, "in_flight": (InFlight(0, 1, ((0,),)),)},
    {"next_avail": 0x8001, "in_flight": (InFlight(0, 1, (("a", "b"),)),)},
    {"next_avail": 0x8001, "in_flight": (InFlight(0, 1, ((0, 1),) * 9),)},
    {"next_avail": 0x8001, "in_flight": (InFlight(0, 1, ((0, 2**32 - 1), (0, 2**32 - 1))),)},
]


@pytest.mark.parametrize(
    "layout, change",
    [("split", change) for change in BOTH + SPLIT]
    + [("packed", change) for change in BOTH + PACKED],
    ids=str,
)
def test_row58_a_state_that_cannot_be_is_refused(layout, change):
    rig = Rig(SIZE, layout=layout)
    good = rig.queue.state()
    fields = {name: getattr(good, name) for name in QueueState._fields}
    before = rig.snapshot()
    with pytest.raises(DriverError):
        rig.restored(QueueState(**{**fields, **change}))
    assert rig.snapshot() == before
    rig.close()


def test_a_chain_in_flight_may_be_as_long_as_any(layout):
    rig = Rig(SIZE, layout=layout)
    good = rig.queue.state()
    parts = ((0, 2**32 // SIZE),) * SIZE
    fields = good._asdict()
    next_avail = 0x8001 if rig.packed else 1
    for readable, writable in ((parts, ()), ((), parts), (parts[:3], parts[3:])):
        chain = InFlight(0, 1, readable, writable)
        state = QueueState(**{**fields, "next_avail": next_avail, "in_flight": (chain,)})
        if not rig.packed:
            rig.driver.avail_idx = 1
        again = rig.restored(state)
        assert again.state() == state
    rig.close()


def test_what_is_wrong_in_a_state_is_told_by_the_layouts_section(layout):
    rig = Rig(SIZE, layout=layout)
    state = rig.queue.state()._replace(next_avail=-1)
    with pytest.raises(DriverError) as refused:
        rig.restored(state)
    assert refused.value.section.startswith({"split": "2.7 ", "packed": "2.8 "}[layout])
    rig.close()


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"in_flight": 7},
        {"in_flight": [7]},
        {"in_flight": [{}]},
        {"in_flight": [{"head": 0, "slots": 1, "readable": [1], "writable": []}]},
        {"in_flight": [{"head": 0, "slots": 1, "readable": [[1, 2, 3]], "writable": []}]},
        {"in_flight": [], "surplus": 1},
        {"in_flight": None},
    ],
    ids=str,
)
def test_row58_plain_data_of_another_form_is_refused(rig, plain):
    good = rig.queue.state().to_plain()
    with pytest.raises(DriverError):
        QueueState.from_plain({**good, **plain} if plain else plain)


def test_row58_a_ring_that_contradicts_the_state_is_refused(make):
    rig = make()
    state = rig.queue.state()
    if rig.packed:
        # What lies in the ring is looked at when it is used: nothing there is an index.
        assert rig.restored(state).pop() is None
        return
    rig.driver.avail_idx = 9
    with pytest.raises(DriverError):
        rig.restored(state)


def test_row17_a_state_with_rings_outside_ram_is_refused(rig):
    state = rig.queue.state()
    fields = state._asdict()
    with pytest.raises(GuestMemoryError):
        rig.restored(QueueState(**{**fields, "used_addr": HOLE_END - 4}))
