"""Kernels that are no recipe's, in guests: with their modules, and an initramfs made for them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from disks import artifacts
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
