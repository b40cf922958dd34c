"""A guest that is being ended hangs its interactive shells up, which do not heed TERM.

The function of guest-images/rootfs/pyvmm-init runs here, on a shell in a terminal of its own.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
INIT = ROOT / "guest-images/rootfs/pyvmm-init"
PATIENCE = 30
# What /etc/profile does, whose id(1) takes its time here.
PROFILE = 'if [ "$(echo $BASHPID > "$HELPER"; exec sleep 1000)" -eq 0 ]; then :; fi\n'
# Asks for no terminal's end but that of the test's own shell.
GUARD = 'kill() { [ "$2" = "$ONLY" ] && command kill "$@"; }\n'
SHELLS = [["sh"], ["busybox", "sh"]]


def function(name: str) -> str:
    found = re.search(rf"^{name}\(\) {{.*?^}}.*?$", INIT.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{INIT} has no {name}"
    return found[0]


@contextmanager
def shell_in_a_terminal(tmp_path: Path, *arguments: str) -> Iterator[tuple[int, int, int]]:
    """Its process, its terminal, and the helper that its start-up file waits for."""
    helper = tmp_path / "helper"
    (tmp_path / "rc").write_text(PROFILE)
    os.mkfifo(helper)
    pid, terminal = pty.fork()
    if pid == 0:
        bash = ("bash", *arguments, "--rcfile", str(tmp_path / "rc"), "-i")
        os.execvpe("bash", bash, {**os.environ, "HELPER": str(helper)})
    try:
        with helper.open() as file:
            waited_for = int(file.readline())
        yield pid, terminal, waited_for
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def said(terminal: int, until: bytes) -> bytes:
    """What comes out of it until it says that, or is closed."""
    data = b""
    while until not in data and select.select([terminal], [], [], PATIENCE)[0]:
        try:
            data += os.read(terminal, 4096)
        except OSError:  # EIO: nobody has it open any more
            return data
    return data


def hang_up(shell: list[str], pid: int) -> None:
    if shutil.which(shell[0]) is None:
        pytest.skip(f"no {shell[0]} here")
    script = f"{GUARD}{function('hang_up_shells')}\nhang_up_shells"
    subprocess.run([*shell, "-c", script], env={**os.environ, "ONLY": str(pid)}, check=True)


@pytest.mark.parametrize("shell", SHELLS, ids="-".join)
def test_a_shell_that_is_hung_up_does_not_read_its_profile_on(
    tmp_path: Path, shell: list[str]
) -> None:
    with shell_in_a_terminal(tmp_path) as (pid, terminal, helper):
        hang_up(shell, pid)
        with suppress(ProcessLookupError):
            os.kill(helper, signal.SIGTERM)
        assert b"expected" not in said(terminal, b"expected")


def test_without_that_it_complains(tmp_path: Path) -> None:
    """The reason for it; a bash that does not would let the function go."""
    with shell_in_a_terminal(tmp_path) as (pid, terminal, helper):
        os.kill(pid, signal.SIGTERM)
        os.kill(helper, signal.SIGTERM)
        assert b"integer expression expected" in said(terminal, b"expected")


@pytest.mark.parametrize("shell", SHELLS, ids="-".join)
def test_who_heeds_term_is_not_hung_up(tmp_path: Path, shell: list[str]) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(
            "sh", ["sh", "-c", "trap 'echo hung up' HUP; echo up; read line; echo said $line"]
        )
    try:
        assert b"up" in said(terminal, b"up\r\n")
        hang_up(shell, pid)
        os.write(terminal, b"something\n")
        heard = said(terminal, b"said something")
        assert b"said something" in heard and b"hung up" not in heard
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def test_the_shells_hear_it_before_all_others_are_ended() -> None:
    end = function("end_guest")
    assert end.index("hang_up_shells") < end.index("kill -TERM -1")
