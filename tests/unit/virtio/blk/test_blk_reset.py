"""Writes in flight when the driver resets: done whole or not at all, and never afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blk_rig import MIB, file_backend, running

from pyvmm.testing.blk_driver import OK, OUT, header
from pyvmm.virtio.blk.backend import Backend, FileBackend
from pyvmm.virtio.blk.overlay import open_snapshot

SIZE = 1 * MIB
WRITES, HELD = 8, 3  # so many writes are in the ring, and this one is in the host's hands
GAP = 16  # sectors from one write to the next: those that follow one another would be one


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Every file's write of the sector `HELD` reports, and waits, before it is done."""
    reached, release = threading.Event(), threading.Event()
    real = FileBackend.writev

    def held(disk: FileBackend, views: list[memoryview], size: int, offset: int) -> None:
        if bytes(views[0][:1]) == bytes([HELD + 1]):
            reached.set()
            assert release.wait(60)
        real(disk, views, size, offset)

    monkeypatch.setattr(FileBackend, "writev", held)
    yield reached, release
    release.set()


def raw(image: Path) -> Backend:
    return file_backend(image)


def snapshot(image: Path) -> Backend:
    return open_snapshot(file_backend(image, read_only=True))


@pytest.mark.parametrize("make", [raw, snapshot])
def test_row12_a_write_is_whole_and_those_behind_it_never_happen(
    tmp_path: Path,
    gate: tuple[threading.Event, threading.Event],
    make: Callable[[Path], Backend],
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    reached, release = gate
    with running(make(image)) as rig:
        queue = rig.driver.queues[0]
        chains = [
            queue.add([header(OUT, n * GAP), bytes([n + 1]) * 4096], [1]) for n in range(WRITES)
        ]
        if queue.publish():
            rig.driver.kick()
        assert reached.wait(60)
        resetting = threading.Thread(target=rig.driver.write, args=(0x070, 0))
        resetting.start()
        resetting.join(0.05)
        assert resetting.is_alive()  # the write still reads guest memory
        release.set()
        resetting.join(60)
        assert rig.driver.status == 0
        # The driver may use its memory for anything now.
        for chain in chains:
            for part in chain.readable:
                rig.memory.write(part.addr, b"\xcc" * part.length)
        rig.driver.start()
        for n in range(WRITES):
            expected = bytes([n + 1]) if n <= HELD else b"\0"
            answer = rig.disk.read(n * GAP, 4096)
            assert (answer.status, answer.data) == (OK, expected * 4096)
