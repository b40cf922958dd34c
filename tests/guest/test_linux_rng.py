"""Linux takes random numbers from `--rng`, and from a device that a user wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from disks import artifacts, root_disk
from guest import Guest, GuestResult

pytestmark = pytest.mark.usefixtures("linux_guests")

ROOT = Path(__file__).resolve().parents[2]
BYTES = 4096
PATTERN = b"pyvmm tutorial: "  # 16 bytes, so that each read of the guest's shows all of it

SCRIPT = f"""\
set -e
echo "current=$(cat /sys/devices/virtual/misc/hw_random/rng_current)"
echo "available=$(cat /sys/devices/virtual/misc/hw_random/rng_available)"
dd if=/dev/hwrng of=/run/random bs=64 count={BYTES // 64} iflag=fullblock status=none
echo "bytes=$(stat -c %s /run/random)"
echo "different=$(od -An -v -tx1 -w1 /run/random | sort -u | wc -l)"
echo "start=$(head -c 64 /run/random | od -An -v -tx1 | xargs | tr -d ' ')"
echo "interrupts=$(sed -n 's/^ *[0-9]*: *\\([0-9]*\\).*virtio1$/\\1/p' /proc/interrupts)"
"""


def boot(folder: Path, kernel: str, *options: str) -> GuestResult:
    files = artifacts(kernel)
    with root_disk(folder) as disk:
        guest = Guest(files.bzimage, files.initramfs, [str(disk)], options=options)
        return guest.run(SCRIPT, folder=folder).check()


def boot_rng(folder: Path, kernel: str) -> GuestResult:
    return boot(folder, kernel, "--rng")


def boot_users_device(folder: Path) -> GuestResult:
    source = folder / "source"
    source.write_bytes(PATTERN * (1 << 16))
    device = f"{ROOT}/examples/entropy.py:Entropy,source={source}"
    return boot(folder, "6.1", "--device", device)


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(version, marks=pytest.mark.boot.with_args(boot_rng, version))
        for version in ("6.1", "6.12")
    ],
)
def test_the_guests_hardware_random_numbers_are_ours(kernel, boot):
    assert boot.value("current").startswith("virtio_rng")
    assert boot.value("bytes") == str(BYTES)
    assert int(boot.value("different")) == 256  # missing one has a chance of 3 in 100,000
    assert int(boot.value("interrupts")) > 0


@pytest.mark.boot.with_args(boot_users_device)
def test_a_users_device_feeds_the_guests_hwrng(boot):
    assert boot.value("current").startswith("virtio_rng")
    assert boot.value("bytes") == str(BYTES)
    # The kernel takes some for itself first, in pieces of any length.
    start = bytes.fromhex(boot.value("start"))
    assert start in PATTERN * 6
    assert int(boot.value("different")) == len(set(PATTERN))
