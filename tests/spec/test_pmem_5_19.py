"""virtio 1.3, 5.19 PMEM Device: one test for each thing the device must or should do."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from mmio_harness import SHM_BASE_HIGH, SHM_BASE_LOW, SHM_LEN_HIGH, SHM_LEN_LOW, SHM_SEL
from pmem_rig import DONE, FAILED, FLUSH, PLACE, Storage, pmem

from pyvmm.testing import attached
from pyvmm.testing.attached import AttachedDriver
from pyvmm.testing.mmio_driver import DEVICE_ID, QUEUE_SEL, QUEUE_SIZE_MAX

SHMEM_REGION = 1
NO_REGION = (1 << 64) - 1


class Rig:
    """A device that a driver has found, and the storage behind it."""

    def __init__(self, closing: ExitStack) -> None:
        self.storage = Storage()
        device = closing.enter_context(pmem(self.storage, []))
        self.driver: AttachedDriver = closing.enter_context(attached(device, start=False))

    def register(self, offset: int) -> int:
        return self.driver.mmio.read(offset)

    def config(self) -> tuple[int, int]:
        start, size = struct.unpack("<QQ", self.driver.config(0, 16))
        return start, size

    def region(self, number: int) -> tuple[int, int]:
        """Base and length of a shared memory region."""
        self.driver.mmio.write(SHM_SEL, number)
        return (
            self.register(SHM_BASE_HIGH) << 32 | self.register(SHM_BASE_LOW),
            self.register(SHM_LEN_HIGH) << 32 | self.register(SHM_LEN_LOW),
        )


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as closing:
        yield Rig(closing)


def test_5_19_1_device_id(rig: Rig) -> None:
    assert rig.register(DEVICE_ID) == 27


def test_5_19_2_one_queue(rig: Rig) -> None:
    sizes = []
    for queue in (0, 1):
        rig.driver.mmio.write(QUEUE_SEL, queue)
        sizes.append(rig.register(QUEUE_SIZE_MAX))
    assert sizes[0] and not sizes[1]


def test_5_19_3_shared_memory_is_offered(rig: Rig) -> None:
    assert rig.driver.mmio.offered_features() & 0xFF_FFFF == SHMEM_REGION


def test_5_19_5_1_the_memory_is_shared_memory_region_0(rig: Rig) -> None:
    rig.driver.mmio.start()
    assert rig.driver.features & SHMEM_REGION
    assert rig.region(0) == PLACE
    assert rig.region(1) == rig.region(0xFFFF_FFFF) == (NO_REGION, NO_REGION)
    assert rig.config() == (0, 0)
    rig.driver.mmio.reset()
    assert rig.config() == PLACE  # the next driver may want it


def test_5_19_5_1_start_and_size_are_where_it_is(rig: Rig) -> None:
    rig.driver.mmio.start()
    without = rig.driver.mmio.offered_features() & ~SHMEM_REGION
    for _ in range(2):  # also after a driver that wanted zeros
        rig.driver.mmio.start(features=without)
        assert rig.config() == PLACE
        assert rig.driver.config(8, 16) == struct.pack("<QQ", PLACE.size, 0)


def test_5_19_5_1_over_pci_the_memory_is_where_its_bar_is() -> None:
    with pmem(Storage(), []) as device, attached(device, over="pci") as driver:
        assert driver.features & SHMEM_REGION
        assert driver.config(0, 16) == bytes(16)
        driver.restart(features=driver.mmio.offered_features() & ~SHMEM_REGION)
        assert driver.config(0, 16) == struct.pack("<QQ", *PLACE)
        device.shared_memory_moved(0, 9 << 30)
        assert driver.config(0, 16) == struct.pack("<QQ", 9 << 30, PLACE.size)


def test_5_19_7_1_the_file_is_synced_before_a_flush_is_completed(rig: Rig) -> None:
    rig.driver.mmio.start()
    rig.storage.may_end.clear()
    chain = rig.driver.mmio.submit(0, [FLUSH], [4])
    assert rig.storage.begun.wait(60)
    assert rig.driver.irq.count == 0
    rig.storage.may_end.set()
    assert rig.driver.mmio.wait_used(0, chain).written == 4
    assert rig.storage.count == 1


def test_5_19_7_2_0_for_success_and_minus_1_for_failure(rig: Rig) -> None:
    rig.driver.mmio.start()
    assert rig.driver.request([FLUSH], [4]).data == DONE
    rig.storage.break_down()
    assert rig.driver.request([FLUSH], [4]).data == FAILED
