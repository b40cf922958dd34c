"""A command that runs in the guest, seen by the program that has started it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from pyvmm.agent import Output, Process
from pyvmm.host.syscalls import Closable


class Command(Closable):
    """A command in the guest. At the end of a `with` block it is ended, if it still runs.

        with vm.popen(["cat"], stdin=True) as command:
            command.write(b"hello")
            command.close_stdin()
            for stream, data in command.events(): ...

    `returncode` is None while it runs, then negative for a signal.
    """

    def __init__(self, process: Process, explained: Callable[[], AbstractContextManager[None]]):
        """`VM.popen` makes one. `explained` is what errors become a VM's errors in."""
        self._process = process
        self._explained = explained

    @property
    def args(self) -> list[str]:
        return self._process.args

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    @property
    def pid(self) -> int | None:
        """Its process in the guest, once that is known."""
        return self._process.pid

    @property
    def deadline(self) -> float | None:
        """The time of time.monotonic() at which a command with a time limit is given up, if its
        guest does not tell of its end before: whoever waits on `fileno` then calls `receive`."""
        return self._process.deadline

    def fileno(self) -> int:
        """For select and event loops: readable when `receive` has something."""
        return self._process.fileno()

    def receive(self) -> list[Output]:
        """The output that has come, without waiting; look at `returncode` afterwards."""
        with self._explained():
            return self._process.receive()

    def read(self, timeout: float | None = None) -> Output | None:
        """The next piece of output, as (stream, data) with stream 1 or 2; None when the command has
        ended. Raises CommandTimeout after `timeout` seconds."""
        with self._explained():
            return self._process.read(timeout)

    def events(self) -> Iterator[Output]:
        """All output, piece by piece, to the command's end."""
        while (piece := self.read()) is not None:
            yield piece

    def wait(self, timeout: float | None = None) -> int:
        """Throw away what it still writes, to its end; the return code. Raises as `read` does."""
        with self._explained():
            return self._process.wait(timeout)

    def write(self, data: bytes) -> int:
        """Give it something to read; how much of `data` was taken. It never waits for the command:
        0 means that it has not read what it has been given, so `read` first."""
        with self._explained():
            return self._process.write(data)

    def close_stdin(self) -> None:
        """It reads the end of its input; on a terminal it gets a Ctrl-D."""
        with self._explained():
            self._process.close_stdin()

    def kill(self, signal: int) -> None:
        """Send `signal` to its process group. Nothing happens if it has ended."""
        with self._explained():
            self._process.kill(signal)

    def resize(self, rows: int, columns: int) -> None:
        """Tell its terminal its size."""
        with self._explained():
            self._process.resize(rows, columns)

    def close(self) -> None:
        """End it, if it still runs."""
        self._process.close()
