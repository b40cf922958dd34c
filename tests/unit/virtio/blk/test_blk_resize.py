"""A disk that is resized while it is in use: what the driver sees, and what the file becomes."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from blk_rig import Rig, file_backend, running

from pyvmm.emulated_host.disks import DiskService
from pyvmm.emulated_host.qmp import Qmp
from pyvmm.emulated_host.spec import EmulatedHostError, EmulatedHostSpec, HostDisk, HostImage
from pyvmm.errors import ConfigError, HostError
from pyvmm.host import unix_sockets
from pyvmm.kinds.disk import outside
from pyvmm.kinds.vm_spec import validate
from pyvmm.monitor.control import MachineControl
from pyvmm.spec.vm import DiskSpec, VmSpec
from pyvmm.testing.blk_driver import IOERR, OK
from pyvmm.virtio import constants
from pyvmm.virtio.blk import device as device_module
from pyvmm.virtio.blk.backend import Backend

KIB = 1 << 10
SIZE = 64 * KIB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "disk.img"
    made.write_bytes(os.urandom(SIZE))
    return made


@pytest.fixture
def rig(path: Path) -> Iterator[Rig]:
    with running(file_backend(path)) as made:
        yield made


def capacity(rig: Rig) -> int:
    return rig.transport.negotiation.read_config(0, 8)


def config_interrupt(rig: Rig) -> bool:
    status = rig.transport.negotiation.state.interrupt_status
    return bool(status & constants.VIRTIO_MMIO_INT_CONFIG)


# ---- the device


def test_a_larger_disk_is_announced_and_usable(rig: Rig, path: Path) -> None:
    generation = rig.transport.negotiation.read_config_generation()
    assert rig.disk.read(SIZE // 512, 512).status == IOERR
    assert not config_interrupt(rig)
    assert rig.device.resize(2 * SIZE) == 2 * SIZE
    assert path.stat().st_size == 2 * SIZE
    assert config_interrupt(rig)
    assert rig.transport.negotiation.read_config_generation() != generation
    assert capacity(rig) == 2 * SIZE // 512
    assert rig.disk.write(SIZE // 512, b"new".ljust(512, b".")).status == OK
    assert path.read_bytes()[SIZE : SIZE + 3] == b"new"


def test_a_smaller_disk_refuses_what_is_behind_its_end(rig: Rig, path: Path) -> None:
    before = path.read_bytes()
    assert rig.device.resize(SIZE // 2) == SIZE // 2
    assert path.read_bytes() == before[: SIZE // 2]
    assert capacity(rig) == SIZE // 2 // 512
    assert rig.disk.write(SIZE // 2 // 512, bytes(512)).status == IOERR
    assert path.stat().st_size == SIZE // 2
    rig.assert_alive()


def test_what_the_image_has_become_is_taken_over(rig: Rig, path: Path) -> None:
    os.truncate(path, 3 * SIZE + 100)
    assert capacity(rig) == SIZE // 512
    assert rig.device.resize(None) == 3 * SIZE
    assert capacity(rig) == 3 * SIZE // 512


def test_only_the_capacity_changes(rig: Rig) -> None:
    before = rig.device.read_config(0, 96)
    rig.device.resize(2 * SIZE)
    after = rig.device.read_config(0, 96)
    assert after[8:] == before[8:]


def test_before_the_driver_is_there_nobody_is_interrupted(path: Path) -> None:
    with running(file_backend(path), start=False) as rig:
        rig.device.resize(2 * SIZE)
        assert not config_interrupt(rig)
        rig.driver.start()
        assert capacity(rig) == 2 * SIZE // 512
        assert rig.disk.read(SIZE // 512, 512).status == OK


class Slow(Backend):
    """Storage whose reads wait until they are let go, and that notes when it is resized."""

    can_resize = True

    def __init__(self) -> None:
        self.size_sectors = SIZE // 512
        self.reading, self.go = threading.Event(), threading.Event()
        self.resized_while_reading = False

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        self.reading.set()
        assert self.go.wait(30)
        self.reading.clear()

    def resize(self, size: int | None) -> None:
        self.resized_while_reading = self.reading.is_set()
        assert size is not None
        self.size_sectors = size // 512


def test_requests_in_progress_end_before_storage_is_cut_off() -> None:
    backend = Slow()
    with running(backend) as rig:
        reader = threading.Thread(target=rig.disk.read, args=(0, 512))
        reader.start()
        assert backend.reading.wait(30)
        resizer = threading.Thread(target=rig.device.resize, args=(SIZE // 2,))
        resizer.start()
        while capacity(rig) != SIZE // 2 // 512:  # already smaller for what comes next
            assert resizer.is_alive()
        backend.go.set()
        resizer.join()
        reader.join()
        assert not backend.resized_while_reading


def test_a_request_that_hangs_leaves_the_disk_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_PATIENCE", 0.02)
    backend = Slow()
    with running(backend) as rig:
        reader = threading.Thread(target=rig.disk.read, args=(0, 512))
        reader.start()
        assert backend.reading.wait(30)
        with pytest.raises(HostError, match="do not end"):
            rig.device.resize(SIZE // 2)
        assert capacity(rig) == SIZE // 512
        backend.go.set()
        reader.join()


def test_what_fails_leaves_the_size_that_the_storage_has(rig: Rig, path: Path) -> None:
    def fail() -> None:
        raise ConfigError("no")

    for size in (SIZE // 2, 2 * SIZE):
        with pytest.raises(ConfigError):
            rig.device.resize(size, fail)
        assert capacity(rig) == SIZE // 512
    rig.assert_alive()


def test_a_block_device_is_resized_by_whoever_has_it(path: Path) -> None:
    backend = file_backend(path)
    backend._image.is_block_device = True
    with pytest.raises(HostError, match="resize the block device itself") as error:
        backend.resize(2 * SIZE)
    assert error.value.errno == errno.EINVAL
    assert path.stat().st_size == SIZE
    os.truncate(path, 2 * SIZE)
    backend.resize(2 * SIZE)
    backend.resize(None)
    assert backend.size_sectors == 2 * SIZE // 512
    backend.close()


# ---- the control socket's method


Resize = Callable[..., Any]


def control(rig: Rig, path: Path, *, paused: bool = False, **disk: object) -> Resize:
    """The method of a machine whose only disk is `path`."""
    spec = validate(VmSpec("k", disks=(DiskSpec(str(path), **disk),)))  # type: ignore[arg-type]
    prepared = SimpleNamespace(spec=spec, devices=(rig.device,))
    machine = SimpleNamespace(
        pauser=SimpleNamespace(paused=paused),
        steady=threading.RLock(),
        parts=SimpleNamespace(prepared=prepared),
    )
    methods = MachineControl(machine, None, None).methods()  # type: ignore[arg-type]

    def resize(disk: str, size: int | None = None, **more: object) -> Any:
        given = more if size is None else {"size": size, **more}
        return methods["disk.resize"].run(disk=disk, **given)

    return resize


def test_growing_needs_no_more_words(rig: Rig, path: Path) -> None:
    resize = control(rig, path)
    assert resize(disk="disk0", size=2 * SIZE) == {"size": 2 * SIZE}
    assert resize(disk="disk0") == {"size": 2 * SIZE}
    assert resize(disk="disk0", size=SIZE, shrink=True) == {"size": SIZE}


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"size": SIZE - 512}, "would be lost; if the guest has made room, add --shrink"),
        ({"size": SIZE + 1}, "multiple of 512"),
        ({"size": 0}, "multiple of 512"),
        ({"size": -512}, "multiple of 512"),
        ({"size": 1 << 63}, "no disk has"),
        ({"disk": "nowhere"}, "there is no disk 'nowhere'; there are: disk0"),
    ],
)
def test_what_is_refused(rig: Rig, path: Path, params: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        control(rig, path)(**{"disk": "disk0", **params})
    assert path.stat().st_size == SIZE
    assert capacity(rig) == SIZE // 512


def test_a_paused_disk_may_grow_but_not_shrink(rig: Rig, path: Path) -> None:
    paused = control(rig, path, paused=True)
    assert paused("disk0", 2 * SIZE) == {"size": 2 * SIZE}
    with pytest.raises(ConfigError, match="resume it first"):
        paused("disk0", SIZE, shrink=True)


def test_a_read_only_disk_only_takes_over_a_size(path: Path) -> None:
    with running(file_backend(path, read_only=True)) as rig:
        methods = control(rig, path, read_only=True)
        with pytest.raises(ConfigError, match="read-only"):
            methods("disk0", 2 * SIZE)
        os.truncate(path, 2 * SIZE)
        assert methods("disk0") == {"size": 2 * SIZE}


class Fixed(Backend):
    size_sectors, read_only = 8, True

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("format", "says"),
    [
        ("qcow2", "disk0 is a qcow2 image in use, and keeps its size; stop the VM, then qemu-img"),
        ("", "is of a class without resize, and keeps its size; write one: Backend.resize"),
    ],
)
def test_other_storage_keeps_its_size(path: Path, format: str, says: str) -> None:
    disk = path if format else Path("fixed.py:Fixed")
    with running(Fixed()) as rig, pytest.raises(ConfigError, match=says):
        control(rig, disk, format=format)("disk0", 2 * SIZE)


# ---- across the emulated host's border


class Qemu:
    """The other end of a QMP socket: answers as QEMU does, and keeps what it was asked."""

    def __init__(self, answer: dict[str, object] | None = None) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.asked: list[dict[str, object]] = []
        self.answer = answer or {"return": {}}
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        stream = self.theirs.makefile("rwb")

        def say(what: object) -> None:
            stream.write(json.dumps(what).encode() + b"\r\n")
            stream.flush()

        say({"QMP": {"version": {}, "capabilities": []}})
        for line in stream:
            request = json.loads(line)
            id = request.pop("id")
            self.asked.append(request)
            if request["execute"] == "qmp_capabilities":
                say({"return": {}, "id": id})
            else:
                say({"event": "STOP", "data": {}})
                say({"return": {}, "id": id - 1})  # an answer that nobody waited for
                say({**self.answer, "id": id})


@pytest.fixture
def spec(path: Path) -> EmulatedHostSpec:
    fixed = path.with_name("fixed.img")
    fixed.write_bytes(bytes(1024))
    disks = (HostDisk(str(path)), HostDisk(str(fixed), read_only=True))
    return EmulatedHostSpec(HostImage(("qemu",), "k", "m", "b"), disks=disks)


def service(spec: EmulatedHostSpec, qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> DiskService:
    made = DiskService(spec, Qmp(qemu.ours))
    monkeypatch.setattr(unix_sockets, "reach", lambda name: made.connect())
    return made


def test_a_resize_reaches_qemu(
    spec: EmulatedHostSpec, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = Qemu()
    service(spec, qemu, monkeypatch)
    sizes = iter([SIZE, 2 * SIZE])  # what the block device inside has, first and later
    monkeypatch.setattr(outside, "_size", lambda path: next(sizes))
    outside.resize_outside(str(path), 2 * SIZE, lambda path: -1)
    resize = {"node-name": "disk0", "size": 2 * SIZE}
    assert qemu.asked[-1] == {"execute": "block_resize", "arguments": resize}
    fixed = str(path.with_name("fixed.img"))
    os.truncate(fixed, 5000)
    monkeypatch.setattr(outside, "_size", lambda path: 4608)
    outside.resize_outside(fixed, None, lambda path: -1)  # without a size: what the file has by now
    resize = {"node-name": "disk1", "size": 4608}
    assert qemu.asked[-1] == {"execute": "block_resize", "arguments": resize}
    assert len([one for one in qemu.asked if one["execute"] == "qmp_capabilities"]) == 1


@pytest.mark.parametrize(
    "line",
    [
        {"path": "/etc/passwd", "size": 512},
        {"path": ["disk"], "size": 512},
        {"path": "DISK", "size": 513},
        {"path": "DISK", "size": -512},
        {"path": "DISK", "size": 1 << 63},
        {"path": "DISK", "size": True},
        {"path": "DISK", "size": "512"},
        {"path": "DISK"},
        {"path": "FIXED", "size": 2048},
        [],
        "x" * 10_000,
    ],
    ids=str,
)
def test_s10_what_is_inside_can_ask_for_nothing_else(
    spec: EmulatedHostSpec, path: Path, monkeypatch: pytest.MonkeyPatch, line: object
) -> None:
    qemu = Qemu()
    made = service(spec, qemu, monkeypatch)
    text = json.dumps(line).replace("DISK", str(path))
    text = text.replace("FIXED", str(path.with_name("fixed.img")))
    connection = socket.socket(fileno=made.connect().detach())
    connection.settimeout(30)
    connection.sendall(text.encode() + b"\n")
    assert "error" in json.loads(connection.makefile().readline())
    connection.close()
    assert qemu.asked == []


def test_one_resize_at_a_time(spec: EmulatedHostSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    made = service(spec, Qemu(), monkeypatch)
    first = made.connect()
    with pytest.raises(HostError) as busy:
        made.connect()
    assert busy.value.errno == errno.EAGAIN  # the relay asks again
    first.close()
    while True:
        try:
            made.connect().close()
            break
        except HostError:
            continue


def test_what_qemu_refuses_is_told(
    spec: EmulatedHostSpec, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = Qemu({"error": {"class": "GenericError", "desc": "Cannot grow device files"}})
    service(spec, qemu, monkeypatch)
    with pytest.raises(ConfigError, match="Cannot grow device files"):
        outside.resize_outside(str(path), 2 * SIZE, lambda path: -1)


def test_a_qemu_that_has_gone() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(EmulatedHostError, match="does not answer"):
        Qmp(ours).execute("block_resize")
    ours.close()
