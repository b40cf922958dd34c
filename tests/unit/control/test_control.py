"""The control socket: its place, its names, its server against clients that mean well or ill."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm.cli import control as looking
from pyvmm.control import client, registry, server, vm_log
from pyvmm.control.client import Client, NoAnswer
from pyvmm.control.doors import MAX_CLIENTS, Door
from pyvmm.control.protocol import MAX_LINE, ControlError, Later, Method, Upgrade
from pyvmm.control.server import ControlServer
from pyvmm.errors import ConfigError, HostError
from pyvmm.host import handed, unix_sockets
from pyvmm.host.syscalls import EventFd
from pyvmm.monitor.control import MachineControl
from pyvmm.spec.vm import VmSpec

HANG = 60.0  # seconds; no measure of speed


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of the test's own for control sockets."""
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


# ---- where, and which names


@pytest.mark.parametrize("umask", [0, 0o022], ids="umask {:04o}".format)
def test_only_the_owner_has_access(runtime: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with registry.register("a") as registration:
            registration.note(registration.path)  # makes a file that lists what would be left
            assert registration.path == str(runtime / "pyvmm/a.sock")
            assert (runtime / "pyvmm").stat().st_mode & 0o777 == 0o700
            made = list((runtime / "pyvmm").iterdir())
            assert len(made) == 3  # the lock, the socket, the list
            assert {path.stat().st_mode & 0o777 for path in made} == {0o600}
    finally:
        os.umask(before)


def test_the_default_name_gets_a_number() -> None:
    with registry.register() as one, registry.register() as two, registry.register() as three:
        assert [one.name, two.name, three.name] == ["vm", "vm-2", "vm-3"]
        two.close()
        with registry.register() as again:
            assert again.name == "vm-2"


def test_a_name_that_runs_is_an_error_of_one_line() -> None:
    with registry.register("web"):
        with pytest.raises(ConfigError, match="--name: a VM called 'web' is running") as error:
            registry.register("web")
        assert "\n" not in str(error.value)
    registry.register("web").close()


@pytest.mark.parametrize(
    "name", ["a/b", "a:b", ".a", "..", "a\nb", "x" * 65, "\udc80", "a b", " ", "-a"]
)
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(ConfigError):
        registry.register(name)


HOLDER = """
import sys, time
from pyvmm.control import registry
held = registry.register(sys.argv[1])
print(held.name, flush=True)
time.sleep(1000)
"""


def holder(name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == f"{name}\n"
    return process


@pytest.mark.parametrize("who_comes", ["ps", "start"])
def test_what_a_killed_monitor_left_is_removed(runtime: Path, who_comes: str) -> None:
    process = holder("dead")
    assert registry.running() == ["dead"]
    process.kill()
    process.wait()
    process.stdout.close()  # type: ignore[union-attr]
    assert (runtime / "pyvmm/dead.sock").exists()
    if who_comes == "ps":
        assert registry.running() == []
        assert not (runtime / "pyvmm/dead.sock").exists()
    else:
        with registry.register("dead") as registration:
            assert registration.name == "dead"


def test_who_looks_at_vms_that_run_holds_up_none_that_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with registry.register("web"), registry._locked(registry.folder()):
        monkeypatch.setattr(registry, "_LOCK_PATIENCE", 0.0)
        assert registry.running() == ["web"]
        with pytest.raises(ConfigError, match="another pyvmm has held"):
            registry.register("db")


def test_a_vm_that_has_told_how_it_ended_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    """Its monitor still has something to clear away, and answers no more."""

    def hang_up() -> None:
        with registration:
            while not told.is_set():
                with suppress(OSError):
                    os.close(registration.listener._accept()[0])  # type: ignore[union-attr]

    told = threading.Event()
    registration = registry.register("late")
    assert registration.listener is not None
    registration.listener.settimeout(0.05)
    thread = threading.Thread(target=hang_up)
    thread.start()
    try:
        looking.ps.main(["-a", "--json"], standalone_mode=False)
        [row] = json.loads(capsys.readouterr().out)
        assert row["state"] == "ending"  # nothing is told yet
        vm_log.note_end(registry.folder(), "late", 3, message="the guest was reset")
        looking.ps.main(["-a", "--json"], standalone_mode=False)
        [row] = json.loads(capsys.readouterr().out)
    finally:
        told.set()
        thread.join()
    assert (row["name"], row["state"], row["exit_code"]) == ("late", "ended", 3)
    assert row["message"] == "the guest was reset"


def test_many_starts_at_once_get_many_names() -> None:
    names: list[str] = []
    held = []

    def take() -> None:
        registration = registry.register()
        held.append(registration)
        names.append(registration.name)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == sorted(["vm", *(f"vm-{n}" for n in range(2, 9))])
    for registration in held:
        registration.close()


def test_a_place_that_others_can_enter_is_refused(runtime: Path) -> None:
    (runtime / "pyvmm").mkdir(mode=0o755)
    with pytest.raises(registry.NoPlace, match="only you have access"):
        registry.register("a")


def test_a_link_in_its_place_is_refused(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (runtime / "pyvmm").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(registry.NoPlace):
        registry.register("a")


def test_without_a_runtime_directory_there_is_one_below_tmp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(registry, "_is_own_directory", lambda path: False)
    folder = registry.folder()
    assert folder == f"/tmp/pyvmm-{os.geteuid()}"
    assert os.stat(folder).st_mode & 0o777 == 0o700


def test_somebody_elses_runtime_directory_is_not_taken(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sudo, say, which leaves XDG_RUNTIME_DIR as it was."""
    if os.geteuid() != 0:
        pytest.skip("needs root to give a directory away")
    os.chown(runtime, 12345, 12345)
    assert not registry.folder().startswith(str(runtime))


def test_what_a_dead_vm_left_goes_from_that_folder_whatever_its_path_leads_to_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    his, mine = tmp_path / "his", tmp_path / "mine"
    his.mkdir()
    mine.mkdir()
    (mine / "socket").write_text("precious")
    with registry.register("dead") as registration, socket.socket(socket.AF_UNIX) as left:
        left.bind(str(his / "socket"))
        registration.note(str(his / "socket"))

        def swap(path: str) -> bool:
            his.rename(tmp_path / "before")  # as its owner can, at any moment
            his.symlink_to("mine")
            return True

        monkeypatch.setattr(registry, "_is_dead", swap)
        registry._remove_left(registration.path)
    assert (mine / "socket").read_text() == "precious"
    assert not (tmp_path / "before/socket").exists()


# ---- the server


class Served:
    """A server with some methods, and how it is called."""

    def __init__(self) -> None:
        self.registration = registry.register("served")
        self.calls: list[object] = []
        self.release = threading.Event()
        self.upgraded: list[tuple[object, bytes]] = []
        self.kept: list[int] = []
        assert self.registration.listener is not None
        self.server = ControlServer(
            self.registration.listener,
            {
                "echo": Method(lambda **params: params, takes={"text": str, "number": int}),
                "need": Method(self.calls.append, needs={"object": int}),
                "large": Method(lambda: "x" * (8 << 20)),
                "wait": Method(lambda: self.release.wait(HANG)),
                "refuse": Method(self.fail(ConfigError("no", cure="do not"))),
                "host": Method(self.fail(HostError(5, "write"))),
                "defect": Method(self.fail(KeyError("oops"))),
                "upgrade": Method(lambda: Upgrade("go on", self.take)),
                "keep": Method(self.keep, takes_descriptors=True),
                "later": Method(lambda: Later(lambda: self.release.wait(HANG))),
                "cancelled": Method(
                    lambda: Later(lambda: self.release.wait(HANG), cancel=self.release.set)
                ),
                "late defect": Method(lambda: Later(self.fail(KeyError("oops")))),
                "late refusal": Method(lambda: Later(self.fail(ConfigError("no", cure="do not")))),
            }.get,
        )
        self.server.start()

    @staticmethod
    def fail(error: Exception):  # type: ignore[no-untyped-def]
        def raise_it() -> None:
            raise error

        return raise_it

    def take(self, connection: object, rest: bytes) -> None:
        self.upgraded.append((connection, rest))

    def keep(self, descriptors: handed.Descriptors) -> None:
        """Take the first of them."""
        self.kept.append(descriptors.fds.pop(0))

    def dial(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.registration.path)
        connection.settimeout(HANG)
        return connection

    def close(self) -> None:
        self.release.set()
        self.server.close()
        self.registration.close()


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.close()


def test_who_comes_and_goes_all_the_time_leaves_the_processor_to_the_guest(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pace, rounds = 0.05, 8
    monkeypatch.setattr(server, "_PACE", pace)
    path = str(tmp_path / "door")
    with contextlib.closing(unix_sockets.listen(path)) as listener:
        assert served.registration.listener is not None
        door = Door(listener, "watch", owner_only=False, most=0)
        serving = ControlServer(served.registration.listener, lambda name: None, [door])
        serving.start()
        begin = time.monotonic()
        for _ in range(rounds):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(HANG)
                connection.connect(path)
                assert b"busy" in connection.recv(1 << 16)
        assert time.monotonic() - begin >= pace * (rounds - 1)
        serving.close()


@contextlib.contextmanager
def no_more_files(more: int = 0) -> Iterator[None]:
    """This process can open no more files than `more`."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as closing:
        free = [os.open(os.devnull, os.O_RDONLY) for _ in range(more + 1)]
        for fd in free:
            os.close(fd)
        closing.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], before[1]))
        yield


def test_who_finds_no_room_for_files_is_told_which_limit_to_raise(served: Served) -> None:
    with socket.socket(socket.AF_UNIX) as late, socket.socket(socket.AF_UNIX) as more:
        for one in (late, more):
            one.settimeout(HANG)
        with no_more_files():
            late.connect(served.registration.path)
            told = json.loads(late.recv(1 << 16))["error"]
            assert told["code"] == "busy" and told["message"].endswith("higher limit: ulimit -n")
            assert late.recv(1) == b""
            more.connect(served.registration.path)  # the next as well
            assert b"ulimit -n" in more.recv(1 << 16)
    with contextlib.closing(served.dial()) as client:
        assert "result" in ask(client, line(method="echo"))


def test_descriptors_without_room_are_told_by_the_limit_to_raise(served: Served) -> None:
    with contextlib.closing(served.dial()) as client:
        assert "result" in ask(client, line(method="echo"))
        with no_more_files(2):
            socket.send_fds(client, [line(method="keep")], [0] * 5)
            told = json.loads(client.recv(1 << 16))["error"]
            assert told["code"] == "busy" and "ulimit -n" in told["message"]
            assert client.recv(1) == b""
    assert not served.kept


def test_a_request_whose_descriptors_cannot_be_sent_says_why(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where this user's processes have too many on their way."""

    def full(*given: object) -> None:
        raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))

    with Client.connect("served") as asking:
        monkeypatch.setattr(client, "send_all", full)
        with pytest.raises(HostError, match=r"a request to served: .*; raise .* ulimit -Hn: more"):
            asking.call("keep", fds=[0])


def line(**request: object) -> bytes:
    return json.dumps({"version": 1, "id": 1, **request}).encode() + b"\n"


def ask(connection: socket.socket, request: bytes) -> dict[str, object]:
    connection.sendall(request)
    answer: dict[str, object] = json.loads(connection.makefile("rb").readline())
    return answer


def test_a_request_has_an_answer_with_its_id(served: Served) -> None:
    with served.dial() as connection:
        for id in (7, "seven", None):
            answer = ask(connection, line(id=id, method="echo", params={"text": "hé"}))
            assert answer == {"version": 1, "id": id, "result": {"text": "hé"}}


@pytest.mark.parametrize(
    ("request_line", "code"),
    [
        (b"\n", "bad_request"),
        (b"hello\n", "bad_request"),
        (b"\xff\xfe\n", "bad_request"),
        (b"[]\n", "bad_request"),
        (b"[" * 60_000 + b"\n", "bad_request"),
        (b'{"version": ' + b"9" * 60_000 + b"}\n", "bad_request"),
        (b'{"id": 1, "method": "echo"}\n', "unsupported_version"),
        (line(version=2, method="echo"), "unsupported_version"),
        (line(method="nothing"), "unknown_method"),
        (line(method=7), "bad_request"),
        (line(method="echo", params=[]), "bad_request"),
        (line(method="echo", id=[1]), "bad_request"),
        (line(method="echo", params={"color": "red"}), "bad_request"),
        (line(method="echo", params={"number": True}), "bad_request"),
        (line(method="echo", params={"number": 1.5}), "bad_request"),
        (line(method="need"), "bad_request"),
        (line(method="refuse"), "refused"),
        (line(method="host"), "failed"),
        (line(method="defect"), "failed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_s6_what_is_wrong_is_answered_and_the_connection_goes_on(
    served: Served, request_line: bytes, code: str
) -> None:
    with served.dial() as connection:
        answer = ask(connection, request_line)
        assert answer["error"]["code"] == code  # type: ignore[index]
        assert "\n" not in answer["error"]["message"]  # type: ignore[index]
        assert ask(connection, line(method="echo"))["result"] == {}
    assert served.calls == []


def test_s6_a_line_without_end_is_cut_off(served: Served) -> None:
    with served.dial() as connection:
        connection.sendall(b"x" * (MAX_LINE + 1))
        stream = connection.makefile("rb")
        assert json.loads(stream.readline())["error"]["code"] == "bad_request"
        assert stream.read() == b""


def test_requests_sent_at_once_are_answered_in_order(served: Served) -> None:
    with served.dial() as connection:
        connection.sendall(b"".join(line(id=n, method="echo") for n in range(200)))
        connection.shutdown(socket.SHUT_WR)
        answers = [json.loads(answer)["id"] for answer in connection.makefile("rb")]
    assert answers == list(range(200))


def test_a_client_that_takes_no_answers_holds_up_no_other(served: Served) -> None:
    with served.dial() as deaf, served.dial() as other:
        deaf.sendall(line(method="large") * 100)
        assert ask(other, line(method="echo"))["result"] == {}


def test_half_a_request_holds_up_no_other(served: Served) -> None:
    with served.dial() as slow, served.dial() as other:
        slow.sendall(line(method="echo")[:10])
        assert ask(other, line(method="echo"))["result"] == {}
        assert ask(slow, line(method="echo")[10:])["result"] == {}


def test_clients_are_bounded(served: Served) -> None:
    clients = [served.dial() for _ in range(MAX_CLIENTS)]
    for one in clients:
        ask(one, line(method="echo"))
    with served.dial() as late:
        assert json.loads(late.makefile("rb").readline())["error"]["code"] == "busy"
    clients.pop().close()
    deadline = time.monotonic() + HANG
    while True:  # until the server has seen it leave
        with served.dial() as again:
            with suppress(BrokenPipeError):  # it was turned away already
                again.sendall(line(method="echo"))
            answer = json.loads(again.makefile("rb").readline())
        if "result" in answer:
            break
        assert time.monotonic() < deadline
    for one in clients:
        one.close()


def test_clients_that_leave_leave_nothing(served: Served) -> None:
    for _ in range(3 * MAX_CLIENTS):
        # One that comes before the server has noticed that others left is turned away.
        with contextlib.suppress(OSError), served.dial() as connection:
            connection.sendall(line(method="large"))
    assert client.patiently("served", lambda vm: vm.call("echo", patience=HANG), HANG) == {}


def test_a_connection_can_be_handed_over(served: Served) -> None:
    with served.dial() as connection:
        answer = ask(connection, line(method="upgrade") + b"what follows")
        assert answer["result"] == "go on"
        deadline = time.monotonic() + HANG
        while not served.upgraded:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        [(theirs, rest)] = served.upgraded
        theirs.send(b"hello")  # type: ignore[attr-defined]
        assert connection.recv(5) == b"hello"
        assert b"what follows".startswith(rest)
        theirs.close()  # type: ignore[attr-defined]


def test_descriptors_go_to_the_method_that_wants_them_and_others_are_closed(
    served: Served, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")

    def is_open() -> int:
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # another thread has closed it
                found += os.readlink(f"/proc/self/fd/{fd}") == str(file)
        return found

    with open(file) as opened:
        fds = [opened.fileno()] * 3
        for method, kept in (("echo", 0), ("keep", 1), ("refuse", 0), ("no such", 0)):
            with contextlib.suppress(ControlError), Client.connect("served") as asking:
                asking.call(method, patience=HANG, fds=fds)
            assert is_open() == 1 + kept, method  # they are closed before it is answered
            while served.kept:
                os.close(served.kept.pop())
        for count, is_answered in ((handed.MOST, True), (handed.MOST + 1, False)):
            with Client.connect("served") as asking:
                try:
                    assert asking.call("echo", patience=HANG, fds=fds[:1] * count) == {}
                    assert is_answered
                except NoAnswer:
                    assert not is_answered
            deadline = time.monotonic() + HANG
            while is_open() > 1:
                assert time.monotonic() < deadline
                time.sleep(0.001)


def test_descriptors_belong_to_the_line_that_they_come_with(served: Served) -> None:
    keep, echo = line(method="keep"), line(method="echo")
    for before, others in ((b"", 0), (b"no JSON\n", 1), (echo * 2, 2), (keep, 1)):
        with served.dial() as connection, open(os.devnull) as file:
            if before:
                connection.sendall(before)
            socket.send_fds(connection, [keep], [file.fileno()])
            lines = connection.makefile("rb")
            answers = [json.loads(lines.readline()) for _ in range(others + 1)]
        assert "result" in answers[-1], (before, answers)
        os.close(served.kept.pop())
        assert not served.kept
    with served.dial() as connection, open(os.devnull) as file:
        socket.send_fds(connection, [b"no JSON\n"], [file.fileno()])
        lines = connection.makefile("rb")
        lines.readline()
        connection.sendall(keep)
        assert "error" in json.loads(lines.readline())  # nothing is left of what was refused
    assert not served.kept


def test_descriptors_of_half_a_line_stay_apart_from_those_of_the_next(served: Served) -> None:
    keep = line(method="keep")
    with served.dial() as connection, open(os.devnull) as one, open(os.devnull) as other:
        # While it waits, so that the end of the first line is read together with the next.
        connection.sendall(line(method="wait"))
        socket.send_fds(connection, [keep[:9]], [one.fileno()])
        connection.sendall(keep[9:])
        socket.send_fds(connection, [line(method="keep")], [other.fileno()] * handed.MOST)
        served.release.set()
        lines = connection.makefile("rb")
        answers = [json.loads(lines.readline()) for _ in range(3)]
    assert all("result" in answer for answer in answers), answers
    assert len(served.kept) == 2
    while served.kept:
        os.close(served.kept.pop())


@pytest.mark.parametrize("text", [b'"\\ud800"', b'"\xed\xa0\x80"'])
def test_half_a_character_is_a_bad_request(served: Served, text: bytes) -> None:
    with served.dial() as connection:
        asked = b'{"version": 1, "id": 1, "method": "echo", "params": {"text": ' + text + b"}}\n"
        assert "bad_request" in str(ask(connection, asked)["error"])
        asked = asked.replace(b'"text": ' + text, b"")
        assert ask(connection, asked)["result"] == {}


def test_a_door_for_less_than_everything_takes_no_descriptors(
    served: Served, tmp_path: Path
) -> None:
    path = str(tmp_path / "door")
    seen: list[int] = []

    def look(descriptors: handed.Descriptors) -> None:
        seen.append(len(descriptors.fds))

    methods = {"look": Method(look, right=lambda params: "watch", takes_descriptors=True)}
    with contextlib.closing(unix_sockets.listen(path)) as listener:
        assert served.registration.listener is not None
        doors = [Door(listener, "control", owner_only=False)]
        serving = ControlServer(served.registration.listener, methods.get, doors)
        serving.start()
        with Client("door", unix_sockets.connect(path)) as asking:
            asking.call("look", patience=HANG, fds=[0])
        serving.close()
    assert seen == [0]


def test_an_answer_that_takes_its_time_holds_up_no_other(served: Served) -> None:
    with served.dial() as patient, served.dial() as other:
        patient.sendall(line(id=1, method="later") + line(id=2, method="echo"))
        assert ask(other, line(method="echo"))["result"] == {}
        served.release.set()
        lines = patient.makefile("rb")
        answers = [json.loads(lines.readline()) for _ in range(2)]
        assert [answer["id"] for answer in answers] == [1, 2]
        assert answers[0]["result"] is True


def test_late_errors_are_answers_too(served: Served) -> None:
    with served.dial() as connection:
        refused = ask(connection, line(method="late refusal"))
        assert refused["error"] == {"code": "refused", "message": "no; do not"}
        assert "oops" in str(ask(connection, line(method="late defect"))["error"])


def test_late_answers_are_bounded_and_those_who_left_get_none(served: Served) -> None:
    for _ in range(MAX_CLIENTS):
        with served.dial() as leaving:
            leaving.sendall(line(method="later"))
            client.patiently("served", lambda vm: vm.call("echo", patience=HANG), HANG)
    deadline = time.monotonic() + HANG
    while True:  # until the last of them has begun
        with served.dial() as late:
            late.sendall(line(method="later"))
            late.settimeout(0.2)
            with suppress(TimeoutError):
                assert json.loads(late.makefile("rb").readline())["error"]["code"] == "busy"
                break
        assert time.monotonic() < deadline
    served.release.set()
    with served.dial() as again:
        while "error" in ask(again, line(method="later")):
            assert time.monotonic() < deadline


def test_one_who_hangs_up_cancels_what_takes_its_time(served: Served) -> None:
    with served.dial() as connection:
        connection.sendall(line(method="cancelled"))
        client.patiently("served", lambda vm: vm.call("echo", patience=HANG), HANG)
        assert not served.release.is_set()
    assert served.release.wait(HANG)


@pytest.mark.parametrize("number", [1 << 63, -(1 << 63), 10**400])
def test_a_number_without_bounds_is_refused(served: Served, number: int) -> None:
    with served.dial() as connection:
        answer = ask(connection, line(method="need", params={"object": number}))
        assert answer["error"]["code"] == "bad_request"  # type: ignore[index]
        assert "must be within" in str(answer["error"])
    assert served.calls == []


def test_it_ends_while_an_answer_takes_its_time(served: Served) -> None:
    with served.dial() as connection:
        connection.sendall(line(method="later"))
        client.patiently("served", lambda vm: vm.call("echo", patience=HANG), HANG)
        served.server.close()
        assert connection.recv(1) == b""


def test_other_users_are_turned_away(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.unix_sockets, "is_ours", lambda connection: False)
    with served.dial() as connection:
        assert connection.recv(1) == b""


def test_it_ends_while_clients_are_there(served: Served) -> None:
    with served.dial() as connection:
        ask(connection, line(method="echo"))
        served.server.close()
        assert connection.recv(1) == b""


# ---- the client


def test_calls_and_their_errors(served: Served) -> None:
    with Client.connect("served") as vm:
        assert vm.pid == os.getpid()
        assert vm.call("echo", text="a") == {"text": "a"}
        with pytest.raises(ControlError, match="no; do not") as refused:
            vm.call("refuse")
        assert refused.value.code == "refused"
        with pytest.raises(NoAnswer, match="does not answer"):
            vm.call("wait", patience=0.05)
        served.release.set()
        assert vm.call("echo", number=3) == {"number": 3}  # the late answer is not taken for it


def test_an_answer_without_an_end_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor may be somebody else's by now."""
    monkeypatch.setattr("pyvmm.control.client._LONGEST_LINE", 1000)
    ours, theirs = unix_sockets.pair()
    with contextlib.closing(ours), contextlib.closing(theirs):
        theirs.send(bytes(2000))
        with pytest.raises(NoAnswer, match="an answer without an end"):
            client.line_or_end(ours, time.monotonic() + HANG)
        theirs.send(bytes(2000))
        assert list(client.read_events(ours)) == []


@pytest.mark.parametrize(
    "line",
    ["\x00", "[]", "5", "{}", '{"event": 1}', '{"event": "a", "time": "b"}', "[" * 100_000],
    ids=lambda line: line[:10],
)
def test_events_end_at_what_is_none(line: str) -> None:
    event = {"event": "started", "time": 1.5, "number": 1}
    text = f"{json.dumps(event)}\n{line}\n{json.dumps(event)}\n".encode()
    ours, theirs = unix_sockets.pair()
    with contextlib.closing(ours), contextlib.closing(theirs):
        theirs.sendall(text)
        assert list(client.read_events(ours)) == [event]
    ours, theirs = unix_sockets.pair()
    silent = EventFd()
    with contextlib.closing(ours), contextlib.closing(theirs), contextlib.closing(silent):
        theirs.sendall(text)
        assert client._wait_for_end(ours, silent.fd, time.monotonic() + HANG) is None


def test_one_with_many_clients_is_asked_again(served: Served) -> None:
    clients = [served.dial() for _ in range(MAX_CLIENTS)]
    for one in clients:
        ask(one, line(method="echo"))
    answers: list[object] = []

    def ask_patiently() -> None:
        answers.append(client.patiently("served", lambda vm: vm.call("echo"), HANG))

    late = [threading.Thread(target=ask_patiently) for _ in range(5)]
    for thread in late:
        thread.start()
    with pytest.raises(ControlError, match="clients already"):
        client.patiently("served", lambda vm: vm.call("echo"), patience=0.2)
    for one in clients:
        one.close()
    for thread in late:
        thread.join(HANG)
    assert answers == [{}] * 5


ENDING = """
import sys, time, select
from pyvmm.control import registry
from pyvmm.host import unix_sockets
held = registry.register("ends")
print("there", flush=True)
select.select([held.listener], [], [])
asked = unix_sockets.accept(held.listener)
if "linger" in sys.argv:
    asked.close()
    time.sleep(1000)
"""


@pytest.mark.parametrize(("how", "state"), [("linger", "ending"), ("at once", None)])
def test_one_that_ends_is_not_said_to_hang(how: str, state: str | None, monkeypatch) -> None:
    monkeypatch.setattr(looking, "_END_PATIENCE", 0.05 if state else HANG)
    process = subprocess.Popen([sys.executable, "-c", ENDING, how], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"there\n"
        threading.Thread(target=process.wait).start()  # a zombie is one that has ended, too
        row = looking._look("ends")
        assert (row and row["state"]) == state
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_nobody_of_that_name() -> None:
    with pytest.raises(ConfigError, match="no VM called 'nobody' is running; pyvmm ps"):
        Client.connect("nobody")


def test_stopping_one_that_hangs(monkeypatch) -> None:
    """It says so, and --kill ends it."""
    monkeypatch.setattr(client, "CUT_SECONDS", 0.1)
    process = holder("hung")
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(NoAnswer, match=r"still runs after 0\.2 seconds; pyvmm stop --kill hung"):
        client.stop("hung", patience=0.1)
    monkeypatch.setattr(client, "CUT_SECONDS", HANG)
    client.stop("hung", patience=HANG, kill=True)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()  # type: ignore[union-attr]
    assert registry.running() == []


# ---- the documentation


def bare_machine() -> Any:
    prepared = SimpleNamespace(spec=VmSpec("k"), devices=())
    return SimpleNamespace(parts=SimpleNamespace(prepared=prepared))


def test_the_document_lists_the_methods() -> None:
    document = Path(__file__).resolve().parents[3] / "docs/control-socket.md"
    methods, _, _ = document.read_text().partition("An answer that is an error")
    rows = re.findall(r"^\| (`[a-z.]+`(?:, `[a-z.]+`)*) \|", methods, re.MULTILINE)
    listed = [name.strip("`") for row in rows for name in row.split(", ")]
    control = MachineControl(bare_machine(), None, None)  # type: ignore[arg-type]
    assert sorted(listed) == sorted(control.methods())


# ---- what a request makes a monitor load

ASK = """
import sys
from types import SimpleNamespace
from pyvmm.monitor.control import MachineControl
from pyvmm.spec.vm import VmSpec
prepared = SimpleNamespace(spec=VmSpec("k"), devices=())
control = MachineControl(SimpleNamespace(parts=SimpleNamespace(prepared=prepared)), None, None)
assert all(control.method(name) is not None for name in sys.argv[1:])
print(*(name for name in sys.modules if name.startswith("pyvmm.kinds.")))
"""
SHARED = {"pyvmm.kinds.registry", "pyvmm.kinds.interface"}


@pytest.mark.parametrize(
    ("asked", "loaded"), [("status", set()), ("balloon.set", {"pyvmm.kinds.balloon"})]
)
def test_a_request_loads_the_kind_that_it_names_and_no_other(asked: str, loaded: set[str]) -> None:
    """Loading all of them would be in the way of a guest that is just starting."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, asked], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) - SHARED == loaded


def test_methods_are_found_by_their_names() -> None:
    control = MachineControl(bare_machine(), None, None)  # type: ignore[arg-type]
    for name, method in control.methods().items():
        found = control.method(name)
        assert found is not None and found._replace(run=None) == method._replace(run=None)  # type: ignore[arg-type]
    for unknown in ("", "nothing", "disk", "disk.nothing", "nothing.set", "registry.load"):
        assert control.method(unknown) is None
