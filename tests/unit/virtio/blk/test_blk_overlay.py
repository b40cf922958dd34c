"""Copy on write: the base stays as it is, the changes come back, whenever the power fails."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from blk_rig import file_backend, running
from overlay_rig import Journal

from pyvmm.errors import ConfigError, HostError
from pyvmm.host.files import open_image
from pyvmm.testing.blk_driver import IOERR, OK, UNMAP
from pyvmm.virtio.blk.backend import Backend, FileBackend, cut
from pyvmm.virtio.blk.overlay import OverlayBackend, open_snapshot
from pyvmm.virtio.blk.overlay_file import open_overlay
from pyvmm.virtio.blk.overlay_layout import layout_for

SIZE = 256 * 1024 + 3 * 512  # the last cluster is not whole
CLUSTER = 4096


@pytest.fixture
def base_path(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def stack():  # type: ignore[no-untyped-def]
    with ExitStack() as closing:
        yield closing


def open_kept(base_path: Path, path: Path, stack: ExitStack | None = None) -> OverlayBackend:
    base = file_backend(base_path, read_only=True)
    try:
        overlay = open_overlay(base, str(path))
    except BaseException:
        base.close()
        raise
    if stack is not None:
        stack.callback(base.close)
        stack.callback(overlay.close)
    return overlay


def read(disk: Backend, offset: int = 0, size: int = SIZE) -> bytes:
    data = bytearray(size)
    # In two views, which the pieces of a read do not end with.
    half = size // 3
    disk.readv([memoryview(data)[:half], memoryview(data)[half:]], size, offset)
    return bytes(data)


def write(disk: Backend, offset: int, data: bytes) -> None:
    half = len(data) // 3
    disk.writev([memoryview(data)[:half], memoryview(data)[half:]], len(data), offset)


def one_step(disk: Backend, model: bytearray, rng: random.Random) -> None:
    size = 512 * rng.choice([1, 2, 7, 8, 9, 16, 64, 200])
    offset = rng.randrange(0, SIZE - size + 1, 512)
    end = offset + size
    match rng.randrange(4):
        case 0 | 1:
            model[offset:end] = data = rng.randbytes(size)
            write(disk, offset, data)
        case 2:
            model[offset:end] = bytes(size)
            disk.write_zeroes(offset, size, rng.random() < 0.5)
        case 3:
            assert read(disk, offset, size) == model[offset:end]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kept", [True, False])
def test_random_requests_against_a_model(
    base_path: Path, tmp_path: Path, stack: ExitStack, kept: bool, seed: int
) -> None:
    before = base_path.read_bytes()
    if kept:
        disk = open_kept(base_path, tmp_path / "changes", stack)
    else:
        disk = open_snapshot(file_backend(base_path, read_only=True))
    rng, model = random.Random(seed), bytearray(before)
    for _ in range(150):
        one_step(disk, model, rng)
    assert read(disk) == model
    assert base_path.read_bytes() == before


def test_changes_come_back(base_path: Path, tmp_path: Path) -> None:
    rng, model = random.Random(3), bytearray(base_path.read_bytes())
    for _ in range(5):
        with ExitStack() as closing:
            disk = open_kept(base_path, tmp_path / "changes", closing)
            assert read(disk) == model
            for _ in range(20):
                one_step(disk, model, rng)


def test_a_snapshot_leaves_nothing(
    base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = set(tmp_path.iterdir())
    base = file_backend(base_path, read_only=True)
    disk = open_snapshot(base)
    write(disk, 0, b"x" * 4096)
    assert set(tmp_path.iterdir()) == before
    disk.flush()
    disk.close()
    disk = open_snapshot(base)
    assert read(disk, 0, 4096) == base_path.read_bytes()[:4096]
    disk.close()
    base.close()


def test_many_may_use_one_base_at_once(base_path: Path, tmp_path: Path, stack: ExitStack) -> None:
    disks = [open_kept(base_path, tmp_path / f"changes{n}", stack) for n in range(3)]
    for number, disk in enumerate(disks):
        write(disk, 0, bytes([number]) * 4096)
    assert [read(disk, 0, 1)[0] for disk in disks] == [0, 1, 2]
    with pytest.raises(ConfigError, match="in use"):
        open_image(str(base_path))
    with pytest.raises(ConfigError, match="in use"):
        open_kept(base_path, tmp_path / "changes1")


def test_the_file_takes_only_the_room_of_the_changes(tmp_path: Path, stack: ExitStack) -> None:
    base = tmp_path / "large.img"
    with base.open("wb") as file:
        file.truncate(64 << 30)
    disk = open_kept(base, tmp_path / "changes", stack)
    write(disk, 40 << 30, b"x" * 8192)
    disk.flush()
    assert (tmp_path / "changes").stat().st_blocks * 512 < 256 << 10
    write(disk, 1 << 30, b"y" * (8 << 20))
    before = (tmp_path / "changes").stat().st_blocks
    disk.discard(1 << 30, 8 << 20)
    assert (tmp_path / "changes").stat().st_blocks < before - (7 << 20) // 512


@pytest.mark.parametrize("size", [512, 4096, 4097 * 512, 32 << 30, (32 << 30) + 512, 1 << 44])
def test_the_bitmap_stays_small(size: int) -> None:
    layout = layout_for(size)
    assert layout.bitmap_size <= (1 << 20) + 4096
    assert layout.bitmap_size * 8 << layout.cluster_bits >= size
    assert layout.file_size - layout.data_offset >= size
    assert layout.file_size % 4096 == 0


def test_threads_that_write_to_the_same_clusters(base_path: Path, tmp_path: Path) -> None:
    disk = open_snapshot(file_backend(base_path, read_only=True))

    def work(lane: int) -> None:
        for sector in range(lane, SIZE // 512, 4):
            disk.writev([memoryview(bytes([lane + 1]) * 512)], 512, sector * 512)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(disk) == b"".join(bytes([n % 4 + 1]) * 512 for n in range(SIZE // 512))


def test_row49_a_base_that_fails_while_its_cluster_is_copied(base_path: Path) -> None:
    class Failing(FileBackend):
        broken = True

        def readv(self, views: list[memoryview], size: int, offset: int) -> None:
            if self.broken and offset == 512:
                raise HostError(errno.EIO, "read of a bad sector")
            super().readv(views, size, offset)

    base = Failing(open_image(str(base_path), True))
    with running(open_snapshot(base)) as rig:
        assert rig.disk.write(0, b"x" * 512).status == IOERR
        base.broken = False
        assert rig.disk.read(0, 1024).data == base_path.read_bytes()[:1024]
        assert rig.disk.write(0, b"x" * 512).status == OK
        assert rig.disk.read(0, 1024).data == b"x" * 512 + base_path.read_bytes()[512:1024]
        assert rig.disk.write_zeroes((9, 1, UNMAP)).status == OK
        assert rig.disk.read(8, 1024).data == base_path.read_bytes()[4096:4608] + bytes(512)


def test_alternating_clusters_are_read_piece_by_piece(tmp_path: Path) -> None:
    path = tmp_path / "base.img"
    path.write_bytes(b"b" * (10 << 20))
    disk = open_snapshot(file_backend(path, read_only=True))
    for cluster in range(0, 2560, 2):
        disk.writev([memoryview(b"o" * 4096)], 4096, cluster * 4096)
    data = bytearray(10 << 20)
    disk.readv([memoryview(data)], len(data), 0)
    assert data == (b"o" * 4096 + b"b" * 4096) * 1280


def test_cut() -> None:
    views = [memoryview(b"abc"), memoryview(b""), memoryview(b"defg"), memoryview(b"h")]
    for start in range(9):
        for size in range(9 - start):
            assert b"".join(cut(views, start, size)) == b"abcdefgh"[start : start + size]


# --- the power fails --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_row58_no_crash_shows_anything_but_old_or_new_data(
    base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Writes that were not synced may be on the storage or not, each by itself."""
    rng = random.Random(seed)
    path, crashed = tmp_path / "changes", tmp_path / "crashed"
    disk = open_kept(base_path, path)
    empty = path.read_bytes()
    journal = Journal(monkeypatch)
    base = base_path.read_bytes()
    clusters = range(0, SIZE - CLUSTER + 1, CLUSTER)
    versions = {place: [base[place : place + CLUSTER]] for place in clusters}
    flushed: list[tuple[int, dict[int, int]]] = []  # steps done → the versions that are safe
    for _ in range(30):
        place = rng.choice(list(clusters)[:12])
        versions[place].append(data := rng.randbytes(CLUSTER))
        disk.writev([memoryview(data)], CLUSTER, place)
        if rng.random() < 0.2:
            disk.flush()
            safe = {place: len(found) - 1 for place, found in versions.items()}
            flushed.append((len(journal.steps), safe))
    disk._keep = False
    disk.close()
    for _ in range(40):
        crash = rng.randrange(len(journal.steps) + 1)
        image, pending = bytearray(empty), []
        for step in journal.steps[:crash]:
            if step is None:
                for offset, data in pending:
                    image[offset : offset + len(data)] = data
                pending.clear()
            else:
                pending.append(step)
        for offset, data in pending:
            if rng.random() < 0.5:
                image[offset : offset + len(data)] = data
        crashed.write_bytes(image)
        safe = next((safe for steps, safe in reversed(flushed) if steps <= crash), {})
        with ExitStack() as closing:
            after = open_kept(base_path, crashed, closing)
            for place, found in versions.items():
                seen = read(after, place, CLUSTER)
                assert seen in found[safe.get(place, 0) :], f"cluster {place:#x} after {crash}"


def test_a_flush_that_fails_is_made_up_for(
    base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = open_kept(base_path, tmp_path / "changes")
    write(disk, 0, b"x" * 4096)

    def failing(_fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing)
        with pytest.raises(HostError):
            disk.flush()
    disk.flush()
    disk._keep = False  # closing would flush as well
    disk.close()
    with ExitStack() as closing:
        assert read(open_kept(base_path, tmp_path / "changes", closing), 0, 4096) == b"x" * 4096


# --- files that are not an overlay of this base --------------------------------------------------


def header(path: Path, **changes: object) -> None:
    """Change fields of the header at `path`, with a right checksum."""
    names = ("magic", "version", "cluster_bits", "size", "base", "disk", "data", "shown")
    with path.open("r+b") as file:
        values = dict(zip(names, struct.unpack("<8sIIQ32sQQQ", file.read(80)), strict=True))
        fields = struct.pack("<8sIIQ32sQQQ", *(values | changes).values())
        file.seek(0)
        file.write(fields + struct.pack("<I", zlib.crc32(fields)))


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (make_empty, "is empty"),
        (make_directory, "a directory"),
        (make_fifo, "a FIFO"),
        (lambda path: path.write_bytes(b"x" * 8192), "is not an overlay"),
        (lambda path: path.write_bytes(b"QFI\xfb" + bytes(65536)), "is not an overlay"),
        (lambda path: path.write_bytes(b"pyvmmOVL" + bytes(504)), "has version 0"),
        (lambda path: os.truncate(path, 512), "is cut short"),
        (lambda path: os.truncate(path, 8192), "is cut short"),
        (lambda path: os.truncate(path, layout_for(SIZE).file_size - 1), "is cut short"),
        (lambda path: header(path, version=3), "has version 3"),
        (lambda path: header(path, version=1), "damaged header"),
        (lambda path: header(path, disk=0), "for a disk of 0 bytes"),
        (lambda path: header(path, disk=SIZE + 1), "for a disk of"),
        (lambda path: header(path, disk=2**64 - 512), "for a disk of"),
        (lambda path: header(path, disk=1 << 62), "for a disk of"),
        (lambda path: header(path, disk=1 << 34), "is cut short"),
        (lambda path: header(path, shown=SIZE + 512), "for a disk of"),
        (lambda path: header(path, disk=512), "for a disk of"),  # but all of the base shows
        (lambda path: header(path, data=0), "for a disk of"),
        (lambda path: header(path, data=4096 + 512), "has its data at 0x1200"),
        (lambda path: header(path, data=1 << 40), "has its data at"),
        (lambda path: header(path, size=2**64 - 1), "for a base of 18446744073709551615 bytes"),
        (lambda path: header(path, base=bytes(32)), "for another base"),
        (lambda path: header(path, cluster_bits=60), "has clusters"),
        (lambda path: flip(path, 30), "damaged header"),
    ],
)
def test_row58_a_hostile_or_foreign_file_is_refused_in_one_line(
    base_path: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "changes"
    open_kept(base_path, path).close()
    spoil(path)
    with pytest.raises(ConfigError, match=message) as caught:
        open_kept(base_path, path)
    text = str(caught.value)
    assert text.startswith("--disk: ") and "\n" not in text and caught.value.cure


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("change", [0, 1080, 65000, SIZE - 1])
def test_a_base_that_changed_is_noticed(base_path: Path, tmp_path: Path, change: int) -> None:
    open_kept(base_path, tmp_path / "changes").close()
    os.utime(base_path, (0, 0))  # a copy of the base is as good
    open_kept(base_path, tmp_path / "changes").close()
    flip(base_path, change)
    with pytest.raises(ConfigError, match="its base has changed"):
        open_kept(base_path, tmp_path / "changes")


def test_a_base_of_another_size(base_path: Path, tmp_path: Path) -> None:
    open_kept(base_path, tmp_path / "changes").close()
    with base_path.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ConfigError, match=f"for a base of {SIZE} bytes, not {SIZE + 512}"):
        open_kept(base_path, tmp_path / "changes")


def test_an_overlay_that_cannot_be_made(base_path: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "changes", Path("/proc/changes")):
        with pytest.raises(ConfigError, match="cannot be made"):
            open_kept(base_path, path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="check the path"):
        open_kept(base_path, tmp_path / "dangling")


def test_garbage_in_the_bitmap_is_just_data(
    base_path: Path, tmp_path: Path, stack: ExitStack
) -> None:
    path = tmp_path / "changes"
    open_kept(base_path, path).close()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)
    disk = open_kept(base_path, path, stack)
    assert read(disk) == bytes(SIZE)
    write(disk, SIZE - 512, b"x" * 512)
    assert read(disk, SIZE - 512, 512) == b"x" * 512
