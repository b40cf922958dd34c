"""`pyvmm run` with kill -9: nothing stays behind that the next start would trip over."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from boot_images import Elf, Load

from pyvmm.errors import ConfigError
from pyvmm.host import tap
from pyvmm.host.programs import find_program
from pyvmm.kvm.system import Kvm

SAFETY_TIMEOUT = 60
TAP = "pyvmmkill0"
# mov dx, 0x3f8; mov al, 'x'; out dx, al; again: hlt; jmp again
SAY_X_AND_SLEEP = bytes.fromhex("66baf803 b078 ee f4 ebfd")


@pytest.fixture(autouse=True)
def needs_taps_and_passt() -> None:
    try:
        fds, _ = tap.open_tap("pyvmmt%d", create=True)
    except (ConfigError, OSError) as error:
        pytest.skip(f"no taps can be made here: {error}")
    for fd in fds:
        os.close(fd)
    if find_program("passt") is None:
        pytest.skip("passt is not installed")


@pytest.fixture
def start(kvm: Kvm, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts the same VM each time, with one of everything; returns once its guest runs."""
    started: list[subprocess.Popen[bytes]] = []
    kernel, disk = tmp_path / "kernel", tmp_path / "disk"
    load = Load(data=SAY_X_AND_SLEEP.ljust(256, b"\x90"))
    kernel.write_bytes(Elf(loads=[load], note=None).build())
    disk.write_bytes(bytes(512))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "pyvmm", "run", "--kvm", "host", "--kernel", str(kernel)),
        *("--name", "killed", "--disk", f"{disk},overlay={tmp_path}/top"),
        *("--net", f"tap={TAP},create,address=10.98.7.1/24"),
        *("--net", f"user,forward={port}:80"),
        *("--vsock", f"path={tmp_path}/vsock", "--port", f"name=p,path={tmp_path}/port"),
    ]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}

    def run() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        started.append(process)
        assert process.stdout is not None and process.stderr is not None
        if process.stdout.read(1) != b"x":
            pytest.fail(process.stderr.read().decode())
        assert tap.exists(TAP) and passts(port), "the rest of this test would be about nothing"
        return process

    run.port = port  # type: ignore[attr-defined]
    yield run
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def passts(port: int) -> list[Path]:
    """The passt processes that forward this port."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if b"passt" in line and f"/{port}:80".encode() in line:
            found.append(path)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SAFETY_TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_taps_and_passt_go_with_it_and_the_next_start_takes_over_the_rest(
    start: Callable[[], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    port = start.port  # type: ignore[attr-defined]
    for _ in range(2):
        process = start()
        process.send_signal(signal.SIGKILL)
        process.wait(SAFETY_TIMEOUT)
        wait_for(lambda: not tap.exists(TAP) and not passts(port))
    # Sockets are files, which stay; locks on images and names do not.
    assert (tmp_path / "vsock").is_socket() and (tmp_path / "port").is_socket()
    process = start()
    process.send_signal(signal.SIGTERM)
    assert process.wait(SAFETY_TIMEOUT) == 143
    assert process.stderr is not None
    assert process.stderr.read() == (
        b"pyvmm: killed: terminated: nobody in the guest can be asked, so its power was cut\n"
    )
    wait_for(lambda: not tap.exists(TAP) and not passts(port))
    left = {path.name for path in tmp_path.rglob("*") if not path.is_dir()}
    # A lock file for all VMs' names, and its last words.
    assert left - {".lock", "killed.log", "killed.end"} == {"kernel", "disk", "top"}
