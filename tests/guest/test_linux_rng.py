"""Linux takes random numbers from `rng=True`, and from a device that a user wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from vms import debian, script

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


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_the_guests_hardware_random_numbers_are_ours(kernel, microvm_factory):
    said = script(microvm_factory(**debian(kernel), rng=True), SCRIPT)
    assert said["current"].startswith("virtio_rng")
    assert said["bytes"] == str(BYTES)
    assert int(said["different"]) == 256  # missing one has a chance of 3 in 100,000
    assert int(said["interrupts"]) > 0


def test_a_users_device_feeds_the_guests_hwrng(microvm_factory, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(PATTERN * (1 << 16))
    device = f"{ROOT}/examples/entropy.py:Entropy,source={source}"
    said = script(microvm_factory(**debian(), devices=device), SCRIPT)
    assert said["current"].startswith("virtio_rng")
    assert said["bytes"] == str(BYTES)
    # The kernel takes some for itself first, in pieces of any length.
    start = bytes.fromhex(said["start"])
    assert start in PATTERN * 6
    assert int(said["different"]) == len(set(PATTERN))
