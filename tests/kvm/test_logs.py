"""`pyvmm logs`, `pyvmm ps -a` and `pyvmm rm` of VMs that run and that have ended, on real KVM."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from boot_images import Elf, Load
from echo_guest import echo_kernel, faulting_kernel
from running import SAFETY_TIMEOUT

from pyvmm.kvm.system import Kvm

PYVMM = [sys.executable, "-m", "pyvmm"]
# lea rsi,[text]; print: lodsb; test al,al; jz end; mov dx,0x3f8; out dx,al; jmp print; end: jmp $
SAYS = bytes.fromhex("488d350e000000 ac 84c0 7407 66baf803 ee ebf4 ebfe")
HOSTILE = b"\x1b]0;owned\x07\x1b[2Jred \x1b[31mcolour\r\n\0"


@pytest.fixture
def call(
    kvm: Kvm, tmp_path: Path, monkeypatch
) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def call(*args: str, **options: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*PYVMM, *args], capture_output=True, timeout=SAFETY_TIMEOUT, **options
        )  # type: ignore[call-overload,no-any-return]

    return call


def detach(call, kernel: str, name: str, *options: str) -> None:
    done = call("run", "--kvm=host", "--detach", "--name", name, "--kernel", kernel, *options)
    assert (done.returncode, done.stdout) == (0, f"{name}\n".encode()), done.stderr


def wait_for_end(call, name: str) -> dict[str, object]:
    deadline = time.monotonic() + SAFETY_TIMEOUT
    while time.monotonic() < deadline:
        for row in json.loads(call("ps", "-a", "--json").stdout):
            if row["name"] == name and row["state"] == "ended":
                return row
        time.sleep(0.05)
    raise AssertionError(f"{name} has not ended")


def test_a_detached_vm_leaves_its_last_words(call, tmp_path) -> None:
    detach(call, echo_kernel(tmp_path), "web")
    while call("logs", "web").stdout != b"ready\r\n":
        time.sleep(0.05)
    following = subprocess.Popen([*PYVMM, "logs", "-f", "web"], stdout=subprocess.PIPE)
    assert following.stdout is not None
    assert following.stdout.readline() == b"ready\r\n"
    assert call("console", "web", input=b"P").returncode == 0
    assert following.stdout.readline() == b"Kernel panic - not syncing: asked for\r\n"
    row = wait_for_end(call, "web")
    assert following.wait(SAFETY_TIMEOUT) == 0
    following.stdout.close()
    why = "the guest's kernel panicked: asked for"
    assert (row["exit_code"], row["ending"], row["message"]) == (11, "panic", why)
    done = call("logs", "web")
    assert done.stdout == b"ready\r\nKernel panic - not syncing: asked for\r\n"
    first, last = done.stderr.decode().splitlines()
    assert first.startswith("pyvmm: web: confined (auto): ")
    assert last == f"pyvmm: web: {why}"
    [head, line] = call("ps", "-a").stdout.decode().splitlines()
    assert head.split()[-3:] == ["EXIT", "ENDED", "WHY"]
    assert line.split()[:3] == ["web", "-", "ended"] and why in line
    assert call("ps").stdout.count(b"\n") == 1
    assert call("rm", "web").returncode == 0
    assert call("logs", "web").returncode == 2
    assert list((tmp_path / "pyvmm/logs").iterdir()) == []
    assert call("rm", "web").returncode == 2


@pytest.mark.parametrize("ending", ["triple_fault", "poweroff", "killed"])
def test_why_each_has_ended(call, tmp_path, ending) -> None:
    kernel = faulting_kernel(tmp_path) if ending == "triple_fault" else echo_kernel(tmp_path)
    call("run", "--kvm=host", "--detach", "--name", "web", "--kernel", kernel)
    if ending == "poweroff":
        call("console", "web", input=b"O")
    if ending == "killed":
        [running] = json.loads(call("ps", "--json").stdout)
        os.kill(running["pid"], 9)
    row = wait_for_end(call, "web")
    wanted = {
        "triple_fault": (12, "triple_fault", "the guest triple-faulted (vCPU 0)"),
        "poweroff": (0, "poweroff", ""),
        "killed": (None, None, "its monitor was killed"),
    }
    assert (row["exit_code"], row.get("ending"), row["message"]) == wanted[ending]


def test_a_vm_in_the_foreground_and_one_of_python_have_a_log_too(call, tmp_path) -> None:
    kernel = echo_kernel(tmp_path)
    done = call("run", "--kvm=host", "--name", "front", "--kernel", kernel, input=b"xO")
    assert done.returncode == 0
    assert call("logs", "front").stdout == b"ready\r\nx"
    script = f"""
from pyvmm import VM
with VM(kernel={kernel!r}, kvm="host", name="program") as vm:
    vm.console.expect("ready")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=SAFETY_TIMEOUT)
    assert call("logs", "program").stdout == b"ready\r\n"
    assert wait_for_end(call, "program")["exit_code"] == 143


def test_a_terminal_is_shown_no_control_sequences_and_a_file_gets_every_byte(
    call, tmp_path
) -> None:
    code = SAYS + HOSTILE
    kernel = tmp_path / "kernel"
    kernel.write_bytes(Elf(loads=[Load(data=code.ljust(256, b"\x90"))], note=None).build())
    detach(call, str(kernel), "web")
    while (out := call("logs", "web").stdout) != HOSTILE[:-1]:
        assert HOSTILE.startswith(out)
        time.sleep(0.05)
    assert b"owned" in on_terminal("logs", "--raw", "web")
    shown = on_terminal("logs", "web")
    assert b"\x1b]0" not in shown and b"\x1b[2J" not in shown and b"\x07" not in shown
    assert b"red \x1b[31mcolour" in shown
    assert shown.rstrip().endswith(b"\x1b[m")
    assert call("stop", "--now", "web").returncode == 0


def on_terminal(*args: str) -> bytes:
    master, slave = pty.openpty()
    process = subprocess.Popen([*PYVMM, *args], stdout=slave, stderr=subprocess.DEVNULL)
    os.close(slave)
    text = b""
    while select.select([master], [], [], SAFETY_TIMEOUT)[0]:
        try:
            data = os.read(master, 4096)
        except OSError:
            break
        text += data
    assert process.wait(SAFETY_TIMEOUT) == 0
    os.close(master)
    return text
