"""From the root device to the end of a guest: partitions, arguments of init, poweroff."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from disks import artifacts, fsck, read_file, root_disk
from guest import Guest, GuestResult, wait_until
from partition_tables import MIB, needs_tools, partitioned

pytestmark = pytest.mark.usefixtures("linux_guests")

UUID = "11111111-2222-3333-4444-555555555555"
SIZE = 1024 * MIB  # of the root disk
TABLE = f"""label: gpt
start=2048, size=2048, type=uefi, name="boot"
size={SIZE // 512}, uuid={UUID}, name="my root"
"""
# What the kernel passes to init, word by word.
ARGUMENTS = (
    'init=/bin/bash -- -c "IFS=; echo got=[$0][$1][$2]; exec poweroff -f" zero "a  b;*" root=c'
)


def boot_from_a_partition(folder: Path, cmdline: str) -> GuestResult:
    """A disk whose second partition is a root disk; nobody writes to it."""
    files = artifacts()
    disk = partitioned(folder / "disk.img", TABLE, size=SIZE + 8 * MIB)
    assert Path(files.rootfs).stat().st_size == SIZE
    subprocess.run(
        ["dd", f"if={files.rootfs}", f"of={disk}", "bs=1M", "seek=2", "conv=notrunc,sparse"],
        check=True,
        capture_output=True,
    )
    try:
        cmdline += " pyvmm.rootwait=0 ro"
        disks = [f"{disk},readonly"]
        return Guest(files.vmlinux, files.initramfs, disks, cmdline=cmdline.strip()).run()
    finally:
        disk.unlink()


@needs_tools
@pytest.mark.boot.with_args(boot_from_a_partition, f'ro root="PARTLABEL=my root" {ARGUMENTS}')
def test_root_by_its_label_and_every_argument_of_init(boot: GuestResult) -> None:
    assert boot.code == 0, boot.ending()
    assert "got=[zero][a  b;*][root=c]" in boot.console, boot.ending()


@needs_tools
@pytest.mark.boot.with_args(boot_from_a_partition, f"root=PARTUUID={UUID[:-1]}6")
def test_a_partition_that_is_not_there(boot: GuestResult) -> None:
    assert boot.code == 11, boot.ending()
    line, _ = boot.messages
    assert f"not its root device PARTUUID={UUID[:-1]}6" in line
    assert f'/dev/vda2 (ext4, 1024 MiB, PARTUUID="{UUID}")' in line
    assert "/dev/vda1 (unknown, 1 MiB" in line
    listed = "/dev/vda2 1024 MiB ext4 LABEL=pyvmm-root UUID="
    assert listed in boot.console and f"PARTLABEL=my root PARTUUID={UUID}" in boot.console


@needs_tools
@pytest.mark.boot.with_args(boot_from_a_partition, "root=/dev/vda")
def test_a_disk_with_partitions_as_the_root(boot: GuestResult) -> None:
    assert boot.code == 11, boot.ending()
    line, _ = boot.messages
    assert "could not mount its root file system" in line
    assert "/dev/vda holds partitions: put root=/dev/vda2 (ext4, 1024 MiB) into --cmdline" in line


def boot_and_power_off(folder: Path) -> GuestResult:
    """At the shell, while somebody else has a file open for writing."""
    files = artifacts()
    with root_disk(folder) as disk:
        keys = (
            b"(trap 'sleep 0.5; echo ended >&5; exit' TERM; : > /run/heeds;"
            b" while :; do sleep 1; done) 5> /kept &\n"
        )
        keys += b"until [ -e /run/heeds ]; do sleep 0.1; done; poweroff; sleep 100\n"
        guest = Guest(files.bzimage, files.initramfs, [str(disk)], stdin=keys)
        result = guest.run()
        assert fsck(disk) == ""
        assert read_file(disk, "/kept") == b"ended\n"
        return result


@pytest.mark.boot.with_args(boot_and_power_off)
def test_poweroff_at_the_shell_lets_programs_end_and_leaves_a_clean_disk(boot: GuestResult) -> None:
    assert boot.code == 0, boot.ending()
    assert boot.messages == []


def boot_and_reboot(folder: Path) -> GuestResult:
    """By the agent, which is PID 1 itself."""
    files = artifacts()
    with root_disk(folder) as disk:
        options = ["--agent", "--on-reboot", "end"]
        guest = Guest(
            *(files.bzimage, files.initramfs, [str(disk)]),
            cmdline="pyvmm.exec=agent",
            options=options,
        )
        guest.start()
        guest.wait_for("pyvmm: init reached")
        assert wait_until(lambda: guest.pyvmm("exec", "vm", "true").returncode == 0)
        refused = guest.pyvmm("exec", "vm", "sh", "-c", "echo kept > /kept; reboot --no-such")
        assert refused.returncode == 2, refused.stderr
        ended = guest.pyvmm("exec", "vm", "reboot")
        assert (ended.returncode, ended.stderr) == (0, ""), "the guest did as it was told"
        result = guest.wait()
        assert fsck(disk) == ""
        assert read_file(disk, "/kept") == b"kept\n"
        return result


@pytest.mark.boot.with_args(boot_and_reboot)
def test_reboot_where_the_agent_is_the_first_program(boot: GuestResult) -> None:
    assert boot.code == 10, boot.ending()
    assert boot.messages == ["pyvmm: vm: the guest asked for a reset"]


def boot_without_a_word(folder: Path) -> GuestResult:
    """A kernel that has its console on hvc0 alone, as if it had no driver of a serial port."""
    files = artifacts()
    guest = Guest(files.vmlinux, files.initramfs, cmdline="console=hvc0 panic=-1")
    return guest.run()


@pytest.mark.boot.with_args(boot_without_a_word)
def test_a_guest_that_resets_itself_without_a_word(boot: GuestResult) -> None:
    assert boot.code == 10, boot.ending()
    assert boot.console == ""
    line = boot.messages[-1]  # the same may have been said before, after a long silence
    assert "reset itself and printed nothing" in line and "--console virtio" in line


def boot_memtest(folder: Path) -> GuestResult:
    """memtest86+, of Debian's package: by the boot protocol of Linux, but no Linux."""
    done = subprocess.run(
        ["apt-get", "download", "memtest86+"], cwd=folder, capture_output=True, text=True
    )
    packages = list(folder.glob("memtest86+_*.deb"))
    if done.returncode or not packages:
        pytest.skip(f"memtest86+ cannot be had: {done.stderr.strip()}")
    subprocess.run(["dpkg", "-x", packages[0], folder / "memtest"], check=True)
    [kernel] = (folder / "memtest").rglob("*x64.bin")
    # First of all it measures how quick the memory is: a minute where that is emulated.
    guest = Guest(str(kernel), None, cmdline="console=ttyS0,115200 nobench", stdin=b"1")
    guest.start()
    guest.wait_for("Settings:")  # its menu, which the key opens
    guest.wait_for("Test selection")
    guest.send_signal(signal.SIGINT)
    return guest.wait()


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt-get")
@pytest.mark.boot.with_args(boot_memtest)
def test_memtest_shows_its_screen_on_the_serial_port_and_takes_keys_from_it(
    boot: GuestResult,
) -> None:
    assert boot.code == 130, boot.ending()
    assert boot.messages[-1] == (
        "pyvmm: vm: interrupted: nobody in the guest can be asked, so its power was cut"
    )
