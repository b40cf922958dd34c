"""`pyvmm ps`, `pause`, `resume` and `stop` on a guest that counts in its memory, on real KVM."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from running import SAFETY_TIMEOUT, Running

from pyvmm.kvm.system import Kvm

COUNTER_AT = 32 << 20
# mov ebx, COUNTER_AT; again: inc dword [rbx]; jmp again
COUNT = b"\xbb" + COUNTER_AT.to_bytes(4, "little") + bytes.fromhex("ff03 ebfc")


LEFT = [".lock", "logs"]  # how it ended is remembered


class Counting(Running):
    """The guest counts in its memory."""

    def counter(self) -> int:
        """The guest's memory, read past the monitor."""
        for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # one that was closed meanwhile
                if "memfd:" not in os.readlink(fd):
                    continue
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
    cut = "nobody in the guest can be asked, so its power was cut"
    line = f"pyvmm: counting: ended by pyvmm stop: {cut}\n"
    assert (done.returncode, done.stderr) == (0, line)
    assert vm.process.poll() == 143
    assert vm.process.stderr.read() == line.encode()  # type: ignore[union-attr]
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


def test_what_a_killed_vm_has_left_is_removed(kvm: Kvm, tmp_path: Path) -> None:
    """Its sockets and its control socket, by whoever looks next; not what is another's by then."""
    vsock, port, taken = (tmp_path / name for name in ("vsock", "a port", "taken"))
    options = ["--vsock", f"path={vsock}", "--port", f"name=a,path={port}"]
    options += ["--port", f"name=b,path={taken}"]
    with Counting(tmp_path, "killed", COUNT, *options) as vm:
        files = sorted((tmp_path / "runtime/pyvmm").iterdir())
        assert [file.name for file in files if file.name != "logs"] == [
            ".lock",
            "killed.given",
            "killed.left",
            "killed.sock",
        ]
        vm.process.kill()
        vm.process.wait()
        assert vsock.is_socket() and port.is_socket() and taken.is_socket()
        taken.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(taken))
            other.listen()
            assert vm.ps() == []
        assert not vsock.exists() and not port.exists()
        assert taken.is_socket()
        assert sorted(file.name for file in (tmp_path / "runtime/pyvmm").iterdir()) == LEFT


def test_an_end_in_order_leaves_nothing(kvm: Kvm, tmp_path: Path) -> None:
    vsock = tmp_path / "vsock"
    with Counting(tmp_path, "ended", COUNT, "--vsock", f"path={vsock}") as vm:
        assert vm("stop", "ended").returncode == 0
    assert not vsock.exists()
    assert sorted(file.name for file in (tmp_path / "runtime/pyvmm").iterdir()) == LEFT


def test_kill_9_again_and_again_accumulates_nothing(kvm: Kvm, tmp_path: Path) -> None:
    """Locks, sockets, temporary files: the next start with the same disk and names works."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    options = ["--vsock", f"path={tmp_path / 'vsock'}", "--disk", f"{tmp_path / 'disk'},id=own"]
    options += ["--disk", f"{tmp_path / 'disk2'},snapshot"]
    (tmp_path / "disk2").write_bytes(bytes(1 << 20))
    for _ in range(3):
        with Counting(tmp_path, "again", COUNT, *options, tmpdir=temporary) as vm:
            vm.process.kill()
            vm.process.wait()
    assert vm.ps() == []
    assert sorted(file.name for file in (tmp_path / "runtime/pyvmm").iterdir()) == LEFT
    assert list(temporary.iterdir()) == []
