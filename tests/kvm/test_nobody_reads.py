"""Nobody reads what a VM says: no vCPU, device or control request waits for that, on real KVM."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from boot_images import Elf, Load
from running import SAFETY_TIMEOUT

from pyvmm.control.client import Client, open_console, open_events
from pyvmm.errors import ConfigError
from pyvmm.kvm.system import Kvm

COUNTER_AT = 32 << 20
COUNT = b"\xbb" + COUNTER_AT.to_bytes(4, "little")  # mov ebx, COUNTER_AT
# again: out 0x3f8,'x'; inc dword [rbx]; jmp again
FLOOD = COUNT + bytes.fromhex("66baf803 b078 ee ff03 ebfb")
# mov ecx,0xd0000000; again: mov byte [rcx+1],1; inc dword [rbx]; jmp again: no register takes it
PROVOKE = COUNT + bytes.fromhex("b9000000d0 c6410101 ff03 ebf8")


class Guest:
    def __init__(self, folder: Path, code: bytes, *options: str) -> None:
        kernel = folder / "kernel"
        kernel.write_bytes(Elf(loads=[Load(data=code.ljust(256, b"\x90"))], note=None).build())
        (folder / "disk").write_bytes(bytes(1024))
        self.readers = {}
        writers = []
        for name in ("stdout", "stderr"):
            self.readers[name], writer = os.pipe()
            writers.append(writer)
        argv = ["run", "--kvm=host", "--name", "vm", "--kernel", str(kernel)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyvmm", *argv, "--disk", str(folder / "disk"), *options],
            stdin=subprocess.DEVNULL,
            stdout=writers[0],
            stderr=writers[1],
        )
        self.writers = dict(zip(self.readers, writers, strict=True))

    def counter(self) -> int:
        for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # one that was closed meanwhile
                if "memfd:" not in os.readlink(fd):
                    continue
                with open(fd, "rb") as memory:
                    return int.from_bytes(os.pread(memory.fileno(), 4, COUNTER_AT), "little")
        assert self.process.poll() is None
        return 0  # it starts still

    def check_that_it_runs_and_obeys(self) -> dict[str, int]:
        """The guest makes progress, and the control socket answers; what was left out."""
        before = self.counter()
        deadline = time.monotonic() + SAFETY_TIMEOUT
        while self.counter() < before + 100:
            assert time.monotonic() < deadline, "the guest stands still"
            time.sleep(0.01)
        with Client.connect("vm") as vm:
            assert vm.call("pause") == {"state": "paused"}
            before = self.counter()
            time.sleep(0.05)
            assert self.counter() == before
            assert vm.call("resume") == {"state": "running"}
            left_out: dict[str, int] = vm.call("stats")["left_out"]
            assert 'messages_left_out_total{vm="vm"}' in vm.call("metrics")["text"]
            vm.call("stop")
        assert self.process.wait(SAFETY_TIMEOUT) == 143
        return left_out

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for fd in (*self.readers.values(), *self.writers.values()):
            os.close(fd)


@pytest.fixture
def start(kvm: Kvm, tmp_path: Path, monkeypatch) -> Iterator[Callable[..., Guest]]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    started: list[Guest] = []

    def run(code: bytes, *options: str) -> Guest:
        started.append(Guest(tmp_path, code, *options))
        return started[-1]

    yield run
    for guest in started:
        guest.close()


def test_w1_messages_that_nobody_reads(start) -> None:
    guest = start(PROVOKE)
    while guest.counter() < 100:
        time.sleep(0.01)
    fill(guest.writers["stderr"])
    assert guest.check_that_it_runs_and_obeys()["console_bytes"] == 0


def fill(pipe: int) -> None:
    """By whoever else writes there."""
    os.set_blocking(pipe, False)
    try:
        while True:
            os.write(pipe, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(pipe, True)


def test_w2_a_console_that_nobody_reads(start) -> None:
    """A vCPU that waited would stand still when its buffer, of 64 KiB, is full."""
    guest = start(FLOOD)
    fill(guest.writers["stdout"])
    while guest.counter() < 140_000:
        time.sleep(0.1)
    guest.check_that_it_runs_and_obeys()


def test_w3_a_trace_that_nobody_reads(start) -> None:
    guest = start(PROVOKE, "--trace", "all")
    while True:
        with suppress(ConfigError), Client.connect("vm") as vm:
            if vm.call("stats")["left_out"]["messages"]:
                break
        time.sleep(0.1)
    assert guest.check_that_it_runs_and_obeys()["messages"] > 0


def test_w4_clients_that_do_not_read(start) -> None:
    guest = start(FLOOD)
    fill(guest.writers["stdout"])
    while not guest.counter():
        time.sleep(0.01)
    clients = [open_console("vm"), open_events("vm"), open_console("vm", input=False)]
    guest.check_that_it_runs_and_obeys()
    for client in clients:
        client.close()


def test_w5_warnings_without_end(start) -> None:
    guest = start(PROVOKE)
    guest.check_that_it_runs_and_obeys()
    os.close(guest.writers["stderr"])
    guest.writers["stderr"] = os.dup(1)
    text = b""
    while data := os.read(guest.readers["stderr"], 1 << 16):
        text += data
    assert b"1-byte write of 0x1 at 0x1 ignored" in text
    assert text.count(b"\n") < 60
