"""Threads that make way for unshare(2), which gives a user namespace to a process of one thread."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from pyvmm.host import pausing

SAFETY_TIMEOUT = 60

# What a monitor has threads for before it is confined, each in a process of its own.
PARENT = """
from pyvmm.monitor.process import end_with
end_with(os.getppid(), 30.0)
"""
CLIENT = """
from pyvmm.monitor.run_command import _Attending
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGQUIT])
reads, writes = os.pipe()
child = os.fork()
if not child:
    os.close(writes)
    assert os.read(reads, 1) == bytes([signal.SIGUSR1])
    os._exit(7)
attending = _Attending(child, writes)
"""
CLIENT_AFTER = """
attending.over()
os.kill(os.getpid(), signal.SIGINT)  # goes to the client
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
HELPER = """
from pyvmm.host.virtiofsd import Virtiofsd
script = "import sys, time; print('] gone', file=sys.stderr, flush=True); time.sleep(0.5)"
helper = Virtiofsd([sys.executable, "-c", script], "/tmp", read_only=True)
"""
HELPER_AFTER = """
assert helper.why_it_ended() == "gone", helper.why_it_ended()
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [(PARENT, ""), (CLIENT, CLIENT_AFTER), (HELPER, HELPER_AFTER), (CLIENT + PARENT, CLIENT_AFTER)],
)
def test_what_a_monitor_waits_for_leaves_one_thread_and_goes_on(before: str, after: str) -> None:
    script = f"""
import os, signal, sys, threading
from pyvmm.host import pausing
{before}
count = threading.active_count()
assert count > 1
for _ in range(3):
    with pausing.paused():
        print(len(os.listdir("/proc/self/task")))
{after}
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=SAFETY_TIMEOUT
    )
    assert (done.stdout.split(), done.returncode) == (["1"] * 3, 0), done.stderr


def test_a_watcher_hears_what_comes_while_it_is_paused() -> None:
    reads, writes = os.pipe()
    lines: list[str] = []
    ended = threading.Event()
    watcher = pausing.Watcher(reads, "lines", pausing.each_line(reads, lines.append, ended.set))
    os.write(writes, b"one\ntw")
    with pausing.paused():
        os.write(writes, b"o\n\xff")
    os.close(writes)
    assert watcher.wait(SAFETY_TIMEOUT) and ended.is_set()
    assert lines == ["one", "two", "\N{REPLACEMENT CHARACTER}"]
    assert watcher not in pausing._known
    with pausing.paused():  # which has nothing to do with it any more
        pass
    os.close(reads)


def test_a_line_without_end_is_cut() -> None:
    reads, writes = os.pipe()
    lines: list[str] = []
    heard = pausing.each_line(reads, lines.append, lambda: None)
    os.write(writes, b"x" * 4096 + b"y")
    assert heard() and heard()
    assert lines == ["x" * 4096]
    os.close(writes)
    assert not heard()
    assert lines == ["x" * 4096, "y"]
    os.close(reads)


def test_a_pipe_that_cannot_be_read_has_ended() -> None:
    """It may be anybody's: its wrong end, or one that others read as well."""
    ended: list[bool] = []
    reads, writes = os.pipe2(os.O_NONBLOCK)
    lines: list[str] = []
    heard = pausing.each_line(reads, lines.append, lambda: ended.append(True))
    assert heard() and not ended and not lines
    heard = pausing.each_line(writes, lines.append, lambda: ended.append(True))
    assert not heard() and ended == [True]
    os.close(reads)
    os.close(writes)
