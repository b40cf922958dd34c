"""`--cgroup`: a monitor and its helpers in a group of processes, and nothing of it left."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from echo_guest import echo_kernel
from front_end_rig import until
from running import SAFETY_TIMEOUT, Running

from pyvmm.errors import ConfigError
from pyvmm.host.programs import find_program
from pyvmm.kvm.system import Kvm
from pyvmm.monitor import cgroup
from pyvmm.monitor.keeper import Keeper


@pytest.fixture
def group() -> Iterator[Path]:
    """One that is there, and empty."""
    ours = cgroup._ours()
    if not ours:
        pytest.skip("this machine has no cgroup v2")
    path = Path(ours) / f"pyvmm.test.{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no groups of processes can be made here: {error}")
    yield path
    for folder in (*path.glob("pyvmm-*"), path):
        folder.rmdir()


def members(group: Path) -> set[int]:
    return {int(line) for line in (group / "cgroup.procs").read_text().split()}


def has_keeper(group: Path) -> bool:
    names = []
    for pid in members(group):
        with suppress(OSError):
            names.append(Path(f"/proc/{pid}/comm").read_text())
    return "pyvmm-keeper\n" in names


@pytest.mark.parametrize("mode", ["auto", "strict", "off"])
def test_a_monitor_and_its_helpers_are_in_the_group(
    kvm: Kvm, tmp_path: Path, group: Path, mode: str
) -> None:
    helper = find_program("qemu-img")
    options = ["--kernel", echo_kernel(tmp_path), "--cgroup", str(group), "--confine", mode]
    if helper is not None and find_program("qemu-storage-daemon") is not None:
        image = tmp_path / "image.qcow2"
        subprocess.run([helper, "create", "-q", "-f", "qcow2", image, "1M"], check=True)
        options += ["--disk", str(image)]
    with Running(tmp_path, "vm", b"", *options) as vm:
        least = 1 + ("--disk" in options)  # with its server
        until(lambda: len(members(group)) >= least and (mode == "off" or has_keeper(group)))
        assert vm.process.pid in members(group)
        assert vm("stop", "vm", "--timeout", "0").returncode == 0
        vm.process.wait(SAFETY_TIMEOUT)
    until(lambda: not members(group))  # its keeper sees its end, and goes


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_a_group_of_its_own_goes_with_it(kvm: Kvm, tmp_path: Path, group: Path, mode: str) -> None:
    (group / "pyvmm-left").mkdir()
    wanted = f"{group},pids=512"
    has_pids = "pids" in (group / "cgroup.controllers").read_text().split()
    options = ("--kernel", echo_kernel(tmp_path), "--cgroup", wanted, "--confine", mode)
    if not has_pids:
        done = Running.__new__(Running)
        with pytest.raises(AssertionError, match="has no pids controller"):
            done.__init__(tmp_path, "vm", b"", *options)  # type: ignore[misc]
        done.process.wait(SAFETY_TIMEOUT)
        assert not list(group.glob("pyvmm-*"))  # the one that another has left has gone, too
        return
    with Running(tmp_path, "vm", b"", *options) as vm:
        made = group / "pyvmm-vm"
        assert vm.process.pid in members(made) and not (group / "pyvmm-left").exists()
        assert (made / "pids.max").read_text() == "512\n"
        assert vm("stop", "vm", "--timeout", "0").returncode == 0
        vm.process.wait(SAFETY_TIMEOUT)
    until(lambda: not made.exists())


HALT = b"\xf4\xeb\xfd"  # hlt, again and again

GREEDY = """
import os, threading, time
from pyvmm.virtio.worker import QueueDevice


class Greedy(QueueDevice):
    name, device_type, queue_sizes = "greedy", 42, (8,)

    def __init__(self, what):
        self.what, self.taken = what, []

    def serve(self, queue):
        pass

    def stats(self):
        getattr(self, self.what)()
        return {}

    def memory(self):
        while True:
            self.taken.append(bytearray(os.urandom(1 << 20)))

    def pids(self):
        for number in range(100):
            try:
                threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
            except RuntimeError:
                return

    def cpus(self):
        while True:
            pass
"""


def counted(group: Path, file: str, key: str) -> int:
    words = (line.split() for line in (group / file).read_text().splitlines())
    return int(dict(words)[key])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what", "limit", "file", "key"),
    [
        ("memory", "memory=160M", "memory.events", "oom_kill"),
        ("pids", "pids=32", "pids.events", "max"),
        ("cpus", "cpus=0.5", "cpu.stat", "nr_throttled"),
    ],
)
def test_who_takes_a_device_over_has_no_more_than_the_group(
    kvm: Kvm, tmp_path: Path, group: Path, what: str, limit: str, file: str, key: str
) -> None:
    controller = {"cpus": "cpu"}.get(what, what)
    if controller not in (group / "cgroup.controllers").read_text().split():
        pytest.skip(f"this machine has no {controller} controller for groups of cgroup v2")
    (tmp_path / "greedy.py").write_text(GREEDY)
    device = f"{tmp_path}/greedy.py:Greedy,what={what}"
    options = ("--memory", "32M", "--cgroup", f"{group},{limit}", "--device", device)
    with Running(tmp_path, "vm", HALT, *options) as vm:
        made = group / "pyvmm-vm"
        until(lambda: has_keeper(made))
        before = counted(made, file, key)  # the start alone may have met a limit
        with vm.start_command("stats", "vm") as asks:
            if what == "memory":
                assert vm.process.wait(SAFETY_TIMEOUT) == -signal.SIGKILL
            else:
                until(lambda: counted(made, file, key) > before)
            asks.kill()
        if what == "pids":
            assert int((made / "pids.current").read_text()) <= 32
        elif what == "cpus":
            (made / "cpu.max").write_text("max")  # the keeper has its work to do still
        vm.process.kill()
        vm.process.wait(SAFETY_TIMEOUT)
        until(lambda: not made.exists())
        assert vm.ps() == []
    assert what != "memory" or counted(group, file, key) >= 1


def test_a_keeper_is_the_last_one_in_it(group: Path, tmp_path: Path) -> None:
    home, inner = cgroup._ours(), group / "inner"
    inner.mkdir()
    cgroup._write(str(inner), "cgroup.procs", str(os.getpid()))
    try:
        made = cgroup.Group(cgroup.Wanted("", {}), "vm")
        keeper = Keeper(str(tmp_path), "vm")
        keeper.leave(made)
        keeper.enter_box()
        assert keeper.pid in members(group / "pyvmm-vm")
    finally:
        cgroup._write(home, "cgroup.procs", str(os.getpid()))  # as a monitor that ends
    keeper._socket.close()
    os.waitpid(keeper.pid, 0)
    assert not (group / "pyvmm-vm").exists()
    inner.rmdir()


def test_one_that_another_vm_takes_for_left_behind_is_made_again(
    group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, inner, write = cgroup._ours(), group / "inner", cgroup._write
    swept: list[str] = []

    def sweep_first(place: str, file: str, text: str) -> None:
        if place.endswith("pyvmm-vm") and len(swept) < 3:
            os.rmdir(place)
            swept.append(place)
        write(place, file, text)

    inner.mkdir()
    monkeypatch.setattr(cgroup, "_ours", lambda: str(inner))
    monkeypatch.setattr(cgroup, "_write", sweep_first)
    try:
        made = cgroup.Group(cgroup.Wanted("", {}), "vm")
        assert len(swept) == 3 and os.getpid() in members(group / "pyvmm-vm")
        made.leave()
        assert os.getpid() in members(inner) and not (group / "pyvmm-vm").exists()
    finally:
        write(home, "cgroup.procs", str(os.getpid()))
        inner.rmdir()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a group"),
        ("/x,memory=much", "memory=much is not a limit"),
        ("/x,memory=1G,memory=2G", "memory is there twice"),
        ("/x,pids=0", "pids=0 is not a limit"),
        ("/x,pids=-3", "pids=-3 is not a limit"),
        ("/x,cpus=0", "cpus=0 is not a limit"),
        ("/x,cpus=nan", "cpus=nan is not a limit"),
        ("/x,cpus=inf", "cpus=inf is not a limit"),
        ("/x,io=1", "io=1 is not a limit"),
        ("/x,", "= is not a limit"),
    ],
)
def test_a_group_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cgroup.Wanted.parse(text)


def test_limits_are_the_kernel_s_words() -> None:
    assert cgroup.Wanted.parse("own,memory=1G,pids=64,cpus=1.5") == (
        "",
        {"memory.max": str(1 << 30), "pids.max": "64", "cpu.max": "150000 100000"},
    )


@pytest.mark.parametrize("place", ["/no/such/place", "/tmp", "/proc/self"])
def test_a_place_that_is_no_group_is_told_in_one_line(place: str) -> None:
    with pytest.raises(ConfigError, match="is not a group of cgroup v2"):
        cgroup.Group(cgroup.Wanted(place, {}), "vm")
