"""`--user`: what a monitor that root has started may do as another user, and its neighbours."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from boot_images import Elf, Load
from echo_guest import echo_kernel, faulting_kernel
from hotplug_rig import until
from test_monitors_box import DEVICE, HELPERS, READS_AND_WAITS, SAFETY_TIMEOUT
from test_monitors_box import RUN as RUN_WITH_LAYERS
from test_slots import is_let_go, those_with

from pyvmm import images
from pyvmm.errors import ConfigError
from pyvmm.host import box
from pyvmm.host.other_user import OtherUser
from pyvmm.host.programs import find_program
from pyvmm.kvm.system import Kvm

ROOT = Path(__file__).resolve().parents[2]
ONE, OTHER = 61001, 61002
RUN = (sys.executable, "-m", "pyvmm", "run", "--kvm=host")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


class Vm:
    def __init__(self, folder: Path, name: str, *options: str) -> None:
        self.name = name
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
        plan = folder / f"{name}.plan"
        self.plan = plan
        device = f"{folder}/attacker.py:Attacker,plan={plan}"
        self.process = subprocess.Popen(
            [
                *RUN,
                *("--kernel", str(folder / "kernel"), "--name", name, "--device", device, *options),
            ],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pyvmm", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=SAFETY_TIMEOUT,
        )

    def found(self) -> dict[str, str]:
        """The outcome of the attacks."""
        deadline = time.monotonic() + SAFETY_TIMEOUT
        report = Path(f"{self.plan}.report")
        while not report.exists() or not report.stat().st_size:
            if self.process.poll() is not None:
                assert self.process.stderr is not None
                pytest.fail(self.process.stderr.read())
            assert time.monotonic() < deadline
            time.sleep(0.02)
        found: dict[str, str] = json.loads(report.read_text())
        return found


@contextmanager
def running(folder: Path, name: str, plan: dict[str, str], *options: str) -> Iterator[Vm]:
    (folder / f"{name}.plan").write_text(json.dumps(plan))
    vm = Vm(folder, name, *options)
    try:
        yield vm
    finally:
        vm.process.kill()
        vm.process.wait()
        assert vm.process.stderr is not None
        vm.process.stderr.close()


@pytest.fixture
def folder(kvm: Kvm, tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    (tmp_path / "attacker.py").write_text(DEVICE + HELPERS)
    load = Load(data=READS_AND_WAITS.ljust(256, b"\x90"))
    (tmp_path / "kernel").write_bytes(Elf(loads=[load], note=None).build())
    return tmp_path


def attacks(folder: Path, victim: int) -> dict[str, str]:
    return {
        "signal it": f"os.kill({victim}, 0)",
        "read its memory": f"open('/proc/{victim}/mem', 'rb').close()",
        "see its environment": f"open('/proc/{victim}/environ').read(1)",
        "open what it has open": f"os.close(os.open('/proc/{victim}/fd/0', os.O_PATH))",
        "ask it": f"s = socket.socket(socket.AF_UNIX); s.connect({str(folder / 'pyvmm/a.sock')!r})",
        "be root again": "os.setuid(0)",
        "read root's file": f"open({str(folder / 'attacker.py')!r}).read(1)",
    }


# Without other layers: it is the user alone that stops them.
def test_two_vms_of_two_users_cannot_reach_one_another(folder: Path) -> None:
    found = {}
    for with_user in (False, True):
        one, other = ((("--user", f"{uid}:{uid}") if with_user else ()) for uid in (ONE, OTHER))
        with running(folder, "a", {"none": "pass"}, *one, "--confine=off") as victim:
            assert victim.found() == {"none": "done"}
            plan = attacks(folder, victim.process.pid)
            with running(folder, "b", plan, *other, "--confine=off") as vm:
                found[with_user] = vm.found()
        for report in folder.glob("*.report"):
            report.unlink()
    assert set(found[False].values()) == {"done"}, found
    assert set(found[True].values()) <= {"EPERM", "EACCES"}, found


def connects(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError as error:
            return errno.errorcode[error.errno or 0]
    return ""


@pytest.mark.parametrize("mode", ["auto", "strict", "off"])
def test_root_looks_after_a_vm_that_is_another_user_s(folder: Path, mode: str) -> None:
    ids = (ONE,) * 3
    tells = f"assert os.getresuid() == {ids} and os.getresgid() == {ids}"
    plan = {"who": tells, "groups": "assert not os.getgroups()"}
    options = ("--user", f"{ONE}:{ONE}", "--confine", mode, "--vsock", f"path={folder}/vsock")
    with running(folder, "a", plan, *options) as vm:
        assert set(vm.found().values()) == {"done"}
        task = Path(f"/proc/{vm.process.pid}/task")
        for status in task.glob("*/status"):
            words = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
            assert words["Uid"].split() == [str(ONE)] * 4, words
            assert int(words["CapEff"], 16) == int(words["CapPrm"], 16) == 0, words
        [row] = json.loads(vm("ps", "--json").stdout)
        assert (row["confinement"]["user"], row["confinement"]["mode"]) == (ONE, mode)
        for command in (("stats", "a"), ("pause", "a"), ("resume", "a"), ("metrics", "a")):
            done = vm(*command)
            assert done.returncode == 0, done.stderr
        # Not even that user's own processes get in.
        assert OtherUser(ONE, ONE).can(lambda: connects(folder / "pyvmm/a.sock")) == "EACCES"
        assert f"as user {ONE}" in vm("logs", "a").stderr.splitlines()[0]
        assert vm("stop", "a", "--timeout", "0").returncode == 0
        vm.process.wait(SAFETY_TIMEOUT)
        assert not (folder / "vsock").exists() and not (folder / "pyvmm/a.sock").exists()
        [ended] = json.loads(vm("ps", "-a", "--json").stdout)
        assert (ended["name"], ended["state"]) == ("a", "ended")


REACHES = """
from pyvmm.errors import HostError
from pyvmm.host import unix_sockets
try:
    unix_sockets.reach({path!r}).close()
except HostError as error:
    raise OSError(error.errno, "reach")
"""


# Whoever owns the folder of a VM's sockets puts links there: root must not follow them for him.
@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_root_connects_him_to_no_other_socket(folder: Path, mode: str) -> None:
    his = folder / "his"
    (folder / "roots").mkdir(mode=0o700)
    his.mkdir()
    with socket.socket(socket.AF_UNIX) as secret, socket.socket(socket.AF_UNIX) as usual:
        for one, path in ((secret, folder / "roots/vsock_8"), (usual, his / "vsock_5")):
            one.bind(str(path))
            one.listen(8)
        (his / "vsock_7").symlink_to("../roots/vsock_8")
        plan = {
            "a listener": REACHES.format(path=f"{his}/vsock_5"),
            "a link": REACHES.format(path=f"{his}/vsock_7"),
        }
        os.chmod(folder, 0o711)
        os.chown(his, ONE, ONE)
        options = ("--user", f"{ONE}:{ONE}", "--confine", mode, "--vsock", f"path={his}/vsock")
        with running(folder, "a", plan, *options) as vm:
            assert vm.found() == {"a listener": "done", "a link": "ELOOP"}


ASKS = """
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
client.sendall(sys.argv[2].encode() + b"\\n")
print(client.makefile().readline())
"""


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_what_a_client_names_is_opened_as_that_user(folder: Path, mode: str) -> None:
    """Though the keeper, which hears it, is root."""
    options = ("--user", f"{ONE}:{ONE}", "--confine", mode, "--transport", "pci")
    answers = {}
    with (
        tempfile.TemporaryDirectory() as place,  # in a folder that is everybody's
        running(folder, "a", {"none": "pass"}, *options) as vm,
    ):
        os.chmod(place, 0o711)
        until(lambda: vm("stats", "a").returncode == 0)
        for name, owner in (("his", ONE), ("roots", 0)):
            disk = Path(place, name)
            disk.write_bytes(bytes(512))
            disk.chmod(0o600)
            os.chown(disk, owner, owner)
            asked = {"version": 1, "method": "disk.add", "params": {"device": str(disk)}}
            argv = [sys.executable, "-c", ASKS, f"{folder}/pyvmm/a.sock", json.dumps(asked)]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=SAFETY_TIMEOUT)
            answers[name] = json.loads(done.stdout)
    assert "result" in answers["his"] and "error" in answers["roots"], answers
    assert "Permission denied" in answers["roots"]["error"]["message"], answers


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("no-such-user", "there is no user 'no-such-user'"),
        ("root", "'root' is root"),
        ("0:61001", "is root"),
        ("61001:0", "is root"),
        ("-1:5", "there is no user"),
        ("1:2:3", "there is no user"),
    ],
)
def test_whom_it_cannot_become_is_told_in_one_line(folder: Path, user: str, message: str) -> None:
    with running(folder, "a", {}, f"--user={user}") as vm:
        assert vm.process.wait(SAFETY_TIMEOUT) == 2
        assert vm.process.stderr is not None
        [line] = vm.process.stderr.read().splitlines()
        assert message in line and "--user" in line


AUTO: list[tuple[str, ...]] = [(), ("--user", "750001-750009")]


def users_of(vm: Vm) -> set[str]:
    """Of all of its threads: their real, effective, saved and file system's user."""
    found = set()
    for status in Path(f"/proc/{vm.process.pid}/task").glob("*/status"):
        words = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
        found |= {*words["Uid"].split(), *words["Gid"].split()}
    return found


@pytest.mark.parametrize("option", AUTO)
def test_each_vm_is_a_user_of_its_own(folder: Path, option: tuple[str, ...]) -> None:
    found = []
    with (
        running(folder, "a", {"none": "pass"}, *option, "--vsock", f"path={folder}/v") as one,
        running(folder, "b", {"none": "pass"}, *option) as other,
    ):
        for vm in (one, other):
            assert vm.found() == {"none": "done"}
            [user] = users_of(vm)
            found.append(int(user))
            assert "user, limits" in vm("logs", vm.name).stderr.splitlines()[0]
        rows = {row["name"]: row["confinement"] for row in json.loads(one("ps", "--json").stdout)}
        assert [rows[name]["user"] for name in "ab"] == found
        assert all("user" in row["on"] for row in rows.values())
    assert found[0] != found[1] and 0 not in found
    files = [path for path in folder.rglob("*") if path.lstat().st_uid]
    assert not files, "they are root's, as whoever started it"


def keeper_of(vm: Vm) -> int:
    [pid] = Path(f"/proc/{vm.process.pid}/task/{vm.process.pid}/children").read_text().split()
    return int(pid)


def test_the_keeper_alone_has_the_lock_on_its_number(folder: Path) -> None:
    """A monitor that is taken over can lock no number of the next VM's."""
    only = ("--user", "750011-750011")
    with running(folder, "a", {"none": "pass"}, *only) as vm:
        assert vm.found() == {"none": "done"}
        keeper = keeper_of(vm)
        opened = {
            pid: sum(os.readlink(entry).endswith("pyvmm-users.lock") for entry in entries)
            for pid in (vm.process.pid, keeper)
            if (entries := list(Path(f"/proc/{pid}/fd").iterdir()))
        }
        assert opened == {vm.process.pid: 0, keeper: 1}
        vm("disk", "add", "a", "nothing")  # its keeper is Python by now, or was
        assert not free(only[1], folder)
        os.kill(keeper, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{keeper}/fd/0").is_symlink())
        assert not free(only[1], folder), "it has a process"
    until(lambda: free(only[1], folder))


def free(users: str, folder: Path) -> bool:
    try:
        found = OtherUser.wanted(users, str(folder))
    except ConfigError as error:
        assert "are in use" in error.message
        return False
    os.close(found.lock)
    return True


PIDFD_GETFD = 438  # <asm-generic/unistd.h>


def places_told_by(pid: int) -> set[int]:
    """Where in the machine's memory its first page lies, by the pagemap that it has open."""
    descriptors = Path(f"/proc/{pid}/fd").iterdir()
    [fd] = [int(path.name) for path in descriptors if os.readlink(path).endswith("/pagemap")]
    first = int(Path(f"/proc/{pid}/maps").read_text().partition("-")[0], 16)
    process = os.pidfd_open(pid)
    ours = ctypes.CDLL(None).syscall(PIDFD_GETFD, process, fd, 0)
    entry = int.from_bytes(os.pread(ours, 8, first // mmap.PAGESIZE * 8), "little")
    os.close(ours)
    os.close(process)
    assert entry >> 63, "it is there"
    return {entry & (1 << 55) - 1} - {0}


# By /proc/self/pagemap, which another user may not open. It tells no addresses of the machine's.
@pytest.mark.parametrize("option", [("--user", f"{ONE}:{ONE}"), *AUTO])
def test_it_is_known_what_memory_a_restored_vm_has_used(
    folder: Path, option: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))

    def pyvmm(*arguments: str) -> str:
        argv = [sys.executable, "-m", "pyvmm", *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=SAFETY_TIMEOUT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    name = ("--name", "a")
    pyvmm("run", "--kvm=host", "-d", *name, "--kernel", echo_kernel(folder), "--memory", "64M")
    pyvmm("snapshot", "a", "s", "--stop")
    pyvmm("run", "-d", *name, "--restore", "s", *option)
    try:
        [row] = json.loads(pyvmm("ps", "--json"))
        assert box.USER in row["confinement"]["on"]
        assert not places_told_by(int(row["pid"]))
        assert "has used 0 MiB" in pyvmm("snapshot", "learn", "a", "s")
    finally:
        pyvmm("stop", "a", "--now")


HIS = pytest.mark.parametrize("option", [("--user", f"{ONE}:{ONE}"), *AUTO])


@HIS
def test_its_guest_starts_again_from_a_kernel_for_root_alone(
    folder: Path, option: tuple[str, ...]
) -> None:
    kernel = Path(echo_kernel(folder))
    kernel.chmod(0o600)
    process = subprocess.Popen(
        [*RUN, "--kernel", str(kernel), *option],
        env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdin is not None and process.stdout is not None
            for key in "RRO":
                assert process.stdout.readline() == "ready\n"
                process.stdin.write(key)
                process.stdin.flush()
            assert process.wait(SAFETY_TIMEOUT) == 0
        finally:
            process.kill()


@HIS
@pytest.mark.parametrize("killed", [False, True])
def test_what_serves_its_disks_and_directories_ends_with_it(
    folder: Path, option: tuple[str, ...], killed: bool
) -> None:
    if not (find_program("qemu-img") and find_program("qemu-storage-daemon")):
        pytest.skip("qemu-utils are not installed")
    image, shared = folder / "image.qcow2", folder / "shared"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    image.chmod(0o600)
    shared.mkdir()
    shares = ()
    with suppress(ConfigError):
        images.virtiofsd_command()
        shares = ("--share", f"{shared},tag=t")
    with running(folder, "a", {}, *option, "--disk", str(image), *shares) as vm:
        until(lambda: vm("stats", "a").returncode == 0)
        serving = those_with(image, shared)
        del serving[vm.process.pid]
        # It forks, and so does who watches over the disk's, as in a VM that is given them later.
        assert len(serving) == 2 + 2 * bool(shares), serving
        assert vm.process.pid not in serving.values() and "0" not in users_of(vm)
        if not killed:
            assert vm("stop", "a", "--timeout", "0").returncode == 0
            vm.process.wait(SAFETY_TIMEOUT)
            assert vm.process.stderr is not None and "does not end" not in vm.process.stderr.read()
    until(lambda: not those_with(image, shared) and is_let_go(image))


def test_what_he_cannot_read_of_python_he_has_loaded_before(folder: Path) -> None:
    """Without a root of the monitor's own, and so with all of the folders above."""
    (folder / "hidden").mkdir(mode=0o700)
    os.symlink(ROOT / "pyvmm", folder / "hidden/pyvmm")
    layers = " ".join(layer for layer in box.LAYERS if layer != box.ROOT)
    script = f"import sys; sys.path.insert(0, '{folder}/hidden')\n{RUN_WITH_LAYERS}"
    environment = {
        **os.environ,
        **{"XDG_RUNTIME_DIR": str(folder), "XDG_STATE_HOME": str(folder / "state")},
    }
    for name in ("disk", "more"):
        (folder / name).write_bytes(bytes(512))
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", script, layers, "run", "--kvm=host", "--name", "a"),
            *("--kernel", echo_kernel(folder), "--user", "750001-750009", "--balloon", "size=0"),
            *("--disk", f"{folder}/disk,id=one", "--transport", "pci"),
        ],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    vm = Vm.__new__(Vm)
    vm.environment = {**environment}
    with process:
        try:
            assert process.stdin is not None
            until(lambda: vm("stats", "a").returncode == 0)
            for command in (
                *(("stats", "a", "--json"), ("pause", "a"), ("resume", "a"), ("metrics", "a")),
                *(("disk", "add", "a", f"{folder}/more"), ("rng", "add", "a")),
                *(("disk", "resize", "a", "one", "1M"), ("balloon", "a"), ("snapshot", "a", "s")),
            ):
                done = vm(*command)
                assert done.returncode == 0, (command, done.stderr)
            process.stdin.write("R")
            process.stdin.flush()
            until(lambda: vm("logs", "a").stdout.count("ready") == 2)
            _, told = process.communicate("P", timeout=SAFETY_TIMEOUT)
            assert process.returncode == 11, told
            assert "No module" not in told and "Traceback" not in told, told
        finally:
            process.kill()


@pytest.mark.parametrize("readable", [True, False])
def test_who_may_read_late_what_is_root_s_alone_stays_root(folder: Path, readable: bool) -> None:
    """And says so. An ordinary file is no reason, where the folders above it are none."""
    if box.ROOT in dict(box.probe().off):
        pytest.skip("monitors have no root of their own here")
    named = folder / "place"
    named.mkdir()
    (named / "data").write_text("x")
    (named / "data").chmod(0o644 if readable else 0o600)
    plan = {
        "read": f"open('{named}/data').read(1)",
        "be no root": "os.getuid() or call_refused()",
    }
    with running(folder, "a", plan, "--user=auto", "--allow-read", str(named)) as vm:
        assert vm.found() == {"read": "done", "be no root": "done" if readable else "EPERM"}
        first = vm("logs", "a").stderr.splitlines()[0]
        reason = f"not user: {named}/data is for root alone (--allow-read)"
        assert (reason in first) != readable, first


NO_USER = "from pyvmm.host import other_user; other_user._why_none = lambda mapped: 'none here'\n"
NO_BOX = "from pyvmm.host import box; box._machine_lacks = lambda: 'not written for it'\n"
# The exit code of a VM whose guest faults, or that of one that does not start.
RUNS, REFUSED = 12, 2


@pytest.mark.parametrize(
    ("lacking", "mode", "code", "said"),
    [
        (NO_USER, "auto", RUNS, "not user: none here"),
        (NO_USER, "strict", REFUSED, "the monitor cannot be confined: user: none here"),
        (NO_BOX, "auto", RUNS, "confined (auto): user; not namespaces: not written for it"),
        (NO_BOX + NO_USER, "auto", REFUSED, "nothing confines a monitor of root's here"),
        (NO_BOX + NO_USER, "off", RUNS, "confined (off): by nothing"),
    ],
)
def test_where_root_can_be_nobody_else(
    folder: Path, lacking: str, mode: str, code: int, said: str
) -> None:
    options = ("--name", "a", "--confine", mode, *(() if mode == "off" else AUTO[0]))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
    done = subprocess.run(
        [
            *(sys.executable, "-c", lacking + RUN_WITH_LAYERS, " ".join(box.LAYERS)),
            *("run", "--kvm=host", "--kernel", faulting_kernel(folder), *options),
        ],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SAFETY_TIMEOUT,
    )
    assert done.returncode == code, done.stderr
    logs = [sys.executable, "-m", "pyvmm", "logs", "a"]
    log = subprocess.run(logs, env=environment, capture_output=True, text=True).stderr
    assert said in (done.stderr if code == REFUSED else log), (done.stderr, log)
