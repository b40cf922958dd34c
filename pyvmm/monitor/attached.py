"""A command in a guest, joined to this process' standard streams, terminal and signals."""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType

from pyvmm.agent import PORT, Agent, AgentError, Process, WrongUser
from pyvmm.agent.process import STDERR
from pyvmm.agent.protocol import WINDOW
from pyvmm.control.client import connect_vsock
from pyvmm.host import log
from pyvmm.host.leaving import Left
from pyvmm.host.output import write_all
from pyvmm.monitor.exit_code import BROKEN_PIPE
from pyvmm.platform.terminal import Terminal, is_terminal

TIMED_OUT, CANNOT_RUN, NOT_FOUND = 124, 126, 127  # as env(1), timeout(1), a shell
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_PIECE = 1 << 16
_SOON = 0.001  # seconds; no alarm at all would be 0
_LONGEST_ALARM = 1e9
_CTRL_C = b"\x03"
_KEY_SECONDS = 1.0  # in which a guest that lives has taken what was typed


def agent_of(vm: str) -> Agent:
    """The agent in the guest of the VM called `vm`; nothing is asked yet."""
    return Agent(lambda seconds: connect_vsock(vm, PORT, patience=seconds))


def terminal_size(*fds: int | None) -> tuple[int, int]:
    """Rows and columns of the first of `fds` that is a terminal; 24 x 80 if none is."""
    for fd in fds:
        if fd is not None and is_terminal(fd):
            with suppress(OSError):
                size = os.get_terminal_size(fd)
                return size.lines, size.columns
    return 24, 80


class _Late(BaseException):
    """The host's clock says that the command's time is over."""


def attach(
    process: Process,
    stdin: int | None,
    stdout: int | None,
    *,
    tty: bool,
    signals: Mapping[int, int] | None = None,
    user_option: str = "",
) -> int:
    """Pass streams and signals on until the command ends; the exit code for it: its own, 128 + N
    for a signal N, 124 for a timeout, 126 or 127 if it could not be started, and then there is a
    line about it. `signals` are more signals, and what is passed on for each; `user_option` is the
    option that says as whom the command runs. Raises AgentError, and Left when the user has enough;
    whoever closes `process` ends the command."""
    try:
        with _Signals(signals or {}, process.deadline) as caught, Terminal(stdin if tty else None):
            return _Attached(process, caught, stdin, stdout, tty=tty).run()
    except BrokenPipeError:
        return BROKEN_PIPE
    except _Late:
        return _timed_out(process)
    except WrongUser as error:
        log.to_stderr(f"{user_option}: {error}" if user_option else str(error))
        return CANNOT_RUN
    except AgentError as error:
        if not error.errno or process.pid is not None:
            raise
        log.to_stderr(str(error))
        return CANNOT_RUN if error.errno != errno.ENOENT else NOT_FOUND


def _timed_out(process: Process) -> int:
    log.to_stderr(f"{process.args[0]} took too long and was ended")
    return TIMED_OUT


class _Signals:
    """Signals, as bytes to be read from a pipe. A second one that would have the command end, and a
    `deadline` (of time.monotonic()) that passes, are exceptions: they end whatever the program
    waits for."""

    def __init__(self, more: Mapping[int, int], deadline: float | None) -> None:
        self.fd, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._passed_on: dict[int, int] = {int(number): number for number in _PASSED_ON}
        self._passed_on |= more
        self._deadline = deadline
        self._before: dict[int, object] = {}
        self._was_asked = False

    def __enter__(self) -> _Signals:
        for number in (*self._passed_on, signal.SIGWINCH):
            self._before[number] = signal.signal(number, self._note)
        if self._deadline is not None:
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _raise_late)
            left = max(_SOON, min(self._deadline - time.monotonic(), _LONGEST_ALARM))
            signal.setitimer(signal.ITIMER_REAL, left)
        return self

    def __exit__(self, *_: object) -> None:
        if self._deadline is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what it was
        os.close(self.fd)
        os.close(self._writer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGWINCH:
            number = self._passed_on[number]
            if self._was_asked:
                raise Left(number)
            self._was_asked = True
        with suppress(BlockingIOError):
            os.write(self._writer, bytes([number]))

    def take(self) -> list[int]:
        """Those that came since the last time."""
        return list(os.read(self.fd, 256))


def _raise_late(number: int, frame: FrameType | None) -> None:
    raise _Late


class _Attached:
    def __init__(
        self,
        process: Process,
        signals: _Signals,
        stdin: int | None,
        stdout: int | None,
        *,
        tty: bool,
    ) -> None:
        self._process = process
        self._signals = signals
        self._stdin = stdin
        self._stdout = stdout
        self._tty = tty
        self._keys = _Keys()
        if stdin is None:
            process.close_stdin()

    def run(self) -> int:
        process = self._process
        if self._tty:
            self._tell_size()  # it may have changed since `process` was started, without a signal
        while process.returncode is None:
            ready = self._wait()
            if self._signals.fd in ready:
                self._pass_on_signals()
            if process.fileno() in ready:
                self._show()
            if process.returncode is None and self._stdin is not None and self._stdin in ready:
                self._pass_on_input()
        if process.timed_out:
            return _timed_out(process)
        return process.returncode if process.returncode >= 0 else 128 - process.returncode

    def _wait(self) -> set[int]:
        poll = select.poll()
        poll.register(self._process.fileno(), select.POLLIN)
        poll.register(self._signals.fd, select.POLLIN)
        if self._stdin is not None and self._process.room:
            poll.register(self._stdin, select.POLLIN)
        return {fd for fd, _ in poll.poll(self._keys.milliseconds())}

    def _pass_on_signals(self) -> None:
        for number in self._signals.take():
            if number == signal.SIGWINCH:
                if self._tty:
                    self._tell_size()
            else:
                self._process.kill(number)

    def _tell_size(self) -> None:
        self._process.resize(*terminal_size(self._stdout, self._stdin))

    def _show(self) -> None:
        for stream, data in self._process.receive():
            fd = 2 if stream == STDERR else self._stdout
            if fd is not None:
                write_all(fd, data)
        if self._process.room == WINDOW:
            self._keys.forget()

    def _pass_on_input(self) -> None:
        assert self._stdin is not None
        try:
            data = os.read(self._stdin, min(_PIECE, self._process.room))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""  # a terminal that hung up, a directory
        if data:
            self._process.write(data)
            if self._tty:
                self._keys.note(data)
        else:
            self._stdin = None
            self._process.close_stdin()


class _Keys:
    """The Ctrl-C keys that the guest has not taken. In raw mode a Ctrl-C is a byte for the guest's
    terminal, which nobody takes while the guest is paused or hangs."""

    def __init__(self) -> None:
        self._count = 0
        self._first = 0.0

    def note(self, typed: bytes) -> None:
        """`typed` was sent."""
        found = typed.count(_CTRL_C)
        if found and not self._count:
            self._first = time.monotonic()
        self._count += found

    def forget(self) -> None:
        """The guest has taken all that was sent."""
        self._count = 0

    def milliseconds(self) -> float | None:
        """The time to wait for the guest. Raises Left if a second Ctrl-C is not taken either."""
        if self._count < 2:
            return None
        left = self._first + _KEY_SECONDS - time.monotonic()
        if left <= 0:
            raise Left(signal.SIGINT)
        return left * 1000
