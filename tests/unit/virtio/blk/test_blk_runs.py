"""Requests that follow one another on the disk are carried out at once, and nobody can tell."""

from __future__ import annotations

import errno

import pytest
from blk_rig import running
from queue_rig import Rig as QueueRig

from pyvmm.errors import HostError
from pyvmm.testing import Used
from pyvmm.testing.blk_driver import FLUSH, IN, IOERR, OK, OUT, UNTOUCHED, header
from pyvmm.virtio.blk.backend import Backend, scatter
from pyvmm.virtio.blk.fast_path import serve_usual

SECTORS = 64


class Recorder(Backend):
    """A disk in memory that writes down what it is asked, and cannot touch the `broken` sectors."""

    size_sectors = SECTORS

    def __init__(self, *broken: int, read_only: bool = False) -> None:
        self.data = bytearray(b"".join(bytes([n]) * 512 for n in range(SECTORS)))
        self.broken = broken
        self.read_only = read_only
        self.calls: list[tuple[str, int, int]] = []

    def note(self, what: str, offset: int, size: int) -> None:
        self.calls.append((what, offset // 512, size // 512))
        if any(offset <= sector * 512 < offset + size for sector in self.broken):
            raise HostError(errno.EIO, "broken sector")

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        self.note("read", offset, size)
        scatter(self.data[offset : offset + size], views)

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        self.note("write", offset, size)
        self.data[offset : offset + size] = b"".join(views)

    def flush(self) -> None:
        self.calls.append(("flush", 0, 0))


def carry_out(rig, requests):
    """(status, data) of each of (type, sector, sectors), all made available before one kick."""
    queue = rig.driver.queues[0]
    chains = []
    for type, sector, count in requests:
        size = count * 512
        readable = [header(type, sector), *([b"w" * size] if type == OUT and size else [])]
        chains.append(queue.add(readable, [*([size] if type == IN and size else []), 1]))
        rig.memory.write(chains[-1].writable[-1].addr, bytes([UNTOUCHED]))
    queue.publish()
    rig.driver.kick()
    answers = []
    for chain in chains:
        used = rig.driver.wait_used(0, chain)
        contents = queue.contents(chain)
        assert used.written == len(contents) or contents[-1] != OK
        answers.append((contents[-1], contents[:-1]))
    return answers


def sectors(first, count):
    return b"".join(bytes([n]) * 512 for n in range(first, first + count))


def test_reads_that_follow_one_another_are_one():
    disk = Recorder()
    with running(disk, trace=None) as rig:
        answers = carry_out(rig, [(IN, 4, 1), (IN, 5, 3), (IN, 8, 2)])
    assert disk.calls == [("read", 4, 6)]
    assert answers == [(OK, sectors(4, 1)), (OK, sectors(5, 3)), (OK, sectors(8, 2))]


def test_writes_that_follow_one_another_are_one():
    disk = Recorder()
    with running(disk, trace=None) as rig:
        carry_out(rig, [(OUT, 4, 1), (OUT, 5, 3)])
    assert disk.calls == [("write", 4, 4)]
    assert disk.data[4 * 512 : 8 * 512] == b"w" * 2048
    assert disk.data[8 * 512] == 8


@pytest.mark.parametrize(
    ("requests", "calls"),
    [
        ([(IN, 4, 1), (IN, 6, 1)], [("read", 4, 1), ("read", 6, 1)]),
        ([(IN, 4, 1), (IN, 4, 1)], [("read", 4, 1), ("read", 4, 1)]),
        ([(IN, 4, 1), (IN, 3, 1)], [("read", 4, 1), ("read", 3, 1)]),
        ([(OUT, 4, 1), (IN, 5, 1)], [("write", 4, 1), ("read", 5, 1)]),
        ([(OUT, 4, 1), (FLUSH, 0, 0), (OUT, 5, 1)],
         [("write", 4, 1), ("flush", 0, 0), ("write", 5, 1)]),
        ([(OUT, 4, 1), (IN, 4, 1), (OUT, 4, 1)],
         [("write", 4, 1), ("read", 4, 1), ("write", 4, 1)]),
    ],
)  # fmt: skip
def test_what_does_not_follow_keeps_its_order(requests, calls):
    disk = Recorder()
    with running(disk, trace=None) as rig:
        answers = carry_out(rig, requests)
    assert disk.calls == calls
    assert [status for status, _ in answers] == [OK] * len(requests)


@pytest.mark.parametrize("type", [IN, OUT])
@pytest.mark.parametrize("broken", [4, 5, 7, 9])
def test_only_the_request_that_cannot_be_done_fails(type, broken):
    with running(Recorder(broken), trace=None) as rig:
        answers = carry_out(rig, [(type, 4, 1), (type, 5, 3), (type, 8, 2)])
    touches = [broken == 4, broken in (5, 6, 7), broken in (8, 9)]
    assert [status for status, _ in answers] == [IOERR if bad else OK for bad in touches]


@pytest.mark.parametrize("type", [IN, OUT])
def test_only_what_is_past_the_end_fails(type):
    disk = Recorder()
    with running(disk, trace=None) as rig:
        answers = carry_out(
            rig, [(type, SECTORS - 2, 1), (type, SECTORS - 1, 1), (type, SECTORS, 1)]
        )
    assert [status for status, _ in answers] == [OK, OK, IOERR]
    assert len(disk.data) == SECTORS * 512


def test_writes_to_a_read_only_disk_all_fail():
    disk = Recorder(read_only=True)
    with running(disk, trace=None) as rig:
        answers = carry_out(rig, [(OUT, 4, 1), (OUT, 5, 1)])
    assert [status for status, _ in answers] == [IOERR, IOERR]
    assert disk.calls == []


def test_a_refused_request_is_no_link_between_two_others():
    """A read of half a sector at the place where the next one begins."""
    disk = Recorder()
    with running(disk, trace=None) as rig:
        queue = rig.driver.queues[0]
        chains = [
            queue.add([header(IN, sector)], [size, 1])
            for sector, size in ((4, 512), (5, 100), (5, 512))
        ]
        queue.publish()
        rig.driver.kick()
        found = []
        for chain in chains:
            rig.driver.wait_used(0, chain)
            found.append(queue.contents(chain)[-1])
    assert found == [OK, IOERR, OK]
    assert disk.calls == [("read", 4, 1), ("read", 5, 1)]


def test_what_came_before_a_broken_chain_is_still_done():
    disk = Recorder()
    with running(disk, trace=None) as rig:
        queue = rig.driver.queues[0]
        first = queue.add([header(IN, 4)], [512, 1])
        second = queue.add([header(IN, 5)], [512, 1])
        queue.offer(0xFFFF)
        queue.publish()
        rig.driver.kick()
        rig.driver.wait_needs_reset()
        assert queue.used_idx == 2
        assert queue.contents(first) == sectors(4, 1) + bytes([OK])
        assert queue.contents(second) == sectors(5, 1) + bytes([OK])


def test_write_through_flushes_a_run_before_it_completes():
    disk = Recorder()
    with running(disk, start=False, trace=None) as rig:
        rig.driver.start(features=rig.driver.offered_features() & ~(1 << 9))
        carry_out(rig, [(OUT, 4, 1), (OUT, 5, 1)])
    assert disk.calls == [("write", 4, 2), ("flush", 0, 0)]


def test_row39_a_status_byte_that_was_writable_once_is_not_written_where_it_may_only_be_read():
    disk = Recorder()
    with running(disk, trace=None) as rig:
        driver, queue = rig.driver, rig.driver.queues[0]
        good = queue.add([header(OUT, 4), b"w" * 512], [1])
        queue.publish()
        driver.kick()
        driver.wait_used(0, good)
        place = good.writable[0]
        rig.memory.write(place.addr, bytes([UNTOUCHED]))
        bad = queue.add([*good.readable, place])
        queue.publish()
        driver.kick()
        assert driver.wait_used(0, bad).written == 0
        assert rig.memory.read(place.addr, 1) == bytes([UNTOUCHED])
    assert disk.calls == [("write", 4, 1)]


def test_a_stop_in_the_middle_of_a_batch_leaves_the_rest_in_the_ring():
    rig = QueueRig(16)
    given = [rig.driver.add([header(IN, sector)], [512, 1]) for sector in (4, 9)]
    rig.driver.publish()
    calls = []

    def carry_out(type, sector, end, views):
        calls.append((type, sector, end, len(views)))
        rig.queue.halt = len(calls) == 1
        return True

    assert serve_usual(rig.queue, 1 << 20, carry_out)
    rig.queue.publish_used()
    assert (calls, rig.all_used()) == ([(IN, 4, 5, 1)], [Used(given[0].head, 513)])
    rig.queue.halt = False
    assert not serve_usual(rig.queue, 1 << 20, carry_out)
    rig.queue.publish_used()
    assert rig.all_used() == [Used(given[1].head, 513)]
    rig.close()
