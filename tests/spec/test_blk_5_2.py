"""virtio 1.3, 5.2 Block Device: one test for each thing the device must or should do.

What concerns VIRTIO_BLK_F_ZONED alone does not bind a device that does not offer it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from blk_rig import MIB, Rig, file_backend, running

from pyvmm.testing.blk_driver import (
    DISCARD,
    F_BLK_SIZE,
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_SEG_MAX,
    F_TOPOLOGY,
    F_WRITE_ZEROES,
    IN,
    IOERR,
    OK,
    OUT,
    SECURE_ERASE,
    UNSUPP,
    WRITE_ZEROES,
    WRITEBACK,
    BlockDriver,
)
from pyvmm.virtio.blk.backend import FileBackend

SIZE = 1 * MIB
F_SIZE_MAX, F_GEOMETRY = 1 << 1, 1 << 4
F_LIFETIME, F_SECURE_ERASE, F_ZONED = 1 << 15, 1 << 16, 1 << 17
LEGACY = 1 << 0 | 1 << 7  # VIRTIO_BLK_F_BARRIER, VIRTIO_BLK_F_SCSI


class Recorder(FileBackend):
    """A real disk that notes what was done to it and how many requests were complete by then."""

    rig: Rig

    def __init__(self, path: Path) -> None:
        super().__init__(file_backend(path)._image)
        self.seen: list[tuple[str, int]] = []

    def _note(self, what: str) -> None:
        self.seen.append((what, self.rig.driver.queues[0].used_idx))

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        super().writev(views, size, offset)
        self._note("write")

    def flush(self) -> None:
        self._note("flush begins")
        super().flush()
        self._note("flush ends")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def rig(image: Path) -> Iterator[Rig]:
    with running(file_backend(image)) as made:
        yield made


def start_recorded(image: Path, features_off: int) -> Iterator[tuple[Rig, Recorder]]:
    backend = Recorder(image)
    with running(backend, start=False) as rig:
        backend.rig = rig
        rig.driver.start(features=rig.driver.offered_features() & ~features_off)
        yield rig, backend


@pytest.fixture
def write_back(image: Path) -> Iterator[tuple[Rig, Recorder]]:
    yield from start_recorded(image, 0)


@pytest.fixture
def write_through(image: Path) -> Iterator[tuple[Rig, Recorder]]:
    yield from start_recorded(image, F_FLUSH)


# --- 5.2.1 to 5.2.4: what the device is -----------------------------------------------------------


def test_5_2_1_device_id(rig: Rig) -> None:
    assert rig.driver.read(0x008) == 2


@pytest.mark.parametrize("queues", [1, 2, 4])
def test_5_2_2_number_of_queues(image: Path, queues: int) -> None:
    with running(file_backend(image), num_queues=queues) as rig:
        assert len(rig.driver.queues) == queues
        assert bool(rig.driver.offered_features() & F_MQ) is (queues > 1)
        assert rig.driver.config(34, 2) == struct.pack("<H", queues if queues > 1 else 0)
        for index in range(queues):
            disk = BlockDriver(rig.driver, queue=index)
            assert disk.write(index, bytes([index]) * 512).status == OK
            assert disk.read(index, 512).data == bytes([index]) * 512


def test_5_2_2_without_mq_one_queue_serves(image: Path) -> None:
    with running(file_backend(image), num_queues=4, start=False) as rig:
        features = rig.driver.offered_features() & ~F_MQ
        rig.driver.start(features=features, queue_sizes=[128, 0, 0, 0])
        assert rig.disk.read(0, 512).status == OK


def test_5_2_3_features_are_those_that_are_served(rig: Rig) -> None:
    offered = rig.driver.offered_features() & 0xFF_FFFF
    described = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY
    assert offered == described | F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES


def test_5_2_3_a_read_only_disk_offers_nothing_that_changes_it(image: Path) -> None:
    with running(file_backend(image, read_only=True)) as rig:
        assert not rig.driver.offered_features() & (F_DISCARD | F_WRITE_ZEROES)
        assert rig.driver.config(36, 24) == bytes(24)
        assert rig.disk.discard((0, 8, 0)).status == UNSUPP
        assert rig.disk.write_zeroes((0, 8, 0)).status == UNSUPP


def test_5_2_3_no_legacy_features(rig: Rig) -> None:
    assert not rig.driver.offered_features() & LEGACY


def test_5_2_4_capacity_is_in_sectors_of_512(rig: Rig) -> None:
    assert rig.driver.config(0, 8) == struct.pack("<Q", SIZE // 512)


def test_5_2_4_seg_max_segments_fit_into_the_queue(rig: Rig) -> None:
    (seg_max,) = struct.unpack("<L", rig.driver.config(12, 4))
    assert seg_max == 254
    answer = rig.disk.call(IN, 0, writable=[512] * seg_max)
    assert (answer.status, answer.written) == (OK, seg_max * 512 + 1)


def test_5_2_4_fields_of_features_not_offered_are_zero(rig: Rig) -> None:
    offered = rig.driver.offered_features()
    for feature, offset, length in (
        (F_SIZE_MAX, 8, 4),
        (F_GEOMETRY, 16, 4),
        (F_MQ, 34, 2),
        (F_SECURE_ERASE, 60, 12),
        (F_ZONED, 72, 24),
    ):
        assert not offered & feature
        assert rig.driver.config(offset, length) == bytes(length)


def test_5_2_4_the_driver_cannot_write_the_configuration(rig: Rig) -> None:
    # Row 5: nothing in it is writable but `writeback`, and that takes 0 and 1 only.
    before = rig.driver.config(0, 96)
    for offset in range(0, 96, 4):
        rig.driver.write(0x100 + offset, 0xFFFF_FFFF)
    for offset in range(96):
        rig.driver.registers.write(0x100 + offset, 1, 0xFF)
        if offset != WRITEBACK:
            rig.driver.registers.write(0x100 + offset, 1, 0)
    rig.driver.registers.write(0x100 + WRITEBACK, 2, 0)
    assert rig.driver.config(0, 96) == before


# --- 5.2.5.2 Device Requirements: Device Initialization -------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
def test_5_2_5_2_flush_is_always_offered(image: Path, read_only: bool) -> None:
    with running(file_backend(image, read_only=read_only)) as rig:
        assert rig.driver.offered_features() & F_FLUSH


def test_5_2_5_2_config_wce_is_not_offered_without_flush(rig: Rig) -> None:
    assert rig.driver.offered_features() & (F_CONFIG_WCE | F_FLUSH) == F_CONFIG_WCE | F_FLUSH


def test_5_2_5_2_writeback_is_0_without_flush(image: Path) -> None:
    with running(file_backend(image), start=False) as rig:
        for without, expected in ((F_FLUSH, 0), (0, 1), (F_FLUSH, 0)):
            # Read where drivers do: after FEATURES_OK, before DRIVER_OK.
            rig.driver.negotiate(rig.driver.offered_features() & ~without)
            assert rig.driver.config(WRITEBACK, 1) == bytes([expected])


def test_5_2_5_2_padding_is_zero(rig: Rig) -> None:
    assert rig.driver.config(33, 1) == bytes(1)  # unused0
    assert rig.driver.config(57, 3) == bytes(3)  # unused1


def test_5_2_5_2_not_zoned_so_zoned_is_not_offered(rig: Rig) -> None:
    assert not rig.driver.offered_features() & F_ZONED


# --- 5.2.6.2 Device Requirements: Device Operation ------------------------------------------------


@pytest.mark.parametrize("accepted", [True, False])
def test_5_2_6_2_writes_to_a_read_only_disk_are_ioerr(image: Path, accepted: bool) -> None:
    before = image.read_bytes()
    with running(file_backend(image, read_only=True), start=False) as rig:
        offered = rig.driver.offered_features()
        rig.driver.start(features=offered if accepted else offered & ~F_RO)
        assert rig.disk.write(0, b"x" * 512).status == IOERR
    assert image.read_bytes() == before


@pytest.mark.parametrize("type", [DISCARD, SECURE_ERASE, WRITE_ZEROES])
@pytest.mark.parametrize("flag", range(1, 32))
def test_5_2_6_2_unknown_flags_are_unsupp(rig: Rig, type: int, flag: int) -> None:
    segment = struct.pack("<QLL", 0, 8, 1 << flag)
    assert rig.disk.call(type, 0, readable=[segment]).status == UNSUPP


def test_5_2_6_2_discard_with_unmap_is_unsupp(rig: Rig) -> None:
    segment = struct.pack("<QLL", 0, 8, 1)
    assert rig.disk.call(DISCARD, 0, readable=[segment]).status == UNSUPP


def test_5_2_6_2_case_1_without_flush_a_completed_write_is_stable(
    write_through: tuple[Rig, Recorder],
) -> None:
    rig, backend = write_through
    for done in range(3):
        assert rig.disk.write(done, b"x" * 512).status == OK
        assert backend.seen == [("write", done), ("flush begins", done), ("flush ends", done)]
        backend.seen.clear()


def test_5_2_6_2_case_1_a_write_that_could_not_be_made_stable_fails(
    write_through: tuple[Rig, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, _ = write_through

    def failing(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing)
    assert rig.disk.write(0, b"x" * 512).status == IOERR
    monkeypatch.undo()
    assert rig.disk.write(0, b"x" * 512).status == OK


def test_5_2_6_2_case_3_flush_completes_after_the_data_is_stable(
    write_back: tuple[Rig, Recorder],
) -> None:
    rig, backend = write_back
    assert rig.disk.write(0, b"x" * 512).status == OK
    assert backend.seen == [("write", 0)]
    assert rig.disk.flush().status == OK
    assert backend.seen[1:] == [("flush begins", 1), ("flush ends", 1)]


def test_5_2_6_2_case_3_a_flush_covers_writes_of_the_same_batch(
    write_back: tuple[Rig, Recorder],
) -> None:
    rig, backend = write_back
    queue = rig.driver.queues[0]
    requests = [struct.pack("<LLQ", OUT, 0, sector) for sector in range(4)]
    chains = [queue.add([head, b"w" * 512], [1]) for head in requests]
    chains.append(queue.add([struct.pack("<LLQ", 4, 0, 0)], [1]))
    if queue.publish():
        rig.driver.kick()
    for chain in chains:
        rig.driver.wait_used(0, chain)
    assert [what for what, _ in backend.seen] == ["write"] * 4 + ["flush begins", "flush ends"]


def test_5_2_6_2_lifetime_is_not_offered_without_its_metrics(rig: Rig) -> None:
    assert not rig.driver.offered_features() & F_LIFETIME


@pytest.mark.parametrize("type", [15, 16, 18, 20, 22, 24, 26])
def test_5_2_6_2_zone_requests_are_unsupp(rig: Rig, type: int) -> None:
    # APPEND, REPORT, OPEN, CLOSE, FINISH, RESET, RESET_ALL
    assert rig.disk.call(type, 0, writable=[512]).status == UNSUPP
    assert rig.disk.call(type, 0, readable=[b"x" * 512]).status == UNSUPP
