"""A guest that asks for a reset starts again, with the same sockets and console; loops end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from boot_images import Elf, Load
from echo_guest import echo_kernel, faulting_kernel
from running import SAFETY_TIMEOUT

from pyvmm.control.client import Client, events, open_console
from pyvmm.kvm.system import Kvm

# mov dx,0x3f8; mov al,"x"; out dx,al; mov al,0xfe; out 0x64,al; jmp back
RESETS = bytes.fromhex("66baf803 b078 ee b0fe e664 ebfa")
# In memory at 32 MiB: if it is 0, make it 1, say 'r' and reset; else say 'M' and power off.
REMEMBERS = bytes.fromhex(
    # mov ebx,0x2000000; cmp dword [rbx],0; jne old; inc dword [rbx]; mov dx,0x3f8
    "bb00000002 833b00 750f ff03 66baf803"
    # mov al,'r'; out dx,al; mov al,0xfe; out 0x64,al; jmp $
    "b072 ee b0fe e664 ebfe"
)


class Guest:
    """A `pyvmm run` of a kernel, its console in `text`."""

    def __init__(self, folder: Path, kernel: str, *options: str) -> None:
        os.environ["XDG_RUNTIME_DIR"] = str(folder)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyvmm", "run", "--kvm=host", "--kernel", kernel, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.text = b""

    def read_until(self, text: bytes, count: int = 1) -> None:
        assert self.process.stdout is not None
        deadline = time.monotonic() + SAFETY_TIMEOUT
        while self.text.count(text) < count:
            ready = select.select([self.process.stdout], [], [], deadline - time.monotonic())[0]
            assert ready, self.text
            data = os.read(self.process.stdout.fileno(), 4096)
            assert data, (self.text, self.process.stderr.read())  # type: ignore[union-attr]
            self.text += data

    def type(self, text: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def wait(self) -> tuple[int, str]:
        """The exit code and the messages."""
        out, messages = self.process.communicate(timeout=SAFETY_TIMEOUT)
        self.text += out
        return self.process.returncode, messages.decode()


@pytest.fixture
def start(kvm: Kvm, tmp_path: Path, monkeypatch) -> Iterator[object]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    started: list[Guest] = []

    def run(kernel: str, *options: str) -> Guest:
        started.append(Guest(tmp_path, kernel, *options))
        return started[-1]

    yield run
    for guest in started:
        guest.process.kill()
        guest.process.communicate()


def kernel_of(code: bytes, folder: Path) -> str:
    (folder / "kernel").write_bytes(
        Elf(loads=[Load(data=code.ljust(256, b"\x90"))], note=None).build()
    )
    return str(folder / "kernel")


def test_it_starts_again_and_everything_around_it_stays(start, tmp_path) -> None:
    guest = start(echo_kernel(tmp_path), "--name", "web", "--vsock", f"path={tmp_path / 'vsock'}")
    guest.read_until(b"ready\r\n")
    heard: list[dict[str, object]] = []
    listening = threading.Thread(target=lambda: heard.extend(events("web")))
    listening.start()
    console = open_console("web", history=False)
    vsock = (tmp_path / "vsock").stat().st_ino
    with Client.connect("web") as vm:
        assert vm.call("status")["restarts"] == 0
        guest.type(b"R")
        guest.read_until(b"ready", 2)
        assert vm.call("status")["restarts"] == 1
        assert vm.call("stats")["exits"]["total"] > 0
        assert vm.call("pause") == {"state": "paused"}
        assert vm.call("resume") == {"state": "running"}
    guest.type(b"x")
    guest.read_until(b"x")
    assert (tmp_path / "vsock").stat().st_ino == vsock
    console.setblocking(True)
    seen = b""
    while not seen.endswith(b"x"):
        seen += console.recv(100)
    assert seen == b"ready\r\nx"
    console.send(b"O")
    code, messages = guest.wait()
    assert (code, messages) == (0, "pyvmm: web: the guest asked for a reset, and starts again\n")
    listening.join(SAFETY_TIMEOUT)
    kinds = [event["event"] for event in heard]
    assert kinds == ["started", "restarted", "paused", "resumed", "ended"]
    console.close()


def test_its_memory_is_fresh(start, tmp_path) -> None:
    """The second start finds 0 where the first has put 1, and so does the third; that is the end,
    as a guest without any driver gets nowhere."""
    guest = start(kernel_of(REMEMBERS, tmp_path))
    code, messages = guest.wait()
    assert guest.text == b"rrr"
    assert code == 10
    assert "asked for a reset 3 times before any driver of it was up" in messages


def test_memory_does_not_grow_with_each_start(start, tmp_path) -> None:
    guest = start(echo_kernel(tmp_path), "--memory", "64M")
    guest.read_until(b"ready")

    def counts() -> tuple[int, int]:
        folder = Path(f"/proc/{guest.process.pid}")
        maps = (folder / "maps").read_text()
        return len(list((folder / "fd").iterdir())), maps.count("pyvmm-guest-ram")

    guest.type(b"R")
    guest.read_until(b"ready", 2)
    before = counts()
    guest.type(b"R")
    guest.read_until(b"ready", 3)
    deadline = time.monotonic() + SAFETY_TIMEOUT
    while (now := counts()) != before:
        assert time.monotonic() < deadline, (now, before)
        time.sleep(0.01)
    assert before[1] == 1


@pytest.mark.parametrize("option", ["end", "restart"])
def test_a_guest_that_only_resets_ends(start, tmp_path, option) -> None:
    guest = start(kernel_of(RESETS, tmp_path), "--on-reboot", option)
    code, messages = guest.wait()
    assert code == 10
    lines = messages.splitlines()
    if option == "end":
        assert lines == ["pyvmm: vm: the guest asked for a reset"]
    else:
        assert lines[:2] == ["pyvmm: vm: the guest asked for a reset, and starts again"] * 2
        assert lines[2].endswith("before any driver of it was up, and is not started again")
        assert len(lines) == 3


def test_a_panic_ends_it_though_it_resets(start, tmp_path) -> None:
    guest = start(echo_kernel(tmp_path))
    guest.read_until(b"ready")
    guest.type(b"P")
    code, messages = guest.wait()
    assert code == 11
    assert guest.text.count(b"ready") == 1
    assert messages == "pyvmm: vm: the guest's kernel panicked: asked for\n"


def test_a_triple_fault_ends_it(start, tmp_path) -> None:
    code, messages = start(faulting_kernel(tmp_path)).wait()
    assert code == 12
    assert "starts again" not in messages


def test_a_kernel_that_is_gone_is_told(start, tmp_path) -> None:
    kernel = echo_kernel(tmp_path)
    guest = start(kernel)
    guest.read_until(b"ready")
    os.unlink(kernel)
    guest.type(b"R")
    code, messages = guest.wait()
    assert code == 1
    assert "the guest cannot be started again" in messages and "echo" in messages


def test_a_signal_between_two_starts_ends_it(start, tmp_path) -> None:
    guest = start(echo_kernel(tmp_path))
    for count in range(1, 4):
        guest.read_until(b"ready", count)
        if count < 3:
            guest.type(b"R")
    guest.process.send_signal(signal.SIGTERM)
    assert guest.wait()[0] == 143
