"""`pyvmm ps`, `pause`, `resume` and `stop` on a guest that counts in its memory, on real KVM."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import SAFETY_TIMEOUT, Running

from pyvmm.kvm.system import Kvm

COUNTER_AT = 32 << 20
# mov ebx, COUNTER_AT; again: inc dword [rbx]; jmp again
COUNT = b"\xbb" + COUNTER_AT.to_bytes(4, "little") + bytes.fromhex("ff03 ebfc")


class Counting(Running):
    """The guest counts in its memory."""

    def counter(self) -> int:
        """What the guest's memory says, read past the monitor."""
        for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
            if "memfd:" in os.readlink(fd):
                with open(fd, "rb") as memory:
                    return int.from_bytes(os.pread(memory.fileno(), 4, COUNTER_AT), "little")
        raise AssertionError("the monitor has no guest memory")

    def wait_for_progress(self) -> None:
        before = self.counter()
        deadline = time.monotonic() + SAFETY_TIMEOUT
        while self.counter() == before:
            assert time.monotonic() < deadline, "the guest stands still"
            time.sleep(0.005)


@pytest.fixture
def vm(kvm: Kvm, tmp_path: Path) -> Iterator[Counting]:
    with Counting(tmp_path, "counting", COUNT) as running:
        yield running


def test_no_memory_changes_while_it_is_paused(vm: Counting) -> None:
    vm.wait_for_progress()
    for _ in range(2):
        assert vm("pause", "counting").returncode == 0
        assert [row["state"] for row in vm.ps()] == ["paused"]
        before = vm.counter()
        time.sleep(0.1)
        assert vm.counter() == before
        assert vm("resume", "counting").returncode == 0
        vm.wait_for_progress()
    assert [row["state"] for row in vm.ps()] == ["running"]


@pytest.mark.parametrize("paused", [False, True])
def test_stop_returns_when_it_has_ended(vm: Counting, paused: bool) -> None:
    if paused:
        assert vm("pause", "counting").returncode == 0
    done = vm("stop", "counting")
    assert (done.returncode, done.stderr) == (0, "")
    assert vm.process.poll() == 143
    assert vm.process.stderr.read() == b"pyvmm: counting: ended by pyvmm stop\n"  # type: ignore[union-attr]
    assert vm.ps() == []
    again = vm("stop", "counting")
    assert again.returncode == 2
    assert again.stderr.startswith("pyvmm: no VM called 'counting' is running")


def test_ps_shows_a_row_for_each(vm: Counting) -> None:
    lines = vm("ps").stdout.splitlines()
    assert lines[0].split() == ["NAME", "PID", "STATE", "CPUS", "MEMORY", "UPTIME"]
    assert lines[1].split()[:5] == ["counting", str(vm.process.pid), "running", "1", "512M"]
    other = vm.start("run", "--kvm=host", "--kernel", "/nowhere", "--name", "counting")
    assert other.stderr is not None
    assert b"a VM called 'counting' is running" in other.stderr.read()
    other.stderr.close()
    assert other.wait() == 2


def test_a_killed_vm_leaves_no_trace_in_ps(vm: Counting) -> None:
    vm.process.kill()
    vm.process.wait()
    assert vm.ps() == []
