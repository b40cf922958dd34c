"""Ctrl-C while a command begins: no traceback, whatever is being imported."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest

# Runs the command line sys.argv[2:], and interrupts itself at the import of module sys.argv[1];
# what it has imported is printed to standard output without one.
RUN = """
import os, signal, sys
from pyvmm.cli import main
at = sys.argv.pop(1)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == at:
            os.kill(os.getpid(), signal.SIGINT)
        elif not at:
            os.write(1, b"\\n" + name.encode() + b"\\n")
sys.meta_path.insert(0, Finder())
main()
"""
COMMANDS = {
    "read without click": ["run", "--kvm=host", "--kernel", "/no/kernel"],
    "by click": ["run", "--kvm=host", "--kernel=/no/kernel", "--debug"],
    "another": ["ps"],
}
EACH = 12  # places in a command


def run(at: str, argv: list[str]) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", RUN, at, *argv]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


@cache
def places(command: str) -> list[str]:
    found = [line for line in run("", COMMANDS[command]).stdout.splitlines() if "." in line]
    names = [name for name in found if name.startswith("pyvmm.")]
    assert names[0] == "pyvmm.cli.interrupts"
    return names[1 :: max(1, len(names) // EACH)]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupted_import_is_no_traceback(command: str) -> None:
    seen = []
    for at in places(command):
        done = run(at, COMMANDS[command])
        assert done.returncode in (-2, 130), (at, done)
        assert not done.stderr.strip(), (at, done.stderr)
        seen.append(done.returncode)
    assert -2 in seen


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_at_work_cleans_up(command: str) -> None:
    at_work = """
import signal, sys
from pyvmm.cli import main
from pyvmm.control import registry
from pyvmm.monitor import start
def work(**options):
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        print("cleaned up")
start.start = registry.running = work
main()
"""
    words = [sys.executable, "-c", at_work, *COMMANDS[command]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (130, "cleaned up", "")


def test_one_that_a_callback_would_swallow_ends_the_process() -> None:
    lost = """
import signal, weakref
from pyvmm.cli import interrupts
interrupts.die_of_them()
class Object: pass
with interrupts.raised():
    held = Object()
    reference = weakref.ref(held, lambda _: signal.raise_signal(signal.SIGINT))
    del held
    print("goes on")
"""
    done = subprocess.run([sys.executable, "-c", lost], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-2, "", "")


def test_one_that_a_callback_swallows_comes_again_where_there_is_something_to_clean_up() -> None:
    lost = """
import signal, sys, time, weakref
from pyvmm.monitor.run_spec import ended_by_signals
class Object: pass
@ended_by_signals
def run():
    held = Object()
    reference = weakref.ref(held, lambda _: signal.raise_signal(signal.SIGTERM))
    try:
        del held
        while True:
            time.sleep(0.01)
    finally:
        print("cleaned up")
sys.exit(run())
"""
    done = subprocess.run([sys.executable, "-c", lost], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (143, "cleaned up\n", "")


def test_one_more_ends_it_on_the_spot_and_one_in_a_bad_moment_waits() -> None:
    again = """
import signal, sys
from pyvmm.host import leaving
from pyvmm.monitor.run_spec import ended_by_signals
@ended_by_signals
def run():
    try:
        with leaving.undisturbed():
            signal.raise_signal(signal.SIGHUP)
            print("undisturbed", flush=True)
    finally:
        if sys.argv[1:]:
            signal.raise_signal(signal.SIGHUP)
    return 0
sys.exit(run())
"""
    for more, code in (((), 129), (("again",), -1)):
        words = [sys.executable, "-c", again, *more]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (code, "undisturbed\n", "")


def test_a_process_that_ignores_them_goes_on_to_ignore_them() -> None:
    ignoring = """
import signal
from pyvmm.cli import interrupts
signal.signal(signal.SIGINT, signal.SIG_IGN)
interrupts.die_of_them()
with interrupts.raised():
    signal.raise_signal(signal.SIGINT)
signal.raise_signal(signal.SIGINT)
"""
    assert not subprocess.run([sys.executable, "-c", ignoring], timeout=60).returncode
