"""Devices that come to an emulated host, as the machine outside sees it: the monitor inside and
QEMU are the test's."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hotplug_rig import SAFETY_TIMEOUT, image, until

from pyvmm import images
from pyvmm.control import registry
from pyvmm.control.protocol import Later, Method, Upgrade
from pyvmm.control.server import ControlServer
from pyvmm.emulated_host.spec import Plugs
from pyvmm.errors import ConfigError
from pyvmm.host import unix_sockets
from pyvmm.host.files import open_image
from pyvmm.monitor import plugged_inside
from pyvmm.monitor.emulated_plug import Plugging
from pyvmm.spec.vm import VmSpec


class Inside:
    """The monitor inside: `devices` are what it has."""

    def __init__(self) -> None:
        self.devices: list[str] = []
        self.specs: list[dict[str, Any]] = []
        self.described: list[dict[str, Any]] = []
        self.before_answer: Callable[[], None] = lambda: None
        self.cancelled = threading.Event()
        self.may_go = threading.Event()
        self.listeners: list[Any] = []
        self.registration = registry.register("inside")
        assert self.registration.listener is not None
        methods = {
            "plug": Method(self.plug, needs=plugged_inside.NEEDS),
            "status": Method(lambda: {"devices": self.devices}),
            "events": Method(self.events, takes={"history": bool}),
            "disk.remove": Method(
                self.remove, needs={"id": str}, takes={"timeout_ms": int, "force": bool}
            ),
        }
        self.server = ControlServer(self.registration.listener, methods.get)
        self.server.start()

    def plug(
        self, kind: str, spec: dict[str, Any], described: dict[str, Any], disks: Any, streams: Any
    ) -> dict[str, Any]:
        self.specs.append(spec)
        self.described.append(described)
        id = spec.get("id") or f"{kind}0"
        self.devices.append(id)
        self.before_answer()
        return {"kind": kind, "id": id, "slot": 3}

    def remove(self, id: str, timeout_ms: int = 0, force: bool = False) -> Later:
        return Later(lambda: self.go(id), cancel=self.cancel)

    def go(self, id: str) -> dict[str, Any]:
        self.may_go.wait(SAFETY_TIMEOUT)
        if self.cancelled.is_set():
            raise ConfigError("it stays")
        self.devices.remove(id)
        return {"kind": "disk", "id": id}

    def cancel(self) -> None:
        self.cancelled.set()
        self.may_go.set()

    def events(self, history: bool = True) -> Upgrade:
        return Upgrade({}, lambda connection, rest: self.listeners.append(connection))

    def tell(self, id: str) -> None:
        event = {"event": "device_removed", "kind": "disk", "id": id, "by": "guest"}
        for one in self.listeners:
            one.send(json.dumps(event).encode() + b"\n")

    def close(self) -> None:
        self.may_go.set()
        for one in self.listeners:
            one.close()
        self.server.close()
        self.registration.close()


class Outside:
    def __init__(self, inside: Inside) -> None:
        self.inside = inside
        self.plugging = Plugging(VmSpec("kernel"), lambda path, option: path, "inside")
        self.back: list[Any] = []
        self.plugs = Plugs(self.plug_disk, lambda stream, closing: "", self.connect, self.take_back)

    def plug_disk(self, disk: Any, path: str, closing: ExitStack) -> str:
        return "serial"

    def connect(self, path: str) -> Any:
        return unix_sockets.connect(self.inside.registration.path)

    def take_back(self, connection: Any, said: bytes) -> None:
        self.back.append(connection)

    def send(self, method: str, **params: Any) -> socket.socket:
        """A client's connection, with that request under way."""
        ours, theirs = unix_sockets.pair()
        client = socket.socket(fileno=ours.detach())
        client.settimeout(SAFETY_TIMEOUT)
        line = json.dumps({"version": 1, "id": 1, "method": method, "params": params}).encode()
        give = self.plugging.take(line + b"\n", self.plugs)
        assert give is not None
        give(theirs, line + b"\n")
        return client

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        with self.send(method, **params) as client:
            found: dict[str, Any] = json.loads(client.makefile("rb").readline())
            return found


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outside]:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    inside = Inside()
    made = Outside(inside)
    yield made
    inside.close()
    made.plugging.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return image(tmp_path)


def is_locked(path: Path) -> bool:
    try:
        open_image(str(path), read_only=False).close()
    except ConfigError:
        return True
    return False


def add(outside: Outside, path: Path) -> None:
    assert outside.ask("disk.add", device=f"{path},id=data")["result"]["id"] == "data"
    # A snapshot has it by its name outside.
    seen = [row[-1]["path"] for row in (outside.inside.specs, outside.inside.described)]
    assert seen[0].startswith("/run/pyvmm-plug/") and seen[1] == str(path)
    until(lambda: bool(outside.inside.listeners))


def test_what_the_guest_ejects_is_given_back(outside: Outside, data: Path) -> None:
    add(outside, data)
    assert is_locked(data)
    outside.inside.devices.clear()
    outside.inside.tell("data")
    until(lambda: not is_locked(data))


def test_news_of_a_device_of_the_same_name_takes_nothing_from_the_next(
    outside: Outside, data: Path
) -> None:
    """The event of one that has gone is heard when the next one is there already."""
    outside.inside.may_go.set()
    add(outside, data)
    assert "result" in outside.ask("disk.remove", id="data")
    assert not is_locked(data)
    add(outside, data)
    outside.inside.tell("data")  # late
    marker = image(data.parent, "marker")
    assert "result" in outside.ask("disk.add", device=f"{marker},id=marker")
    outside.inside.devices.remove("marker")
    outside.inside.tell("marker")
    until(lambda: not is_locked(marker))  # and so the one before was heard
    assert is_locked(data)


def test_what_is_ejected_before_it_is_known_outside_is_given_back(
    outside: Outside, data: Path
) -> None:
    def eject() -> None:
        outside.inside.devices.clear()
        outside.inside.tell("data")

    outside.inside.before_answer = eject
    add(outside, data)
    until(lambda: not is_locked(data))


def test_a_name_that_is_taken_again_gives_back_what_it_was_before(
    outside: Outside, data: Path
) -> None:
    add(outside, data)
    outside.inside.devices.clear()  # the guest has ejected it, and nobody was told yet
    add(outside, image(data.parent, "next"))
    assert not is_locked(data)


@pytest.mark.parametrize("timeout", [-1, 0, 1 << 62])
def test_time_has_bounds(outside: Outside, data: Path, timeout: int) -> None:
    outside.inside.may_go.set()
    add(outside, data)
    assert "result" in outside.ask("disk.remove", id="data", timeout_ms=timeout)


def test_who_hangs_up_takes_the_request_back(outside: Outside, data: Path) -> None:
    add(outside, data)
    client = outside.send("disk.remove", id="data", timeout_ms=3_600_000)
    until(lambda: any(one.waits for one in outside.inside.server._clients.values()))
    client.close()
    assert outside.inside.cancelled.wait(SAFETY_TIMEOUT)
    until(lambda: not any(t.name.startswith("plug-asker") for t in threading.enumerate()))
    assert is_locked(data)


def test_a_client_that_never_reads_costs_no_processor(
    outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvmm.monitor.emulated_plug._SENDING", 0.5)
    ours, theirs = unix_sockets.pair()
    with socket.socket(fileno=ours.detach()):
        while True:  # until nothing more can be told
            try:
                theirs.send(bytes(1 << 16))
            except BlockingIOError:
                break
        asked = b'{"version": 1, "id": 1, "method": "disk.remove", "params": {}}\n'
        before = time.process_time()
        outside.plugging._serve(outside.plugs, theirs, asked)
        assert time.process_time() - before < 0.25  # it waits 0.5 s, and works for less
    assert outside.back == []  # half an answer is not the beginning of another


def test_a_directory_that_is_only_read_gets_in_as_it_is_seen_there(
    outside: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU takes no more file systems, but shows this machine's, to be read."""
    monkeypatch.setattr(images, "virtiofsd_command", lambda make, machine="": ["virtiofsd"])
    told = outside.ask("share.add", device=f"{tmp_path}:/mnt,readonly")
    assert told["result"]["id"] == "share0"
    [spec] = outside.inside.specs
    # Which tags are taken is known inside.
    assert (spec["path"], spec["ninep"], spec["tag"]) == (str(tmp_path), "", "")
    told = outside.ask("share.add", device=str(tmp_path))
    assert "does not get into an emulated KVM host that runs" in told["error"]["message"]
    assert len(outside.inside.specs) == 1


@pytest.mark.parametrize("options", ["", ",readonly"])
def test_no_directory_comes_to_one_that_opens_nothing_whatever_is_said_of_it(
    outside: Outside, tmp_path: Path, options: str
) -> None:
    """No advice on another thing that is wrong helps there."""
    inside, visible = outside.inside, lambda path, option: path
    outside.plugging = Plugging(VmSpec("kernel"), visible, "inside", strict=True)
    told = outside.ask("share.add", device=f"{tmp_path}{options}")
    assert "no directory comes to a strictly confined VM" in told["error"]["message"]
    assert not inside.specs
