"""A guest's disks and their files are the same, byte for byte."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from disks import artifacts, blank_disk, fsck, random_disk, root_disk, sha256
from guest import RING_PACKED, Guest, GuestResult

pytestmark = pytest.mark.usefixtures("linux_guests")

MIB = 1 << 20
SOURCE_BYTES = 8 * MIB + 512
ODD_TAIL = 100
TARGET_BYTES = 192 * MIB
COPIES_AT = (0, 16 * MIB)  # written with O_DIRECT, and through the guest's page cache
COPY_BYTES = 8 * MIB
# fio's jobs: where they write, and how. The first is the one whose interrupts are counted: it
# submits 32 requests with one kick, however quick the two sides are.
JOBS = {
    "small": "--offset=32M --size=8M --rw=randwrite --bs=4k --iodepth=32"
    " --iodepth_batch_submit=32 --iodepth_batch_complete_min=32",
    "mixed": "--offset=64M --size=32M --rw=randwrite --bsrange=512-256k --iodepth=32",
    "large": "--offset=96M --size=64M --rw=write --bs=4M --iodepth=4",
}

SCRIPT = f"""\
set -e
# `set -e` leaves out pipes and what `if` asks about: a failed check says so itself.
for disk in vda vdb vdc; do
    echo "$disk=$(cat /sys/block/$disk/serial) $(blockdev --getsize64 /dev/$disk)" \\
        "$(blockdev --getss /dev/$disk) $(blockdev --getro /dev/$disk)"
done
echo "label=$(blkid -o value -s LABEL /dev/vda)"

echo "features=$(cat /sys/block/vdc/device/features)"

echo "source=$(sha256sum < /dev/vdb | cut -d' ' -f1)"
echo "direct=$(dd if=/dev/vdb bs=512k iflag=direct status=none | sha256sum | cut -d' ' -f1)"
if dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct 2> /run/error; then
    echo readonly=written
else
    echo "readonly=$(head -n 1 /run/error)"
fi
blockdev --setrw /dev/vdb 2> /dev/null || true
dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct 2> /dev/null || true

head -c {COPY_BYTES} /dev/urandom > /dev/shm/random
echo "random=$(sha256sum < /dev/shm/random | cut -d' ' -f1)"
dd if=/dev/shm/random of=/dev/vdc bs=1M oflag=direct status=none
dd if=/dev/shm/random of=/dev/vdc bs=4k seek={COPIES_AT[1] // 4096} conv=fsync status=none

interrupts() {{ # of virtio2, on all CPUs
    sed -n 's/^ *[0-9]*:\\(.*\\)IO-APIC.* virtio2$/\\1/p' /proc/interrupts | xargs | tr ' ' +
}}
requests() {{ # reads and writes of vdc that are done
    read -r reads _ _ _ writes _ < /sys/block/vdc/stat
    echo $((reads + writes))
}}
check() {{ # NAME, OPTIONS: fio writes checksums everywhere, and reads it all again
    name=$1
    shift
    if fio --name=$name --filename=/dev/vdc --direct=1 --ioengine=libaio "$@" --verify=crc32c \\
        --do_verify=1 --verify_fatal=1 --randseed=7 --thread --eta=never > /run/$name 2>&1; then
        echo "fio-$name=$(grep -o 'err= *[0-9]*' /run/$name | xargs)"
    else
        echo "fio-$name=failed"
        cat /run/$name
    fi
}}
before_requests=$(requests) before_interrupts=$(($(interrupts)))
check small {JOBS["small"]}
echo "requests=$(($(requests) - before_requests))"
echo "interrupts=$(($(interrupts) - before_interrupts))"
check mixed {JOBS["mixed"]}
check large {JOBS["large"]}
"""


@dataclass(frozen=True)
class Disks:
    """A run with three disks, and what became of them."""

    result: GuestResult
    fsck: str
    source_before: str
    source_after: str
    source_sectors: str
    copies: list[str]
    trace: str


def boot_disks(folder: Path, kernel: str, rings: str = "") -> Disks:
    """`rings` is an option of each disk, or none for split rings."""
    files = artifacts(kernel, "test")
    rings = f",{rings}" if rings else ""
    source = random_disk(folder / "source.img", SOURCE_BYTES + ODD_TAIL, seed=3)
    target = blank_disk(folder / "target.img", TARGET_BYTES)
    trace = folder / "trace"
    before = sha256(source)
    with root_disk(folder, "test") as disk:
        result = Guest(
            files.bzimage,
            files.initramfs,
            [
                f"{disk},id=system{rings}",
                f"{source},readonly,id=source{rings}",
                f"{target},id=twenty-bytes-are-max{rings}",
            ],
            cpus=2,
            options=["--trace", "registers", "--trace-file", str(trace)],
        ).run(SCRIPT, folder=folder)
        clean = fsck(disk)
    return Disks(
        result=result,
        fsck=clean,
        source_before=before,
        source_after=sha256(source),
        source_sectors=sha256(source, size=SOURCE_BYTES),
        copies=[sha256(target, start=start, size=COPY_BYTES) for start in COPIES_AT],
        trace=trace.read_text(),
    )


three_disks = pytest.mark.parametrize(
    "rings",
    [
        pytest.param("split", marks=pytest.mark.boot.with_args(boot_disks, "6.1")),
        pytest.param("packed", marks=pytest.mark.boot.with_args(boot_disks, "6.12", "packed")),
    ],
)


@three_disks
def test_the_rings_are_those_that_were_asked_for(rings: str, boot: Disks) -> None:
    assert boot.result.check().feature("features", RING_PACKED) == ("packed" in rings)


@three_disks
def test_ids_sizes_and_block_sizes(rings: str, boot: Disks) -> None:
    result = boot.result.check()
    assert result.value("vda").split()[0] == "system"
    # An odd tail stays hidden, and the monitor says so.
    assert result.value("vdb") == f"source {SOURCE_BYTES} 512 1"
    assert result.value("vdc") == f"twenty-bytes-are-max {TARGET_BYTES} 512 0"
    assert result.value("label") == "pyvmm-root"
    [hint] = result.messages
    assert f"last {ODD_TAIL} bytes" in hint


@three_disks
def test_the_guest_reads_what_is_in_the_file(rings: str, boot: Disks) -> None:
    result = boot.result.check()
    assert result.value("source") == boot.source_sectors
    assert result.value("direct") == boot.source_sectors


@three_disks
def test_a_read_only_disk_cannot_be_written(rings: str, boot: Disks) -> None:
    assert re.search("not permitted|Read-only", boot.result.check().value("readonly"))
    assert boot.source_after == boot.source_before


@three_disks
def test_the_file_has_what_the_guest_wrote(rings: str, boot: Disks) -> None:
    assert boot.copies == [boot.result.check().value("random")] * len(COPIES_AT)
    assert boot.fsck == ""


@three_disks
@pytest.mark.parametrize("job", JOBS)
def test_fio_reads_back_what_it_wrote(job: str, rings: str, boot: Disks) -> None:
    assert boot.result.check().value(f"fio-{job}") == "err= 0"


@three_disks
def test_one_interrupt_ends_a_batch_of_requests(rings: str, boot: Disks) -> None:
    result = boot.result.check()
    requests, interrupts = int(result.value("requests")), int(result.value("interrupts"))
    # Each 4 KiB block was written once and read once; the kernel joins some that are neighbours.
    assert requests > 8 * MIB // 4096
    # One at a time would have been as many interrupts as requests.
    assert interrupts <= requests // 2, f"{interrupts} interrupts for {requests} requests"


@three_disks
def test_no_kick_leaves_the_kernel(rings: str, boot: Disks) -> None:
    boot.result.check()
    assert "read InterruptStatus" in boot.trace, "there was I/O, and the trace is complete"
    assert "QueueNotify" not in boot.trace
