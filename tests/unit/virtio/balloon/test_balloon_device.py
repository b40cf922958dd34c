"""Memory that a guest gives back is the host's again; hostile numbers change nothing else."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Iterator

import pytest
from balloon_rig import (
    DEFLATE,
    HIGH,
    HINT,
    INFLATE,
    MIB,
    PAGE,
    RAM_END,
    REPORTING,
    STAT,
    STATS,
    Rig,
    running,
)
from mmio_harness import wait_for

from pyvmm.errors import ConfigError, GuestMemoryError
from pyvmm.memory import GuestMemory
from pyvmm.testing import Buffer
from pyvmm.testing.mmio_driver import CONFIG_CHANGED, F_VERSION_1
from pyvmm.virtio.balloon import pages
from pyvmm.virtio.balloon.pages import MAX_PAGES, in_ram, ranges_of, whole_pages

F_POISON, F_REPORTING = 1 << 4, 1 << 5


@pytest.fixture
def rig() -> Iterator[Rig]:
    with running() as made:
        yield made
        assert not made.driver.needs_reset
        made.fill(3 * MIB, PAGE)
        made.pages(INFLATE, [3 * MIB // PAGE])
        assert made.is_gone(3 * MIB, PAGE)


# --- memory --------------------------------------------------------------------------------------


def test_discarded_memory_is_the_hosts_and_reads_as_zero() -> None:
    memory = GuestMemory([(0, 4 * MIB), (HIGH, 4 * MIB)])
    memory.write(0, b"x" * 4 * MIB)
    memory.write(HIGH, b"y" * 4 * MIB)
    memory.discard(HIGH + MIB, 2 * MIB)
    assert memory.read(HIGH + MIB, 2 * MIB) == bytes(2 * MIB)
    assert memory.read(HIGH, MIB) == memory.read(HIGH + 3 * MIB, MIB) == b"y" * MIB
    assert memory.read(0, 4 * MIB) == b"x" * 4 * MIB
    for addr, size in ((4 * MIB, PAGE), (4 * MIB - PAGE, 2 * PAGE), (HIGH + 4 * MIB, PAGE)):
        with pytest.raises(GuestMemoryError):
            memory.discard(addr, size)
    for addr, size in ((1, PAGE), (0, 1), (0, 0), (0, -PAGE)):
        with pytest.raises(ValueError, match="whole pages"):
            memory.discard(addr, size)
    memory.close()


def test_pages_are_joined_to_ranges() -> None:
    assert list(ranges_of([])) == []
    assert list(ranges_of([7, 5, 6, 6, 9])) == [(5 * PAGE, 3 * PAGE), (9 * PAGE, PAGE)]
    assert list(ranges_of([0, 2**32 - 1])) == [(0, PAGE), ((2**32 - 1) * PAGE, PAGE)]


def test_only_whole_pages_of_a_range_count() -> None:
    assert whole_pages(PAGE, 2 * PAGE) == (PAGE, 2 * PAGE)
    assert whole_pages(1, 3 * PAGE) == (PAGE, 2 * PAGE)
    assert whole_pages(1, PAGE)[1] == 0
    assert whole_pages(PAGE - 1, 2)[1] == 0


def test_only_ram_of_a_range_counts() -> None:
    memory = GuestMemory([(0, 2 * PAGE), (4 * PAGE, 2 * PAGE)])
    found = list(in_ram(memory, [(0, 100 * PAGE), (3 * PAGE, PAGE)]))
    assert found == [(0, 2 * PAGE), (4 * PAGE, 2 * PAGE)]
    memory.close()


# --- inflating and deflating ---------------------------------------------------------------------


def test_inflated_pages_are_given_to_the_host(rig: Rig) -> None:
    rig.fill(2 * MIB, 4 * MIB)
    before = rig.blocks()
    rig.pages(INFLATE, list(range(2 * MIB // PAGE, 5 * MIB // PAGE)))
    assert before - rig.blocks() >= 3 * MIB  # looked at first: reading makes pages
    assert rig.is_gone(2 * MIB, 3 * MIB)
    assert not rig.is_gone(5 * MIB, PAGE)
    assert rig.device.given_back == 3 * MIB


def test_pages_of_the_high_region(rig: Rig) -> None:
    rig.fill(HIGH, 2 * PAGE)
    rig.pages(INFLATE, [HIGH // PAGE + 1])
    assert rig.is_gone(HIGH + PAGE, PAGE) and not rig.is_gone(HIGH, PAGE)


def test_deflated_pages_can_be_used_again(rig: Rig) -> None:
    rig.pages(INFLATE, [1024])
    rig.pages(DEFLATE, [1024])
    assert rig.device.stats()["taken_back"] == PAGE
    rig.fill(1024 * PAGE, PAGE)
    assert not rig.is_gone(1024 * PAGE, PAGE)


def test_an_array_in_many_descriptors(rig: Rig) -> None:
    rig.fill(4 * MIB, 2 * PAGE)
    raw = struct.pack("<LL", 1024, 1025)
    rig.driver.request(INFLATE, [raw[:1], raw[1:5], raw[5:]])
    assert rig.is_gone(4 * MIB, 2 * PAGE)


def test_the_driver_hears_of_a_new_target() -> None:
    with running(target=MIB) as rig:
        assert rig.config()[0] == 256
        rig.device.set_target(3 * MIB, RAM_END)
        wait_for(lambda: rig.irq.count > 0)
        assert rig.driver.acknowledge() & CONFIG_CHANGED
        assert rig.config()[0] == 768
        rig.write_config(4, 700)
        assert (rig.device.target, rig.device.actual) == (3 * MIB, 700 * PAGE)
        for size in (-1, RAM_END + 1):
            with pytest.raises(ConfigError, match="ask for less"):
                rig.device.set_target(size, RAM_END)


def test_the_target_cannot_be_written_by_the_driver(rig: Rig) -> None:
    rig.write_config(0, 77)
    rig.write_config(8, 88)
    assert rig.config() == (0, 0, 0, 0)


def test_actual_may_be_written_byte_by_byte(rig: Rig) -> None:
    for index, byte in enumerate(struct.pack("<L", 0x01020304)):
        rig.driver.registers.write(0x104 + index, 1, byte)
    assert rig.config()[1] == 0x01020304


def test_a_reset_empties_the_balloon(rig: Rig) -> None:
    rig.write_config(4, 5)
    rig.driver.reset()
    assert rig.device.actual == 0
    rig.driver.start()


# --- reporting -----------------------------------------------------------------------------------


def test_reported_pages_are_given_to_the_host(rig: Rig) -> None:
    rig.fill(4 * MIB, 2 * MIB)
    rig.fill(HIGH, MIB)
    before = rig.blocks()
    rig.report(Buffer(4 * MIB, 2 * MIB), Buffer(HIGH, MIB // 2))
    assert before - rig.blocks() >= 2 * MIB + MIB // 2  # looked at first: reading makes pages
    assert rig.is_gone(4 * MIB, 2 * MIB) and rig.is_gone(HIGH, MIB // 2)
    assert not rig.is_gone(HIGH + MIB // 2, PAGE)


@pytest.mark.parametrize(("poison", "gone"), [(0, True), (0xAAAA_AAAA, False)])
def test_poisoned_pages_stay_unless_the_poison_is_zero(poison: int, gone: bool) -> None:
    with running(start=False) as rig:
        rig.driver.negotiate()
        rig.driver.setup_queues()
        rig.write_config(12, poison)
        rig.driver.add_status(4)
        rig.fill(4 * MIB, PAGE)
        rig.driver.request(REPORTING, [], [Buffer(4 * MIB, PAGE)])
        assert rig.is_gone(4 * MIB, PAGE) == gone


def test_hints_are_never_asked_for_and_change_nothing(rig: Rig) -> None:
    rig.fill(4 * MIB, PAGE)
    rig.driver.request(HINT, [struct.pack("<L", 2)])
    rig.driver.request(HINT, [], [Buffer(4 * MIB, PAGE)])
    assert not rig.is_gone(4 * MIB, PAGE)
    assert rig.config()[2] == 0


def test_without_reporting_there_are_no_queues_for_it() -> None:
    with running(reporting=False) as rig:
        assert len(rig.driver.queues) == 3
        assert not rig.driver.offered_features() & (F_POISON | F_REPORTING)


# --- statistics ----------------------------------------------------------------------------------


def send_statistics(rig: Rig, *entries: tuple[int, int]) -> None:
    rig.driver.submit(STATS, [b"".join(STAT.pack(*entry) for entry in entries)])


def test_statistics_are_asked_for(rig: Rig) -> None:
    send_statistics(rig, (4, 1))
    wait_for(lambda: rig.said() == {"free": 1})
    assert not rig.driver.queues[STATS].has_used()  # kept, to ask with
    found: list[object] = []
    asker = threading.Thread(target=lambda: found.append(rig.device.statistics(60)))
    asker.start()
    rig.driver.wait_used(STATS)
    send_statistics(rig, (4, 4711))
    asker.join()
    assert found == [{"free": 4711}]


def test_without_an_answer_the_last_statistics_are_given(rig: Rig) -> None:
    assert rig.device.statistics(0) == {}
    send_statistics(rig, (5, 100), (4, 7))
    wait_for(lambda: rig.said() == {"total": 100, "free": 7})
    assert rig.device.statistics(0.01) == {"total": 100, "free": 7}


def test_unknown_statistics_are_ignored_and_order_is_free(rig: Rig) -> None:
    send_statistics(rig, (0xFFFF, 1), (6, 2**64 - 1), (10, 5), (0, 3))
    wait_for(lambda: rig.said() == {"available": 2**64 - 1, "swap_in": 3})


# --- hostile -------------------------------------------------------------------------------------


def test_b1_page_numbers_outside_ram(rig: Rig) -> None:
    rig.fill(2 * MIB, MIB)
    numbers = [RAM_END // PAGE, 2**32 - 1, HIGH // PAGE - 1, (HIGH + 4 * MIB) // PAGE]
    rig.pages(INFLATE, numbers)
    assert not any(rig.is_gone(addr, PAGE) for addr in range(2 * MIB, 3 * MIB, PAGE))
    assert rig.device.given_back == 0
    assert any("not RAM" in line for line in rig.lines)


def test_b1_good_numbers_among_bad_ones(rig: Rig) -> None:
    rig.fill(4 * MIB, PAGE)
    rig.pages(INFLATE, [2**32 - 1, 1024, RAM_END // PAGE])
    assert rig.is_gone(4 * MIB, PAGE)


def test_b2_the_same_page_again_and_again(rig: Rig) -> None:
    rig.pages(INFLATE, [1024] * MAX_PAGES)
    assert rig.device.given_back == PAGE


def test_b2_more_numbers_than_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_PAGES", 8)
    with running() as rig:
        rig.pages(INFLATE, list(range(1000, 1020)))
        assert rig.device.given_back == 8 * PAGE


@pytest.mark.parametrize("size", [1, 3, 5])
def test_b3_an_array_that_ends_within_a_number(rig: Rig, size: int) -> None:
    rig.driver.request(INFLATE, [struct.pack("<LL", 1024, 1025)[:size]])
    assert rig.device.given_back == (PAGE if size > 4 else 0)


BAD = {
    "outside": Buffer(0x8000_0000, 64),
    "straddles the hole": Buffer(RAM_END - 4, 64),
    "wraps 2^64": Buffer(2**64 - 32, 64),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_b4_buffers_outside_ram(rig: Rig, bad: Buffer) -> None:
    for queue in (INFLATE, DEFLATE, HINT):
        assert rig.driver.request(queue, [bad])[0] == 0
    rig.driver.submit(STATS, [bad])
    wait_for(lambda: any("statistics" in line for line in rig.lines))
    assert rig.device.given_back == 0


def test_b5_reports_outside_ram_and_of_parts_of_pages(rig: Rig) -> None:
    rig.fill(RAM_END - 2 * PAGE, 2 * PAGE)
    rig.fill(4 * MIB, 3 * PAGE)
    for bad in (Buffer(0x8000_0000, MIB), Buffer(2**64 - PAGE, PAGE), Buffer(4 * MIB + 1, PAGE)):
        rig.report(bad)
    assert not rig.is_gone(4 * MIB, PAGE) and not rig.is_gone(4 * MIB + PAGE, PAGE)
    rig.report(Buffer(RAM_END - PAGE, 2 * PAGE))
    assert rig.is_gone(RAM_END - PAGE, PAGE) and not rig.is_gone(RAM_END - 2 * PAGE, PAGE)
    rig.driver.request(REPORTING, [], [Buffer(4 * MIB + 1, 2 * PAGE)])
    assert rig.is_gone(4 * MIB + PAGE, PAGE)
    assert not rig.is_gone(4 * MIB, PAGE) and not rig.is_gone(4 * MIB + 2 * PAGE, PAGE)


def test_b5_a_report_of_readable_buffers_gives_nothing(rig: Rig) -> None:
    rig.fill(4 * MIB, PAGE)
    rig.driver.request(REPORTING, [Buffer(4 * MIB, PAGE)])
    assert not rig.is_gone(4 * MIB, PAGE)


def test_b6_more_than_one_buffer_of_statistics(rig: Rig) -> None:
    for number in range(20):
        send_statistics(rig, (4, number))
    for _ in range(19):
        rig.driver.wait_used(STATS)
    wait_for(lambda: rig.said() == {"free": 19})


def test_b7_a_driver_that_gives_away_its_own_rings(rig: Rig) -> None:
    """It harms itself only: the device reads zeros, and a reset mends it."""
    queue = rig.driver.queues[INFLATE]
    rig.pages(INFLATE, [queue.desc_addr // PAGE])
    rig.driver.reset()
    rig.driver.start()


@pytest.mark.parametrize("queue", [INFLATE, DEFLATE, STATS, HINT, REPORTING])
def test_row26_a_head_that_is_no_descriptor(queue: int) -> None:
    with running() as rig:
        ring = rig.driver.queues[queue]
        ring.offer(ring.size)
        ring.publish()
        rig.driver.kick(queue)
        rig.driver.wait_needs_reset()
        rig.driver.reset()
        rig.driver.start()
        rig.pages(INFLATE, [1024])


def test_a_driver_that_takes_no_feature_is_served() -> None:
    with running(features=F_VERSION_1) as rig:
        rig.fill(4 * MIB, PAGE)
        rig.pages(INFLATE, [1024])
        assert rig.is_gone(4 * MIB, PAGE)


def test_fuzzed_numbers_and_ranges(rig: Rig) -> None:
    numbers = random.Random(7)
    for _ in range(200):
        rig.pages(INFLATE, [numbers.choice([600, 2000, 2**31, 2**32 - 1]) for _ in range(20)])
        buffers = [
            Buffer(
                numbers.choice([4 * MIB, RAM_END - 1, HIGH, 2**63, 2**64 - 1]),
                numbers.choice([1, PAGE, MIB, 1 << 30]),
            )
            for _ in range(3)
        ]
        rig.report(*buffers)
