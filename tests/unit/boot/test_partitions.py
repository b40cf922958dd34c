"""A disk's partition table, read for a word of advice: real tables, and ones that lie."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from partition_tables import MIB, ROOT_X86_64, SECTOR, needs_tools, partitioned, put_file_system

from pyvmm.boot import partitions
from pyvmm.boot.diagnosis import ConsoleWatcher
from pyvmm.boot.partitions import Table
from pyvmm.kinds.disk.storage import open_disk
from pyvmm.machine.builder import Prepared
from pyvmm.machine.outcome import Alarm
from pyvmm.monitor.attendant import Attendant
from pyvmm.spec.vm import DiskSpec, VmSpec
from pyvmm.virtio.blk.backend import Backend
from pyvmm.virtio.blk.device import BlockDevice

GPT = f"""label: gpt
start=2048, size=65536, type=uefi, name="ESP"
size=131072, type=linux, name="data"
size=65536, type={ROOT_X86_64}, name="root"
"""
EFI, DATA, ROOT = 2048 * SECTOR, (2048 + 65536) * SECTOR, (2048 + 65536 + 131072) * SECTOR
EXT4 = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
CANNOT_MOUNT = b"pyvmm-initramfs: cannot mount /dev/vda%s as ext4 on /\n"


class Disk:
    """`data` to be read, counting."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads = self.bytes = 0

    def read(self, offset: int, size: int) -> bytes:
        self.reads += 1
        piece = self.data[offset : offset + size]
        self.bytes += len(piece)
        return piece

    def table(self, block: int = SECTOR) -> Table | None:
        found = partitions.read_disk(self.read, len(self.data), block)
        assert self.reads < 10_000 and self.bytes < 16 * MIB, "the cost is bounded"
        return found


def table_of(path: Path) -> Table | None:
    return Disk(path.read_bytes()).table()


def cure(line: bytes, table: Table | None, disk: str = "/dev/vda") -> str:
    found = [] if table is None else [(disk, table)]
    watcher = ConsoleWatcher(lambda: True, lambda: found)
    watcher.feed(line)
    assert watcher.diagnosis is not None
    assert str(watcher.diagnosis).isprintable()
    return watcher.diagnosis.cure


@needs_tools
def test_the_partition_to_boot_from_is_named_by_type_and_content(tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk", GPT, size=160 * MIB)
    put_file_system(disk, EFI, 32 * MIB, "vfat")
    put_file_system(disk, DATA, 64 * MIB, "ext4")
    put_file_system(disk, ROOT, 32 * MIB, "ext4")
    table = table_of(disk)
    assert table is not None and not table.damaged
    assert [(one.number, one.content.kind) for one in table.partitions] == [
        *((1, "vfat"), (2, "ext4"), (3, "ext4"))
    ]
    assert cure(CANNOT_MOUNT % b"", table) == (
        "/dev/vda holds partitions: put root=/dev/vda3 (ext4, 32 MiB) or root=/dev/vda2 "
        "(ext4, 64 MiB) into --cmdline"
    )
    assert cure(CANNOT_MOUNT % b"1", table).startswith("/dev/vda1 holds vfat: put root=/dev/vda3 ")
    # A partition that looks right has another fault, which only its own file system knows.
    assert "e2fsck" in cure(CANNOT_MOUNT % b"2", table)
    assert "e2fsck" in cure(CANNOT_MOUNT % b"", None)
    panic = b"Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(254,%d)\n"
    assert "root=/dev/vda3" in cure(panic % 0, table)
    assert "root=/dev/vda3" in cure(panic % 1, table)
    assert "root=/dev/vdb3" in cure(panic % 16, table, "/dev/vdb")
    assert "file IMAGE" in cure(panic % 2, table)


@needs_tools
def test_what_is_there_is_named_where_the_root_device_is_not(tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk", GPT.replace('"data"', '"b\x7fad"'), size=160 * MIB)
    put_file_system(disk, DATA, 64 * MIB, "ext4", "-L", "my data", "-U", EXT4)
    put_file_system(disk, ROOT, 32 * MIB, "ext4", "-L", "a\x1bb")
    table = table_of(disk)
    assert table is not None
    missing = b"pyvmm-initramfs: no root device %s after 3 s; what\n"
    text = cure(missing % b"PARTUUID=0-1", table)
    for one in table.partitions:
        assert f"/dev/vda{one.number} (" in text and f'PARTUUID="{one.uuid}"' in text
    assert 'PARTLABEL="root"' in cure(missing % b"PARTLABEL=no such", table)
    assert f'/dev/vda2 (ext4, 64 MiB, UUID="{EXT4}")' in cure(missing % b"UUID=1", table)
    assert 'LABEL="my data"), /dev/vda3 (ext4, 32 MiB, LABEL="a?b")' in cure(
        missing % b"LABEL=x", table
    )
    assert "/dev/vda1 (unknown, 32 MiB), /dev/vda2 (ext4, 64 MiB)" in cure(
        b"ALERT!  /dev/vda9 does not exist.  Dropping to a shell!\n", table
    )


@needs_tools
def test_a_disk_without_partitions_is_told_by_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"")
    put_file_system(tmp_path / "disk", 0, 32 * MIB, "ext4", "-L", "mine")
    table = table_of(tmp_path / "disk")
    text = cure(b"pyvmm-initramfs: no root device LABEL=x after 3 s\n", table)
    assert text.endswith('there are /dev/vda (ext4, 32 MiB, LABEL="mine")')
    assert "e2fsck" in cure(CANNOT_MOUNT % b"", table)
    put_file_system(tmp_path / "disk", 0, 320 * MIB, "xfs")
    text = cure(CANNOT_MOUNT % b"", table_of(tmp_path / "disk"))
    assert text.startswith("/dev/vda holds xfs: add rootfstype=xfs and an --initrd")
    (tmp_path / "disk").write_bytes(b"")
    put_file_system(tmp_path / "disk", 0, 32 * MIB, "vfat")
    text = cure(CANNOT_MOUNT % b"", table_of(tmp_path / "disk"))
    assert text == "/dev/vda holds vfat, and no Linux file system"


@needs_tools
@pytest.mark.parametrize(("kind", "size"), [("xfs", 320), ("btrfs", 128), ("ext4", 16)])
def test_the_usual_root_file_systems_are_known(tmp_path: Path, kind: str, size: int) -> None:
    script = f"label: dos\n2048,{size * 2048},83\n"
    disk = partitioned(tmp_path / "disk", script, size=(size + 2) * MIB)
    put_file_system(disk, MIB, size * MIB, kind)
    table = table_of(disk)
    assert table is not None and [one.content.kind for one in table.partitions] == [kind]
    text = cure(CANNOT_MOUNT % b"", table)
    assert f"root=/dev/vda1 ({kind}, {size} MiB)" in text
    assert (f"rootfstype={kind}" in text) == (kind != "ext4")
    assert (f"rootfstype={kind}" in cure(CANNOT_MOUNT % b"1", table)) == (kind != "ext4")


@needs_tools
def test_logical_partitions_count_from_five(tmp_path: Path) -> None:
    script = "label: dos\nlabel-id: 0xfeed\n2048,2048,82\n,,E\n,2048,83\n,16384,83\n,2048,83\n"
    disk = partitioned(tmp_path / "disk", script)
    put_file_system(disk, MIB, MIB, "swap")
    table = table_of(disk)
    assert table is not None
    assert [(one.number, one.uuid) for one in table.partitions] == [
        *((1, "0000feed-01"), (5, "0000feed-05"), (6, "0000feed-06"), (7, "0000feed-07"))
    ]
    put_file_system(disk, table.partitions[2].start, 8 * MIB, "ext4")
    assert "root=/dev/vda6 (ext4, 8 MiB)" in cure(CANNOT_MOUNT % b"", table_of(disk))
    text = cure(CANNOT_MOUNT % b"", table)
    assert text == ("/dev/vda holds partitions, and no Linux file system (something unknown, swap)")


@needs_tools
def test_the_second_copy_serves_where_the_first_is_damaged(tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk", GPT, size=160 * MIB)
    put_file_system(disk, ROOT, 32 * MIB, "ext4")
    data = bytearray(disk.read_bytes())
    data[2 * SECTOR] ^= 1
    table = Disk(bytes(data)).table()
    assert table is not None and table.damaged and len(table.partitions) == 3
    assert "gpt, as the first copy of the table is damaged" in cure(CANNOT_MOUNT % b"", table)
    data[-SECTOR] ^= 1
    assert Disk(bytes(data)).table() is None


def gpt(
    entries: bytes, change: Callable[[bytearray], None] | None = None, *, count: int = 128,
    size: int = 128, blocks: int = 65536
) -> bytes:  # fmt: skip
    """A disk with a GPT whose sums are right, whatever else it says."""
    disk = bytearray(blocks * SECTOR)
    struct.pack_into("<B3xB3xII", disk, 446, 0, 0xEE, 1, blocks - 1)
    disk[510:512] = b"\x55\xaa"
    table = entries.ljust(min(count * size, 1 << 22), b"\0")
    disk[2 * SECTOR : 2 * SECTOR + len(table)] = table
    header = bytearray(92)
    struct.pack_into("<8sIII4xQQQQ16sQIII", header, 0, b"EFI PART", 0x10000, 92, 0, 1, blocks - 1,
                     34, blocks - 34, bytes(16), 2, count, size, zlib.crc32(table))  # fmt: skip
    if change is not None:
        change(header)
    struct.pack_into("<I", header, 16, zlib.crc32(header[:16] + bytes(4) + header[20:]))
    disk[SECTOR : SECTOR + 92] = header
    return bytes(disk)


def entry(first: int, last: int, name: str = "x") -> bytes:
    return struct.pack("<16s16sQQQ72s", b"t" * 16, b"u" * 16, first, last, 0,
                       name.encode("utf-16-le"))  # fmt: skip


def test_thousands_of_entries_cost_no_more_than_a_few() -> None:
    disk = Disk(gpt(entry(40, 50) * 20_000, count=20_000))
    table = disk.table()
    assert table is not None and table.total == 20_000
    assert len(table.partitions) == partitions.MOST_PARTITIONS
    text = cure(b"pyvmm-initramfs: no root device LABEL=x after 3 s\n", table)
    assert "and 19992 more" in text and len(text) < 2000


def test_entries_that_overlap_or_lie_outside_do_no_harm() -> None:
    wrong = entry(100, 50) + entry(40, 1 << 60) + entry((1 << 64) - 1, (1 << 64) - 1)
    table = Disk(gpt(entry(40, 5000) + wrong + entry(50, 60) + entry(40, 5000))).table()
    assert table is not None
    assert [one.number for one in table.partitions] == [1, 5, 6]
    assert Disk(gpt(wrong)).table() is None


@pytest.mark.parametrize(
    "change",
    [
        lambda header: struct.pack_into("<I", header, 80, 0xFFFF_FFFF),
        lambda header: struct.pack_into("<I", header, 84, 0xFFFF_FF80),
        lambda header: struct.pack_into("<I", header, 84, 0),
        lambda header: struct.pack_into("<I", header, 84, 130),
        lambda header: struct.pack_into("<Q", header, 72, (1 << 64) - 1),
        lambda header: struct.pack_into("<Q", header, 24, 2),
        lambda header: struct.pack_into("<I", header, 12, 0xFFFF_FFFF),
        lambda header: struct.pack_into("<I", header, 88, 0),
    ],
)
def test_a_header_that_lies_is_no_table(change: Callable[[bytearray], None]) -> None:
    assert Disk(gpt(entry(40, 50), lambda header: None)).table() is not None
    assert Disk(gpt(entry(40, 50), change)).table() is None


def dos(rows: list[tuple[int, int, int]], flag: int = 0) -> bytearray:
    """A boot sector with rows of (type, first block, blocks)."""
    sector = bytearray(SECTOR)
    for index, row in enumerate(rows):
        struct.pack_into("<B3xB3xII", sector, 446 + 16 * index, flag, *row)
    sector[510:] = b"\x55\xaa"
    return sector


def test_a_chain_of_logical_partitions_that_never_ends() -> None:
    disk = bytearray(64 * SECTOR)
    disk[:SECTOR] = dos([(0x05, 8, 56)])
    disk[8 * SECTOR : 9 * SECTOR] = dos([(0x83, 1, 4), (0x05, 0, 8)])  # itself is the next
    found = Disk(bytes(disk)).table()
    assert found is not None and len(found.partitions) <= partitions.MOST_PARTITIONS
    disk[8 * SECTOR : 9 * SECTOR] = dos([(0, 0, 0), (0x05, 0, 8)])
    assert Disk(bytes(disk)).table() is None


def test_code_in_a_boot_sector_is_no_table() -> None:
    assert Disk(bytes(dos([(0x83, 1, 4)], flag=0x80)) + bytes(8 * SECTOR)).table() is not None
    assert Disk(bytes(dos([(0x83, 1, 4)], flag=0x33)) + bytes(8 * SECTOR)).table() is None
    for data in (b"", bytes(100), bytes(SECTOR), bytes(4 * SECTOR), bytes(dos([(0x83, 9, 9)]))):
        assert Disk(data).table() is None


@given(st.binary(max_size=64), st.integers(0, 1 << 32), st.booleans())
def test_any_bytes_are_read_in_bounded_time(noise: bytes, seed: int, is_gpt: bool) -> None:
    chance = random.Random(seed)
    disk = bytearray(
        gpt(entry(40, 50), blocks=256) if is_gpt else dos([(0x83, 1, 4), (0x0F, 2, 200)])
    )
    disk += bytes(max(0, 256 * SECTOR - len(disk)))
    for _ in range(8):
        at = chance.randrange(len(disk) // 8)
        disk[at : at + len(noise)] = noise
    disk[510:512] = b"\x55\xaa"
    table = Disk(bytes(disk)).table()
    if table is not None:
        assert partitions.advice("/dev/vda", table, 0).isprintable()
        assert partitions.listed([("/dev/vda", table)], "LABEL=").isprintable()


class Failing(Backend):
    """A disk whose class is broken."""

    size_sectors = 8

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        raise ZeroDivisionError


@needs_tools
@pytest.mark.parametrize("direct", [False, True])
def test_the_machine_reads_its_disks_through_their_back_ends(tmp_path: Path, direct: bool) -> None:
    path = partitioned(tmp_path / "disk", GPT, size=160 * MIB)
    put_file_system(path, ROOT, 32 * MIB, "ext4")
    with ExitStack() as closing:
        spec = VmSpec(kernel="", disks=(DiskSpec(str(path), direct=direct, id="real"),))
        disk = open_disk(spec.disks[0], None, closing, Alarm())
        broken = BlockDevice(Failing(), name="broken")
        entry = SimpleNamespace(cmdline="console=ttyS0 root=/dev/vdb")
        port = object()
        prepared = SimpleNamespace(
            spec=spec,
            entry=entry,
            devices=(broken, disk),
            console=port,
            board=SimpleNamespace(console=port, early_console=""),
        )
        attendant = Attendant("vm", cast(Prepared, prepared))
        attendant.watcher._disk_ready = lambda: True
        attendant.observe(CANNOT_MOUNT.replace(b"vda", b"vdb") % b"")
        found = attendant.watcher.diagnosis
        assert found is not None
        assert found.cure.startswith("/dev/vdb holds partitions: put root=/dev/vdb3 (ext4, 32 MiB)")
        assert disk.peek(disk.size - 4, 100) == path.read_bytes()[-4:]
        assert disk.peek(1 << 70, 100) == b""
