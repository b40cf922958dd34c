"""Saved and restored, again and again, each time as another process: nothing is lost, and no clock
goes backwards. SNAPSHOT_ROUNDS says how often, for each kind of machine."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from c_guest import c_guest
from test_snapshots import SAFETY_TIMEOUT, Guest, folder, pyvmm

__all__ = ["folder"]  # a fixture

ROUNDS = int(os.environ.get("SNAPSHOT_ROUNDS", "2"))
ALL = [(transport, cpus) for cpus in (2, 4, 1) for transport in ("mmio", "pci")]
CHOSEN = ALL if "SNAPSHOT_ROUNDS" in os.environ else [("mmio", 1), ("pci", 4)]


def report(guest: Guest) -> tuple[int, int, list[int]]:
    """The guest's progress: its rounds, its timer's ticks, what its other vCPUs count. It has
    lost nothing, and its clocks have gone on."""
    guest.said = b""
    guest.hears(b"s")
    guest.says(b".\n")
    right = rb"rounds=(\d+) lost=0 failed=0 backwards=0 ticks=(\d+)((?: \d+/0){7})\."
    found = re.search(right, guest.said)
    assert found, guest.said
    others = [int(one.partition(b"/")[0]) for one in found[3].split()]
    return int(found[1]), int(found[2]), others


def goes_on(guest: Guest, cpus: int) -> tuple[int, int, list[int]]:
    """All of the guest moves; where it is now."""
    before = report(guest)
    end = time.monotonic() + SAFETY_TIMEOUT
    while True:
        now = report(guest)
        others = zip(before[2][: cpus - 1], now[2], strict=False)
        if now[0] > before[0] + 5 and now[1] > before[1] and all(a != b for a, b in others):
            return now
        assert time.monotonic() < end, (before, now)


@pytest.mark.parametrize(("transport", "cpus"), CHOSEN)
def test_nothing_is_lost_in_many_rounds(folder: Path, transport: str, cpus: int) -> None:
    kernel, disk = c_guest("busy_guest.c", folder, "DISK"), f"{folder}/disk,snapshot"
    options = ("--kernel", kernel, "--disk", disk, "--memory", "64M", "--transport", transport)
    before: tuple[int, int, list[int]] = (0, 0, [])
    started = ("--name", "r0", "--cpus", str(cpus), *options)
    for number in range(ROUNDS + 1):
        with Guest(*started) as guest:
            if not number:
                guest.says(b"ready")
            now = goes_on(guest, cpus)
            assert now[0] > before[0] and now[1] > before[1], (number, before, now)
            before = now
            if number == ROUNDS:
                guest.off()
                return
            # Each other one is of what has changed, of the one that this VM began with.
            below = ("--diff-of", f"s{number - 1}") if number % 2 else ()
            taken = pyvmm("snapshot", f"r{number}", f"s{number}", "--stop", *below)
            assert taken.returncode == 0, (number, taken.stderr)
            _, errors = guest.process.communicate(timeout=SAFETY_TIMEOUT)
            assert guest.process.returncode == 143, (number, errors)
        if number:
            assert pyvmm("snapshot", "rm", f"s{number - 1}").returncode == 0
        started = ("--restore", f"s{number}", "--name", f"r{number + 1}")
