"""A command that runs in the guest."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import NamedTuple

from pyvmm.agent.errors import AgentError, AgentGone, CommandTimeout, WrongUser
from pyvmm.agent.protocol import (
    EXIT,
    EXITED,
    MAX_DATA,
    MAX_REQUEST,
    NUMBER,
    RUN,
    TIMED_OUT,
    WANTS_STDIN,
    WANTS_TTY,
    WINDOW,
    WINDOW_SIZE,
    Frame,
    FrameType,
)
from pyvmm.agent.session import NOT_THE_AGENT, PATIENCE, Session, check, failure, printable
from pyvmm.errors import ConfigError
from pyvmm.host.syscalls import Closable

STDOUT, STDERR = 1, 2
_MOST_STRINGS = (1 << 16) - 1
_NO_ACCOUNT = ("no such user", "no such group", "too many groups")  # the agent's launch.c
_LONGEST_TIMEOUT = (1 << 31) - 1  # milliseconds


class Output(NamedTuple):
    """A piece of what the command wrote, to `stream` 1 (standard output, a terminal) or 2."""

    stream: int
    data: bytes


class Process(Closable):
    """A command in the guest; closing it ends the command, if it still runs, and its group.

    `returncode` is None as long as it runs, then as in subprocess: negative for a signal.
    `timed_out` says whether it was ended, or given up, because of its timeout.

    The agent ends a command in time. One that does not tell of it, as its guest is paused or hangs,
    is given up at `deadline`, a time of time.monotonic() or None: whoever waits on `fileno` then
    calls `receive`.
    """

    def __init__(
        self,
        args: Sequence[str],
        session: Session,
        *,
        stdin: bool,
        deadline: float | None = None,
        user: str | None = None,
    ) -> None:
        """`Agent.open` is how to get one."""
        self.args = list(args)
        self._user = user
        self.deadline = deadline
        self.returncode: int | None = None
        self.timed_out = False
        self.pid: int | None = None  # in the guest
        self._session = session
        self._room = WINDOW if stdin else 0
        self._stdin_open = stdin
        self._pending: list[Output] = []  # has come, and `read` has not returned it yet

    def fileno(self) -> int:
        """For select and event loops: readable when `receive` has something."""
        return self._session.fileno()

    def close(self) -> None:
        self._session.close()

    # --- what it writes --------------------------------------------------------------------------

    def receive(self) -> list[Output]:
        """The output that has come, without waiting; look at `returncode` afterwards.

        Raises AgentError, with `errno`, if the command could not be started or the agent is gone.
        """
        found, self._pending = self._pending, []
        if self.returncode is None:
            found += self._take(self._session.receive())
        self.give_up_if_late()
        return found

    def give_up_if_late(self) -> bool:
        """End the session if `deadline` has passed; whether it has now ended for that."""
        if self.returncode is None and self.deadline is not None:
            if time.monotonic() < self.deadline:
                return False
            self.timed_out, self.returncode = True, -signal.SIGKILL
            self._session.close()
        return self.timed_out

    def _until(self, deadline: float | None) -> float | None:
        """The earlier of `deadline` and the command's own."""
        given = [one for one in (deadline, self.deadline) if one is not None]
        return min(given, default=None)

    def read(self, timeout: float | None = None) -> Output | None:
        """The next piece of output, None when the command has ended. Raises AgentError, and
        CommandTimeout after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._pending:
            self._pending = self._wait(deadline)
        return self._pending.pop(0) if self._pending else None

    def _wait(self, deadline: float | None) -> list[Output]:
        while self.returncode is None:
            try:
                if found := self._take(self._session.wait_for_frames(self._until(deadline))):
                    return found
            except CommandTimeout:
                if not self.give_up_if_late():
                    raise
            if not self.give_up_if_late():
                check(deadline)
        return []

    def events(self) -> Iterator[Output]:
        """All output, piece by piece, to the command's end."""
        while (piece := self.read()) is not None:
            yield piece

    def wait(self, timeout: float | None = None) -> int:
        """Throw away what is still written; the return code. Raises as `read` does."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._pending = []
        while self.returncode is None:
            self._wait(deadline)
            if not self.give_up_if_late() and self.returncode is None:
                check(deadline)
        return self.returncode

    def _take(self, frames: list[Frame]) -> list[Output]:
        found = []
        for type, payload in frames:
            if type == FrameType.STDOUT:
                found.append(Output(STDOUT, payload))
            elif type == FrameType.STDERR:
                found.append(Output(STDERR, payload))
            elif type == FrameType.MORE_STDIN:
                # A grant of more than the guest has taken would only cost its own memory.
                self._room = min(WINDOW, self._room + _number(payload))
            elif type == FrameType.STARTED:
                self.pid = _number(payload)
            elif type == FrameType.EXIT:
                self._take_exit(payload)
                break
            elif type == FrameType.FAILED:
                raise self._refused(payload)
            else:
                raise AgentError(NOT_THE_AGENT)
        return found

    def _refused(self, payload: bytes) -> AgentError:
        """The error for a FAILED frame."""
        error = failure(Frame(FrameType.FAILED, payload))
        what = printable(payload[NUMBER.size : NUMBER.size + 256])
        if self._user and what in _NO_ACCOUNT:
            return WrongUser(f"in the guest: {what}: {self._user!r:.100}", errno=error.errno)
        return error

    def _take_exit(self, payload: bytes) -> None:
        if len(payload) != EXIT.size:
            raise AgentError(NOT_THE_AGENT)
        how, value = EXIT.unpack(payload)
        has_limit = self.deadline is not None
        if how > TIMED_OUT or value > 255 or (how == TIMED_OUT and not has_limit):
            raise AgentError(NOT_THE_AGENT)
        self.timed_out = how == TIMED_OUT
        self.returncode = value if how == EXITED else -value
        self._session.close()

    # --- what it gets ----------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Bytes that `write` takes now; more once the command has read some."""
        return self._room if self._stdin_open and self.returncode is None else 0

    def write(self, data: bytes) -> int:
        """Give the command something to read; how much of `data` was taken, up to `room` bytes.

        It never waits for the command. Whether the agent is gone is told by what reads.
        """
        size = min(len(data), self.room, MAX_DATA)
        if size:
            self._room -= size
            self._tell(FrameType.STDIN, data[:size])
        return size

    def _tell(self, type: FrameType, payload: bytes = b"") -> None:
        # The agent always reads, and all that may be on its way fits into the connection.
        try:
            self._session.send(type, payload, self._until(time.monotonic() + PATIENCE))
        except AgentGone:
            # The command may have ended, and the agent with it: `receive` finds which it was.
            self._stdin_open = False
        except CommandTimeout:
            if not self.give_up_if_late():
                raise

    def close_stdin(self) -> None:
        """The command reads the end of its input; on a terminal it gets a Ctrl-D."""
        if self._stdin_open and self.returncode is None:
            self._tell(FrameType.STDIN_END)
        self._stdin_open = False

    def kill(self, signal: int) -> None:
        """Send `signal` to the command's process group. Nothing happens if it has ended."""
        if self.returncode is None:
            self._tell(FrameType.SIGNAL, NUMBER.pack(signal))

    def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its size."""
        if self.returncode is None:
            self._tell(FrameType.RESIZE, window_size(rows, columns))


def _number(payload: bytes) -> int:
    if len(payload) != NUMBER.size:
        raise AgentError(NOT_THE_AGENT)
    (number,) = NUMBER.unpack(payload)
    return int(number)


def window_size(rows: int, columns: int) -> bytes:
    """The payload of a RESIZE frame."""
    return WINDOW_SIZE.pack(max(0, min(rows, 0xFFFF)), max(0, min(columns, 0xFFFF)))


def _word(word: object) -> str:
    text = word.__fspath__() if isinstance(word, PathLike) else word
    if not isinstance(text, str):
        raise ConfigError(f"a command's words, variables and paths are texts, not {word!r:.100}")
    try:
        text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r:.100} cannot be written in UTF-8") from None
    return text


def run_request(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None,
    cwd: str | None,
    user: str | None,
    stdin: bool,
    tty: tuple[int, int] | None,
    timeout: float | None,
) -> bytes:
    """The payload of a RUN frame. Raises ConfigError for what no guest could run."""
    if isinstance(argv, str) or not argv:
        raise ConfigError("a command is a list of words", cure='use ["sh", "-c", "..."] for a line')
    argv = [_word(word) for word in argv]
    variables = [f"{_word(name)}={_word(value)}" for name, value in (env or {}).items()]
    if any(not name or "=" in name for name in env or {}):
        raise ConfigError("a variable's name is empty or has = in it")
    words = [_word(cwd or ""), _word(user or ""), *argv, *variables]
    if any("\0" in word for word in words):
        raise ConfigError("a NUL cannot be in a command, a variable or a path")
    if len(argv) > _MOST_STRINGS or len(variables) > _MOST_STRINGS:
        raise ConfigError(f"more than {_MOST_STRINGS} arguments or variables")
    flags = (WANTS_STDIN if stdin else 0) | (WANTS_TTY if tty is not None else 0)
    rows, columns = (max(0, min(size, 0xFFFF)) for size in tty or (0, 0))
    milliseconds = 0 if timeout is None else max(1, round(min(timeout * 1000, _LONGEST_TIMEOUT)))
    head = RUN.pack(flags, milliseconds, rows, columns, len(argv), len(variables))
    payload = head + b"".join(word.encode(errors="surrogateescape") + b"\0" for word in words)
    if len(payload) > MAX_REQUEST:
        raise ConfigError(f"a command of more than {MAX_REQUEST} bytes", cure="use a file")
    return payload
