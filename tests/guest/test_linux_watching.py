"""A detached Linux guest, its console joined from elsewhere, and what is told of its end."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from disks import artifacts
from guest import HANG_SECONDS, PYVMM, Guest, text

pytestmark = pytest.mark.usefixtures("linux_guests")


@dataclass(frozen=True)
class Seen:
    """What `pyvmm run --detach` said, and those who looked from elsewhere."""

    started: tuple[int, str]
    console: str
    console_code: int
    later_console: str
    events: list[dict[str, object]]
    left: str


def read_until(process: subprocess.Popen[bytes], end: bytes) -> bytes:
    assert process.stdout is not None
    seen = b""
    while end not in seen and (more := os.read(process.stdout.fileno(), 1 << 16)):
        seen += more
    return seen


def boot_and_watch(folder: Path) -> Seen:
    files = artifacts("6.1")
    disk = f"{files.rootfs},readonly"
    guest = Guest(files.vmlinux, files.initramfs, [disk], options=["--detach"])
    guest.start()
    started = guest.process.wait(HANG_SECONDS), text(guest.console)

    def look(*args: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*PYVMM, *args],
            env=guest.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    console, events = look("console", "vm"), look("events", "vm")
    assert console.stdin is not None and console.stdout is not None
    seen = read_until(console, b"# ")
    later = look("console", "vm", "--read-only")
    console.stdin.write(b"echo typed-$((6 * 7))\n")
    console.stdin.flush()
    seen += read_until(console, b"typed-42")
    console.stdin.write(b"echo c > /proc/sysrq-trigger\n")
    rest, _ = console.communicate(timeout=HANG_SECONDS)
    told, _ = events.communicate(timeout=HANG_SECONDS)
    later_saw, _ = later.communicate(timeout=HANG_SECONDS)
    left = guest.pyvmm("ps").stdout
    guest.wait()
    return Seen(
        started=started,
        console=text(seen + rest),
        console_code=console.returncode,
        later_console=text(later_saw),
        events=[json.loads(line) for line in told.splitlines()],
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
