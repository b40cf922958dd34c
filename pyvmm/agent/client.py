"""The guest's agent, as a program of the host sees it."""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pyvmm.agent.errors import AgentError, AgentGone, CommandTimeout, NoAgent, WrongAgent
from pyvmm.agent.files import Copied, pull, push
from pyvmm.agent.process import STDOUT, Process, run_request
from pyvmm.agent.protocol import TIME, TIMES, FrameType
from pyvmm.agent.session import NO_ANSWER, PATIENCE, Session, check, milliseconds_to
from pyvmm.errors import HostError
from pyvmm.host.unix_sockets import Socket

_GRACE = 10.0  # seconds that the agent has to end a command whose time is over
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.2  # between two looks whether the agent is there
OUTPUT_LIMIT = 256 << 20

NO_AGENT = "no agent answers in the guest"
NO_AGENT_CURE = (
    "pyvmm's own images and initramfs have it; for others see docs/guest-agent.md, and the console "
    "for whether the guest is up"
)


@dataclass(frozen=True)
class Clock:
    """The guest's clock: `time` in seconds since 1970, `offset` in seconds that it is ahead of the
    host's, `uptime` in seconds since the guest's kernel started."""

    time: float
    offset: float
    uptime: float


@dataclass(frozen=True)
class Info:
    """What an agent says of itself: its protocol's version, and its clock."""

    version: int
    clock: Clock


@dataclass(frozen=True)
class Completed:
    """A command that has ended; `returncode` is negative for a signal, as in subprocess."""

    args: Sequence[str]
    returncode: int
    stdout: bytes
    stderr: bytes

    def check(self) -> Completed:
        """Raise AgentError unless it succeeded."""
        if self.returncode:
            from pyvmm.agent.session import printable

            how = f"exited with {self.returncode}"
            if self.returncode < 0:
                how = f"was killed by signal {-self.returncode}"
            lines = self.stderr.strip().splitlines()
            said = f": {printable(lines[-1][:200])}" if lines else ""
            raise AgentError(f"{self.args[0]} {how}{said}")
        return self


class Agent:
    """Runs commands in a guest and copies files. Any number of threads may use it at once: each
    request has a connection of its own."""

    def __init__(self, connect: Callable[[], Socket]) -> None:
        """`connect` makes a stream socket joined to the agent's vsock port (`PORT`). It raises
        HostError with ECONNREFUSED while nobody listens there; what else it raises is passed on."""
        self._connect = connect

    def wait_ready(self, timeout: float | None = None) -> Info:
        """Wait until the agent answers. Raises NoAgent after `timeout` seconds, WrongAgent at once
        for one of another version."""
        start = time.monotonic()
        deadline = None if timeout is None else start + timeout
        while True:
            try:
                return self._info(deadline)
            except WrongAgent:
                raise
            except (HostError, AgentError) as error:
                if isinstance(error, HostError) and error.errno != errno.ECONNREFUSED:
                    raise
                waited = time.monotonic() - start
                if timeout is not None and waited >= timeout:
                    raise NoAgent(f"{NO_AGENT} after {timeout:g} s", cure=NO_AGENT_CURE) from None
            time.sleep(min(max(waited / 10, _FIRST_PAUSE), _LONGEST_PAUSE))

    def _info(self, deadline: float | None) -> Info:
        from pyvmm.agent.protocol import VERSION

        patience = time.monotonic() + PATIENCE
        with Session(self._connect()) as session:
            before = time.time_ns()
            realtime, boottime = session.greet(min(deadline or patience, patience))
            return Info(VERSION, _clock(realtime, boottime, before))

    def _session(self) -> Session:
        try:
            return Session(self._connect())
        except HostError as error:
            if error.errno != errno.ECONNREFUSED:
                raise
            raise NoAgent(NO_AGENT, cure=NO_AGENT_CURE) from None

    def open(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        stdin: bool = False,
        tty: tuple[int, int] | None = None,
        timeout: float | None = None,
    ) -> Process:
        """Start a command and do not wait for it.

        `env` is added to a plain environment (PATH, HOME, USER). `user` is NAME, UID, NAME:GROUP or
        UID:GID; root without. `cwd` is / without. `tty` gives it a terminal of so many rows and
        columns. After `timeout` seconds its process group is killed. Raises NoAgent, ConfigError;
        a command that cannot be started shows when its output is read.
        """
        wanted = run_request(
            argv, env=env, cwd=cwd, user=user, stdin=stdin, tty=tty, timeout=timeout
        )
        session = self._session()
        try:
            session.send(FrameType.RUN, wanted, time.monotonic() + PATIENCE)
        except BaseException:
            session.close()
            raise
        return Process(argv, session, stdin=stdin)

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        input: bytes | None = None,
        timeout: float | None = None,
        check: bool = False,
    ) -> Completed:
        """Run a command to its end. Options as in `open`; with `check`, a code other than 0 raises.

        Raises CommandTimeout after `timeout` seconds, AgentError for a command that is not there or
        that writes more than 256 MiB.
        """
        deadline = None if timeout is None else time.monotonic() + timeout + _GRACE
        output = {STDOUT: bytearray(), STDOUT + 1: bytearray()}
        with self.open(
            argv, env=env, cwd=cwd, user=user, stdin=input is not None, timeout=timeout
        ) as process:
            try:
                _communicate(process, input, output, deadline)
            except CommandTimeout:
                process.timed_out = True
            stdout, stderr = map(bytes, output.values())
            if process.timed_out or process.returncode is None:
                raise CommandTimeout(
                    f"{argv[0]} took longer than {timeout:g} s", stdout=stdout, stderr=stderr
                )
        done = Completed(list(argv), process.returncode, stdout, stderr)
        return done.check() if check else done

    def push(
        self,
        local: str | os.PathLike[str],
        remote: str,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Copied:
        """Copy a file or a tree into the guest: into `remote` if that is a directory, else to that
        name. `progress` hears of the bytes of files sent so far. Raises ConfigError, AgentError."""
        with self._session() as session:
            return push(session, os.fspath(local), remote, progress)

    def pull(
        self,
        remote: str,
        local: str | os.PathLike[str],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Copied:
        """Copy a file or a tree out of the guest: into `local` if that is a directory, else to that
        name. The guest cannot write anywhere else. Raises ConfigError, AgentError."""
        with self._session() as session:
            return pull(session, remote, os.fspath(local), progress)

    def clock(self) -> Clock:
        """The guest's clock. Raises AgentError."""
        return self._ask_clock(b"")

    def set_clock(self) -> Clock:
        """Set the guest's clock to the host's; what it is then. Raises AgentError."""
        return self._ask_clock(None)

    def _ask_clock(self, wanted: bytes | None) -> Clock:
        deadline = time.monotonic() + PATIENCE
        with self._session() as session:
            session.greet(deadline)  # the way is open: what follows takes no more than its time
            before = time.time_ns()
            session.send(FrameType.CLOCK, TIME.pack(before) if wanted is None else wanted, deadline)
            answer = session.answer(FrameType.CLOCK_IS, TIMES.size, deadline)
            realtime, boottime = TIMES.unpack_from(answer)
            return _clock(realtime, boottime, before)

    def power_off(self, *, quick: bool = False, timeout: float = PATIENCE) -> None:
        """Have the guest power off; its file systems are whole afterwards. With `quick` nothing is
        written and nobody asked: for disks that are thrown away. It returns before the guest has
        gone. Raises AgentError, CommandTimeout if the agent does not answer in `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        with self._session() as session:
            session.send(FrameType.POWER_OFF, bytes([quick]), deadline)
            with suppress(AgentGone):  # the guest was quicker than its answer
                session.answer(FrameType.DONE, 0, deadline)


def _clock(realtime: int, boottime: int, before: int) -> Clock:
    # The guest looked at its clock at some moment between our question and now.
    here = (before + time.time_ns()) // 2
    return Clock(realtime / 1e9, (realtime - here) / 1e9, boottime / 1e9)


def _communicate(
    process: Process, input: bytes | None, output: dict[int, bytearray], deadline: float | None
) -> None:
    left = memoryview(input or b"")
    poll = select.poll()
    poll.register(process.fileno(), select.POLLIN)
    while process.returncode is None:
        if input is not None:
            while left and (taken := process.write(bytes(left[: process.room]))):
                left = left[taken:]
            if not left:
                process.close_stdin()
                input = None
        check(deadline)
        if not poll.poll(milliseconds_to(deadline)):
            raise CommandTimeout(NO_ANSWER)
        for stream, data in process.receive():
            output[stream] += data
            if len(output[stream]) > OUTPUT_LIMIT:
                raise AgentError(
                    f"{process.args[0]} writes more than {OUTPUT_LIMIT >> 20} MiB",
                    cure="use open(), or write to a file",
                )
