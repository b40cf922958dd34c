"""O_DIRECT: aligned requests go straight to the storage, all others through an aligned buffer."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from blk_rig import running

from pyvmm.errors import ConfigError, HostError
from pyvmm.host.files import ImageFile, open_image
from pyvmm.testing.blk_driver import OK
from pyvmm.virtio.blk.direct import DirectBackend

SIZE = 4 << 20


def open_direct(path: Path, read_only: bool = False) -> ImageFile:
    try:
        return open_image(str(path), read_only, direct=True)
    except ConfigError as error:
        pytest.skip(f"the file system of {path.parent} has no direct I/O: {error}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    return image


@pytest.fixture
def disk(path: Path) -> Iterator[DirectBackend]:
    backend = DirectBackend(open_direct(path))
    yield backend
    backend.close()


def unaligned(size: int, by: int) -> memoryview:
    """A buffer of `size` bytes that begins `by` bytes into a page."""
    return memoryview(mmap.mmap(-1, size + by))[by:]


def test_the_file_is_open_past_the_page_cache(disk: DirectBackend) -> None:
    assert fcntl.fcntl(disk._fd, fcntl.F_GETFL) & os.O_DIRECT


@pytest.mark.parametrize("by", [0, 1, 16, 512])
def test_random_requests_against_a_model(disk: DirectBackend, path: Path, by: int) -> None:
    rng = random.Random(by)
    model = bytearray(path.read_bytes())
    for _ in range(60):
        sectors = rng.choice([1, 3, 8, 64, 255, 4096])
        size = sectors * 512
        offset = rng.randrange(0, SIZE - size + 1, 512)
        buffer = unaligned(size, by)
        cut = rng.randrange(size)
        views = [buffer[:cut], buffer[cut:]] if rng.random() < 0.3 and cut else [buffer]
        if rng.random() < 0.5:
            buffer[:] = data = rng.randbytes(size)
            disk.writev(views, size, offset)
            model[offset : offset + size] = data
        else:
            disk.readv(views, size, offset)
            assert buffer == model[offset : offset + size]
    disk.flush()
    assert path.read_bytes() == model


def test_storage_with_larger_blocks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of 4096-byte blocks, as far as the kernel's refusals go: here made by hand."""
    real = os.preadv, os.pwritev

    def strict(call):  # type: ignore[no-untyped-def]
        def transfer(fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
            if (offset | sum(map(len, views))) % 4096:
                raise OSError(errno.EINVAL, "Invalid argument")
            return int(call(fd, views, offset))

        return transfer

    monkeypatch.setattr(os, "preadv", strict(real[0]))
    monkeypatch.setattr(os, "pwritev", strict(real[1]))
    monkeypatch.setattr("pyvmm.virtio.blk.backend._preadv", strict(real[0]))
    monkeypatch.setattr("pyvmm.virtio.blk.backend._pwritev", strict(real[1]))
    backend = DirectBackend(open_direct(path))
    assert (backend.block, backend.block_sizes.logical) == (4096, 4096)
    model = bytearray(path.read_bytes())
    rng = random.Random(5)
    for _ in range(80):
        size = rng.choice([512, 1536, 4096, 8192, 5 * 512, 1 << 21])
        offset = rng.randrange(0, SIZE - size + 1, 512)
        data = bytearray(rng.randbytes(size))
        if rng.random() < 0.6:
            backend.writev([memoryview(data)], size, offset)
            model[offset : offset + size] = data
        else:
            backend.readv([memoryview(data)], size, offset)
            assert data == model[offset : offset + size]
    backend.close()
    assert path.read_bytes() == model


def test_behind_the_device(path: Path) -> None:
    with running(DirectBackend(open_direct(path))) as rig:
        assert rig.disk.write(5, b"d" * 1024).status == OK
        assert rig.disk.read(5, 1024).data == b"d" * 1024
        assert rig.disk.write_zeroes((5, 1, 0)).status == OK
        assert rig.disk.read(5, 1024).data == bytes(512) + b"d" * 512
        assert rig.disk.flush().status == OK


def test_row49_truncated_under_us(disk: DirectBackend, path: Path) -> None:
    os.truncate(path, 4096)
    for by in (0, 1):
        with pytest.raises(HostError) as caught:
            disk.readv([unaligned(8192, by)], 8192, 0)
        assert caught.value.errno == errno.EIO


def test_an_odd_tail_stays_hidden(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"tail")
    backend = DirectBackend(open_direct(path, read_only=True))
    buffer = unaligned(512, 0)
    backend.readv([buffer], 512, SIZE - 512)
    assert backend.size_sectors == SIZE // 512
    backend.close()


def test_a_file_system_without_direct_io(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def refuse(fd: int, command: int, *rest: int) -> object:
        if command == fcntl.F_SETFL and rest[0] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")  # fcntl(2)
        return real(fd, command, *rest)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(ConfigError, match="leave out ,direct"):
        open_image(str(path), direct=True)
    monkeypatch.undo()
    open_image(str(path)).close()  # neither descriptor nor lock is left


def test_a_host_without_memory_for_the_buffer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, size: int) -> mmap.mmap:
        raise OSError(errno.ENOMEM, "no memory")

    image = open_image(str(path), direct=True)
    monkeypatch.setattr(mmap, "mmap", full)
    with pytest.raises(HostError, match="mmap of a buffer: Cannot allocate memory"):
        DirectBackend(image)
    image.close()
