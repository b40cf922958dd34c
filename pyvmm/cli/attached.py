"""A command in a guest, joined to this process' standard streams, terminal and signals."""

from __future__ import annotations

import errno
import os
import select
import signal
from contextlib import suppress
from types import FrameType

from pyvmm.agent import AgentError, Process
from pyvmm.agent.process import STDERR
from pyvmm.cli.ending import BROKEN_PIPE
from pyvmm.host import log
from pyvmm.host.output import write_all
from pyvmm.platform.terminal import Terminal, is_terminal

TIMED_OUT, CANNOT_RUN, NOT_FOUND = 124, 126, 127  # as env(1), timeout(1), a shell
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_PIECE = 1 << 16


def terminal_size(*fds: int | None) -> tuple[int, int]:
    """Rows and columns of the first of `fds` that is a terminal; 24 x 80 if none is."""
    for fd in fds:
        if fd is not None and is_terminal(fd):
            with suppress(OSError):
                size = os.get_terminal_size(fd)
                return size.lines, size.columns
    return 24, 80


def attach(process: Process, stdin: int | None, stdout: int | None, *, tty: bool) -> int:
    """Pass streams and signals on until the command ends; the exit code for it: its own, 128 + N
    for a signal N, 124 for a timeout, 126 or 127 if it could not be started, and then there is a
    line about it. Raises AgentError."""
    try:
        with _Signals() as signals, Terminal(stdin if tty else None):
            return _Attached(process, signals, stdin, stdout, tty=tty).run()
    except BrokenPipeError:
        return BROKEN_PIPE
    except AgentError as error:
        if not error.errno or process.pid is not None:
            raise
        log.to_stderr(str(error))
        return CANNOT_RUN if error.errno != errno.ENOENT else NOT_FOUND


class _Signals:
    """Signals, as bytes to be read from a pipe; a second one of a kind that nobody has read yet
    ends the program, which hangs."""

    def __init__(self) -> None:
        self.fd, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before: dict[int, object] = {}
        self._waiting: set[int] = set()

    def __enter__(self) -> _Signals:
        for number in (*_PASSED_ON, signal.SIGWINCH):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what it was
        os.close(self.fd)
        os.close(self._writer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in self._waiting and number != signal.SIGWINCH:
            raise KeyboardInterrupt
        self._waiting.add(number)
        with suppress(BlockingIOError):
            os.write(self._writer, bytes([number]))

    def take(self) -> list[int]:
        """Those that came since the last time."""
        found = list(os.read(self.fd, 256))
        self._waiting.clear()
        return found


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
        if stdin is None:
            process.close_stdin()

    def run(self) -> int:
        process = self._process
        while process.returncode is None:
            ready = self._wait()
            if self._signals.fd in ready:
                self._pass_on_signals()
            if process.fileno() in ready:
                self._show()
            if process.returncode is None and self._stdin is not None and self._stdin in ready:
                self._pass_on_input()
        if process.timed_out:
            log.to_stderr(f"{process.args[0]} took too long and was ended")
            return TIMED_OUT
        return process.returncode if process.returncode >= 0 else 128 - process.returncode

    def _wait(self) -> set[int]:
        poll = select.poll()
        poll.register(self._process.fileno(), select.POLLIN)
        poll.register(self._signals.fd, select.POLLIN)
        if self._stdin is not None and self._process.room:
            poll.register(self._stdin, select.POLLIN)
        return {fd for fd, _ in poll.poll()}

    def _pass_on_signals(self) -> None:
        for number in self._signals.take():
            if number == signal.SIGWINCH:
                if self._tty:
                    self._process.resize(*terminal_size(self._stdout, self._stdin))
            else:
                self._process.kill(number)

    def _show(self) -> None:
        for stream, data in self._process.receive():
            fd = 2 if stream == STDERR else self._stdout
            if fd is not None:
                write_all(fd, data)

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
        else:
            self._stdin = None
            self._process.close_stdin()
