"""A keeper's ear at the control sockets of a confined monitor.

Whoever speaks JSON alone asks for a disk, a card or a directory by its name, and such a monitor
opens nothing by name. The monitor cannot be asked what he has said, as it may be somebody else's by
now. So connections come here first. The first line of each that may open files is heard here; what
it names is opened by a process of its own, which asks the monitor for the device with descriptors,
as any other client, and tells what it says. All other connections are the monitor's, with what was
read of them, and so is this one after its answer.

A channel brings them there: a message for each, with its descriptor, then what was read, with the
descriptors that came along.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import os
import select
import signal
import time
from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from pyvmm.errors import HostError, PyvmmError
from pyvmm.host import handed, unix_sockets
from pyvmm.host.parent import end_with
from pyvmm.host.unix_sockets import Socket

if TYPE_CHECKING:
    from pyvmm.host.other_user import OtherUser

KINDS = ("disk", "net", "share")
# JSON may spell any character of these by an escape, and in no third way.
_ASKS = (
    *(f'"{kind}.add"'.encode() for kind in KINDS),
    *(rb"\u00%d" % digit for digit in range(8)),
)
MOST_WAITING = 32  # who have not said a whole line
MOST_WORKERS = 8
_SHARE_OF_OTHERS = 4  # of both a quarter, beside those: at doors that are not for the owner alone
_LONGEST_LINE = 1 << 16
_PATIENCE = 150.0  # seconds for the monitor's answer, which may wait for a guest that mounts it
_SENDING = 10.0  # seconds for the answer to reach the client
_NO_ROOM_SECONDS = 0.2
_PACE = 0.002  # seconds between two of other users, so that they leave the keeper time
_MANY = "there are more clients already than the monitor takes"
_ABOVE = 512  # descriptors of a keeper are below that, and below half of its limit


class Door(NamedTuple):
    """A listening socket by which files may be opened, and the channel for its connections. With
    `owner_only` those of other users are closed."""

    listener: Socket
    channel: _socket.socket
    owner_only: bool


class _Client:
    """A connection that has not said a whole line yet."""

    def __init__(self, socket: Socket, door: Door) -> None:
        self.socket = socket
        self.door = door
        self.said = b""
        self.fds: list[int] = []

    def hear(self) -> bool:
        """Take what it says next; whether it is still there."""
        room = unix_sockets.room_for(handed.MOST + 1)
        size = _LONGEST_LINE + 1 - len(self.said)
        try:
            data, ancillary, _, _ = self.socket.recvmsg(size, room, _socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        self.fds += unix_sockets.descriptors_in(ancillary)
        self.said += data
        return bool(data) and len(self.fds) <= handed.MOST

    @property
    def is_whole(self) -> bool:
        return b"\n" in self.said or len(self.said) > _LONGEST_LINE or bool(self.fds)

    def close(self) -> None:
        self.socket.close()
        while self.fds:
            os.close(self.fds.pop())


def pass_on(
    channel: _socket.socket, socket: Socket, said: bytes = b"", fds: tuple[int, ...] = ()
) -> None:
    """Give a copy of a connection to the monitor. Raises OSError if that takes no more."""
    rights = array("i", (socket.fileno(), *fds))
    channel.sendmsg(
        [b"\0" + said],
        [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)],
        _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL,
    )


def _why(error: OSError) -> str:
    """The reason for which a connection cannot be given to the monitor."""
    if error.errno in (errno.EAGAIN, errno.EPIPE, errno.ECONNRESET):
        return _MANY
    return str(HostError(error.errno or 0, "the monitor cannot be given this connection"))


def _say_busy(socket: Socket, why: str) -> None:
    from pyvmm.control.protocol import BUSY, error_line

    with suppress(OSError):
        socket.send(error_line(None, BUSY, why))


class Broker:
    """Hears clients at its doors, once `begin` was called."""

    def __init__(
        self, monitor: int, epoll: select.epoll, user: OtherUser | None = None, given: str = ""
    ) -> None:
        """`monitor` is the process that is served, and no client. `epoll` is told what to wait
        for. What a client names is opened as `user`, if there is one, and added to the list at
        `given`."""
        self._given = given
        self._user = user
        self._not_clients = (monitor, os.getpid())
        self._epoll = epoll
        self._doors: dict[int, Door] = {}
        self._clients: dict[int, _Client] = {}
        self._workers: dict[int, tuple[int, Door]] = {}  # by pidfd

    def add(self, door: Door) -> None:
        self._doors[door.listener.fileno()] = door

    def begin(self) -> None:
        for fd in self._doors:
            self._epoll.register(fd, select.EPOLLIN)

    def go_on(self, fd: int, listener: int) -> None:
        """The connection `fd` has come to the door that has `listener`, and was not heard."""
        self._admit(unix_sockets.adopt(fd), self._doors[listener])

    @property
    def is_idle(self) -> bool:
        return not (self._clients or self._workers)

    def serve(self, fd: int) -> None:
        """Something has happened at `fd`."""
        if fd in self._doors:
            self._accept(self._doors[fd])
        elif fd in self._clients:
            self._hear(self._clients[fd])
        elif fd in self._workers:
            self._epoll.unregister(fd)  # closing is not enough: a new process may have it still
            os.waitpid(self._workers.pop(fd)[0], 0)
            os.close(fd)

    def _accept(self, door: Door) -> None:
        try:
            socket = unix_sockets.accept(door.listener)
        except HostError:  # no more descriptors
            time.sleep(_NO_ROOM_SECONDS)
            return
        if socket is not None:
            self._admit(socket, door)

    def _admit(self, socket: Socket, door: Door) -> None:
        client = _Client(socket, door)
        try:
            peer = unix_sockets.peer(socket)
        except HostError:
            client.close()
            return
        # Whom a guest reaches by us, and what has the monitor, is nobody to open files for.
        if peer.pid in self._not_clients:
            self._pass_on(client)
        elif door.owner_only and not unix_sockets.is_ours(socket):
            client.close()
        elif not self._has_room(door, (one.door for one in self._clients.values()), MOST_WAITING):
            self._refuse(client, "there are many clients already")
        else:
            self._clients[socket.fileno()] = client
            self._epoll.register(socket.fileno(), select.EPOLLIN)
        if not door.owner_only:
            time.sleep(_PACE)

    @staticmethod
    def _has_room(door: Door, there: Iterable[Door], most: int) -> bool:
        """True if who comes by `door` is one of those for whom there is room, of `most`."""
        alike = sum(one.owner_only == door.owner_only for one in there)
        return alike < (most if door.owner_only else most // _SHARE_OF_OTHERS)

    def _hear(self, client: _Client) -> None:
        there = client.hear()
        if there and not client.is_whole:
            return
        fd = client.socket.fileno()
        self._epoll.unregister(fd)
        del self._clients[fd]
        line = client.said.partition(b"\n")[0]
        if not there:
            client.close()
        elif client.fds or len(client.said) > _LONGEST_LINE or not any(a in line for a in _ASKS):
            self._pass_on(client)
        elif not self._has_room(
            client.door, (at for _, at in self._workers.values()), MOST_WORKERS
        ):
            self._refuse(client, "many devices are being added already")
        else:
            self._begin(client)

    def _pass_on(self, client: _Client) -> None:
        try:
            pass_on(client.door.channel, client.socket, client.said, tuple(client.fds))
        except OSError as error:
            self._refuse(client, _why(error))
        client.close()

    @staticmethod
    def _refuse(client: _Client, why: str) -> None:
        _say_busy(client.socket, why)
        client.close()

    def _begin(self, client: _Client) -> None:
        keeper = os.getpid()
        try:
            child = os.fork()
        except OSError as error:
            self._refuse(client, f"no process can be made: {error.strerror}")
            return
        if not child:
            _work(client, keeper, self._user, self._given)
        client.close()
        process = os.pidfd_open(child)
        self._workers[process] = child, client.door
        self._epoll.register(process, select.EPOLLIN)


# --- in a process of its own ----------------------------------------------------------------------


def _work(client: _Client, keeper: int, user: OtherUser | None, place: str) -> NoReturn:
    def settle() -> None:
        if user is not None:
            from pyvmm.monitor import preload

            preload.for_user(user)
            user.become()
        end_with(keeper)  # which a process that becomes another user's forgets

    from pyvmm.monitor import given

    listed = -1

    def note(spec: Any) -> None:
        with suppress(OSError):  # then it is in no snapshot
            given.add(listed, spec)

    try:
        end_with(keeper)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        channel, socket = _keep_only(client.door.channel, client.socket)
        line, _, rest = client.said.partition(b"\n")
        with suppress(OSError):
            listed = given.open_list(place)
        _answer(channel, unix_sockets.adopt(socket.detach()), line + b"\n", rest, settle, note)
    finally:
        os._exit(0)


def _keep_only(*sockets: _socket.socket) -> list[_socket.socket]:
    """Copies of `sockets`; nothing else is open then, but standard streams that lead nowhere."""
    least = min(_ABOVE, os.sysconf("SC_OPEN_MAX") // 2)
    for one in sockets:
        least = fcntl.fcntl(one.fileno(), fcntl.F_DUPFD_CLOEXEC, least) + 1
    first = least - len(sockets)
    os.closerange(0, first)
    os.closerange(least, os.sysconf("SC_OPEN_MAX"))
    while (fd := os.open(os.devnull, os.O_RDWR)) < 2:
        os.set_inheritable(fd, True)
    os.set_inheritable(fd, True)
    return [_socket.socket(fileno=fd) for fd in range(first, least)]


def _answer(
    channel: _socket.socket,
    socket: Socket,
    line: bytes,
    rest: bytes,
    settle: Callable[[], None] = lambda: None,
    note: Callable[[Any], None] = lambda spec: None,
) -> None:
    """`settle` is called before anything is opened, and `note` with what has come. Raises
    HostError, OSError as they do."""
    from pyvmm.control.client import send_all
    from pyvmm.control.protocol import ControlError, parse_request
    from pyvmm.control.server import answered

    try:
        request = parse_request(line)
    except ControlError:
        request = None
    kind, _, verb = ("" if request is None else request.method).partition(".")
    if request is None or verb != "add" or kind not in KINDS or "files" in request.params:
        try:
            pass_on(channel, socket, line + rest)
        except OSError as error:
            _say_busy(socket, _why(error))
        return
    answer = answered(request.id, partial(_added, channel, kind, request.params, settle, note))
    with suppress(PyvmmError, OSError):
        send_all(socket, answer, time.monotonic() + _SENDING)
        pass_on(channel, socket, rest)


def _added(
    channel: _socket.socket,
    kind: str,
    params: dict[str, Any],
    settle: Callable[[], None],
    note: Callable[[Any], None],
) -> Any:
    """Raises ControlError, ConfigError, HostError."""
    import contextlib

    from pyvmm.control.client import Client
    from pyvmm.control.protocol import BUSY, NEEDS_FILES, ControlError
    from pyvmm.errors import ConfigError
    from pyvmm.kinds import registry

    ours, theirs = unix_sockets.pair()
    try:
        pass_on(channel, theirs)
    except OSError as error:
        raise ControlError(BUSY, _why(error)) from None
    theirs.close()
    settle()
    with contextlib.closing(Client("the VM", ours)) as client:
        ask = partial(client.ask, f"{kind}.add", patience=_PATIENCE)

        def ask_with(*, fds: tuple[int, ...], **described: Any) -> Any:
            return ask(described, fds=fds)

        try:
            return ask(params)
        except ControlError as error:
            if error.code != NEEDS_FILES:
                raise
        try:
            [spec] = registry.read(kind, params.get("device", params.get("table")))
            spec = registry.with_paths(spec, os.path.abspath)
            added = registry.add_opened(spec, ask_with)
            note(spec)
            return added
        except ConfigError as error:
            raise registry.untyped(kind, error) from None
