"""The guest's agent, as a program of the host sees it."""

from __future__ import annotations

import errno
import inspect
import os
import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from pyvmm.agent.errors import AgentError, AgentGone, CommandTimeout, NoAgent, TimeLimit, WrongAgent
from pyvmm.agent.files import Copied, pull, push
from pyvmm.agent.process import STDOUT, Process, run_request
from pyvmm.agent.protocol import TIME, TIMES, FrameType
from pyvmm.agent.session import PATIENCE, Session, milliseconds_to
from pyvmm.errors import HostError, PyvmmError
from pyvmm.host.unix_sockets import Socket

Connect = Callable[[], Socket] | Callable[[float], Socket]

_GRACE = 3.0  # seconds that the agent has to tell that a command's time is over
_CONNECT_SECONDS = 60.0  # where nobody has said how long it may take
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
    """An agent's greeting: its protocol's version, and its clock."""

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

    def __init__(self, connect: Connect) -> None:
        """`connect` makes a stream socket joined to the agent's vsock port (`PORT`). It raises
        HostError with ECONNREFUSED while nobody listens there; what else it raises is passed on.

        If it wants an argument, that is how many seconds it may take: without, time limits hold
        only once it has returned."""
        self._connect: Callable[..., Socket] = connect
        self._is_told = _wants_argument(connect)

    def wait_ready(self, timeout: float | None = None) -> Info:
        """Wait until the agent answers. Raises NoAgent after `timeout` seconds, WrongAgent at once
        for one of another version."""
        start = time.monotonic()
        deadline = None if timeout is None else start + timeout
        was_refused = False
        while True:
            try:
                return self._info(deadline)
            except WrongAgent:
                raise
            except PyvmmError as error:
                refused = isinstance(error, AgentError) or (
                    isinstance(error, HostError) and error.errno == errno.ECONNREFUSED
                )
                waited = time.monotonic() - start
                # The last try may have had too little time for any answer.
                if (refused or was_refused) and timeout is not None and waited >= timeout:
                    raise NoAgent(f"{NO_AGENT} after {timeout:g} s", cure=NO_AGENT_CURE) from None
                if not refused:
                    raise
                was_refused = True
            time.sleep(min(max(waited / 10, _FIRST_PAUSE), _LONGEST_PAUSE))

    def _info(self, deadline: float | None) -> Info:
        from pyvmm.agent.protocol import VERSION

        left = _CONNECT_SECONDS if deadline is None else deadline - time.monotonic()
        with Session(self._connection(left)) as session:
            patience = time.monotonic() + PATIENCE
            before = time.time_ns()
            realtime, boottime = session.greet(min(deadline or patience, patience))
            return Info(VERSION, _clock(realtime, boottime, before))

    def _connection(self, seconds: float) -> Socket:
        return self._connect(max(0.0, seconds)) if self._is_told else self._connect()

    def _session(self, deadline: float | None = None) -> Session:
        """Raises CommandTimeout if there is none by then."""
        left = _CONNECT_SECONDS if deadline is None else deadline - time.monotonic()
        try:
            return Session(self._connection(min(left, _CONNECT_SECONDS)))
        except HostError as error:
            if error.errno != errno.ECONNREFUSED:
                raise
            raise NoAgent(NO_AGENT, cure=NO_AGENT_CURE) from None
        except PyvmmError as error:
            if deadline is None or time.monotonic() < deadline:
                raise
            raise CommandTimeout(f"{error}") from error

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
        columns. After `timeout` seconds its process group is killed, and if the guest does not tell
        soon that it was, the command is given up. Raises NoAgent, ConfigError, CommandTimeout if
        the time is over before the guest has heard of it; a command that cannot be started shows
        when its output is read.
        """
        start = time.monotonic()
        wanted = run_request(
            argv, env=env, cwd=cwd, user=user, stdin=stdin, tty=tty, timeout=timeout
        )
        deadline = None if timeout is None else start + timeout
        try:
            session = self._session(deadline)
            try:
                patience = time.monotonic() + PATIENCE
                session.send(FrameType.RUN, wanted, min(deadline or patience, patience))
            except BaseException:
                session.close()
                raise
        except CommandTimeout as error:
            if deadline is None or time.monotonic() < deadline:
                raise
            raise _late(argv, timeout) from error
        given_up_at = None if deadline is None else deadline + _GRACE
        return Process(argv, session, stdin=stdin, deadline=given_up_at, user=user)

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
        most: int | None = None,
    ) -> Completed:
        """Run a command to its end. Options as in `open`; with `check`, a code other than 0 raises.

        Raises CommandTimeout after `timeout` seconds, AgentError for a command that is not there or
        that writes more than `most` bytes, by default 256 MiB, to one of its streams.
        """
        output = {STDOUT: bytearray(), STDOUT + 1: bytearray()}
        with self.open(
            argv, env=env, cwd=cwd, user=user, stdin=input is not None, timeout=timeout
        ) as process:
            _communicate(process, input, output, OUTPUT_LIMIT if most is None else most)
            stdout, stderr = map(bytes, output.values())
            if process.timed_out or process.returncode is None:
                raise _late(argv, timeout, stdout, stderr)
        done = Completed(list(argv), process.returncode, stdout, stderr)
        return done.check() if check else done

    def push(
        self,
        local: str | os.PathLike[str],
        remote: str,
        *,
        progress: Callable[[int], None] | None = None,
        timeout: float | None = None,
    ) -> Copied:
        """Copy a file or a tree into the guest: into `remote` if that is a directory, else to that
        name. `progress` hears of the bytes of files sent so far. Raises ConfigError, AgentError,
        CommandTimeout after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with _copying(timeout, deadline), self._session(deadline) as session:
            return push(session, os.fspath(local), remote, progress, deadline)

    def pull(
        self,
        remote: str,
        local: str | os.PathLike[str],
        *,
        progress: Callable[[int], None] | None = None,
        timeout: float | None = None,
    ) -> Copied:
        """Copy a file or a tree out of the guest: into `local` if that is a directory, under the
        last name of `remote`, else to that name. The guest cannot write anywhere else. Raises
        ConfigError, AgentError, CommandTimeout after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with _copying(timeout, deadline), self._session(deadline) as session:
            return pull(session, remote, os.fspath(local), progress, deadline)

    def clock(self) -> Clock:
        """The guest's clock. Raises AgentError."""
        return self._ask_clock(b"")

    def set_clock(self, *, timeout: float = PATIENCE) -> Clock:
        """Set the guest's clock to the host's; what it is then. Raises AgentError, CommandTimeout
        if the agent does not answer in `timeout` seconds."""
        return self._ask_clock(None, timeout)

    def _ask_clock(self, wanted: bytes | None, timeout: float = PATIENCE) -> Clock:
        deadline = time.monotonic() + timeout
        with self._session(deadline) as session:
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
        with self._session(deadline) as session:
            session.send(FrameType.POWER_OFF, bytes([quick]), deadline)
            with suppress(AgentGone):  # the guest was quicker than its answer
                session.answer(FrameType.DONE, 0, deadline)


def _clock(realtime: int, boottime: int, before: int) -> Clock:
    # The guest looked at its clock at some moment between our question and now.
    here = (before + time.time_ns()) // 2
    return Clock(realtime / 1e9, (realtime - here) / 1e9, boottime / 1e9)


def _wants_argument(connect: Callable[..., object]) -> bool:
    try:
        parameters = inspect.signature(connect).parameters.values()
    except ValueError:
        return False  # a function in C that does not say
    return any(
        one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        for one in parameters
    )


def _late(
    argv: Sequence[str], timeout: float | None, stdout: bytes = b"", stderr: bytes = b""
) -> TimeLimit:
    return TimeLimit(f"{argv[0]} took longer than {timeout:g} s", stdout=stdout, stderr=stderr)


@contextmanager
def _copying(timeout: float | None, deadline: float | None) -> Iterator[None]:
    try:
        yield
    except CommandTimeout as error:
        if deadline is None or time.monotonic() < deadline:
            raise
        raise TimeLimit(f"the copy took longer than {timeout:g} s") from error


def _communicate(
    process: Process, input: bytes | None, output: dict[int, bytearray], most: int
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
        poll.poll(milliseconds_to(process.deadline))
        for stream, data in process.receive():
            output[stream] += data
            if len(output[stream]) > most:
                size = f"{most >> 20} MiB" if most >> 20 else f"{most} bytes"
                raise AgentError(
                    f"{process.args[0]} writes more than {size}",
                    cure="use open(), or write to a file",
                )
