"""`--control-socket`: what clients may do by their socket, and what is left of one."""

from __future__ import annotations

import grp
import json
import os
import signal
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from echo_guest import echo_kernel
from running import SAFETY_TIMEOUT, Running

from pyvmm.kvm.system import Kvm

EXEC, CONTROL, WATCH = "exec", "control", "watch"
# What each method needs, and parameters that are well formed.
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "status": (WATCH, {}),
    "stats": (WATCH, {}),
    "metrics": (WATCH, {}),
    "balloon.stats": (WATCH, {}),
    "pause": (CONTROL, {}),
    "resume": (CONTROL, {}),
    "disk.resize": (CONTROL, {"disk": "no such disk", "size": 1 << 20}),
    "balloon.set": (CONTROL, {"size": 0}),
    "rng.remove": (CONTROL, {"id": "no such device"}),
    "vsock.connect": (EXEC, {"port": 1}),
    "disk.add": (EXEC, {"device": "/etc/hostname"}),
}
RANKS = (WATCH, CONTROL, EXEC)


def ask(path: Path, method: str, params: dict[str, Any]) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SAFETY_TIMEOUT)
        client.connect(str(path))
        line = {"version": 1, "id": 1, "method": method, "params": params}
        client.sendall(json.dumps(line).encode() + b"\n")
        answer: dict[str, Any] = json.loads(client.makefile("rb").readline())
        return answer


def is_forbidden(answer: dict[str, Any]) -> bool:
    return bool(answer.get("error", {}).get("code") == "forbidden")


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_a_client_may_do_what_its_socket_is_for(kvm: Kvm, tmp_path: Path, mode: str) -> None:
    group = grp.getgrgid(os.getgid()).gr_name
    sockets = {rights: tmp_path / rights for rights in RANKS}
    options = ["--kernel", echo_kernel(tmp_path), "--confine", mode, "--vsock", "--balloon=size=0"]
    for rights, path in sockets.items():
        options += ["--control-socket", f"{path},rights={rights}"]
    options += ["--control-socket", f"{tmp_path}/shared,group={group}"]
    with Running(tmp_path, "vm", b"", *options) as vm:
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in sockets.values()}
        assert modes == dict.fromkeys(RANKS, 0o600)
        shared = tmp_path / "shared"
        assert (stat.S_IMODE(shared.stat().st_mode), shared.stat().st_gid) == (0o660, os.getgid())
        for method, (needed, params) in REQUESTS.items():
            allowed = {
                rights
                for rights, path in sockets.items()
                if not is_forbidden(ask(path, method, params))
            }
            assert allowed == set(RANKS[RANKS.index(needed) :]), method
        assert is_forbidden(ask(shared, "pause", {}))
        # The console may be seen by those who watch, and typed into by those who may run commands.
        for rights, path in sockets.items():
            typing, looking = ask(path, "console", {}), ask(path, "console", {"input": False})
            assert is_forbidden(typing) == (rights != EXEC)
            assert "result" in looking and "result" in ask(path, "events", {})
            assert is_forbidden(ask(path, "snapshot", {})) == (rights != EXEC)
            said = ask(path, "stop", {"timeout_ms": True})["error"]["message"]
            assert "timeout_ms" in said  # what is wrong is told first, and nothing has happened
        # Many who watch keep nobody else out, of the console neither.
        for asked in (None, "events", "console"):
            watching = [socket.socket(socket.AF_UNIX) for _ in range(40)]
            for one in watching:
                one.settimeout(SAFETY_TIMEOUT)
                one.connect(str(sockets[WATCH]))
                if asked is not None:
                    params = {"input": False} if asked == "console" else {}
                    line = json.dumps({"version": 1, "method": asked, "params": params})
                    with suppress(OSError):  # it may be turned away before it has asked
                        one.sendall(line.encode() + b"\n")
                        one.recv(1 << 16)
            assert "result" in ask(sockets[CONTROL], "pause", {}) and vm("ps").returncode == 0
            assert "result" in ask(tmp_path / "runtime/pyvmm/vm.sock", "console", {})
            for one in watching:
                one.close()
        assert is_forbidden(ask(sockets[WATCH], "quit", {}))
        assert "result" in ask(sockets[CONTROL], "quit", {})
        vm.process.wait(SAFETY_TIMEOUT)
        assert not [path for path in (*sockets.values(), shared) if path.exists()]


def test_a_control_socket_of_a_killed_monitor_goes_with_the_next_look(
    kvm: Kvm, tmp_path: Path
) -> None:
    options = ("--kernel", echo_kernel(tmp_path), "--control-socket", f"{tmp_path}/watch")
    with Running(tmp_path, "vm", b"", *options) as vm:
        vm.process.send_signal(signal.SIGKILL)
        vm.process.wait(SAFETY_TIMEOUT)
        assert (tmp_path / "watch").exists()
        assert vm.ps() == []
        assert not (tmp_path / "watch").exists()
