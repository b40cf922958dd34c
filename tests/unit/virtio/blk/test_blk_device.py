"""The block device as a whole: data both ways, batches, trace and log lines."""

from __future__ import annotations

import os
import random
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from blk_rig import HIGH, MIB, Rig, file_backend, running

from pyvmm.errors import HostError
from pyvmm.testing import Buffer
from pyvmm.testing.blk_driver import IN, IOERR, OK, OUT, UNSUPP, WRITEBACK, header
from pyvmm.virtio.blk.backend import Backend

SIZE = 1 * MIB


class Memory(Backend):
    """A backend of a few lines: what another storage format would have to be."""

    def __init__(self, size: int = SIZE, read_only: bool = False) -> None:
        self.data = bytearray(size)
        self.size_sectors = size // 512
        self.read_only = read_only

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        for view in views:
            view[:] = self.data[offset : offset + len(view)]
            offset += len(view)

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        self.data[offset : offset + size] = b"".join(views)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_another_backend_is_a_class_of_a_few_methods() -> None:
    backend: Backend = Memory()
    with running(backend) as rig:
        assert rig.disk.write(3, b"m" * 1024).status == OK
        assert rig.disk.read(3, 1024).data == b"m" * 1024
        assert rig.disk.flush().status == OK


def cut(rng: random.Random, data: bytes) -> list[bytes]:
    marks = [0, *sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(5))), len(data)]
    return [data[a:b] for a, b in pairwise(marks)]


@pytest.mark.parametrize("seed", range(4))
def test_random_requests_of_random_layout_against_a_model(image: Path, seed: int) -> None:
    rng = random.Random(seed)
    model = bytearray(image.read_bytes())
    with running(file_backend(image)) as rig:
        for _ in range(250):
            sector = rng.choice([rng.randrange(SIZE // 512), SIZE // 512 - 1, 2**64 - 1])
            size = rng.choice([0, 512, 1024, 4096, 8192, 513, 100])
            start = sector * 512
            lawful = size % 512 == 0 and start + size <= SIZE
            indirect = rng.random() < 0.5
            if rng.random() < 0.5:
                data = rng.randbytes(size)
                parts = cut(rng, header(OUT, sector) + data)
                answer = rig.disk.raw(parts, [1], indirect=indirect)
                if lawful:
                    model[start : start + size] = data
                assert (answer.status, answer.written) == (OK if lawful else IOERR, 1)
            else:
                parts = [len(part) for part in cut(rng, bytes(size + 1))]
                answer = rig.disk.raw(cut(rng, header(IN, sector)), parts, indirect=indirect)
                if lawful:
                    assert answer == (OK, model[start : start + size], size + 1)
                else:
                    assert answer.status == IOERR and answer.written <= max(size, 1)
        assert not rig.driver.needs_reset
    assert image.read_bytes() == model


def test_garbage_never_ends_the_device(image: Path) -> None:
    rng = random.Random(7)
    size = image.stat().st_size
    # Not the low region: there the rings are, and breaking those is another test's business.
    addresses = [4 * MIB, HIGH, HIGH + MIB - 1, 2**63, 2**64 - 1]

    def part() -> Buffer:
        length = rng.choice([0, 1, 15, 16, 17, 512, 4096, 0x3FFF_FFFF])
        return Buffer(rng.choice(addresses), length)

    with running(file_backend(image)) as rig:
        for _ in range(300):
            type = rng.choice([0, 1, 4, 8, 11, 13, rng.getrandbits(32)])
            head = header(type, rng.getrandbits(rng.choice([4, 11, 64])))
            readable = [head, *(part() for _ in range(rng.randrange(3)))]
            rig.disk.raw(readable, [part() for _ in range(rng.randrange(3))] or [1])
        rig.assert_alive()
    assert image.stat().st_size == size


class Gate(Memory):
    """Holds up every request whose sector is in `closed` until `release`."""

    def __init__(self, closed: int) -> None:
        super().__init__(4 * MIB)
        self.closed = closed
        self.reached, self.release = threading.Event(), threading.Event()

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        if offset == self.closed * 512:
            self.reached.set()
            assert self.release.wait(60)
        super().readv(views, size, offset)


def test_large_requests_become_visible_before_the_whole_queue_is_done() -> None:
    gate = Gate(closed=3)
    with running(gate) as rig:
        queue = rig.driver.queues[0]
        large = 768 << 10
        chains = [queue.add([header(IN, n)], [large, 1]) for n in range(4)]
        queue.publish()
        rig.driver.kick()
        assert gate.reached.wait(60)
        assert queue.used_idx == 3  # over 2 MiB are out while the fourth request is in progress
        gate.release.set()
        for chain in chains:
            assert rig.driver.wait_used(0, chain).written == large + 1


def test_reset_waits_for_a_request_that_the_host_is_slow_with() -> None:
    gate = Gate(closed=0)
    with running(gate) as rig:
        queue = rig.driver.queues[0]
        for _ in range(3):
            queue.add([header(IN, 0)], [512, 1])
        queue.publish()
        rig.driver.kick()
        assert gate.reached.wait(60)
        resetting = threading.Thread(target=rig.device.reset)
        resetting.start()
        assert resetting.is_alive()  # it may not return while guest memory is still written
        gate.release.set()
        resetting.join(60)
        assert not resetting.is_alive()
        assert queue.used_idx <= 1  # the one at hand was finished, the others not begun


def test_small_requests_of_a_batch_cost_one_interrupt() -> None:
    with running(Memory()) as rig:
        queue = rig.driver.queues[0]
        chains = [queue.add([header(IN, n)], [512, 1]) for n in range(64)]
        queue.used_event = 63
        queue.publish()
        rig.driver.kick()
        rig.driver.wait_interrupt(1)
        assert queue.used_idx == 64
        for chain in chains:
            rig.driver.wait_used(0, chain)
        assert rig.driver.irq.count == 1


def test_two_queues_work_at_the_same_time() -> None:
    gate = Gate(closed=0)
    with running(gate, num_queues=2) as rig:
        slow = rig.driver.submit(0, [header(IN, 0)], [512, 1])
        assert gate.reached.wait(60)
        fast = rig.driver.submit(1, [header(IN, 8)], [512, 1])
        assert rig.driver.wait_used(1, fast).written == 513
        assert not rig.driver.queues[0].has_used()
        gate.release.set()
        assert rig.driver.wait_used(0, slow).written == 513


@pytest.mark.parametrize(
    ("name", "serial", "shown"),
    [("vda", "", "vda"), ("vda", "root-disk", "root-disk"), ("x", "s" * 30, "s" * 20)],
)
def test_the_id_the_guest_reads(name: str, serial: str, shown: str) -> None:
    with running(Memory(), name=name, serial=serial) as rig:
        assert rig.disk.get_id().data == shown.encode().ljust(20, b"\0")


def trace_of(rig: Rig) -> list[str]:
    return [str(event) for event in rig.events]


@pytest.mark.parametrize("kept", [0, 1])
def test_a_reset_forgets_what_the_driver_chose_for_the_cache(kept: int) -> None:
    """Also for a driver that then reads the configuration before it has negotiated."""
    with running(Memory(), start=False) as rig:
        fresh = rig.driver.registers.read(0x100 + WRITEBACK, 1)
        rig.driver.start()
        rig.driver.registers.write(0x100 + WRITEBACK, 1, kept)
        assert rig.driver.registers.read(0x100 + WRITEBACK, 1) == kept
        rig.driver.reset()
        assert rig.driver.registers.read(0x100 + WRITEBACK, 1) == fresh == 0


def test_the_trace_has_one_line_for_each_request() -> None:
    with running(Memory(), name="root") as rig:
        rig.disk.read(8, 4096)
        rig.disk.write(2, b"x" * 512)
        rig.disk.flush()
        rig.disk.get_id()
        rig.disk.read(2**40, 512)
        rig.disk.call(11)
        rig.disk.call(99, 5)
        rig.disk.raw([b"short"], [1])
        rig.disk.raw([header(IN)], [])
        assert trace_of(rig) == [
            "root: IN sector 8 + 4096 bytes: OK",
            "root: OUT sector 2 + 512 bytes: OK",
            "root: FLUSH sector 0 + 0 bytes: OK",
            "root: GET_ID sector 0 + 20 bytes: OK",
            "root: IN sector 1099511627776 + 512 bytes: IOERR"
            " (past the end of the disk, which has 2048 sectors)",
            "root: DISCARD sector 0 + 0 bytes: IOERR (0 bytes are not one or more segments)",
            "root: request type 99 sector 5 + 0 bytes: UNSUPP (unknown request type 99)",
            "root: a request without a header sector 0 + 0 bytes: IOERR (the chain has 5 bytes"
            " left where 16 are needed (virtio 1.3, 2.7.4 Message Framing))",
            "root: a request without a header sector 0 + 0 bytes: no answer"
            " (no status byte in RAM: <chain 0: 16 bytes to read in 1 parts,"
            " 0 to write in 0>)",
        ]


def test_untraced_and_without_a_log_of_its_own() -> None:
    with running(Memory(), trace=None) as rig:
        assert rig.disk.read(0, 512).status == OK
        assert rig.disk.call(77).status == UNSUPP
        assert rig.events == []


def test_a_request_that_fails_on_the_host_is_logged_with_its_place() -> None:
    class Broken(Memory):
        def readv(self, views: list[memoryview], size: int, offset: int) -> None:
            raise HostError(5, "read of the tape")

    with running(Broken()) as rig:
        assert rig.disk.read(17, 512).status == IOERR
        assert rig.lines == ["IN at sector 17 answered IOERR: read of the tape: Input/output error"]


@pytest.mark.parametrize("offset", [71, 72, 200, 0xEFF, 0xFFF])
def test_row3_the_configuration_is_zero_past_its_end(offset: int) -> None:
    # CVE classes 2021-45464 and 2011-2512: configuration space and queue index out of bounds
    with running(Memory()) as rig:
        assert rig.device.read_config(offset, 8) == bytes(8)
        assert rig.transport.read(0x100 + (offset & ~3), 4) == 0
        rig.driver.write(0x050, 0xFFFF_FFFF)
        rig.assert_alive()


class Vast(Backend):
    """Nothing but zeros, which nobody keeps; it says what was asked of it."""

    def __init__(self, read_only: bool = False) -> None:
        self.size_sectors = 1 << 32
        self.read_only = read_only
        self.can_discard = True
        self.asked: list[str] = []

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        self.asked.append("read")

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        self.asked.append("write")

    def discard(self, offset: int, size: int) -> None:
        self.asked.append("discard")

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        self.asked.append("zero")

    def flush(self) -> None:
        self.asked.append("flush")

    def close(self) -> None:
        pass


@pytest.mark.parametrize("writeback", [0, 1])
def test_a_write_of_several_pieces_through_the_cache_ends_with_a_flush(writeback: int) -> None:
    disk = Vast()
    with running(disk) as rig:
        rig.driver.registers.write(0x100 + WRITEBACK, 1, writeback)
        data = [Buffer(0x100000, MIB)] * 6
        written, status = rig.driver.request(0, [header(OUT, 0), *data], [1])
        assert (written, status[0]) == (1, OK)
        assert disk.asked == ["write", "write", *([] if writeback else ["flush"])]


@pytest.mark.parametrize(("ask", "most"), [("discard", 1 << 21), ("write_zeroes", 1 << 18)])
def test_row47_a_segment_as_large_as_the_limit_says_and_no_larger(ask: str, most: int) -> None:
    disk = Vast()
    with running(disk) as rig:
        request = getattr(rig.disk, ask)
        assert request((0, most, 0)).status == OK
        disk.asked.clear()
        assert request((0, most + 1, 0)).status == IOERR
        assert disk.asked == []


def test_row42_a_read_only_disk_offers_no_way_to_change_it() -> None:
    with running(Vast(read_only=True), start=False) as rig:
        # Of struct virtio_blk_config: what a discard and a write of zeroes may have, and unmap.
        assert [rig.driver.registers.read(0x100 + at, 4) for at in range(36, 56, 4)] == [0] * 5
        assert not rig.driver.offered_features() & (1 << 13 | 1 << 14)
    with running(Vast(), start=False) as rig:
        assert all(rig.driver.registers.read(0x100 + at, 4) for at in range(36, 56, 4))
        assert rig.driver.offered_features() & (1 << 13 | 1 << 14) == 1 << 13 | 1 << 14
