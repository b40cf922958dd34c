"""Storage that reads have to wait for is told of all reads of a batch before the first of them, so
that it works on them at the same time."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from blk_rig import file_backend, running
from queue_rig import LAYOUTS
from queue_rig import Rig as QueueRig

from pyvmm.errors import DriverError
from pyvmm.testing import Buffer
from pyvmm.testing.blk_driver import FLUSH, IN, OUT, header
from pyvmm.virtio.blk import backend as module
from pyvmm.virtio.blk import device
from pyvmm.virtio.blk.backend import Backend, FileBackend
from pyvmm.virtio.blk.device import _LOOK_AHEAD, PIECE_BYTES, BlockDevice
from pyvmm.virtio.blk.direct import DirectBackend
from pyvmm.virtio.blk.overlay import open_snapshot
from pyvmm.virtio.rate_limit import limiter

SECTORS = 64
Ask = tuple[int, int, int]  # type, sector, how many
ASKED: list[Ask] = [(IN, 4, 2), (OUT, 8, 1), (IN, 20, 1), (IN, 62, 4), (IN, 12, 4)]
DONE = [("read", 4, 2), ("write", 8, 1), ("read", 20, 1), ("read", 12, 4)]
TOLD = [("expect", 4, 2), ("expect", 20, 1), ("expect", 12, 4)]


class Slow(Backend):
    """Writes down what it is asked; `is_slow` says whether reads have to wait for it."""

    size_sectors = SECTORS

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.is_slow = True

    def note(self, what: str, size: int, offset: int) -> None:
        self.calls.append((what, offset // 512, size // 512))

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        self.misses += self.is_slow
        self.note("read", size, offset)

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        self.note("write", size, offset)

    def expect(self, size: int, offset: int) -> None:
        self.note("expect", size, offset)

    def flush(self) -> None:
        self.calls.append(("flush", 0, 0))

    def take(self) -> list[tuple[str, int, int]]:
        calls, self.calls = self.calls, []
        return calls


class Ring:
    """A device in front of `disk`, and a ring. `pieces` is of how many parts the data is."""

    def __init__(self, layout: str, disk: Backend, pieces: int = 1) -> None:
        self.rig = QueueRig(64, layout=layout)
        self.device = BlockDevice(disk, name="vda", log=lambda line: None)
        self.pieces = pieces

    def serve(self, asked: list[Ask], serve: Callable[..., object] | None = None) -> None:
        for type, sector, sectors in asked:
            data = [sectors * 512 // self.pieces] * self.pieces if sectors else []
            readable = [header(type, sector), *(bytes(n) for n in data if type == OUT)]
            self.rig.driver.add(readable, [*(data if type == IN else []), 1])
        self.rig.driver.publish()
        (serve or self.device.serve)(self.rig.queue)
        self.rig.queue.publish_used()
        self.rig.all_used()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pieces", [1, 2])
def test_reads_are_announced_after_one_that_had_to_wait(layout: str, pieces: int) -> None:
    disk = Slow()
    ring = Ring(layout, disk, pieces)
    ring.serve(ASKED)
    assert disk.take() == DONE
    ring.serve(ASKED)
    assert disk.take() == TOLD + DONE
    ring.serve([(IN, 4, 2), (OUT, 8, 1), (FLUSH, 0, 0)])  # one is read soon enough
    assert disk.take() == [("read", 4, 2), ("write", 8, 1), ("flush", 0, 0)]


@pytest.mark.parametrize("pieces", [1, 2])
def test_storage_that_has_become_quick_is_told_no_more(pieces: int) -> None:
    disk = Slow()
    ring = Ring("split", disk, pieces)
    ring.serve(ASKED)
    disk.is_slow = False
    for _ in range(1 + _LOOK_AHEAD):
        disk.take()
        ring.serve(ASKED)
    assert disk.take() == TOLD + DONE
    ring.serve(ASKED)
    assert disk.take() == DONE


def test_a_limit_counts_each_request_once() -> None:
    disk = Slow()
    disk.misses = 1
    ring = Ring("split", disk)
    ring.device._misses = 0
    limits = limiter(bps=0, iops=1, bps_burst=0, iops_burst=len(ASKED))
    assert limits is not None
    ring.serve(ASKED, limits.around(ring.device.serve, ring.device.size_of))
    assert disk.take() == TOLD + DONE


def test_of_a_long_read_no_more_is_announced_than_is_read_at_once() -> None:
    """What announces takes no notice of a stop, and an overlay does it cluster by cluster."""
    disk = Slow()
    disk.size_sectors = 1 << 20
    ring = Ring("split", disk)
    ring.serve(ASKED)
    disk.take()
    driver, most = ring.rig.driver, PIECE_BYTES // 512
    driver.add([header(IN, 0)], [256, 256, 1])
    # All of it is the same place in the guest's memory.
    place, size = Buffer(0, 256 << 10), 2 * PIECE_BYTES
    driver.add([header(IN, 8)], [*[place] * (size // place.length), 1], indirect=True)
    driver.publish()
    ring.device.serve(ring.rig.queue)
    told = [call for call in disk.take() if call[0] == "expect"]
    assert told == [("expect", 0, 1), ("expect", 8, most)]


def test_what_is_looked_at_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also chains that are refused, of which nothing is kept but the chain."""
    disk = Slow()
    ring = Ring("split", disk)
    ring.serve(ASKED)
    disk.take()
    driver = ring.rig.driver
    monkeypatch.setattr(device, "_MOST_PARTS", 100)
    taken: list[object] = []
    pop = ring.rig.queue.pop

    def count() -> object:
        chain = pop()
        taken.append(chain)
        return chain

    for _ in range(8):
        # Not whole sectors
        driver.add([header(IN, 0)], [*[2] * 30, 1], indirect=True)
    driver.publish()
    monkeypatch.setattr(ring.rig.queue, "pop", count)
    ring.device._expect_batch(ring.rig.queue)
    assert len(taken) == 4
    ring.serve([])


def test_what_comes_before_a_broken_chain_is_announced_and_carried_out() -> None:
    disk = Slow()
    ring = Ring("split", disk, pieces=2)
    ring.serve(ASKED)
    disk.take()
    driver = ring.rig.driver
    for sector in (4, 8):
        driver.add([header(IN, sector)], [256, 256, 1])
    driver.offer(driver.size)  # no head of this table
    driver.publish()
    with pytest.raises(DriverError):
        ring.device.serve(ring.rig.queue)
    told = [("expect", 4, 1), ("expect", 8, 1)]
    assert disk.take() == [*told, ("read", 4, 1), ("read", 8, 1)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SECTORS * 512))
    return path


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What reads at once end with, last first: nothing, for one that has to wait, or an errno;
    and a place for what is announced."""
    answers: list[object] = []
    real = os.preadv

    def preadv(fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags == os.RWF_NOWAIT and answers:
            raise OSError(answers.pop(), "no")
        return real(fd, views, offset)

    monkeypatch.setattr(module, "_preadv", preadv)
    return answers


def read(disk: Backend, sector: int) -> bytes:
    data = bytearray(512)
    disk.readv([memoryview(data)], 512, sector * 512)
    return bytes(data)


def test_a_file_counts_the_reads_that_had_to_wait(path: Path, kernel: list[object]) -> None:
    disk = file_backend(path)
    for sector, code in enumerate((errno.EAGAIN, None, errno.EAGAIN)):
        kernel[:] = [] if code is None else [code]
        assert read(disk, sector) == path.read_bytes()[sector * 512 :][:512]
    assert disk.misses == 2
    disk.close()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_cannot_tell_is_asked_once(
    code: int, path: Path, kernel: list[object]
) -> None:
    disk = file_backend(path)
    kernel[:] = [code] * 2
    for sector in range(3):
        assert read(disk, sector) == path.read_bytes()[sector * 512 :][:512]
    assert (disk.misses, len(kernel)) == (0, 1)
    disk.close()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The arguments of posix_fadvise(2): descriptor, offset, size; it fails."""
    calls: list[tuple[int, int, int]] = []

    def fadvise(fd: int, offset: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        calls.append((fd, offset, size))
        raise OSError(errno.EINVAL, "a file that knows no advice")

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    return calls


def test_an_overlay_announces_to_whoever_has_it(
    path: Path, told: list[tuple[int, int, int]], kernel: list[object]
) -> None:
    base = file_backend(path, read_only=True)
    disk = open_snapshot(base)
    disk.writev([memoryview(bytes(4096))], 4096, 4096)
    disk.expect(12288, 0)
    places = [(fd == base._fd, offset, size) for fd, offset, size in told]
    shift = told[1][1] - 4096
    assert places == [(True, 0, 4096), (False, 4096 + shift, 4096), (True, 8192, 4096)]
    for sector in (8, 0, 16):
        kernel[:] = [errno.EAGAIN]
        read(disk, sector)
    assert (base.misses, disk.misses) == (2, 3)
    disk.close()
    base.close()


def test_past_the_page_cache_nothing_is_announced(
    path: Path, told: list[tuple[int, int, int]], kernel: list[object]
) -> None:
    disk = DirectBackend(file_backend(path)._image)
    kernel[:] = [errno.EAGAIN]
    read(disk, 3)
    disk.expect(512, 0)
    assert (disk.misses, told, len(kernel)) == (0, [], 1)
    disk.close()


def test_behind_the_device(path: Path, kernel: list[object], told: list[object]) -> None:
    """Over the whole of a running disk; the first read of each batch is not there yet."""
    with running(file_backend(path), trace=None) as rig:
        assert isinstance(rig.device.backend, FileBackend)
        queue = rig.driver.queues[0]
        for _ in range(2):
            kernel[:] = [errno.EAGAIN]
            chains = [queue.add([header(IN, sector)], [512, 1]) for sector in (9, 3, 30)]
            queue.publish()
            rig.driver.kick()
            for chain, sector in zip(chains, (9, 3, 30), strict=True):
                rig.driver.wait_used(0, chain)
                assert queue.contents(chain)[:-1] == path.read_bytes()[sector * 512 :][:512]
    assert [offset // 512 for _, offset, _ in told] == [9, 3, 30]  # type: ignore[misc]
