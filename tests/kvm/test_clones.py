"""Copies of a guest on real KVM, one by one and from a pool: all of them or none, each with nothing
of another, and nothing left of any."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from echo_guest import echo_kernel

from pyvmm import VM, Pool
from pyvmm.api import clones
from pyvmm.api.aio import AsyncVM
from pyvmm.api.errors import VMError, VMTimeout
from pyvmm.api.template import ForkedMonitor, Template
from pyvmm.control import registry
from pyvmm.control import snapshot_store as store
from pyvmm.errors import ConfigError, HostError
from pyvmm.kvm.system import Kvm
from pyvmm.monitor import snapshots
from pyvmm.spec.surroundings import USUAL
from pyvmm.spec.vm import VmSpec

SAFETY_TIMEOUT = 60


@pytest.fixture
def folder(kvm: Kvm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    return tmp_path


def guest(folder: Path, **options: object) -> VM:
    """One that echoes what it is told."""
    usual = {"kernel": echo_kernel(folder), "kvm": "host", "memory": "64M", "vsock": False}
    return VM(**{**usual, **options})  # type: ignore[arg-type]


@pytest.fixture
def original(folder: Path) -> Iterator[VM]:
    with guest(folder, name="one", disks=[f"{folder}/disk,snapshot"]) as vm:
        vm.console.expect_exact("ready", timeout=SAFETY_TIMEOUT)
        yield vm


@pytest.fixture
def ready(original: VM) -> str:
    """The name of a snapshot, whose VM has gone."""
    original.snapshot("ready", stop=True)
    original.wait(SAFETY_TIMEOUT)
    return "ready"


def echoes(vm: VM, text: str) -> None:
    vm.console.send(text)
    vm.console.expect_exact(text, timeout=SAFETY_TIMEOUT)


def kept() -> list[str]:
    """The names in the directory of snapshots, hidden ones too."""
    return sorted(os.listdir(store.folder()))


def pyvmm(*args: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pyvmm", *args]
    return subprocess.run(argv, capture_output=True, text=True, timeout=SAFETY_TIMEOUT)


def refused(*args: str) -> str:
    """The one line that a command is refused with."""
    done = pyvmm(*args)
    assert done.returncode == 2, done
    [line] = done.stderr.splitlines()
    assert line.startswith("pyvmm: ") and "Traceback" not in line
    return line


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + SAFETY_TIMEOUT
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def test_clones_of_a_vm_that_runs_on(original: VM) -> None:
    echoes(original, "abc")
    with original.clone(name="copy") as copy:
        assert copy.name == "copy"
        echoes(copy, "of the copy")
        echoes(original, "of the original")
        assert "ready" not in copy.console.text, "it has booted"
        assert "original" not in copy.console.text
        assert kept() == [], "what the clones began with is left"
        several = original.clones(3)
        try:
            assert len({vm.name for vm in several} | {"one", "copy"}) == 5
            for vm in several:
                echoes(vm, vm.name)
        finally:
            for vm in several:
                vm.close()
    assert registry.running() == ["one"]

    async def from_a_loop() -> None:
        async with await AsyncVM.of(original).clone() as copy:
            await copy.console.send("hello")
            await copy.console.expect_exact("hello", timeout=SAFETY_TIMEOUT)
        [only] = await AsyncVM.of(original).clones(1)
        await only.close()

    asyncio.run(from_a_loop())
    assert registry.running() == ["one"] and kept() == []


def test_the_command(ready: str) -> None:
    """They are in the background, each with a name of its own."""
    done = pyvmm("clone", ready, "-n", "3", "--kvm=host")
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    try:
        assert len(set(names)) == 3 and sorted(names) == registry.running()
        named = pyvmm("clone", names[0], "--name", "named", "--kvm=host")
        assert named.returncode == 0 and named.stdout == "named\n", named.stderr
        names.append("named")
        rows = json.loads(pyvmm("ps", "--json").stdout)
        assert {row["state"] for row in rows} == {"running"} and len(rows) == 4
        assert pyvmm("snapshot", "rm", ready).returncode == 0, "they need it still"
        assert kept() == []
    finally:
        for name in names:
            pyvmm("stop", "--now", name)
    assert registry.running() == []


def test_what_cannot_be_is_refused_in_one_line(ready: str, folder: Path) -> None:
    assert "no snapshot 'other'" in refused("clone", "other")
    for count in ("0", "-1", "257"):
        assert "cure" not in (line := refused("clone", ready, "-n", count)) and "1 to 256" in line
    assert "not a valid integer" in refused("clone", ready, "-n", "many")
    assert "has a slash" in refused("clone", "../ready")
    assert "an empty text is not a name" in refused("clone", ready, "--name", "")
    with guest(folder, name="taken-2") as vm:
        vm.console.expect_exact("ready", timeout=SAFETY_TIMEOUT)
        line = refused("clone", ready, "--name", "taken", "-n", "2", "--kvm=host")
        assert "'taken-2' is running" in line
        assert registry.running() == ["taken-2"]
    fd = os.open(os.path.join(store.folder(), ready), os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert "is being removed" in refused("clone", ready, "--kvm=host")
    finally:
        os.close(fd)
    (folder / "disk").write_bytes(b"x" + bytes((1 << 20) - 1))
    assert "disk has changed since" in refused("clone", ready, "--kvm=host")
    assert registry.running() == []


def test_a_disk_that_the_vm_writes_itself_is_not_shared(folder: Path) -> None:
    with guest(folder, name="one", disks=[f"{folder}/disk"]) as vm:
        vm.console.expect_exact("ready", timeout=SAFETY_TIMEOUT)
        with pytest.raises(ConfigError, match="cannot share the disk disk0"):
            vm.clone()
        assert kept() == [] and registry.running() == ["one"]
        echoes(vm, "on")


def test_all_clones_run_or_none_does(folder: Path) -> None:
    with guest(folder, name="one", ports=[{"name": "org.test", "path": f"{folder}/port"}]) as vm:
        vm.console.expect_exact("ready", timeout=SAFETY_TIMEOUT)
        with socket.socket(socket.AF_UNIX) as other:  # where the second one's is to be
            other.bind(f"{folder}/port-many-2")
            other.listen()
            with pytest.raises(VMError, match=r"1 of 3 clones.*many-2: .*port-many-2"):
                vm.clones(3, name="many")
        assert registry.running() == ["one"] and kept() == []
        left = sorted(path.name for path in folder.iterdir() if path.is_socket())
        assert left == ["port", "port-many-2"]


def test_those_that_would_outlive_us_do_not_run_either(
    ready: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun = clones._begin, threading.Semaphore(0)
    end, codes = ForkedMonitor.end, []

    def begin(monitor: ForkedMonitor, original: VmSpec) -> None:
        if monitor.spec.name == "many-3":
            for _ in range(2):
                assert begun.acquire(timeout=SAFETY_TIMEOUT)
            raise ValueError("too late")
        real(monitor, original)
        begun.release()

    def killed(monitor: ForkedMonitor) -> None:
        codes.append(end(monitor).exit_code)

    monkeypatch.setattr(clones, "_begin", begin)
    monkeypatch.setattr(ForkedMonitor, "end", killed)
    with pytest.raises(VMError, match=r"1 of 3 clones .* none runs: many-3: too late"):
        clones.clone(ready, 3, name="many", kvm="host", detached=True)
    # None is of one that was taken for ended, which it was not.
    assert registry.running() == [] and codes == [-signal.SIGKILL] * 3


# --- pools ----------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def waiting(pool: Pool) -> list[ForkedMonitor]:
    until(lambda: pool.ready == pool.size, "the pool does not fill")
    return [one.monitor for one in pool._waiting]


def test_the_clock_of_a_vm_that_waits_stands_still(ready: str) -> None:
    """It goes on when the VM is taken, and not when that was made."""

    def clock(name: str) -> int:
        with store.reading(name) as saved:
            return int(saved.state["machine"]["board"]["vm"]["clock"])

    with Pool(ready, 1, kvm="host", refill=False) as pool:
        waiting(pool)
        time.sleep(3)
        taken_at = time.monotonic()
        with pool.take() as vm:
            echoes(vm, "one")
            vm.snapshot("later")
        ran = time.monotonic() - taken_at
    assert 0 < clock("later") - clock(ready) <= ran * 1e9


def test_a_pool_is_taken_from_and_fills_again(ready: str) -> None:
    with Pool(ready, 2, kvm="host") as pool:
        before = [vm.name for vm in waiting(pool)]
        states = {row["name"]: row["state"] for row in json.loads(pyvmm("ps", "--json").stdout)}
        assert states == dict.fromkeys(before, "paused")
        with pool.take() as first, pool.take() as second:
            assert [first.name, second.name] == before
            echoes(first, "one")
            echoes(second, "two")
            assert "ready" not in first.console.text and "two" not in first.console.text
            others = [vm.name for vm in waiting(pool)]
            assert not set(others) & set(before)
            # So many and no more, however long one waits.
            assert len(registry.running()) == 4
        assert first.outcome is not None and second.outcome is not None
        pids = [vm.pid for vm in waiting(pool)] + [pool._template.pid]
        kept_on = pool.take()
    assert not any(alive(pid) for pid in set(pids) - {kept_on.pid, pool._template.pid})
    # One that was taken is not the pool's any more.
    echoes(kept_on, "still here")
    kept_on.close()
    until(lambda: not alive(pool._template.pid), "the common process is left")
    assert registry.running() == []
    with pytest.raises(VMError, match="closed"):
        pool.take()


def test_a_pool_that_is_not_filled_again(ready: str) -> None:
    with Pool(ready, 2, kvm="host", refill=False) as pool:
        pool.wait_ready(SAFETY_TIMEOUT)
        dying, _ = waiting(pool)
        os.kill(dying.pid, signal.SIGKILL)  # one that nobody has had is replaced
        until(lambda: dying.outcome is not None, "its end is not noticed")
        with pool.take() as first, pool.take() as second:
            echoes(first, "one")
            echoes(second, "two")
            assert dying.name not in {first.name, second.name}
            with pytest.raises(VMError, match="have been taken"):
                pool.take()
            with pytest.raises(VMError, match="have been taken"):
                pool.wait_ready()
            assert len(registry.running()) == 2


def descriptors(pid: int) -> dict[str, list[str]]:
    """Its descriptors, by the kind of thing."""
    found: dict[str, list[str]] = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(path)
        except FileNotFoundError:  # closed meanwhile
            continue
        found.setdefault(re.split(r"[:\[]", target)[0], []).append(target)
    return found


def test_a_vm_of_a_pool_has_nothing_of_another(ready: str, folder: Path) -> None:
    """A look through /proc: no descriptor, lock, mapping or child in common."""
    with Pool(ready, 3, kvm="host") as pool:
        waiting(pool)
        with pool.take() as taken:
            echoes(taken, "secret-of-the-first")
            vms: list[VM | ForkedMonitor] = [taken, *waiting(pool)]
            seen: dict[str, int] = {}
            for vm in vms:
                there = descriptors(vm.pid)
                for target in (*there.get("pipe", ()), *there.get("socket", ())):
                    assert seen.setdefault(target, vm.pid) == vm.pid, target
                kvm = [one for one in there["anon_inode"] if "kvm-vm" in one]
                assert len([one for one in kvm if one.endswith("kvm-vm")]) == 1, kvm
                # The directory of the snapshot is the common process's alone.
                files = [one for some in there.values() for one in some]
                assert not [path for path in files if path.endswith("/ready")], files
            # What was forked later knows nothing of what was said to an earlier one.
            for vm in vms[1:]:
                assert b"secret-of-the-first" not in readable_memory(vm.pid)
            template = descriptors(pool._template.pid)
            shared = {*template.get("pipe", ()), *template.get("socket", ())} & seen.keys()
            assert not shared, shared
            locks = Path("/proc/locks").read_text().splitlines()
            of_template = [line for line in locks if line.split()[4] == str(pool._template.pid)]
            assert len(of_template) <= 1, "only the snapshot is held"


def readable_memory(pid: int) -> bytes:
    """All private memory of a process that is not a file's."""
    found = bytearray()
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            place, rights, _, _, inode = line.split()[:5]
            if rights.startswith("rw") and inode == "0":
                start, end = (int(one, 16) for one in place.split("-"))
                try:
                    found += os.pread(memory.fileno(), end - start, start)
                except OSError:
                    continue
    return bytes(found)


def test_what_dies_in_a_pool_is_replaced_and_the_pools_end_is_everybodys(ready: str) -> None:
    with Pool(ready, 2, kvm="host") as pool:
        first, second = waiting(pool)
        os.kill(first.pid, signal.SIGKILL)
        until(lambda: first.outcome is not None, "its end is not noticed")
        names = {vm.name for vm in waiting(pool)}
        assert second.name in names and first.name not in names
        with pool.take() as taken:
            echoes(taken, "alive")
            pids = [taken.pid, *(vm.pid for vm in waiting(pool))]
            os.kill(pool._template.pid, signal.SIGKILL)
            until(lambda: not any(map(alive, pids)), "monitors outlive what they were forked from")
            with pytest.raises(VMError, match="process has"):
                pool.take(SAFETY_TIMEOUT)
    until(lambda: registry.running() == [], "something is left")


def test_a_pool_that_is_not_closed_ends_with_its_process(ready: str) -> None:
    code = (
        "import sys, time; from pyvmm import Pool; p = Pool('ready', 2, kvm='host')\n"
        "while p.ready < 2: time.sleep(0.01)\n"
        "print(p._template.pid, *(one.monitor.pid for one in p._waiting), flush=True)\n"
        "sys.stdin.read()"
    )
    argv, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as user:
        assert user.stdout is not None
        pids = [int(text) for text in user.stdout.readline().split()]
        assert len(pids) == 3 and all(map(alive, pids))
        user.kill()
    until(lambda: not any(map(alive, pids)), "they outlive whose pool they were")


def test_without_descriptors_there_is_no_process_and_nothing_else_is_lost(ready: str) -> None:
    with ExitStack() as closing:
        with snapshots.kept(ready) as original:
            template = closing.enter_context(Template(original, "host", USUAL))
            spec = snapshots.copy_of(original, "copy")
        usual = resource.prlimit(template.pid, resource.RLIMIT_NOFILE)
        held = set(map(int, os.listdir(f"/proc/{template.pid}/fd")))
        free = [number for number in range(len(held) + 9) if number not in held]
        for limit in free[:6]:
            resource.prlimit(template.pid, resource.RLIMIT_NOFILE, (limit, usual[1]))
            with pytest.raises(VMError, match="Too many open files"):
                template.fork(spec, "copy")
            with pytest.raises(ConfigError, match="is being restored"):
                store.remove(ready)
        resource.prlimit(template.pid, resource.RLIMIT_NOFILE, usual)
        # Here there may be none as well.
        held = set(map(int, os.listdir("/proc/self/fd")))
        free = [number for number in range(len(held) + 20) if number not in held]
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        for limit in free[:10]:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
            try:
                with pytest.raises(HostError, match="Too many open files"):
                    template.fork(spec, "copy")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert set(map(int, os.listdir("/proc/self/fd"))) == held
        children = Path(f"/proc/{template.pid}/task/{template.pid}/children")
        deadline = time.monotonic() + SAFETY_TIMEOUT
        while children.read_text():  # the one that nobody could have held
            assert time.monotonic() < deadline
            time.sleep(0.01)
        monitor = template.fork(spec, "copy")
        monitor.await_start(SAFETY_TIMEOUT)
        monitor.end()


def test_bad_pools(ready: str, folder: Path) -> None:
    for size in (0, -1, 257):
        with pytest.raises(ConfigError, match="1 to 256"):
            Pool(ready, size)
    with pytest.raises(ConfigError, match="no snapshot 'other'"):
        Pool("other", 1)
    with Pool(ready, 1, kvm="host") as pool:
        waiting(pool)
        with pytest.raises(ConfigError, match="a VM is being restored"):
            store.remove(ready)
        with pool.take(), pytest.raises(VMTimeout):
            # The one that follows cannot be there at once.
            pool.take(0)
            pool.take(0)
    state = folder / "state/pyvmm/snapshots/ready/state.json"
    state.write_text("{}")
    with pytest.raises(ConfigError, match="of another kind"):
        Pool(ready, 1)
