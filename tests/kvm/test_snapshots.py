"""Snapshots of a guest on real KVM: taken while it runs, restored as often as one likes, refused
where they cannot be, and never half there."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from echo_guest import echo_kernel
from fuzz.snapshots import Snapshots, restore_and_end

from pyvmm import VM, images
from pyvmm.api.aio import AsyncVM
from pyvmm.boot.x86 import layout
from pyvmm.control import snapshot_store as store
from pyvmm.errors import ConfigError
from pyvmm.kvm.system import Kvm
from pyvmm.monitor import snapshots

SAFETY_TIMEOUT = 60
CASES = int(os.environ.get("SNAPSHOT_CASES", "60"))
SEED = os.environ.get("SNAPSHOT_SEED", "1")
OPTIONS = ("--memory", "64M")


@pytest.fixture
def folder(kvm: Kvm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    return tmp_path


class Guest:
    """A `pyvmm run` with the keys and the screen of its guest, which echoes what it is told."""

    def __init__(self, *args: str) -> None:
        argv = [sys.executable, "-m", "pyvmm", "run", "--kvm=host", *args]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
        self.said = b""

    def hears(self, text: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)

    def says(self, text: bytes) -> None:
        assert self.process.stdout is not None and self.process.stderr is not None
        end = time.monotonic() + SAFETY_TIMEOUT
        while text not in self.said:
            ready, _, _ = select.select([self.process.stdout], [], [], end - time.monotonic())
            data = os.read(self.process.stdout.fileno(), 4096) if ready else b""
            if not data:
                self.process.kill()  # or its errors would have no end
                errors = self.process.stderr.read()
                pytest.fail(f"{text!r} does not come: {self.said!r}, {errors!r}")
            self.said += data

    def off(self) -> None:
        self.hears(b"O")
        _, errors = self.process.communicate(timeout=SAFETY_TIMEOUT)
        assert self.process.returncode == 0, errors

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()


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


@pytest.fixture
def one(folder: Path) -> Iterator[Guest]:
    """A guest called `one`, which has said something, and has a disk that is thrown away."""
    disk = f"{folder}/disk,snapshot"
    with Guest("--kernel", echo_kernel(folder), "--name", "one", "--disk", disk, *OPTIONS) as made:
        made.says(b"ready")
        made.hears(b"abc")
        made.says(b"abc")
        yield made


@pytest.fixture
def snapshot(one: Guest, folder: Path) -> Path:
    """The directory of a snapshot called `first`, whose VM has gone."""
    done = pyvmm("snapshot", "one", "first")
    assert done.returncode == 0, done.stderr
    assert "stood still for" in done.stdout
    one.off()
    return folder / "state/pyvmm/snapshots/first"


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_a_guest_goes_on_where_it_was(folder: Path, transport: str) -> None:
    options = (
        *("--kernel", echo_kernel(folder), "--name", "one", "--transport", transport, *OPTIONS),
        *("--disk", f"{folder}/disk,snapshot", "--port", f"name=org.test,path={folder}/port"),
        *("--rng", "--balloon", "size=16M", "--vsock", f"path={folder}/vsock"),
    )
    with Guest(*options) as guest:
        guest.says(b"ready")
        assert pyvmm("snapshot", "one", "first").returncode == 0
        # It has not noticed.
        guest.hears(b"xyz")
        guest.says(b"xyz")
        guest.off()
    for again in (b"first time", b"second time"):
        with Guest("--restore", "first") as guest:
            guest.hears(again)
            guest.says(again)
            assert b"ready" not in guest.said, "it has booted"
            guest.off()


def test_several_go_on_side_by_side(snapshot: Path) -> None:
    with ExitStack() as closing:
        guests = [closing.enter_context(Guest("--restore", "first")) for _ in range(3)]
        for number, guest in enumerate(guests):
            guest.hears(b"%d" % number)
        for number, guest in enumerate(guests):
            guest.says(b"%d" % number)
            assert guest.said == b"%d" % number
        # A restored one is saved in turn, while the files that it came from are there no more.
        [name, *_] = [vm["name"] for vm in json.loads(pyvmm("ps", "--json").stdout)]
        assert pyvmm("snapshot", "rm", "first").returncode == 0
        assert pyvmm("snapshot", str(name), "second").returncode == 0
        for guest in guests:
            guest.off()
    with Guest("--restore", "second") as guest:
        guest.hears(b"again")
        guest.says(b"again")
        guest.off()


def test_a_vm_goes_on_where_it_was_saved(snapshot: Path) -> None:
    """On this machine's KVM, also if that runs no Linux, without being told so."""
    state = store.read_state(str(snapshot))
    assert state["kvm"] == "host"
    with VM.restore("first") as vm, vm.clone() as copy:
        for one in (vm, copy):
            one.console.send("hello")
            one.console.expect_exact("hello", timeout=SAFETY_TIMEOUT)
            assert "emulated" not in " ".join(one.messages)
    state["kvm"] = "elsewhere"
    state["checksum"] = store.checksum(state)
    (snapshot / "state.json").write_text(json.dumps(state))
    assert "nobody knows the KVM" in refused("run", "--restore", "first")


def test_a_restored_vm_has_no_folder_open(snapshot: Path) -> None:
    """By ".." it would lead out of the monitor's own root."""
    with VM.restore("first") as vm, vm.clone() as copy:
        for one in (vm, copy):
            one.console.send("hello")
            one.console.expect_exact("hello", timeout=SAFETY_TIMEOUT)
            process = Path(f"/proc/{one.pid}")
            opened = [path for path in (process / "fd").iterdir() if path.is_dir()]
            assert [path.samefile(process) for path in opened] in ([], [True]), opened


def test_a_restored_guest_can_boot_anew(snapshot: Path) -> None:
    with Guest("--restore", "first") as guest:
        guest.hears(b"R")
        guest.says(b"ready")
        guest.off()


def test_with_stop_the_vm_ends(one: Guest, snapshot_dir: Callable[[], list[str]]) -> None:
    assert pyvmm("snapshot", "one", "last", "--stop").returncode == 0
    _, errors = one.process.communicate(timeout=SAFETY_TIMEOUT)
    assert one.process.returncode == 143 and b"snapshot --stop" in errors
    assert snapshot_dir() == ["last"]


@pytest.fixture
def snapshot_dir(folder: Path) -> Callable[[], list[str]]:
    """The names in the directory of snapshots, hidden ones too."""
    return lambda: sorted(os.listdir(folder / "state/pyvmm/snapshots"))


def test_python_saves_and_restores(folder: Path) -> None:
    with VM(kernel=echo_kernel(folder), kvm="host", memory="64M", vsock=False) as vm:
        vm.console.expect_exact("ready", timeout=SAFETY_TIMEOUT)
        assert vm.snapshot("first") > 0
        with pytest.raises(ConfigError, match="there is a snapshot 'first' already"):
            vm.snapshot("first")
        assert vm.snapshot("last", stop=True) > 0
        assert vm.wait(SAFETY_TIMEOUT).exit_code == 143
    for name in ("first", "last"):
        with VM.restore(name, kvm="host", name="back") as vm:
            assert vm.name == "back"
            vm.console.send("hello")
            vm.console.expect_exact("hello", timeout=SAFETY_TIMEOUT)

    async def from_a_loop() -> None:
        async with await AsyncVM.restore("first", kvm="host") as vm:
            await vm.snapshot("third")

    asyncio.run(from_a_loop())
    assert store.names() == ["first", "last", "third"]
    with pytest.raises(ConfigError, match="no snapshot"):
        VM.restore("fourth")


def test_copies_have_numbers_of_their_own(snapshot: Path) -> None:
    """VMGenID: the guest's kernel mixes it into its random numbers."""
    at, size = layout.GENERATION_ID, layout.GENERATION_ID_SIZE
    with open(snapshot / "memory", "rb") as file:
        file.seek(at)
        numbers = [file.read(size), *(restore_and_end("first", at, size) for _ in range(2))]
    assert len(set(numbers)) == 3 and all(map(any, numbers)), numbers


def test_copies_are_told_of_by_vmclock(snapshot: Path) -> None:
    """Each restore is counted, and no two copies have the same generation."""

    def of_file(path: Path) -> tuple[int, int, int]:
        with open(path / "memory", "rb") as file:
            return disruption(os.pread(file.fileno(), 0x70, layout.VMCLOCK))

    def disruption(page: bytes) -> tuple[int, int, int]:
        assert page[:4] == b"VCLK"
        sequence, marker = struct.unpack_from("<IQ", page, 0x0C)
        return sequence, marker, struct.unpack_from("<Q", page, 0x68)[0]

    found = [of_file(snapshot)]
    found += [disruption(restore_and_end("first", layout.VMCLOCK, 0x70)) for _ in range(2)]
    assert [one[:2] for one in found] == [(0, 0), (2, 1), (2, 1)]
    with VM.restore("first", kvm="host") as vm, vm.clone() as copy:
        copy.snapshot("of-the-copy")
        vm.snapshot("second", diff_of="first")
    found.append(of_file(snapshot.parent / "of-the-copy"))
    for name, marker in (("second", 2), ("of-the-copy", 3)):
        found.append(disruption(restore_and_end(name, layout.VMCLOCK, 0x70)))
        assert found[-1][:2] == (2 * marker, marker), name
    generations = [one[2] for one in found]
    assert len(set(generations)) == len(generations)


def test_list_show_and_rm(snapshot: Path, snapshot_dir: Callable[[], list[str]]) -> None:
    [row] = json.loads(pyvmm("snapshot", "list", "--json").stdout)
    assert (row["name"], row["vm"], row["memory"]) == ("first", "one", 64 << 20)
    assert "first" in pyvmm("snapshot", "list").stdout
    shown = json.loads(pyvmm("snapshot", "show", "first").stdout)
    assert shown["spec"]["name"] == "one" and "machine" not in shown
    assert shown["stored"] < 8 << 20, "zero pages are stored"
    assert pyvmm("snapshot", "rm", "first").returncode == 0
    assert snapshot_dir() == []
    assert "no snapshot 'first'" in refused("snapshot", "rm", "first")
    assert "no snapshot 'first'" in refused("run", "--restore", "first")


def test_only_its_owner_can_read_it(snapshot: Path) -> None:
    for path in (snapshot, *snapshot.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_snapshot_is_never_replaced(one: Guest) -> None:
    assert pyvmm("snapshot", "one", "first").returncode == 0
    assert "there is a snapshot 'first' already" in refused("snapshot", "one", "first")


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_persistent_memory_goes_along_and_a_file_that_is_only_read_stays(
    folder: Path, snapshot_dir: Callable[[], list[str]], transport: str
) -> None:
    """A restored VM does not see what has become of the file since, and changes nothing of it."""
    own, read = folder / "own", folder / "read"
    was = b"as it was".ljust(3 << 20, b"\0") + bytes(range(256)) * (4 << 10)
    own.write_bytes(was)
    read.write_bytes(bytes(2 << 20))
    options = ("--pmem", str(own), "--pmem", f"{read},readonly", "--transport", transport, *OPTIONS)
    with Guest("--kernel", echo_kernel(folder), "--name", "one", *options) as guest:
        guest.says(b"ready")
        assert pyvmm("snapshot", "one", "first").returncode == 0
        own.write_bytes(bytes(4 << 20))
        guest.off()
    first = folder / "state/pyvmm/snapshots/first"
    assert sorted(os.listdir(first)) == ["memory", "pmem-0", "state.json"]
    assert (first / "pmem-0").read_bytes() == was
    assert (first / "pmem-0").stat().st_blocks << 9 < 3 << 20, "pages of zeroes take room"
    own.unlink()
    with Guest("--restore", "first", "--name", "two") as guest:
        guest.hears(b"on")
        guest.says(b"on")
        assert pyvmm("snapshot", "two", "second").returncode == 0
        assert pyvmm("snapshot", "merge", "second", "third").returncode == 0
        guest.hears(b"R")  # with what is in its memory
        guest.says(b"ready")
        guest.off()
    for name in ("second", "third"):
        assert (first.parent / name / "pmem-0").read_bytes() == was
    read.write_bytes(bytes(2 << 20))
    assert "read has changed since" in refused("run", "--kvm=host", "--restore", "second")


def test_marks_of_images_are_of_when_the_vm_stood_still(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on before all is written, and writes to its images."""
    real = store.Writer.write

    def write(writer: store.Writer, file: str, *args: Any) -> None:
        if file == store.MEMORY:
            os.utime(folder / "disk")
        real(writer, file, *args)

    disk = f"{folder}/disk"
    with Guest("--kernel", echo_kernel(folder), "--name", "one", "--disk", disk, *OPTIONS) as guest:
        guest.says(b"ready")
        monkeypatch.setattr(store.Writer, "write", write)
        snapshots.take("one", "first")
        guest.off()
    assert "disk has changed since" in refused("run", "--kvm=host", "--restore", "first")


def test_what_cannot_be_saved_is_named(folder: Path, snapshot_dir: Callable[[], list[str]]) -> None:
    options = ("--device", "examples/entropy.py:Entropy", *OPTIONS)
    with Guest("--kernel", echo_kernel(folder), "--name", "one", *options) as guest:
        guest.says(b"ready")
        assert "nobody knows what state it has" in refused("snapshot", "one", "first")
        guest.hears(b"on")  # it goes on all the same
        guest.says(b"on")
        assert snapshot_dir() == []


def test_a_disk_that_has_changed_is_refused(snapshot: Path, folder: Path) -> None:
    (folder / "disk").write_bytes(b"x" + bytes((1 << 20) - 1))
    assert "disk has changed since" in refused("run", "--kvm=host", "--restore", "first")


def test_what_a_snapshot_says_is_not_for_options(snapshot: Path) -> None:
    line = refused("run", "--kvm=host", "--restore", "first", "--memory", "128M")
    assert "--memory is what the snapshot says" in line
    assert "use only --name, --trace, --trace-file, --on-reboot beside it" in line


def test_a_client_that_dies_leaves_nothing(
    one: Guest, snapshot_dir: Callable[[], list[str]]
) -> None:
    for delay in (0.0, 0.1, 0.2, 0.3, 0.4):
        argv = [sys.executable, "-m", "pyvmm", "snapshot", "one", f"s{delay}"]
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as client:
            time.sleep(delay)
            client.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + SAFETY_TIMEOUT
    while True:  # until the VM has done what the last one had asked for, or cleared it away
        names = json.loads(pyvmm("snapshot", "list", "--json").stdout)
        assert not [row for row in names if "error" in row], "one is half there"
        if snapshot_dir() == sorted(row["name"] for row in names):
            break
        assert time.monotonic() < deadline, "something was left"
    one.hears(b"alive")
    one.says(b"alive")


# --- row 58 of docs/robustness.md -----------------------------------------------------------------


def _state(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        state = json.loads((path / "state.json").read_text())
        change(state)
        state["checksum"] = store.checksum(state)
        (path / "state.json").write_text(json.dumps(state))

    return damage


def _flip(path: Path) -> None:
    data = bytearray((path / "state.json").read_bytes())
    at = data.index(b'"rip"') + 8
    data[at] = data[at] % 9 + 49 if chr(data[at]).isdigit() else 49
    (path / "state.json").write_bytes(data)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (_flip, "checksum differs"),
    "cut short": (lambda p: os.truncate(p / "state.json", 1000), "not JSON"),
    "empty": (lambda p: os.truncate(p / "state.json", 0), "not JSON"),
    "no state": (lambda p: (p / "state.json").unlink(), "state.json: No such file"),
    "state is a link": (
        lambda p: (p / "state.json").unlink() or (p / "state.json").symlink_to("/etc/passwd"),
        "state.json",
    ),
    "state is a FIFO": (
        lambda p: (p / "state.json").unlink() or os.mkfifo(p / "state.json"),
        "not a regular file",
    ),
    "huge": (lambda p: os.truncate(p / "state.json", 1 << 36), "bytes, 67108864 at most"),
    "deep": (lambda p: (p / "state.json").write_text("[" * 100_000), "not JSON"),
    "foreign": (lambda p: (p / "state.json").write_text('{"a": 1}'), "of another kind"),
    "newer": (_state(lambda s: s.update(version=2)), "has version 2"),
    "older": (_state(lambda s: s.update(version=0)), "has version 0"),
    "memory cut short": (lambda p: os.truncate(p / "memory", 1 << 20), "'memory' is not as large"),
    "memory longer": (lambda p: os.truncate(p / "memory", 1 << 30), "'memory' is not as large"),
    "no memory": (lambda p: (p / "memory").unlink(), "'memory' is not as large"),
    "no changes of the disk": (lambda p: (p / "disk-0").unlink(), "'disk-0' is not as large"),
    "changes that are none": (
        lambda p: (p / "disk-0").write_bytes(bytes((p / "disk-0").stat().st_size)),
        "is not an overlay",
    ),
    "other memory size": (
        _state(lambda s: s["spec"].update(memory=128 << 20)),
        "not as large as its machine's",
    ),
    "more vCPUs": (_state(lambda s: s["spec"].update(cpus=2)), "1 vCPU, not 2"),
    "other spec": (_state(lambda s: s.update(spec=7)), "not a VM specification"),
    "a device too many": (
        _state(lambda s: s["machine"]["devices"].append({})),
        "2 devices, not 1",
    ),
    "no machine": (_state(lambda s: s.update(machine=None)), "is not a table"),
    "a processor from elsewhere": (
        _state(lambda s: [row.__setitem__(5, 0xFFFF_FFFF) for row in _leaf_one(s)]),
        "lacks what the guest's processor had: CPUID 0x1.0 ecx bit",
    ),
    "the state is a folder": (
        lambda p: (p / "state.json").unlink() or (p / "state.json").mkdir(),
        "not a regular file",
    ),
    "a name that is a number": (
        _state(lambda s: s["spec"].update(name=7)),
        "not a VM specification: name is 7",
    ),
    "a path that is a number": (
        _state(lambda s: s["spec"]["disks"][0].update(scratch=7)),
        "not a VM specification: scratch is 7",
    ),
    "a port's path that is a number": (
        _state(
            lambda s: s["spec"]["devices"].append(
                ["ports", {"ports": [{"name": "a", "path": 7}], "packed": False}]
            )
        ),
        "not a VM specification: path is 7",
    ),
    "a format that there is not": (
        _state(lambda s: s["spec"]["disks"][0].update(format="xx")),
        "format cannot be 'xx'",
    ),
    "a path with a NUL": (
        _state(lambda s: s["spec"].update(kernel="a\0b")),
        "not a VM specification: kernel is",
    ),
    "others may write it": (lambda p: p.chmod(0o777), "not yours alone to write"),
}


def _leaf_one(state: dict[str, Any]) -> list[list[int]]:
    vcpus = state["machine"]["board"]["vcpus"]
    return [row for vcpu in vcpus for row in vcpu["cpuid"] if row[0] == 1]


def test_row_58_a_bad_snapshot_is_refused_in_one_line(snapshot: Path, folder: Path) -> None:
    good = folder / "good"
    shutil.copytree(snapshot, good)
    for name, (damage, message) in BAD.items():
        shutil.rmtree(snapshot)
        shutil.copytree(good, snapshot)
        damage(snapshot)
        line = refused("run", "--kvm=host", "--restore", "first")
        assert message in line, (name, line)
        sockets = [path for path in (folder / "runtime").rglob("*") if path.is_socket()]
        assert not sockets, (name, sockets)


def test_all_that_this_machine_lacks_is_named_before_anything_is_opened(folder: Path) -> None:
    port = ("--port", f"name=org.test,path={folder}/port")
    with Guest("--kernel", echo_kernel(folder), "--name", "one", *port, *OPTIONS) as guest:
        guest.says(b"ready")
        assert pyvmm("snapshot", "one", "first").returncode == 0
        guest.off()

    def change(state: dict[str, Any]) -> None:
        [vcpu] = state["machine"]["board"]["vcpus"]
        vcpu["msrs"] += [[0x4D00_0001, 1], [0x4D00_0002, 7], [0x4D00_0003, 0]]
        vcpu["xsave"] += "00" * (1 << 14)
        for row in vcpu["cpuid"]:
            if row[:2] == [7, 0]:
                row[4] = 0xFFFF_FFFF

    _state(change)(folder / "state/pyvmm/snapshots/first")
    with socket.socket(socket.AF_UNIX) as other:  # who opens the port fails
        other.bind(f"{folder}/port")
        other.listen()
        line = refused("run", "--kvm=host", "--restore", "first")
        with socket.socket(socket.AF_UNIX) as second:
            second.bind(f"{folder}/port-first-1")
            second.listen()
            assert refused("clone", "first", "--kvm=host") == line
    for name in ("KVM_CAP_XSAVE2 with ", "MSR 0x4d000001, MSR 0x4d000002, CPUID 0x7.0 ebx bit "):
        assert name in line
    assert "0x4d000003" not in line and "port" not in line


@pytest.mark.parametrize("what", ["device", "disk", "share", "vhost-user"])
def test_a_state_brings_no_code_and_none_of_the_hosts_folders(snapshot: Path, what: str) -> None:
    mark = snapshot / "mark"
    code = snapshot / "evil.py"
    code.write_text(f"open({str(mark)!r}, 'w').close()\n")
    device: dict[str, Any] = {
        "device": ["user", {"path": str(code), "class_name": "Evil"}],
        "share": ["share", {"path": str(snapshot.parents[3]), "mountpoint": "/mnt"}],
        "vhost-user": ["vhost_user", {"socket": str(mark), "type": "blk"}],
    }

    def change(state: dict[str, Any]) -> None:
        if what == "disk":
            path = f"{code}:Evil"
            Path(path).touch()
            state["spec"]["disks"][0].update(path=path, snapshot=False)
            marks = os.stat(path)
            state["disks"][0]["files"] = {path: [0, marks.st_ino, marks.st_mtime_ns]}
            del state["files"]["disk-0"]
        else:
            state["spec"]["devices"].append(device[what])
            state["seal"] = "0" * 64

    _state(change)(snapshot)
    for command in (("run", "--kvm=host", "--restore", "first"), ("clone", "first")):
        line = refused(*command)
        assert not mark.exists(), f"it has run: {line}"
        if what in ("share", "vhost-user"):  # what a stranger can write into a state is no seal
            assert "is not one that you have taken here; take one of your own" in line
        else:
            assert "cannot be in a snapshot" in line


# As code in a monitor could, that was taken over.
LIES = """
import sys
from pyvmm.cli import main
from pyvmm.kinds import registry, vm_spec
from pyvmm.monitor import snapshot_sender
from pyvmm.spec.record import replace
_, kind, there, *arguments = sys.argv
usual = snapshot_sender.to_json

def lie(spec):
    def changed(part):
        if part.kind != kind:
            return part
        part = registry.with_paths(part, lambda path: there)
        return replace(part, read_only=False) if kind == "share" else part
    devices, disks = (tuple(map(changed, some)) for some in (spec.devices, spec.disks))
    return usual(replace(spec, devices=devices, disks=disks))

snapshot_sender.to_json = lie
sys.argv = ["pyvmm", *arguments]
sys.exit(main())
"""


@pytest.mark.parametrize("kind", ["share", "disk", "vsock", "none"])
def test_a_monitor_that_was_taken_over_is_given_no_more(
    folder: Path, snapshot_dir: Callable[[], list[str]], kind: str
) -> None:
    """What it says that its VM has is what is opened for a copy."""
    options = ["--disk", f"{folder}/disk,snapshot", "--vsock", f"path={folder}/vsock"]
    try:
        images.virtiofsd_command(True)
        options += ["--share", f"{folder},tag=t,readonly"]
    except ConfigError as error:
        if kind == "share":
            pytest.skip(str(error))
    there = folder if kind == "share" else folder / "secret"  # the same one, to be written
    (folder / "secret").write_bytes(bytes(512))
    command = ("run", "--kvm=host", "-d", "--name", "one", "--kernel", echo_kernel(folder))
    subprocess.run(
        [sys.executable, "-c", LIES, kind, str(there), *command, *OPTIONS, *options],
        check=True,
        capture_output=True,
        timeout=SAFETY_TIMEOUT,
    )
    try:
        if kind == "none":
            assert pyvmm("snapshot", "one", "first").returncode == 0
            assert pyvmm("clone", "one").returncode == 0
            assert pyvmm("stop", "one-1", "--now").returncode == 0
            return
        for command in (("snapshot", "one", "first"), ("clone", "one")):
            how = " to be written" if kind == "share" else ""
            assert f"one says that it has {there}{how}, and was not given that" in refused(*command)
        assert snapshot_dir() == []
    finally:
        pyvmm("stop", "one", "--now")


def test_a_snapshot_may_be_taken_from_anywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VM that was started with names of the current directory goes on with the same files."""
    echo_kernel(folder)
    monkeypatch.chdir(folder)
    options = ("--kernel", "echo", "--disk", "disk,snapshot", "--name", "one", *OPTIONS)
    with Guest(*options) as guest:
        guest.says(b"ready")
        monkeypatch.chdir("/")
        done = pyvmm("snapshot", "one", "first")
        assert done.returncode == 0, done.stderr
        guest.off()
    spec = store.read_state(str(folder / "state/pyvmm/snapshots/first"))["spec"]
    assert (spec["kernel"], spec["disks"][0]["path"]) == (f"{folder}/echo", f"{folder}/disk")


def test_a_shared_directory_is_for_those_who_have_taken_the_snapshot(folder: Path) -> None:
    """With its memory lent anew, and a virtiofsd for each; nobody else's state gives any away."""
    try:
        images.virtiofsd_command(True)
    except ConfigError as error:
        pytest.skip(str(error))
    for name in ("mine", "yours"):
        (folder / name).mkdir()
    share = ("--share", f"{folder}/mine,tag=t")
    with Guest("--kernel", echo_kernel(folder), "--name", "one", *share, *OPTIONS) as guest:
        guest.says(b"ready")
        assert pyvmm("snapshot", "one", "first").returncode == 0
        guest.hears(b"xyz")
        guest.says(b"xyz")
        guest.off()
    path = folder / "state/pyvmm/snapshots/first"
    assert sorted(os.listdir(path)) == ["memory", "share-0", "state.json"]
    key = folder / "state/pyvmm/snapshot-key"
    assert key.stat().st_mode & 0o777 == 0o600
    with VM.restore("first") as vm, vm.clone() as copy:
        for one in (vm, copy):
            one.console.send("hello")
            one.console.expect_exact("hello", timeout=SAFETY_TIMEOUT)
        vm.snapshot("second", track=True)
        vm.snapshot("third", diff_of="second")
        of_second = folder / "state/pyvmm/snapshots/second/memory"
        shutil.copy2(of_second, folder / "memory")
        os.replace(folder / "memory", of_second)  # a stranger's, with the same id
        with pytest.raises(ConfigError, match="second bears no seal of yours"):
            vm.snapshot("strange", diff_of="second")
    snapshots.merge("third", "fourth")
    for name in ("second", "third"):
        store.remove(name)
    with VM.restore("fourth") as vm:
        vm.console.send("again")
        vm.console.expect_exact("again", timeout=SAFETY_TIMEOUT)
    state = store.read_state(str(path))
    [row] = [row for kind, row in state["spec"]["devices"] if kind == "share"]
    whole = json.dumps(state)

    def written(text: str) -> None:
        (path / "state.json").write_text(text)

    def changed(where: dict[str, Any], **values: Any) -> None:
        before = {name: where[name] for name in values}
        where.update(values)
        state["checksum"] = store.checksum(state)
        written(json.dumps(state))
        where.update(before)

    def replaced(file: str) -> None:
        (path / file).rename(folder / file)
        shutil.copy2(folder / file, path / file)

    def put_back(file: str) -> None:
        os.replace(folder / file, path / file)

    for change, undo in (
        (lambda: changed(row, path=str(folder / "yours")), lambda: written(whole)),
        (lambda: changed(state, cmdline="x"), lambda: written(whole)),
        (lambda: replaced("memory"), lambda: put_back("memory")),
        (lambda: replaced("share-0"), lambda: put_back("share-0")),
        (key.unlink, lambda: None),
    ):
        snapshots.spec_of("first", str(path), store.read_state(str(path)))
        change()
        for command in (("run", "--kvm=host", "--restore", "first"), ("clone", "first")):
            assert "is not one that you have taken here; take one of your own" in refused(*command)
        undo()


def test_row_58_memory_that_a_file_keeps_is_never_the_hosts_own(snapshot: Path) -> None:
    """A state can name a file that its guest may write to, but gets what lies in the snapshot."""
    mine = snapshot / "mine"
    mine.write_bytes(bytes(2 << 20))

    def change(state: dict[str, Any]) -> None:
        state["spec"]["devices"].append(["pmem", {"path": str(mine)}])

    _state(change)(snapshot)
    line = refused("run", "--kvm=host", "--restore", "first")
    assert "pmem-0 is missing" in line
    for size, why in ((0, "has 0 bytes"), (4096, "has 4096 bytes")):
        (snapshot / "pmem-0").write_bytes(bytes(size))
        _state(lambda state, size=size: state["files"].update({"pmem-0": size}))(snapshot)
        assert why in refused("run", "--kvm=host", "--restore", "first")


def test_row_58_a_fuzzed_snapshot_is_restored_or_refused(kvm: Kvm, folder: Path) -> None:
    """SNAPSHOT_CASES cases from SNAPSHOT_SEED; `make fuzz` runs more of them."""
    fuzzed = Snapshots(folder / "fuzz")
    ends = Counter(_fuzzed(fuzzed, case) for case in range(CASES))
    assert ends[True] and ends[False], ends


def _fuzzed(fuzzed: Snapshots, case: int) -> bool:
    try:
        return fuzzed.run_case(random.Random(f"{SEED}/{case}"))
    except Exception as error:
        raise AssertionError(f"SNAPSHOT_SEED={SEED}, case {case}") from error
