"""A Linux guest is looked after by other commands: ps, pause, resume, stop, wherever it runs."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from disks import fsck, root_disk
from guest import HANG_SECONDS, PYVMM
from vms import debian, messages

from pyvmm import VM, CommandTimeout, Disk

pytestmark = pytest.mark.usefixtures("linux_guests")

NAME = f"control-{os.getpid()}"

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


def pyvmm(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PYVMM, *args], capture_output=True, text=True, timeout=HANG_SECONDS)


def ps() -> list[dict[str, Any]]:
    """The guest's line in `pyvmm ps`."""
    return [row for row in json.loads(pyvmm("ps", "--json").stdout) if row["name"] == NAME]


def test_a_guest_is_looked_after(microvm_factory, tmp_path):
    with root_disk(tmp_path) as root, ThreadPoolExecutor() as pool:
        options = debian() | {"disks": Disk(str(root), id="system"), "cpus": 2, "name": NAME}
        booting = pool.submit(microvm_factory, **options)
        starting = []
        while not starting:
            has_booted = booting.done()
            starting = ps()
            assert starting or not has_booted
        vm = booting.result()
        check_it_is_listed(vm, starting)
        check_it_is_paused(vm)
        stopped = pyvmm("stop", f"--timeout={HANG_SECONDS}", NAME)
        assert (stopped.returncode, stopped.stderr) == (0, "")
        assert ps() == []
        assert vm.wait(HANG_SECONDS).exit_code == 0
        assert messages(vm) == [f"{NAME}: asked the guest to power off, by its agent"]
        assert fsck(root) == ""


def check_it_is_listed(vm: VM, starting: list[dict[str, Any]]) -> None:
    [running] = ps()
    assert running["state"] == "running"
    assert running["pid"] == starting[0]["pid"] == vm.pid
    assert (running["cpus"], running["memory"]) == (2, 256 << 20)
    [disk] = running["disks"]
    assert (disk["id"], disk["read_only"]) == ("system", False)


def check_it_is_paused(vm: VM) -> None:
    with vm.popen(["sh", "-c", SCRIPT]) as command:
        said = b""
        while b"tick 3\n" not in said:
            piece = command.read(HANG_SECONDS)
            assert piece is not None, said
            said += piece[1]
        assert pyvmm("pause", NAME).returncode == 0
        assert [row["state"] for row in ps()] == ["paused"]
        with pytest.raises(CommandTimeout):
            for _ in range(100):  # what was on its way still comes
                command.read(timeout=2)
        assert pyvmm("resume", NAME).returncode == 0
        assert b"tick" in command.read(HANG_SECONDS)[1]
    # Its clock went on, and its watchdogs do not take that for a lockup.
    assert b"soft lockup" not in vm.run(["dmesg"]).stdout
