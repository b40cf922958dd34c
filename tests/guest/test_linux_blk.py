"""Linux on disks of every kind: what it discards, zeroes, caches and keeps is so on the host."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from disks import artifacts, blank_disk, fsck, random_disk, read_file, root_disk, sha256
from guest import RING_PACKED, Guest, GuestResult

pytestmark = pytest.mark.usefixtures("linux_guests")

MIB = 1 << 20
SQUARES = Path(__file__).parents[2] / "examples" / "squares.py"
BASE_BYTES = 8 * MIB
FILE_MIB = 48

SCRIPT = f"""\
set -e
disk_of() {{ # ID: its device
    for disk in /sys/block/vd*; do
        [ "$(cat $disk/serial)" != "$1" ] || echo /dev/${{disk##*/}}
    done
}}
space=$(disk_of space) cut=$(disk_of cut) direct=$(disk_of direct) ram=$(disk_of ram)
one=$(disk_of one) two=$(disk_of two) kept=$(disk_of kept) squares=$(disk_of squares)
full=$(disk_of full)

echo "features=$(cat /sys/block/${{space##*/}}/device/features)"

mkfs.ext4 -q $space
mount $space /mnt
head -c {FILE_MIB}M /dev/urandom > /mnt/file
sync
read -r _ _ _ _ _ _ sectors _ < /sys/block/${{space##*/}}/stat
echo "written=$((sectors / 2048))"
rm /mnt/file
sync
echo "fstrim=$(fstrim -v /mnt)"
umount /mnt

blkdiscard -o 0 -l 8MiB $cut
blkdiscard -z -o 16MiB -l 8MiB $cut
echo "zeroed=$(dd if=$cut bs=1M skip=16 count=8 iflag=direct status=none | tr -d '\\0' | wc -c)"

cache=/sys/block/${{cut##*/}}/cache_type
queue=/sys/block/${{cut##*/}}/queue/write_cache
echo "cache=$(cat $cache), $(cat $queue)"
echo "write through" > $cache
echo "switched=$(cat $cache), $(cat $queue)"
dd if=/dev/zero of=$cut bs=4k count=16 seek=6144 oflag=direct status=none
echo "write back" > $cache
echo "back=$(cat $cache), $(cat $queue)"

for disk in $one $two $kept; do
    echo "$disk was here" | dd of=$disk bs=512 seek=9 conv=sync,fsync status=none
done
for disk in $one $two; do
    read=$(dd if=$disk bs=512 skip=9 count=1 iflag=direct status=none | head -1)
    echo "${{disk##*/}}-read=$read"
    rest=$(dd if=$disk bs=1M skip=1 status=none | sha256sum | head -c 64)
    echo "${{disk##*/}}-rest=$rest"
done
fstrim -v / > /dev/null
touch /root/a-mark-in-a-snapshot
sync

echo "sectors=$(blockdev --getss $direct)"
fio --name=direct --filename=$direct --direct=1 --ioengine=libaio --size=8M --rw=randwrite \\
    --bsrange=4k-64k --iodepth=16 --verify=crc32c --verify_fatal=1 --randseed=7 --thread \\
    --eta=never > /run/fio 2>&1 || cat /run/fio
echo "fio=$(grep -o 'err= *[0-9]*' /run/fio | xargs)"
head -c 1M /dev/urandom > /run/random
dd if=/run/random of=$direct bs=64k oflag=direct status=none
echo "random=$(sha256sum < /run/random | cut -d' ' -f1)"

mkfs.ext4 -q $ram
mount $ram /mnt
cp /bin/busybox /mnt/
cmp /bin/busybox /mnt/busybox
umount /mnt
echo "ram=$(blockdev --getsize64 $ram)"

echo "square=$(dd if=$squares bs=512 skip=12 count=1 iflag=direct status=none | tr -d '\\0')"

if dd if=/dev/zero of=$full bs=64k count=256 conv=fsync status=none 2> /run/error; then
    echo full=written
else
    echo "full=$(head -n 1 /run/error)"
fi
"""

AGAIN = """\
set -e
echo "root=$(cat /sys/block/vda/serial)"
echo "kept=$(dd if=/dev/vdb bs=512 skip=9 count=1 status=none | head -1)"
echo "rest=$(dd if=/dev/vdb bs=1M skip=1 status=none | sha256sum | cut -d' ' -f1)"
echo "on qcow2" > /root/mark
head -c 8M /dev/urandom > /root/random
sync
sha256sum < /root/random | sed 's/ .*//; s/^/random=/'
rm /root/random
fstrim / || true
"""


@dataclass
class Layers:
    """Two runs, and what became of the disks."""

    first: GuestResult
    again: GuestResult | None = None
    base: str = ""
    base_rest: str = ""
    base_after: str = ""
    root_untouched: bool = False
    space_used: int = 0
    cut: list[bytes] = field(default_factory=list)
    cut_freed: int = 0
    direct: str = ""
    scratch_left: list[str] = field(default_factory=list)
    qcow2_check: str = ""
    qcow2_mark: bytes = b""
    qcow2_fsck: str = ""


def small_tmpfs(folder: Path, size: str) -> Path:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs takes root")
    return folder


def boot_layers(folder: Path, kernel: str, rings: str = "") -> Layers:
    """`rings` is an option of each disk, or none for split rings."""
    rings = f",{rings}" if rings else ""
    files = artifacts(kernel, "test")
    base = random_disk(folder / "base.img", BASE_BYTES, seed=5)
    space = blank_disk(folder / "space.img", 256 * MIB)
    cut = random_disk(folder / "cut.img", 32 * MIB, seed=6)
    direct = blank_disk(folder / "direct.img", 32 * MIB)
    kept = folder / "kept"
    cut_before = cut.read_bytes()
    os.sync()
    cut_blocks = cut.stat().st_blocks
    base_before = sha256(base)
    full = small_tmpfs(folder / "full", "2m")
    blank_disk(full / "full.img", 64 * MIB)
    try:
        with root_disk(folder, "test") as root:
            os.sync()  # or blocks are still being allocated for the copy
            root_stat = root.stat()
            guest = Guest(
                files.bzimage,
                files.initramfs,
                [
                    f"{root},snapshot,id=root{rings}",
                    f"{space},id=space{rings}",
                    f"{cut},id=cut{rings}",
                    f"{base},snapshot,id=one{rings}",
                    f"{base},snapshot,id=two{rings}",
                    f"{base},overlay={kept},id=kept{rings}",
                    f"{direct},direct,block-size=4096,id=direct{rings}",
                    f"ram:64M,id=ram{rings}",
                    f"{SQUARES}:Squares,sectors=100,id=squares{rings}",
                    f"{full}/full.img,id=full{rings}",
                ],
            )
            found = Layers(guest.run(SCRIPT, folder=folder), base=base_before)
            after = root.stat()
            found.root_untouched = (after.st_mtime_ns, after.st_blocks) == (
                root_stat.st_mtime_ns,
                root_stat.st_blocks,
            )
            os.sync()
            found.space_used = space.stat().st_blocks * 512
            found.cut_freed = (cut_blocks - cut.stat().st_blocks) * 512
            found.cut = [cut_before, cut.read_bytes()]
            found.direct = sha256(direct, size=MIB)
            found.base_rest = sha256(base, start=MIB)
            if kernel == "6.1" and not rings:
                run_again(found, files.bzimage, files.initramfs, folder, root)
            found.base_after = sha256(base)
    finally:
        subprocess.run(["umount", str(full)], check=True)
    return found


def run_again(found: Layers, kernel: str, initrd: str, folder: Path, root: Path) -> None:
    """A second guest: its root disk is a qcow2 image, its second one what the first guest kept."""
    if shutil.which("qemu-img") is None:
        return
    image = folder / "root.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", root, image], check=True)
    disks = [f"{image},id=qcow2-root", f"{folder / 'base.img'},overlay={folder / 'kept'}"]
    found.again = Guest(kernel, initrd, disks).run(AGAIN, folder=folder)
    done = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True)
    found.qcow2_check = done.stdout
    raw = folder / "root.check"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    found.qcow2_mark = read_file(raw, "/root/mark")
    found.qcow2_fsck = fsck(raw)
    raw.unlink()
    image.unlink()


kernels = [
    pytest.param("6.1", marks=pytest.mark.boot.with_args(boot_layers, "6.1")),
    pytest.param("6.12", marks=pytest.mark.boot.with_args(boot_layers, "6.12")),
    pytest.param("6.1-packed", marks=pytest.mark.boot.with_args(boot_layers, "6.1", "packed")),
    pytest.param("6.12-packed", marks=pytest.mark.boot.with_args(boot_layers, "6.12", "packed")),
]
each_kernel = pytest.mark.parametrize("kernel", kernels)
first_kernel = pytest.mark.boot.with_args(boot_layers, "6.1")


@each_kernel
def test_the_rings_are_those_that_were_asked_for(kernel: str, boot: Layers) -> None:
    assert boot.first.check().feature("features", RING_PACKED) == ("packed" in kernel)


@each_kernel
def test_fstrim_gives_the_space_back(kernel: str, boot: Layers) -> None:
    result = boot.first.check()
    assert int(result.value("written")) >= FILE_MIB
    assert "trimmed" in result.value("fstrim")
    assert boot.space_used < 24 * MIB  # of which the file system's own structures are a part


@each_kernel
def test_blkdiscard_and_blkdiscard_z(kernel: str, boot: Layers) -> None:
    assert boot.first.check().value("zeroed") == "0"
    before, after = boot.cut
    assert after[16 * MIB : 24 * MIB] == bytes(8 * MIB)
    assert after[8 * MIB : 16 * MIB] == before[8 * MIB : 16 * MIB]
    assert after[25 * MIB :] == before[25 * MIB :]
    assert boot.cut_freed >= 8 * MIB


@each_kernel
def test_the_write_cache_is_switched(kernel: str, boot: Layers) -> None:
    result = boot.first.check()
    assert result.value("cache") == "write back, write back"
    assert result.value("switched") == "write through, write through"
    assert result.value("back") == "write back, write back"


@each_kernel
def test_snapshots_of_one_base_know_nothing_of_each_other(kernel: str, boot: Layers) -> None:
    result = boot.first.check()
    for disk in ("vdd", "vde"):
        assert result.value(f"{disk}-read") == f"/dev/{disk} was here"
        assert result.value(f"{disk}-rest") == boot.base_rest


@each_kernel
def test_the_bases_stay_as_they_are(kernel: str, boot: Layers) -> None:
    boot.first.check()
    assert boot.base_after == boot.base
    assert boot.root_untouched


@each_kernel
def test_direct_io(kernel: str, boot: Layers) -> None:
    result = boot.first.check()
    assert result.value("sectors") == "4096"
    assert result.value("fio") == "err= 0"
    assert result.value("random") == boot.direct


@each_kernel
def test_a_disk_in_ram_and_one_in_python(kernel: str, boot: Layers) -> None:
    result = boot.first.check()
    assert result.value("ram") == str(64 * MIB)
    assert result.value("square") == "12 x 12 = 144"


@each_kernel
def test_a_full_host_is_an_io_error_for_the_guest_and_a_line_for_the_user(
    kernel: str, boot: Layers
) -> None:
    result = boot.first.check()
    assert "Input/output error" in result.value("full")
    # The write itself, or in an emulated host, which has a page cache of its own, the flush.
    lines = [line for line in result.messages if "disk full: " in line]
    assert lines and all("answered IOERR" in line for line in lines)


def second(boot: Layers) -> GuestResult:
    if boot.again is None:
        pytest.skip("needs qemu-img (package qemu-utils)")
    return boot.again.check()


@first_kernel
def test_an_overlay_is_kept_for_the_next_boot(boot: Layers) -> None:
    result = second(boot)
    assert result.value("kept") == "/dev/vdf was here"
    assert result.value("rest") == boot.base_rest


@first_kernel
def test_a_qcow2_root_disk(boot: Layers) -> None:
    assert second(boot).value("root") == "qcow2-root"
    assert "No errors were found" in boot.qcow2_check
    assert boot.qcow2_mark == b"on qcow2\n"
    assert boot.qcow2_fsck == ""


# --- on-error=stop --------------------------------------------------------------------------------


def boot_until_full(folder: Path) -> GuestResult:
    files = artifacts("6.1", "test")
    full = small_tmpfs(folder / "full", "2m")
    try:
        disk = blank_disk(full / "full.img", 64 * MIB)
        with root_disk(folder, "test") as root:
            disks = [f"{root},snapshot", f"{disk},on-error=stop,id=scratch"]
            script = (
                "echo before=here\n"
                "dd if=/dev/zero of=/dev/vdb bs=64k count=256 conv=fsync || true\n"
                "echo after=here\n"
            )
            return Guest(files.bzimage, files.initramfs, disks).run(script, folder=folder)
    finally:
        subprocess.run(["umount", str(full)], check=True)


@pytest.mark.boot.with_args(boot_until_full)
def test_on_error_stop_ends_the_vm_before_the_guest_sees_an_error(boot: GuestResult) -> None:
    assert boot.code == 15, boot.ending()
    assert boot.value("before") == "here"
    assert "after=here" not in boot.console and "I/O error" not in boot.console
    [line] = [line for line in boot.messages if "on-error=stop" in line]
    assert "disk scratch: write of " in line or "disk scratch: fdatasync" in line
