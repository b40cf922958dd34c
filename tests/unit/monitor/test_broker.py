"""A keeper that hears clients before its monitor does, and opens what they name: it does so for
them alone."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hotplug_rig import until

from pyvmm.control.doors import Door
from pyvmm.control.protocol import BUSY, NEEDS_FILES, ControlError, Method, executes, watches
from pyvmm.control.server import ControlServer
from pyvmm.host import unix_sockets
from pyvmm.host.handed import Descriptors
from pyvmm.host.unix_sockets import Socket
from pyvmm.monitor.broker import _MANY, MOST_WAITING, Broker, _answer, _why
from pyvmm.monitor.broker import Door as Heard
from pyvmm.monitor.keeper import Keeper

SAFETY_TIMEOUT = 60
# argv: the socket, and the bytes of each piece; requests come by standard input.
CLIENT = """
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.settimeout(60)
client.connect(sys.argv[1])
answers = client.makefile("rb")
for line in sys.stdin.buffer:
    for at in range(0, len(line), int(sys.argv[2])):
        client.sendall(line[at : at + int(sys.argv[2])])
    sys.stdout.buffer.write(answers.readline())
"""


class Monitor:
    """One that opens nothing by name."""

    def __init__(
        self, folder: Path, closing: Callable[[Callable[[], object]], None], others: str = ""
    ) -> None:
        """With a door for `others` as well, if they have one."""
        self.path = str(folder / "socket")
        self.asked: list[dict[str, Any]] = []
        self.keeper = Keeper(str(folder), "web")
        closing(self._end_keeper)
        self.keeper.announce(self.path, removes=False)
        self.listener: Socket = unix_sockets.listen(self.path)
        closing(self.listener.close)
        passes = self.keeper.listen(self.listener, owner_only=True)
        closing(passes.close)
        doors = []
        if others:
            listener = unix_sockets.listen(others)
            closing(listener.close)
            passes_others = self.keeper.listen(listener, owner_only=False)
            closing(passes_others.close)
            doors.append(Door(listener, owner_only=False, passes=passes_others))
        self.keeper.enter_box()
        self.server = ControlServer(Door(self.listener, passes=passes), self._method, doors)
        self.server.start()
        closing(self.server.close)

    def _end_keeper(self) -> None:
        if self.keeper._socket is None:
            return
        self.keeper._socket.close()
        os.waitpid(self.keeper.pid, 0)

    def _method(self, name: str) -> Method | None:
        takes: dict[str, type] = {"device": str, "table": dict, "files": list}
        return {
            "status": Method(lambda: {"name": "web"}, right=watches),
            "disk.add": Method(self._add, takes=takes, right=executes, takes_descriptors=True),
        }.get(name)

    def _add(self, *, descriptors: Descriptors, **params: Any) -> Any:
        self.asked.append(params)
        if "files" not in params:
            raise ControlError(NEEDS_FILES, "send descriptors")
        return {"has": [os.pread(fd, 7, 0).decode() for fd in descriptors.fds], **params}


@pytest.fixture(params=[5.0, 0.0], ids=["", "asleep"])
def monitor(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Monitor]:
    """Its keeper sleeps whenever it has nothing to do, or never."""
    monkeypatch.setattr("pyvmm.monitor.keeper.AWAKE", request.param)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image").write_bytes(b"content" + bytes(505))
    closing: list[Callable[[], object]] = []
    try:
        yield Monitor(tmp_path, closing.append)
    finally:
        while closing:
            closing.pop()()


def sockets_of(pid: int) -> int:
    """How many it has, which may be about to change."""
    found = 0
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += "socket" in os.readlink(entry.path)
    return found


def request(method: str, **params: Any) -> bytes:
    return json.dumps({"version": 1, "id": 7, "method": method, "params": params}).encode() + b"\n"


def ask(monitor: Monitor, *requests: bytes, piece: int = 1 << 20) -> list[dict[str, Any]]:
    """The answers to another process, which asks one after the other on one connection."""
    command = [sys.executable, "-c", CLIENT, monitor.path, str(piece)]
    done = subprocess.run(
        command, input=b"".join(requests), capture_output=True, timeout=SAFETY_TIMEOUT, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("piece", [1 << 20, 1])
def test_what_a_client_names_is_opened_for_the_monitor(monitor: Monitor, piece: int) -> None:
    asked = request("disk.add", device="image,readonly,id=data")
    added, status = ask(monitor, asked, request("status"), piece=piece)
    path = os.path.abspath("image")
    assert added["id"] == 7 and added["result"]["has"] == ["content"], added
    assert added["result"]["files"] == [path]
    assert added["result"]["table"] == {"path": path, "read_only": True, "id": "data"}
    assert status["result"] == {"name": "web"}
    # By table as well, and again on a connection that has been heard before.
    [added] = ask(monitor, request("disk.add", table={"path": path}))
    assert added["result"]["has"] == ["content"]


@pytest.mark.parametrize("method", [r"disk\u002eadd", r"\u0064isk.add", r"disk.ad\u0064"])
@pytest.mark.parametrize("key", ["method", r"\u006dethod"])
def test_however_a_client_spells_what_it_asks_for(monitor: Monitor, method: str, key: str) -> None:
    asked = f'{{"version": 1, "{key}": "{method}", "params": {{"device": "image"}}}}\n'
    [added] = ask(monitor, asked.encode())
    assert added["result"]["has"] == ["content"], added


def test_nobody_wakes_it_who_asks_for_no_device(monitor: Monitor) -> None:
    program = Path(f"/proc/{monitor.keeper.pid}/exe").readlink()
    assert program.name.startswith("memfd:")
    asked = [request("status", text=text) for text in ("disk.add,x", "ä \\ u0064", ".add\\", "add")]
    # JSON in bytes might be read in other ways, which nobody looks for.
    added = request("disk.add", device="image").decode()
    asked += [added.encode(encoding) for encoding in ("utf-16-be", "utf-32-be")]
    for line in asked:
        os.kill(monitor.keeper.pid, signal.SIGSTOP)  # it waits a moment only until all is said
        with closing(unix_sockets.connect_here(monitor.path)) as client:
            client.setblocking(True)
            client.send(line)
            os.kill(monitor.keeper.pid, signal.SIGCONT)
            assert json.loads(client.recv(1 << 16))["error"]["code"] == "bad_request"
    assert Path(f"/proc/{monitor.keeper.pid}/exe").readlink() == program


def test_what_cannot_be_opened_is_told_to_who_asked(monitor: Monitor) -> None:
    for params, code, told in (
        ({"device": "nothing"}, "refused", "cannot open .*/nothing: No such file"),
        ({"device": "image,no"}, "refused", "unknown disk option 'no'"),
        ({"device": "code.py:Disk"}, "refused", "cannot open code.py|/code.py: No such file"),
        ({"other": 1}, "bad_request", "unknown parameter 'other'"),
        ({"device": "image", "fds": [0, 1]}, "bad_request", "unknown parameter 'fds'"),
        ({"device": "image", "self": 1}, "bad_request", "unknown parameter 'self'"),
        ({"device": "image", "patience": 0}, "bad_request", "unknown parameter 'patience'"),
        ({"device": "image", "files": []}, None, ""),
    ):
        [answer] = ask(monitor, request("disk.add", **params))
        if code is None:
            assert answer["result"]["has"] == []
            continue
        assert answer["error"]["code"] == code, answer
        assert re.search(told, answer["error"]["message"]), answer


def of_the_monitor(monitor: Monitor) -> Socket:
    return unix_sockets.connect_here(monitor.path)


def of_a_guest(monitor: Monitor) -> Socket:
    """By a name that leads there, which is the keeper's to connect to."""
    return monitor.keeper.reach(monitor.path)


@pytest.mark.parametrize("connect", [of_the_monitor, of_a_guest])
def test_it_opens_nothing_for_the_monitor_itself(
    monitor: Monitor, connect: Callable[[Monitor], Socket]
) -> None:
    with closing(connect(monitor)) as client:
        client.setblocking(True)
        client.send(request("disk.add", device="image"))
        answer = json.loads(client.recv(1 << 16))
    assert answer["error"]["code"] == NEEDS_FILES
    assert monitor.asked == [{"device": "image"}]


def test_descriptors_of_a_client_get_to_the_monitor(monitor: Monitor) -> None:
    code = """
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
line = sys.stdin.buffer.readline()
with open("image") as file:
    socket.send_fds(client, [line[:5]], [file.fileno()])
client.sendall(line[5:] + line.replace(b'["image"]', b'[]'))
answers = client.makefile("rb")
for _ in range(2):
    sys.stdout.buffer.write(answers.readline())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, monitor.path],
        input=request("disk.add", device="image", files=["image"]),
        capture_output=True,
        timeout=SAFETY_TIMEOUT,
        check=True,
    )
    answers = [json.loads(line)["result"] for line in done.stdout.splitlines()]
    assert [answer["has"] for answer in answers] == [["content"], []]


def test_it_hears_clients_though_whoever_started_it_ignores_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    closing: list[Callable[[], object]] = []
    ignored = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        monitor = Monitor(tmp_path, closing.append)
        signal.signal(signal.SIGCHLD, ignored)
        for _ in range(2):
            [answer] = ask(monitor, request("disk.add", device="nothing"))
            assert answer["error"]["code"] == "refused"
            until(lambda: sockets_of(monitor.keeper.pid) == 3)  # the first one's process has ended
    finally:
        signal.signal(signal.SIGCHLD, ignored)
        while closing:
            closing.pop()()


def test_it_hears_clients_with_few_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes as many as it may have: those that are on their way anywhere else count for it."""
    monkeypatch.chdir(tmp_path)
    closing: list[Callable[[], object]] = []
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        monitor = Monitor(tmp_path, closing.append)
        most = min(before[1], 64 << 10)
        had = resource.prlimit(monitor.keeper.pid, resource.RLIMIT_NOFILE, (256, 256))
        assert had == (most, before[1])
        [answer] = ask(monitor, request("disk.add", device="nothing"))
        assert answer["error"]["code"] == "refused"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        while closing:
            closing.pop()()


def test_why_the_monitor_cannot_be_given_a_connection() -> None:
    assert _why(BlockingIOError(errno.EAGAIN, "")) == _MANY
    assert "ulimit -Hn" in _why(OSError(errno.ETOOMANYREFS, ""))


def test_who_comes_to_a_monitor_without_room_for_files_is_told(monitor: Monitor) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as client, contextlib.ExitStack() as closing:
        client.settimeout(SAFETY_TIMEOUT)
        free = os.open(os.devnull, os.O_RDONLY)
        os.close(free)
        closing.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
        client.connect(monitor.path)
        told = json.loads(client.recv(1 << 16))["error"]
    assert told["code"] == BUSY and "ulimit -n" in told["message"]


def test_what_it_is_told_late_it_does_not_believe(monitor: Monitor) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        monitor.keeper.listen(monitor.listener, owner_only=False)
    until(lambda: sockets_of(monitor.keeper.pid) == 3)  # none is kept


def test_those_who_say_nothing_are_not_heard_for_ever(monitor: Monitor) -> None:
    code = """
import socket, sys
silent = [socket.socket(socket.AF_UNIX) for _ in range(int(sys.argv[2]))]
for one in silent:
    one.connect(sys.argv[1])
last = socket.socket(socket.AF_UNIX)
last.connect(sys.argv[1])
last.settimeout(60)
sys.stdout.buffer.write(last.makefile("rb").readline())
for one in silent:
    one.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, monitor.path, str(MOST_WAITING)],
        capture_output=True,
        timeout=SAFETY_TIMEOUT,
        check=True,
    )
    assert json.loads(done.stdout)["error"]["code"] == "busy"
    [status] = ask(monitor, request("status"))
    assert status["result"] == {"name": "web"}
    until(lambda: sockets_of(monitor.keeper.pid) == 3)


def test_those_at_doors_of_others_are_not_in_the_owners_way(tmp_path: Path) -> None:
    code = """
import socket, sys
silent = [socket.socket(socket.AF_UNIX) for _ in range(int(sys.argv[2]))]
for one in silent:
    one.connect(sys.argv[1])
last = socket.socket(socket.AF_UNIX)
last.connect(sys.argv[1])
sys.stdout.buffer.write(last.makefile("rb").readline())
sys.stdout.flush()
sys.stdin.read()
"""
    closing: list[Callable[[], object]] = []
    try:
        others = str(tmp_path / "others")
        monitor = Monitor(tmp_path, closing.append, others)
        many = [sys.executable, "-c", code, others, str(MOST_WAITING)]
        with subprocess.Popen(many, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as silent:
            assert silent.stdin is not None and silent.stdout is not None
            assert json.loads(silent.stdout.readline())["error"]["code"] == "busy"
            [status] = ask(monitor, request("status"))
            assert status["result"] == {"name": "web"}
            silent.stdin.close()
    finally:
        while closing:
            closing.pop()()


def test_without_it_the_monitor_hears_clients_itself(monitor: Monitor) -> None:
    [before] = ask(monitor, request("status"))
    os.kill(monitor.keeper.pid, signal.SIGKILL)
    added, status = ask(monitor, request("disk.add", device="image"), request("status"))
    assert added["error"]["code"] == NEEDS_FILES and status == before


@contextmanager
def one_that_asks(path: Path, what: bytes) -> Iterator[subprocess.Popen[bytes]]:
    """A client that has said `what`, and waits for the answer."""
    command = [sys.executable, "-c", CLIENT, str(path), "4096"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as client:
        assert client.stdin is not None
        client.stdin.write(what)
        client.stdin.flush()
        yield client


def test_a_process_that_has_ended_is_forgotten_though_another_knows_it(tmp_path: Path) -> None:
    """Those that begin have copies of all descriptors for a moment."""
    listener = unix_sockets.listen(str(tmp_path / "socket"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with closing(listener), ours, theirs, closing(select.epoll()) as epoll:
        broker = Broker(0, epoll)
        broker.add(Heard(listener, theirs, True))
        broker.begin()
        with one_that_asks(tmp_path / "socket", request("share.add", files=[])) as client:
            while not broker._workers:
                for fd, _ in epoll.poll():
                    broker.serve(fd)
            [process] = broker._workers
            copy = os.dup(process)
            while broker._workers:
                for fd, _ in epoll.poll():
                    broker.serve(fd)
            assert process not in [fd for fd, _ in epoll.poll(0)]
            os.close(copy)
            client.kill()


def test_what_adds_a_device_ends_with_the_keeper(tmp_path: Path) -> None:
    """Nobody answers it, and it would have the monitor's channel until it gives up."""
    keeper = Keeper(str(tmp_path), "web")
    with closing(unix_sockets.listen(str(tmp_path / "socket"))) as listener:
        passes = keeper.listen(listener, owner_only=True)
        keeper.enter_box()
        with one_that_asks(tmp_path / "socket", request("disk.add", device="image")) as asks:
            with closing(passes):
                passes.setblocking(True)
                passes.settimeout(SAFETY_TIMEOUT)
                _, [(_, _, fds)], _, _ = passes.recvmsg(1, socket.CMSG_SPACE(4))
                os.kill(keeper.pid, signal.SIGKILL)
                os.waitpid(keeper.pid, 0)
                assert passes.recv(1) == b""
                os.close(int.from_bytes(fds[:4], sys.byteorder))
            asks.kill()
    keeper._socket.close()


def test_when_the_monitor_takes_no_more_the_client_is_told(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        with contextlib.suppress(BlockingIOError):
            while True:
                theirs.send(bytes(1 << 12), socket.MSG_DONTWAIT)
        mine, its = unix_sockets.pair()
        with closing(mine), closing(its):
            _answer(theirs, its, request("disk.add", device="image"), b"")
            assert json.loads(mine.recv(1 << 16))["error"]["code"] == "busy"
            _answer(theirs, its, request("disk.add", device="image", files=[]), b"")
            assert json.loads(mine.recv(1 << 16))["error"]["code"] == "busy"


def test_another_program_may_read_its_answer_late(monitor: Monitor) -> None:
    """Nothing else waits for it."""
    code = """
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
client.sendall(sys.stdin.buffer.readline())
print("asked", flush=True)
sys.stdin.buffer.readline()
sys.stdout.buffer.write(client.makefile("rb").readline())
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, monitor.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as late:
        assert late.stdin is not None and late.stdout is not None
        late.stdin.write(request("disk.add", device="image"))
        late.stdin.flush()
        assert late.stdout.readline() == b"asked\n"
        [status] = ask(monitor, request("status"))
        assert status["result"] == {"name": "web"}
        late.stdin.write(b"\n")
        late.stdin.flush()
        assert json.loads(late.stdout.read())["result"]["has"] == ["content"]


def test_it_hears_no_other_user(monitor: Monitor) -> None:
    if os.geteuid() or not os.access("/usr/bin/python3", os.X_OK):
        pytest.skip("only root can be somebody else")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        os.rename(monitor.path, path := f"{folder}/socket")
        os.chmod(path, 0o777)
        command = ["setpriv", "--reuid=61001", "--regid=61001", "--clear-groups"]
        done = subprocess.run(
            [*command, "/usr/bin/python3", "-c", CLIENT, path, "4096"],
            input=request("disk.add", device="image"),
            capture_output=True,
            timeout=SAFETY_TIMEOUT,
        )
    assert done.stdout == b"" and monitor.asked == [] and b"Permission" not in done.stderr


def test_a_line_that_is_too_long_is_the_monitors_to_refuse(monitor: Monitor) -> None:
    [answer] = ask(monitor, request("disk.add", device="x" * (1 << 17)))
    assert answer["error"]["code"] == "bad_request"
