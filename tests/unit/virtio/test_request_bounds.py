"""The bounded cost of one request of a guest, however long: memory, and the wait of others.

Row 75 of docs/robustness.md.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import balloon_rig
import blk_rig
import pytest
import request_cost
from rings import RINGS
from unit.virtio.blk.test_blk_nbd import why_not

from pyvmm.machine.pause import Pauser
from pyvmm.memory import GuestMemory
from pyvmm.testing import Buffer
from pyvmm.testing.blk_driver import DISCARD, IN, OK, OUT, WRITE_ZEROES, header
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio.blk.backend import Backend, FileBackend, cut_all
from pyvmm.virtio.blk.device import PIECE_BYTES, RANGE_PIECE_BYTES
from pyvmm.virtio.blk.request import SEGMENT
from pyvmm.virtio.rate_limit import RateLimiter, TokenBucket

MIB = 1 << 20
MOST = 8 * MIB  # row 75: what a request may hold
PATIENCE = 60.0  # seconds; reaching it means that something hangs


# --- memory, and another device meanwhile, for each kind of disk ----------------------------------


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize("kind", request_cost.KINDS)
def test_row75_one_request_of_192_mib(kind: str, operation: str, tmp_path: Path) -> None:
    if kind == "qcow2" and why_not():
        pytest.skip(why_not())
    script = Path(request_cost.__file__)
    done = subprocess.run(
        [sys.executable, script, kind, operation, tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "without direct I/O" in done.stderr:
        pytest.skip(f"the file system of {tmp_path} has no direct I/O")
    assert done.returncode == 0, done.stderr
    cost = json.loads(done.stdout)
    assert (cost["status"], cost["lines"]) == (OK, [])
    assert cost["largest"] <= PIECE_BYTES <= MOST // 2
    assert cost["grown"] <= MOST
    assert cost["daemon"] <= MOST
    if kind != "python":  # whose class holds the interpreter for as long as it likes
        assert cost["beside"] >= 2  # how many more depends on what else the machine does


# --- the pieces -----------------------------------------------------------------------------------


def test_views_are_cut_into_parts_of_one_size() -> None:
    rng = random.Random(75)
    for _ in range(300):
        data = rng.randbytes(rng.randrange(1, 200))
        marks = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(6)))
        views = [
            memoryview(data)[a:b] for a, b in zip([0, *marks], [*marks, len(data)], strict=True)
        ]
        most = rng.randrange(1, 80)
        parts = list(cut_all(views, most))
        assert b"".join(b"".join(part) for part, _ in parts) == data
        assert [sum(map(len, part)) for part, _ in parts] == [size for _, size in parts]
        assert {size for _, size in parts[:-1]} <= {most} and 0 < parts[-1][1] <= most
        assert all(view for part, _ in parts for view in part)


@pytest.fixture
def large_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blk_rig, "RAM_END", 32 * MIB)


@pytest.fixture(params=RINGS)
def ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(blk_rig, "ring", request.param)
    return str(request.param)


@pytest.fixture(params=[True, False], ids=["general", "usual"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blk_rig, "traced", request.param)


def image_of(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_each_byte_of_a_long_request_goes_where_it_belongs(
    tmp_path: Path, large_ram: None, ring: str, way: None
) -> None:
    image = image_of(tmp_path / "disk", 16 * MIB)
    size = 2 * PIECE_BYTES + MIB + 512
    data = random.Random(1).randbytes(size)
    places = [Buffer(8 * MIB, 5 * MIB + 17), Buffer(16 * MIB + 1, size - 5 * MIB - 17)]
    with blk_rig.running(blk_rig.file_backend(image)) as rig:
        rig.memory.write(places[0].addr, data[: places[0].length])
        rig.memory.write(places[1].addr, data[places[0].length :])
        assert rig.disk.call(OUT, 3, places).status == OK
        assert image.read_bytes()[1536 : 1536 + size] == data
        for place in places:
            rig.memory.write(place.addr, bytes(place.length))
        assert rig.disk.call(IN, 3, [], places).status == OK
        assert b"".join(rig.memory.read(*place) for place in places) == data


# --- a pause and a reset in the middle of a request -----------------------------------------------


class Gate(FileBackend):
    """In its second call it waits until the queue is to stop."""

    def __init__(self, path: Path) -> None:
        super().__init__(blk_rig.file_backend(path)._image)
        self.calls: list[tuple[int, int]] = []
        self.reached = threading.Event()
        self.stopping = lambda: True
        self.armed = True

    def note(self, size: int, offset: int) -> None:
        self.calls.append((offset, size))
        if self.armed and len(self.calls) == 2:
            self.reached.set()
            wait_until(self.stopping)

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        self.note(size, offset)
        super().readv(views, size, offset)

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        self.note(size, offset)
        super().writev(views, size, offset)

    def discard(self, offset: int, size: int) -> None:
        self.note(size, offset)
        super().discard(offset, size)

    def write_zeroes(self, offset: int, size: int, may_unmap: bool) -> None:
        self.note(size, offset)
        super().write_zeroes(offset, size, may_unmap)


def wait_until(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextmanager
def paused(transport: MmioTransport) -> Iterator[None]:
    """As `pyvmm pause` does it, and then `resume`, whatever happens meanwhile."""
    pauser = Pauser([], [transport])
    pauser.pause()
    try:
        yield
    finally:
        pauser.resume()


REQUESTS = {
    "read": (IN, [], [Buffer(8 * MIB, 12 * MIB), Buffer(4096 * 1024, 1)]),
    "write": (OUT, [Buffer(8 * MIB, 12 * MIB)], [Buffer(4096 * 1024, 1)]),
    "discard": (DISCARD, [SEGMENT.pack(0, 3 * RANGE_PIECE_BYTES // 512, 0)], [1]),
    "write zeroes": (WRITE_ZEROES, [SEGMENT.pack(0, 3 * RANGE_PIECE_BYTES // 512, 0)], [1]),
}


@contextmanager
def in_the_middle(tmp_path: Path, name: str) -> Iterator[SimpleNamespace]:
    """A request of three pieces, of which the second is being carried out."""
    type, readable, writable = REQUESTS[name]
    image = image_of(tmp_path / "disk", 3 * RANGE_PIECE_BYTES)
    with image.open("r+b") as file:
        file.write(b"d" * MIB)
    gate = Gate(image)
    with blk_rig.running(gate) as rig:
        queue = rig.device.queues_in_use[0]
        gate.stopping = lambda: queue.halt
        chain = rig.driver.submit(0, [header(type, 0), *readable], writable)
        assert gate.reached.wait(PATIENCE)
        yield SimpleNamespace(rig=rig, gate=gate, chain=chain)


@pytest.mark.parametrize("name", REQUESTS)
def test_row75_a_pause_comes_between_two_pieces(
    tmp_path: Path, large_ram: None, ring: str, way: None, name: str
) -> None:
    with in_the_middle(tmp_path, name) as middle:
        rig, gate = middle.rig, middle.gate
        with paused(rig.transport):
            assert len(gate.calls) == 2  # not all of it, and it is not answered
            assert rig.driver.queues[0].pop_used() is None
        rig.driver.wait_used(0, middle.chain)
        status = rig.driver.queues[0].contents(middle.chain)[-1]
        assert (status, rig.lines) == (OK, [])
        assert len(gate.calls) == 5  # done anew, whole
        if name == "read":
            assert rig.memory.read(8 * MIB, 2 * MIB) == b"d" * MIB + bytes(MIB)
        assert rig.disk.read(0, 512).status == OK


def test_row75_a_reset_comes_between_two_pieces(
    tmp_path: Path, large_ram: None, ring: str, way: None
) -> None:
    with in_the_middle(tmp_path, "write") as middle:
        middle.rig.driver.reset()
        assert len(middle.gate.calls) == 2
        middle.gate.armed = False
        middle.rig.driver.start()
        assert middle.rig.disk.read(0, 512).status == OK


def test_requests_behind_one_that_was_stopped_keep_their_order(
    tmp_path: Path, large_ram: None, ring: str, way: None
) -> None:
    with in_the_middle(tmp_path, "write") as middle:
        rig = middle.rig
        queue = rig.driver.queues[0]
        later = [rig.driver.submit(0, [header(IN, n)], [512, 1]) for n in range(3)]
        with paused(rig.transport):
            assert queue.pop_used() is None
        heads = [rig.driver.wait_used(0).head for _ in range(4)]
        assert heads == [middle.chain.head, *(chain.head for chain in later)]


# --- rate limits ----------------------------------------------------------------------------------


@contextmanager
def limited(
    backend: Backend, *, bytes: int = 0, operations: int = 0
) -> Iterator[tuple[blk_rig.Rig, RateLimiter]]:
    """A disk with a burst of so many, of which none come back while a test runs."""
    limits = RateLimiter(
        TokenBucket(1, bytes) if bytes else None, TokenBucket(1, operations) if operations else None
    )
    with blk_rig.running(backend, start=False) as rig:
        rig.device.limits = limits
        rig.driver.start()
        yield rig, limits


def seconds(limits: RateLimiter) -> int:
    return -(-limits.ready(time.monotonic_ns()) // 1_000_000_000)


@pytest.mark.parametrize("flags", [0, 1], ids=["keep", "unmap"])
def test_write_zeroes_count_as_the_bytes_that_they_write(tmp_path: Path, flags: int) -> None:
    image = image_of(tmp_path / "disk", 64 * MIB)
    with limited(blk_rig.file_backend(image), bytes=10 * MIB) as (rig, limits):
        assert rig.disk.write_zeroes((0, 4 * MIB // 512, flags)).status == OK
        assert seconds(limits) == 0
        assert rig.disk.write_zeroes((0, 40 * MIB // 512, flags), (0, 8, flags)).status == OK
        # What is owed: 34 MiB and the second segment, less what a second or two have brought.
        assert 34 * MIB < seconds(limits) < 34 * MIB + 8192


def test_a_refused_range_counts_for_nothing(tmp_path: Path) -> None:
    image = image_of(tmp_path / "disk", MIB)
    with limited(blk_rig.file_backend(image), bytes=MIB) as (rig, limits):
        assert rig.disk.write_zeroes((0, 2 * MIB // 512, 0)).status != OK
        assert seconds(limits) == 0


def test_a_discard_counts_as_operations_one_for_each_piece(tmp_path: Path) -> None:
    image = image_of(tmp_path / "disk", 4 * RANGE_PIECE_BYTES)
    backend = blk_rig.file_backend(image)
    with limited(backend, bytes=MIB, operations=10) as (rig, limits):
        assert rig.disk.discard((0, 4 * RANGE_PIECE_BYTES // 512, 0)).status == OK
        assert seconds(limits) == 0  # four operations, and no bytes
        assert rig.disk.discard(*[(n, 1, 0) for n in range(32)]).status == OK
        assert 20 <= seconds(limits) <= 27


def test_what_is_stopped_in_the_middle_is_given_back(tmp_path: Path, large_ram: None) -> None:
    """Its chain counts when it is carried out, once."""
    image = image_of(tmp_path / "disk", 16 * MIB)
    gate = Gate(image)
    with limited(gate, bytes=100 * MIB, operations=100) as (rig, limits):
        queue = rig.device.queues_in_use[0]
        gate.stopping = lambda: queue.halt
        chain = rig.driver.submit(0, [header(OUT, 0), Buffer(8 * MIB, 12 * MIB)], [1])
        assert gate.reached.wait(PATIENCE)
        buckets = [limits._bytes, limits._operations]
        with paused(rig.transport):
            assert [b and b._level // 1_000_000_000 for b in buckets] == [100 * MIB, 100]
        rig.driver.wait_used(0, chain)
        assert [b and b._level // 1_000_000_000 for b in buckets] == [88 * MIB, 99]


# --- the balloon ----------------------------------------------------------------------------------


@pytest.fixture
def slow_switches() -> Iterator[None]:
    """A thread gives the interpreter away by itself only: in a call that lets others go on."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


def test_row75_other_threads_go_on_while_memory_is_given_back(slow_switches: None) -> None:
    memory = GuestMemory([(0, 128 * MIB)])
    memory.view(0, memory.size)[:] = b"\1" * memory.size
    beats = 0
    done = threading.Event()

    def beat() -> None:
        nonlocal beats
        while not done.is_set():
            beats += 1
            time.sleep(0.001)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        for _ in range(50):  # on a busy machine the other thread has not always a processor
            before = beats
            memory.discard(0, memory.size)
            if beats > before:
                break
            memory.view(0, memory.size)[:] = b"\1" * memory.size
        assert beats > before
    finally:
        done.set()
        thread.join()
        memory.close()


@pytest.fixture
def balloon(monkeypatch: pytest.MonkeyPatch) -> Iterator[balloon_rig.Rig]:
    monkeypatch.setattr(balloon_rig, "RAM_END", 160 * MIB)
    with balloon_rig.running() as rig:
        yield rig


@pytest.mark.parametrize("asked", ["pause", "reset", "reset of another queue"])
def test_row75_a_report_of_much_memory_stops_between_two_pieces(
    balloon: balloon_rig.Rig, asked: str
) -> None:
    rig = balloon
    start, size = 32 * MIB, 128 * MIB
    for addr in range(start, start + size, 16 * MIB):
        rig.fill(addr, 4096)
    calls: list[int] = []
    reached, go = threading.Event(), threading.Event()
    real = rig.memory.discard
    active = rig.device._active
    assert active is not None
    queue = active.worker.queues[balloon_rig.REPORTING]
    assert queue is not None

    def discard(addr: int, length: int) -> None:
        calls.append(length)
        if len(calls) == 2:
            reached.set()
            wait_until(lambda: go.is_set() or queue.halt or not active.worker.may_go_on)
        real(addr, length)

    rig.memory.discard = discard  # type: ignore[method-assign]
    chain = rig.driver.submit(balloon_rig.REPORTING, [], [Buffer(start, size)])
    assert reached.wait(PATIENCE)
    assert calls[0] <= 32 * MIB
    if asked == "reset":
        rig.driver.reset()
        assert len(calls) == 2
        return
    if asked == "pause":
        with paused(rig.driver.registers):  # type: ignore[arg-type]
            assert len(calls) == 2
    else:
        rig.driver.reset_queue(balloon_rig.INFLATE)
    rig.driver.wait_used(balloon_rig.REPORTING, chain)
    pieces = -(-size // (32 * MIB))
    if asked == "pause":
        assert len(calls) == 2 + pieces
    # Done anew, whole; what the reset of another queue interrupts may be more than one attempt.
    assert len(calls) >= 2 + pieces and sum(calls[-pieces:]) == size
    assert rig.is_gone(start, size)
    assert rig.device.given_back == size
