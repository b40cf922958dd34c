"""A Linux guest is looked after by other commands: ps, pause, resume, stop, wherever it runs."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from disks import artifacts, fsck, root_disk
from guest import Guest, GuestResult

pytestmark = pytest.mark.usefixtures("linux_guests")

# A line again and again, as long as the guest runs.
SCRIPT = """\
sync
n=0
while :; do
    n=$((n + 1))
    echo "tick $n"
    sleep 0.2
done
"""


@dataclass(frozen=True)
class LookedAfter:
    """What the commands said, and what the guest did meanwhile."""

    result: GuestResult
    starting: list[dict[str, object]]
    running: list[dict[str, object]]
    paused: list[dict[str, object]]
    ticks_while_paused: int
    stop: tuple[int, str]
    left: list[dict[str, object]]
    fsck: str


def boot_and_look_after(folder: Path) -> LookedAfter:
    files = artifacts("6.1", "minbase")
    with root_disk(folder) as disk:
        guest = Guest(files.bzimage, files.initramfs, [f"{disk},id=system"], cpus=2)
        guest.start(SCRIPT, folder=folder)

        def ps() -> list[dict[str, object]]:
            found: list[dict[str, object]] = json.loads(guest.pyvmm("ps", "--json").stdout)
            return found

        while not (starting := ps()) and guest.process.poll() is None:
            time.sleep(0.05)
        guest.wait_for("tick 3")
        running = ps()
        assert guest.pyvmm("pause", "vm").returncode == 0
        paused = ps()
        time.sleep(1)  # for what is on its way to the console
        before = guest.console.count(b"tick")
        time.sleep(2)
        ticks = guest.console.count(b"tick") - before
        assert guest.pyvmm("resume", "vm").returncode == 0
        guest.wait_for("tick", times=before + 2)
        stopped = guest.pyvmm("stop", "vm")
        left = ps()
        result = guest.wait()
        return LookedAfter(
            result=result,
            starting=starting,
            running=running,
            paused=paused,
            ticks_while_paused=ticks,
            stop=(stopped.returncode, stopped.stderr),
            left=left,
            fsck=fsck(disk),
        )


looked_after = pytest.mark.boot.with_args(boot_and_look_after)


@looked_after
def test_ps_finds_it_from_its_start_on(boot: LookedAfter) -> None:
    [starting] = boot.starting
    assert starting["name"] == "vm"
    [running] = boot.running
    assert running["state"] == "running"
    assert running["pid"] == starting["pid"]
    assert (running["cpus"], running["memory"]) == (2, 256 << 20)
    disks = running["disks"]
    assert isinstance(disks, list)
    assert [disk["id"] for disk in disks] == ["system", "script"]
    assert [disk["read_only"] for disk in disks] == [False, True]


@looked_after
def test_a_paused_guest_says_nothing_and_goes_on_later(boot: LookedAfter) -> None:
    assert [row["state"] for row in boot.paused] == ["paused"]
    assert boot.ticks_while_paused == 0
    # Its clock went on, and its watchdogs do not take that for a lockup.
    assert "soft lockup" not in boot.result.console


@looked_after
def test_stop_returns_when_it_has_ended_and_its_disk_is_whole(boot: LookedAfter) -> None:
    assert boot.stop == (0, "")
    assert boot.left == []
    assert boot.result.code == 143
    assert boot.result.messages == ["pyvmm: vm: ended by pyvmm stop"]
    assert boot.fsck == "" or "recovering journal" in boot.fsck
