"""Linux drives packed rings and four queues at a time, and every byte is where it belongs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from disks import artifacts, blank_disk, fsck, random_disk, root_disk, sha256
from guest import Guest, GuestResult

pytestmark = pytest.mark.usefixtures("linux_guests")

MIB = 1 << 20
QUEUES = 4
SOURCE_BYTES = 8 * MIB
TARGET_BYTES = 160 * MIB
COPY_BYTES = 8 * MIB
JOB_MIB = 32  # for each CPU, behind the copy
INDIRECT_DESC, EVENT_IDX, VERSION_1, RING_PACKED = 28, 29, 32, 34

SCRIPT = f"""\
set -e
for disk in vda vdb vdc; do
    # Each bit is a character, the first one bit 0.
    echo "features-$disk=$(cat /sys/block/$disk/device/features)"
    echo "queues-$disk=$(ls /sys/block/$disk/mq | xargs)"
    echo "cpus-$disk=$(cat /sys/block/$disk/mq/*/cpu_list | sort | xargs)"
done
echo "source=$(sha256sum < /dev/vdb | cut -d' ' -f1)"
echo "direct=$(dd if=/dev/vdb bs=512k iflag=direct status=none | sha256sum | cut -d' ' -f1)"

head -c {COPY_BYTES} /dev/urandom > /dev/shm/random
echo "random=$(sha256sum < /dev/shm/random | cut -d' ' -f1)"
dd if=/dev/shm/random of=/dev/vdc bs=1M oflag=direct status=none

# A job on each CPU, and so on each queue, all at once; each reads back what it wrote.
options="--filename=/dev/vdc --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite
    --bsrange=512-64k --size=8M --verify=crc32c --do_verify=1 --verify_fatal=1 --randseed=7
    --thread --eta=never"
jobs=
for cpu in 0 1 2 3; do
    jobs="$jobs --name=cpu$cpu --offset=$((16 + cpu * {JOB_MIB}))M --cpus_allowed=$cpu $options"
done
if fio $jobs > /run/fio 2>&1; then
    echo "fio=$(grep -o 'err= *[0-9]*' /run/fio | xargs)"
else
    echo fio=failed
    cat /run/fio
fi
"""


@dataclass(frozen=True)
class Run:
    """A run with three disks, and what became of them."""

    result: GuestResult
    fsck: str
    source: str
    copy: str

    def bits(self, disk: str) -> list[bool]:
        return [bit == "1" for bit in self.result.check().value(f"features-{disk}")]


def boot_packed(folder: Path, kernel: str, packed: bool = True) -> Run:
    files = artifacts(kernel, "test")
    source = random_disk(folder / "source.img", SOURCE_BYTES, seed=5)
    target = blank_disk(folder / "target.img", TARGET_BYTES)
    rings = f"queues={QUEUES}" + (",packed" if packed else "")
    with root_disk(folder, "test") as disk:
        result = Guest(
            files.bzimage,
            files.initramfs,
            [f"{disk},{rings}", f"{source},readonly,{rings}", f"{target},{rings}"],
            cpus=QUEUES,
        ).run(SCRIPT, folder=folder)
        clean = fsck(disk)
    return Run(result, clean, sha256(source), sha256(target, size=COPY_BYTES))


packed_boots = pytest.mark.parametrize(
    "version",
    [
        pytest.param(version, marks=pytest.mark.boot.with_args(boot_packed, version))
        for version in ("6.1", "6.12")
    ],
)
split_boot = pytest.mark.boot.with_args(boot_packed, "6.1", False)


@packed_boots
def test_packed_rings_are_negotiated(version: str, boot: Run) -> None:
    for disk in ("vda", "vdb", "vdc"):
        bits = boot.bits(disk)
        assert bits[VERSION_1] and bits[RING_PACKED]
        assert bits[INDIRECT_DESC] and bits[EVENT_IDX]


def _check(run: Run) -> None:
    result = run.result.check()
    for disk in ("vda", "vdb", "vdc"):
        # A hardware queue for each CPU.
        assert result.value(f"queues-{disk}") == "0 1 2 3"
        assert result.value(f"cpus-{disk}") == "0 1 2 3"
    assert result.value("source") == result.value("direct") == run.source
    assert result.value("random") == run.copy
    assert result.value("fio") == " ".join(["err= 0"] * QUEUES)
    assert run.fsck == ""
    assert result.messages == []


@packed_boots
def test_four_packed_queues_carry_every_byte(version: str, boot: Run) -> None:
    _check(boot)


@split_boot
def test_four_split_queues_carry_every_byte(boot: Run) -> None:
    assert not boot.bits("vdc")[RING_PACKED]
    _check(boot)
