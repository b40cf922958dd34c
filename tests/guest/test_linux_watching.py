"""A detached Linux guest, its console joined from elsewhere, and what is told of its end."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from disks import artifacts
from guest import (
    HANG_SECONDS,
    PYVMM,
    Guest,
    GuestResult,
    children,
    pump_into,
    text,
    wait_until,
)

from pyvmm.machine.host_kvm import why_unusable

pytestmark = pytest.mark.usefixtures("linux_guests")


@dataclass(eq=False)
class Detached(Guest):
    """Its messages go to a file, which it may write to when `pyvmm run` has returned."""

    log: Path = Path()

    def _open(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self._argv,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        self._pumps = [pump_into(self.console, self.process.stdout.fileno())]

    def name(self) -> str:
        """All that `pyvmm run` has printed when it has returned."""
        self._join_pumps()
        return text(self.console)

    def kill(self) -> GuestResult:
        if self.process.poll() is not None:  # and so its guest runs on by itself
            self.pyvmm("stop", "--kill", "vm")
        return super().kill()

    def result(self) -> GuestResult:
        self.stderr[:] = self.log.read_bytes()
        return super().result()


@dataclass(frozen=True)
class Seen:
    """The words of `pyvmm run --detach`, and of those who looked from elsewhere."""

    started: tuple[int, str]
    console: str
    console_code: int
    later_console: str
    events: list[dict[str, object]]
    log: list[dict[str, object]]
    stats: dict[str, Any]
    top: str
    left: str


class Looking:
    """A command that looks at the guest from elsewhere, and what it has shown so far."""

    def __init__(self, guest: Guest, *args: str) -> None:
        self.process = subprocess.Popen(
            [*PYVMM, *args],
            env=guest.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        self._shown, self._said = bytearray(), bytearray()
        self._pumps = [
            pump_into(self._shown, self.process.stdout.fileno()),
            pump_into(self._said, self.process.stderr.fileno()),
        ]

    def wait_for(self, end: bytes) -> None:
        wait_until(lambda: end in self._shown or self.process.poll() is not None)
        if self.process.poll() is not None:
            self._join_pumps()
        assert end in self._shown, (end, bytes(self._shown), bytes(self._said))

    def type(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def wait(self) -> str:
        """All that it has shown, to its end."""
        assert self.process.stdin is not None
        self.process.wait(HANG_SECONDS)
        self._join_pumps()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return text(self._shown)

    def _join_pumps(self) -> None:
        for pump in self._pumps:
            pump.join(HANG_SECONDS)


def boot_and_watch(folder: Path) -> Seen:
    files = artifacts("6.1")
    disk = f"{files.rootfs},readonly"
    options = ["--detach", "--log-format=json"]
    guest = Detached(files.vmlinux, files.initramfs, [disk], options=options)
    guest.log = folder / "log"
    guest.start()
    started = guest.process.wait(HANG_SECONDS), guest.name()
    console, events = Looking(guest, "console", "vm"), Looking(guest, "events", "vm")
    console.wait_for(b"# ")
    later = Looking(guest, "console", "vm", "--read-only")
    later.wait_for(b"# ")
    events.wait_for(b"\n")
    console.type(b"echo typed-$((6 * 7))\n")
    console.wait_for(b"typed-42")
    stats = guest.pyvmm("stats", "vm", "--json")
    assert stats.returncode == 0, stats.stderr + guest.log.read_text()
    top = guest.pyvmm("top", "vm", "--once").stdout
    console.type(b"echo c > /proc/sysrq-trigger\n")
    seen, told, later_saw = console.wait(), events.wait(), later.wait()
    # Its streams end before its process does.
    wait_until(lambda: len(guest.pyvmm("ps").stdout.splitlines()) == 1)
    left = guest.pyvmm("ps").stdout
    guest.wait()
    return Seen(
        started=started,
        console=seen,
        console_code=console.process.returncode,
        later_console=later_saw,
        events=[json.loads(line) for line in told.splitlines()],
        log=[json.loads(line) for line in guest.log.read_text().splitlines()],
        stats=json.loads(stats.stdout),
        top=top,
        left=left,
    )


watched = pytest.mark.boot.with_args(boot_and_watch)


@watched
def test_a_detached_guest_runs_on_and_says_its_name(boot: Seen) -> None:
    assert boot.started == (0, "vm\n"), boot
    assert boot.left.split() == ["NAME", "PID", "STATE", "CPUS", "MEMORY", "UPTIME"]


@watched
def test_its_console_is_joined_from_elsewhere(boot: Seen) -> None:
    assert boot.console_code == 0
    for seen in (boot.console, boot.later_console):
        # What was before, what came of what was typed, and the last words.
        assert "# " in seen.partition("typed-42")[0]
        assert "typed-42" in seen
        assert "sysrq: Trigger a crash" in seen


@watched
def test_its_events_tell_of_the_panic_and_the_end(boot: Seen) -> None:
    assert [event["event"] for event in boot.events] == ["started", "panic", "ended"]
    panic, ended = boot.events[1:]
    assert "sysrq triggered crash" in str(panic["message"])
    assert (ended["ending"], ended["exit_code"]) == ("panic", 11)


@watched
def test_its_messages_are_json_wherever_it_runs(boot: Seen) -> None:
    last = boot.log[-1]
    assert (last["vm"], last["level"], last["exit_code"]) == ("vm", "error", 11)
    assert last["ending"] == "panic"
    [finding] = [record for record in boot.log if record.get("finding") == "panic"]
    assert "sysrq triggered crash" in str(finding["message"])
    for record in boot.log:
        assert {"time", "level", "message"} <= set(record)


@watched
def test_exits_and_requests_are_counted(boot: Seen) -> None:
    exits, disk = boot.stats["exits"], boot.stats["devices"]["disk0"]
    # The console alone costs an exit for each byte that it had shown by then.
    assert exits["io"] > len(boot.console.partition("typed-42")[0])
    # Each interrupt of the disk costs two accesses to its registers.
    assert exits["mmio"] >= 2 * disk["interrupts"]
    assert exits["total"] >= exits["io"] + exits["mmio"]
    assert boot.stats["interrupts"] > disk["interrupts"] > 0
    assert disk["requests"] >= disk["kicks"] > 0
    assert disk["bytes_to_guest"] > 1 << 20  # its root file system
    assert sum(disk["queues"][0]["latency_ns"].values()) == disk["requests"]
    assert "disk0" in boot.top and "per second" in boot.top


@dataclass(frozen=True)
class Killed:
    """The files of a `pyvmm run` before kill -9, and those left when `pyvmm ps` had looked."""

    socket_before: bool
    processes_before: list[str]
    processes_left: list[str]
    ps: str
    socket_left: bool
    runtime_left: list[str]


def boot_and_kill(folder: Path) -> Killed:
    files = artifacts("6.1")
    vsock = folder / "vsock"
    disk = f"{files.rootfs},snapshot"
    options = ["--vsock", f"path={vsock}"]
    guest = Guest(files.vmlinux, files.initramfs, [disk], options=options)
    guest.start()
    assert wait_until(lambda: "running" in guest.pyvmm("ps").stdout and vsock.is_socket())
    processes = [str(pid) for pid in children(guest.process.pid)]
    before = vsock.is_socket()
    guest.send_signal(signal.SIGKILL)
    guest.process.wait(HANG_SECONDS)
    wait_until(lambda: not any(Path("/proc", pid).exists() for pid in processes))
    ps = guest.pyvmm("ps").stdout
    runtime = sorted(file.name for file in Path(guest.runtime.name, "pyvmm").iterdir())
    left = [pid for pid in processes if Path("/proc", pid).exists()]
    killed = Killed(before, processes, left, ps, vsock.exists(), runtime)
    guest.kill()
    return killed


@pytest.mark.boot.with_args(boot_and_kill)
def test_kill_9_leaves_neither_processes_nor_sockets(boot: Killed) -> None:
    assert boot.socket_before
    if why_unusable() is not None:
        assert boot.processes_before  # the emulated host's QEMU
    assert boot.processes_left == []
    assert boot.ps.split() == ["NAME", "PID", "STATE", "CPUS", "MEMORY", "UPTIME"]
    assert not boot.socket_left
    assert boot.runtime_left == [".lock", "logs"]  # what it said can be read still
