"""`pyvmm run -- CMD` in the process that waits for the guest's agent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pyvmm.control import registry, vm_log
from pyvmm.control.client import NoAnswer
from pyvmm.host import log
from pyvmm.monitor import run_command
from pyvmm.monitor.run_spec import run_spec
from pyvmm.spec.vm import VmSpec


class _SlowClient(run_command._Client):
    """Its console's thread looks whether somebody waits, and then goes on only when it may."""

    def __init__(self, console: int) -> None:
        self.looked, self.may_go_on = threading.Event(), threading.Event()
        super().__init__(cast("Any", SimpleNamespace(name="vm")), console, None, debug=False)  # type: ignore[arg-type]

    @property
    def _waiting(self) -> bool:
        waits = self.__dict__["waits"]
        if threading.current_thread() is self._console:
            self.looked.set()
            self.may_go_on.wait(30)
        return bool(waits)

    @_waiting.setter
    def _waiting(self, value: bool) -> None:
        self.__dict__["waits"] = value


def test_a_monitor_that_ends_just_before_the_wait_is_not_waited_for() -> None:
    console, end = os.pipe()
    os.close(end)
    client = _SlowClient(console)
    before = signal.getsignal(run_command._CONSOLE_ENDED)

    class Agent:
        def wait_ready(self, seconds: float) -> None:
            client.may_go_on.set()
            time.sleep(0.3)  # in which a signal would come

    client._console.start()
    assert client.looked.wait(30)
    try:
        with pytest.raises(NoAnswer):
            client._wait_for(cast("Any", Agent()))
    finally:
        client.may_go_on.set()
        client._console.join(30)
        signal.signal(run_command._CONSOLE_ENDED, before)
        os.close(console)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            b"[    1.0] BUG: kernel NULL pointer dereference\r\n[    1.0] Oops: 0002\r\n",
            1,
        ),
        (b"[    1.0] Kernel panic - not syncing: sysrq triggered crash\r\nRIP: 0\r\n", 1),
        (b"[    1.0] Unable to handle kernel \x1b[2J paging request\r\n", 1),
        (b"DEBUG: all is well\r\n[    1.0] reboot: Power down\r\n", 0),
    ],
)
def test_a_kernel_that_complains_is_heard_where_its_console_is_not_shown(
    capfd: pytest.CaptureFixture[str], said: bytes, told: int
) -> None:
    for debug in (False, True):
        console, end = os.pipe()
        os.write(end, b"before\n" + said)
        os.close(end)
        client = run_command._Client(
            VmSpec(kernel="k", name="web"), console, run_command.CommandLine(("true",)), debug=debug
        )
        client._watch_console(console)
        os.close(console)
        capfd.readouterr()
        client._tell_complaint()
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == (0 if debug else told)
        for line in lines:
            first = said.split(b"] ")[1].split(b"\r")[0].decode().replace("\x1b", "�")
            assert line == f"pyvmm: web: the guest's kernel said: {first}; pyvmm logs web"


@pytest.mark.parametrize(
    ("code", "of_command", "ending", "message"),
    [
        (0, True, None, "its command ended with 0"),
        (3, True, None, "its command ended with 3"),
        (11, True, None, "its command ended with 11"),  # which is not a panic
        (11, False, "panic", "the guest's kernel panicked: so it said"),
    ],
)
def test_ps_a_says_why_a_vm_of_a_command_has_ended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    of_command: bool,
    ending: str | None,
    message: str,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def wrap(spec: VmSpec, *_: object) -> tuple[int, bool]:
        log.to_stderr(f"{spec.name}: the guest's kernel panicked: so it said")
        return code, of_command

    assert run_spec(VmSpec(kernel="k", name="web"), wrap=wrap) == code
    [row] = vm_log.ended(registry.folder())
    assert (row["exit_code"], row.get("ending"), row["message"]) == (code, ending, message)


# A monitor whose guest never comes up, and which is the user argv[1] by then.
MONITOR = """
import os, signal, sys, threading
from pyvmm.control import registry
from pyvmm.monitor.run_command import CommandLine, run_with_command
from pyvmm.spec.vm import VmSpec
registered = registry.register("x")
ended = threading.Event()
def run():
    signal.signal(signal.SIGTERM, lambda *told: ended.set())
    user = int(sys.argv[1])
    os.setresuid(user, user, user)
    os.kill(os.getpid(), signal.SIGINT)
    while not ended.wait(0.05):
        pass
    return 143
print(run_with_command(VmSpec(kernel="/k", name="x"), registered.listener, run,
      CommandLine(("true",)), debug=False))
"""


@pytest.mark.parametrize("user", [os.geteuid(), *([] if os.geteuid() else [61001])])
def test_ctrl_c_ends_the_client_whoever_the_monitor_is(tmp_path: Path, user: int) -> None:
    tmp_path.chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-c", MONITOR, str(user)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "(130, True)\n", done.stderr


# A monitor whose guest is gone at once, and which has kept its streams open.
KEPT_OPEN = """
from pyvmm.control import registry
from pyvmm.host import output
from pyvmm.monitor.run_command import CommandLine, run_with_command
from pyvmm.spec.vm import VmSpec
def run():
    output.open_streams()
    return 0
print(run_with_command(VmSpec(kernel="/k", name="x"), registry.register("x").listener, run,
      CommandLine(("true",)), debug=False))
"""


def test_the_client_sees_the_end_of_a_console_that_was_kept_open(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-c", KEPT_OPEN],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "(1, False)\n", done.stderr
