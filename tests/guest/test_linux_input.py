"""A keyboard that is a user's Python file types on the guest's console."""

from __future__ import annotations

from pathlib import Path

import pytest
from disks import artifacts, root_disk
from guest import Guest, GuestResult

pytestmark = pytest.mark.usefixtures("linux_guests")

ROOT = Path(__file__).resolve().parents[2]
TEXT = "all work and no play"

# The first line may have begun before somebody read it.
SCRIPT = """\
set -e
sed -n 's/^N: Name="\\(.*\\)"/name=\\1/p' /proc/bus/input/devices
echo "line=$(timeout 60 head -n 2 /dev/tty1 | tail -n 1)"
"""


def boot_keyboard(folder: Path) -> GuestResult:
    files = artifacts("6.1")
    with root_disk(folder) as disk:
        guest = Guest(
            files.bzimage,
            files.initramfs,
            [str(disk)],
            options=["--device", f"{ROOT}/examples/keyboard.py:Keyboard,text={TEXT}"],
        )
        return guest.run(SCRIPT, folder=folder).check()


@pytest.mark.boot.with_args(boot_keyboard)
def test_linux_reads_what_the_keyboard_types(boot):
    assert "name=pyvmm keyboard" in boot.console.splitlines()
    assert boot.value("line") == TEXT
