"""`--user`: what a monitor that root has started may do as another user, and its neighbours.

Python's modules must be readable for all, so this looks for a Python that is.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from boot_images import Elf, Load
from hotplug_rig import until
from test_monitors_box import DEVICE, HELPERS, READS_AND_WAITS, SAFETY_TIMEOUT

from pyvmm.kvm.system import Kvm

ROOT = Path(__file__).resolve().parents[2]
ONE, OTHER = 61001, 61002


def environment() -> dict[str, str]:
    places = (str(ROOT), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"])
    return {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(places), "LANG": "C.UTF-8"}


@pytest.fixture(scope="module")
def python() -> str:
    """A Python that any user can run pyvmm with."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    version = f"python3.{sys.version_info.minor}"
    for candidate in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        try:
            done = subprocess.run(
                [candidate, "-c", "import cffi, click, pyvmm.monitor.run_spec"],
                env=environment(),
                user=ONE,
                group=ONE,
                extra_groups=(),
                capture_output=True,
            )
        except OSError:
            continue
        if done.returncode == 0:
            return candidate
    pytest.skip("no Python here can be used by all users")


class Vm:
    def __init__(self, python: str, folder: Path, name: str, *options: str) -> None:
        self.name, self.python = name, python
        self.environment = {**environment(), "XDG_RUNTIME_DIR": str(folder)}
        plan = folder / f"{name}.plan"
        self.plan = plan
        device = f"{folder}/attacker.py:Attacker,plan={plan}"
        self.process = subprocess.Popen(
            [
                *(python, "-m", "pyvmm", "run", "--kvm=host", "--kernel", str(folder / "kernel")),
                *("--name", name, "--device", device, *options),
            ],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, "-m", "pyvmm", *arguments],
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
def running(
    python: str, folder: Path, name: str, plan: dict[str, str], *options: str
) -> Iterator[Vm]:
    (folder / f"{name}.plan").write_text(json.dumps(plan))
    vm = Vm(python, folder, name, *options)
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
def test_two_vms_of_two_users_cannot_reach_one_another(python: str, folder: Path) -> None:
    found = {}
    for with_user in (False, True):
        one, other = ((("--user", f"{uid}:{uid}") if with_user else ()) for uid in (ONE, OTHER))
        with running(python, folder, "a", {"none": "pass"}, *one, "--confine=off") as victim:
            assert victim.found() == {"none": "done"}
            plan = attacks(folder, victim.process.pid)
            with running(python, folder, "b", plan, *other, "--confine=off") as vm:
                found[with_user] = vm.found()
        for report in folder.glob("*.report"):
            report.unlink()
    assert set(found[False].values()) == {"done"}, found
    assert set(found[True].values()) <= {"EPERM", "EACCES"}, found


@pytest.mark.parametrize("mode", ["auto", "strict", "off"])
def test_root_looks_after_a_vm_that_is_another_user_s(python: str, folder: Path, mode: str) -> None:
    ids = (ONE,) * 3
    tells = f"assert os.getresuid() == {ids} and os.getresgid() == {ids}"
    plan = {"who": tells, "groups": "assert not os.getgroups()"}
    options = ("--user", f"{ONE}:{ONE}", "--confine", mode, "--vsock", f"path={folder}/vsock")
    with running(python, folder, "a", plan, *options) as vm:
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
        asked = subprocess.run(
            [python, "-c", f"import socket; socket.socket(1).connect('{folder}/pyvmm/a.sock')"],
            user=ONE,
            group=ONE,
            capture_output=True,
        )
        assert asked.returncode, asked
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
def test_root_connects_him_to_no_other_socket(python: str, folder: Path, mode: str) -> None:
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
        with running(python, folder, "a", plan, *options) as vm:
            assert vm.found() == {"a listener": "done", "a link": "ELOOP"}


ASKS = """
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
client.sendall(sys.argv[2].encode() + b"\\n")
print(client.makefile().readline())
"""


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_what_a_client_names_is_opened_as_that_user(python: str, folder: Path, mode: str) -> None:
    """Though the keeper, which hears it, is root."""
    options = ("--user", f"{ONE}:{ONE}", "--confine", mode, "--transport", "pci")
    answers = {}
    with (
        tempfile.TemporaryDirectory() as place,  # in a folder that is everybody's
        running(python, folder, "a", {"none": "pass"}, *options) as vm,
    ):
        os.chmod(place, 0o711)
        until(lambda: vm("stats", "a").returncode == 0)
        for name, owner in (("his", ONE), ("roots", 0)):
            disk = Path(place, name)
            disk.write_bytes(bytes(512))
            disk.chmod(0o600)
            os.chown(disk, owner, owner)
            asked = {"version": 1, "method": "disk.add", "params": {"device": str(disk)}}
            argv = [python, "-c", ASKS, f"{folder}/pyvmm/a.sock", json.dumps(asked)]
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
def test_whom_it_cannot_become_is_told_in_one_line(
    python: str, folder: Path, user: str, message: str
) -> None:
    with running(python, folder, "a", {}, f"--user={user}") as vm:
        assert vm.process.wait(SAFETY_TIMEOUT) == 2
        assert vm.process.stderr is not None
        [line] = vm.process.stderr.read().splitlines()
        assert message in line and "--user" in line


def test_modules_that_he_cannot_read_are_told_before_the_guest_runs(
    python: str, folder: Path
) -> None:
    (folder / "hidden").mkdir(mode=0o700)
    os.symlink(ROOT / "pyvmm", folder / "hidden/pyvmm")
    script = f"import sys; sys.path.insert(0, '{folder}/hidden')\n" + (
        "from pyvmm.monitor import confine\n"
        f"confine._code = lambda: iter(['{folder}/hidden'])\n"
        "from pyvmm.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [
            *(python, "-c", script, "run", "--kvm=host", "--kernel", str(folder / "kernel")),
            *("--user", f"{ONE}:{ONE}"),
        ],
        env={**environment(), "XDG_RUNTIME_DIR": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SAFETY_TIMEOUT,
    )
    assert done.returncode == 2
    assert f"user {ONE} cannot read {folder}/hidden, where Python's modules are" in done.stderr
