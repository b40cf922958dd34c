"""Requests to a VM's guest, by its agent."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from socket import SHUT_RDWR
from typing import TYPE_CHECKING, Any

from pyvmm.agent import PORT, Agent
from pyvmm.api.cancellation import check as check_cancelled
from pyvmm.api.cancellation import woken_by
from pyvmm.api.signatures import signature_of
from pyvmm.control.client import connect_vsock

if TYPE_CHECKING:
    from pyvmm.agent import Clock, Completed, Copied, Info
    from pyvmm.api.command import Command
    from pyvmm.host.unix_sockets import Socket

Path = str | os.PathLike[str]

READY_SECONDS = 300.0


class InGuest(ABC):
    """The part of `VM` that needs an agent in the guest, which all our images have."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The VM's name."""

    @abstractmethod
    def _explained(self) -> AbstractContextManager[None]:
        """In which errors become a VM's errors."""

    def wait_ready(self, timeout: float | None = READY_SECONDS) -> Info:
        """Wait until the guest's agent answers; what it says of itself. Raises NoAgent after
        `timeout` seconds, WrongAgent at once for one of another version."""
        with self._agent() as agent:
            return agent.wait_ready(timeout)

    @signature_of(Agent.run)
    def run(self, *args: Any, **options: Any) -> Completed:
        """Run a command in the guest to its end: `returncode` (negative for a signal), `stdout` and
        `stderr` (bytes).

        `env` is added to a plain environment, `cwd` is / without, `user` root. Raises
        CommandTimeout after `timeout` seconds, AgentError for a command that is not there and,
        with `check`, for one that fails.
        """
        with self._agent() as agent:
            return agent.run(*args, **options)

    @signature_of(Agent.open)
    def popen(self, *args: Any, **options: Any) -> Command:
        """Start a command in the guest and talk to it while it runs; with `stdin` it gets input,
        with `tty` a terminal of so many rows and columns. The rest is as for `run`."""
        from pyvmm.api.command import Command

        with self._agent() as agent:
            process = agent.open(*args, **options)
        return Command(process, self._explained)

    def push(self, local: Path, remote: str, *, timeout: float | None = None) -> Copied:
        """Copy a file or a folder into the guest: into `remote` if that is a folder, else to that
        name. Raises ConfigError, AgentError, CommandTimeout after `timeout` seconds."""
        with self._agent() as agent:
            return agent.push(local, remote, timeout=timeout)

    def pull(self, remote: str, local: Path, *, timeout: float | None = None) -> Copied:
        """Copy a file or a folder out of the guest: into `local` if that is a folder, under the
        last name of `remote`, else to that name. Raises ConfigError, AgentError, CommandTimeout
        after `timeout` seconds."""
        with self._agent() as agent:
            return agent.pull(remote, local, timeout=timeout)

    def clock(self) -> Clock:
        """The guest's clock."""
        with self._agent() as agent:
            return agent.clock()

    def set_clock(self) -> Clock:
        """Set the guest's clock to this machine's; what it is then."""
        with self._agent() as agent:
            return agent.set_clock()

    @contextmanager
    def _agent(self, patience: float = math.inf) -> Iterator[Agent]:
        """An agent whose connections end when this thread is to give up, and take no longer than
        `patience` seconds to make."""
        connections: list[Socket] = []

        def watch(connection: Socket) -> None:
            connections.append(connection)
            check_cancelled()

        def connect(seconds: float) -> Socket:
            made = connect_vsock(self.name, PORT, patience=min(seconds, patience), watch=watch)
            watch(made)
            return made

        def hang_up() -> None:
            for connection in connections:
                with suppress(OSError):  # closed already
                    connection.shutdown(SHUT_RDWR)

        with self._explained(), woken_by(hang_up):
            yield Agent(connect)
