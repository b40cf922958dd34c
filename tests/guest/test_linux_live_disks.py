"""Disks of a running Linux guest: resized while a file system is mounted, and slowed down."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from disks import artifacts, blank_disk, fsck, random_disk, root_disk, sha256
from guest import RING_PACKED, Guest, GuestResult

from pyvmm.kinds.disk.storage import open_backend
from pyvmm.spec.vm import DiskSpec

pytestmark = pytest.mark.usefixtures("linux_guests")

MIB = 1 << 20
BASE, COPY_GROWN, COPY_AT = 8 * MIB, 192 * MIB, 150 * MIB  # past what the first bitmap page holds
BEFORE, GROWN, SHRUNK = 64 * MIB, 160 * MIB, 96 * MIB
IOPS, IOPS_BURST, OPERATIONS = 50, 10, 160
PACKED = "packed,queues=2"
BPS, BPS_BURST, BYTES = 4 * MIB, 1 * MIB, 12 * MIB

SCRIPT = f"""\
set -e
now() {{ # hundredths of a second, by the guest's own clock
    read -r up _ < /proc/uptime
    echo "${{up%.*}}${{up#*.}}"
}}
size() {{ blockdev --getsize64 /dev/$1; }}
wait_for_size() {{
    until [ "$(size $1)" = $2 ]; do sleep 0.1; done
}}

echo "features=$(cat /sys/block/vdb/device/features)"
mkfs.ext4 -q -F /dev/vdb
mkdir -p /run/mnt
mount /dev/vdb /run/mnt
head -c 20000000 /dev/urandom > /run/mnt/file
sum=$(sha256sum < /run/mnt/file)
before=$(df --output=size -k /run/mnt | tail -n 1)
echo "size-before=$(size vdb)"
echo "ready to grow"
wait_for_size vdb {GROWN}
echo "size-grown=$(size vdb)"
for disk in vde vdf; do # copies on write of one base
    wait_for_size $disk {COPY_GROWN}
    old=$(dd if=/dev/$disk bs=1M count={BASE // MIB} status=none | sha256sum | head -c 64)
    echo "old-$disk=$old"
    dd if=/run/mnt/file of=/dev/$disk bs=1M count=1 seek={COPY_AT // MIB} oflag=direct status=none
done
echo "new=$(head -c 1M /run/mnt/file | sha256sum | head -c 64)"
resize2fs /dev/vdb 2> /run/resize
after=$(df --output=size -k /run/mnt | tail -n 1)
echo "room=$before $after"
head -c 90000000 /dev/zero > /run/mnt/more
sync
[ "$(sha256sum < /run/mnt/file)" = "$sum" ] && echo "file=same"
rm /run/mnt/more
umount /run/mnt
e2fsck -f -p /dev/vdb > /run/fsck || cat /run/fsck
resize2fs /dev/vdb {SHRUNK // MIB - 8}M 2>> /run/resize
echo "ready to shrink"
wait_for_size vdb {SHRUNK}
mount /dev/vdb /run/mnt
[ "$(sha256sum < /run/mnt/file)" = "$sum" ] && echo "file=still the same"
umount /run/mnt
if dd if=/dev/zero of=/dev/vdb bs=4k seek={SHRUNK // 4096} count=1 oflag=direct 2> /dev/null; then
    echo past-the-end=written
else
    echo past-the-end=refused
fi

start=$(now)
fio --name=few --filename=/dev/vdc --rw=randread --bs=4k --direct=1 --ioengine=libaio \\
    --iodepth=16 --number_ios={OPERATIONS} --size=32M --randseed=1 --thread > /run/fio
echo "operations-took=$(($(now) - start))"
start=$(now)
dd if=/dev/vdd of=/run/copy bs=256k iflag=direct count={BYTES // (256 << 10)} status=none
echo "bytes-took=$(($(now) - start))"
echo "copy=$(sha256sum < /run/copy | cut -d' ' -f1)"
"""


@dataclass(frozen=True)
class LiveDisks:
    """The guest's view, and the image afterwards."""

    result: GuestResult
    refused: str
    grown_file: int
    shrunk_file: int
    fsck: str
    source: str
    unknown: str
    base: str
    base_after: str
    copy: str


def boot_live(folder: Path, kernel: str = "6.1", rings: str = "") -> LiveDisks:
    """`rings` is an option of each disk, or none for split rings."""
    files = artifacts(kernel, "test")
    rings = f",{rings}" if rings else ""
    data = blank_disk(folder / "data.img", BEFORE)
    base = random_disk(folder / "base.img", BASE, seed=9)
    base_before = sha256(base)
    slow = random_disk(folder / "slow.img", 32 * MIB, seed=8)
    with root_disk(folder, "test") as disk:
        guest = Guest(
            files.bzimage,
            files.initramfs,
            [
                f"{disk},id=system{rings}",
                f"{data},id=data{rings}",
                f"{slow},readonly,id=few,iops={IOPS},iops-burst={IOPS_BURST}{rings}",
                f"{slow},readonly,id=thin,bps={BPS},bps-burst={BPS_BURST}{rings}",
                f"{base},overlay={folder / 'changes'},id=kept{rings}",
                f"{base},snapshot,id=thrown{rings}",
            ],
            cpus=2,
        )
        guest.start(SCRIPT, folder=folder)
        guest.wait_for("ready to grow")
        for copy in ("kept", "thrown"):
            done = guest.pyvmm("disk", "resize", "vm", copy, f"{COPY_GROWN // MIB}M")
            assert done.returncode == 0, done.stderr
        done = guest.pyvmm("disk", "resize", "vm", "data", f"{GROWN // MIB}M")
        assert (done.returncode, done.stdout) == (0, f"data has {GROWN} bytes\n"), done.stderr
        grown = data.stat().st_size
        unknown = guest.pyvmm("disk", "resize", "vm", "nowhere", "1G").stderr
        refused = guest.pyvmm("disk", "resize", "vm", "data", f"{SHRUNK // MIB}M").stderr
        guest.wait_for("ready to shrink")
        done = guest.pyvmm("disk", "resize", "--shrink", "vm", "data", f"{SHRUNK // MIB}M")
        assert done.returncode == 0, done.stderr
        result = guest.wait()
        return LiveDisks(
            result=result,
            refused=refused,
            grown_file=grown,
            shrunk_file=data.stat().st_size,
            fsck=fsck(data),
            source=sha256(slow, size=BYTES),
            unknown=unknown,
            base=base_before,
            base_after=sha256(base),
            copy=read_copy(base, folder / "changes"),
        )


def read_copy(base: Path, changes: Path) -> str:
    """The checksum of what the guest wrote to the overlay, once the monitor has ended."""
    with ExitStack() as closing:
        disk = DiskSpec(str(base), overlay=str(changes))
        backend = open_backend(disk, closing)
        assert backend.size_sectors * 512 == COPY_GROWN
        data = bytearray(MIB)
        backend.readv([memoryview(data)], MIB, COPY_AT)
        return hashlib.sha256(data).hexdigest()


live_disks = pytest.mark.parametrize(
    "rings",
    [
        pytest.param("split", marks=pytest.mark.boot.with_args(boot_live)),
        *(
            pytest.param(
                f"packed-{kernel}", marks=pytest.mark.boot.with_args(boot_live, kernel, PACKED)
            )
            for kernel in ("6.1", "6.12")
        ),
    ],
)


@live_disks
def test_the_rings_are_those_that_were_asked_for(rings: str, boot: LiveDisks) -> None:
    assert boot.result.check().feature("features", RING_PACKED) == ("packed" in rings)


@live_disks
def test_a_mounted_disk_grows(rings: str, boot: LiveDisks) -> None:
    result = boot.result.check()
    assert result.value("size-before") == str(BEFORE)
    assert result.value("size-grown") == str(GROWN)
    assert boot.grown_file == GROWN
    before, after = map(int, result.value("room").split())
    assert after > 2 * before
    assert result.value("file") == "same"


@live_disks
def test_copies_on_write_grow_past_their_base(rings: str, boot: LiveDisks) -> None:
    result = boot.result.check()
    assert result.value("old-vde") == result.value("old-vdf") == boot.base == boot.base_after
    assert result.value("new") == boot.copy


@live_disks
def test_it_shrinks_only_when_that_is_asked_for(rings: str, boot: LiveDisks) -> None:
    boot.result.check()
    assert f"disk data has {GROWN} bytes" in boot.refused and "--shrink" in boot.refused
    assert "file=still the same" in boot.result.console
    assert boot.result.value("past-the-end") == "refused"
    assert boot.shrunk_file == SHRUNK  # and nothing made it grow again
    assert boot.fsck == ""


@live_disks
def test_a_disk_that_is_not_there_is_one_line(rings: str, boot: LiveDisks) -> None:
    assert boot.unknown == (
        "pyvmm: there is no disk 'nowhere'; there are: system, data, few, thin, kept, thrown, "
        "script\n"
    )


@live_disks
def test_limits_hold_by_the_guests_own_clock(rings: str, boot: LiveDisks) -> None:
    """At least the time that the limits make it take; how much longer is the machine's affair."""
    result = boot.result.check()
    operations = int(result.value("operations-took")) / 100
    assert operations >= (OPERATIONS - IOPS_BURST) / IOPS - 0.02
    took = int(result.value("bytes-took")) / 100
    # The last request is paid for after it.
    assert took >= (BYTES - BPS_BURST - (256 << 10)) / BPS - 0.02
    assert result.value("copy") == boot.source
    assert os.path.basename(boot.result.argv[0]).startswith("python")
