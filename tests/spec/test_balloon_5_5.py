"""virtio 1.3, 5.5 Memory Balloon Device: one test for each thing the device must or should do."""

from __future__ import annotations

import random
import struct

import pytest
from balloon_rig import DEFLATE, HINT, INFLATE, MIB, PAGE, STAT, STATS, Rig, running
from mmio_harness import wait_for

from pyvmm.testing import Buffer
from pyvmm.testing.mmio_driver import CONFIG_CHANGED, DEVICE_ID, QUEUE_SEL, QUEUE_SIZE_MAX

F_MUST_TELL_HOST, F_STATS, F_OOM, F_HINT, F_POISON, F_REPORTING = (1 << bit for bit in range(6))


def queues(rig: Rig) -> int:
    count = 0
    while True:
        rig.driver.write(QUEUE_SEL, count)
        if not rig.driver.read(QUEUE_SIZE_MAX):
            return count
        count += 1


def test_5_5_1_device_id() -> None:
    with running() as rig:
        assert rig.driver.read(DEVICE_ID) == 5


def test_5_5_2_queues_as_the_features_say() -> None:
    with running(reporting=False) as rig:
        assert queues(rig) == 3
    with running() as rig:
        assert queues(rig) == 5


def test_5_5_3_features_are_those_that_are_served() -> None:
    own = (1 << 6) - 1
    with running(reporting=False) as rig:
        assert rig.driver.offered_features() & own == F_STATS
    with running(deflate_on_oom=True) as rig:
        assert rig.driver.offered_features() & own == own & ~F_MUST_TELL_HOST


def test_5_5_4_num_pages_and_actual() -> None:
    with running(target=2 * MIB) as rig:
        rig.write_config(4, 3)
        assert rig.config() == (512, 3, 0, 0)


def test_5_5_6_a_new_target_is_a_configuration_change() -> None:
    with running() as rig:
        rig.device.set_target(MIB, 8 * MIB)
        wait_for(lambda: rig.irq.count > 0)
        assert rig.driver.acknowledge() & CONFIG_CHANGED


def test_5_5_6_requests_are_acknowledged_by_using_the_buffer() -> None:
    with running() as rig:
        rig.pages(INFLATE, [1024, 1025])
        rig.pages(DEFLATE, [1025, 1024])


def test_5_5_6_2_a_page_is_not_changed_after_its_inflation_was_acknowledged() -> None:
    with running() as rig:
        rig.pages(INFLATE, [1024])
        rig.fill(4 * MIB, PAGE)
        rig.pages(DEFLATE, [1024])
        assert rig.memory.read(4 * MIB, PAGE) == b"\xa5" * PAGE


def test_5_5_6_3_2_unknown_tags_are_ignored() -> None:
    with running() as rig:
        rig.driver.submit(STATS, [STAT.pack(999, 1) + STAT.pack(4, 2)])
        wait_for(lambda: rig.said() == {"free": 2})


def test_5_5_6_3_2_entries_in_any_order() -> None:
    entries = [STAT.pack(tag, tag + 100) for tag in range(10)]
    random.Random(1).shuffle(entries)
    with running() as rig:
        rig.driver.submit(STATS, [b"".join(entries)])
        wait_for(lambda: sorted(rig.said().values()) == list(range(100, 110)))


def test_5_5_6_3_statistics_are_asked_for_by_using_the_buffer() -> None:
    with running() as rig:
        chain = rig.driver.submit(STATS, [STAT.pack(4, 1)])
        wait_for(lambda: rig.said() == {"free": 1})
        rig.device.statistics(0)
        rig.driver.wait_used(STATS, chain)


def test_5_5_6_5_2_hints_that_were_not_asked_for_are_ignored() -> None:
    with running() as rig:
        rig.fill(4 * MIB, PAGE)
        rig.driver.request(HINT, [struct.pack("<L", 2)])
        rig.driver.request(HINT, [], [Buffer(4 * MIB, PAGE)])
        assert rig.memory.read(4 * MIB, PAGE) == b"\xa5" * PAGE
        assert rig.config()[2] == 0  # VIRTIO_BALLOON_CMD_ID_STOP: it makes no use of them


@pytest.mark.parametrize("poison", [0, 0xAAAA_AAAA])
def test_5_5_6_7_2_a_reported_page_reads_as_its_poison(poison: int) -> None:
    with running(start=False) as rig:
        rig.driver.negotiate()
        rig.driver.setup_queues()
        rig.write_config(12, poison)
        rig.driver.add_status(4)
        rig.memory.write(4 * MIB, struct.pack("<L", poison) * (PAGE // 4))
        rig.report(Buffer(4 * MIB, PAGE))
        assert rig.memory.read(4 * MIB, PAGE) == struct.pack("<L", poison) * (PAGE // 4)
