"""Runs in an emulated arm64 KVM host, with that one's Python: what of pyvmm depends on the
processor and needs no Linux guest. Prints what it found, a line of JSON.

    python3 arm64_inside.py RESETS POWERS_OFF WILD PAIR LITMUS     (see test_linux_arm64.py)
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile

PATIENCE = 600
TIMES = 4
DEVICE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "litmus_device.py")
ROUNDS = "4000"

# A call that the filter turns down, and one that makes a process: of the two ways of telling.
REFUSED = """
import os, signal, sys
from pyvmm.host import box
from pyvmm.host.refusals import Refusals
refusals = Refusals()
on = box.enter(box.Needs(tells=True, answers=refusals.answer)).on
os.kill(os.getpid(), signal.SIGSYS)
refused = 0
for attempt in [lambda: os.setpriority(os.PRIO_PROCESS, 0, 0)] * 5000 + [os.fork] * 3:
    try:
        attempt()
    except PermissionError:
        refused += 1
told = list(refusals.take())
for _ in range(3):
    try:
        os.fork()
    except PermissionError:
        refused += 1
told += refusals.take()
print("calls" in on, refused, refusals.count, sorted(set(told)))
"""
# A keeper that sleeps removes a file if it is the same, passes on a client that asks for no device,
# and wakes for another, and for an alarm. It ends with its monitor, though that is somebody else's
# child, and somebody has the other end of its socket still; it removes what it was told to before.
KEEPER = """
import os, signal, subprocess, sys, tempfile, time
from pyvmm.host import unix_sockets
from pyvmm.monitor import asleep, keeper
def until_named(pid, name):
    while (open(f"/proc/{pid}/comm").read() == "pyvmm-keeper\\n") is not name:
        time.sleep(0.05)
keeper.AWAKE = 3600.0
folder = tempfile.mkdtemp()
made = keeper.Keeper(folder, "web")
for name in "same", "other":
    open(f"{folder}/{name}", "w").close()
    made.announce(f"{folder}/{name}")
made._group = (folder, folder + "/none")
made.enter_box()
os.rename(folder + "/other", folder + "/before")
os.mkdir(folder + "/other")
until_named(made.pid, True)
for name in "same", "other":
    made.remove(f"{folder}/{name}")
print(sorted(os.listdir(folder)), end=" ")
until_named(made.pid, True)
os.kill(made.pid, signal.SIGALRM)
until_named(made.pid, False)
keeper.AWAKE = 0.0
folder = tempfile.mkdtemp()
made = keeper.Keeper(folder, "web")
listener = unix_sockets.listen(folder + "/socket")
passes = made.listen(listener, owner_only=True)
made.enter_box()
passes.setblocking(True)
client = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])"
client += "; s.send(sys.argv[2].encode()); sys.stdin.read()"
told = []
for line in ("{}\\n", '{"method": "disk.add"}\\n'):
    while "asleep" not in told[-1:]:
        with open(f"/proc/{made.pid}/comm") as file:
            told += ["asleep"] * (file.read() == "pyvmm-keeper\\n")
        time.sleep(0.05)
    command = [sys.executable, "-c", client, folder + "/socket", line]
    with subprocess.Popen(command, stdin=subprocess.PIPE):
        said, rights, _, _ = passes.recvmsg(64, 64)
    told += [said.decode().strip(chr(0)), len(rights)]
os.close(made.open_log(False))
print(told, os.listdir(folder + "/logs"))
"""

# Such a monitor. argv: a folder.
LAST = """
import os, signal, sys
from pyvmm.monitor import keeper
open(sys.argv[1] + "/last", "w").close()
made = keeper.Keeper(sys.argv[1], "web")
made.announce(sys.argv[1] + "/last")
made.enter_box()
while open(f"/proc/{made.pid}/comm").read() != "pyvmm-keeper\\n":
    pass
os.kill(made.pid, signal.SIGSTOP)
os.set_inheritable(made._socket.fileno(), True)
waits = [sys.executable, "-c", "import time; time.sleep(3600)"]
other = os.posix_spawn(waits[0], waits, os.environ)
made._socket.send(keeper.REMOVE.pack(b"del", 0))
print(made.pid, other, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def last_words() -> list[object]:
    """What is left in the folder of such a monitor when its keeper has ended."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-c", LAST, folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as monitor:
            assert monitor.stdout is not None
            keeper, other = map(int, monitor.stdout.readline().split())
            monitor.wait(PATIENCE)
            process = os.pidfd_open(keeper)
            os.kill(keeper, signal.SIGCONT)
            has_ended = bool(select.select([process], [], [], PATIENCE)[0])
            os.kill(other, signal.SIGKILL)
        return [has_ended, os.listdir(folder)]


# The modules of a monitor that are in files of their own.
ALONE = """
import sys, pyvmm.monitor.emulated_inside, pyvmm.monitor.phases, pyvmm.machine.board.arm64
for module in list(sys.modules.values()):
    path = getattr(module, "__file__", None) or ""
    if path.endswith(".py") and ".pyc" in str(module.__spec__.cached):
        print(module.__name__)
"""


def ran(*command: str) -> list[object]:
    """[exit code, standard output, standard error] of pyvmm's Python."""
    done = subprocess.run(
        [sys.executable, "-P", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return [done.returncode, done.stdout, done.stderr]


def guest(kernel: str, cpus: int = 4) -> list[object]:
    """A guest of so many vCPUs, to its end."""
    size = (f"--cpus={cpus}", "--memory=64M")
    return ran("-m", "pyvmm", "run", "--kvm=host", *size, "--kernel", kernel)


def main() -> int:
    resets, powers_off, wild, pair, litmus = sys.argv[1:]
    found = {
        "machine": os.uname().machine,
        "alone": ran("-c", ALONE),
        "refused": ran("-c", REFUSED),
        "keeper": ran("-c", KEEPER),
        "last": last_words(),
        "doctor": ran("-m", "pyvmm", "doctor"),
        "resets": guest(resets),
        "powers off": [guest(powers_off) for _ in range(TIMES)],
        "64 vCPUs": guest(powers_off, 64),
        "wild": guest(wild, 1),
        "pair": guest(pair, 1),
        "rings": [ran(DEVICE, litmus, layout, ROUNDS) for layout in ("split", "packed")],
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
