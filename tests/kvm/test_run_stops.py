"""`pyvmm run` on this machine's KVM is ended by a signal, whatever its vCPU waits for."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from boot_images import Elf, Load

from pyvmm.kvm.system import Kvm

SAFETY_TIMEOUT = 60

# mov dx, 0x3f8; mov al, 'x'; again: out dx, al; jmp again
FLOOD = bytes.fromhex("66baf803 b078 ee ebfd")
# mov ebx, 0xd0000000; again: mov eax, [rbx]; jmp again
READ_MAGIC = bytes.fromhex("bb000000d0 8b03 ebfc")


@pytest.fixture
def start(kvm: Kvm, tmp_path: Path) -> Iterator[object]:
    """Starts pyvmm with a kernel of that machine code."""
    started: list[subprocess.Popen[bytes]] = []

    def run(code: bytes, *args: str, **streams: object) -> subprocess.Popen[bytes]:
        kernel = tmp_path / "kernel"
        load = Load(data=code.ljust(256, b"\x90"))
        kernel.write_bytes(Elf(loads=[load], note=None).build())
        (tmp_path / "disk").write_bytes(bytes(512))
        command = [sys.executable, "-m", "pyvmm", "run", "--kvm", "host", "--kernel", str(kernel)]
        command += ["--disk", str(tmp_path / "disk"), *args]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        # A place of its own for its control socket: so it is called vm, whatever else runs.
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, **streams)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def wait_until_full(pipe: int) -> None:
    """Until the pipe at `pipe` takes no more, as its readers do nothing."""
    poller = select.poll()
    poller.register(pipe, select.POLLOUT)
    while poller.poll(0):
        select.select([], [], [], 0.01)


def test_a_guest_that_floods_a_console_nobody_reads(start) -> None:
    reader, writer = os.pipe()
    process = start(FLOOD, stdout=writer)
    wait_until_full(writer)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SAFETY_TIMEOUT) == 143
    assert process.stderr.read() == (
        b"pyvmm: vm: terminated: nobody in the guest can be asked, so its power was cut\n"
    )
    os.close(reader)
    os.close(writer)


def test_a_trace_that_nobody_reads_takes_a_second_signal(start) -> None:
    reader, writer = os.pipe()
    process = start(READ_MAGIC, "--trace", "all", stdout=subprocess.DEVNULL, stderr=writer)
    wait_until_full(writer)
    code = None
    while code is None:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(1)
        except subprocess.TimeoutExpired:
            continue
    # By the signal, or in good order if the trace had its room after all: 143 to a shell.
    assert code in (-signal.SIGTERM, 128 + signal.SIGTERM)
    os.close(reader)
    os.close(writer)


def test_a_trace_whose_disk_is_full_does_not_hurt_the_guest(start) -> None:
    process = start(READ_MAGIC, "--trace", "all", "--trace-file", "/dev/full")
    line = process.stderr.readline()
    assert line == b"pyvmm: the trace ends here: No space left on device\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(SAFETY_TIMEOUT) == 130
    assert process.stderr.read() == (
        b"pyvmm: vm: interrupted: nobody in the guest can be asked, so its power was cut\n"
    )
