"""Disks that hold a whole system: the partition that is the root, and the kernel in it."""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
from contextlib import ExitStack
from pathlib import Path

import boot_images
import pytest
from partition_tables import (
    MIB,
    ROOT_ARM64,
    ROOT_X86_64,
    needs_tools,
    partitioned,
    put_bytes,
    put_file_system,
    xfs_of,
)

from pyvmm.boot import boot_entry, file_system, partitions
from pyvmm.boot.btrfs import Btrfs
from pyvmm.boot.fat import Fat
from pyvmm.errors import ConfigError
from pyvmm.host import log
from pyvmm.images import fresh_initramfs
from pyvmm.kinds.disk.storage import open_backend
from pyvmm.monitor import kernel_choice
from pyvmm.monitor.kernel_choice import _for_disks_root, specify
from pyvmm.monitor.whole_disk import _extract, choose_root, with_root, words_before
from pyvmm.spec.vm import DiskSpec, VmSpec
from pyvmm.virtio.blk.device import BlockDevice

pytestmark = needs_tools
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
TWO = "label: gpt\nstart=2048, size=20480, type={0}\nstart=24576, size=20480, type={1}, name={2}\n"


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines: list[str] = []
    monkeypatch.setattr(log, "to_stderr", lambda line: lines.append(str(line)))
    return lines


def root_of(disk: Path, cmdline: str = "") -> str:
    """The words that `with_root` puts on the command line."""
    spec = VmSpec(kernel="/k", disks=(DiskSpec(str(disk)),), cmdline=cmdline)
    with ExitStack() as closing:
        backend = open_backend(DiskSpec(str(disk), read_only=True), closing)
        return with_root(spec, (BlockDevice(backend, name="disk0"),)).cmdline


def two(tmp_path: Path, first: str = LINUX, second: str = LINUX, name: str = "data") -> Path:
    disk = partitioned(tmp_path / "disk.img", TWO.format(first, second, name))
    put_file_system(disk, 1 * MIB, 10 * MIB, "ext4", "-L", "one")
    put_file_system(disk, 12 * MIB, 10 * MIB, "ext4", "-L", "two")
    return disk


@pytest.mark.parametrize("of_root", [ROOT_X86_64, ROOT_ARM64])
def test_the_type_says_which(tmp_path: Path, said: list[str], of_root: str) -> None:
    disk = two(tmp_path, second=of_root)
    assert root_of(disk) == "root=/dev/vda2"
    assert said == [
        f"the root is partition 2 of {disk} (ext4, 10 MiB), by its type; root= in --cmdline names "
        "another"
    ]
    assert root_of(disk, "root=/dev/vda1 quiet") == "root=/dev/vda1 quiet"
    assert root_of(disk, "quiet") == "root=/dev/vda2 quiet"


def test_the_label_says_which(tmp_path: Path, said: list[str]) -> None:
    assert root_of(two(tmp_path, name="root")) == "root=/dev/vda2"
    assert "by its label" in said[0]


def test_fstab_says_which(tmp_path: Path, said: list[str]) -> None:
    disk = partitioned(tmp_path / "disk.img", TWO.format(LINUX, LINUX, "data"))
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/fstab").write_text(
        "# comment\nLABEL=boot /boot ext4\nLABEL=sys / ext4 ro 0 1\n"
    )
    tree = tmp_path / "tree"
    tree.mkdir()
    shutil.move(tmp_path / "etc", tree / "etc")
    put_file_system(disk, 1 * MIB, 10 * MIB, "ext4", "-L", "boot")
    put_file_system(disk, 12 * MIB, 10 * MIB, "ext4", "-L", "sys", "-d", str(tree))
    assert root_of(disk) == "root=/dev/vda2"
    assert "by /etc/fstab" in said[0]


@pytest.mark.parametrize("large", ["directory", "text"])
def test_many_partitions_cost_no_more_than_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: str
) -> None:
    """The search for /etc/fstab and for a kernel's configuration is bounded for the whole disk."""
    most = 128 << 10
    monkeypatch.setattr(file_system, "_MOST_LOOKED_AT", most)
    tree = tmp_path / "tree"
    tree.mkdir()
    if large == "directory":
        (tree / "real").mkdir()
        (tree / "etc").symlink_to("real/../" * 120)  # the root is searched each time
        (tree / "boot").symlink_to("real/../" * 120)
    else:
        (tree / "etc").mkdir()
        (tree / "etc/fstab").write_text("#" * (63 << 10))
        (tree / "loader/entries").mkdir(parents=True)
        for number in range(4):
            (tree / f"loader/entries/{number}.conf").write_text("#" * (63 << 10))
    script = "label: gpt\n" + "size=20480, type=linux\n" * 6
    disk = partitioned(tmp_path / "disk.img", script)
    data = disk.read_bytes()
    table = partitions.read_disk(lambda at, size: data[at : at + size], len(data))
    assert table is not None and len(table.partitions) == 6
    for one in table.partitions:
        put_file_system(disk, one.start, one.size, "ext4", "-b", "4096", "-d", str(tree))
    data = disk.read_bytes()
    taken = 0

    def read(at: int, size: int) -> bytes:
        nonlocal taken
        taken += size
        return data[at : at + size]

    table = partitions.read_disk(read, len(data))
    assert table is not None
    taken = 0
    assert choose_root(table, read, "disk.img") == (None, "by /etc/fstab")
    assert taken < 2 * most  # and the superblocks
    taken = 0
    with pytest.raises(ConfigError, match=r"no kernel in /boot|too large to be searched"):
        _extract("disk.img", read, len(data), 512)
    assert taken < 3 * most  # and the table


def test_nobody_says_which_of_two(tmp_path: Path, said: list[str]) -> None:
    assert root_of(two(tmp_path)) == ""  # the guest's diagnosis has advice
    assert said == []


def test_another_file_system_is_named_to_the_guest(tmp_path: Path) -> None:
    script = "label: dos\nstart=2048, type=83\n"
    disk = partitioned(tmp_path / "disk.img", script, size=400 * MIB)
    put_file_system(disk, 1 * MIB, 399 * MIB, "xfs")
    assert root_of(disk) == "root=/dev/vda1 rootfstype=xfs"
    assert root_of(disk, "rootfstype=auto") == "root=/dev/vda1 rootfstype=auto"


def test_a_disk_without_a_table_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    assert root_of(tmp_path / "disk") == ""


def test_the_second_copy_of_a_damaged_table_counts(tmp_path: Path, said: list[str]) -> None:
    disk = two(tmp_path, second=ROOT_X86_64)
    with open(disk, "r+b", buffering=0) as file:
        file.seek(512 + 16)  # the header's sum
        file.write(b"\0\0\0\0")
        assert root_of(disk) == "root=/dev/vda2 gpt"
        assert "by the table's second copy, as the first is damaged" in said[0]
        file.seek(disk.stat().st_size - 512 + 16)
        file.write(b"\0\0\0\0")
    with pytest.raises(ConfigError, match=r"a GPT whose both copies are damaged .*; repair it"):
        root_of(disk)


def test_a_root_that_another_partition_lies_on(tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk.img", "label: dos\nstart=2048, size=20480, type=83\n")
    put_file_system(disk, 1 * MIB, 10 * MIB, "ext4")
    with open(disk, "r+b") as file:
        file.seek(446 + 16)
        file.write(
            b"\0\0\0\0\x83\0\0\0" + (4096).to_bytes(4, "little") + (999).to_bytes(4, "little")
        )
    with pytest.raises(ConfigError, match=r"partitions 1 and 2 of .* overlap.*root=/dev/vdaN"):
        root_of(disk)
    assert root_of(disk, "root=/dev/vda1") == "root=/dev/vda1"


# --- the kernel in it -----------------------------------------------------------------------------

GRUB = "menuentry x {\nlinux /boot/vmlinuz-6.1 root=LABEL=sys ro\ninitrd /boot/initrd.img-6.1\n}\n"


def whole(tmp_path: Path, grub: str = GRUB) -> Path:
    tree = tmp_path / "tree"
    (tree / "boot/grub").mkdir(parents=True)
    (tree / "boot/vmlinuz-6.1").write_bytes(boot_images.bzimage())
    (tree / "boot/initrd.img-6.1").write_bytes(b"the initrd")
    (tree / "boot/grub/grub.cfg").write_text(grub)
    script = f"label: gpt\nstart=2048, size=2048, type=uefi\nstart=4096, type={ROOT_X86_64}\n"
    disk = partitioned(tmp_path / "disk.img", script)
    put_file_system(disk, 2 * MIB, 61 * MIB, "ext4", "-L", "sys", "-d", str(tree))
    return disk


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_the_disks_own_kernel(tmp_path: Path, said: list[str], form: str) -> None:
    disk = whole(tmp_path)
    if form == "qcow2":
        if shutil.which("qemu-img") is None:
            pytest.skip("needs qemu-img (qemu-utils)")
        image = tmp_path / "disk.qcow2"
        command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(disk), str(image)]
        subprocess.run(command, check=True)
        disk = image
    spec, image_name = specify({"kernel": "disk", "disks": [str(disk)], "cmdline": "quiet"})
    assert Path(spec.kernel).read_bytes() == boot_images.bzimage()
    assert spec.initrd is not None and Path(spec.initrd).read_bytes() == b"the initrd"
    assert spec.cmdline == "root=LABEL=sys ro quiet"
    assert image_name is None
    assert said == [
        f"booting vmlinuz-6.1 by /boot/grub/grub.cfg in partition 2 of {disk}: root=LABEL=sys ro",
    ]


@pytest.mark.parametrize(
    ("root", "here"),
    [("sda2", "vda2"), ("nvme0n1p2", "vda2"), ("loop0p2", "vda2"), ("sda7", "sda7"), ("sda", "sda"),
     ("mapper/a-b", "mapper/a-b")],
)  # fmt: skip
def test_a_root_that_is_named_as_on_another_bus(
    tmp_path: Path, said: list[str], root: str, here: str
) -> None:
    disk = whole(tmp_path, GRUB.replace("LABEL=sys", f"/dev/{root}"))
    spec, _ = specify({"kernel": "disk", "disks": [str(disk)]})
    assert spec.cmdline == f"root=/dev/{here} ro"
    told = [f"root=/dev/{root} of the disk's command line is root=/dev/{here} here"]
    assert said[:-1] == (told if root != here else [])


def test_a_disk_without_a_kernel(tmp_path: Path) -> None:
    disk = two(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"no kernel in its file systems \(ext4, xfs, btrfs and vfat are read\); name a",
    ):
        specify({"kernel": "disk", "disks": [str(disk)]})
    (tmp_path / "empty.img").write_bytes(bytes(MIB))
    with pytest.raises(ConfigError, match="has no ext4, xfs, btrfs or vfat; name a kernel"):
        specify({"kernel": "disk", "disks": [str(tmp_path / "empty.img")]})
    with pytest.raises(
        ConfigError, match=re.escape("there is no disk that the kernel could be in")
    ):
        specify({"kernel": "disk"})


def test_a_file_system_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """The root is encrypted, and what is read of the rest has no kernel."""
    script = f"label: gpt\nstart=2048, size=81920, type=uefi\nstart=83968, type={ROOT_X86_64}\n"
    disk = partitioned(tmp_path / "disk.img", script, size=400 * MIB)
    with open(disk, "r+b") as file:
        file.seek(41 * MIB)
        file.write(b"LUKS\xba\xbe")
    with pytest.raises(ConfigError, match="has no ext4, xfs, btrfs or vfat, and LUKS cannot be re"):
        specify({"kernel": "disk", "disks": [str(disk)]})
    put_file_system(disk, 1 * MIB, 40 * MIB, "vfat", "-F", "32", "-s", "1")
    with pytest.raises(ConfigError, match=r"no kernel in its .*read\), and LUKS cannot be read; "):
        specify({"kernel": "disk", "disks": [str(disk)]})


def test_a_file_system_that_is_refused_is_named(tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk.img", f"label: gpt\ntype={ROOT_X86_64}\n", size=400 * MIB)
    put_file_system(disk, 1 * MIB, 320 * MIB, "xfs")
    with open(disk, "r+b") as file:
        file.seek(1 * MIB + 219)
        file.write(b"\x10")  # it needs repair
    with pytest.raises(ConfigError, match=r"partition 1 of .* is damaged: it says so itself; name"):
        specify({"kernel": "disk", "disks": [str(disk)]})


@pytest.mark.parametrize("magic", [b"LUKS\xba\xbe", b"", b"LVM"])
def test_a_boot_alone_is_no_root(tmp_path: Path, magic: bytes) -> None:
    """As installers lay disks out whose root is a logical volume."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "vmlinuz-6.1").write_bytes(b"")
    disk = partitioned(tmp_path / "disk.img", TWO.format(LINUX, LINUX, "data"))
    put_file_system(disk, 1 * MIB, 10 * MIB, "ext4", "-d", str(tree))
    with open(disk, "r+b") as file:
        file.seek(12 * MIB)
        file.write(bytes(0x218) + b"LVM2 001" if magic == b"LVM" else magic)
    if not magic:
        assert root_of(disk) == ""  # the guest's diagnosis has advice
        return
    kind = "LVM" if magic == b"LVM" else "LUKS"
    with pytest.raises(
        ConfigError, match=rf"the root is in partition 2, in {kind}, .*--kernel disk"
    ):
        root_of(disk)
    assert root_of(disk, "root=/dev/vda1") == "root=/dev/vda1"
    (tree / "etc").mkdir()
    put_file_system(disk, 1 * MIB, 10 * MIB, "ext4", "-d", str(tree))
    assert root_of(disk) == "root=/dev/vda1"


def in_root(tmp_path: Path, kind: str) -> Path:
    """A disk with a kernel in the xfs or btrfs that is its root; with btrfs, in a subvolume."""
    tree = tmp_path / "tree"
    (tree / "loader/entries").mkdir(parents=True)
    (tree / "vmlinuz-6.1").write_bytes(boot_images.bzimage())
    (tree / "initrd.img-6.1").write_bytes(b"the initrd" * 9000)
    place = "" if kind == "xfs" else "/root"
    (tree / "loader/entries/a.conf").write_text(
        f"title Debian\noptions root=LABEL=sys\nlinux {place}/vmlinuz-6.1\n"
        f"initrd {place}/initrd.img-6.1\n"
    )
    (tree / "root").mkdir()
    disk = partitioned(tmp_path / "disk.img", f"label: gpt\ntype={ROOT_X86_64}\n", size=400 * MIB)
    part = tmp_path / "part"
    if kind == "xfs":
        xfs_of(tree, part)
        put_bytes(disk, MIB, part)
    else:
        put_file_system(disk, MIB, 390 * MIB, "btrfs", "-r", str(tree))
        as_subvolume(disk, MIB, 390 * MIB)
    return disk


def as_subvolume(disk: Path, start: int, size: int) -> None:
    """Make the directory "root" of a btrfs a subvolume, by hand: it is the whole file system once
    more. For its tree there is an item of one that is always there (DATA_RELOC_TREE)."""
    reloc = (1 << 64) - 9
    with open(disk, "r+b") as file:
        file.seek(start)
        data = bytearray(file.read(size))
        places: dict[int, int] = {}

        def read(at: int, length: int) -> bytes:
            places[at] = length
            return bytes(data[at : at + length])

        system = Btrfs(read, size, "it")
        top = system._top.tree
        item = system._item(system._roots, reloc, 132)
        inside = system._entries(system._top)[b"root"]
        entry = struct.pack("<QBQ", *inside)
        for at, length in places.items():
            found = data.find(item, at, at + length)
            if found >= 0:
                struct.pack_into("<Q", data, found + 176, top.address)
                data[found + 238] = top.level
            found = data.find(entry, at, at + length)
            while found >= 0:
                data[found : found + 17] = struct.pack("<QBQ", reloc, 132, (1 << 64) - 1)
                found = data.find(entry, found + 17, at + length)
        file.seek(start)
        file.write(data)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_kernel_in_an_xfs_or_btrfs_root(tmp_path: Path, said: list[str], kind: str) -> None:
    disk = in_root(tmp_path, kind)
    spec, _ = specify({"kernel": "disk", "disks": [str(disk)]})
    assert Path(spec.kernel).read_bytes() == boot_images.bzimage()
    assert spec.initrd and Path(spec.initrd).read_bytes() == b"the initrd" * 9000
    assert spec.cmdline == "root=LABEL=sys"
    assert "/loader/entries/a.conf in partition 1" in said[0]


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_the_initramfs_is_made_for_the_root(tmp_path: Path, kind: str) -> None:
    """With what the kernel must be told, which the user may say otherwise."""
    disk = in_root(tmp_path, kind)
    flags = [] if kind == "xfs" else ["rootflags=subvol=root"]
    assert words_before([str(disk)], "quiet")[0] == [f"rootfstype={kind}", *flags]
    assert words_before([str(disk)], "rootflags=ro")[0] == [f"rootfstype={kind}"]
    assert words_before([f"{disk},snapshot"], "")[0] == [f"rootfstype={kind}", *flags]
    layered = f"{disk},overlay={tmp_path}/layer"
    assert words_before([layered], "")[0] == [f"rootfstype={kind}", *flags]
    assert not (tmp_path / "layer").exists()  # looking makes nothing
    assert words_before([str(disk)], "root=/dev/vda1")[0] == [f"rootfstype={kind}", *flags]
    assert words_before([str(disk)], "root=/dev/vda2")[0] == []
    assert words_before([str(disk)], "rootfstype=auto")[0] == []
    assert root_of(disk) == " ".join(["root=/dev/vda1", f"rootfstype={kind}", *flags])


@pytest.mark.parametrize(("cmdline", "kernel"), [("", None), ("rootfstype=ext3 quiet", None),
    ("rootfstype=f2fs", "debian:6.1"), ("root=/dev/vda1", "debian:6.1")])  # fmt: skip
def test_a_root_without_a_driver_takes_the_kernel_with_its_modules(
    tmp_path: Path, cmdline: str, kernel: str | None
) -> None:
    with open(tmp_path / "bare", "wb") as file:
        file.truncate(320 * MIB)
    if kernel is None:
        put_file_system(tmp_path / "bare", 0, 320 * MIB, "ext4")
        disk = tmp_path / "bare"
    else:
        disk = in_root(tmp_path, "xfs")
    options = {"disks": [str(disk)], "cmdline": cmdline}
    found, _ = _for_disks_root(options)
    assert found.get("kernel") == kernel
    assert ("rootfstype=xfs" in found["cmdline"]) == (cmdline == "root=/dev/vda1")
    assert _for_disks_root({**options, "initrd": "/mine"})[0] == {**options, "initrd": "/mine"}
    assert _for_disks_root({**options, "kernel": "/file"})[0] == {**options, "kernel": "/file"}


def test_an_efi_partition_takes_the_kernel_with_its_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root mounts it, and has its driver for its own kernel alone."""
    disk = whole(tmp_path)
    assert words_before([str(disk)], "") == ([], False)  # nothing is in it
    put_file_system(disk, 1 * MIB, 1 * MIB, "vfat", "-F", "12")
    assert words_before([str(disk)], "") == ([], True)
    found, has_esp = _for_disks_root({"disks": [str(disk)]})
    assert (found["kernel"], has_esp) == ("debian:6.1", True)
    (tmp_path / "kernel").write_bytes(boot_images.bzimage())
    made: list[str] = []
    known = kernel_choice._Kernel(str(tmp_path / "kernel"), initrd="/of/the/recipe")
    monkeypatch.setattr(kernel_choice, "_find", lambda name, arch: known)
    monkeypatch.setattr(fresh_initramfs, "make", lambda *_, cure: made.append("") or "/fresh")
    assert specify({"disks": [str(disk)]})[0].initrd == "/fresh"
    assert specify({"disks": [str(disk)], "initrd": "/mine"})[0].initrd == "/mine"
    assert specify({"kernel": "debian:6.1", "disks": ["ram:1M"]})[0].initrd == "/of/the/recipe"
    assert made == [""]


def test_no_words_for_what_needs_none(tmp_path: Path) -> None:
    assert words_before([str(two(tmp_path, second=ROOT_X86_64))], "")[0] == []
    assert words_before([str(tmp_path / "not there")], "")[0] == []
    assert words_before(["ram:64M"], "")[0] == []
    assert words_before([], "")[0] == []
    (tmp_path / "zeros").write_bytes(bytes(MIB))
    assert words_before([str(tmp_path / "zeros")], "")[0] == []
    with open(tmp_path / "bare", "wb") as file:
        file.truncate(128 * MIB)
    put_file_system(tmp_path / "bare", 0, 128 * MIB, "btrfs")
    assert words_before([str(tmp_path / "bare")], "")[0] == ["rootfstype=btrfs"]


def in_an_esp(tmp_path: Path, *options: str) -> Path:
    """A disk whose root has no kernel, and whose /boot is a vfat with what systemd-boot has."""
    tree = tmp_path / "esp"
    (tree / "loader/entries").mkdir(parents=True)
    (tree / "debian/6.1.0-a-long-name").mkdir(parents=True)
    kernel = tree / "debian/6.1.0-a-long-name/linux"
    kernel.write_bytes(boot_images.bzimage())
    (kernel.parent / "initrd.img-6.1").write_bytes(bytes(range(256)) * 9000)
    for number in range(40):  # a directory of several clusters
        (tree / f"loader/entries/old entry number {number}.conf").write_text("title old\n")
    (tree / "loader/entries/debian-6.1.0.conf").write_text(
        "title Debian\nversion 6.1.0\noptions root=LABEL=sys quiet\n"
        "linux /Debian/6.1.0-a-long-name/LINUX\ninitrd /debian/6.1.0-a-long-name/initrd.img-6.1\n"
    )
    script = f"label: gpt\nstart=2048, size=81920, type=uefi\nstart=83968, type={ROOT_X86_64}\n"
    disk = partitioned(tmp_path / "disk.img", script, size=400 * MIB)
    put_file_system(disk, 41 * MIB, 320 * MIB, "xfs")
    put_file_system(disk, 1 * MIB, 40 * MIB, "vfat", *options)
    words = ["mcopy", "-s", "-i", f"{disk}@@1M", *map(str, sorted(tree.iterdir())), "::"]
    subprocess.run(words, check=True, env={**os.environ, "MTOOLS_SKIP_CHECK": "1"})
    return disk


@pytest.mark.skipif(shutil.which("mcopy") is None, reason="needs mcopy (mtools)")
@pytest.mark.parametrize("options", [["-F", "16"], ["-F", "32", "-s", "1"]], ids=" ".join)
def test_a_kernel_in_a_vfat(tmp_path: Path, said: list[str], options: list[str]) -> None:
    disk = in_an_esp(tmp_path, *options)
    spec, _ = specify({"kernel": "disk", "disks": [str(disk)]})
    assert Path(spec.kernel).read_bytes() == boot_images.bzimage()
    assert spec.initrd and Path(spec.initrd).read_bytes() == bytes(range(256)) * 9000
    assert spec.cmdline == "root=LABEL=sys quiet"
    assert "/loader/entries/debian-6.1.0.conf in partition 1" in said[0]


@pytest.mark.skipif(shutil.which("mcopy") is None, reason="needs mcopy (mtools)")
@pytest.mark.parametrize("options", [["-F", "16"], ["-F", "32", "-s", "1"]], ids=" ".join)
def test_a_damaged_vfat_costs_little_and_is_one_line(tmp_path: Path, options: list[str]) -> None:
    """Any bytes in its first sector, its tables and its directories."""
    disk = in_an_esp(tmp_path, *options)
    whole = disk.read_bytes()[MIB : 41 * MIB]
    chance = random.Random(5)
    told = set()
    for number in range(60):
        head = bytearray(whole[: MIB // 2])
        begin, end = (0, 90) if number % 4 == 0 else (2048, len(head))
        for _ in range(chance.choice((3, 2000, 20000))):
            head[chance.randrange(begin, end)] = chance.choice((0, 1, 2, 0xFF))

        def read(at: int, size: int, head: bytearray = head) -> bytes:
            return bytes(head[at : at + size]) + whole[max(at, len(head)) : at + size]

        try:
            system = Fat(read, len(whole), "it")
            entry = boot_entry.find([system])
            for path in () if entry is None else (entry.kernel, *entry.initrds):
                for _ in system.read_file(path, 8 * MIB):
                    pass
        except ConfigError as error:
            assert "\n" not in str(error)
            told.add(str(error)[:75])
    assert len(told) > 3


def test_a_configuration_that_names_what_is_not_there(tmp_path: Path) -> None:
    disk = whole(tmp_path, GRUB.replace("/boot/vmlinuz-6.1", "/../../etc/passwd"))
    with pytest.raises(ConfigError, match=r"names '/\.\./\.\./etc/passwd', which is not in that"):
        specify({"kernel": "disk", "disks": [str(disk)]})


@pytest.mark.parametrize(
    ("words", "before", "behind"),
    [
        ("init=/evil -- more", "init=/evil", " -- more"),
        ("init=/evil 'x=a -- b'", 'init=/evil "x=a -- b"', ""),
        ("init=/evil --", "init=/evil", " --"),
    ],
)
def test_the_user_has_the_last_word_whatever_the_disk_says(
    tmp_path: Path, said: list[str], words: str, before: str, behind: str
) -> None:
    disk = whole(tmp_path, GRUB.replace("ro\n", f"{words}\n"))
    spec, _ = specify({"kernel": "disk", "disks": [str(disk)], "cmdline": "init=/mine"})
    assert spec.cmdline == f"root=LABEL=sys {before} init=/mine{behind}"
    assert said[0].endswith(f": root=LABEL=sys {before}{behind}")


def test_a_path_in_a_configuration_makes_one_line(tmp_path: Path) -> None:
    (tmp_path / "tree/boot/\x1b[2Jd").mkdir(parents=True)
    disk = whole(tmp_path, GRUB.replace("/boot/vmlinuz-6.1", f"/{'./' * 900}boot/\x1b[2Jd"))
    with pytest.raises(ConfigError, match="is not a file") as told:
        specify({"kernel": "disk", "disks": [str(disk)]})
    assert str(told.value).isprintable() and len(str(told.value)) < 400


@pytest.mark.parametrize("name", [b"vmlinuz-9\xff", b"vmlinuz-9\x1b[2J", b"vmlinuz-9\nx", b"link"])
def test_names_in_a_disk_that_are_no_kernels(tmp_path: Path, said: list[str], name: bytes) -> None:
    disk = whole(tmp_path, "")
    boot = tmp_path / "tree/boot"
    if name == b"link":
        (boot / "vmlinuz-9").symlink_to("/nowhere")
        (boot / "loader/entries").mkdir(parents=True)
        (boot / "loader/entries/a.conf").symlink_to("/nowhere")
    else:
        (boot / os.fsdecode(name)).write_bytes(b"other")
    put_file_system(disk, 2 * MIB, 61 * MIB, "ext4", "-d", str(tmp_path / "tree"))
    spec, _ = specify({"kernel": "disk", "disks": [str(disk)]})
    assert Path(spec.kernel).read_bytes() == boot_images.bzimage()
    assert said[0].isprintable() and "vmlinuz-6.1 by" in said[0]


def test_a_fat_whose_chain_goes_to_and_fro_costs_no_table_for_each_cluster() -> None:
    pieces, reserved = 70, 32  # of 64 KiB, which are more than are kept
    table = pieces << 16
    data, clusters = reserved * 512 + table, pieces << 14
    first = bytearray(512)
    struct.pack_into("<HBHB", first, 11, 512, 1, reserved, 1)
    struct.pack_into("<III", first, 32, data // 512 + clusters - 2, table // 512, 0)
    struct.pack_into("<I", first, 44, 2)
    entry = struct.pack("<11sB8xHH2xHI", b"KERNEL     ", 0, 0, 0, 5, 200 << 20)
    read = 0

    def read_at(offset: int, size: int) -> bytes:
        nonlocal read
        read += size
        found = bytearray(size)
        if offset == 0:
            found[:512] = first
        elif offset == data:
            found[:32] = entry
        elif reserved * 512 <= offset < data:
            number = (offset - reserved * 512) >> 16
            struct.pack_into("<I", found, 20, ((number + 1) % pieces << 14) + 5)
            if not number:
                struct.pack_into("<I", found, 8, 0x0FFFFFFF)
        return bytes(found)

    system = Fat(read_at, data + (clusters << 9), "a disk")
    with pytest.raises(ConfigError, match="too large to be searched"):
        for _ in system.read_file("/kernel", 256 << 20):
            assert read < 128 << 20
    assert read < 128 << 20
