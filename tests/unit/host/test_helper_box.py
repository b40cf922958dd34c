"""The powers of a large helper, such as an emulated host's QEMU, in its box."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyvmm.host import confinement, helper_box
from pyvmm.host.programs import find_program

pytestmark = pytest.mark.skipif(
    not confinement.available(), reason="this kernel cannot confine a program"
)
SAFETY_TIMEOUT = 60

ATTEMPTS = """
import ctypes, errno, json, os, resource, signal, socket, sys
folder, outside, victim, fd = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
libc = ctypes.CDLL(None, use_errno=True)
def call(*words):
    failed = libc.syscall(*map(ctypes.c_long, words)) < 0
    if failed and ctypes.get_errno() in (errno.EPERM, errno.EACCES):
        raise PermissionError(ctypes.get_errno(), "call")
def abstract():
    socket.socket(socket.AF_UNIX).connect(chr(0) + "pyvmm-helper-" + str(victim))
attempts = {
    "read": lambda: open("/etc/passwd").read(1),
    "write inside": lambda: open(folder + "/new", "w").write("x"),
    "make a folder inside": lambda: os.mkdir(folder + "/sub"),
    "rename inside": lambda: os.rename(folder + "/new", folder + "/sub/other"),
    "write what was opened before": lambda: os.write(fd, b"x"),
    "write outside": lambda: open(outside + "/kept", "r+").write("x"),
    "make outside": lambda: open(outside + "/new", "w"),
    "remove outside": lambda: os.unlink(outside + "/kept"),
    "signal others": lambda: os.kill(victim, 0),
    "use io_uring": lambda: call(425, 1, 0),
    "trace others": lambda: call(101, 0x4206, victim, 0, 0),
    "name the machine": lambda: call(170, 0, 0),
    "reach an abstract socket": abstract,
    "listen for TCP": lambda: socket.socket().bind(("127.0.0.1", 0)),
}
found = {}
for name, attempt in attempts.items():
    try:
        attempt()
        found[name] = "done"
    except OSError as error:
        found[name] = errno.errorcode.get(error.errno, str(error))
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines())
more = [int(status[name], 16) & ~0x80000DF for name in ("CapEff", "CapBnd")]
found["status"] = [status["NoNewPrivs"], *more]
found["core"] = resource.getrlimit(resource.RLIMIT_CORE)
print(json.dumps(found))
"""


def test_a_helper_writes_what_is_named_and_reaches_nothing_else(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "kept").write_text("kept")
    abi = confinement.landlock_version()
    with (
        subprocess.Popen(["sleep", "1000"]) as victim,
        open(outside / "opened", "wb") as opened,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind(f"\0pyvmm-helper-{victim.pid}")
        abstract.listen()
        try:
            arguments = [str(inside), str(outside), str(victim.pid), str(opened.fileno())]
            program = [sys.executable, "-c", ATTEMPTS, *arguments]
            done = subprocess.run(
                helper_box.command(program, [str(inside)]),
                capture_output=True,
                check=True,
                pass_fds=(opened.fileno(),),
            )
        finally:
            victim.kill()
    found = json.loads(done.stdout)
    allowed = {"read", "write inside", "make a folder inside", "rename inside"}
    allowed.add("write what was opened before")
    refused = {"write outside", "make outside", "remove outside", "use io_uring", "trace others"}
    refused.add("name the machine")
    if abi >= 4:
        refused.add("listen for TCP")
    if abi >= 6:
        refused |= {"signal others", "reach an abstract socket"}
    assert {name for name in allowed if found[name] == "done"} == allowed, found
    assert {name for name in refused if found[name] in ("EPERM", "EACCES")} == refused, found
    privileges, effective, bounding = found["status"]
    assert privileges == "1" and effective == 0 and found["core"] == [0, 0], found
    assert bounding == 0 or os.geteuid(), found  # only root can give that up
    assert (outside / "kept").read_text() == "kept"


# Starts a helper as an emulated host starts its QEMU, and says its number.
PARENT = """
import subprocess, sys, time
from pyvmm.host import helper_box
line = [sys.argv[1], "--pdeathsig", "KILL", "--", *helper_box.command([sys.argv[2], "1000"])]
print(subprocess.Popen(line).pid, flush=True)
time.sleep(1000)
"""


def test_a_helper_is_gone_with_whoever_has_started_it() -> None:
    setpriv, sleep = find_program("setpriv"), find_program("sleep")
    if setpriv is None or sleep is None:
        pytest.skip("setpriv is not installed")
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, setpriv, sleep], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        helper = int(parent.stdout.readline())
        try:
            deadline = time.monotonic() + SAFETY_TIMEOUT
            while "sleep" not in Path(f"/proc/{helper}/comm").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            held = os.pidfd_open(helper)
        finally:
            parent.send_signal(signal.SIGKILL)
    # Whoever adopts it may leave it unburied, so its end is what counts.
    poll = select.poll()
    poll.register(held, select.POLLIN)
    assert poll.poll(1000 * SAFETY_TIMEOUT)
    os.close(held)


def test_a_program_that_is_not_there_is_told_in_one_line() -> None:
    done = subprocess.run(helper_box.command(["/no/such/program"]), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "cannot run /no/such/program: No such file or directory\n"
