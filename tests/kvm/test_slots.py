"""Devices that come to a machine on real KVM, and go, with a guest that only knows the registers of
the slots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from operator import itemgetter
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
from boot_images import Elf, Load
from footprint import footprint, has_no_more_than
from hotplug_rig import until

from pyvmm import VM, ConfigError, images
from pyvmm.control import snapshot_store as store
from pyvmm.control.client import Client
from pyvmm.control.protocol import ControlError
from pyvmm.control.registry import socket_path
from pyvmm.host import tap
from pyvmm.host.files import open_image
from pyvmm.host.programs import find_program
from pyvmm.kvm.system import Kvm

SAFETY_TIMEOUT = 60
ROUNDS = int(os.environ.get("HOTPLUG_ROUNDS", "10"))


def says(char: str) -> str:
    """mov dx,0x3f8; mov al,char; out dx,al"""
    return f"66baf803 b0{ord(char):02x} ee"


# Says A for what has come, and E for what it ejects because it was asked to.
OBEDIENT = bytes.fromhex(
    # poll: mov dx,0x620; in eax,dx; test eax,eax; jz next; out dx,eax
    "66ba2006 ed 85c0 7408 ef"
    + says("A")
    # next: mov dx,0x624; in eax,dx; test eax,eax; jz poll; out dx,eax; mov dx,0x628; out dx,eax
    + "66ba2406 ed 85c0 74e6 ef 66ba2806 ef"
    + says("E")
    + "ebd7"  # jmp poll
)
# Says A for what has come, and resets; says B if a virtio device is in slot 1 when it starts.
RESETS = bytes.fromhex(
    # mov edi,0xe0008000; mov eax,[rdi]; cmp ax,0x1af4; je found
    "bf008000e0 8b07 663df41a 7417"
    # poll: mov dx,0x620; in eax,dx; test eax,eax; jz poll; out dx,eax
    "66ba2006 ed 85c0 74f7 ef"
    + says("A")
    # mov al,0xfe; out 0x64,al; jmp here
    + "b0fe e664 ebfe"
    # found
    + says("B")
    # off: mov dx,0x600; mov al,5 << 2 | 0x20; out dx,al; jmp off
    + "66ba0006 b034 ee ebf7"
)


@pytest.fixture
def folder(kvm: Kvm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    (tmp_path / "data").write_bytes(bytes(1 << 20))
    return tmp_path


def guest(folder: Path, code: bytes, **options: Any) -> VM:
    kernel = folder / "kernel"
    kernel.write_bytes(Elf(loads=[Load(data=code.ljust(256, b"\x90"))], note=None).build())
    return VM(kernel=str(kernel), kvm="host", vsock=False, **options)


@pytest.fixture(params=["mmio", "pci"])
def vm(folder: Path, request: pytest.FixtureRequest) -> Iterator[VM]:
    with guest(folder, OBEDIENT, transport=request.param, disks=["ram:1M,id=root"]) as made:
        yield made


def test_what_comes_and_goes_leaves_nothing(vm: VM, folder: Path) -> None:
    # The first time it loads what it needs.
    for disk in ("ram:1M,id=data", f"{folder}/data,id=data"):
        assert vm.add_disk(disk) == "data"
        vm.console.expect_exact("A", timeout=SAFETY_TIMEOUT)
        vm.remove_disk("data", timeout=SAFETY_TIMEOUT)
        vm.console.expect_exact("E", timeout=SAFETY_TIMEOUT)
    before = footprint(vm.pid)
    for _ in range(ROUNDS):
        assert vm.add_disk(f"{folder}/data,id=data,queues=1") == "data"
        vm.console.expect_exact("A", timeout=SAFETY_TIMEOUT)
        assert vm.add_rng() == "rng"
        vm.console.expect_exact("A", timeout=SAFETY_TIMEOUT)
        assert vm.status()["devices"] == ["root", "data", "rng"]
        assert list(vm.stats()["devices"]) == ["root", "data", "rng"]
        vm.remove_rng("rng", timeout=SAFETY_TIMEOUT)
        vm.remove_disk("data", timeout=SAFETY_TIMEOUT)
        for _ in ("rng", "data"):
            vm.console.expect_exact("E", timeout=SAFETY_TIMEOUT)
    has_no_more_than(vm.pid, before)
    assert vm.status()["devices"] == ["root"]


COMES_OPENED = {
    "raw": "data",
    "read-only": "data,readonly",
    "changes kept": "data,overlay={folder}/changes",
    "changes forgotten": "data,snapshot",
}
NUMBERS = """
from pyvmm.virtio.blk.backend import Backend
class Numbers(Backend):
    size_sectors = 8
    def readv(self, views, size, offset): pass
    def writev(self, views, size, offset): pass
    def flush(self): pass
"""


def has_nothing_of(path: str | Path) -> None:
    """No program has that file."""
    open_image(str(path), raw=False).close()


def is_let_go(path: str | Path) -> bool:
    """True if no program has that file. The kernel closes the files of one that has ended a moment
    after /proc shows none."""
    try:
        has_nothing_of(path)
    except ConfigError:
        return False
    return True


def has_virtiofsd() -> None:
    try:
        images.virtiofsd_command()
    except ConfigError as error:
        pytest.skip(str(error))


def those_with(*paths: Path) -> dict[int, int]:
    """The parents of all processes that have such a file open, or name it in their arguments."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            names = [os.readlink(fd) for fd in (process / "fd").iterdir()]
            words = (process / "cmdline").read_text()
            if any(str(path) in names or f"={path}" in words for path in paths):
                status = (process / "stat").read_text().rpartition(")")[2].split()
                found[int(process.name)] = int(status[1])
    return found


@pytest.mark.parametrize("options", ["", ",readonly", ",overlay={folder}/changes", ",snapshot"])
def test_a_strictly_confined_vm_takes_qcow2_disks_that_we_serve(folder: Path, options: str) -> None:
    below, image = folder / "below.qcow2", folder / "image.qcow2"
    made = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*made, str(below), "1M"], check=True)
    subprocess.run([*made, "-F", "qcow2", "-b", str(below), str(image)], check=True)
    disk = f"{image},backing={below},id=data{options}".format(folder=folder)
    with guest(folder, OBEDIENT, confine="strict") as vm:
        before = None
        for _ in range(3):
            assert vm.add_disk(disk) == "data"
            vm.console.expect_exact("A", timeout=SAFETY_TIMEOUT)
            with pytest.raises(ConfigError, match="in use"):
                open_image(str(image), raw=False)
            vm.remove_disk("data", timeout=SAFETY_TIMEOUT)
            vm.console.expect_exact("E", timeout=SAFETY_TIMEOUT)
            has_nothing_of(image)
            has_nothing_of(below)
            if before is not None:
                has_no_more_than(vm.pid, before)
            before = footprint(vm.pid)
        assert vm.status()["confinement"]["refused_calls"] == 0
        image.write_bytes(image.read_bytes()[:200])
        with pytest.raises(
            (ConfigError, ControlError), match=r"image.qcow2 (cannot be op|is a da)"
        ):
            vm.add_disk(disk)
        has_nothing_of(below)


def test_a_strictly_confined_vm_takes_the_shares_that_we_serve(folder: Path) -> None:
    has_virtiofsd()
    shared = folder / "shared"
    shared.mkdir()
    with guest(folder, OBEDIENT, confine="strict") as vm:
        before = None
        for options in ("", ",readonly", ""):
            share = vm.share(f"{shared}{options}")
            vm.console.expect_exact("A", timeout=SAFETY_TIMEOUT)
            other = vm.share(f"{shared},tag=other")
            vm.console.expect_exact("A", timeout=SAFETY_TIMEOUT)
            assert vm.status()["devices"] == [share, other]
            for one in (share, other):
                vm.unshare(one, timeout=SAFETY_TIMEOUT)
                vm.console.expect_exact("E", timeout=SAFETY_TIMEOUT)
            assert not those_with(shared)
            if before is not None:
                has_no_more_than(vm.pid, before)
            before = footprint(vm.pid)
        assert vm.status()["confinement"]["refused_calls"] == 0


@pytest.mark.parametrize("signal", [None, SIGKILL])
def test_what_serves_a_strictly_confined_vm_ends_with_it(folder: Path, signal: int | None) -> None:
    image = folder / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"], check=True)
    (folder / "shared").mkdir()
    has_virtiofsd()
    with guest(folder, OBEDIENT, confine="strict") as vm:
        vm.add_disk(f"{image},id=data")
        vm.share(f"{folder}/shared")
        serving = those_with(image, folder / "shared")
        assert len(serving) == 4, serving  # it forks, and who watches over the disk's
        assert not {os.getpid(), vm.pid} & set(serving.values())
        if signal is not None:
            os.kill(vm.pid, signal)
            vm.wait(SAFETY_TIMEOUT)
    until(lambda: not those_with(image, folder / "shared") and is_let_go(image))


@pytest.mark.parametrize("what", COMES_OPENED)
def test_a_strictly_confined_vm_takes_the_disks_that_we_open(folder: Path, what: str) -> None:
    disk = f"{folder}/{COMES_OPENED[what]},id=data".format(folder=folder)
    with guest(folder, OBEDIENT, confine="strict") as vm:
        before = None
        for _ in range(2):
            assert vm.add_disk(disk) == "data"
            vm.console.expect_exact("A", timeout=SAFETY_TIMEOUT)
            with pytest.raises(ConfigError, match="in use"):
                open_image(f"{folder}/data")
            if what != "read-only":
                assert vm.resize_disk("data", "2M") == 2 << 20
            vm.remove_disk("data", timeout=SAFETY_TIMEOUT)
            vm.console.expect_exact("E", timeout=SAFETY_TIMEOUT)
            open_image(f"{folder}/data").close()
            if before is not None:
                has_no_more_than(vm.pid, before)
            before = footprint(vm.pid)
        assert (folder / "data").stat().st_size == (2 << 20 if what == "raw" else 1 << 20)
        assert vm.status()["confinement"]["refused_calls"] == 0


def test_a_confined_vm_takes_code_below_changes_that_are_forgotten(folder: Path) -> None:
    (folder / "numbers.py").write_text(NUMBERS)
    disk = f"{folder}/numbers.py:Numbers,id=data,snapshot"
    with guest(folder, OBEDIENT) as vm:
        before = None
        for _ in range(2):
            assert vm.add_disk(disk) == "data"
            vm.console.expect_exact("A", timeout=SAFETY_TIMEOUT)
            vm.remove_disk("data", timeout=SAFETY_TIMEOUT)
            vm.console.expect_exact("E", timeout=SAFETY_TIMEOUT)
            if before is not None:
                has_no_more_than(vm.pid, before)
            before = footprint(vm.pid)
        assert vm.status()["confinement"]["refused_calls"] == 0


def test_a_strictly_confined_vm_takes_the_networks_that_we_open(folder: Path) -> None:
    nets = {"user": "net-user"}
    try:
        fds, _ = tap.open_tap("pyvmmt%d", create=True)
        os.close(*fds)
        nets |= {"tap=pyvmmtc,create,vhost=off": "net-pyvmmtc"}
        nets |= {"tap=pyvmmtc,create,queues=2": "net-pyvmmtc"}
    except ConfigError:
        pass  # no taps can be made here
    with guest(folder, OBEDIENT, confine="strict") as vm:
        for net, name in nets.items():
            assert vm.add_net(net) == name
            vm.console.expect_exact("A", timeout=SAFETY_TIMEOUT)
            assert vm.status()["devices"] == [name] == list(vm.stats()["devices"])
            vm.remove_net(name, timeout=SAFETY_TIMEOUT)
            vm.console.expect_exact("E", timeout=SAFETY_TIMEOUT)
        assert not tap.exists("pyvmmtc")
        assert vm.status()["confinement"]["refused_calls"] == 0


def test_a_program_that_speaks_json_names_what_it_wants(folder: Path) -> None:
    (folder / "shared").mkdir()
    (folder / "zeroes.py").write_text(
        "from pyvmm.virtio.blk.backend import Backend\n"
        "class Zeroes(Backend):\n"
        "    size_sectors = 8\n"
        "    read_only = True\n"
        "    def readv(self, views, size, offset): pass\n"
        "    def writev(self, views, size, offset): pass\n"
        "    def flush(self): pass\n"
    )
    image = folder / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"], check=True)
    wanted = [("disk", f"{image},id=image"), ("disk", f"{folder}/zeroes.py:Zeroes,id=zeroes")]
    if find_program("passt") is not None:
        wanted.append(("net", "user"))
    with suppress(ConfigError):
        images.virtiofsd_command()
        wanted.append(("share", f"{folder}/shared"))
    script = (
        "import json, socket, sys\n"
        "client = socket.socket(socket.AF_UNIX)\n"
        "client.connect(sys.argv[1])\n"
        "answers = client.makefile('r')\n"
        "for kind, device in json.loads(sys.argv[2]):\n"
        "    line = {'version': 1, 'method': f'{kind}.add', 'params': {'device': device}}\n"
        "    client.sendall(json.dumps(line).encode() + b'\\n')\n"
        "    print(json.loads(answers.readline())['result']['id'])\n"
    )
    with guest(folder, OBEDIENT, confine="strict") as vm:
        ids = []
        for one in wanted:  # the first request of a connection
            argv = [sys.executable, "-c", script, socket_path(vm.name), json.dumps([one])]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=SAFETY_TIMEOUT)
            assert done.returncode == 0, done.stderr
            ids.append(done.stdout.strip())
            vm.console.expect_exact("A", timeout=SAFETY_TIMEOUT)
        assert ids[:2] == ["image", "zeroes"] and sorted(vm.status()["devices"]) == sorted(ids)
        assert vm.status()["confinement"]["refused_calls"] == 0
    until(lambda: not those_with(image, folder / "shared"))


def test_what_a_strictly_confined_vm_cannot_be_given_is_told(folder: Path) -> None:
    (folder / "shared").mkdir()
    with guest(folder, OBEDIENT, confine="strict") as vm:
        for add, value, told in (
            (vm.add_disk, f"{folder}/data,format=qcow2", "is not a qcow2 image"),
            (vm.add_disk, f"{folder}/code.py:Disk,snapshot", "cannot open .*/code.py: No such"),
            (vm.add_disk, f"{folder}/nothing", "cannot open .*/nothing: No such file"),
            (vm.share, f"{folder}/data", "data is not a directory"),
        ):
            with pytest.raises((ConfigError, ControlError), match=told) as caught:
                add(value)  # type: ignore[operator]  # each takes a text
            assert "\n" not in str(caught.value)
        # A client that says that it has sent all files changes nothing about it.
        with (
            Client.connect(vm.name) as client,
            pytest.raises(ControlError, match="no virtiofsd was"),
        ):
            client.call("share.add", device=f"{folder}/shared", files=[])
        qcow2 = f"{folder}/image.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow2, "1M"], check=True)
        with (
            open(qcow2, "r+b") as file,
            Client.connect(vm.name) as client,
            pytest.raises(ControlError, match="no storage-daemon was handed over"),
        ):
            client.call("disk.add", device=qcow2, files=[qcow2], fds=[file.fileno()])
        assert vm.status()["devices"] == []


def test_a_guest_that_is_not_there_keeps_nothing_by_force(vm: VM) -> None:
    vm.add_disk("ram:1M,id=data")
    vm.console.expect_exact("A", timeout=SAFETY_TIMEOUT)
    vm.pause()
    with pytest.raises(ControlError, match="paused"):
        vm.remove_disk("data")
    assert vm.wait_for_driver("disk", "data", timeout=SAFETY_TIMEOUT) == "it is paused"
    vm.resume()
    vm.remove_disk("data", timeout=0, force=True)
    assert vm.status()["devices"] == ["root"]


def test_names_that_come_late_are_those_of_the_machine(vm: VM, folder: Path) -> None:
    """The root of the monitor's box, where there is one, has none of them."""
    with pytest.raises(ControlError, match="data is not a directory"):
        vm.share(f"{folder}/data")
    has_virtiofsd()
    (folder / "shared").mkdir()
    share = vm.share(f"{folder}/shared,readonly")
    vm.console.expect_exact("A", timeout=SAFETY_TIMEOUT)
    vm.unshare(share, timeout=SAFETY_TIMEOUT)
    assert vm.status()["devices"] == ["root"]


def test_events_and_the_command_line_tell(vm: VM, folder: Path) -> None:
    from click.testing import CliRunner

    from pyvmm.cli.commands import cli

    def pyvmm(*words: str) -> str:
        done = CliRunner().invoke(cli, [*words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        warnings.append(done.stderr)
        return done.stdout

    warnings: list[str] = []
    assert pyvmm("disk", "add", vm.name, f"{folder}/data,readonly") == "disk0\n"
    assert "the guest has not taken disk0 yet: no driver of it is at work yet" in warnings[-1]
    assert pyvmm("rng", "add", vm.name, "bps=1M", "--timeout", "60") == "rng\n"
    assert "the guest has not taken rng yet: no driver of it is at work yet" in warnings[-1]
    assert pyvmm("disk", "rm", vm.name, "disk0", "--timeout", "60") == ""
    assert pyvmm("rng", "rm", vm.name, "rng", "--timeout", "60", "--force") == ""
    told = list(islice(vm.events(), 5))
    assert [event.kind for event in told] == [
        "started",
        *2 * ["device_added"],
        *2 * ["device_removed"],
    ]
    assert [event.details["id"] for event in told[1:]] == ["disk0", "rng", "disk0", "rng"]
    assert told[1].details["kind"] == "disk" and told[-1].details["by"] == "host"


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_what_came_is_there_after_a_reboot(folder: Path, transport: str) -> None:
    with guest(folder, RESETS, transport=transport) as vm:
        vm.add_disk(f"{folder}/data")
        assert vm.console.expect(["AB", "A.*A"], timeout=SAFETY_TIMEOUT) == 0, vm.console.text
        assert vm.wait(timeout=SAFETY_TIMEOUT).exit_code == 0


def places(name: str) -> tuple[Any, Any]:
    """The devices' places in a snapshot, and the bus with all that a driver can have set."""
    machine = store.read_state(os.path.join(store.folder(), name))["machine"]
    machine["pci"]["bus"]["functions"].sort(key=itemgetter("device"))
    return machine["places"], machine["pci"]


@pytest.fixture
def saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    for name in ("root", "goes", "stays", "later"):
        (folder / name).write_bytes(bytes(1 << 20))


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_what_has_come_and_gone_is_in_a_snapshot(saved: None, folder: Path, transport: str) -> None:
    def disk(name: str) -> str:
        return f"{folder}/{name},id={name},snapshot"

    with guest(folder, OBEDIENT, transport=transport, disks=[disk("root")]) as vm:
        vm.add_disk(disk("goes"))
        vm.add_rng()
        vm.add_disk(disk("stays"))
        assert vm.add_net("user") == "net-user"
        assert vm.add_net("user") == "net-user-2"
        vm.remove_net("net-user", timeout=SAFETY_TIMEOUT)
        vm.remove_disk("goes", timeout=SAFETY_TIMEOUT)
        devices = ["root", "stays", "net-user-2", "rng"]
        assert vm.status()["devices"] == devices
        vm.snapshot("first")
        with vm.clone() as copy:
            assert copy.status()["devices"] == devices
        vm.snapshot("same", stop=True)
    assert places("same") == places("first")
    first, bus = places("first")
    assert [row["name"] for row in first] == devices
    own = 1 if transport == "pci" else 0  # of the disk that was there from the start
    assert [row["slot"] for row in first] == [own or None, own + 3, own + 5, own + 2]
    with VM.restore("first", kvm="host") as vm:
        assert vm.status()["devices"] == devices
        vm.snapshot("second")
        assert places("second") == (first, bus)
        # They come and go as before: the free place is taken first.
        vm.remove_disk("stays", timeout=SAFETY_TIMEOUT)
        vm.remove_rng("rng", timeout=SAFETY_TIMEOUT)
        for _ in range(2):
            vm.console.expect_exact("E", timeout=SAFETY_TIMEOUT)
        assert vm.add_disk(disk("later")) == "later"
        vm.console.expect_exact("A", timeout=SAFETY_TIMEOUT)
        vm.snapshot("third", stop=True)
    assert [row["slot"] for row in places("third")[0]] == [own or None, own + 1, own + 5]


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_news_and_reboots_of_a_restored_guest(saved: None, folder: Path, transport: str) -> None:
    with guest(folder, RESETS, transport=transport) as vm:
        vm.pause()
        vm.add_disk(f"{folder}/later")
        vm.snapshot("first", stop=True)
    with VM.restore("first", kvm="host") as vm:
        assert vm.console.expect(["AB", "A.*A"], timeout=SAFETY_TIMEOUT) == 0, vm.console.text
        assert vm.wait(timeout=SAFETY_TIMEOUT).exit_code == 0


def test_what_was_taken_away_is_not_forgotten(saved: None, folder: Path) -> None:
    """A guest that has not looked yet would take what comes to its place for the same device."""
    with guest(folder, b"\xf4\xeb\xfd", transport="pci") as vm:  # halts
        vm.add_disk(f"{folder}/goes,id=goes")
        vm.remove_disk("goes", timeout=0, force=True)
        vm.add_disk(f"{folder}/stays,id=stays")
        vm.snapshot("first", stop=True)
    with VM.restore("first", kvm="host") as vm:
        vm.add_disk(f"{folder}/later,id=later")
        vm.snapshot("second", stop=True)
    assert [row["slot"] for row in places("second")[0]] == [2, 3]
    assert places("second")[1]["pulled"] == [{"device": 1, "start": 0, "end": 0}]


def test_what_other_processes_serve_does_not_come_to_a_restored_vm(
    saved: None, folder: Path
) -> None:
    """Nobody else can have its memory."""
    try:
        images.virtiofsd_command()
    except ConfigError as error:
        pytest.skip(str(error))
    (folder / "shared").mkdir()
    with guest(folder, OBEDIENT, transport="pci") as vm:
        vm.snapshot("first", stop=True)
    with VM.restore("first", kvm="host") as vm:
        with pytest.raises(ControlError, match="cannot have the memory of a VM that goes on"):
            vm.share(f"{folder}/shared,readonly")
        assert vm.status()["devices"] == []


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_a_snapshot_whose_card_another_process_is_to_serve_is_refused(
    saved: None, folder: Path, transport: str
) -> None:
    with guest(folder, OBEDIENT, transport=transport, net="user") as vm:
        vm.snapshot("first", stop=True)
    path = os.path.join(store.folder(), "first")
    state = store.read_state(path)
    state["spec"]["devices"][0][1]["vhost_user"] = True
    state["checksum"] = store.checksum(state)
    Path(path, "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=r"the saved state .* cannot be: |has no vhost-user"):
        VM.restore("first", kvm="host").start()


def no_place(row: dict[str, Any]) -> None:
    row["slot"] = None


BAD_PLACES = {
    "taken": (lambda rows: rows[1].update(slot=rows[0]["slot"]), "device 1 at"),
    "over another": (lambda rows: rows[1].update(start=rows[0]["start"]), "device 3 at"),
    "not aligned": (lambda rows: rows[1].update(start=rows[1]["start"] + 8), "device 3 at"),
    "outside": (lambda rows: rows[1].update(start=0), "device 3 at"),
    "bridge": (lambda rows: rows[1].update(slot=0), "slot is 0"),
    "far": (lambda rows: rows[1].update(slot=32), "slot is 32"),
    "elsewhere": (lambda rows: rows[1].update(slot=4), "no such device on the bus"),
    "nowhere": (lambda rows: no_place(rows[1]), "slot is missing"),
    "fewer": (lambda rows: rows.pop(), "places of 1 devices, not 2"),
    "same name": (lambda rows: rows[1].update(name="root"), "a device cannot be called 'root'"),
    "bad name": (lambda rows: rows[1].update(name="a\nb"), "a device cannot be called"),
}


@pytest.mark.parametrize("what", BAD_PLACES)
def test_places_that_cannot_be_are_refused(saved: None, folder: Path, what: str) -> None:
    with guest(folder, OBEDIENT, transport="pci", disks=[f"{folder}/root,snapshot,id=root"]) as vm:
        vm.add_disk(f"{folder}/goes,id=goes")
        vm.add_disk(f"{folder}/stays,id=stays,readonly")
        vm.remove_disk("goes", timeout=SAFETY_TIMEOUT)
        vm.snapshot("first", stop=True)
    path = os.path.join(store.folder(), "first")
    state = store.read_state(path)
    change, message = BAD_PLACES[what]
    change(state["machine"]["places"])
    state["checksum"] = store.checksum(state)
    Path(path, "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=message):
        VM.restore("first", kvm="host").start()


def test_a_disk_of_virtio_mmio_stays(folder: Path) -> None:
    with (
        guest(folder, OBEDIENT, transport="mmio", disks=["ram:1M,id=root"]) as vm,
        pytest.raises(ControlError, match="root is on virtio-mmio, and stays"),
    ):
        vm.remove_disk("root")
