"""A guest that does not come up: one line says what it was and what to change."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from disks import artifacts, blank_disk, root_disk
from guest import Guest, GuestResult

pytestmark = pytest.mark.usefixtures("linux_guests")

MIB = 1 << 20


def boot_without_initrd(folder: Path) -> GuestResult:
    # Debian's kernel has virtio-mmio and virtio-blk as modules.
    disk = blank_disk(folder / "disk.img", MIB)
    return Guest(artifacts().vmlinux, None, [str(disk)]).run()


@pytest.mark.boot.with_args(boot_without_initrd)
def test_no_driver_for_the_root_disk(boot: GuestResult) -> None:
    assert boot.code == 11, boot.ending()
    told, line, _ = boot.messages
    assert "CONFIG_VIRTIO_BLK=y, which is a module there, (for its disks)" in told
    assert "did not find its root device" in line
    assert "--initrd" in line


def boot_with_wrong_root(folder: Path) -> GuestResult:
    files = artifacts()
    disk = blank_disk(folder / "disk.img", MIB)
    cmdline = "root=/dev/vdz pyvmm.rootwait=0"
    return Guest(files.vmlinux, files.initramfs, [str(disk)], cmdline=cmdline).run()


@pytest.mark.boot.with_args(boot_with_wrong_root)
def test_a_root_device_that_is_not_there(boot: GuestResult) -> None:
    assert boot.code == 11, boot.ending()
    line, _ = boot.messages
    assert "found disks, but not its root device /dev/vdz" in line
    assert "root=" in line and "/dev/vda" in line


def boot_blank_root(folder: Path) -> GuestResult:
    files = artifacts()
    disk = blank_disk(folder / "disk.img", MIB)
    return Guest(files.vmlinux, files.initramfs, [str(disk)]).run()


@pytest.mark.boot.with_args(boot_blank_root)
def test_a_root_disk_without_a_file_system(boot: GuestResult) -> None:
    assert boot.code == 11, boot.ending()
    line, _ = boot.messages
    assert "could not mount its root file system" in line


def boot_without_init(folder: Path) -> GuestResult:
    files = artifacts()
    with root_disk(folder) as disk:
        guest = Guest(files.vmlinux, files.initramfs, [str(disk)], cmdline="init=/sbin/nothing")
        return guest.run()


@pytest.mark.boot.with_args(boot_without_init)
def test_no_init_on_the_root_disk(boot: GuestResult) -> None:
    assert boot.code == 11, boot.ending()
    line, _ = boot.messages
    assert "no init" in line
    assert "init=" in line


def boot_silent(folder: Path) -> GuestResult:
    # Never prints a byte, and waits for a shell's input that never comes.
    files = artifacts()
    with root_disk(folder) as disk:
        guest = Guest(files.vmlinux, files.initramfs, [str(disk)], cmdline="console=tty0")
        guest.start()
        guest.wait_for("printed nothing", stderr=True)
        guest.send_signal(signal.SIGTERM)
        return guest.wait()


@pytest.mark.boot.with_args(boot_silent)
def test_a_console_that_is_not_the_serial_port(boot: GuestResult) -> None:
    assert boot.console == ""
    # `messages` leaves this line out, because a slow machine prints it of any guest.
    [hint] = [line for line in boot.stderr.splitlines() if "printed nothing" in line]
    assert "console=tty0" in hint
    assert "put console=ttyS0 into --cmdline" in hint
