"""A keyboard that is a user's Python file types on the guest's console."""

from __future__ import annotations

from pathlib import Path

import pytest
from guest import HANG_SECONDS
from vms import debian

pytestmark = pytest.mark.usefixtures("linux_guests")

ROOT = Path(__file__).resolve().parents[2]
TEXT = "all work and no play"


def test_linux_reads_what_the_keyboard_types(microvm_factory):
    vm = microvm_factory(**debian(), devices=f"{ROOT}/examples/keyboard.py:Keyboard,text={TEXT}")
    devices = vm.run(["cat", "/proc/bus/input/devices"]).stdout.decode()
    assert 'N: Name="pyvmm keyboard"' in devices.splitlines()
    # The first line may have begun before somebody read it.
    typed = vm.run(["head", "-n", "2", "/dev/tty1"], timeout=HANG_SECONDS).stdout.decode()
    assert typed.splitlines()[1] == TEXT
