"""Hostile and broken block requests through registers and rings: rows of docs/robustness.md.

After each the device must still serve; what it may not touch is compared byte by byte.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import blk_rig
import pytest
from blk_rig import HIGH, MIB, RAM_END, Rig, file_backend, running
from rings import RINGS

from pyvmm.host.files import ImageFile
from pyvmm.testing import Buffer, Element, MockPackedDriver
from pyvmm.testing.blk_driver import (
    DISCARD,
    F_RO,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    SECURE_ERASE,
    UNSUPP,
    UNTOUCHED,
    WRITE_ZEROES,
    Answer,
    header,
)
from pyvmm.testing.ring import INDIRECT, MockDriver
from pyvmm.virtio.blk.backend import FileBackend

SIZE = 1 * MIB
SECTORS = SIZE // 512
BAD_DATA = {
    "outside": Buffer(0x8000_0000, 512),
    "straddles the hole": Buffer(RAM_END - 256, 512),
    "wraps 2^64": Buffer(2**64 - 256, 512),
    "past the last region": Buffer(HIGH + MIB - 1, 512),
    "3 GiB long": Buffer(0x1000, 0xC000_0000),
}


@pytest.fixture(params=product(RINGS, ("short", "general")), ids="-".join, autouse=True)
def ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it over every ring, and both ways: a disk that is traced has the general one only."""
    ring, way = request.param
    monkeypatch.setattr(blk_rig, "ring", ring)
    monkeypatch.setattr(blk_rig, "traced", way == "general")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def rig(image: Path) -> Iterator[Rig]:
    before = image.read_bytes()
    with running(file_backend(image)) as made:
        yield made
        made.assert_alive()
    assert len(image.read_bytes()) == len(before), "the image changed its size"


@pytest.mark.parametrize("bad", BAD_DATA.values(), ids=BAD_DATA.keys())
def test_row29_a_data_buffer_outside_ram(rig: Rig, image: Path, bad: Buffer) -> None:
    before = image.read_bytes()
    answer = rig.disk.call(IN, 0, writable=[bad])
    assert (answer.status, answer.written) == (IOERR, 0)
    assert rig.disk.call(IN, 0, writable=[512, bad]).status == IOERR
    assert rig.disk.call(OUT, 0, readable=[bad]).status == IOERR
    assert rig.disk.call(OUT, 0, readable=[b"x" * 512, bad]).status == IOERR
    assert image.read_bytes() == before


@pytest.mark.parametrize("bad", BAD_DATA.values(), ids=BAD_DATA.keys())
def test_row29_a_header_outside_ram(rig: Rig, bad: Buffer) -> None:
    assert rig.disk.raw([bad._replace(length=16 + 512)], [512, 1]).status == IOERR
    assert rig.disk.raw([header(IN)[:8], bad], [512, 1]).status == IOERR


@pytest.mark.parametrize("bad", BAD_DATA.values(), ids=BAD_DATA.keys())
def test_row29_a_status_byte_outside_ram(rig: Rig, image: Path, bad: Buffer) -> None:
    before = image.read_bytes()
    assert rig.disk.raw([header(IN)], [512, bad]).written == 0
    assert rig.disk.raw([header(OUT), b"x" * 512], [bad]).written == 0
    assert image.read_bytes() == before  # what cannot be answered is not carried out


def test_row29_a_request_in_the_high_region_is_lawful(rig: Rig, image: Path) -> None:
    rig.memory.write(HIGH, header(IN, 3))
    answer = rig.disk.raw([Buffer(HIGH, 16)], [Buffer(HIGH + 0x1000, 512), Buffer(HIGH + 64, 1)])
    assert (answer.status, answer.written) == (OK, 513)
    assert answer.data == image.read_bytes()[3 * 512 : 4 * 512]


def test_row30_empty_parts(rig: Rig, image: Path) -> None:
    before = image.read_bytes()
    empty = Buffer(0x8000_0000, 0)  # an empty buffer may point anywhere
    for type in (IN, OUT):
        assert rig.disk.call(type, 0).status == OK  # no sectors
    assert rig.disk.call(IN, 0, writable=[empty, 512, empty]).status == OK
    assert rig.disk.raw([empty, header(IN)], [512, 1, empty]).written == 513
    assert rig.disk.raw([empty], [512, 1]).status == IOERR
    assert rig.disk.raw([], [512, 1]).status == IOERR
    assert rig.disk.raw([header(IN)[:15]], [512, 1]).status == IOERR
    for writable in ([], [empty], [empty, empty]):
        assert rig.disk.raw([header(OUT), b"x" * 512], writable).written == 0
    assert image.read_bytes() == before


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_row35_any_layout(rig: Rig, image: Path, indirect: bool) -> None:
    wanted = image.read_bytes()[5 * 512 : 7 * 512]
    head = header(IN, 5)
    for readable, writable in product(
        ([head], [head[:1], head[1:]], [head[:4], head[4:8], head[8:]]),
        ([1024, 1], [1025], [1, 1022, 1, 1], [1000, 25], [*[1] * 100, 925]),
    ):
        answer = rig.disk.raw(readable, writable, indirect=indirect)
        assert answer == Answer(OK, wanted, 1025)
    data = os.urandom(1024)
    head = header(OUT, 9)
    for sector, readable in enumerate(
        ([head + data], [head[:1], head[1:] + data], [head + data[:3], data[3:]]), 9
    ):
        rebuilt = [header(OUT, sector)[: len(readable[0])] + readable[0][16:], *readable[1:]]
        if len(readable[0]) < 16:
            rebuilt = [header(OUT, sector)[:1], header(OUT, sector)[1:] + data]
        assert rig.disk.raw(rebuilt, [1], indirect=indirect) == Answer(OK, b"", 1)
        assert rig.disk.read(sector, 1024).data == data


def test_row39_readable_memory_is_never_written(rig: Rig, image: Path) -> None:
    before = image.read_bytes()
    secret = rig.driver.arena.alloc(512)
    rig.memory.write(secret, b"s" * 512)
    assert rig.disk.call(IN, 0, readable=[Buffer(secret, 512)]).status == IOERR
    assert rig.disk.call(IN, 0, readable=[Buffer(secret, 512)], writable=[512]).status == IOERR
    assert rig.memory.read(secret, 512) == b"s" * 512
    assert rig.disk.call(OUT, 0, writable=[512]).status == IOERR
    assert rig.disk.call(OUT, 0, readable=[b"x" * 512], writable=[512]).status == IOERR
    assert image.read_bytes() == before


@pytest.mark.parametrize("size", [1, 20, 511, 513, 4095])
def test_row40_data_that_is_no_whole_sectors(rig: Rig, image: Path, size: int) -> None:
    before = image.read_bytes()
    assert rig.disk.read(0, size).status == IOERR
    assert rig.disk.write(0, b"x" * size).status == IOERR
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    "sector", [SECTORS, SECTORS - 1, SECTORS + 1, 2**32, 2**55, 2**63, 2**64 - 2, 2**64 - 1]
)
def test_row41_past_the_capacity(rig: Rig, image: Path, sector: int) -> None:
    before = image.read_bytes()
    assert rig.disk.read(sector, 1024).status == IOERR
    answer = rig.disk.write(sector, b"x" * 1024)
    assert (answer.status, answer.written) == (IOERR, 1)
    assert image.read_bytes() == before


def test_row41_the_last_sector_is_there(rig: Rig, image: Path) -> None:
    assert rig.disk.write(SECTORS - 1, b"L" * 512).status == OK
    assert image.read_bytes()[-512:] == b"L" * 512
    assert rig.disk.read(SECTORS - 1, 512).data == b"L" * 512


def test_row41_a_hidden_odd_tail_stays_out_of_reach(image: Path) -> None:
    with image.open("ab") as file:
        file.write(b"T" * 100)
    with running(file_backend(image)) as rig:
        assert rig.driver.config(0, 8) == struct.pack("<Q", SECTORS)
        assert rig.disk.read(SECTORS, 512).status == IOERR
        assert rig.disk.write(SECTORS, b"x" * 512).status == IOERR
    assert image.read_bytes()[SIZE:] == b"T" * 100


@pytest.mark.parametrize("accepted", [True, False], ids=["F_RO accepted", "F_RO refused"])
def test_row42_row43_a_read_only_disk_refuses_writes_only(image: Path, accepted: bool) -> None:
    before = image.read_bytes()
    with running(file_backend(image, read_only=True), start=False) as rig:
        offered = rig.driver.offered_features()
        assert offered & F_RO
        rig.driver.start(features=offered if accepted else offered & ~F_RO)
        assert rig.disk.write(0, b"x" * 512).status == IOERR
        assert rig.disk.write(SECTORS, b"x" * 512).status == IOERR
        assert rig.disk.flush().status == OK
        assert rig.disk.get_id().status == OK
        assert rig.disk.read(0, 512).data == before[:512]
        rig.assert_alive()
    assert image.read_bytes() == before


def test_row44_odd_flushes(rig: Rig) -> None:
    assert rig.disk.call(FLUSH, 2**64 - 1).status == OK
    assert rig.disk.call(FLUSH, 1, readable=[b"x" * 700]).status == OK
    answer = rig.disk.call(FLUSH, 0, writable=[700])
    assert (answer.status, answer.written, answer.data) == (OK, 0, bytes(700))


def test_row45_the_id_in_buffers_of_all_sizes(rig: Rig) -> None:
    name = b"vda".ljust(20, b"\0")
    assert rig.disk.get_id() == Answer(OK, name, 21)
    assert rig.disk.get_id(64) == Answer(OK, name + bytes(44), 20)
    assert rig.disk.get_id(19).status == IOERR
    assert rig.disk.call(GET_ID).status == IOERR
    assert rig.disk.call(GET_ID, writable=[7, 13]) == Answer(OK, name, 21)


@pytest.mark.parametrize("type", [2, 3, 5, 7, 9, *range(15, 28), 2**31, 2**31 + 1, 2**32 - 1])
def test_row46_unknown_and_zone_requests(rig: Rig, image: Path, type: int) -> None:
    before = image.read_bytes()
    answer = rig.disk.call(type, 0, readable=[b"x" * 512])
    assert (answer.status, answer.written) == (UNSUPP, 1)
    assert rig.disk.call(type, 0, writable=[512]) == Answer(UNSUPP, bytes(512), 0)
    assert image.read_bytes() == before


@pytest.mark.parametrize("type", [DISCARD, WRITE_ZEROES, SECURE_ERASE])
@pytest.mark.parametrize("flags", [0, 1, 2, 2**32 - 1])
def test_row47_discard_and_its_kin(rig: Rig, image: Path, type: int, flags: int) -> None:
    before = image.read_bytes()
    good, bad = struct.pack("<QLL", 0, 8, 0), struct.pack("<QLL", 8, 8, flags)
    offered = type != SECURE_ERASE
    legal = offered and (flags == 0 or (type == WRITE_ZEROES and flags == 1))
    assert rig.disk.call(type, 0, readable=[good, bad]).status == (OK if legal else UNSUPP)
    after = image.read_bytes()
    assert after == (bytes(8192) + before[8192:] if legal else before)


def test_row48_used_length_after_a_read_that_failed_midway(rig: Rig, image: Path) -> None:
    os.truncate(image, SIZE // 2)
    answer = rig.disk.read(SIZE // 2 // 512 - 1, 1024)
    assert (answer.status, answer.written) == (IOERR, 0)
    answer = rig.disk.read(SECTORS - 2, 1024)
    assert (answer.status, answer.written) == (IOERR, 0)
    os.truncate(image, SIZE)


def test_row49_truncated_under_us_and_the_next_request_works(rig: Rig, image: Path) -> None:
    os.truncate(image, 4096)
    assert rig.disk.read(8, 512).status == IOERR
    assert rig.disk.read(0, 4096).status == OK
    assert "past the end" in rig.lines[-1] or "past the end" in " ".join(rig.lines)
    os.truncate(image, SIZE)
    assert rig.disk.read(8, 512).data == bytes(512)


@pytest.mark.parametrize(
    ("node", "flags", "type", "words"),
    [
        ("/dev/full", os.O_RDWR, OUT, "No space left"),
        ("/proc/self/mem", os.O_RDONLY, IN, "Input/output error"),
    ],
    ids=["ENOSPC", "EIO"],
)
def test_row49_the_hosts_refusals(node: str, flags: int, type: int, words: str) -> None:
    image = ImageFile(node, os.open(node, flags), SIZE, False)
    with running(FileBackend(image)) as rig:
        for _ in range(3):
            if type == OUT:
                assert rig.disk.write(0, b"x" * 512) == Answer(IOERR, b"", 1)
            else:
                assert rig.disk.read(0, 512).status == IOERR
        assert rig.disk.get_id().status == OK
        assert not rig.driver.needs_reset
        assert words in rig.lines[0] and len(rig.lines) == 3


def test_row49_one_rate_limited_line_that_names_the_disk(capsys: pytest.CaptureFixture) -> None:
    image = ImageFile("/dev/full", os.open("/dev/full", os.O_RDWR), SIZE, False)
    with running(FileBackend(image), name="root", log=None) as rig:
        for _ in range(200):
            assert rig.disk.write(0, b"x" * 512).status == IOERR
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 20
    assert "disk root: OUT at sector 0 answered IOERR" in lines[0]


def test_row49_a_flush_that_fails_is_not_a_success() -> None:
    read_end, write_end = os.pipe()  # fdatasync of a pipe is refused
    with running(FileBackend(ImageFile("pipe", read_end, SIZE, False))) as rig:
        assert rig.disk.flush() == Answer(IOERR, b"", 1)
        assert rig.disk.get_id().status == OK
    os.close(write_end)


def test_row50_a_request_of_as_many_segments_as_the_queue_allows(image: Path) -> None:
    with running(file_backend(image), queue_size=2048) as rig:
        assert rig.driver.config(12, 4) == struct.pack("<L", 2046)
        sizes = [512] * 2046
        assert SIZE > 2046 * 512
        answer = rig.disk.call(IN, 0, writable=sizes, indirect=True)
        assert answer == Answer(OK, image.read_bytes()[: 2046 * 512], 2046 * 512 + 1)
        data = os.urandom(2046 * 512)
        pieces = [data[start : start + 512] for start in range(0, len(data), 512)]
        assert rig.disk.call(OUT, 0, readable=pieces).status == OK
    assert image.read_bytes()[: len(data)] == data


def test_row52_qcow2_magic_written_by_the_guest_changes_nothing(image: Path) -> None:
    # GHSA-jmr4-g2hv-mjj6: a guest writes a header that names a file of the host
    with running(file_backend(image)) as rig:
        assert rig.disk.write(0, b"QFI\xfb\0\0\0\3".ljust(512, b"\0")).status == OK
    with running(file_backend(image)) as rig:
        assert rig.driver.config(0, 8) == struct.pack("<Q", SECTORS)
        assert rig.disk.read(0, 512).data[:4] == b"QFI\xfb"


def differing(before: bytearray, after: bytes) -> list[int]:
    if before == after:
        return []
    return [index for index, byte in enumerate(before) if byte != after[index]]


def shared_parts(queue: MockDriver) -> list[Buffer]:
    """The writes of device and driver in a queue after a chain was published."""
    size = queue.size
    if isinstance(queue, MockPackedDriver):
        events = [Buffer(queue.device_addr, 4), Buffer(queue.driver_addr, 4)]
        return [Buffer(queue.desc_addr, 16 * size), *events]
    used_event = Buffer(queue.driver_addr + 4 + 2 * size, 2)  # the driver's own
    return [Buffer(queue.device_addr, 6 + 8 * size), used_event]


def test_nothing_outside_the_writable_buffers_and_the_used_ring_changes(rig: Rig) -> None:
    for readable, writable in (
        ([header(IN, 3)], [512, 1]),
        ([header(IN, 2**64 - 1)], [512, 1]),
        ([header(IN), b"y" * 512], [512, 1]),
        ([header(GET_ID)], [64, 1]),
        ([header(99)], [512, 1]),
        ([header(OUT), b"z" * 512], [1]),
        ([header(OUT), b"z" * 512], [Buffer(RAM_END, 1)]),
    ):
        queue = rig.driver.queues[0]
        chain = queue.add(readable, writable)
        kick = queue.publish()
        before = [bytearray(part) for part in rig.ram()]
        if kick:
            rig.driver.kick()
        rig.driver.wait_used(0, chain)
        after = rig.ram()
        for addr, length in (*chain.writable, *shared_parts(queue)):
            if addr < RAM_END:
                before[0][addr : addr + length] = after[0][addr : addr + length]
        changed = [i for part, now in zip(before, after, strict=True) for i in differing(part, now)]
        assert changed == []


def test_unanswerable_requests_do_not_fill_the_log(capsys: pytest.CaptureFixture, image: Path):
    with running(file_backend(image), log=None) as rig:
        for _ in range(300):
            assert rig.disk.raw([header(IN)], []) == Answer(UNTOUCHED, b"", 0)
        rig.assert_alive()
    assert 1 <= len(capsys.readouterr().err.splitlines()) <= 20


def test_a_full_ring_of_bad_requests_leaves_another_disk_alone(tmp_path: Path, rig: Rig) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(b"o" * 4096)
    with running(file_backend(other), name="vdb") as second:
        queue = rig.driver.queues[0]
        chains = [queue.add([header(IN, 2**60)], [512, 1]) for _ in range(queue.size // 3)]
        if queue.publish():
            rig.driver.kick()
        assert second.disk.read(0, 512).data == b"o" * 512
        for chain in chains:
            rig.driver.wait_used(0, chain)
            assert queue.contents(chain)[-1] == IOERR


def test_a_broken_chain_is_for_the_transport_and_reset_mends_it(rig: Rig) -> None:
    queue = rig.driver.queues[0]
    queue.add_elements([Element(0x8000, 17, INDIRECT)])  # no table has 17 bytes
    queue.publish()
    rig.driver.kick()
    rig.driver.wait_needs_reset()
    rig.driver.start()
    rig.assert_alive()


def test_reset_waits_for_the_request_in_flight_and_nothing_comes_after(image: Path) -> None:
    # CVE class 2026-45782: use after completion. Row 12 for this device.
    with running(file_backend(image)) as rig:
        queue = rig.driver.queues[0]
        chains = [queue.add([header(IN, 0)], [4096, 1]) for _ in range(queue.size // 3)]
        if queue.publish():
            rig.driver.kick()
        rig.driver.write(0x070, 0)
        assert rig.driver.status == 0
        interrupts = rig.driver.irq.count
        for chain in chains:
            for part in chain.writable:
                rig.memory.write(part.addr, b"\xcc" * part.length)
        before = rig.ram()
        rig.driver.kick()
        assert (rig.ram(), rig.driver.irq.count) == (before, interrupts)
        rig.driver.start()
        rig.assert_alive()
