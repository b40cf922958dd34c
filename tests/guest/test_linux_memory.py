"""Guests with as little memory as Debian's kernel can do with, and with some above 4 GiB."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from disks import artifacts, blank_disk, random_disk, root_disk, sha256
from guest import Guest, GuestResult

from pyvmm.emulated_host.limits import available_mib
from pyvmm.emulated_host.spec import OWN_MEMORY_MIB

pytestmark = pytest.mark.usefixtures("linux_guests")

MIB = 1 << 20
GIB = 1 << 30
LARGE_MIB = 5 * 1024
HIGH_BYTES = 16 * MIB

SCRIPT = """\
set -e
echo "total=$(sed -n 's/^MemTotal: *//p' /proc/meminfo)"
sed -n 's/^ *\\(.*\\) : System RAM/ram=\\1/p' /proc/iomem
"""

# Copies a disk to another with O_DIRECT, through memory that lies above 4 GiB as the kernel's own
# page map has it (Documentation/admin-guide/mm/pagemap.rst).
HIGH_SCRIPT = (
    SCRIPT
    + f"""\
python3 - <<'END'
import mmap, os, struct
size = {HIGH_BYTES}
memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
def address():
    import ctypes
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
with open("/proc/self/pagemap", "rb", buffering=0) as table:
    entries = os.pread(table.fileno(), size // 4096 * 8, address() // 4096 * 8)
frames = [entry & (1 << 55) - 1 for (entry,) in struct.iter_unpack("Q", entries)]
print(f"lowest={{min(frames) * 4096:#x}}")
source = os.open("/dev/vdb", os.O_RDONLY | os.O_DIRECT)
target = os.open("/dev/vdc", os.O_RDWR | os.O_DIRECT)
print(f"read={{os.preadv(source, [memory], 0)}}")
print(f"written={{os.pwritev(target, [memory], 0)}}")
os.fsync(target)
END
"""
)


def ram(result: GuestResult) -> list[tuple[int, int]]:
    """The ranges that the guest's kernel uses as RAM: (start, end)."""
    ranges = re.findall(r"^ram=([0-9a-f]+)-([0-9a-f]+)$", result.console, re.MULTILINE)
    return [(int(start, 16), int(end, 16) + 1) for start, end in ranges]


def total_kib(result: GuestResult) -> int:
    return int(result.value("total").split()[0])


def boot_small(folder: Path) -> GuestResult:
    # The bzImage unpacks itself beyond the end of so little memory; the ELF file just fits. Of what
    # is left 9 MiB go into tracefs, unless the kernel is locked down.
    files = artifacts("6.1")
    with root_disk(folder) as disk:
        guest = Guest(
            files.vmlinux,
            files.initramfs,
            [str(disk)],
            memory="66M",
            cmdline="lockdown=confidentiality",
            stdin="closed",
        )
        return guest.run(SCRIPT, folder=folder)


@pytest.mark.boot.with_args(boot_small)
def test_66_mib(boot: GuestResult) -> None:
    assert 20 * 1024 < total_kib(boot.check()) < 66 * 1024
    assert max(end for _, end in ram(boot)) == 66 * MIB


@dataclass(frozen=True)
class Large:
    """A run with memory above 4 GiB, and the checksums of the disk read and the disk written."""

    result: GuestResult
    source: str
    target: str


def boot_large(folder: Path) -> Large:
    available = available_mib()
    if available is not None and available < LARGE_MIB + OWN_MEMORY_MIB:
        pytest.skip(f"needs {LARGE_MIB + OWN_MEMORY_MIB} MiB of memory, there are {available}")
    files = artifacts("6.12", "test")
    source = random_disk(folder / "source.img", HIGH_BYTES, seed=5)
    target = blank_disk(folder / "target.img", HIGH_BYTES)
    with root_disk(folder, "test") as disk:
        disks = [str(disk), f"{source},readonly", str(target)]
        guest = Guest(files.vmlinux, files.initramfs, disks, cpus=2, memory="5G")
        result = guest.run(HIGH_SCRIPT, folder=folder)
    return Large(result, sha256(source), sha256(target))


@pytest.mark.boot.with_args(boot_large)
def test_5_gib_lie_around_the_hole(boot: Large) -> None:
    result = boot.result.check()
    assert 4.5 * 1024 * 1024 < total_kib(result) < LARGE_MIB * 1024
    assert (4 * GIB, 6 * GIB) in ram(result)
    assert all(end <= 3 * GIB or start >= 4 * GIB for start, end in ram(result))


@pytest.mark.boot.with_args(boot_large)
def test_disks_are_read_into_and_written_from_memory_above_4_gib(boot: Large) -> None:
    result = boot.result.check()
    assert int(result.value("lowest"), 16) >= 4 * GIB
    assert result.value("read") == result.value("written") == str(HIGH_BYTES)
    assert boot.target == boot.source
