"""An overlay's content, as a file of its own: for a disk in a snapshot, and one that goes on from
there and is saved in turn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.host.files import open_image
from pyvmm.virtio.blk.backend import Backend, FileBackend
from pyvmm.virtio.blk.overlay import OverlayBackend, open_snapshot
from pyvmm.virtio.blk.overlay_file import open_overlay
from pyvmm.virtio.blk.saved_overlay import file_of, open_saved

SIZE = 3 << 20


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def base_at(path: Path, closing: ExitStack) -> FileBackend:
    path.write_bytes(random.Random(1).randbytes(SIZE))
    made = FileBackend(open_image(str(path), read_only=True))
    closing.callback(made.close)
    return made


def write_out(overlay: OverlayBackend, path: Path) -> None:
    size, pieces = file_of(overlay)
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
        assert file.tell() <= size
    assert path.stat().st_size == size


def contents(disk: Backend) -> bytes:
    data = bytearray(disk.size_sectors * 512)
    disk.readv([memoryview(data)], len(data), 0)
    return bytes(data)


def scribble(disk: OverlayBackend, rng: random.Random) -> None:
    for _ in range(20):
        size = 512 * rng.choice((1, 8, 9, 300))
        offset = 512 * rng.randrange(disk.size_sectors - size // 512)
        if rng.random() < 0.2:
            disk.write_zeroes(offset, size, True)
        else:
            data = rng.randbytes(size)
            disk.writev([memoryview(bytearray(data))], size, offset)


@pytest.mark.parametrize("seed", range(8))
def test_a_disk_goes_on_from_what_was_saved(tmp_path: Path, closing: ExitStack, seed: int) -> None:
    rng = random.Random(seed)
    base = base_at(tmp_path / "base", closing)
    disk = open_snapshot(base)
    closing.callback(disk.close)
    for generation in range(3):
        scribble(disk, rng)
        if seed % 4:
            disk.resize(disk.size_sectors * 512 + (1 << 20) * rng.choice((-1, 1)))
            scribble(disk, rng)
        wanted = contents(disk)
        path = tmp_path / f"saved-{generation}"
        write_out(disk, path)
        assert contents(disk) == wanted, "saving has changed it"
        before = path.read_bytes()
        # Two VMs have it at a time.
        saved = [open_saved(base, str(path)) for _ in range(2)]
        for one in saved:
            closing.callback(one.close)
            assert contents(one) == wanted
        disk = open_snapshot(saved[0])
        closing.callback(disk.close)
        assert contents(disk) == wanted
        scribble(disk, rng)
        assert path.read_bytes() == before and contents(saved[1]) == wanted


def test_what_is_not_written_takes_no_room(tmp_path: Path, closing: ExitStack) -> None:
    disk = open_snapshot(base_at(tmp_path / "base", closing))
    closing.callback(disk.close)
    disk.writev([memoryview(bytearray(b"x" * 512))], 512, 1 << 20)
    size, pieces = file_of(disk)
    assert sum(len(data) for _, data in pieces) < 64 << 10 < size


def test_a_kept_overlay_is_one_too(tmp_path: Path, closing: ExitStack) -> None:
    base = base_at(tmp_path / "base", closing)
    disk = open_overlay(base, str(tmp_path / "overlay"))
    closing.callback(disk.close)
    scribble(disk, random.Random(2))
    write_out(disk, tmp_path / "saved")
    saved = open_saved(base, str(tmp_path / "saved"))
    closing.callback(saved.close)
    assert contents(saved) == contents(disk)


def test_another_base_is_refused(tmp_path: Path, closing: ExitStack) -> None:
    disk = open_snapshot(base_at(tmp_path / "base", closing))
    closing.callback(disk.close)
    write_out(disk, tmp_path / "saved")
    (tmp_path / "other").write_bytes(bytes(SIZE))
    other = FileBackend(open_image(str(tmp_path / "other"), read_only=True))
    closing.callback(other.close)
    with pytest.raises(ConfigError, match="for another base"):
        open_saved(other, str(tmp_path / "saved"))
