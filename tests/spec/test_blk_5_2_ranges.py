"""virtio 1.3, 5.2 Block Device: discard, write zeroes, and the switch of the write cache."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from blk_rig import MIB, Rig, file_backend, running

from pyvmm.host import holes
from pyvmm.host.files import open_image
from pyvmm.testing.blk_driver import (
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_WRITE_ZEROES,
    IOERR,
    OK,
    UNMAP,
    UNSUPP,
    WRITEBACK,
)
from pyvmm.virtio.blk.backend import Backend, FileBackend, scatter

SIZE = 4 * MIB
SECTORS = SIZE // 512


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def rig(image: Path) -> Iterator[Rig]:
    with running(file_backend(image)) as made:
        yield made
        made.assert_alive()


def allocated(path: Path) -> int:
    os.sync()
    return path.stat().st_blocks * 512


def limits(rig: Rig) -> tuple[int, ...]:
    return struct.unpack("<5LB", rig.driver.config(36, 21))


# --- 5.2.4 Device configuration layout ------------------------------------------------------------


def test_5_2_4_limits_of_discard_and_write_zeroes(rig: Rig) -> None:
    discard, discard_segments, alignment, zeroes, zeroes_segments, may_unmap = limits(rig)
    assert min(discard, discard_segments, zeroes, zeroes_segments) > 0
    assert alignment == 8
    assert may_unmap == 1


def test_5_2_4_as_many_segments_as_the_limit_says(rig: Rig, image: Path) -> None:
    _, segments, _, _, zeroes_segments, _ = limits(rig)
    assert rig.disk.discard(*((n, 1, 0) for n in range(segments))).status == OK
    assert rig.disk.discard(*((n, 1, 0) for n in range(segments + 1))).status == IOERR
    assert rig.disk.write_zeroes(*((n, 1, 0) for n in range(zeroes_segments))).status == OK
    assert rig.disk.write_zeroes(*((n, 1, 0) for n in range(zeroes_segments + 1))).status == IOERR
    assert image.read_bytes()[: zeroes_segments * 512] == bytes(zeroes_segments * 512)


def test_5_2_4_no_segment_longer_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "huge.img"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with running(file_backend(path)) as rig:
        discard, _, _, zeroes, _, _ = limits(rig)
        assert rig.disk.discard((0, discard, 0)).status == OK
        assert rig.disk.discard((0, discard + 1, 0)).status == IOERR
        assert rig.disk.write_zeroes((0, zeroes, UNMAP)).status == OK
        assert rig.disk.write_zeroes((0, zeroes + 1, UNMAP)).status == IOERR
    assert allocated(path) < MIB


def test_5_2_4_topology_is_the_storages_or_the_users(image: Path) -> None:
    class Large(FileBackend):
        def __init__(self) -> None:
            super().__init__(open_image(str(image)))
            self.block_sizes = self.block_sizes.with_logical(4096)._replace(optimal=1 << 20)

    for make, block_size, expected in (
        (lambda: file_backend(image), 0, (512, 3, 0, 8, 0)),
        (lambda: file_backend(image), 4096, (4096, 0, 0, 1, 0)),
        (lambda: file_backend(image), 1024, (1024, 2, 0, 4, 0)),
        (Large, 0, (4096, 0, 0, 1, 256)),
    ):
        with running(make(), block_size=block_size) as rig:
            assert struct.unpack("<LBBHL", rig.driver.config(20, 12)) == expected


# --- 5.2.6.2 Device Requirements: Device Operation ------------------------------------------------


def test_5_2_6_2_discard_gives_back_the_space(rig: Rig, image: Path) -> None:
    before = allocated(image)
    assert rig.disk.discard((0, 2048, 0), (4096, 2048, 0)).status == OK
    assert allocated(image) <= before - 2 * MIB
    assert image.stat().st_size == SIZE


@pytest.mark.parametrize("flags", [0, UNMAP])
def test_5_2_6_2_after_write_zeroes_reads_return_zeroes(rig: Rig, image: Path, flags: int) -> None:
    before = image.read_bytes()
    # Not aligned to any block of the file system's.
    assert rig.disk.write_zeroes((3, 2001, flags), (SECTORS - 1, 1, flags)).status == OK
    assert rig.disk.read(3, 512 * 32).data == bytes(512 * 32)
    end = (3 + 2001) * 512
    expected = before[: 3 * 512] + bytes(2001 * 512) + before[end:-512] + bytes(512)
    assert image.read_bytes() == expected


def test_5_2_6_2_write_zeroes_frees_only_with_unmap(rig: Rig, image: Path) -> None:
    before = allocated(image)
    assert rig.disk.write_zeroes((0, 2048, 0)).status == OK
    assert allocated(image) >= before
    assert rig.disk.write_zeroes((0, 2048, UNMAP)).status == OK
    assert allocated(image) <= before - MIB


def test_5_2_6_2_may_unmap_is_clear_where_nothing_can_be_freed() -> None:
    class Plain(Backend):
        size_sectors = 64

        def __init__(self) -> None:
            self.data = bytearray(os.urandom(64 * 512))

        def readv(self, views: list[memoryview], size: int, offset: int) -> None:
            scatter(self.data[offset : offset + size], views)

        def writev(self, views: list[memoryview], size: int, offset: int) -> None:
            self.data[offset : offset + size] = b"".join(views)

    with running(Plain()) as rig:
        assert limits(rig)[5] == 0
        assert not rig.driver.offered_features() & F_DISCARD
        assert rig.disk.write_zeroes((8, 16, UNMAP)).status == OK
        assert rig.disk.read(8, 16 * 512).data == bytes(16 * 512)
        assert any(rig.disk.read(0, 8 * 512).data)


def test_5_2_6_2_a_file_system_without_holes(
    rig: Rig, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(fd: int, mode: int, offset: int, size: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(holes, "_loaded", [unsupported])
    before = image.read_bytes()
    assert rig.disk.discard((0, 16, 0)).status == OK
    assert image.read_bytes() == before
    assert rig.disk.write_zeroes((0, 2048, UNMAP), (2048, 8, 0)).status == OK
    assert image.read_bytes() == bytes(2056 * 512) + before[2056 * 512 :]


@pytest.mark.parametrize(
    "segment", [(SECTORS, 1, 0), (SECTORS - 1, 2, 0), (2**64 - 1, 1, 0), (2**63, 2**32 - 1, 0)]
)
def test_5_2_6_2_row41_past_the_end_nothing_is_done(
    rig: Rig, image: Path, segment: tuple[int, int, int]
) -> None:
    before = image.read_bytes()
    good = (0, 8, 0)
    assert rig.disk.discard(good, segment).status == IOERR
    assert rig.disk.write_zeroes(good, segment).status == IOERR
    assert image.read_bytes() == before


def test_5_2_6_2_segments_of_no_sectors(rig: Rig, image: Path) -> None:
    before = image.read_bytes()
    assert rig.disk.discard((0, 0, 0)).status == OK
    assert rig.disk.write_zeroes((SECTORS, 0, 0)).status == OK
    assert image.read_bytes() == before


def test_5_2_6_2_commands_whose_feature_was_not_negotiated(image: Path) -> None:
    before = image.read_bytes()
    with running(file_backend(image), start=False) as rig:
        offered = rig.driver.offered_features()
        rig.driver.start(features=offered & ~(F_DISCARD | F_WRITE_ZEROES))
        assert rig.disk.discard((0, 8, 0)).status == UNSUPP
        assert rig.disk.write_zeroes((0, 8, 0)).status == UNSUPP
    assert image.read_bytes() == before


class Counting(FileBackend):
    """A real disk that notes what reached it."""

    def __init__(self, image: Path) -> None:
        super().__init__(open_image(str(image)))
        self.seen: list[str] = []

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        super().writev(views, size, offset)
        self.seen.append("write")

    def write_zeroes(self, offset: int, size: int, may_unmap: bool) -> None:
        super().write_zeroes(offset, size, may_unmap)
        self.seen.append("zero")

    def flush(self) -> None:
        super().flush()
        self.seen.append("flush")


def test_5_2_6_2_case_2_with_writeback_0_a_completed_write_is_stable(image: Path) -> None:
    backend = Counting(image)
    with running(backend) as rig:
        for value, expected in ((1, []), (0, ["flush"]), (1, []), (0, ["flush"])):
            rig.driver.registers.write(0x100 + WRITEBACK, 1, value)
            assert rig.driver.config(WRITEBACK, 1) == bytes([value])
            backend.seen.clear()
            assert rig.disk.write(0, b"x" * 512).status == OK
            assert backend.seen == ["write", *expected]
            backend.seen.clear()
            assert rig.disk.write_zeroes((0, 8, 0)).status == OK
            assert backend.seen == ["zero", *expected]


def test_5_2_6_2_case_2_writeback_can_be_written_with_config_wce_only(image: Path) -> None:
    with running(file_backend(image), start=False) as rig:
        rig.driver.start(features=rig.driver.offered_features() & ~F_CONFIG_WCE)
        rig.driver.registers.write(0x100 + WRITEBACK, 1, 0)
        assert rig.driver.config(WRITEBACK, 1) == b"\1"


def test_5_2_6_2_case_2_a_reset_brings_back_the_writeback_cache(image: Path) -> None:
    backend = Counting(image)
    with running(backend) as rig:
        rig.driver.registers.write(0x100 + WRITEBACK, 1, 0)
        rig.driver.start()
        assert rig.driver.config(WRITEBACK, 1) == b"\1"
        backend.seen.clear()
        assert rig.disk.write(0, b"x" * 512).status == OK
        assert backend.seen == ["write"]


def test_5_2_6_2_case_1_and_2_write_zeroes_without_flush_negotiated(image: Path) -> None:
    backend = Counting(image)
    with running(backend, start=False) as rig:
        offered = rig.driver.offered_features()
        for without in (F_FLUSH, F_FLUSH | F_CONFIG_WCE):
            rig.driver.start(features=offered & ~without)
            backend.seen.clear()
            assert rig.disk.write_zeroes((0, 8, 0)).status == OK
            assert backend.seen == ["zero", "flush"]
            assert offered & F_WRITE_ZEROES
