"""The viewers of a running machine through its control socket: its console, and what happens."""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.boot.diagnosis import PANIC, Finding
from pyvmm.control.events import Events
from pyvmm.control.protocol import Upgrade
from pyvmm.control.streams import OUTPUT_LIMIT, Stream, Streams
from pyvmm.errors import how_many
from pyvmm.host import log
from pyvmm.host.log import Line, message_of
from pyvmm.host.syscalls import Closable
from pyvmm.host.unix_sockets import Socket
from pyvmm.machine.outcome import Outcome
from pyvmm.platform.shared_console import KEPT, ConsoleTail, SharedInput

assert OUTPUT_LIMIT >= 2 * KEPT  # what was there before must not be all that there is room for


class Watch(Closable):
    """The console `tail`, its `input`, and the machine's `events`, for any number of watchers."""

    def __init__(self, tail: ConsoleTail, input: SharedInput, console: str) -> None:
        """`console` is what the console is called in the guest. Raises HostError."""
        self._tail = tail
        self._input = input
        self._console = console
        self.console_left_out: Callable[[], int] = lambda: 0
        self._streams = Streams()
        self.events = Events(self._streams)
        log.observe(self.tell_line)

    def console(self, history: bool = True, input: bool = True) -> Upgrade:
        """Make a control connection one end of the console: it gets the last output (with
        `history`), then all that comes; what it sends is typed (with `input`).

        Raises ConfigError if there are too many such connections.
        """
        self._streams.check_room()

        def hand_over(socket: Socket, received: bytes) -> None:
            self._attach(socket, received, history, input)

        return Upgrade({"console": self._console}, hand_over)

    def _attach(self, socket: Socket, received: bytes, history: bool, input: bool) -> None:
        if input:
            share = self._input.join()
            stream = self._streams.make(socket, share.enqueue_input)
            share.watch_room(stream.resume)
        else:
            share = None
            stream = self._streams.make(socket)
        watcher = _Watcher(stream)

        def end() -> None:
            self._tail.unfollow(watcher.show)
            if share is not None:
                share.leave()

        stream.on_end = end
        self._tail.follow(watcher.show, history=history)
        self._streams.add(stream, received)

    def tell_finding(self, finding: Finding) -> None:
        """Tell what the guest's console says of its state."""
        if finding.kind == PANIC:
            self.events.emit("panic", message=finding.message)
        else:
            self.events.emit(
                "diagnosis", finding=finding.kind, message=finding.message, cure=finding.cure
            )

    def tell_line(self, line: Line) -> None:
        """Tell of a device's error, if that is what the log's `line` is about."""
        if line.error:
            self.events.emit(
                "device_error", device=line.device, error=line.error, message=message_of(line)
            )

    def end(self, outcome: Outcome) -> None:
        """Tell how the run has ended, the last of all events."""
        self.events.emit(
            "ended",
            ending=outcome.ending.name.lower(),
            exit_code=outcome.exit_code,
            message=outcome.line,
        )

    def close(self) -> None:
        """Send what is waiting to those who take it, and end."""
        log.forget(self.tell_line)
        self._streams.close()


class _Watcher:
    """One who sees the console. To one who does not read, some of it is not shown."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._left_out = 0

    def show(self, data: bytes) -> None:
        """Send `data`, or count it. Never waits."""
        length = len(data)
        if self._left_out:
            data = f"\r\n[pyvmm: {how_many(self._left_out, 'byte')} left out]\r\n".encode() + data
        if self._stream.offer(data):
            self._left_out = 0
        else:
            self._left_out += length
