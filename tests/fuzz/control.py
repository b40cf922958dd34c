"""The control socket under the fuzzer: clients of several doors that say and do anything.

The server is the real one, at real sockets; its turns are taken one by one, and the threads of late
answers run when the case says so. A model written from docs/control-socket.md has the answer to
each line. Most methods are stand-ins that answer in every way there is. In some cases there is a
VM's own description as well, with real devices of real kinds, and its real methods beside them;
only what takes a KVM or another process is left out. A case raises AssertionError, with what was
done, if

- an answer is another one than the model's, comes out of turn, twice, or to somebody else,
- a method is called that the door has no rights for, or with parameters that it does not take,
- one of the VM's own does something else, or refuses something else, than the model's,
- more is kept for a client than a line, or of clients than there may be at a door,
- the server does not come to rest, or sleeps for long,
- a connection, a descriptor or a thread's work is left when it has ended.
"""

from __future__ import annotations

import array
import functools
import json
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fuzz.room import check_closed, open_files, room

from pyvmm.control import server as served
from pyvmm.control.doors import Door
from pyvmm.control.protocol import (
    ControlError,
    Later,
    Method,
    Upgrade,
    controls,
    executes,
    watches,
)
from pyvmm.control.server import ControlServer
from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.host import unix_sockets
from pyvmm.kinds import balloon, registry, vsock
from pyvmm.kinds.interface import Context
from pyvmm.kinds.vm_spec import validate
from pyvmm.monitor.control import MachineControl
from pyvmm.spec.vm import DiskSpec, VmSpec
from pyvmm.testing.mmio_driver import Ring

MOST_LINE = 65536
MOST_DESCRIPTORS = 40
RIGHTS = ("watch", "control", "exec")
_TURNS = 3000  # until nothing happens any more
_FEW = 3  # clients at a door for others
_HANDED = 1


class _Places:
    """The listening sockets, of all cases."""

    def __init__(self) -> None:
        folder = room()
        self.folder = str(folder)
        self.paths = {right: f"{folder}/{right}" for right in RIGHTS}
        self.listeners = {right: unix_sockets.listen(path) for right, path in self.paths.items()}


_places = functools.cache(_Places)


class _Epoll:
    """The server's, which never waits."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def poll(self, timeout: float) -> Any:
        return self._real.poll(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Time:
    """The module for the server: sleep is counted."""

    def __init__(self) -> None:
        self.slept = 0.0

    def sleep(self, seconds: float) -> None:
        assert 0 <= seconds <= 0.2
        self.slept += seconds


class _Thread:
    """A late answer, which is made when the case says so."""

    def __init__(self, waiting: deque[_Thread], rng: Random, target: Any, args: Any) -> None:
        self._waiting, self._rng = waiting, rng
        self._target, self._args = target, args
        self.ident = None

    def start(self) -> None:
        if self._rng.random() < 0.05:
            raise RuntimeError("can't start new thread")
        self._waiting.append(self)

    def run(self) -> None:
        self._target(*self._args)


class _Machine:
    """A VM with two disks, a balloon and sockets, whose guest has no drivers, and what it has to do
    and to say. Its vCPUs and its memory are not there."""

    RIGHTS: Mapping[str, int] = {
        **{"status": 0, "balloon.stats": 0, "pause": 1, "resume": 1},
        **{"disk.resize": 1, "balloon.set": 1, "vsock.connect": 2},
    }
    MEMORY = 64 << 20

    def __init__(self, closing: ExitStack, wrong: list[str]) -> None:
        self._wrong = wrong
        self.sizes = {"disk0": 4096, "disk1": 4096}
        self.target = 0
        folder = _places().folder
        paths = [os.path.join(folder, name) for name in self.sizes]
        for path in paths:
            with open(path, "wb") as file:
                file.truncate(4096)
        disks = DiskSpec(paths[0]), DiskSpec(paths[1], read_only=True)
        described = VmSpec(
            "kernel", memory=self.MEMORY, disks=disks, devices=(balloon.Spec(), vsock.Spec())
        )
        spec = validate(described)
        opened = closing.enter_context(ExitStack())
        context = Context("web", None, opened, alarm=lambda *_: None)  # type: ignore[arg-type]
        devices = tuple(registry.open_device(part, context) for part in spec.parts)
        self.pauser = SimpleNamespace(paused=False, pause=self._pause, resume=self._resume)
        memory = SimpleNamespace(resident=12345)
        prepared = SimpleNamespace(spec=spec, devices=devices, memory=memory)
        machine: Any = SimpleNamespace(
            pauser=self.pauser,
            steady=threading.RLock(),
            boots=1,
            parts=SimpleNamespace(prepared=prepared),
        )
        watch: Any = SimpleNamespace(events=SimpleNamespace(emit=lambda _: None))
        control = MachineControl(machine, watch, None)  # type: ignore[arg-type]
        self.methods: dict[str, Method] = {}
        for name in self.RIGHTS:
            method = control.method(name)
            assert method is not None, name
            run = functools.partial(self._run, name, method.run)
            self.methods[name] = method._replace(run=run)

    def _pause(self) -> None:
        self.pauser.paused = True

    def _resume(self) -> None:
        self.pauser.paused = False

    def _run(self, name: str, run: Callable[..., Any], **params: Any) -> Any:
        """The method, held against the model."""
        wanted = self._wanted(name, **params)
        try:
            result = run(**params)
        except ControlError as error:
            self._hold(wanted == error.code, name, params, error)
            raise
        except PyvmmError as error:
            self._hold(wanted == "refused", name, params, error)
            raise
        except BaseException as error:
            self._hold(False, name, params, error)
            raise
        if isinstance(result, dict) and isinstance(wanted, dict):
            self._hold(wanted.items() <= result.items(), name, params, result)
        else:
            self._hold(False, name, params, result)
        return result

    def _hold(self, is_right: bool, *what: object) -> None:
        if not is_right:
            self._wrong.append(repr(what))

    def _wanted(self, name: str, **params: Any) -> object:
        if name == "disk.resize":
            return self._resized(**params)
        if name == "balloon.set":
            if not 0 <= params["size"] <= self.MEMORY:
                return "refused"
            self.target = params["size"] & -4096
            return {"size": self.target}
        if name == "balloon.stats":
            return {"target": self.target, "actual": 0, "resident": 12345, "memory": {}}
        if name == "vsock.connect":
            if not 0 <= params["port"] <= 0xFFFFFFFF:
                return "refused"
            return "paused" if self.pauser.paused else "not_ready"
        is_paused = name == "pause" or (name == "status" and self.pauser.paused)
        said: dict[str, Any] = {"state": "paused" if is_paused else "running"}
        if name == "status":
            disks = [
                {"id": id, "path": path, "read_only": id == "disk1", "size": self.sizes[id]}
                for id, path in ((id, os.path.join(_places().folder, id)) for id in self.sizes)
            ]
            said |= {"cpus": 1, "memory": self.MEMORY, "restarts": 0, "disks": disks}
            said["devices"] = ["disk0", "disk1", "balloon", "vsock"]
        return said

    def _resized(self, disk: str, size: int | None = None, shrink: bool = False) -> object:
        there = self.sizes.get(disk)
        if there is None:
            return "refused"
        if size is None:
            return {"size": there}
        if not 0 < size < 1 << 63 or size % 512 or disk == "disk1":
            return "refused"
        if size < there and (not shrink or self.pauser.paused):
            return "refused"
        self.sizes[disk] = size
        return {"size": size}


class _Client:
    """A client, and what it has to be told; None is any error."""

    def __init__(self, case: _Case, right: str) -> None:
        self.case, self.right = case, right
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.setblocking(False)
        self.expected: deque[tuple[bytes, Callable[[dict[str, Any]], None]]] = deque()
        self.to_send: deque[tuple[bytes, list[int]]] = deque()
        self.came = b""
        self.ended = self.hung_up = self.shut = self.busy = self.over = self.breaks = self.heard = (
            False
        )
        self.behind = b""  # what it says as a stream, from some line on
        self.upgraded = self.fails = False
        self.socket.connect(_places().paths[right])

    def say(self, data: bytes, descriptors: int = 0) -> None:
        lent = self.case.lent
        self.to_send.append((data, [lent[n % len(lent)] for n in range(descriptors)]))

    def go(self) -> None:
        """Send a piece of what it has to say."""
        if self.hung_up or self.shut or not self.to_send:
            return
        data, descriptors = self.to_send[0]
        try:
            if descriptors:
                rights = array.array("i", descriptors)
                row = (socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)
                done = self.socket.sendmsg([data], [row])
                assert done == len(data)
            else:
                size = len(data) if self.case.rng.random() < 0.7 else self.case.rng.randint(1, 99)
                done = self.socket.send(data[:size])
        except BlockingIOError:
            return
        except OSError:  # it was turned away, as what it hears next says
            self.to_send.clear()
            return
        self.to_send[0] = (data[done:], [])
        if not self.to_send[0][0]:
            self.to_send.popleft()

    def hear(self) -> None:
        """Take the answers that are there."""
        if self.hung_up:
            return
        with suppress(BlockingIOError):
            while not self.ended:
                try:
                    data = self.socket.recv(65536)
                except ConnectionResetError:
                    data = b""
                self.ended = not data
                self.came += data
        while b"\n" in self.came and not (self.upgraded and not self.expected):
            line, _, self.came = self.came.partition(b"\n")
            answer = json.loads(line)
            assert answer["version"] == 1
            is_first, self.heard = not self.heard, True
            if is_first and answer.get("error", {}).get("message", "").endswith("clients already"):
                assert self.right != "exec"
                self.busy = True
                return
            if self.breaks and not self.expected:
                continue
            assert self.expected, f"an answer to nothing: {answer}"
            said, check = self.expected.popleft()
            try:
                check(answer)
            except AssertionError as error:
                error.add_note(f"{said[:300]!r} by {self.right}: {answer}")
                raise

    def close(self) -> None:
        self.hung_up = True
        self.socket.close()


class _Case:
    def __init__(self, rng: Random, closing: ExitStack) -> None:
        self.rng = rng
        self.steps: list[str] = []
        self.clients: list[_Client] = []
        self.waiting: deque[_Thread] = deque()
        self.defects: list[str] = []
        self.handed: list[tuple[Any, bytearray]] = []
        self.cancelled = 0
        self.wrong: list[str] = []
        self.time = _Time()
        self.lent = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)]
        closing.callback(os.close, self.lent[0])
        closing.enter_context(mock.patch.object(served, "time", self.time))
        closing.enter_context(mock.patch.object(served, "MAX_HANDED", _HANDED))
        closing.enter_context(mock.patch.object(served.log, "to_stderr", self.defects.append))

        def thread(target: Any, args: Any = (), **_: Any) -> _Thread:
            return _Thread(self.waiting, rng, target, args)

        closing.enter_context(mock.patch.object(served, "Thread", thread))
        exec_, *others = (
            Door(_places().listeners[right], right, right == "exec", most)
            for right, most in (("exec", 32), ("control", _FEW), ("watch", _FEW))
        )
        self.methods = self._methods()
        self.machine = None
        if rng.random() < 0.1:
            self.machine = _Machine(closing, self.wrong)
            self.methods |= self.machine.methods
        self.server = ControlServer(exec_, self.methods.get, others)
        self.server._epoll = _Epoll(self.server._epoll)  # type: ignore[assignment]
        closing.callback(self._end)

    def _end(self) -> None:
        self.server._stopping = True
        self.server._run()
        self.server.close()
        for one in self.clients:
            one.close()
        for one, _ in self.handed:
            one.close()
        for listener in _places().listeners.values():
            while (left := unix_sockets.accept(listener)) is not None:
                left.close()

    # --- methods ----------------------------------------------------------------------------------

    def _methods(self) -> dict[str, Method]:
        def echo(**params: Any) -> dict[str, Any]:
            return dict(params)

        def count(descriptors: Any, number: int = 0) -> dict[str, int]:
            for fd in descriptors.fds:
                os.fstat(fd)
            if number % 2 and descriptors.fds:
                os.close(descriptors.fds.pop())
                return {"count": len(descriptors.fds) + 1}
            return {"count": len(descriptors.fds)}

        def refuse() -> None:
            raise ConfigError("no", cure="do not")

        def fail() -> None:
            raise HostError(28, "writing")

        def defect() -> None:
            raise KeyError("lost")

        def later(text: str, descriptors: Any, fails: bool = False) -> Later:
            count = len(descriptors.fds)

            def run() -> dict[str, str]:
                if len(descriptors.fds) != count:
                    self.wrong.append("its descriptors are closed too early")
                if fails:
                    raise ConfigError(f"no {text}")
                return {"text": text}

            return Later(run, self._cancel)

        def upgrade(fails: bool = False) -> Upgrade:
            def hand_over(connection: Any, rest: bytes) -> None:
                if fails:
                    raise OSError("nobody takes it")
                self.handed.append((connection, bytearray(rest)))
                others = [
                    one
                    for one, _ in self.handed
                    if one.fileno() >= 0 and not one.getsockname().endswith("/exec")
                ]
                if len(others) > _HANDED:
                    self.wrong.append("too many are handed over")

            return Upgrade({"now": "a stream"}, hand_over)

        def some(params: Mapping[str, Any]) -> str:
            return executes(params) if params.get("flag", True) else watches(params)

        kinds: dict[str, type] = {"text": str, "number": int, "flag": bool, "table": dict}
        return {
            "tell": Method(echo, takes=kinds, right=watches),
            "change": Method(echo, needs={"number": int}, takes={"text": str}, right=controls),
            "some": Method(echo, takes={"flag": bool}, right=some),
            "count": Method(count, takes={"number": int}, right=executes, takes_descriptors=True),
            "refuse": Method(refuse, right=watches),
            "fail": Method(fail, right=watches),
            "defect": Method(defect, right=watches),
            "later": Method(
                later,
                needs={"text": str},
                takes={"fails": bool},
                right=watches,
                takes_descriptors=True,
            ),
            "upgrade": Method(upgrade, takes={"fails": bool}, right=watches),
        }

    def _cancel(self) -> None:
        self.cancelled += 1

    # --- what is said -----------------------------------------------------------------------------

    def request(self) -> tuple[bytes, int]:
        """A line without its end, and how many descriptors come along."""
        rng = self.rng
        name = rng.choice((*self.methods, "nothing", "tell", "upgrade"))
        value = rng.choice(
            ("text", "ü", 7, -1, True, False, None, 1 << 63, -(1 << 70), {}, [], 1.5)
        )
        good: dict[str, dict[str, Any]] = {
            "change": {"number": rng.randrange(99)},
            "later": {"text": "soon", "fails": rng.random() < 0.3},
            "upgrade": rng.choice(({}, {}, {"fails": True})),
            "some": rng.choice(({}, {"flag": False})),
            "count": rng.choice(({}, {"number": rng.randrange(4)})),
        }
        if self.machine is not None and rng.random() < 0.85:
            name = rng.choice(list(_Machine.RIGHTS))
            good |= self._of_machine()
        params = dict(good.get(name, {}))
        if rng.random() < 0.4:
            params[rng.choice(("text", "number", "flag", "table", "other", "descriptors", ""))] = (
                value
            )
        if rng.random() < 0.1:
            params.pop(rng.choice(list(params) or [""]), None)
        said: dict[str, Any] = {
            "version": 1,
            "id": rng.choice((1, "a", None, 1 << 80)),
            "method": name,
        }
        if params or rng.random() < 0.5:
            said["params"] = params
        if rng.random() < 0.2:
            said[rng.choice(("version", "id", "method", "params", "more"))] = value
        if rng.random() < 0.1:
            said.pop(rng.choice(list(said)))
        data = json.dumps(said, ensure_ascii=rng.random() < 0.5).encode()
        if rng.random() < 0.1:
            data = self._broken(data)
        if rng.random() < 0.03:
            size = rng.choice((MOST_LINE - 1, MOST_LINE, MOST_LINE + 1, MOST_LINE + 500))
            data = data.ljust(size, b" ")
        count = rng.choice((1, 1, 2, MOST_DESCRIPTORS)) if rng.random() < 0.25 else 0
        return data.replace(b"\n", b" "), count

    def _of_machine(self) -> dict[str, dict[str, Any]]:
        rng = self.rng
        sizes = (0, -512, 511, 512, 513, 4096, 4608, 65536, 1 << 63, (1 << 63) - 512, -(1 << 63))
        resize: dict[str, Any] = {"disk": rng.choice(("disk0", "disk0", "disk0", "disk1", "disk2"))}
        if rng.random() < 0.9:
            resize["size"] = rng.choice(sizes[: rng.choice((8, 8, 11))])
        if rng.random() < 0.5:
            resize["shrink"] = rng.random() < 0.7
        if resize.get("size") == (1 << 63) - 512:
            resize["size"] = -1
        most = _Machine.MEMORY
        balloons = (0, 1, 4095, 4096, -1, most - 1, most, most + 1, 1 << 62)
        ports = (0, 1, 1023, -1, 0xFFFFFFFF, 1 << 32, 1 << 62)
        return {
            "disk.resize": resize,
            "balloon.set": {"size": rng.choice(balloons)},
            "vsock.connect": {"port": rng.choice(ports)},
        }

    def _broken(self, data: bytes) -> bytes:
        rng = self.rng
        at = rng.randint(0, len(data))
        return rng.choice(
            (
                *(b"", b"null", b"[]", b"[" * 3000, b'{"a":' * 2000, b"1" * 5000, b"NaN", b"\xff"),
                *(data[:at], data[:at] + rng.randbytes(3) + data[at:], data + data, data[at:]),
                *(data.replace(b'"text"', b'"\\ud800"'), data.replace(b"1", b"1e999")),
            )
        )

    def expect(
        self, client: _Client, line: bytes, descriptors: int
    ) -> Callable[[dict[str, Any]], None]:
        """The check of the answer to a line, after docs/control-socket.md."""

        def error(id: Any, *codes: str) -> Callable[[dict[str, Any]], None]:
            def check(answer: dict[str, Any]) -> None:
                assert answer["id"] == id and answer["error"]["code"] in codes, codes
                assert "\n" not in answer["error"]["message"]

            return check

        if len(line) > MOST_LINE:
            client.over = True
            return error(None, "bad_request")
        try:
            said = json.loads(line)
            json.dumps(said, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            return error(None, "bad_request")
        if not isinstance(said, dict):
            return error(None, "bad_request")
        if said.get("version") != 1:
            return error(None, "unsupported_version")
        id, name, params = said.get("id"), said.get("method"), said.get("params", {})
        wrong_id = isinstance(id, bool) or not isinstance(id, int | str | None)
        if wrong_id or not isinstance(name, str) or not isinstance(params, dict):
            return error(None, "bad_request")
        method = self.methods.get(name)
        if method is None:
            return error(id, "unknown_method")
        known = {**method.needs, **method.takes}
        for key, value in params.items():
            is_large = type(value) is int and abs(value) >= 1 << 63
            if key not in known or type(value) is not known[key] or is_large:
                return error(id, "bad_request")
        if not method.needs.keys() <= params.keys():
            return error(id, "bad_request")
        rights = {"change": 1, "count": 2, "some": 2 if params.get("flag", True) else 0}
        needed = rights.get(name, _Machine.RIGHTS.get(name, 0))
        if RIGHTS.index(client.right) < needed:
            return error(id, "forbidden")
        if name == "refuse" or (name == "later" and params.get("fails")):
            if name == "later":
                return error(id, "refused", "failed", "busy")
            return error(id, "refused")
        if name in ("fail", "defect"):
            return error(id, "failed")
        if name in _Machine.RIGHTS:  # what it says is held against the model when it says it

            def of_machine(answer: dict[str, Any]) -> None:
                codes = ("refused", "not_ready", "paused")
                assert answer["id"] == id and ("error" not in answer) != (
                    answer.get("error", {}).get("code") in codes
                )

            return of_machine
        result: dict[str, Any] = dict(params)
        if name == "count":
            result = {"count": descriptors}
        elif name == "later":
            result = {"text": params["text"]}
        elif name == "upgrade":
            result = {"now": "a stream"}

        def check(answer: dict[str, Any]) -> None:
            if name == "later" and "error" in answer:
                assert answer["error"]["code"] in ("failed", "busy")  # no thread to be had
                return
            if name == "upgrade" and "error" in answer:
                assert answer["error"]["code"] == "busy" and client.right != "exec"
                client.breaks = True  # what it says next is no stream, and makes no sense
                return
            assert answer["id"] == id and answer.get("result") == result, result
            if name == "upgrade":
                client.upgraded = True

        if name == "upgrade":
            client.fails = params.get("fails", False)
            # All that follows is no request.
            client.behind = b"stream %d\n" % len(self.steps) * self.rng.randint(1, 30)
        return check

    # --- steps ------------------------------------------------------------------------------------

    def connect(self) -> None:
        if len(self.clients) < 12:
            right = self.rng.choice(RIGHTS)
            self.clients.append(_Client(self, right))

    def speak(self) -> None:
        client = self._some()
        if client is None or client.shut or client.over or client.behind:
            return
        for _ in range(self.rng.choice((1, 1, 2, 5)) if self.machine is None else 8):
            line, count = self.request()
            many = self.rng.random() < 0.02
            if many:
                count = MOST_DESCRIPTORS + 2
            self.steps.append(
                f"{self.clients.index(client)} ({client.right}): {line[:200]!r}, {count}"
            )
            if many and client.right == "exec":
                client.over = client.breaks = True  # and what came before it may be lost
                client.say(line + b"\n", count)
                return
            came = count if client.right == "exec" else 0
            client.expected.append((line, self.expect(client, line, came)))
            client.say(line + b"\n", count)
            if client.behind:
                client.say(client.behind)
            if client.over or client.behind:
                return

    def half(self) -> None:
        """Half a line, and the end."""
        client = self._some()
        if client is not None and not (client.shut or client.over or client.behind):
            line, _ = self.request()
            client.say(line[: len(line) // 2])
            client.over = True
            self.steps.append(f"{self.clients.index(client)}: half of {line[:100]!r}")

    def send(self) -> None:
        for client in self.clients:
            client.go()

    def turn(self) -> None:
        at_work = [one for one in self.server._clients.values() if one.waits is not None]
        before = self.cancelled
        self.server._step()
        there = [id(one) for one in self.server._clients.values()]
        gone = [one for one in at_work if id(one) not in there and one.waits is not None]
        assert self.cancelled - before == len(gone), "nobody tells it that its client has gone"
        for one in self.server._clients.values():
            assert len(one.received) <= MOST_LINE + 1, len(one.received)
            assert len(one.descriptors) <= 2
            for some in one.descriptors.values():
                assert len(some.fds) <= MOST_DESCRIPTORS
        for door in self.server._doors.values():
            there = sum(one.door is door for one in self.server._clients.values())
            assert there <= door.most

    def work(self) -> None:
        """A late answer is made, not always the first."""
        if self.waiting:
            self.waiting.rotate(-self.rng.randrange(3))
            self.waiting.popleft().run()

    def hear(self) -> None:
        for client in self.clients:
            client.hear()

    def hang_up(self) -> None:
        client = self._some()
        if client is not None:
            self.steps.append(f"{self.clients.index(client)} hangs up")
            client.close()

    def leave(self) -> None:
        """One who asks for what takes its time goes before it is there."""
        client = self._some()
        if client is None or client.to_send or client.shut or client.over or client.behind:
            return
        self.steps.append(f"{self.clients.index(client)} asks, and goes")
        client.say(b'{"version": 1, "id": 1, "method": "later", "params": {"text": ""}}\n')
        client.go()
        for _ in range(3):
            self.turn()
        client.close()
        self.turn()
        self.work()
        self.turn()

    def shut(self) -> None:
        client = self._some()
        if client is not None and not client.to_send and not client.shut:
            client.shut = True
            with suppress(OSError):
                client.socket.shutdown(socket.SHUT_WR)

    def _some(self) -> _Client | None:
        there = [one for one in self.clients if not (one.hung_up or one.ended or one.busy)]
        return self.rng.choice(there) if there else None

    def rest(self) -> None:
        """Until nothing moves any more: then all answers must have come."""
        for _ in range(_TURNS):
            self.send()
            self.turn()
            self.work()
            self.hear()
            moves = self.waiting or self.server._late
            moves = moves or any(one.to_send and not one.hung_up for one in self.clients)
            moves = moves or any(
                one.has_line or one.to_send for one in self.server._clients.values()
            )
            if not moves and not self.server._epoll.poll(0):
                break
        else:
            raise AssertionError("it does not come to rest")
        assert self.server._at_work == 0 and not self.wrong, self.wrong
        for connection, said in self.handed:
            with suppress(OSError):
                while more := connection.recv(65536):
                    said += more
        streams = [bytes(said) for _, said in self.handed]
        for number, client in enumerate(self.clients):
            if client.upgraded and not client.fails and not client.hung_up:
                assert client.behind in streams, f"{number}: {client.behind!r}, not {streams}"
            if client.hung_up or client.busy or client.breaks:
                continue
            assert not client.expected, f"{number} has no answer to {client.expected[0][0][:200]!r}"

    def run(self) -> None:
        ways = (
            *(self.connect, self.connect, self.speak, self.speak, self.speak, self.send, self.send),
            *(self.turn, self.turn, self.turn, self.work, self.hear, self.half, self.hang_up),
            *(self.shut, self.rest, self.leave),
        )
        for _ in range(self.rng.randint(4, 40) if self.machine is None else 60):
            self.rng.choice(ways)()
        self.rest()


def control_case(rng: Random, ring: Ring) -> int:
    """One server and its clients; how many steps they took."""
    places = _places()
    assert places is not None
    descriptors = open_files()
    steps: list[str] = []
    try:
        with ExitStack() as closing:
            case = _Case(rng, closing)
            steps = case.steps
            case.run()
        assert not case.server._clients
        check_closed(descriptors)
    except BaseException as error:
        error.add_note("\n".join(f"  {n}. {one}" for n, one in enumerate(steps, 1)))
        raise
    return len(steps)
