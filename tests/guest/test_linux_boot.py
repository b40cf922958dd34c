"""Debian's kernels boot from their virtio-blk root disk, in every form, on 1 to 8 vCPUs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest
from disks import artifacts, fsck, read_file, root_disk
from guest import Guest, GuestResult

pytestmark = pytest.mark.usefixtures("linux_guests")

ZEROES = 1 << 20

SCRIPT = f"""\
set -e
echo "release=$(uname -r)"
echo "bridge=$(cat /sys/bus/pci/devices/0000:00:00.0/vendor 2> /dev/null || true)"
echo "functions=$(ls /sys/bus/pci/devices 2> /dev/null | wc -l)"
dmesg > /run/dmesg
echo "complaints=$(grep -ciE 'pci.*(fatal|fail|error|invalid|conflict)' /run/dmesg || true)"
echo "root=$(findmnt -n -o SOURCE /)"
echo "type=$(findmnt -n -o FSTYPE /)"
echo "nproc=$(nproc)"
echo "online=$(cat /sys/devices/system/cpu/online)"
for key in processor apicid 'core id' siblings 'cpu cores'; do
    echo "$key=$(grep "^$key\t" /proc/cpuinfo | cut -d: -f2 | xargs)"
done
# Work on each CPU at the same time, pinned to it.
for cpu in $(seq 0 $(($(nproc) - 1))); do
    taskset -c $cpu sh -c 'head -c {ZEROES} /dev/zero | sha256sum' > /run/load$cpu &
done
wait
echo "load=$(cat /run/load* | cut -d' ' -f1 | xargs)"
echo "ticks=$(grep LOC: /proc/interrupts)"
head -c 1000000 /dev/urandom > /root/proof
echo "proof=$(sha256sum < /root/proof | cut -d' ' -f1)"
"""


@dataclass(frozen=True)
class Kernel:
    """A way to boot: Debian's release of the kernel, the file's format, the number of vCPUs, and
    whether the kernel looks for a PCI bus."""

    version: str
    format: str
    cpus: int
    pci: bool = True

    def __str__(self) -> str:
        return f"{self.version}-{self.format}-{self.cpus}cpu"


@dataclass(frozen=True)
class Booted:
    """A finished boot; what e2fsck said of the root disk, and the checksum of a file on it."""

    result: GuestResult
    fsck: str
    proof: str


def boot_kernel(folder: Path, kernel: Kernel) -> Booted:
    files = artifacts(kernel.version)
    path = {"bzImage": files.bzimage, "vmlinux": files.vmlinux}[kernel.format]
    with root_disk(folder) as disk:
        guest = Guest(path, files.initramfs, [str(disk)], cpus=kernel.cpus)
        if not kernel.pci:
            guest.cmdline = "pci=off"
        result = guest.run(SCRIPT, folder=folder)
        proof = hashlib.sha256(read_file(disk, "/root/proof")).hexdigest()
        return Booted(result, fsck(disk), proof)


KERNELS = [
    Kernel("6.1", "bzImage", 1),
    Kernel("6.1", "vmlinux", 2, pci=False),
    Kernel("6.12", "bzImage", 4),
    Kernel("6.12", "vmlinux", 8),
]
each_kernel = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(kernel, id=str(kernel), marks=pytest.mark.boot.with_args(boot_kernel, kernel))
        for kernel in KERNELS
    ],
)


@each_kernel
def test_boots_from_its_root_disk_and_powers_off(kernel: Kernel, boot: Booted) -> None:
    result = boot.result.check()
    assert result.value("release").startswith(f"{kernel.version}.")
    assert result.value("root") == "/dev/vda"
    assert result.value("type") == "ext4"
    assert result.messages == []


@each_kernel
def test_there_is_a_pci_bus_and_the_kernel_has_no_complaint_about_it(
    kernel: Kernel, boot: Booted
) -> None:
    result = boot.result.check()
    found = [result.value(key) for key in ("bridge", "functions", "complaints")]
    if kernel.pci:
        assert found == ["0x8086", "1", "0"]
    else:  # one that does without boots as well, and finds its disk on virtio-mmio
        assert found[:2] == ["", "0"]


@each_kernel
def test_every_cpu_is_online_with_an_id_of_its_own(kernel: Kernel, boot: Booted) -> None:
    result = boot.result.check()
    assert result.value("nproc") == str(kernel.cpus)
    assert result.value("online") == ("0" if kernel.cpus == 1 else f"0-{kernel.cpus - 1}")
    numbers = [str(cpu) for cpu in range(kernel.cpus)]
    assert result.value("processor").split() == numbers
    assert result.value("apicid").split() == numbers
    # One socket of as many cores, without hyperthreads.
    assert result.value("core id").split() == numbers
    assert set(result.value("siblings").split()) == {str(kernel.cpus)}
    assert set(result.value("cpu cores").split()) == {str(kernel.cpus)}


@each_kernel
def test_all_cpus_work_at_the_same_time(kernel: Kernel, boot: Booted) -> None:
    result = boot.result.check()
    expected = hashlib.sha256(bytes(ZEROES)).hexdigest()
    assert result.value("load").split() == [expected] * kernel.cpus
    ticks = result.value("ticks").split()[1 : 1 + kernel.cpus]
    assert all(int(count) > 0 for count in ticks), "each CPU has its own timer interrupts"


@each_kernel
def test_the_root_file_system_is_clean_and_has_what_was_written(
    kernel: Kernel, boot: Booted
) -> None:
    assert boot.fsck == ""
    assert boot.proof == boot.result.check().value("proof")
