"""Commands and files of Linux guests: `pyvmm exec`, `cp`, `run … -- CMD`, the Python client."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import re
import signal
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from disks import artifacts, fsck, root_disk, sha256
from guest import (
    HANG_SECONDS,
    OF_THE_MACHINE,
    PYVMM,
    Guest,
    GuestResult,
    pump_into,
    text,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("linux_guests")

BULK = random.Random(6).randbytes(300_001)
Done = subprocess.CompletedProcess[bytes]

# Looks at the clock, sets it, and has the guest power off.
CLOCK_AND_POWER = """
from pyvmm.agent import PORT, Agent
from pyvmm.control.client import connect_vsock

agent = Agent(lambda: connect_vsock("vm", PORT))
agent.run(["date", "-s", "@1000000000"], check=True)
print(0 <= agent.clock().time - 10**9 < 600, abs(agent.set_clock().offset) < 300)
agent.power_off()
"""


@dataclass
class Reached:
    """The words and deeds of `pyvmm exec` and `cp` with one guest."""

    result: GuestResult = field(default_factory=lambda: GuestResult((), 0, "", ""))
    done: dict[str, Done] = field(default_factory=dict)
    terminal: str = ""
    terminal_code: int = -1
    interrupted: int = -1
    left_after_timeout: bool = True
    left_running: bool = True
    paused: dict[str, int] = field(default_factory=dict)
    left_after_pause: bool = True
    copies: str = ""
    fsck: str = "?"


def reach_into(folder: Path) -> Reached:
    files = artifacts()
    found = Reached()
    with root_disk(folder) as disk:
        guest = Guest(
            files.vmlinux,
            files.initramfs,
            [str(disk)],
            cmdline="quiet pyvmm.exec=agent",
            options=["--agent"],
        ).start()

        def exec(name: str, *words: str, input: bytes = b"") -> Done:
            found.done[name] = subprocess.run(
                [*PYVMM, "exec", *words],
                env=guest.environment,
                input=input,
                capture_output=True,
                timeout=HANG_SECONDS,
            )
            return found.done[name]

        assert wait_until(lambda: guest.pyvmm("ps").stdout.count("\n") > 1)
        exec("apart", "--wait=250", "vm", "--", "sh", "-c", "echo out; echo err >&2; exit 5")
        exec("binary", "-i", "vm", "cat", input=BULK)
        options = ("-e", "A=b c", "-w", "/tmp", "-u", "nobody")
        exec("environment", *options, "vm", "--", "sh", "-c", 'echo "$A,$PWD,$(id -un)"')
        exec("missing", "vm", "--", "no-such-command")
        exec("no directory", "-w", "/nowhere", "vm", "--", "true")
        exec("killed", "vm", "--", "sh", "-c", "kill -TERM $$")
        exec("slow", "--timeout=0.5", "vm", "--", "sh", "-c", "sleep 4321 & sleep 4321")
        found.left_after_timeout = not wait_until(lambda: nobody_sleeps(exec))
        exec("nothing", "vm")
        stand_still(guest, found, exec)
        at_a_terminal(guest, found)
        leave_without_a_word(guest, found, exec)
        copy(guest, folder, found)
        ask = [sys.executable, "-c", CLOCK_AND_POWER]
        found.done["clock"] = subprocess.run(
            ask, env=guest.environment, capture_output=True, timeout=HANG_SECONDS
        )
        found.result = guest.wait()
        found.fsck = fsck(disk)
    return found


def nobody_sleeps(exec) -> bool:
    """Whether no command of ours runs in the guest; one that was killed may take a moment."""
    return exec("left", "vm", "--", "sh", "-c", "pidof sleep || echo none").stdout == b"none\n"


def stand_still(guest: Guest, found: Reached, exec) -> None:
    """Clients of a VM that is paused while their commands run, and one that comes afterwards."""
    clients = {
        # It may be late before it has begun, on a slow machine: that is 124 as well.
        "limited": ["--timeout=8", "vm", "--", "sh", "-c", "echo begun; exec sleep 4322"],
        "interrupted": ["vm", "--", "sh", "-c", "trap '' INT; echo begun; exec sleep 4322"],
    }
    running: dict[str, subprocess.Popen[bytes]] = {}
    for name, words in clients.items():
        running[name] = subprocess.Popen(
            [*PYVMM, "exec", *words], env=guest.environment, stdout=subprocess.PIPE
        )
        said = running[name].stdout.readline()
        assert said == b"begun\n" or name == "limited"
    assert guest.pyvmm("pause", "vm").returncode == 0
    # Two, as a rule. If the client was so late that they were one for it, it takes another.
    for seconds in (1, 10, 60, 60):
        running["interrupted"].send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            running["interrupted"].wait(seconds)
            break
    for name, client in running.items():
        found.paused[name] = client.wait(HANG_SECONDS)
        client.stdout.close()
    exec("paused", "vm", "true")
    assert guest.pyvmm("resume", "vm").returncode == 0
    found.left_after_pause = not wait_until(lambda: nobody_sleeps(exec))


def at_a_terminal(guest: Guest, found: Reached) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    command = 'stty size; read x; echo "read $x"; cat'
    process = subprocess.Popen(
        [*PYVMM, "exec", "-it", "vm", "--", "sh", "-c", command],
        **{"stdin": theirs, "stdout": theirs, "stderr": theirs, "env": guest.environment},
    )
    os.close(theirs)
    said = bytearray()
    screen = pump_into(said, ours)
    assert wait_until(lambda: b"33 77" in said), text(said)
    os.write(ours, b"typed\r")
    assert wait_until(lambda: b"read typed" in said), text(said)
    os.write(ours, b"\x03")  # Ctrl-C, which the guest's terminal makes a signal of
    found.terminal_code = process.wait(HANG_SECONDS)
    screen.join(HANG_SECONDS)
    assert not screen.is_alive(), "somebody still has the terminal"
    found.terminal = text(said)
    os.close(ours)


def leave_without_a_word(guest: Guest, found: Reached, exec) -> None:
    """Clients that end: by Ctrl-C, which their commands get, and by kill -9."""
    for end in ("interrupt", "kill"):
        client = subprocess.Popen(
            [*PYVMM, "exec", "vm", "--", "sh", "-c", "echo begun; exec sleep 4321"],
            env=guest.environment,
            stdout=subprocess.PIPE,
        )
        assert client.stdout is not None
        assert client.stdout.readline() == b"begun\n"
        client.send_signal(signal.SIGINT if end == "interrupt" else signal.SIGKILL)
        code = client.wait(HANG_SECONDS)
        client.stdout.close()
        if end == "interrupt":
            found.interrupted = code
    found.left_running = not wait_until(lambda: nobody_sleeps(exec))


def copy(guest: Guest, folder: Path, found: Reached) -> None:
    tree = folder / "tree"
    (tree / "inner/empty").mkdir(parents=True)
    (tree / "bulk").write_bytes(BULK)
    (tree / "inner/run").write_text("#!/bin/sh\necho it runs\n")
    (tree / "inner/run").chmod(0o751)
    (tree / "link").symlink_to("inner/run")
    os.utime(tree / "bulk", ns=(10**18, 10**18 + 7))
    os.mkfifo(tree / "fifo")
    for source, target in ((str(tree), "vm:/root/there"), ("vm:/root/there", str(folder / "back"))):
        done = guest.pyvmm("cp", source, target)
        assert done.returncode == 0, done.stderr
        found.copies += done.stderr
    run = guest.pyvmm("exec", "vm", "/root/there/link")
    back = folder / "back"
    found.copies += f"{run.stdout}{os.readlink(back / 'link')} "
    found.copies += f"{(back / 'inner/run').stat().st_mode:o} {(back / 'bulk').stat().st_mtime_ns} "
    found.copies += str((back / "bulk").read_bytes() == BULK and (back / "inner/empty").is_dir())
    found.done["no file"] = subprocess.run(
        [*PYVMM, "cp", "vm:/no/such", str(folder)], env=guest.environment, capture_output=True
    )


reached = pytest.mark.boot.with_args(reach_into)


@reached
def test_a_commands_streams_and_code_come_back(boot: Reached) -> None:
    apart = boot.done["apart"]
    assert (apart.returncode, apart.stdout, apart.stderr) == (5, b"out\n", b"err\n")
    binary = boot.done["binary"]
    assert hashlib.sha256(binary.stdout).digest() == hashlib.sha256(BULK).digest()
    assert (binary.returncode, binary.stderr) == (0, b"")
    assert boot.done["environment"].stdout == b"b c,/tmp,nobody\n"


@reached
def test_what_cannot_be_run_is_one_line_and_a_code_as_a_shells(boot: Reached) -> None:
    missing = boot.done["missing"]
    assert missing.returncode == 127
    assert missing.stderr == b"pyvmm: in the guest: no-such-command: No such file or directory\n"
    assert boot.done["no directory"].stderr.count(b"/nowhere: No such file") == 1
    assert boot.done["killed"].returncode == 128 + signal.SIGTERM
    assert boot.done["nothing"].returncode == 2
    assert b"no command" in boot.done["nothing"].stderr


@reached
def test_a_timeout_ends_the_command_and_its_children(boot: Reached) -> None:
    assert boot.done["slow"].returncode == 124
    assert not boot.left_after_timeout


@reached
def test_a_paused_guest_holds_no_client_and_its_commands_end_when_it_goes_on(boot: Reached) -> None:
    assert boot.paused == {"limited": 124, "interrupted": 130}
    assert boot.done["paused"].returncode == 1
    assert boot.done["paused"].stderr == b"pyvmm: vm is paused; pyvmm resume vm has it go on\n"
    assert not boot.left_after_pause


@reached
def test_a_command_gets_a_terminal_with_its_size_and_ctrl_c(boot: Reached) -> None:
    assert "33 77" in boot.terminal
    assert "read typed" in boot.terminal
    assert boot.terminal_code == 128 + signal.SIGINT


@reached
def test_a_client_that_ends_takes_its_command_along(boot: Reached) -> None:
    assert boot.interrupted == 128 + signal.SIGINT
    assert not boot.left_running


@reached
def test_files_and_trees_are_copied_both_ways(boot: Reached) -> None:
    assert "1 not copied" in boot.copies
    assert "fifo" in boot.copies
    assert boot.copies.endswith("it runs\ninner/run 100751 1000000000000000007 True")
    assert boot.done["no file"].returncode == 1
    assert (
        boot.done["no file"].stderr == b"pyvmm: in the guest: /no/such: No such file or directory\n"
    )


@reached
def test_the_clock_is_read_and_set_and_the_power_goes_off_cleanly(boot: Reached) -> None:
    assert boot.done["clock"].stdout.split() == [b"True", b"True"], boot.done["clock"].stderr
    assert boot.result.code == 0, boot.result.ending()
    assert boot.fsck == ""


# --- pyvmm run … -- CMD --------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """A whole `pyvmm run … -- CMD`."""

    code: int
    stdout: bytes
    stderr: str
    disk_changed: bool = False
    fsck: str = ""

    @property
    def messages(self) -> list[str]:
        """Standard error without the lines that tell of the machine the test runs on."""
        lines = self.stderr.splitlines()
        return [line for line in lines if not any(part in line for part in OF_THE_MACHINE)]


def run(*words: str, command: str, input: bytes = b"") -> Ran:
    done = subprocess.run(
        [*PYVMM, "run", "--memory=256M", *words, "--", "sh", "-c", command],
        input=input,
        capture_output=True,
        timeout=HANG_SECONDS + 60,  # it gives up by itself before, and shows the console
    )
    return Ran(done.returncode, done.stdout, text(done.stderr))


def boot_options(disk: Path | None, variant: str = "minbase") -> list[str]:
    files = artifacts(variant=variant)
    disks = [] if disk is None else ["--disk", str(disk)]
    return ["--kernel", files.vmlinux, "--initrd", files.initramfs, *disks]


def run_and_throw_away(folder: Path) -> Ran:
    """Reads its input, is interrupted like a terminal's foreground, and has written to its disk."""
    command = 'cat; trap "echo caught; exit 9" INT; echo x > /root/x; sync; echo ready; sleep 1000'
    with root_disk(folder) as disk:
        before = sha256(disk)
        words = ["--rm", "--memory=256M", *boot_options(disk)]
        process = subprocess.Popen(
            [*PYVMM, "run", *words, "--", "sh", "-c", f"{command} & wait"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None and process.stderr is not None
        said = bytearray()
        complaints = bytearray()
        reading = [
            pump_into(said, process.stdout.fileno()),
            pump_into(complaints, process.stderr.fileno()),
        ]
        with suppress(BrokenPipeError):  # it has ended: what it said is looked at
            process.stdin.write(BULK)
            process.stdin.close()
        process.stdin = None
        wait_until(lambda: said.endswith(b"ready\n") or process.poll() is not None)
        with suppress(ProcessLookupError):  # as above
            os.killpg(process.pid, signal.SIGINT)
        code = process.wait(HANG_SECONDS)
        for pump in reading:
            pump.join(HANG_SECONDS)
        return Ran(code, bytes(said), text(complaints), disk_changed=sha256(disk) != before)


@pytest.mark.boot.with_args(run_and_throw_away)
def test_run_rm_is_its_command_and_nothing_else(boot: Ran) -> None:
    assert boot.stdout == BULK + b"ready\ncaught\n", boot.stderr
    assert boot.code == 9
    assert not boot.disk_changed
    assert boot.messages == [], "the boot is quiet"


def run_under_systemd(folder: Path) -> Ran:
    with root_disk(folder, "systemd") as disk:
        wait = "systemctl show -P DefaultDeviceTimeoutUSec"  # of what /etc/fstab names
        words = [*boot_options(disk, "systemd"), "--cmdline=pyvmm.devicewait=600"]
        ran = run(*words, command=f"cat /proc/1/comm; {wait}; echo kept > /root/kept")
        return Ran(ran.code, ran.stdout, ran.stderr, fsck=fsck(disk))


@pytest.mark.boot.with_args(run_under_systemd)
def test_a_guest_with_systemd_has_the_agent_and_shuts_down(boot: Ran) -> None:
    assert (boot.code, boot.stdout) == (0, b"systemd\n10min\n"), boot.stderr
    assert boot.messages == [], "it powered off, and was not reset"
    assert boot.fsck == ""


def run_under_any_init(folder: Path) -> Ran:
    with root_disk(folder) as disk:
        words = [*boot_options(disk), "--cmdline", "init=/bin/sh", "--rm"]
        return run(*words, command="cat /proc/1/comm; ls -d /root; mount | grep -c ' / '; exit 3")


@pytest.mark.boot.with_args(run_under_any_init)
def test_an_init_that_knows_nothing_of_it_gets_the_initramfs_agent(boot: Ran) -> None:
    assert (boot.code, boot.stdout) == (3, b"sh\n/root\n1\n"), boot.stderr


def run_into_a_panic(folder: Path) -> Ran:
    with root_disk(folder) as disk:
        command = "echo begun; echo c > /proc/sysrq-trigger; sleep 1000"
        return run("--rm", *boot_options(disk), command=command)


@pytest.mark.boot.with_args(run_into_a_panic)
def test_a_guest_that_panics_meanwhile_gives_its_own_code(boot: Ran) -> None:
    assert (boot.code, boot.stdout) == (11, b"begun\n"), boot.stderr
    assert "the guest's kernel panicked: sysrq triggered crash\n" in boot.stderr
    assert re.search(r"kernel said: Kernel panic - .* crash; pyvmm logs \S+\n", boot.stderr)
    assert "console:" not in boot.stderr


def run_without_a_root_disk(folder: Path) -> Ran:
    return run("--rm", *boot_options(None), "--disk=ram:1M", command="true")


@pytest.mark.boot.with_args(run_without_a_root_disk)
def test_a_guest_that_does_not_come_up_shows_its_console(boot: Ran) -> None:
    assert (boot.code, boot.stdout) == (11, b""), boot.stderr
    assert "pyvmm: console: pyvmm-initramfs: cannot mount /dev/vda" in boot.stderr, boot.stderr
