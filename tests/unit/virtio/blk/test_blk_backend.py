"""The file backend: bytes between memory and an image, and what the host's refusals become."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.host import files
from pyvmm.host.files import ImageFile, open_image
from pyvmm.virtio.blk.backend import FileBackend

SIZE = 64 << 10


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return str(path)


@pytest.fixture
def disk(path: str):
    backend = FileBackend(open_image(path))
    yield backend
    backend.close()


def pieces(buffer: bytearray, size: int) -> list[memoryview]:
    whole = memoryview(buffer)
    return [whole[start : start + size] for start in range(0, len(buffer), size)]


def test_the_size_is_in_sectors(disk: FileBackend) -> None:
    assert (disk.size_sectors, disk.read_only) == (SIZE // 512, False)


def test_what_is_written_is_read_back_and_in_the_file(disk: FileBackend, path: str) -> None:
    data = bytearray(os.urandom(8192))
    disk.writev(pieces(data, 1000), 8192, 4096)
    target = bytearray(8192)
    disk.readv(pieces(target, 4096), 8192, 4096)
    assert target == data
    assert Path(path).read_bytes()[4096 : 4096 + 8192] == data
    assert os.path.getsize(path) == SIZE


@pytest.mark.parametrize("pieces_of", [1, 64])
def test_row50_more_segments_than_one_call_takes(disk: FileBackend, pieces_of: int) -> None:
    data = bytearray(os.urandom(SIZE))
    views = pieces(data, pieces_of)
    assert len(views) >= files.IOV_MAX
    disk.writev(views, SIZE, 0)
    target = bytearray(SIZE)
    disk.readv(pieces(target, pieces_of), SIZE, 0)
    assert target == data


def test_row49_truncated_under_us(disk: FileBackend, path: str) -> None:
    os.truncate(path, 4096)
    target = bytearray(8192)
    with pytest.raises(HostError) as caught:
        disk.readv([memoryview(target)], 8192, 0)
    assert caught.value.errno == errno.EIO
    with pytest.raises(HostError):
        disk.readv([memoryview(target)], 8192, 32768)
    disk.readv([memoryview(target)[:4096]], 4096, 0)  # what is left works


def test_row49_enospc_from_the_kernel() -> None:
    image = ImageFile("/dev/full", os.open("/dev/full", os.O_RDWR), SIZE, False)
    backend = FileBackend(image)
    with pytest.raises(HostError) as caught:
        backend.writev([memoryview(bytearray(512))], 512, 0)
    assert caught.value.errno == errno.ENOSPC
    backend.close()


def test_row49_eio_from_the_kernel() -> None:
    # Page 0 of a process is never mapped, and reading it through here is an EIO of the kernel's.
    image = ImageFile("mem", os.open("/proc/self/mem", os.O_RDONLY), SIZE, True)
    backend = FileBackend(image)
    with pytest.raises(HostError) as caught:
        backend.readv([memoryview(bytearray(512))], 512, 0)
    assert caught.value.errno == errno.EIO
    backend.close()


def test_a_flush_that_fails_says_so() -> None:
    read_end, write_end = os.pipe()
    backend = FileBackend(ImageFile("pipe", read_end, SIZE, False))
    with pytest.raises(HostError, match="fdatasync"):
        backend.flush()
    backend.close()
    os.close(write_end)


def test_short_transfers_are_finished(disk: FileBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyvmm.virtio.blk import backend as module

    real_read, real_write = os.preadv, os.pwritev
    calls = []

    def short_read(fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        calls.append("read")
        return real_read(fd, [views[0][:700]], offset)

    def short_write(fd: int, views: list[memoryview], offset: int) -> int:
        calls.append("write")
        return real_write(fd, [views[0][:700]], offset)

    for owner, names in ((module, ("_preadv", "_pwritev")), (files.os, ("preadv", "pwritev"))):
        monkeypatch.setattr(owner, names[0], short_read)
        monkeypatch.setattr(owner, names[1], short_write)
    data = bytearray(os.urandom(4096))
    disk.writev(pieces(data, 1500), 4096, 512)
    target = bytearray(4096)
    disk.readv(pieces(target, 900), 4096, 512)
    assert target == data
    assert calls.count("read") > 5 and calls.count("write") > 5


def test_closing_frees_the_image_for_others(path: str) -> None:
    FileBackend(open_image(path)).close()
    open_image(path).close()
