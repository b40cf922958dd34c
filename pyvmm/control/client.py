"""The other end of a control socket: asks a running VM, looks at its console, sees it end."""

from __future__ import annotations

import _socket
import errno
import os
import select
import signal
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Self, TypeVar

from pyvmm.control import protocol, registry
from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.host import unix_sockets
from pyvmm.host.syscalls import Closable
from pyvmm.host.unix_sockets import Socket

PATIENCE = 10.0  # seconds for an answer
_ASK_SECONDS = 3.0
CUT_SECONDS = 15.0  # for a monitor to end that has cut its guest's power; an emulated host has ten

_PIECE = 1 << 16
_LONGEST_LINE = 16 << 20  # bytes of an answer or event, whoever has the monitor by now
_BUSY_PAUSE = 0.05  # seconds
_LOOK_SECONDS = 1.0  # for a question that only makes a message better

T = TypeVar("T")


class NoAnswer(PyvmmError):
    """The VM's monitor did not answer in time, or ended instead."""


def no_sense(vm: str) -> str:
    """The text of a NoAnswer for an answer of `vm` that no monitor of ours gives."""
    return f"{vm} answers what makes no sense"


class HasEnded(NoAnswer):
    """The VM's monitor has ended, or takes no requests any more."""


class NotRunning(ConfigError):
    """No VM of that name runs."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no VM called {name!r} is running", cure="pyvmm ps lists those that are")


class Upgraded(NamedTuple):
    """A connection that has become a stream: the `result` of the request that made it one, and its
    non-blocking `socket`, from which nothing behind that result was read."""

    result: Any
    socket: Socket


class Client(Closable):
    """A connection to the VM called `name`. `pid` is its monitor's process."""

    def __init__(self, name: str, connection: Socket) -> None:
        """`connect` is how to get one."""
        self.name = name
        self.connection = connection
        self.pid = unix_sockets.peer(connection).pid
        self._next_id = 1

    @classmethod
    def connect(cls, name: str) -> Self:
        """Raises NotRunning if no VM of that name does."""
        path = registry.socket_path(name)
        try:
            connection = unix_sockets.connect(path)
        except HostError as error:
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                raise
            raise NotRunning(name) from None
        return cls(name, connection)

    def close(self) -> None:
        self.connection.close()

    def call(
        self, method: str, *, patience: float = PATIENCE, fds: Sequence[int] = (), **params: Any
    ) -> Any:
        """Ask for `method`; its result. Copies of the descriptors `fds` go with it. Raises
        ControlError for an answer that is an error, NoAnswer after `patience` seconds or if the
        monitor ends meanwhile."""
        return self.ask(method, params, patience=patience, fds=fds)

    def ask(
        self,
        method: str,
        params: Mapping[str, Any],
        *,
        patience: float = PATIENCE,
        fds: Sequence[int] = (),
    ) -> Any:
        """The same with `params` that somebody else has chosen."""
        import json

        id, self._next_id = self._next_id, self._next_id + 1
        deadline = time.monotonic() + patience
        self._send(protocol.request_line(id, method, params), deadline, fds)
        try:
            while True:
                answer = json.loads(self._read_line(deadline))
                if answer.get("id") in (id, None):
                    break
            error = answer.get("error")
            if error is None:
                return answer["result"]
            code, message = str(error.get("code")), f"{error.get('message')}"
        except (AttributeError, LookupError, RecursionError, ValueError):
            raise NoAnswer(no_sense(self.name)) from None
        raise protocol.ControlError(code, message)

    def upgrade(self, method: str, *, patience: float = PATIENCE, **params: Any) -> Upgraded:
        """Ask for a `method` that makes the connection something else, which is the caller's then;
        the client is of no more use. Raises as `call` does."""
        result = self.call(method, patience=patience, **params)
        fd = os.dup(self.connection.fileno())
        self.close()
        return Upgraded(result, unix_sockets.adopt(fd))

    def _send(self, data: bytes, deadline: float, fds: Sequence[int]) -> None:
        try:
            send_all(self.connection, data, deadline, fds)
        except NoAnswer:
            raise self._no_answer() from None
        except (BrokenPipeError, ConnectionResetError):
            return  # it has hung up, and may have said why
        except OSError as error:
            raise HostError(error.errno or 0, f"a request to {self.name}") from None

    def _read_line(self, deadline: float) -> bytes:
        line = self.line_or_end(deadline)
        if not line:
            raise HasEnded(f"{self.name} has ended")
        return line

    def line_or_end(self, deadline: float) -> bytes:
        """As `line_or_end` does."""
        try:
            return line_or_end(self.connection, deadline)
        except NoAnswer:
            raise self._no_answer() from None

    def _no_answer(self) -> NoAnswer:
        return NoAnswer(f"{self.name} (PID {self.pid}) does not answer")

    def has_ended(self, patience: float) -> bool:
        """True if the monitor's process has ended, within `patience` seconds."""
        process = self.watch_process()
        if process < 0:
            return True
        try:
            return _ended(process, patience)
        finally:
            os.close(process)

    def watch_process(self) -> int:
        """A pidfd of the monitor's process, which is readable once that has ended; -1 if it has
        ended already."""
        try:
            return os.pidfd_open(self.pid)
        except ProcessLookupError:
            return -1


def line_or_end(connection: Socket, deadline: float) -> bytes:
    """The next line, with nothing taken of what follows it; b"" at the connection's end.

    The bytes behind it may be a stream for another reader. Raises NoAnswer at `deadline`, and for a
    line of more than 16 MiB.
    """
    line = b""
    while not line.endswith(b"\n"):
        if len(line) > _LONGEST_LINE:
            raise NoAnswer("an answer without an end")
        if not _ready(connection, select.POLLIN, deadline):
            raise NoAnswer("no answer")
        try:
            seen = connection.recv(_PIECE, _socket.MSG_PEEK)
            line += connection.recv(seen.find(b"\n") + 1 or len(seen))
        except BlockingIOError:
            continue
        except OSError:
            return b""
        if not seen:
            return b""
    return line


def send_all(connection: Socket, data: bytes, deadline: float, fds: Sequence[int] = ()) -> None:
    """Send all of it, with copies of the descriptors `fds`. Raises NoAnswer at `deadline`, OSError
    if the other end has gone."""
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array("i", fds))] if fds else []
    while data:
        if not _ready(connection, select.POLLOUT, deadline):
            raise NoAnswer("it takes no answer")
        with suppress(BlockingIOError):
            data, rights = data[connection.sendmsg([data], rights) :], []


def _ready(connection: Socket, event: int, deadline: float) -> bool:
    poll = select.poll()
    poll.register(connection.fileno(), event)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def patiently(name: str, ask: Callable[[Client], T], patience: float = PATIENCE) -> T:
    """The result of `ask` for a connection to the VM called `name`; again, up to `patience`
    seconds, while that has as many clients as it takes. Raises as `Client.connect` and `ask` do."""
    deadline = time.monotonic() + patience
    while True:
        try:
            with Client.connect(name) as client:
                return ask(client)
        except protocol.ControlError as error:
            if error.code != protocol.BUSY or time.monotonic() > deadline:
                raise
        except HostError as error:
            if error.errno != errno.EAGAIN or time.monotonic() > deadline:
                raise
        time.sleep(_BUSY_PAUSE)


def open_console(name: str, *, history: bool = True, input: bool = True) -> Socket:
    """The console of the VM called `name`, as a non-blocking stream: the last of what it has shown
    (with `history`), then all that it shows; what is sent is typed into it (with `input`). Any
    number can look and type at a time. It ends when the VM ends.

    A reader that falls behind by 256 KiB misses some, and is told how much. Raises ConfigError if
    there is no such VM, ControlError, NoAnswer, HostError.
    """
    return patiently(
        name, lambda client: client.upgrade("console", history=history, input=input).socket
    )


def open_events(name: str, *, history: bool = True) -> Socket:
    """The events of the VM called `name`, as a non-blocking stream of lines, a JSON object each;
    docs/control-socket.md has their kinds. With `history` those that were before come first.

    Raises as `open_console` does.
    """
    return patiently(name, lambda client: client.upgrade("events", history=history).socket)


def events(name: str, *, history: bool = True) -> Iterator[dict[str, Any]]:
    """The events of the VM called `name`, one event after another until it has ended; the last is
    called "ended" unless its monitor was killed. Raises as `open_console` does."""
    return read_events(open_events(name, history=history))


def read_events(socket: Socket) -> Iterator[dict[str, Any]]:
    """The events that come from `socket`, which is closed at the end, or at what is no event."""
    poll = select.poll()
    poll.register(socket.fileno(), select.POLLIN)
    received = b""
    try:
        while True:
            poll.poll()
            try:
                data = socket.recv(_PIECE)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                return
            found, received, makes_sense = _events_in(received + data)
            yield from found
            if not makes_sense:
                return
    finally:
        socket.close()


def _events_in(data: bytes) -> tuple[list[dict[str, Any]], bytes, bool]:
    """The events that `data` begins with, what follows behind them, and whether that may be the
    beginning of one more."""
    import json

    *lines, rest = data.split(b"\n")
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            event = json.loads(line)
        except (RecursionError, ValueError):
            event = None
        if not (
            isinstance(event, dict)
            and isinstance(event.get("event"), str)
            and isinstance(event.get("time", 0), (int, float))
        ):
            return found, b"", False
        found.append(event)
    return found, rest, len(rest) <= _LONGEST_LINE


def connect_vsock(
    name: str,
    port: int,
    *,
    patience: float = 60.0,
    watch: Callable[[Socket], object] = lambda socket: None,
) -> Socket:
    """A stream to `port` of the guest of the VM called `name`. This calls `watch` with each
    socket that it waits for; it fails at once when another thread shuts that socket down.

    Raises HostError, ECONNREFUSED, if no program listens there, or not yet;
    ConfigError if no such VM runs; ControlError if it has no vsock device, or is paused; NoAnswer
    after `patience` seconds, which the VM may take to start, or if it ends meanwhile.
    """
    deadline = time.monotonic() + patience
    refused = HostError(errno.ECONNREFUSED, f"port {port} of the guest of {name}")

    def ask(client: Client) -> Socket:
        watch(client.connection)
        left = max(0.0, deadline - time.monotonic())
        return client.upgrade("vsock.connect", patience=left, port=port).socket

    try:
        stream = patiently(name, ask, patience)
    except protocol.ControlError as error:
        if error.code == protocol.NOT_READY:
            raise refused from None
        raise _with_cure(error, name) from None
    with Client(name, stream) as reader:
        watch(stream)
        try:
            answer = reader.line_or_end(deadline)
        except NoAnswer:
            _raise_if_paused(name)
            raise NoAnswer(f"the guest of {name} does not answer") from None
        if not answer.startswith(b"OK "):
            raise refused
        return unix_sockets.adopt(os.dup(stream.fileno()))


def _with_cure(error: protocol.ControlError, name: str) -> protocol.ControlError:
    if error.code != protocol.PAUSED:
        return error
    return protocol.ControlError(error.code, f"{name} is paused; pyvmm resume {name} has it go on")


def _raise_if_paused(name: str) -> None:
    """Say so of a VM that was paused while its guest was waited for."""
    if is_paused(name):
        raise _with_cure(protocol.ControlError(protocol.PAUSED, ""), name)


def is_paused(name: str) -> bool:
    """True if the VM called `name` is paused, as far as it says so at once."""
    try:
        with Client.connect(name) as client:
            state: str = client.call("status", patience=_LOOK_SECONDS)["state"]
            return state == "paused"
    except PyvmmError:
        return False


def stop(name: str, *, patience: float, kill: bool = False) -> dict[str, Any] | None:
    """Have the guest of the VM called `name` power off, and its power cut if it has not within
    `patience` seconds; wait until its process has ended. Its event "ended", if that was heard.

    With `kill`, its process is killed at once instead. Raises ConfigError if there is none, and
    NoAnswer if it does not end though its power is to be cut.
    """
    with Client.connect(name) as client:
        process = client.watch_process()
        if process < 0:
            return None
        try:
            deadline = time.monotonic() + patience + CUT_SECONDS
            if kill:
                with suppress(ProcessLookupError):  # it has just ended
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                told = None
            else:
                told = _ask_to_stop(client, process, patience, deadline)
            if not _ended(process, max(0.0, deadline - time.monotonic())):
                raise NoAnswer(
                    f"{name} (PID {client.pid}) still runs after {patience + CUT_SECONDS:g} "
                    f"seconds; pyvmm stop --kill {name} ends it on the spot"
                )
            return told
        finally:
            os.close(process)


def _ask_to_stop(
    client: Client, process: int, patience: float, deadline: float
) -> dict[str, Any] | None:
    asking = min(_ASK_SECONDS, CUT_SECONDS)
    try:
        with Client.connect(client.name) as other:
            stream = other.upgrade("events", patience=asking, history=False).socket
    except PyvmmError:
        stream = None  # it hangs, ends, or is looked at by too many
    try:
        # No answer: it ended before, which is seen next, or starts still, or hangs. One that starts
        # finds the question when it has.
        with suppress(NoAnswer):
            client.call("stop", patience=asking, timeout_ms=round(1000 * patience))
        return None if stream is None else _wait_for_end(stream, process, deadline)
    finally:
        if stream is not None:
            stream.close()


def _wait_for_end(stream: Socket, process: int, deadline: float) -> dict[str, Any] | None:
    """The event "ended", once it comes; None if the process ends, or `deadline` or what is no event
    comes, without."""
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLIN)
    poll.register(process, select.POLLIN)
    received = b""
    while ready := poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        if stream.fileno() not in dict(ready):
            return None
        try:
            data = stream.recv(_PIECE)
        except BlockingIOError:
            continue
        except OSError:
            data = b""
        if not data:
            return None
        found, received, makes_sense = _events_in(received + data)
        for event in found:
            if event["event"] == "ended":
                return event
        if not makes_sense:
            return None
    return None


def _ended(process: int, patience: float) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(patience * 1000))
