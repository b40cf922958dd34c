"""Runs Linux guests the way a user does, with `pyvmm run`, and keeps what they said.

Where this machine's KVM cannot run Linux, `pyvmm run` finds that out itself and starts an emulated
KVM host; nothing here knows the difference. A guest that hangs fails its test with the end of its
console.

The script that a guest shall run is handed over on a disk of its own, the last one, so that its
length does not matter.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread, local
from typing import Any

import pytest

# Not a measure of speed: a guest that has not ended by now hangs, also on a busy machine.
HANG_SECONDS = 600
_STEP = 0.05
_LONGEST_LOOK = 10.0
SECTOR = 512
RING_PACKED = 34  # VIRTIO_F_RING_PACKED
TAIL_LINES = 40

PYVMM = (sys.executable, "-m", "pyvmm")

_running: set[Guest] = set()
_started = local()  # `guests` of this thread


def tail(text: str, lines: int = TAIL_LINES) -> str:
    return "\n".join(text.splitlines()[-lines:])


OF_THE_MACHINE = ("running in an emulated KVM host", "has printed nothing in")


@dataclass(frozen=True)
class GuestResult:
    """A run's exit code, console, and the monitor's own messages on standard error."""

    argv: Sequence[str]
    code: int
    console: str
    stderr: str

    @property
    def script_code(self) -> int | None:
        """The exit code of the script in the guest, or None if it never came that far."""
        for line in self.console.splitlines():
            if line.strip().startswith("pyvmm: exit "):
                return int(line.split()[-1])
        return None

    @property
    def messages(self) -> list[str]:
        """The monitor's lines, without those that tell of the machine the test runs on: that this
        takes an emulated KVM host, and that a guest is slow to print its first line."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("pyvmm: ")]
        return [line for line in lines if not any(part in line for part in OF_THE_MACHINE)]

    def value(self, key: str) -> str:
        """The rest of the console line that begins with `key=`."""
        for line in self.console.splitlines():
            if line.startswith(f"{key}="):
                return line.partition("=")[2].strip()
        raise AssertionError(f"the guest never printed {key}=\n{self.ending()}")

    def feature(self, key: str, bit: int) -> bool:
        """True if `bit` is set in a device's `features` as the guest printed them from sysfs, where
        each bit is a character, the first one bit 0."""
        return self.value(key)[bit] == "1"

    def ending(self) -> str:
        """The command and the end of all it said, for an assertion's message."""
        return (
            f"$ {shlex.join(self.argv)}\nexit code {self.code}\n"
            f"--- console ends:\n{tail(self.console)}\n--- stderr:\n{tail(self.stderr)}"
        )

    def check(self) -> GuestResult:
        """Fail the test unless the script succeeded and the guest powered off."""
        if self.script_code != 0 or self.code != 0:
            pytest.fail(f"the script exited with {self.script_code}\n{self.ending()}")
        return self


@dataclass(eq=False)
class Guest:
    """A guest to be booted: `run` it to its end, or `start`, watch and `wait`.

    `disks` and `options` are as on the command line. `stdin`: what the guest gets to read, or None
    for /dev/null, or "closed".
    """

    kernel: str
    initrd: str | None
    disks: Sequence[str] = ()
    cpus: int = 1
    memory: str = "256M"
    cmdline: str = ""
    options: Sequence[str] = ()
    stdin: bytes | str | None = None

    def argv(self, script_disk: Path | None = None) -> list[str]:
        argv = [*PYVMM, "run", "--kernel", self.kernel]
        if self.initrd is not None:
            argv += ["--initrd", self.initrd]
        cmdline = self.cmdline
        disks = list(self.disks)
        if script_disk is not None:
            cmdline += f" pyvmm.exec=/dev/vd{chr(ord('a') + len(disks))}"
            disks.append(f"{script_disk},readonly,id=script")
        for disk in disks:
            argv += ["--disk", disk]
        argv += ["--cpus", str(self.cpus), "--memory", self.memory]
        if cmdline:
            argv += ["--cmdline", cmdline.strip()]
        return argv + list(self.options)

    def start(self, script: str | None = None, *, folder: Path | None = None) -> Guest:
        """Boot; `script` runs in the guest, its disk is made in `folder`."""
        script_disk = None
        if script is not None:
            assert folder is not None
            script_disk = folder / "script.img"
            text = script.encode()
            script_disk.write_bytes(text + bytes(-len(text) % SECTOR))
        self._argv = self.argv(script_disk)
        self.console, self.stderr = bytearray(), bytearray()
        # A place of its own for its control socket: so it is called vm, whatever else runs.
        self.runtime = tempfile.TemporaryDirectory(prefix="pyvmm-")
        self._open()
        _running.add(self)
        getattr(_started, "guests", []).append(self)
        return self

    def _open(self) -> None:
        argv = self._argv
        if self.stdin == "closed":
            argv = ["sh", "-c", 'exec "$@" <&-', "sh", *argv]
        self.process = subprocess.Popen(
            argv,
            env=self.environment,
            stdin=subprocess.PIPE if isinstance(self.stdin, bytes) else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        self._pumps = [
            pump_into(self.console, self.process.stdout.fileno()),
            pump_into(self.stderr, self.process.stderr.fileno()),
        ]
        if isinstance(self.stdin, bytes):
            assert self.process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended: what it said is looked at
                self.process.stdin.write(self.stdin)
                self.process.stdin.close()

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which `pyvmm ps` and the like find this guest."""
        return {**os.environ, "XDG_RUNTIME_DIR": self.runtime.name}

    def pyvmm(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run another pyvmm command beside the guest."""
        return subprocess.run(
            [*PYVMM, *args],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
        )

    def wait(self) -> GuestResult:
        """Wait for the end; a guest that hangs fails the test with its console's last lines."""
        try:
            self.process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the guest hangs\n{self.result().ending()}")
        return self._finish()

    def wait_for(self, text: str, *, times: int = 1, after: str = "", stderr: bool = False) -> None:
        """Wait until the console (or standard error) has shown `text` so often; fail if it ends
        before."""
        stream = self.stderr if stderr else self.console

        def shown() -> bool:
            said = bytes(stream)
            if after:
                said = said.partition(after.encode())[2]
            return said.count(text.encode()) >= times

        if not wait_until(lambda: shown() or self.process.poll() is not None):
            self.kill()
            pytest.fail(f"never saw {text!r}: the guest hangs\n{self.result().ending()}")
        if not shown():
            self._hear_out()
        if not shown():
            pytest.fail(f"never saw {text!r} {times} times\n{self.wait().ending()}")

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> GuestResult:
        """kill -9, as an operator or the kernel's OOM killer would."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()
        return self._finish()

    def run(self, script: str | None = None, *, folder: Path | None = None) -> GuestResult:
        return self.start(script, folder=folder).wait()

    def result(self) -> GuestResult:
        code = self.process.returncode
        return GuestResult(self._argv, code, text(self.console), text(self.stderr))

    def _hear_out(self) -> None:
        """Its process has ended, but its last words may not have been read yet."""
        self._join_pumps()

    def _join_pumps(self) -> None:
        for pump in self._pumps:
            pump.join(HANG_SECONDS)

    def _finish(self) -> GuestResult:
        self._join_pumps()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        _running.discard(self)
        self.runtime.cleanup()
        return self.result()


def boot(function: Callable[..., Any], *args: Any) -> Any:
    """The result of `function`. If it fails, the guests that it has started end, and the error
    tells what they have said."""
    _started.guests = []
    try:
        return function(*args)
    except Exception as error:
        for guest in _started.guests:
            result = guest.kill() if guest in _running else guest.result()
            error.add_note(result.ending())
        raise


def kill_all() -> None:
    """End what still runs: a test session was interrupted."""
    for guest in list(_running):
        guest.process.kill()


def pump_into(into: bytearray, fd: int) -> Thread:
    """A thread that appends to `into` all that comes from `fd`, to its end."""

    def pump() -> None:
        while True:
            try:
                chunk = os.read(fd, 65536)
            except OSError:  # EIO of a terminal whose other side is closed
                return
            if not chunk:
                return
            into.extend(chunk)

    thread = Thread(target=pump, daemon=True)
    thread.start()
    return thread


def children(pid: int) -> list[int]:
    """The processes that the threads of `pid` have started, and that run still or have not been
    waited for."""
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found += map(int, listed.read_text().split())
    return found


def wait_until(condition: Callable[[], bool]) -> bool:
    """True if `condition` became true before a hang has to be assumed."""
    # A suspended machine is not a hang: of the clock each round counts for no more than a look at
    # a slow machine takes.
    spent = 0.0
    while spent < HANG_SECONDS:
        began = time.monotonic()
        if condition():
            return True
        time.sleep(_STEP)
        spent += min(time.monotonic() - began, _LONGEST_LOOK)
    return condition()


def text(data: bytes | bytearray) -> str:
    """A stream as text, its lines ending as they do here."""
    return bytes(data).decode(errors="replace").replace("\r\n", "\n")
