"""However a guest ends, `pyvmm run` ends with a code of its own, and one line says why."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from disks import artifacts, blank_disk, root_disk
from guest import Guest, GuestResult

pytestmark = pytest.mark.usefixtures("linux_guests")

MIB = 1 << 20


def boot_ending(
    folder: Path, script: str, cmdline: str = "", options: tuple[str, ...] = ()
) -> GuestResult:
    files = artifacts()
    with root_disk(folder) as disk:
        guest = Guest(
            files.bzimage,
            files.initramfs,
            [str(disk)],
            cpus=2,
            cmdline=cmdline,
            options=options,
        )
        return guest.run(script, folder=folder)


@pytest.mark.boot.with_args(boot_ending, "busybox reboot -f", "", ("--on-reboot", "end"))
def test_a_reboot_ends_with_10_if_that_was_asked_for(boot: GuestResult) -> None:
    assert boot.code == 10, boot.ending()
    assert boot.messages == ["pyvmm: vm: the guest asked for a reset"]


@pytest.mark.boot.with_args(boot_ending, "echo c > /proc/sysrq-trigger")
def test_a_panic_ends_with_11(boot: GuestResult) -> None:
    assert boot.code == 11, boot.ending()
    [line] = boot.messages
    assert line.startswith("pyvmm: vm: the guest's kernel panicked: sysrq triggered crash")


@pytest.mark.boot.with_args(boot_ending, "busybox reboot -f", "reboot=t")
def test_a_triple_fault_ends_with_12_and_a_report(boot: GuestResult) -> None:
    assert boot.code == 12, boot.ending()
    [line] = boot.messages
    assert line.startswith("pyvmm: vm: the guest triple-faulted")
    for part in ("rip", "cr3", "bytes"):
        assert part in boot.stderr.lower()


def boot_terminated(folder: Path) -> GuestResult:
    files = artifacts()
    with root_disk(folder) as disk:
        guest = Guest(files.bzimage, files.initramfs, [str(disk)], cpus=2)
        guest.start("echo running; sleep 10000", folder=folder)
        guest.wait_for("running")
        guest.send_signal(signal.SIGTERM)
        return guest.wait()


@pytest.mark.boot.with_args(boot_terminated)
def test_sigterm_powers_off(boot: GuestResult) -> None:
    assert boot.code == 0, boot.ending()
    assert boot.messages == ["pyvmm: vm: asked the guest to power off, by its power button"]


def boot_interrupted(folder: Path) -> GuestResult:
    # As soon as the kernel says a word, long before there is an init.
    disk = blank_disk(folder / "disk.img", MIB)
    files = artifacts("6.12")
    cmdline = "loglevel=7 earlyprintk=serial,ttyS0,115200"
    guest = Guest(files.bzimage, files.initramfs, [str(disk)], cmdline=cmdline)
    guest.start()
    guest.wait_for("Linux version")
    guest.send_signal(signal.SIGINT)
    return guest.wait()


@pytest.mark.boot.with_args(boot_interrupted)
def test_sigint_ends_with_130(boot: GuestResult) -> None:
    assert boot.code == 130, boot.ending()
    assert boot.messages == [
        "pyvmm: vm: interrupted: nobody in the guest can be asked, so its power was cut"
    ]
