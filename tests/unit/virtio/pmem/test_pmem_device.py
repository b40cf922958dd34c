"""virtio-pmem over every ring: flushes, and what a driver gets for breaking the rules."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack
from threading import Thread

import pytest
from mmio_harness import wait_for
from pmem_rig import DONE, FAILED, FLUSH, Storage, pmem
from rings import RINGS, offering

from pyvmm.host.holes import data_of
from pyvmm.testing import Buffer, attached, illegal_chains, legal_chains
from pyvmm.testing.attached import AttachedDriver

MIB = 1 << 20


class Rig:
    """A device with a driver in front, and the storage behind it; `lines` are its own."""

    def __init__(self, ring: str, closing: ExitStack) -> None:
        self.ring = ring
        self.storage = Storage()
        self.lines: list[str] = []
        self.device = closing.enter_context(pmem(self.storage, self.lines))
        offering(ring, self.device)
        self.driver: AttachedDriver = closing.enter_context(attached(self.device, ring=ring))

    def flush(self) -> bytes:
        return self.driver.request([FLUSH], [4]).data


@pytest.fixture(params=RINGS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with ExitStack() as closing:
        rig = Rig(request.param, closing)
        yield rig
        rig.storage.may_end.set()


def test_a_flush_is_answered_when_the_file_is_written(rig: Rig) -> None:
    interrupts = rig.driver.irq.count
    rig.storage.may_end.clear()
    chain = rig.driver.mmio.submit(0, [FLUSH], [4])
    assert rig.storage.begun.wait(60)
    assert rig.driver.irq.count == interrupts
    rig.storage.may_end.set()
    assert rig.driver.mmio.wait_used(0, chain).written == 4
    assert rig.storage.count == 1
    assert rig.device.stats() == {"flushes": 1, "syncs": 1, "failed": 0}


def test_m3_flushes_that_wait_together_are_one_sync(rig: Rig) -> None:
    rig.storage.may_end.clear()
    first = rig.driver.mmio.submit(0, [FLUSH], [4])
    assert rig.storage.begun.wait(60)
    # Those come while the first is written, which may not have seen what they are for.
    others = [rig.driver.mmio.submit(0, [FLUSH], [4]) for _ in range(20)]
    rig.storage.may_end.set()
    for chain in (first, *others):
        assert rig.driver.mmio.wait_used(0, chain).written == 4
        assert rig.driver.queues[0].contents(chain) == DONE
    assert rig.storage.count == 2


def test_a_flush_in_pieces_is_a_flush(rig: Rig) -> None:
    for indirect in (False, True):
        answer = rig.driver.request([FLUSH[:1], FLUSH[1:]], [1, 0, 2, 1, 8], indirect=indirect)
        assert answer.data == DONE
        assert answer.buffers == bytes(12)


def test_m4_after_a_failure_no_flush_succeeds(rig: Rig) -> None:
    """The kernel tells of lost pages once; the next fdatasync knows nothing of them."""
    assert rig.flush() == DONE
    rig.storage.break_down()
    assert rig.flush() == FAILED
    rig.storage.error = 0
    assert rig.flush() == FAILED
    rig.driver.restart()
    assert rig.flush() == FAILED
    assert not rig.driver.needs_reset
    [line] = rig.lines
    assert "Input/output error" in line
    assert rig.device.stats() == {"flushes": 4, "syncs": 2, "failed": 3}


def test_m3_a_reset_waits_for_the_flush_and_the_next_driver_is_served(rig: Rig) -> None:
    rig.storage.may_end.clear()
    rig.driver.mmio.submit(0, [FLUSH], [4])
    assert rig.storage.begun.wait(60)
    reset = Thread(target=rig.device.reset)
    reset.start()
    reset.join(0.05)
    assert reset.is_alive()
    rig.storage.may_end.set()
    reset.join(60)
    assert not reset.is_alive()
    rig.driver.restart()
    assert rig.flush() == DONE


def test_a_paused_device_answers_after_the_pause(rig: Rig) -> None:
    """The pause of a VM holds its queues' locks (machine/pause.py)."""
    [queue] = rig.device.queues_in_use
    with queue.lock:
        chain = rig.driver.mmio.submit(0, [FLUSH], [4])
        assert not rig.storage.begun.wait(0.05)
    assert rig.driver.mmio.wait_used(0, chain).written == 4


# --- what a driver must not do; row numbers are those of docs/robustness.md ----------------------


@pytest.mark.parametrize("kind", [1, 0xFFFF_FFFF, 1 << 24])
def test_m1_an_unknown_request_fails_and_syncs_nothing(rig: Rig, kind: int) -> None:
    assert rig.driver.request([struct.pack("<L", kind)], [4]).data == FAILED
    assert rig.storage.count == 0
    assert rig.flush() == DONE


@pytest.mark.parametrize("size", [0, 1, 3])
def test_m1_a_request_that_is_too_short_fails(rig: Rig, size: int) -> None:
    assert rig.driver.request([FLUSH[:size]], [4]).data == FAILED
    assert rig.storage.count == 0


@pytest.mark.parametrize("size", [0, 1, 3])
def test_m2_a_flush_without_room_for_its_answer_is_done_all_the_same(rig: Rig, size: int) -> None:
    answer = rig.driver.request([FLUSH], [size])
    assert answer.written == 0 and answer.buffers == bytes(size)
    assert rig.storage.count == 1
    assert rig.flush() == DONE


def test_row39_what_is_readable_is_not_written(rig: Rig) -> None:
    place = rig.driver.mmio.arena.alloc(64)
    rig.driver.memory.write(place, FLUSH + b"\xa5" * 60)
    assert rig.driver.request([Buffer(place, 64)], []).written == 0
    assert rig.driver.memory.read(place, 64) == FLUSH + b"\xa5" * 60


@pytest.mark.parametrize(
    "bad",
    [Buffer(MIB, 4), Buffer(MIB - 2, 4), Buffer(2**64 - 2, 4), Buffer(5 << 30, 4)],
    ids=["outside RAM", "over the end of RAM", "wraps 2^64", "in the memory itself"],
)
def test_m2_buffers_outside_ram(rig: Rig, bad: Buffer) -> None:
    ram = rig.driver.memory.read(0, 0x1_0000)
    chain = rig.driver.mmio.submit(0, [bad], [4])
    assert rig.driver.mmio.wait_used(0, chain).written == 4
    assert rig.driver.queues[0].contents(chain) == FAILED
    chain = rig.driver.mmio.submit(0, [FLUSH], [bad])
    assert rig.driver.mmio.wait_used(0, chain).written == 0
    assert len(ram) == 0x1_0000 and not rig.driver.needs_reset
    assert rig.flush() == DONE


def test_a_broken_chain_behind_a_flush_leaves_the_flush_answered(rig: Rig) -> None:
    rig.storage.may_end.clear()
    first = rig.driver.mmio.submit(0, [FLUSH], [4])
    assert rig.storage.begun.wait(60)
    second = rig.driver.mmio.submit(0, [FLUSH], [4])
    bad = next(c for c in illegal_chains(rig.ring, "refused") if not c.indirect)
    bad.offer(rig.driver.queues[0])
    rig.driver.kick()
    rig.storage.may_end.set()
    for chain in (first, second):
        assert rig.driver.mmio.wait_used(0, chain).written == 4
    wait_for(lambda: rig.driver.needs_reset)
    rig.driver.restart()
    assert rig.flush() == DONE


@pytest.mark.parametrize("ring", RINGS)
def test_every_lawful_chain_comes_back(ring: str) -> None:
    with ExitStack() as closing:
        rig = Rig(ring, closing)
        for legal in legal_chains(ring):
            chain = legal.offer(rig.driver.queues[0])
            rig.driver.kick()
            assert rig.driver.mmio.wait_used(0, chain).written in (0, 4), legal
        assert rig.flush() == DONE


def test_a_file_that_cannot_tell_its_holes_is_data_throughout() -> None:
    """As a block device, which a file of this machine is in an emulated KVM host."""
    with open("/proc/self/status", "rb") as file:
        assert list(data_of(file.fileno(), 0, 8192)) == [(0, 8192)]
