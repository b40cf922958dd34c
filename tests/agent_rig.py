"""The guest's agent as a program of this machine, at a Unix socket, and an agent that lies."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pyvmm.agent import Agent
from pyvmm.agent.protocol import HELLO, VERSION, FrameType, frame
from pyvmm.control import registry
from pyvmm.control.protocol import PAUSED, ControlError, Method, Upgrade
from pyvmm.control.server import ControlServer
from pyvmm.errors import HostError
from pyvmm.host import unix_sockets
from pyvmm.images.agent import FLAGS, SOURCES

FOLDER = Path(__file__).resolve().parents[1] / "guest-images/agent"
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# A session's process ends with its one request, and what it holds with it.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:exitcode=99"}
GREETING = frame(FrameType.HELLO, HELLO.pack(VERSION, 0, 10**18, 5 * 10**9))

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler (gcc)")


def compile_agent(folder: Path) -> Path:
    """The agent with the address and undefined-behaviour sanitizers in it."""
    program = folder / "pyvmm-agent"
    sources = [FOLDER / source for source in SOURCES]
    flags = [flag for flag in FLAGS if not flag.startswith(("-O", "-D_FORTIFY"))]
    subprocess.run(["cc", *flags, *SANITIZERS, "-o", program, *sources], check=True)
    return program


@contextmanager
def running(
    program: Path, folder: Path, *, wrapped: Sequence[str] = ()
) -> Iterator[tuple[Agent, Path, Path]]:
    """An agent that runs, the path of its socket, and of what it says on standard error. `wrapped`
    is the command that starts it, if it is not started as it is."""
    path, log = folder / "agent", folder / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*wrapped, program, "--unix", path],
            stderr=stderr,
            env=ENVIRONMENT,
            start_new_session=True,
        )
    try:
        agent = Agent(lambda: _connect(str(path)))
        agent.wait_ready(60)
        yield agent, path, log
        assert process.poll() is None, log.read_text()
    finally:
        # A command has a process group of its own, and one that heeds no signal would stay.
        commands = _descendants(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
        for pid in commands:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):  # it has ended
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _connect(path: str) -> unix_sockets.Socket:
    try:
        return unix_sockets.connect(path)
    except HostError as error:  # it has not made its socket yet
        raise HostError(errno.ECONNREFUSED, error.call) from None


@contextmanager
def liar(act: Callable[[socket.socket], None]) -> Iterator[Agent]:
    """An agent whose every connection is served by `act` on the other end of a socket pair."""
    ends: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def connect() -> unix_sockets.Socket:
        ours, theirs = socket.socketpair()
        ends.append(theirs)

        def serve() -> None:
            with suppress(OSError):  # the client has hung up, as it may
                act(theirs)
            theirs.close()

        threads.append(threading.Thread(target=serve, daemon=True))
        threads[-1].start()
        return unix_sockets.adopt(ours.detach())

    yield Agent(connect)
    for end in ends:
        if end.fileno() >= 0:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def saying(data: bytes, *, stay: bool = False) -> Callable[[socket.socket], None]:
    """An agent that greets and says `data` whatever it is asked; and hangs up, or does not."""

    def act(end: socket.socket) -> None:
        end.sendall(GREETING)
        end.recv(1 << 16)  # some of the request
        end.sendall(data)
        while stay and end.recv(1 << 16):
            pass

    return act


class Guest:
    """A VM's control socket that leads to an agent at a Unix socket or one that lies, in a guest
    that can stand still as one does whose VM is paused or hangs."""

    def __init__(self, serve: Path | Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._goes = threading.Event()
        self._goes.set()
        self.reached = threading.Semaphore(0)  # once for each connection
        self.state = "running"

    def stand_still(self) -> None:
        """Nothing that is said to it is heard any more, and it says nothing."""
        self._goes.clear()

    def methods(self) -> dict[str, Method]:
        """Of a control server."""
        return {
            "status": Method(lambda: {"state": self.state}),
            "vsock.connect": Method(self._connect, needs={"port": int}),
        }

    def _connect(self, port: int) -> Upgrade:
        def hand_over(connection: unix_sockets.Socket, received: bytes) -> None:
            theirs = socket.socket(fileno=connection.detach())
            theirs.setblocking(True)
            self._start(self._answer, theirs)

        if self.state == "paused":
            raise ControlError(PAUSED, "vm is paused")
        return Upgrade({}, hand_over)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        self._goes.wait()
        with suppress(OSError):
            client.sendall(b"OK 7\n")
            self.reached.release()
            if callable(self._serve):
                self._serve(client)
                client.close()
                return
            agent = socket.socket(socket.AF_UNIX)
            agent.connect(str(self._serve))
            self._start(self._copy, agent, client)
            self._copy(client, agent)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._goes.wait()
                target.sendall(data)
        self._goes.wait()
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def vm_of(guest: Guest, name: str = "vm") -> Iterator[Guest]:
    """`guest` behind a control socket, as the VM called `name`."""
    with registry.register(name) as registration:
        assert registration.listener is not None
        server = ControlServer(registration.listener, guest.methods().get)
        server.start()
        try:
            yield guest
        finally:
            server.close()
