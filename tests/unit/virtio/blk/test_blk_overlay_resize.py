"""Overlays and snapshots of another size than their base, while they are in use and ever after."""

from __future__ import annotations

import errno
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from blk_rig import Rig, file_backend, running
from overlay_rig import Journal

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import holes
from pyvmm.kinds import registry
from pyvmm.kinds.interface import Running
from pyvmm.spec.vm import DiskSpec, VmSpec
from pyvmm.testing.blk_driver import IOERR, OK
from pyvmm.virtio.blk.backend import Backend, FileBackend
from pyvmm.virtio.blk.overlay import OverlayBackend, open_snapshot
from pyvmm.virtio.blk.overlay_file import identity, open_overlay
from pyvmm.virtio.blk.overlay_layout import layout_for

KIB, MIB = 1 << 10, 1 << 20
SIZE = 64 * KIB + 3 * 512  # the last cluster of 4 KiB is not whole
SIZES = [512, 5 * 512, 16 * KIB, SIZE - 512, SIZE, SIZE + 512, 80 * KIB, 129 * MIB + 512]
LOOKED_AT = 160 * KIB  # more than every size but the largest, of which the rest is not written


@pytest.fixture
def base_path(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as closing:
        yield closing


def kept(base_path: Path, path: Path, stack: ExitStack) -> OverlayBackend:
    overlay = lent(base_path, path, stack)
    stack.callback(overlay.close)
    return overlay


def lent(base_path: Path, path: Path, stack: ExitStack) -> OverlayBackend:
    """To somebody who closes it, as the rig does."""
    base = file_backend(base_path, read_only=True)
    stack.callback(base.close)
    return open_overlay(base, str(path))


def read(disk: Backend) -> bytes:
    data = bytearray(min(disk.size_sectors * 512, LOOKED_AT))
    third = len(data) // 3
    views = [memoryview(data)[:third], memoryview(data)[third:]]
    disk.readv(views, len(data), 0)
    return bytes(data)


def write(disk: Backend, offset: int, data: bytes) -> None:
    disk.writev([memoryview(data)], len(data), offset)


def one_step(disk: OverlayBackend, model: bytearray, rng: random.Random) -> None:
    """A request, or another size; `model` is the disk's first LOOKED_AT bytes."""
    if rng.random() < 0.3:
        size = rng.choice(SIZES)
        disk.resize(size)
        assert disk.size_sectors * 512 == size
        seen = min(size, LOOKED_AT)
        model[seen:] = b""
        model.extend(bytes(seen - len(model)))
        return
    sectors = rng.choice([1, 2, 7, 8, 9, 64])
    size = 512 * min(sectors, len(model) // 512)
    offset = rng.randrange(0, len(model) - size + 1, 512)
    if rng.random() < 0.2:
        model[offset : offset + size] = bytes(size)
        disk.write_zeroes(offset, size, rng.random() < 0.5)
    else:
        model[offset : offset + size] = data = rng.randbytes(size)
        write(disk, offset, data)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("is_kept", [True, False])
def test_random_sizes_against_a_model(
    base_path: Path, tmp_path: Path, stack: ExitStack, is_kept: bool, seed: int
) -> None:
    before = base_path.read_bytes()
    if is_kept:
        disk = kept(base_path, tmp_path / "changes", stack)
    else:
        disk = open_snapshot(file_backend(base_path, read_only=True))
        stack.callback(disk.close)
    rng, model = random.Random(seed), bytearray(before)
    for _ in range(80):
        one_step(disk, model, rng)
        assert read(disk) == model
    assert base_path.read_bytes() == before


@pytest.mark.parametrize("seed", range(4))
def test_size_and_content_come_back(base_path: Path, tmp_path: Path, seed: int) -> None:
    rng, model = random.Random(seed), bytearray(base_path.read_bytes())
    for _ in range(8):
        with ExitStack() as closing:
            disk = kept(base_path, tmp_path / "changes", closing)
            assert read(disk) == model
            for _ in range(6):
                one_step(disk, model, rng)


def test_what_was_cut_off_never_comes_back(base_path: Path, stack: ExitStack) -> None:
    disk = open_snapshot(file_backend(base_path, read_only=True))
    stack.callback(disk.close)
    write(disk, 8 * KIB, b"x" * 512)  # all of this cluster is in the file now
    disk.resize(8 * KIB + 512)
    disk.resize(SIZE)
    start = base_path.read_bytes()[: 8 * KIB]
    assert read(disk) == start + b"x" * 512 + bytes(SIZE - 8 * KIB - 512)


def test_a_smaller_disk_frees_its_storage(
    base_path: Path, tmp_path: Path, stack: ExitStack
) -> None:
    path = tmp_path / "changes"
    disk = kept(base_path, path, stack)
    disk.resize(8 * MIB)
    write(disk, 0, os.urandom(8 * MIB))
    disk.flush()
    before = path.stat().st_blocks
    disk.resize(MIB)
    assert (before - path.stat().st_blocks) * 512 >= 7 * MIB


def test_a_file_of_version_1_is_served_and_grows(
    base_path: Path, tmp_path: Path, stack: ExitStack
) -> None:
    """Its data follow a bitmap that has just room for the base: here, for 128 MiB."""
    path = tmp_path / "changes"
    base = file_backend(base_path, read_only=True)
    with base_path.open("rb"), path.open("wb") as file:
        fields = struct.pack("<8sIIQ32s", b"pyvmmOVL", 1, 12, SIZE, identity(base))
        file.write(fields + struct.pack("<I", zlib.crc32(fields)))
        file.seek(4096)
        file.write(b"\x02")  # the second cluster
        file.seek(8192 + 4096)
        file.write(b"v" * 4096)
        file.truncate(8192 + SIZE + -SIZE % 4096)
    base.close()
    model = bytearray(base_path.read_bytes())
    model[4096:8192] = b"v" * 4096
    with ExitStack() as closing:
        disk = kept(base_path, path, closing)
        assert read(disk) == model
        with pytest.raises(HostError, match=r"room for 134217728 bytes.*larger image") as error:
            disk.resize(128 * MIB + 512)
        assert error.value.errno == errno.EFBIG
        assert read(disk) == model
        disk.resize(100 * KIB)
        write(disk, SIZE, b"n" * 512)
    model += b"n" * 512 + bytes(100 * KIB - SIZE - 512)
    assert read(kept(base_path, path, stack)) == model


def test_every_disk_can_grow_sixteenfold() -> None:
    for size in (512, MIB, 20 << 30, 32 << 30, 1 << 40, 5 << 40):
        layout = layout_for(size)
        grown = layout.resized(max(32 << 30, 16 * size))
        assert (grown.data_offset, grown.cluster_bits) == (layout.data_offset, layout.cluster_bits)
        assert grown.data_offset >= 4096 + grown.bitmap_size


def test_without_a_size_there_is_nothing_to_go_by(base_path: Path, stack: ExitStack) -> None:
    disk = open_snapshot(file_backend(base_path, read_only=True))
    stack.callback(disk.close)
    with pytest.raises(HostError, match="say which size"):
        disk.resize(None)


def test_a_full_file_system_leaves_the_disk_as_it_is(
    base_path: Path, tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = kept(base_path, tmp_path / "changes", stack)

    def full(fd: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", full)
        with pytest.raises(HostError, match="No space left"):
            disk.resize(MIB)
    assert disk.size_sectors * 512 == SIZE
    assert read(disk) == base_path.read_bytes()
    disk.resize(MIB)
    assert read(disk)[: SIZE + 512] == base_path.read_bytes() + bytes(512)


# --- the power fails ------------------------------------------------------------------------------


class ResizeJournal(Journal):
    """A resize's other writes, too: zeroes, and the header."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        real_zeroes, real_pwrite = FileBackend.write_zeroes, os.pwrite

        def write_zeroes(disk: FileBackend, offset: int, size: int, may_unmap: bool) -> None:
            real_zeroes(disk, offset, size, may_unmap)
            self.steps.append((offset, bytes(size)))

        def pwrite(fd: int, data: bytes, offset: int) -> int:
            self.steps.append((offset, data))
            return real_pwrite(fd, data, offset)

        monkeypatch.setattr(FileBackend, "write_zeroes", write_zeroes)
        monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("seed", range(6))
def test_row58_no_crash_while_it_is_resized_shows_other_data(
    base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Each write that was not synced may be on the storage or not. Holes need no steps:
    what they free is behind the end, and so does not count."""
    rng = random.Random(seed)
    path = tmp_path / "changes"
    with ExitStack() as closing:
        disk = kept(base_path, path, closing)
        empty = path.read_bytes()
        journal = ResizeJournal(monkeypatch)
        model = bytearray(base_path.read_bytes())
        # What each byte may be: each state of the disk since the last one that is safe.
        states: list[tuple[int, bytes]] = [(0, bytes(model))]
        safe = [(0, 0)]  # steps done → the state that is safe by then
        for _ in range(20):
            if rng.random() < 0.4:
                size = rng.choice(SIZES[1:-1])
                disk.resize(size)
                model[size:] = b""
                model.extend(bytes(size - len(model)))
            else:
                place = rng.randrange(0, len(model), 512)
                data = rng.randbytes(min(1024, len(model) - place))
                model[place : place + len(data)] = data
                write(disk, place, data)
            states.append((len(journal.steps), bytes(model)))
            if rng.random() < 0.4:
                disk.flush()
                safe.append((len(journal.steps), len(states) - 1))
    monkeypatch.undo()
    for _ in range(40):
        crash = rng.randrange(len(journal.steps) + 1)
        image, pending = bytearray(empty.ljust(layout_for(MIB).file_size, b"\0")), []
        for step in journal.steps[:crash]:
            if step is not None:
                pending.append(step)
                continue
            for offset, data in pending:
                image[offset : offset + len(data)] = data
            pending.clear()
        for offset, data in pending:
            if rng.random() < 0.5:
                image[offset : offset + len(data)] = data
        crashed = tmp_path / "crashed"
        crashed.write_bytes(image)
        first = next(state for steps, state in reversed(safe) if steps <= crash)
        last = next((n for n, (steps, _) in enumerate(states) if steps >= crash), len(states) - 1)
        possible = [content for _, content in states[first : last + 1]]
        with ExitStack() as closing:
            seen = read(kept(base_path, crashed, closing))
        assert len(seen) in map(len, possible)
        for place in range(0, len(seen), 512):
            sector = seen[place : place + 512]
            may_be = {content[place : place + 512] or bytes(512) for content in possible}
            assert sector in may_be, f"sector {place // 512} after {crash} steps"


# --- the device and the control socket's method ---------------------------------------------------


def control(
    rig: Rig, disk: DiskSpec, outside: Callable[[str, int | None], None] | None = None
) -> Callable[..., Any]:
    """The control socket's disk.resize, of a machine that has `disk`."""
    spec = VmSpec("k", disks=(disk,))
    running = Running(spec, (rig.device,), lambda: False, lambda: 0, outside)
    resize = registry.methods(running)["disk.resize"].run
    return lambda disk, size=None, **more: resize(disk=disk, size=size, **more)


def test_a_driver_uses_what_the_overlay_has_grown(base_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "changes"
    disk = DiskSpec("base.img", id="data", overlay=str(path))
    with ExitStack() as closing, running(lent(base_path, path, closing)) as rig:
        assert rig.disk.write(MIB // 512, b"y" * 512).status == IOERR
        with pytest.raises(ConfigError, match=r"copies on write.*say which size"):
            control(rig, disk)("data")
        with pytest.raises(ConfigError, match="would be lost"):
            control(rig, disk)("data", 512)
        assert control(rig, disk)("data", 2 * MIB) == {"size": 2 * MIB}
        assert rig.disk.write(MIB // 512, b"y" * 512).status == OK
        assert rig.disk.read(MIB // 512, 1024).data == b"y" * 512 + bytes(512)
        assert control(rig, disk)("data", MIB, shrink=True) == {"size": MIB}
        assert rig.disk.read(MIB // 512, 512).status == IOERR
        with pytest.raises(HostError, match="larger image"):
            control(rig, disk)("data", 1 << 40)
        assert rig.device.size == MIB


@pytest.mark.parametrize("name", ["overlay", "scratch"])
def test_outside_the_file_of_the_changes_grows_first(
    base_path: Path, tmp_path: Path, name: str
) -> None:
    """In an emulated host it is a block device, as long as somebody outside makes it."""
    path = tmp_path / "changes"
    asked: list[tuple[str, int | None]] = []

    def outside(path: str, size: int | None) -> None:
        assert size is not None
        asked.append((path, size))
        os.truncate(path, size)

    with ExitStack() as closing:
        if name == "overlay":
            backend = lent(base_path, path, closing)
            disk = DiskSpec("base.img", id="data", overlay=str(path))
        else:
            with path.open("wb") as file:
                file.truncate(layout_for(SIZE).file_size)
            backend = open_snapshot(file_backend(base_path, read_only=True), str(path))
            disk = DiskSpec("base.img", id="data", snapshot=True, scratch=str(path))
        backend._image.is_block_device = True
        with running(backend) as rig:
            methods = control(rig, disk, outside)
            assert methods("data", MIB) == {"size": MIB}
            assert asked == [(str(path), layout_for(SIZE).resized(MIB).file_size)]
            assert methods("data", 512, shrink=True) == {"size": 512}
            assert len(asked) == 1
            with pytest.raises(HostError, match="a block device"):
                rig.device.resize(2 * MIB)
            assert rig.device.size == 512


@pytest.mark.parametrize("at", range(6))
def test_a_host_that_fails_leaves_a_size_and_its_content(
    base_path: Path, tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """At each call of a smaller size, and then of a larger one that the file has room for."""
    path = tmp_path / "changes"
    disk = lent(base_path, path, stack)
    write(disk, 0, b"x" * 4096)
    write(disk, 48 * KIB, b"y" * 4096)
    disk.flush()
    before, calls = read(disk), 0

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise OSError(errno.EIO, "a fault")
            return real(*arguments)

        return call

    for size in (16 * KIB, SIZE):
        calls = 0
        with monkeypatch.context() as patched:
            for name in ("fdatasync", "pwrite", "ftruncate"):
                patched.setattr(os, name, failing(getattr(os, name)))
            patched.setattr(holes, "_fallocate", failing(holes._fallocate))
            try:
                disk.resize(size)
            except HostError:
                assert disk.size_sectors * 512 == len(before), "it is as if nobody had asked"
            else:
                assert disk.size_sectors * 512 == size
        now = disk.size_sectors * 512
        before = before[:now].ljust(now, b"\0")
        assert read(disk) == before
        write(disk, now - 512, b"z" * 512)
        before = before[: now - 512] + b"z" * 512
        assert read(disk) == before
    disk.close()
    assert read(kept(base_path, path, stack)) == before


def test_a_large_size_that_failed_does_not_hinder_a_smaller_one(
    base_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = file_backend(base_path, read_only=True)
    stack.callback(base.close)
    disk = open_snapshot(base)
    stack.callback(disk.close)

    def fail(layout: object) -> None:
        raise HostError(errno.EIO, "fdatasync")

    with monkeypatch.context() as patched, pytest.raises(HostError):
        patched.setattr(disk, "_store", fail)
        disk.resize(256 * MIB)
    disk.resize(SIZE + 4096)
    assert read(disk)[SIZE:] == bytes(4096)
