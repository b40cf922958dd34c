"""`pyvmm ps`, `pause`, `resume` and `stop` on a guest that counts in its memory, on real KVM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.boot_images import Elf, Load

from pyvmm.kvm.system import Kvm

SAFETY_TIMEOUT = 60

COUNTER_AT = 32 << 20
# mov ebx, COUNTER_AT; again: inc dword [rbx]; jmp again
COUNT = b"\xbb" + COUNTER_AT.to_bytes(4, "little") + bytes.fromhex("ff03 ebfc")


class Running:
    """A `pyvmm run`, and the command line that looks after it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder / "runtime")}
        kernel = folder / "kernel"
        load = Load(data=COUNT.ljust(256, b"\x90"))
        kernel.write_bytes(Elf(loads=[load], note=None).build())
        (folder / "disk").write_bytes(bytes(1024))
        self.process = self.start("run", "--kvm=host", "--kernel", str(kernel), "--name", name)
        while not self.ps():
            assert self.process.poll() is None, self.process.stderr.read()  # type: ignore[union-attr]
            time.sleep(0.01)

    def start(self, *args: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "pyvmm", *args],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def __call__(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pyvmm", *args],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=SAFETY_TIMEOUT,
        )

    def ps(self) -> list[dict[str, object]]:
        done = self("ps", "--json")
        assert done.returncode == 0, done.stderr
        found: list[dict[str, object]] = json.loads(done.stdout)
        return found

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
def vm(kvm: Kvm, tmp_path: Path) -> Iterator[Running]:
    (tmp_path / "runtime").mkdir(mode=0o700)
    running = Running(tmp_path, "counting")
    yield running
    running.process.kill()
    running.process.wait()
    assert running.process.stderr is not None
    running.process.stderr.close()


def test_no_memory_changes_while_it_is_paused(vm: Running) -> None:
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
def test_stop_returns_when_it_has_ended(vm: Running, paused: bool) -> None:
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


def test_ps_shows_a_row_for_each(vm: Running) -> None:
    lines = vm("ps").stdout.splitlines()
    assert lines[0].split() == ["NAME", "PID", "STATE", "CPUS", "MEMORY", "UPTIME"]
    assert lines[1].split()[:5] == ["counting", str(vm.process.pid), "running", "1", "512M"]
    other = vm.start("run", "--kvm=host", "--kernel", "/nowhere", "--name", "counting")
    assert other.stderr is not None
    assert b"a VM called 'counting' is running" in other.stderr.read()
    other.stderr.close()
    assert other.wait() == 2


def test_a_killed_vm_leaves_no_trace_in_ps(vm: Running) -> None:
    vm.process.kill()
    vm.process.wait()
    assert vm.ps() == []
