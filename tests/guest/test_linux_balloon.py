"""Linux's own virtio_balloon driver: memory that it gives back is the host's again."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from disks import artifacts
from guest import HANG_SECONDS, Guest, GuestResult, wait_until

from pyvmm.control import protocol

pytestmark = pytest.mark.usefixtures("linux_guests")

KERNELS = ("6.1", "6.12")
MIB = 1 << 20
FILL = 96 * MIB
WANTED = 64 * MIB
TOO_MUCH = 112 * MIB

# Each `turn` waits until the host says so, by a port, since it has to look between the steps.
SCRIPT = f"""\
set -e
cd /dev/shm
mount -o remount,size=90% /dev/shm
for file in /sys/class/virtio-ports/*/name; do
    port=/dev/$(basename $(dirname $file))
done
exec 5<> $port
turn() {{ echo "$1" >&5; read -r line <&5; }}
head -c {FILL} /dev/urandom > fill
turn filled
rm fill
turn removed
turn inflated
head -c {FILL} /dev/urandom > fill
sum=$(sha256sum < fill)
turn refilled
[ "$sum" = "$(sha256sum < fill)" ] && echo "kept=yes"
rm fill
turn squeezed
# A little more than there is: far beyond that, a kernel pages its programs in and out for minutes.
available=$(sed -n 's/^MemAvailable: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)
bytes=$(((available + 8192) * 1024))
head -c $bytes /dev/zero > fill
echo "missing=$((bytes - $(stat -c %s fill)))"
turn done
"""


@dataclass
class Run:
    """What `balloon.stats` said at each step."""

    result: GuestResult
    filled: dict[str, Any]
    removed: dict[str, Any]
    inflated: dict[str, Any]
    deflated: dict[str, Any]
    squeezed: dict[str, Any]
    relieved: dict[str, Any]
    shown: str


class Control:
    """The guest's control socket."""

    def __init__(self, guest: Guest) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(HANG_SECONDS)
        self._socket.connect(f"{guest.runtime.name}/pyvmm/vm.sock")
        self._lines = self._socket.makefile("rb")

    def stats(self) -> dict[str, Any]:
        self._socket.sendall(protocol.request_line(1, "balloon.stats", {}))
        answer = json.loads(self._lines.readline())
        found: dict[str, Any] = answer["result"]
        return found

    def until(self, what: str, condition: Any) -> dict[str, Any]:
        """The first statistics that fulfil `condition`."""
        seen: list[dict[str, Any]] = []

        def look() -> bool:
            seen.append(self.stats())
            return bool(condition(seen[-1]))

        if not wait_until(look):
            pytest.fail(f"never {what}: {seen[-1]}")
        return seen[-1]


def talk(folder: Path, kernel: str) -> Run:
    made = artifacts(kernel)
    path = folder / "turns"
    guest = Guest(
        made.vmlinux,
        made.initramfs,
        [f"{made.rootfs},readonly"],
        options=[
            *("--balloon", "free-page-reporting,deflate-on-oom"),
            *("--port", f"name=turns,path={path}"),
        ],
    )
    guest.start(SCRIPT, folder=folder)
    with socket.socket(socket.AF_UNIX) as port:
        port.settimeout(HANG_SECONDS)
        wait_until(path.exists)
        port.connect(str(path))
        turns = port.makefile("rb")

        def expect(word: str) -> None:
            assert turns.readline().decode().strip() == word

        def go_on() -> None:
            port.sendall(b"go\n")

        expect("filled")
        control = Control(guest)
        filled = control.stats()
        go_on()
        expect("removed")
        goal = filled["resident"] - FILL // 2
        removed = control.until("reported", lambda stats: stats["resident"] < goal)
        guest.pyvmm("balloon", "vm", "64M").check_returncode()
        inflated = control.until("inflated", lambda stats: stats["actual"] == WANTED)
        go_on()
        expect("inflated")
        shown = guest.pyvmm("balloon", "vm").stdout
        guest.pyvmm("balloon", "vm", "0").check_returncode()
        deflated = control.until("deflated", lambda stats: stats["actual"] == 0)
        go_on()
        expect("refilled")
        go_on()
        expect("squeezed")
        guest.pyvmm("balloon", "vm", "112M").check_returncode()
        squeezed = control.until("squeezed", lambda stats: stats["actual"] >= TOO_MUCH * 9 // 10)
        guest.pyvmm("balloon", "vm", str(squeezed["actual"] // MIB))
        go_on()
        expect("done")
        relieved = control.stats()
        go_on()
        result = guest.wait()
    return Run(result, filled, removed, inflated, deflated, squeezed, relieved, shown)


@pytest.mark.parametrize(
    "kernel", [pytest.param(k, marks=pytest.mark.boot.with_args(talk, k)) for k in KERNELS]
)
def test_memory_comes_back(boot: Run, kernel: str) -> None:
    result = boot.result.check()
    assert boot.filled["resident"] > FILL
    # Free page reporting: what the guest freed is the host's, though nobody asked.
    assert boot.removed["resident"] < boot.filled["resident"] - FILL // 2
    assert boot.removed["target"] == boot.removed["actual"] == 0
    # The balloon took what was asked for, and gave it back whole.
    assert boot.inflated["given_back"] >= boot.removed["given_back"] + WANTED
    assert boot.deflated["actual"] == 0
    assert result.value("kept") == "yes", "memory that was in the balloon holds data"
    # Out of memory, the guest helps itself, and goes on.
    assert boot.relieved["taken_back"] > boot.squeezed["taken_back"]
    assert result.value("missing") == "0"


@pytest.mark.parametrize(
    "kernel", [pytest.param(k, marks=pytest.mark.boot.with_args(talk, k)) for k in KERNELS]
)
def test_the_guests_own_statistics(boot: Run, kernel: str) -> None:
    memory = boot.inflated["memory"]
    assert 128 * MIB < memory["total"] < 256 * MIB
    assert 0 < memory["free"] < memory["total"]
    assert 0 < memory["available"] < memory["total"]
    assert memory["major_faults"] > 0
    assert re.search(r"^actual +64M$", boot.shown, re.MULTILINE), boot.shown
    assert re.search(r"^total +\d+M$", boot.shown, re.MULTILINE), boot.shown
