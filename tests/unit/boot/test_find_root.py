"""The initramfs's find-root and its init's reading of the command line, run on this machine."""

from __future__ import annotations

import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
from partition_tables import MIB, SECTOR, needs_tools, partitioned, partitioned_4k, put_file_system

from pyvmm.images import initramfs, recipes

pytestmark = pytest.mark.skipif(
    shutil.which("musl-gcc") is None, reason="needs musl-gcc (musl-tools)"
)

ROOT_UUID = "11111111-2222-3333-4444-555555555555"
DATA_UUID = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
GPT = f"""label: gpt
start=2048, size=16384, uuid={ROOT_UUID}, name="my root"
size=16384, uuid={DATA_UUID}, name="Zürich"
"""
DOS = "label: dos\nlabel-id: 0x1234abcd\n2048,16384,83\n,16384,E\n,8192,83\n"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("helpers")
    initramfs.compile_helpers(recipes.load(), str(folder))
    return folder / "find-root"


class Machine:
    """Some disks as sysfs and /dev show them, in a folder."""

    def __init__(self, folder: Path, program: Path) -> None:
        self._program = program
        self.sysfs, self.dev = folder / "sys", folder / "dev"
        (self.sysfs / "class/block").mkdir(parents=True)
        self.dev.mkdir()

    def add(self, name: str, image: Path, partitions: tuple[int, ...], block: int = 512) -> None:
        """A disk that has the partitions of these numbers, as the kernel found them."""
        disk = self.sysfs / "devices" / name
        (disk / "queue").mkdir(parents=True)
        (disk / "queue/logical_block_size").write_text(f"{block}\n")
        (disk / "size").write_text(f"{image.stat().st_size // SECTOR}\n")
        (self.sysfs / "class/block" / name).symlink_to(f"../../devices/{name}")
        (self.dev / name).symlink_to(image)
        for number in partitions:
            (disk / f"{name}{number}").mkdir()
            (disk / f"{name}{number}/partition").write_text(f"{number}\n")
            (disk / f"{name}{number}/size").write_text("16384\n")
            link = self.sysfs / "class/block" / f"{name}{number}"
            link.symlink_to(f"../../devices/{name}/{name}{number}")

    def run(self, *words: str) -> tuple[int, str]:
        done = subprocess.run(
            [self._program, "-s", self.sysfs, "-d", self.dev, *words],
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout.replace(f"{self.dev}/", "/dev/")


@pytest.fixture
def machine(tmp_path: Path, program: Path) -> Machine:
    return Machine(tmp_path, program)


@needs_tools
@pytest.mark.parametrize(
    ("wanted", "device"),
    [
        (f"PARTUUID={ROOT_UUID}", "/dev/vdb1\n"),
        (f"PARTUUID={DATA_UUID.upper()}", "/dev/vdb2\n"),
        (f"PARTUUID={ROOT_UUID}/PARTNROFF=1", "/dev/vdb2\n"),
        (f"PARTUUID={DATA_UUID}/PARTNROFF=-1", "/dev/vdb1\n"),
        (f"PARTUUID={DATA_UUID}/PARTNROFF=1", ""),
        ("PARTLABEL=my root", "/dev/vdb1\n"),
        ("PARTLABEL=Zürich", "/dev/vdb2\n"),
        ("PARTLABEL=my", ""),
        ("PARTLABEL=", ""),
        ("PARTUUID=", ""),
        ("PARTUUID=1234abcd-01", "/dev/vda1\n"),
        ("PARTUUID=1234ABCD-05", "/dev/vda5\n"),
        ("PARTUUID=1234abcd-06", ""),
    ],
)
@pytest.mark.parametrize("block", [512, 4096])
def test_a_partition_is_found_by_its_table(
    machine: Machine, tmp_path: Path, wanted: str, device: str, block: int
) -> None:
    if block == 512:
        gpt = partitioned(tmp_path / "gpt", GPT)
    else:
        gpt = partitioned_4k(tmp_path / "gpt", [(ROOT_UUID, "my root"), (DATA_UUID, "Zürich")])
    machine.add("vda", partitioned(tmp_path / "dos", DOS), (1, 2, 5))
    machine.add("vdb", gpt, (1, 2), block)
    assert machine.run(wanted) == (int(not device), device)


@needs_tools
def test_a_damaged_primary_table_gives_way_to_its_copy(machine: Machine, tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "gpt", GPT)
    data = bytearray(disk.read_bytes())
    data[2 * SECTOR + 16] ^= 0xFF  # of the first entry's UUID: the sum no longer fits
    disk.write_bytes(data)
    machine.add("vda", disk, (1, 2))
    assert machine.run(f"PARTUUID={ROOT_UUID}") == (0, "/dev/vda1\n")
    data[-SECTOR:] = bytes(SECTOR)
    disk.write_bytes(data)
    assert machine.run(f"PARTUUID={ROOT_UUID}") == (1, "")


@needs_tools
def test_a_name_of_any_characters_is_found(machine: Machine, tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "gpt", GPT)
    data = bytearray(disk.read_bytes())
    name = "Ω🏔\ud800".encode("utf-16-le", "surrogatepass")  # sfdisk writes none of the last two
    data[2 * SECTOR + 56 : 2 * SECTOR + 128] = name.ljust(72, b"\0")
    header = data[SECTOR : 2 * SECTOR]
    entries = data[2 * SECTOR : 2 * SECTOR + 128 * 128]
    header[88:92] = zlib.crc32(entries).to_bytes(4, "little")
    data[SECTOR : 2 * SECTOR] = sealed(header)
    disk.write_bytes(data)
    machine.add("vda", disk, (1, 2))
    assert machine.run("PARTLABEL=Ω🏔?") == (0, "/dev/vda1\n")


def sealed(header: bytearray) -> bytes:
    """`header` with the sum over itself."""
    header[16:20] = bytes(4)
    header[16:20] = zlib.crc32(header[:92]).to_bytes(4, "little")
    return bytes(header)


@needs_tools
@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (80, (1 << 32) - 1),  # so many entries
        (84, 1),  # of so few bytes
        (84, (1 << 32) - 128),
        (72, (1 << 63) - 1),  # there
        (12, 1 << 31),  # a header so large
    ],
)
def test_a_header_that_lies_is_no_table(
    machine: Machine, tmp_path: Path, offset: int, value: int
) -> None:
    disk = partitioned(tmp_path / "gpt", GPT)
    data = bytearray(disk.read_bytes())
    header = data[SECTOR : 2 * SECTOR]
    size = 8 if offset == 72 else 4
    header[offset : offset + size] = value.to_bytes(size, "little")
    data[SECTOR : 2 * SECTOR] = sealed(header)
    data[-SECTOR:] = bytes(SECTOR)
    disk.write_bytes(data)
    machine.add("vda", disk, (1, 2))
    assert machine.run(f"PARTUUID={ROOT_UUID}") == (1, "")
    assert machine.run()[0] == 0


@needs_tools
def test_the_list_says_what_there_is_to_choose_from(machine: Machine, tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "gpt", GPT)
    machine.add("vda", disk, (1, 2))
    put_file_system(tmp_path / "root", 0, 16 * MIB, "ext4", "-L", "os\x1b[2J", "-U", DATA_UUID)
    (machine.dev / "vda1").symlink_to(tmp_path / "root")
    code, text = machine.run()
    lines = text.splitlines()
    assert code == 0
    assert lines[0] == "/dev/vda 64 MiB"
    assert lines[1] == (
        f"/dev/vda1 8 MiB ext4 LABEL=os?[2J UUID={DATA_UUID} PARTLABEL=my root PARTUUID={ROOT_UUID}"
    )
    assert lines[2].startswith("/dev/vda2 8 MiB PARTLABEL=Z??rich")


def test_a_long_list_is_cut(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    for index in range(100):
        machine.add(f"vd{index:03}", tmp_path / "disk", ())
    lines = machine.run()[1].splitlines()
    assert len(lines) == 25 and lines[-1] == "and 76 more"


def words(cmdline: str) -> list[str]:
    """The words that the initramfs's init makes of a command line, up to --."""
    script = Path(recipes.load().file("initramfs", "init")).read_text()
    functions = script[script.index("next_word() {") : script.index("mount -t proc")]
    loop = 'while next_word && [ "$word" != -- ]; do unquote; printf "%s\\n" "$word"; done'
    done = subprocess.run(
        ["busybox", "sh", "-euc", f"tab='\t' rest=$1\n{functions}\n{loop}", "sh", cmdline],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("busybox") is None, reason="needs busybox (busybox-static)")
@pytest.mark.parametrize(
    ("cmdline", "expected"),
    [
        ("quiet  root=/dev/vda\tro", ["quiet", "root=/dev/vda", "ro"]),
        ('root="PARTLABEL=my  root" ro', ["root=PARTLABEL=my  root", "ro"]),
        ('"root=LABEL=a b" rw', ["root=LABEL=a b", "rw"]),
        ('a="" b="c d" e=f"g h" i=j="k l"', ["a=", "b=c d", 'e=f"g h"', 'i=j="k l"']),
        ('init=/bin/bash -- -c "root=/dev/no"', ["init=/bin/bash"]),
        ("* ? [a] $(exit 3) `exit 3` ${x?} \\n", None),
        ("", []),
    ],
)
def test_the_command_line_is_read_as_the_kernel_reads_it(
    cmdline: str, expected: list[str] | None
) -> None:
    assert words(cmdline) == (cmdline.split() if expected is None else expected)
