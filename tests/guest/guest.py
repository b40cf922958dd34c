"""Runs a Linux guest the way a user does, with `pyvmm run`, and keeps what it said.

The script a guest shall run is handed over on a disk of its own (the last one), so that its length
does not matter. A guest that hangs fails its test with the end of its console.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import pytest

# Not a measure of speed: a guest that has not ended by now hangs.
HANG_SECONDS = 420
SECTOR = 512
TAIL_LINES = 40


def tail(text: str, lines: int = TAIL_LINES) -> str:
    return "\n".join(text.splitlines()[-lines:])


@dataclass(frozen=True)
class GuestResult:
    """What a run left: exit code, console, messages of the monitor on standard error."""

    code: int
    console: str
    stderr: str

    @property
    def script_code(self) -> int | None:
        """What the script in the guest exited with, or None if it never came that far."""
        for line in self.console.splitlines():
            if line.strip().startswith("pyvmm: exit "):
                return int(line.split()[-1])
        return None

    def value(self, key: str) -> str:
        """The rest of the console line that begins with `key=`."""
        for line in self.console.splitlines():
            if line.startswith(f"{key}="):
                return line.partition("=")[2].strip()
        raise AssertionError(f"the guest never printed {key}=; console ends:\n{tail(self.console)}")

    def check(self) -> GuestResult:
        """Fail the test unless the script succeeded and the guest powered off."""
        if self.script_code != 0 or self.code != 0:
            pytest.fail(
                f"script exited with {self.script_code}, pyvmm with {self.code}\n"
                f"--- console ends:\n{tail(self.console)}\n--- stderr:\n{tail(self.stderr)}"
            )
        return self


@dataclass
class Guest:
    """A guest to be booted: `start` it, or `run` it to its end."""

    kernel: Path
    initrd: Path | None
    disks: Sequence[str] = ()
    cpus: int = 1
    memory: str = "256M"
    cmdline: str = ""
    options: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None
    console: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)

    def argv(self, script_disk: Path | None) -> list[str]:
        argv = [sys.executable, "-m", "pyvmm", "run", "--kernel", str(self.kernel)]
        if self.initrd is not None:
            argv += ["--initrd", str(self.initrd)]
        cmdline = self.cmdline
        disks = list(self.disks)
        if script_disk is not None:
            cmdline += f" pyvmm.exec=/dev/vd{chr(ord('a') + len(disks))}"
            disks.append(f"{script_disk},readonly,id=script")
        for disk in disks:
            argv += ["--disk", disk]
        argv += ["--cpus", str(self.cpus), "--memory", self.memory, "--cmdline", cmdline]
        return argv + list(self.options)

    def start(self, script: str | None = None, *, folder: Path | None = None) -> Guest:
        """Boot; `script` runs in the guest, its disk is made in `folder`."""
        script_disk = None
        if script is not None:
            assert folder is not None
            script_disk = folder / "script.img"
            text = script.encode()
            script_disk.write_bytes(text + bytes(-len(text) % SECTOR))
        argv = self.argv(script_disk)
        print("$", shlex.join(argv))
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._pumps = [
            Thread(target=_pump, args=(stream, into), daemon=True)
            for stream, into in (
                (self.process.stdout, self.console),
                (self.process.stderr, self.stderr),
            )
        ]
        for pump in self._pumps:
            pump.start()
        return self

    def wait(self) -> GuestResult:
        """Wait for the end; a guest that hangs fails the test with its console's last lines."""
        assert self.process is not None
        try:
            code = self.process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(
                f"the guest hangs\n--- console ends:\n{tail(self._text(self.console))}\n"
                f"--- stderr:\n{tail(self._text(self.stderr))}"
            )
        for pump in self._pumps:
            pump.join()
        return GuestResult(code, self._text(self.console), self._text(self.stderr))

    def wait_for(self, text: str) -> None:
        """Wait until the console has shown `text`; fails the test if the guest ends first."""
        assert self.process is not None
        waited = 0.0
        while text.encode() not in self.console:
            if self.process.poll() is not None or waited > HANG_SECONDS:
                self.kill()
                pytest.fail(
                    f"never saw {text!r}\n--- console ends:\n{tail(self._text(self.console))}\n"
                    f"--- stderr:\n{tail(self._text(self.stderr))}"
                )
            try:
                self.process.wait(0.1)
            except subprocess.TimeoutExpired:
                waited += 0.1

    def kill(self) -> None:
        """kill -9, as an operator or the kernel's OOM killer would."""
        assert self.process is not None
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def run(self, script: str | None = None, *, folder: Path | None = None) -> GuestResult:
        return self.start(script, folder=folder).wait()

    @staticmethod
    def _text(data: bytearray) -> str:
        return bytes(data).decode(errors="replace").replace("\r\n", "\n")


def _pump(stream: object, into: bytearray) -> None:
    while chunk := stream.read1(65536):  # type: ignore[attr-defined]
        into += chunk
