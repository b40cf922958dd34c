"""SIGTERM, SIGHUP and Ctrl-C while a VM begins: nothing of it stays behind, and no traceback.

They come at a certain call of a function, or return from one. PYVMM_SIGNAL_ROUNDS says how many.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from echo_guest import echo_kernel

from pyvmm.kvm.system import Kvm

ROUNDS = int(os.environ.get("PYVMM_SIGNAL_ROUNDS", "12"))
SEED = int(os.environ.get("PYVMM_SIGNAL_SEED", "0")) or random.randrange(1 << 32)
SAFETY_TIMEOUT = 120
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

pytestmark = pytest.mark.timeout(max(400, 30 * ROUNDS))

# Runs the command line sys.argv[3:], and has the signal sys.argv[1] at the call sys.argv[2] after
# its name was taken; for call 0 it says how many there were before the machine takes signals.
RUN = """
import os, sys
from pyvmm.cli import main
from pyvmm.control import registry
from pyvmm.machine.machine import Machine
number, at = int(sys.argv.pop(1)), int(sys.argv.pop(1))
count = 0
def look(frame, event, what):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), number)
register = registry.register
def begin(*args):
    sys.setprofile(look)
    return register(*args)
registry.register = begin
catch = Machine._catch_signals
def caught(*args):
    if not at:
        os.write(2, b"%d calls\\n" % count)
    return catch(*args)
Machine._catch_signals = caught
main()
"""


def run(
    folder: Path, number: int, at: int, kernel: str, base: Path
) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    return subprocess.run(
        [
            *(sys.executable, "-c", RUN, str(int(number)), str(at), "run", "--kvm=host"),
            *("--kernel", kernel, "--disk", f"{base},snapshot"),
            *("--vsock", f"path={folder}/vsock", "--port", f"name=p,path={folder}/port"),
        ],
        env={**os.environ, "XDG_RUNTIME_DIR": str(folder), "PYVMM_MARK": str(folder)},
        input="O",
        capture_output=True,
        text=True,
        timeout=SAFETY_TIMEOUT,
    )


def processes(folder: Path) -> list[str]:
    """Those that were started for it."""
    found = []
    mark = f"PYVMM_MARK={folder}\0".encode()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_whenever_it_is_ended_nothing_stays(kvm: Kvm, tmp_path: Path) -> None:
    kernel, base = echo_kernel(tmp_path), tmp_path / "base"
    base.write_bytes(bytes(512))
    whole = run(tmp_path / "whole", signal.SIGTERM, 0, kernel, base)
    assert whole.returncode == 0, whole.stderr
    calls = int(whole.stderr.split()[0])
    chance = random.Random(SEED)
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        wanted, at = SIGNALS[number % 3], chance.randrange(1, calls)
        about = f"{wanted.name} at call {at} of {calls} (PYVMM_SIGNAL_SEED={SEED})"
        done = run(folder, wanted, at, kernel, base)
        assert done.returncode == 128 + wanted, (about, done.returncode, done.stderr)
        assert "Traceback" not in done.stderr and "defect" not in done.stderr, (about, done.stderr)
        files = {path.name for path in folder.rglob("*") if not path.is_dir()}
        assert files <= {".lock", "vm.log", "vm.end"}, (about, files)
        while processes(folder):  # a keeper is about to end
            pass
