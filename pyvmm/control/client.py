"""The other end of a control socket: asks a running VM, and sees it end."""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from typing import Any, Self

from pyvmm.control import protocol, registry
from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.host import unix_sockets
from pyvmm.host.syscalls import Closable
from pyvmm.host.unix_sockets import Socket

PATIENCE = 10.0  # seconds for an answer


class NoAnswer(PyvmmError):
    """The VM's monitor did not answer in time, or ended instead."""


class Client(Closable):
    """A connection to the VM called `name`. `pid` is its monitor's process."""

    def __init__(self, name: str, connection: Socket) -> None:
        """`connect` is how to get one."""
        self.name = name
        self.connection = connection
        self.received = b""  # what came behind the last answer
        self.pid = unix_sockets.peer(connection).pid
        self._next_id = 1

    @classmethod
    def connect(cls, name: str) -> Self:
        """Raises ConfigError if no VM of that name runs."""
        path = registry.socket_path(name)
        try:
            connection = unix_sockets.connect(path)
        except HostError as error:
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                raise
            raise ConfigError(
                f"no VM called {name!r} is running", cure="pyvmm ps lists those that are"
            ) from None
        return cls(name, connection)

    def close(self) -> None:
        self.connection.close()

    def call(self, method: str, *, patience: float = PATIENCE, **params: Any) -> Any:
        """Ask for `method`; its result. Raises ControlError for an answer that is an error,
        NoAnswer after `patience` seconds or if the monitor ends meanwhile."""
        import json

        id, self._next_id = self._next_id, self._next_id + 1
        deadline = time.monotonic() + patience
        self._send(protocol.request_line(id, method, params), deadline)
        while True:
            answer = json.loads(self._read_line(deadline))
            if answer.get("id") in (id, None):
                break
        if "error" in answer:
            error = answer["error"]
            raise protocol.ControlError(str(error.get("code")), f"{error.get('message')}")
        return answer["result"]

    def _send(self, data: bytes, deadline: float) -> None:
        while data:
            self._wait(select.POLLOUT, deadline)
            try:
                data = data[self.connection.send(data) :]
            except BlockingIOError:
                continue
            except OSError:
                raise NoAnswer(f"{self.name} has ended") from None

    def _read_line(self, deadline: float) -> bytes:
        while b"\n" not in self.received:
            self._wait(select.POLLIN, deadline)
            try:
                data = self.connection.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                raise NoAnswer(f"{self.name} has ended")
            self.received += data
        line, _, self.received = self.received.partition(b"\n")
        return line

    def _wait(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self.connection.fileno(), event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise NoAnswer(f"{self.name} (PID {self.pid}) does not answer")

    def watch_process(self) -> int:
        """A pidfd of the monitor's process, which is readable once that has ended; -1 if it has
        ended already."""
        try:
            return os.pidfd_open(self.pid)
        except ProcessLookupError:
            return -1


def stop(name: str, *, patience: float, kill: bool = False) -> None:
    """End the VM called `name` as SIGTERM would, and wait until its process has ended.

    With `kill`, its process is killed at once instead. Raises ConfigError if there is none, and
    NoAnswer if it still runs after `patience` seconds.
    """
    with Client.connect(name) as client:
        process = client.watch_process()
        if process < 0:
            return
        try:
            _ask_to_stop(client, process, patience, kill)
            if not _ended(process, patience):
                raise NoAnswer(
                    f"{name} (PID {client.pid}) still runs after {patience:g} seconds; "
                    f"pyvmm stop --kill {name} ends it on the spot"
                )
        finally:
            os.close(process)


def _ask_to_stop(client: Client, process: int, patience: float, kill: bool) -> None:
    try:
        if kill:
            signal.pidfd_send_signal(process, signal.SIGKILL)
        else:
            client.call("stop", patience=patience)
    except (NoAnswer, ProcessLookupError):
        pass  # it ended before it could answer, or hangs: seen next


def _ended(process: int, patience: float) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(patience * 1000))
