"""A guest that is being ended stops its interactive shells, which do not heed TERM: they would read
their start-up files on without the programs that they call there, and complain on the console."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from agent_rig import ENVIRONMENT, FOLDER, compile_agent, needs_compiler

pytestmark = needs_compiler
PATIENCE = 60
# What /etc/profile does, whose id(1) takes its time here.
PROFILE = 'if [ "$(echo up >&2; echo $$ > "$SHELL_IS"; exec sleep 1000)" -eq 0 ]; then :; fi\n'
COMPLAINT = b"expected"
SHELLS = {"bash": ["--rcfile", "rc", "-i"], "dash": ["-i"], "busybox": ["sh", "-i"]}
NOT_SHELLS = [
    "trap 'echo saved' TERM; echo up; while :; do sleep 0.1; done",
    "trap '' HUP INT QUIT TERM; echo up; while :; do sleep 0.1; done",
    "trap '' TERM TSTP; echo up; while :; do sleep 0.1; done",
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_agent(tmp_path_factory.mktemp("program"))


@contextmanager
def in_a_terminal(folder: Path, *command: str) -> Iterator[tuple[int, int]]:
    """A process that says "up" there, and its terminal."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")
    (folder / "rc").write_text(PROFILE)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        names = {"ENV": "./rc", "SHELL_IS": "/dev/null"}
        os.execvpe(command[0], command, {**os.environ, **names})
    try:
        assert b"up" in said(terminal, b"up")
        yield pid, terminal
    finally:
        for group in {pid, os.tcgetpgrp(terminal)}:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
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


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def child(pid: int) -> int:
    """The program that it waits for."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def stop_shells(program: Path, *pids: int) -> None:
    command = [program, "--stop-shells", *map(str, pids)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def wait_until_stopped(pid: int) -> None:
    give_up_at = time.monotonic() + PATIENCE
    while state(pid) != "T":
        assert time.monotonic() < give_up_at, state(pid)
        time.sleep(0.01)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_does_not_read_its_start_up_file_on(
    program: Path, tmp_path: Path, shell: str
) -> None:
    with in_a_terminal(tmp_path, shell, *SHELLS[shell]) as (pid, terminal):
        helper = child(pid)
        stop_shells(program, pid, helper)
        wait_until_stopped(pid)
        assert state(helper) != "T"
        os.kill(helper, signal.SIGTERM)
        os.kill(pid, signal.SIGTERM)
        assert state(pid) == "T"
        # It was only that: what it says later is what it would have said before.
        os.kill(pid, signal.SIGCONT)
        if shell == "bash":
            assert COMPLAINT in said(terminal, COMPLAINT)


@pytest.mark.parametrize("text", NOT_SHELLS)
def test_what_heeds_term_or_is_no_shell_goes_on(program: Path, tmp_path: Path, text: str) -> None:
    with in_a_terminal(tmp_path, "sh", "-c", text) as (pid, terminal):
        stop_shells(program, pid)
        assert state(pid) != "T"
        os.kill(pid, signal.SIGTERM)
        if "saved" in text:
            assert b"saved" in said(terminal, b"saved")


@pytest.mark.parametrize("pids", [["1"], ["0"], ["-1"], ["x"], [""], ["9" * 40], ["../self"]])
def test_what_is_no_process_of_a_shell_is_left_alone(program: Path, pids: list[str]) -> None:
    command = [program, "--stop-shells", *pids]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_both_ends_of_a_guest_stop_them_before_all_others_are_told() -> None:
    init = (FOLDER.parent / "rootfs/pyvmm-init").read_text()
    agent = (FOLDER / "machine.c").read_text()
    for text, function in (
        (init, r"^end_guest\(\).*?--stop-shells.*?kill -TERM -1"),
        (agent, r"^void power_off.*?stop_shells\(.*?settle\(SIGTERM"),
    ):
        assert re.search(function, text, re.MULTILINE | re.DOTALL)
