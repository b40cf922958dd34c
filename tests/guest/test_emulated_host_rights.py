"""Rights of control sockets across an emulated host's border: doors are outside, answers inside."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from boot_images import Elf, Load
from guest import HANG_SECONDS, wait_until

from pyvmm import VM
from pyvmm.control.doors import MAX_AT_DOOR
from pyvmm.monitor.plugged_inside import NEEDS

pytestmark = pytest.mark.usefixtures("linux_guests")

WATCH, CONTROL, EXEC = RANKS = ("watch", "control", "exec")
HALT = b"\xf4\xeb\xfd"  # hlt, again and again
PLUG = {**{name: kind() for name, kind in NEEDS.items()}, "kind": "rng"}
# What needs which rights. `plug` is the machine's own word to the monitor inside.
REQUESTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (WATCH, "status", {}),
    (WATCH, "metrics", {}),
    (WATCH, "events", {}),
    (WATCH, "console", {"input": False}),
    (CONTROL, "pause", {}),
    (CONTROL, "resume", {}),
    (CONTROL, "disk.resize", {"disk": "no such disk", "size": 1 << 20}),
    (CONTROL, "disk.remove", {"id": "no such disk"}),
    (EXEC, "disk.add", {"device": "/no/such/file"}),
    (EXEC, "net.add", {"device": "nothing that there is"}),
    (EXEC, "share.add", {"device": "/"}),
    (EXEC, "plug", PLUG),
    (EXEC, "console", {}),
    (EXEC, "snapshot", {}),
    (EXEC, "vsock.connect", {"port": 1}),
)


class Client:
    """Of a control socket."""

    def __init__(self, path: str | Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(HANG_SECONDS)
        self.socket.connect(str(path))
        self.answers = self.socket.makefile("rb")

    def ask(self, method: str, params: dict[str, Any], pieces: int = 1) -> dict[str, Any]:
        line = json.dumps({"version": 1, "id": 1, "method": method, "params": params}).encode()
        size = -(-len(line + b"\n") // pieces)
        for place in range(0, len(line) + 1, size):
            self.socket.sendall((line + b"\n")[place : place + size])
        answer: dict[str, Any] = json.loads(self.answers.readline() or b"{}")
        return answer

    def close(self) -> None:
        self.answers.close()
        self.socket.close()


def ask(path: str | Path, method: str, params: dict[str, Any], pieces: int = 1) -> dict[str, Any]:
    answers: list[dict[str, Any]] = []

    def answered() -> bool:
        client = Client(path)
        try:
            answers.append(client.ask(method, params, pieces))
        finally:
            client.close()
        return not is_busy(answers[-1])  # with those before, who have gone, and are not missed yet

    assert wait_until(answered), answers[-1]
    return answers[-1]


def is_busy(answer: dict[str, Any]) -> bool:
    return bool(answer.get("error", {}).get("code") == "busy")


def is_forbidden(answer: dict[str, Any]) -> bool:
    return bool(answer.get("error", {}).get("code") == "forbidden")


def test_a_client_may_do_what_its_socket_is_for(tmp_path: Path, microvm_factory: Any) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(Elf(loads=[Load(data=HALT.ljust(256, b"\x90"))], note=None).build())
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    doors = {rights: tmp_path / rights for rights in RANKS}
    vm: VM = microvm_factory(
        kernel=kernel,
        kvm="emulated",
        vsock=True,
        balloon={"size": 0},
        control_socket=[{"path": str(path), "rights": name} for name, path in doors.items()],
        ready=False,
    )
    for pieces in (1, 1 << 16):  # as many as there are bytes
        for needed, method, params in REQUESTS:
            may = {
                rights
                for rights, path in doors.items()
                if not is_forbidden(ask(path, method, params, pieces))
            }
            assert may == set(RANKS[RANKS.index(needed) :]), (method, params)
    # A file of this machine gets in by the word of who has all rights, however slowly it comes,
    # and goes by that of who controls: then nothing holds it any more.
    path = doors[EXEC]
    added = ask(path, "disk.add", {"device": str(disk)}, 1 << 16)
    assert "result" in added, added
    gone = {"id": added["result"]["id"], "force": True, "timeout_ms": 0}
    assert is_forbidden(ask(doors[WATCH], "disk.remove", gone))
    assert "result" in ask(doors[CONTROL], "disk.remove", gone)
    assert wait_until(lambda: "result" in ask(path, "disk.add", {"device": str(disk)}))
    # A connection stays at the door that it came by: eight, and no more, whatever they ask.
    clients: list[Client] = []

    def let_in() -> bool:
        client = Client(path)
        # Answered outside; what comes after it goes inside.
        assert "refused" in client.ask("disk.add", {"device": "/no/such/file"})["error"]["code"]
        if is_busy(client.ask("status", {})):
            client.close()
            return False
        clients.append(client)
        return True

    while len(clients) < MAX_AT_DOOR:
        assert wait_until(let_in)
    assert not let_in()
    assert "name" in vm.status()  # the owner's own door is open
    for client in clients:
        client.close()
    # Those who come in crowds and say nothing keep nobody else out.
    crowd = [Client(doors[WATCH]) for _ in range(64)]
    assert "name" in vm.status() and "result" in ask(path, "status", {})
    for client in crowd:
        client.close()
    assert is_forbidden(ask(doors[WATCH], "quit", {}))
    assert "result" in ask(doors[CONTROL], "quit", {})
    vm.wait(HANG_SECONDS)
