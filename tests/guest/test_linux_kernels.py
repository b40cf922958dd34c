"""Kernels that are not a recipe's, in guests, with their modules, an initramfs made for each."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from disks import artifacts
from partition_tables import (
    MIB,
    ROOT_X86_64,
    needs_tools,
    partitioned,
    put_bytes,
    put_file_system,
    run,
)
from vms import messages, script

from pyvmm import Disk
from pyvmm.images.kernel import modules_folder

pytestmark = pytest.mark.usefixtures("linux_guests")


def unseen_by_depmod(folder: Path) -> Path:
    """Debian's 6.12 as `make tar-pkg` would have it, without depmod's files: its packed modules
    say themselves what they need."""
    files = artifacts("6.12")
    image = os.path.dirname(files.bzimage)
    modules = modules_folder(image)
    release = os.path.basename(modules)
    target = folder / "lib/modules" / release
    shutil.copytree(os.path.join(modules, "kernel"), target / "kernel")
    for name in ("modules.order", "modules.builtin"):
        shutil.copy(os.path.join(modules, name), target)
    (folder / "boot").mkdir()
    shutil.copy(files.bzimage, folder / "boot" / f"vmlinuz-{release}")
    shutil.copy(os.path.join(image, "config"), folder / "boot" / f"config-{release}")
    return folder


def test_a_kernel_with_modules_that_nobody_has_seen(microvm_factory, tmp_path) -> None:
    """The whole way: a tree, an initramfs of its modules, another kernel's root disk, the agent."""
    tree = unseen_by_depmod(tmp_path)
    disk = Disk(artifacts().rootfs, snapshot=True)
    vm = microvm_factory(kernel=str(tree), disks=[disk], memory="256M", transport="pci")
    [release] = os.listdir(tree / "lib/modules")
    said = script(vm, "echo release=$(uname -r); echo root=$(findmnt -no FSTYPE /)")
    assert said == {"release": release, "root": "ext4"}, vm.console.tail(40)
    assert messages(vm) == []  # its configuration lacks nothing


@pytest.mark.microvm(root="/", memory="256M")
@pytest.mark.microvm_kernels("debian:6.1", "debian:6.12", "debian:7")
def test_a_module_on_three_of_debians_kernels(microvm, microvm_kernel) -> None:
    """As a user's file of tests has it: the module that each kernel comes with, found by modprobe,
    in a guest on this machine's files."""
    said = script(
        microvm,
        "modprobe dummy numdummies=2 && ls -d /sys/class/net/dummy[01] | sed s/^/made=/;"
        "rmmod dummy; ls /sys/class/net/dummy0 2> /dev/null && echo left=yes;"
        "echo release=$(uname -r)",
    )
    assert said["made"] == "/sys/class/net/dummy1" and "left" not in said
    assert said["release"].startswith(f"{microvm_kernel.removeprefix('debian:')}.")


GRUB = """\
set default="0"
menuentry 'Debian' {
    linux /boot/vmlinuz-6.1 ro from.grub=yes $extra
    initrd /boot/initrd.img-6.1
}
"""


def whole_disk(folder: Path) -> Path:
    """A qcow2 image with the partitions that Debian's cloud images have: 1, behind the others, is
    the root, with its kernel in it."""
    files = artifacts()
    root = folder / "root.img"
    subprocess.run(["cp", "--sparse=always", files.rootfs, root], check=True)
    root.chmod(0o600)
    (folder / "grub.cfg").write_text(GRUB)
    (folder / "fstab").write_text("/dev/vda15 /boot/efi vfat defaults 0 0\n")
    put = [
        "mkdir /boot/grub",
        "rm /etc/fstab",  # debugfs writes no file that is there
        f"write {files.bzimage} /boot/vmlinuz-6.1",
        f"write {files.initramfs} /boot/initrd.img-6.1",
        f"write {folder}/grub.cfg /boot/grub/grub.cfg",
        f"write {folder}/fstab /etc/fstab",
    ]
    run("debugfs", "-w", "-f", "/dev/stdin", root, input="\n".join(put))
    size = root.stat().st_size
    table = f"""label: gpt
1 : start=16384, size={size // 512}, type=linux
14 : start=2048, size=6144, type=21686148-6449-6E6F-744E-656564454649
15 : start=8192, size=8192, type=uefi
"""
    disk = partitioned(folder / "disk.img", table, size=size + 10 * MIB)
    put_bytes(disk, 8 * MIB, root)
    put_file_system(disk, 4 * MIB, 4 * MIB, "vfat")
    image = folder / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, image)
    return image


@needs_tools
def test_a_whole_disk_boots_its_own_kernel(microvm_factory, tmp_path) -> None:
    """The kernel, its initrd and command line are in the disk; the root is its only file system of
    Linux'."""
    image = whole_disk(tmp_path)
    vm = microvm_factory(kernel="disk", disks=[f"{image},snapshot"], memory="256M")
    said = script(vm, "echo root=$(findmnt -no SOURCE /); cat /proc/cmdline | sed s/^/cmdline=/")
    assert said["root"] == "/dev/vda1", vm.console.tail(40)
    assert "from.grub=yes" in said["cmdline"] and "$" not in said["cmdline"]
    lines = "\n".join(messages(vm))
    assert "the root is partition 1 of" in lines and "the only one" in lines, lines


@needs_tools
def test_our_kernel_has_the_driver_of_a_whole_disks_efi_partition(
    microvm_factory, tmp_path
) -> None:
    """The root has modules, if any, of its own kernel alone."""
    image = whole_disk(tmp_path)
    vm = microvm_factory(disks=[f"{image},snapshot"], memory="256M")
    said = script(vm, "mount -t vfat /dev/vda15 /mnt && echo esp=$(findmnt -no FSTYPE /mnt)")
    assert said == {"esp": "vfat"}, vm.console.tail(40)


@needs_tools
def test_a_btrfs_root_gets_an_initramfs_with_its_driver(microvm_factory, tmp_path) -> None:
    """Nothing is named but the disk: the kernel comes with the modules that it needs."""
    tree, part = tmp_path / "tree", tmp_path / "part"
    tree.mkdir()
    run("debugfs", "-R", f'rdump / "{tree}"', artifacts().rootfs)
    size = 600 * MIB
    with open(part, "wb") as file:
        file.truncate(size)
    run("mkfs.btrfs", "-q", "-L", "pyvmm-root", "-r", tree, part)
    table = f"label: gpt\nstart=2048, size={size // 512}, type={ROOT_X86_64}\n"
    disk = partitioned(tmp_path / "disk.img", table, size=size + 4 * MIB)
    put_bytes(disk, MIB, part)
    vm = microvm_factory(disks=[f"{disk},snapshot"], memory="256M")
    said = script(vm, "echo root=$(findmnt -no SOURCE,FSTYPE / | tr -s ' ' -)")
    assert said == {"root": "/dev/vda1-btrfs"}, vm.console.tail(40)
