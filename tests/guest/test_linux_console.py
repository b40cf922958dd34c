"""The console: a shell on a terminal, on a pipe, a login, and the keys that are not the guest's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from disks import artifacts, fsck, root_disk
from guest import Guest, GuestResult
from terminal_guest import TerminalGuest

pytestmark = pytest.mark.usefixtures("linux_guests")

CTRL_A = "\x01"


def boot_pipe(folder: Path) -> GuestResult:
    files = artifacts()
    commands = b"uname -r; echo six times seven is $((6*7)); exit\n"
    with root_disk(folder) as disk:
        return Guest(files.bzimage, files.initramfs, [str(disk)], stdin=commands).run()


@pytest.mark.boot.with_args(boot_pipe)
def test_commands_from_a_pipe_reach_the_shell(boot: GuestResult) -> None:
    assert boot.code == 0, boot.ending()
    lines = boot.console.splitlines()
    assert "six times seven is 42" in lines
    assert any(line.startswith("6.1.") for line in lines)


@dataclass(frozen=True)
class OnTerminal:
    """A run on a terminal, and the terminal's settings before, during and after it."""

    result: GuestResult
    restored: bool
    raw_meanwhile: bool
    fsck: str = ""


def boot_shell(folder: Path) -> OnTerminal:
    files = artifacts()
    with root_disk(folder) as disk:
        guest = TerminalGuest(files.bzimage, files.initramfs, [str(disk)])
        guest.start()
        guest.wait_for("# ")
        raw = guest.settings() != guest.before
        guest.type("echo go; cat\r")
        guest.wait_for("go\r\n")
        guest.type("purr\r")
        guest.wait_for("purr", times=2)  # its echo, and `cat`
        # Ctrl-C is a key like any other: it ends `cat` in the guest, and nothing here.
        guest.type("\x03")
        guest.wait_for("# ", after="^C")
        guest.type("echo $((222*222))\r")
        guest.wait_for("49284")
        guest.type(f"{CTRL_A}h")
        guest.wait_for("this help")
        guest.type(f"{CTRL_A}x")
        result = guest.wait()
        return OnTerminal(result, guest.after == guest.before, raw)


@pytest.mark.boot.with_args(boot_shell)
def test_ctrl_a_x_ends_with_14_and_restores_the_terminal(boot: OnTerminal) -> None:
    assert boot.result.code == 14, boot.result.ending()
    assert boot.raw_meanwhile
    assert boot.restored
    assert any("Ctrl-A x" in line for line in boot.result.messages)


def boot_login(folder: Path) -> OnTerminal:
    files = artifacts(variant="systemd")
    with root_disk(folder, "systemd") as disk:
        guest = TerminalGuest(files.bzimage, files.initramfs, [str(disk)], cpus=2, memory="512M")
        guest.start()
        guest.wait_for("login: ")
        raw = guest.settings() != guest.before
        guest.type("root\r")
        guest.wait_for("# ")
        guest.type("cat /proc/1/comm; systemctl is-system-running --wait\r")
        guest.wait_for("running\r\n")
        guest.type("poweroff\r")
        result = guest.wait()
        return OnTerminal(result, guest.after == guest.before, raw, fsck(disk))


@pytest.mark.boot.with_args(boot_login)
def test_systemd_comes_up_to_a_login_and_powers_off(boot: OnTerminal) -> None:
    assert boot.result.code == 0, boot.result.ending()
    assert "systemd" in boot.result.console.splitlines()
    assert boot.result.messages == []
    assert boot.fsck == ""
    assert boot.restored
