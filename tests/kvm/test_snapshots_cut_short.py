"""Snapshots and restores that are cut short: killed at each stage, without room, at the same time
as others, by a client that hardly reads. Each time one line at the most, and nothing is left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import pytest
from c_guest import c_guest
from echo_guest import echo_kernel
from test_snapshot_rounds import goes_on
from test_snapshots import SAFETY_TIMEOUT, Guest, folder, pyvmm

from pyvmm import Pool
from pyvmm.api import pool as pool_module
from pyvmm.api.errors import VMTimeout
from pyvmm.api.template import ForkedMonitor
from pyvmm.control import registry
from pyvmm.control.client import Client
from pyvmm.control.snapshot_store import folder as snapshots_folder
from pyvmm.spec.vm import VmSpec

__all__ = ["folder"]  # a fixture


@pytest.fixture
def full(folder: Path) -> Iterator[Guest]:
    """A guest called `one`, with 16 MiB in its memory that are not zeroes."""
    (folder / "initrd").write_bytes(random.Random(1).randbytes(16 << 20))
    kernel, initrd = echo_kernel(folder), f"{folder}/initrd"
    options = ("--kernel", kernel, "--initrd", initrd, "--name", "one", "--memory", "64M")
    with Guest(*options) as guest:
        guest.says(b"ready")
        yield guest


def echoes(guest: Guest, text: bytes) -> None:
    guest.hears(text)
    guest.says(text)


def test_a_client_that_hardly_reads_does_not_keep_the_vm_paused(full: Guest) -> None:
    """It takes 80 KB in a second, which is enough for a piece now and then."""
    over = Event()
    with Client.connect("one") as client:
        stream = client.upgrade("snapshot", stop=False).socket

        def read_a_little() -> None:
            while not over.wait(0.05):
                with suppress(BlockingIOError):
                    stream.recv(4096)

        reader = Thread(target=read_a_little)
        reader.start()
        try:
            echoes(full, b"on")
        finally:
            over.set()
            reader.join()
            stream.close()
    assert pyvmm("snapshot", "one", "first").returncode == 0


# Runs `pyvmm run` and dies by SIGKILL as the function in argv[1] is called, or has returned.
DIES = """
import importlib, os, signal, sys
from pyvmm import monitor
when, place, *sys.argv[1:] = sys.argv[1:]
module, _, name = place.partition(":")
owner, _, name = name.rpartition(".")
module = importlib.import_module(module)
owner = getattr(module, owner) if owner else module
function = getattr(owner, name)
def die(*args, **options):
    if when == "after":
        function(*args, **options)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, die)
from pyvmm.cli import main
main()
"""
STAGES = {
    "the state is read": ("after", "pyvmm.control.snapshot_store:read_state"),
    "it has a name": ("after", "pyvmm.control.registry:register"),
    "KVM is open": ("after", "pyvmm.monitor.restored:Restoring.open_kvm"),
    "devices are open": ("before", "pyvmm.monitor.restored:Restoring.prepare"),
    "memory is mapped": ("after", "pyvmm.monitor.restored:Restoring.prepare"),
    "the machine is there": ("before", "pyvmm.monitor.restored:Restoring.restore"),
    "vCPUs are restored": ("after", "pyvmm.machine.board.x86:X86Board.restore"),
    "workers run": ("after", "pyvmm.monitor.restored:Restoring.restore"),
    "it is confined": ("after", "pyvmm.monitor.confine:Confinement.enter"),
    "it answers": ("after", "pyvmm.monitor.phases:_Answering.start"),
}


def files_of(folder: Path) -> list[str]:
    """All but what VMs that have ended have in the directory of sockets."""
    found = (path for path in folder.rglob("*") if path.is_file() or path.is_socket())
    return sorted(str(path) for path in found if not path.is_relative_to(folder / "runtime"))


def test_a_restore_that_is_killed_leaves_nothing(folder: Path) -> None:
    disk, port = f"{folder}/disk,snapshot", f"name=org.test,path={folder}/port"
    options = ("--name", "one", "--disk", disk, "--port", port, "--memory", "64M")
    with Guest("--kernel", echo_kernel(folder), *options) as guest:
        guest.says(b"ready")
        assert pyvmm("snapshot", "one", "first").returncode == 0
        guest.off()
    before = files_of(folder)
    for stage, (when, place) in STAGES.items():
        argv = [sys.executable, "-c", DIES, when, place]
        argv += ["run", "--kvm=host", "--restore", "first", "--name", "back"]
        done = subprocess.run(argv, capture_output=True, input=b"", timeout=SAFETY_TIMEOUT)
        assert done.returncode == -signal.SIGKILL, (stage, done)
        assert json.loads(pyvmm("ps", "--json").stdout) == [], stage
        left = set(files_of(folder)) - set(before)
        assert left <= {f"{folder}/port"}, (stage, left)  # whoever is next takes its place
    with Guest("--restore", "first", "--name", "back") as guest:
        echoes(guest, b"as if nothing had been")
        guest.off()
    assert files_of(folder) == before
    assert pyvmm("snapshot", "rm", "first").returncode == 0
    assert os.listdir(snapshots_folder()) == []


# Arguments: what is mounted with, where, and a command, whose exit code it has; then it says what
# is left there.
WITHOUT_ROOM = """
mount -t tmpfs -o "$1,mode=700" none "$2" || exit 99
place=$2
shift 2
"$@"
code=$?
find "$place" -mindepth 3 -printf "left %P\\n"
exit $code
"""


@pytest.mark.parametrize("room", ["size=64k", "size=4m", "nr_inodes=4"])
def test_without_room_on_the_disk_nothing_is_stored_and_the_vm_goes_on(
    full: Guest, folder: Path, room: str
) -> None:
    place = folder / "state"
    place.mkdir(exist_ok=True)
    unshare = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.geteuid() else [])]
    shell = [*unshare, "sh", "-c", WITHOUT_ROOM, "sh", room, str(place)]
    may = subprocess.run([*shell, "true"], capture_output=True, text=True)
    if may.returncode:
        pytest.skip(f"no file system can be mounted here: {may.stderr.strip()}")
    command = [sys.executable, "-m", "pyvmm", "snapshot", "one", "first"]
    done = subprocess.run(
        [*shell, *command], capture_output=True, text=True, timeout=SAFETY_TIMEOUT
    )
    assert done.returncode in (1, 2), done
    [line] = done.stderr.splitlines()
    assert line.startswith("pyvmm: ") and "No space left on device" in line
    assert not done.stdout, "something is left"
    echoes(full, b"on")


def test_a_snapshot_that_is_removed_meanwhile_is_cloned_or_removed(folder: Path) -> None:
    options = ("--kernel", echo_kernel(folder), "--name", "one", "--memory", "64M")
    with Guest(*options) as guest:
        guest.says(b"ready")
        for delay in (0.0, 0.1, 0.2, 0.4):
            assert pyvmm("snapshot", "one", "first").returncode == 0
            argv = [sys.executable, "-m", "pyvmm", "clone", "first", "--name", "copy", "--kvm=host"]
            pipe = subprocess.PIPE
            with subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True) as cloning:
                time.sleep(delay)
                removed = pyvmm("snapshot", "rm", "first")
                output, errors = cloning.communicate(timeout=SAFETY_TIMEOUT)
            if cloning.returncode:
                [line] = errors.splitlines()
                assert line.startswith("pyvmm: ") and "first" in line
                assert registry.running() == ["one"], "half of a clone is left"
            else:
                assert output == "copy\n" and "copy" in registry.running()
                assert pyvmm("stop", "--now", "copy").returncode == 0
            if removed.returncode:
                assert "is being restored" in removed.stderr
                assert cloning.returncode == 0
                assert pyvmm("snapshot", "rm", "first").returncode == 0
            assert os.listdir(snapshots_folder()) == []


def test_two_restores_at_once_share_no_overlay(folder: Path) -> None:
    disk, overlay = folder / "disk", folder / "overlay"
    options = ("--disk", f"{disk},overlay={overlay}", "--memory", "64M", "--name", "one")
    with Guest("--kernel", c_guest("busy_guest.c", folder, "DISK"), *options) as guest:
        guest.says(b"ready")
        goes_on(guest, 1)
        assert pyvmm("snapshot", "one", "first", "--stop").returncode == 0
        guest.process.communicate(timeout=SAFETY_TIMEOUT)
    before = {path: path.read_bytes() for path in (disk, overlay)}
    names = files_of(folder)
    with (
        Guest("--restore", "first", "--name", "a") as first,
        Guest("--restore", "first", "--name", "b") as second,
    ):
        for _ in range(2):
            goes_on(first, 1)
            goes_on(second, 1)
        assert pyvmm("snapshot", "a", "second").returncode == 0, "one can be saved in turn"
        first.off()
        goes_on(second, 1)
        second.off()
    with Guest("--restore", "second") as third:
        goes_on(third, 1)
        third.off()
    assert pyvmm("snapshot", "rm", "second").returncode == 0
    assert files_of(folder) == names
    assert {path: path.read_bytes() for path in before} == before, "the original's disk has changed"


def test_a_pools_time_limit_is_for_what_the_guest_is_told_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What that does with a guest that does not answer is tested with agents that lie."""
    told: list[float] = []

    def late(monitor: ForkedMonitor, original: VmSpec, deadline: float) -> None:
        told.append(deadline - time.monotonic())
        raise VMTimeout("its guest did not answer in time")

    monkeypatch.setattr(pool_module, "introduce", late)
    with Guest("--kernel", echo_kernel(folder), "--name", "one", "--memory", "64M") as guest:
        guest.says(b"ready")
        assert pyvmm("snapshot", "one", "first").returncode == 0
        guest.off()
    with Pool("first", 1, kvm="host") as pool:
        wait_for(lambda: pool.ready == 1)
        with pytest.raises(VMTimeout, match="did not answer in time"):
            pool.take(1000)
        assert "first-1" not in registry.running(), "nobody has it, and it runs"
    assert 0 < told[0] <= 1000
    assert registry.running() == []


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SAFETY_TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
