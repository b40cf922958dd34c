"""Linux's own virtio_balloon driver: memory that it gives back is the host's again."""

from __future__ import annotations

import re
import subprocess

import pytest
from guest import HANG_SECONDS, PYVMM
from vms import debian, script, until

from pyvmm import VM

pytestmark = pytest.mark.usefixtures("linux_guests")

MIB = 1 << 20
FILL = 96 * MIB
WANTED = 64 * MIB
TOO_MUCH = 112 * MIB

FILL_SCRIPT = f"""\
set -e
mount -o remount,size=90% /dev/shm
head -c {FILL} /dev/urandom > /dev/shm/fill
echo "sum=$(sha256sum < /dev/shm/fill)"
"""
# A little more than there is: far beyond that, a kernel pages its programs in and out for minutes.
OVERFILL_SCRIPT = """\
available=$(sed -n 's/^MemAvailable: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)
bytes=$(((available + 8192) * 1024))
head -c $bytes /dev/zero > /dev/shm/fill
echo "missing=$((bytes - $(stat -c %s /dev/shm/fill)))"
"""


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_memory_comes_back(kernel, microvm_factory):
    vm = microvm_factory(**debian(kernel), balloon="free-page-reporting,deflate-on-oom")
    script(vm, FILL_SCRIPT)
    filled = vm.balloon.stats()
    assert filled["resident"] > FILL
    vm.run(["rm", "/dev/shm/fill"], check=True)
    # Free page reporting: what the guest freed is the host's, though nobody asked.
    goal = filled["resident"] - FILL // 2
    removed = until("reported", vm.balloon.stats, lambda stats: stats["resident"] < goal)
    assert removed["target"] == removed["actual"] == 0
    check_inflating(vm, removed["given_back"])
    check_out_of_memory(vm)


def check_inflating(vm: VM, given_back: int) -> None:
    """The balloon takes what is asked for, and gives it back whole."""
    vm.balloon.set("64M")
    inflated = until("inflated", vm.balloon.stats, lambda stats: stats["actual"] == WANTED)
    assert inflated["given_back"] >= given_back + WANTED
    # A guest that is slow to answer leaves them out.
    told = until("told", vm.balloon.stats, lambda stats: stats.get("memory"))
    check_the_guests_own_statistics(vm, told["memory"])
    vm.balloon.set(0)
    until("deflated", vm.balloon.stats, lambda stats: stats["actual"] == 0)
    sum = script(vm, FILL_SCRIPT)["sum"]
    again = script(vm, 'echo "sum=$(sha256sum < /dev/shm/fill)"')["sum"]
    assert again == sum, "memory that was in the balloon holds data"
    vm.run(["rm", "/dev/shm/fill"], check=True)


def check_the_guests_own_statistics(vm: VM, memory: dict[str, int]) -> None:
    assert 128 * MIB < memory["total"] < 256 * MIB
    assert 0 < memory["free"] < memory["total"]
    assert 0 < memory["available"] < memory["total"]
    assert memory["major_faults"] > 0
    shown = subprocess.run(
        [*PYVMM, "balloon", vm.name], capture_output=True, text=True, timeout=HANG_SECONDS
    ).stdout
    assert re.search(r"^actual +64M$", shown, re.MULTILINE), shown
    assert re.search(r"^total +\d+M$", shown, re.MULTILINE), shown


def check_out_of_memory(vm: VM) -> None:
    """Out of memory, the guest helps itself, and goes on."""
    vm.balloon.set("112M")
    enough = TOO_MUCH * 9 // 10
    squeezed = until("squeezed", vm.balloon.stats, lambda stats: stats["actual"] >= enough)
    vm.balloon.set(squeezed["actual"] // MIB * MIB)
    assert script(vm, OVERFILL_SCRIPT)["missing"] == "0"
    assert vm.balloon.stats()["taken_back"] > squeezed["taken_back"]
