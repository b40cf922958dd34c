"""The powers of code in a device of a running VM: tried in one, with each layer alone, with
none and with all.

A guest on real KVM reads the device's configuration space, and so runs the code.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from boot_images import Elf, Load
from echo_guest import echo_kernel, faulting_kernel
from running import Running

from pyvmm.host import box, confinement
from pyvmm.host.box import (
    CALLS,
    CAPABILITIES,
    FILES,
    LAYERS,
    LIMITS,
    NAMESPACES,
    NETWORK,
    PRIVILEGES,
    ROOT,
    USER,
)
from pyvmm.host.programs import find_program
from pyvmm.kvm.system import Kvm

SAFETY_TIMEOUT = 60

# mov ebx, 0xd0000100; mov eax, [rbx]: a disk comes first, so 0xd0001100; then the power-off
READS_AND_ENDS = bytes.fromhex("bb001100d0 8b03 66ba0006 b034 ee f4 ebfd")

# The same, of the first device; then hlt for ever
READS_AND_WAITS = bytes.fromhex("bb000100d0 8b03 f4 ebfd")

DEVICE = '''
import ctypes, errno, fcntl, json, os, resource, signal, socket, sys
from pyvmm.virtio.worker import QueueDevice

libc = ctypes.CDLL(None, use_errno=True)


def call(number, *words):
    """A system call that may only fail for what its arguments are."""
    arguments = (ctypes.c_long(w) if isinstance(w, int) else ctypes.c_char_p(w) for w in words)
    if libc.syscall(ctypes.c_long(number), *arguments) < 0:
        code = ctypes.get_errno()
        if code in (errno.EPERM, errno.EACCES, errno.ENOSYS):
            raise OSError(code, "call")


class Attacker(QueueDevice):
    name, device_type, queue_sizes = "attacker", 42, (8,)

    def __init__(self, plan):
        with open(plan) as file:
            self.attacks = json.load(file)
        self.report = open(plan + ".report", "w")

    def serve(self, queue):
        pass

    def read_config(self, offset, length):
        attacks, self.attacks = self.attacks, {}
        found = {}
        for name, code in attacks.items():
            try:
                exec(code, globals())
                found[name] = "done"
            except OSError as error:
                found[name] = errno.errorcode.get(error.errno, repr(error))
        if attacks:
            json.dump(found, self.report)
            self.report.flush()
        return bytes(length)
'''

# Runs `pyvmm` with sys.argv[2:], its box made of the layers in sys.argv[1].
RUN = """
import sys
from pyvmm.host import box
_, layers, *arguments = sys.argv
box.LAYERS = tuple(layers.split())
sys.argv = ["pyvmm", *arguments]
from pyvmm.cli import main
sys.exit(main())
"""


# Not allowed; or not there, as far as code in the box can see.
STOPPED = ("EPERM", "EACCES", "EROFS", "ENOENT", "ENETUNREACH", "ECONNREFUSED")


class Attack(NamedTuple):
    """`code` fails with an error of STOPPED if any of `layers` is on, and if none is, it does
    not."""

    code: str
    layers: tuple[str, ...]


def attacks(folder: Path, victim: int, port: int, abstract: str, key: int) -> dict[str, Attack]:
    other, new = folder / "other.img", folder / "new"
    return {
        "read a file": Attack("open('/etc/passwd').read(1)", (ROOT, FILES)),
        "read a file by another thread's root": Attack(
            "read_by_threads('/etc/passwd')", (ROOT, FILES)
        ),
        "see whether a file is there": Attack("os.stat('/etc/passwd')", (ROOT,)),
        "write to another VM's disk": Attack(
            f"open({str(other)!r}, 'r+b').write(b'x')", (ROOT, USER, FILES)
        ),
        "make a file": Attack(
            f"open({str(new)!r}, 'w'); os.unlink({str(new)!r})", (ROOT, USER, FILES, CALLS)
        ),
        "look into a folder": Attack("os.listdir('/var')", (ROOT, FILES)),
        "read of another process": Attack(
            f"open('/proc/{victim}/environ').read(1)", (ROOT, USER, CAPABILITIES, FILES)
        ),
        "run a program": Attack(
            f"os.waitpid(os.posix_spawn({os.path.realpath('/bin/true')!r}, ['true'], {{}}), 0)",
            (FILES, CALLS),
        ),
        "fork": Attack("pid = os.fork() or os._exit(0); os.waitpid(pid, 0)", (CALLS,)),
        "kill another process": Attack(f"os.kill({victim}, 0)", (USER, CALLS)),
        "kill all processes": Attack("os.kill(-1, 0)", (CALLS,)),
        "kill another's thread": Attack(
            f"call(234, {victim}, {victim}, 0); call(200, {victim}, 0)", (USER, CALLS)
        ),
        # Its own siginfo, with si_code SI_QUEUE
        "kill another process by a queue": Attack(
            f"i = bytes(8) + b'\\xff' * 4 + bytes(116); call(129, {victim}, 0, i);"
            f"call(297, {victim}, {victim}, 0, i)",
            (USER, CALLS),
        ),
        "see other processes": Attack(
            f"'{victim}' in os.listdir('/proc') or call_refused()", (ROOT, FILES)
        ),
        "see whether a process is there": Attack(f"os.stat('/proc/{victim}')", (ROOT,)),
        "change another process's limits": Attack(
            f"resource.prlimit({victim}, resource.RLIMIT_CORE)", (USER, CALLS)
        ),
        "make another process wait": Attack(
            f"os.setpriority(os.PRIO_PROCESS, {victim}, 19); os.sched_setaffinity({victim}, [0])",
            (USER, CAPABILITIES, CALLS),  # of one with more capabilities
        ),
        "have signals sent": Attack(f"fcntl.fcntl(0, fcntl.F_SETOWN, {victim})", (CALLS,)),
        "hold another process": Attack(f"os.close(os.pidfd_open({victim}))", (CALLS,)),
        "trace another process": Attack(
            f"call(101, 0x4206, {victim}, 0, 0); call(101, 17, {victim}, 0, 0)",
            (USER, CAPABILITIES, FILES, CALLS),
        ),
        "read another process's memory": Attack(f"call(310, {victim}, 0, 0, 0, 0, 0)", (CALLS,)),
        "reach the network": Attack(
            f"s = socket.socket(); s.connect(('127.0.0.1', {port})); s.close()",
            (NETWORK, FILES, CALLS),
        ),
        "send a datagram": Attack(
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
            (NETWORK, CALLS),
        ),
        "reach an abstract socket": Attack(
            f"s = socket.socket(socket.AF_UNIX); s.connect({abstract!r}); s.close()",
            (NETWORK, FILES, CALLS) if confinement.landlock_version() >= 6 else (NETWORK, CALLS),
        ),
        "reach shared memory by its key": Attack(f"shared_memory({key})", (NAMESPACES, CALLS)),
        "reach another VM's control socket": Attack(
            f"s = socket.socket(socket.AF_UNIX); s.connect({str(folder / 'control')!r}); s.close()",
            (ROOT, USER, CALLS),
        ),
        # Of a file that is there in any box, upon itself.
        "mount": Attack(
            f"k = {str(folder / 'kernel')!r}.encode(); call(165, k, k, b'', 0x1000, 0);"
            "call(166, k, 2)",
            (USER, CAPABILITIES, FILES, CALLS),
        ),
        "enter new namespaces": Attack("call(272, 0x04000000)", (USER, CAPABILITIES, CALLS)),
        "load a module": Attack("call(313, -1, b'', 0)", (USER, CAPABILITIES, CALLS)),
        "name the machine": Attack(
            "n = os.uname().nodename.encode(); call(170, n, len(n))", (USER, CAPABILITIES, CALLS)
        ),
        "use kernel keys": Attack("call(250, 0, -3, 0)", (CALLS,)),
        "use io_uring": Attack("call(425, 1, b'\\0' * 120)", (CALLS,)),
        "type at a terminal": Attack("call(16, 0, 0x5412, b'x')", (CALLS,)),
        "make another VM": Attack("call(16, 0, 0xAE03FF, 0)", (CALLS,)),
        "gain rights by a program": Attack(
            "assert 'NoNewPrivs:\\t0' in open('/proc/self/status').read() or call_refused()",
            (PRIVILEGES,),
        ),
        "dump its memory": Attack(
            "resource.getrlimit(resource.RLIMIT_CORE)[0] or call_refused()", (LIMITS,)
        ),
    }


HELPERS = """

def call_refused():
    raise PermissionError(errno.EPERM, "refused before")


def read_by_threads(path):
    failed = None
    for thread in os.listdir("/proc/self/task"):
        try:
            return open(f"/proc/self/task/{thread}/root{path}").read(1)
        except OSError as error:
            failed = error
    raise failed


def shared_memory(key):
    if libc.shmget(ctypes.c_int(key), ctypes.c_size_t(0), 0) < 0:
        raise OSError(ctypes.get_errno(), "shmget")
"""


class Scene(NamedTuple):
    folder: Path
    attacks: dict[str, Attack]

    def attempt(self, layers: str, *options: str) -> dict[str, str]:
        """The outcome of each attack in a VM with `layers` only."""
        plan = self.folder / "plan"
        plan.write_text(json.dumps({name: one.code for name, one in self.attacks.items()}))
        kernel, disk = self.folder / "kernel", self.folder / "disk"
        done = subprocess.run(
            [
                *(sys.executable, "-c", RUN, layers, "run", "--kvm=host", "--kernel", str(kernel)),
                *("--disk", str(disk)),
                *("--device", f"{self.folder}/attacker.py:Attacker,plan={plan}", *options),
            ],
            env={**os.environ, "XDG_RUNTIME_DIR": str(self.folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SAFETY_TIMEOUT,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, str] = json.loads((self.folder / "plan.report").read_text())
        assert list(found) == list(self.attacks)
        return found


def refused(found: dict[str, str]) -> set[str]:
    return {name for name, result in found.items() if result in STOPPED}


@contextmanager
def shared_memory() -> Iterator[int]:
    """The key of a piece of memory that any process of this user may share (shmget(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    key = os.getpid() << 8 | 1
    number = libc.shmget(key, ctypes.c_size_t(4096), 0o1600)  # IPC_CREAT
    assert number >= 0, ctypes.get_errno()
    try:
        yield key
    finally:
        libc.shmctl(number, 0, None)  # IPC_RMID


@pytest.fixture
def scene(kvm: Kvm, tmp_path: Path) -> Iterator[Scene]:
    tmp_path.chmod(0o700)
    if missing := box.probe().off:
        pytest.skip(f"this machine lacks layers: {missing}")
    if os.geteuid():
        pytest.skip("only root has the rights that some layers take away")
    if confinement.landlock_version() < 4:
        pytest.skip("Landlock knows of no networks here")
    (tmp_path / "attacker.py").write_text(DEVICE + HELPERS)
    load = Load(data=READS_AND_ENDS.ljust(256, b"\x90"))
    (tmp_path / "kernel").write_bytes(Elf(loads=[load], note=None).build())
    (tmp_path / "disk").write_bytes(bytes(512))
    (tmp_path / "other.img").write_bytes(bytes(512))
    (tmp_path / "place").mkdir()
    with (
        subprocess.Popen(["sleep", "1000"]) as victim,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as control,
        socket.socket(socket.AF_UNIX) as abstract,
        shared_memory() as key,
    ):
        abstract.bind(f"\0{tmp_path}")
        abstract.listen(100)
        control.bind(str(tmp_path / "control"))
        control.listen(100)
        try:
            port, name = server.getsockname()[1], f"\0{tmp_path}"
            yield Scene(tmp_path, attacks(tmp_path, victim.pid, port, name, key))
        finally:
            victim.kill()


def test_each_attack_fails_by_the_layers_that_are_named_for_it(scene: Scene) -> None:
    """docs/security.md has the same table."""
    possible = {name for name, result in scene.attempt("").items() if result == "done"}
    # What this machine forbids whatever we do proves nothing; most it does not.
    assert len(possible) >= 15, possible
    for layer in LAYERS:
        expected = {name for name in possible if layer in scene.attacks[name].layers}
        found = scene.attempt(layer)
        assert refused(found) & possible == expected, (layer, found)


# What the kernel wants before it confines a process that has no capabilities.
NEEDS_PRIVILEGES_GONE = (PRIVILEGES, FILES, CALLS)


def test_without_one_layer_what_the_others_stop_is_stopped(scene: Scene) -> None:
    possible = {name for name, result in scene.attempt("").items() if result == "done"}
    for left_out in LAYERS:
        gone = NEEDS_PRIVILEGES_GONE if left_out == PRIVILEGES else (left_out,)
        expected = {name for name in possible if set(scene.attacks[name].layers) - set(gone)}
        found = scene.attempt(" ".join(one for one in LAYERS if one != left_out))
        assert refused(found) & possible == expected, (left_out, found)


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_in_the_whole_box_all_attacks_fail(scene: Scene, mode: str) -> None:
    found = scene.attempt(" ".join(LAYERS), "--confine", mode)
    assert refused(found) == set(scene.attacks), found


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_a_device_may_read_late_what_the_user_has_named(scene: Scene, mode: str) -> None:
    named, other = scene.folder / "place", scene.folder / "other.img"
    (named / "data").write_text("x")
    scene.attacks.clear()
    scene.attacks["read"] = Attack(f"open('{named}/data').read(1)", (FILES,))
    scene.attacks["write"] = Attack(f"open('{named}/data', 'w')", (FILES,))
    scene.attacks["read another"] = Attack(f"open('{other}').read(1)", (FILES,))
    found = scene.attempt(" ".join(LAYERS), "--confine", mode, "--allow-read", str(named))
    assert found == {"read": "done", "write": "EROFS", "read another": "ENOENT"}
    assert refused(scene.attempt(" ".join(LAYERS), "--confine", mode)) == set(scene.attacks)


@pytest.mark.parametrize("options", [(), ("--confine", "strict")], ids=["", "strict"])
def test_by_default_no_thread_is_outside(scene: Scene, options: tuple[str, ...]) -> None:
    """Threads share memory, so one that is outside works for whoever runs machine code of his
    own."""
    (scene.folder / "plan").write_text("{}")
    options += ("--device", f"{scene.folder}/attacker.py:Attacker,plan={scene.folder}/plan")
    options += ("--vsock", f"path={scene.folder}/vsock", "--balloon", "size=0")
    image = scene.folder / "image.qcow2"
    if find_program("qemu-img") and find_program("qemu-storage-daemon"):
        # With a thread that hears what its server says, from before
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
        options += ("--disk", str(image))
    with Running(scene.folder, "vm", READS_AND_WAITS, *options) as vm:
        assert vm("stats", "vm").returncode == 0
        (scene.folder / "data").write_bytes(bytes(512))
        added = vm("disk", "add", "vm", str(scene.folder / "data"))
        assert added.returncode == 0, added.stderr
        threads = list(Path(f"/proc/{vm.process.pid}/task").iterdir())
        assert len(threads) > 4, threads
        roots = set()
        for thread in threads:
            status = dict(
                line.split(":\t", 1) for line in (thread / "status").read_text().splitlines()
            )
            found = [status[key] for key in ("NoNewPrivs", "Seccomp", "CapEff", "CapPrm", "CapBnd")]
            assert found[:2] == ["1", "2"] and not any(int(one, 16) for one in found[2:]), status
            roots.add(os.readlink(thread / "ns/mnt"))
        assert len(roots) == 1 and os.readlink("/proc/self/ns/mnt") not in roots


# Takes as many as there are, and as many more as it may have.
TAKES_DESCRIPTORS = """
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
assert hard > soft or call_refused()
"""
OPENS_ALL = """
soft, taken = resource.getrlimit(resource.RLIMIT_NOFILE)[0], []
try:
    while len(taken) <= soft:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError as error:
    assert error.errno == errno.EMFILE, error
    call_refused()
finally:
    for fd in taken:
        os.close(fd)
"""


@pytest.mark.parametrize("layers", [(), LAYERS], ids=["none", "all"])
def test_more_descriptors_or_files_than_a_vm_has_cannot_be_used_up(
    scene: Scene, layers: tuple[str, ...]
) -> None:
    """Memory, threads and the storage of open files are for --cgroup and quotas."""
    scene.attacks.clear()
    scene.attacks["raise its limit"] = Attack(TAKES_DESCRIPTORS, (LIMITS,))
    scene.attacks["open all"] = Attack(OPENS_ALL, ())
    scene.attacks["a file without a name"] = Attack(
        f"os.close(os.open({str(scene.folder)!r}, os.O_TMPFILE | os.O_RDWR))", (ROOT, FILES, CALLS)
    )
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, limits[1] - 1), limits[1]))
    try:
        found = scene.attempt(" ".join(layers), "--confine", "strict")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found["open all"] == "EPERM"  # the limit was there
    assert refused(found) == (set(scene.attacks) if layers else {"open all"}), found


def files_of(thread: int) -> list[str]:
    """What its descriptors are, as far as they and it are there still."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for entry in os.scandir(f"/proc/{thread}/fd"):
            with suppress(FileNotFoundError, ProcessLookupError):
                found.append(os.readlink(entry.path))
    return found


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_a_refused_call_is_told_by_number_and_name_with_its_thread(scene: Scene, mode: str) -> None:
    named = {
        "use kernel keys": "keyctl (system call 250)",
        "fork": "clone (system call 56)",
        "type at a terminal": "ioctl (system call 16) 0x5412",
        "reach another VM's control socket": f"socket (system call 41) of family {socket.AF_UNIX}",
    }
    plan = scene.folder / "plan"
    plan.write_text(json.dumps({name: scene.attacks[name].code for name in named}))
    device = f"{scene.folder}/attacker.py:Attacker,plan={plan}"
    with Running(scene.folder, "vm", READS_AND_WAITS, "--device", device, "--confine", mode) as vm:
        deadline = time.monotonic() + SAFETY_TIMEOUT
        refused_calls = 0
        while refused_calls < len(named):
            stats = json.loads(vm("stats", "vm", "--json").stdout)
            refused_calls = stats["confinement"]["refused_calls"]
            assert time.monotonic() < deadline, stats
        told: list[str] = []
        while len(told) < len(named):  # they are counted first, and then told
            said = vm("logs", "vm").stderr.splitlines()
            told = [line for line in said if "the box refused" in line]
            assert time.monotonic() < deadline, said
        assert told == [
            f"pyvmm: vm: the box refused {what} in the thread vcpu0" for what in named.values()
        ]
        # Whoever has the listener of the filter could allow himself to fork.
        assert not [one for one in files_of(vm.process.pid) if "seccomp" in one]
        tables = [files_of(int(task)) for task in os.listdir(f"/proc/{vm.process.pid}/task")]
        [answering] = [table for table in tables if any("seccomp" in one for one in table)]
        assert len(answering) == 2, answering


# A signal of that number which is not the filter's does no harm, nor does a full pipe.
REFUSED = """
import os, signal, sys
from pyvmm.host import box
from pyvmm.host.refusals import Refusals
refusals = Refusals()
box.enter(box.Needs(tells=True))
os.kill(os.getpid(), signal.SIGSYS)
for _ in range(5000):
    try:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    except PermissionError:
        continue
    sys.exit("nothing was refused")
told = list(refusals.take())
print(len(told), refusals.count, set(told))
"""


def test_more_refused_calls_than_anybody_reads_cost_nothing() -> None:
    if missing := box.probe().off:
        pytest.skip(f"this machine lacks layers: {missing}")
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=SAFETY_TIMEOUT
    )
    line = "the box refused setpriority (system call 141) in the thread MainThread"
    assert done.stdout == f"2048 2048 {{{line!r}}}\n", done.stderr


def test_without_confinement_nothing_is_taken_away(scene: Scene) -> None:
    assert scene.attempt(" ".join(LAYERS), "--confine=off") == scene.attempt("")


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_a_confined_monitor_does_all_its_work(kvm: Kvm, tmp_path: Path, mode: str) -> None:
    """All that is imported or opened late: by clients, restarts, panics, ends."""
    kernel = echo_kernel(tmp_path)
    disk = tmp_path / "disk"
    options = ("--kernel", kernel, "--disk", f"{disk},id=one", "--balloon", "size=0")
    options += ("--vsock", f"path={tmp_path}/vsock", "--confine", mode)
    with Running(tmp_path, "vm", b"", *options) as vm:
        [row] = vm.ps()
        layers = {"on": list(box.probe().on), "off": dict(box.probe().off)}
        assert row["confinement"] == {
            **{"mode": mode, "user": row["confinement"]["user"]},
            **layers,
            "refused_calls": 0,
        }
        is_another = row["confinement"]["user"] != os.geteuid()
        assert is_another == (USER in layers["on"])
        counted = json.loads(vm("stats", "vm", "--json").stdout)
        assert counted["confinement"] == row["confinement"]
        for command in (
            *(("stats", "vm"), ("stats", "vm", "--json"), ("pause", "vm"), ("resume", "vm")),
            *(("disk", "resize", "vm", "one", "1M"), ("rng", "add", "vm")),
            *(("metrics", "vm"), ("balloon", "vm")),
        ):
            done = vm(*command)
            assert done.returncode == 0, (command, done.stderr)
        assert disk.stat().st_size == 1 << 20
        (tmp_path / "data").write_bytes(bytes(512))
        added = vm("disk", "add", "vm", str(tmp_path / "data"))
        assert added.returncode == 0, added.stderr  # opened by that command if need be
        assert vm("stop", "vm", "--timeout", "0").returncode == 0
        vm.process.wait(SAFETY_TIMEOUT)
        assert not (tmp_path / "vsock").exists()
        [ended] = json.loads(vm("ps", "-a", "--json").stdout)
        assert (ended["name"], ended["state"]) == ("vm", "ended")
        said = vm("logs", "vm")
        assert "ready" in said.stdout
        first, *others = said.stderr.splitlines()
        assert first.startswith(f"pyvmm: vm: confined ({mode}): {', '.join(box.probe().on)}")
        assert not [line for line in others if "the box refused" in line]
        left = {entry.name for entry in (tmp_path / "runtime/pyvmm").iterdir()}
        assert left <= {"logs", ".lock"}


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_a_crash_is_reported_from_the_box(kvm: Kvm, tmp_path: Path, mode: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pyvmm", "run", "--kvm=host", "--confine", mode),
            *("--kernel", faulting_kernel(tmp_path)),
        ],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SAFETY_TIMEOUT,
    )
    assert done.returncode == 12, done.stderr
    assert "rip" in done.stderr.lower()


def test_a_layer_that_cannot_be_had_is_said_and_strict_insists(kvm: Kvm, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    script = "from pyvmm.host import confinement\nconfinement.landlock_version = lambda: 0\n"
    codes = {}
    for mode in ("auto", "strict"):
        done = subprocess.run(
            [
                *(sys.executable, "-c", script + RUN, " ".join(LAYERS), "run", "--kvm=host"),
                *("--kernel", faulting_kernel(tmp_path), "--confine", mode),
            ],
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SAFETY_TIMEOUT,
        )
        codes[mode] = done.returncode
    assert codes == {"auto": 12, "strict": 2}
    assert "--confine: the monitor cannot be confined: files: this kernel has no Lan" in done.stderr
