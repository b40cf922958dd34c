"""The keeper of a monitor in a box: a process, forked before, that does what the monitor cannot.

It does these things, for one VM whose name it knows from before, and nothing else:

    b"log" + one byte       open the VM's log, which is begun anew if the byte is not 0
    b"end" + a JSON object  remember how the VM has ended
    b"del" + a number       remove the file that was announced as that one
    b"con" + a number       connect to the socket that was announced as that one
    b"con" + two numbers    connect to the socket whose name is that file's, "_" and the second one

and in an emulated host, whose block devices and ports are all this VM's, where there is no log:

    b"plg" + a JSON list    make a node at its first text, below PLACE, for the block device whose
                            serial number is its second
    b"dev" + a path         open the block device or the port that is there

An answer is an error number in four bytes, and a descriptor where one is asked for. Files are
announced (``b"add" + path``, or ``b"nam" + path`` for one that is not removed) until the monitor is
about to enter the box, which it says (``b"box"``): a file is removed only if it is still the same.
Until then it may also say which group of processes to remove at the end (``b"grp"`` and a JSON
list: where to go, and the group), and have the keeper hear who comes to its control sockets, before
it does itself (``b"lis"``, a byte and two descriptors: pyvmm.monitor.broker).

The keeper has nothing else of the monitor's open than its socket and these, and ends with it. Once
it has had nothing to do for some seconds, it sleeps (pyvmm.monitor.asleep), but not in an emulated
host.

Where the monitor becomes another user, the keeper is root, and the folder of a socket may be that
user's: what he makes a link of later is not followed for him.
"""

from __future__ import annotations

import _socket
import errno
import gc
import os
import select
import signal
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from pyvmm.control import vm_log
from pyvmm.errors import HostError
from pyvmm.host import confinement, named_listener, unix_sockets
from pyvmm.host.named_listener import Identity
from pyvmm.host.parent import end_with
from pyvmm.host.syscalls import allow_descriptors
from pyvmm.host.unix_sockets import Socket

if TYPE_CHECKING:
    from pyvmm.host.other_user import OtherUser
    from pyvmm.monitor.broker import Broker, Door
    from pyvmm.monitor.cgroup import Group

_MOST = 64 << 10  # bytes of a message
_ANSWER = struct.Struct("=i")
_FDS = struct.Struct("=2i")  # with a "lis"
_MOST_TEXT = 4096
_KEYS = {"message": str, "ending": str}
_AWAKE = 5.0  # seconds without anything to do, before it sleeps
_MOST_OPEN = 64 << 10  # descriptors, as far as the hard limit allows
_APART = 8  # numbers of descriptors that are kept free


class Keeper:
    """The monitor's end. Any thread may call it."""

    def __init__(
        self, place: str, name: str, *, user: OtherUser | None = None, is_inside: bool = False
    ) -> None:
        """Fork the keeper of the VM `name`; `place` is the folder of control sockets. The monitor
        is to become `user`, if there is one. `is_inside`: this is an emulated host. To be called
        before anything is opened for the VM. Raises HostError."""
        try:
            self._socket, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
            child = os.fork()
        except OSError as error:
            raise HostError(error.errno or 0, "fork") from None
        self.pid = child
        if not child:
            try:
                _be_alone(theirs.fileno())
                state = _State(place, name, user, is_inside, os.getppid(), _AWAKE)
                serving = _Serving(theirs, state)
                serving.run()
                serving.end()
            finally:
                os._exit(0)
        theirs.close()
        self._lock = Lock()
        self._numbers: dict[str, int] = {}
        self._boxed = False

    def announce(self, path: str, *, removes: bool = True) -> None:
        """`path` is a file that this VM is to remove, or to connect to. Before `enter_box`."""
        path = os.path.abspath(path)
        with self._lock:
            self._ask((b"add" if removes else b"nam") + os.fsencode(path))
            self._numbers[path] = len(self._numbers)

    def leave(self, group: Group) -> None:
        """This VM's group of processes goes when the monitor has ended. Before `enter_box`."""
        import json

        if group.places[1]:
            with self._lock:
                self._ask(b"grp" + json.dumps(group.places).encode())

    def enter_box(self) -> None:
        """From now on the keeper does not believe us any more."""
        with self._lock:
            self._ask(b"box")
            self._boxed = True

    def remove(self, path: str, identity: Identity | None = None) -> None:
        """Remove a file that was announced, or, before `enter_box`, any, if it has `identity`.
        Raises OSError."""
        if not self._boxed:
            named_listener.remove_here(path, identity)
            return
        number = self._numbers.get(os.path.abspath(path))
        if number is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        with self._lock:
            self._ask(b"del%d" % number)

    def reach(self, path: str) -> Socket:
        """A connection to the socket of a host's program that a guest wants. Raises HostError."""
        if not self._boxed:
            return unix_sockets.connect_here(path)
        path = os.path.abspath(path)
        prefix, _, port = path.rpartition("_")
        if path in self._numbers:
            which = b"con%d" % self._numbers[path]
        elif prefix in self._numbers and port.isdecimal():
            which = b"con%d %d" % (self._numbers[prefix], int(port))
        else:
            raise HostError(errno.ECONNREFUSED, f"connect to {path}")
        try:
            with self._lock:
                return unix_sockets.adopt(self._ask(which))
        except OSError as error:
            raise HostError(error.errno or 0, f"connect to {path}") from None

    def listen(self, listener: Socket, *, owner_only: bool) -> _socket.socket:
        """From `enter_box` on, connections to `listener` come by the socket that this returns, with
        `owner_only` those of other users do not. Raises OSError."""
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with self._lock:
            self._ask(b"lis%c" % owner_only, (listener.fileno(), theirs.fileno()))
        theirs.close()
        return ours

    def plug(self, path: str, serial: str) -> None:
        """Make a node at `path` for the block device with that serial number. Raises OSError,
        ENOENT while there is none."""
        import json

        with self._lock:
            self._ask(b"plg" + json.dumps([path, serial]).encode())

    def open_device(self, path: str) -> int:
        """The block device or port at `path`, opened. Raises OSError."""
        with self._lock:
            return self._ask(b"dev" + os.fsencode(path))

    def open_log(self, rotate: bool) -> int:
        """See vm_log.open_log."""
        with self._lock:
            return self._ask(b"log%c" % rotate)

    def note_end(self, exit_code: int | None, **details: object) -> None:
        """See vm_log.note_end."""
        import json

        told = {
            key: value[:_MOST_TEXT] if isinstance(value, str) else value
            for key, value in details.items()
        }
        with self._lock, suppress(OSError):
            self._ask(b"end" + json.dumps({"exit_code": exit_code, **told}).encode())

    def _ask(self, message: bytes, fds: tuple[int, ...] = ()) -> int:
        """The descriptor in the answer, or -1. Raises OSError."""
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _FDS.pack(*fds))] if fds else []
        self._socket.sendmsg([message], rights)
        data, ancillary, _, _ = self._socket.recvmsg(
            _ANSWER.size, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC
        )
        came = [_ANSWER.unpack(content[:4])[0] for _, _, content in ancillary]
        failed = _ANSWER.unpack(data)[0] if len(data) == _ANSWER.size else errno.EPIPE
        if failed:
            raise OSError(failed, os.strerror(failed))
        return int(came[0]) if came else -1


def _be_alone(fd: int) -> None:
    """Keep nothing of the monitor but the descriptor `fd`, and end with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or nobody could wait for children
    # What is imported from here on is not from the current directory, which may be a guest's.
    sys.path[:] = confinement.own_folders()
    gc.freeze()  # or else to look through what the monitor has would copy it
    os.closerange(0, fd)
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
    while (null := os.open(os.devnull, os.O_RDWR)) < 3:  # standard streams
        os.set_inheritable(null, True)
    os.close(null)
    # Sending one fails when all processes of this user together have as many on their way: those of
    # a monitor in a box, whose limit is the one that we begin with, must not be in ours.
    allow_descriptors(_MOST_OPEN)


class _File(NamedTuple):
    """A file that was announced: its `path`, and the same without links in its folder's."""

    path: str
    exactly: str
    removes: bool
    identity: tuple[int, int] | None = None

    @classmethod
    def announced(cls, path: str, *, removes: bool) -> _File:
        folder, name = os.path.split(path)
        return cls(path, os.path.join(os.path.realpath(folder), name), removes)


class _State(NamedTuple):
    """See Keeper; `monitor` is its process, `awake` are the seconds before a sleep."""

    place: str
    name: str
    user: Sequence[int] | None
    is_inside: bool
    monitor: int
    awake: float


def main(arguments: list[str]) -> NoReturn:
    """Go on after a sleep, with what is in the file that is the descriptor arguments[0]."""
    try:
        serving = _Serving.woken(int(arguments[0]))
        serving.run()
        serving.end()
    finally:
        os._exit(0)


class _Serving:
    def __init__(self, socket: _socket.socket, state: _State) -> None:
        self._socket = socket
        self._state = state
        self._is_inside = state.is_inside
        self._place, self._name = state.place, state.name
        self._files: list[_File] = []
        self._boxed = False
        self._group: tuple[str, ...] = ()
        self._epoll = select.epoll()
        self._epoll.register(socket.fileno(), select.EPOLLIN)
        self._broker: Broker | None = None
        self._doors: list[Door] = []
        self._sleeps = bool(sys.executable) and not state.is_inside
        self._asleep: tuple[int, int] | None = None  # its program, and the memory of this

    @classmethod
    def woken(cls, memory: int) -> _Serving:
        """Raises OSError, ValueError, TypeError, KeyError for what it does not know."""
        import json

        known = json.loads(os.pread(memory, os.fstat(memory).st_size, 0))
        sys.path += known["packages"]
        made = cls(_socket.socket(fileno=known["socket"]), _State(*known["state"]))
        made._asleep = known["program"], memory
        made._group = tuple(known["group"])
        made._boxed = True
        made._files = [
            _File(path, exactly, removes, None if identity is None else (identity[0], identity[1]))
            for path, exactly, removes, identity in known["files"]
        ]
        for listener, channel, owner_only in known["doors"]:
            made._listen(owner_only, [listener, channel])
        made._let_inherit(False)
        if made._broker is not None:
            made._broker.begin()
            for place, (listener, _, _) in zip(made._places(), known["doors"], strict=True):
                with suppress(OSError):  # nobody is there
                    os.set_inheritable(place, False)
                    made._broker.go_on(place, listener)
        return made

    def run(self) -> None:
        """Serve until the other end is closed."""
        with suppress(ConnectionError):  # an answer was not read, or cannot be given any more
            self._serve()

    def _serve(self) -> None:
        """Raises ConnectionError."""
        while True:
            self._wait()
            message, fds = self._hear()
            if not message:
                return
            fd, failed = -1, 0
            try:
                fd = self._do(message[:3], message[3:], fds)
            except OSError as error:
                failed = error.errno or errno.EIO
            except (ValueError, TypeError, IndexError, RecursionError):
                failed = errno.EINVAL
            for one in fds:
                os.close(one)
            self._answer(failed, fd)
            if fd >= 0:
                os.close(fd)
            if message == b"box" and not failed and not self._is_inside:
                from pyvmm.host import box

                box.stay_outside()
                if not self._group:
                    # Whoever has a listener too can have us wait in accept(2) for ever.
                    end_with(self._state.monitor)

    def _answer(self, failed: int, fd: int) -> None:
        """Raises ConnectionError."""
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _ANSWER.pack(fd))] if fd >= 0 else []
        try:
            self._socket.sendmsg([_ANSWER.pack(failed)], rights)
        except ConnectionError:
            raise
        except OSError as error:  # ETOOMANYREFS
            self._socket.sendmsg([_ANSWER.pack(error.errno or errno.EIO)])

    def end(self) -> None:
        """The monitor has ended."""
        if self._group:
            from pyvmm.monitor import cgroup

            os.closerange(0, os.sysconf("SC_OPEN_MAX"))
            cgroup.leave_last(*self._group)

    def _wait(self) -> None:
        """Wait for the monitor, and hear clients meanwhile."""
        while True:
            is_idle = self._boxed and (self._broker is None or self._broker.is_idle)
            patience = self._state.awake if self._sleeps and is_idle else None
            ready = [fd for fd, _ in self._epoll.poll(patience)]
            if not ready:
                self._sleep()
            elif self._broker is not None:
                for fd in ready:
                    self._broker.serve(fd)
            if self._socket.fileno() in ready:
                return

    def _sleep(self) -> None:
        """Become what waits without Python; this returns where that cannot be."""
        from pyvmm.monitor import asleep

        self._sleeps = False
        with suppress(OSError, ValueError):
            if self._asleep is None:
                self._asleep = self._prepare_sleep()
            self._let_inherit(True)
            asleep.become(self._asleep[0], self._name)
        self._let_inherit(False)

    def _prepare_sleep(self) -> tuple[int, int]:
        """Raises OSError, ValueError."""
        import json

        from pyvmm.monitor import asleep

        memory = os.memfd_create("pyvmm-keeper-state")
        doors = [
            asleep.Door(door.listener.fileno(), door.channel.fileno(), place)
            for door, place in zip(self._doors, self._places(), strict=True)
        ]
        program = asleep.make(
            confinement.python(__name__, str(memory), f"for {self._name}"),
            self._socket.fileno(),
            doors,
            has_work_at_the_end=bool(self._group),
        )
        known = {
            "socket": self._socket.fileno(),
            "state": self._state,
            "program": program,
            "packages": list(confinement.package_folders()),
            "group": self._group,
            "files": self._files,
            "doors": [
                (door.listener.fileno(), door.channel.fileno(), door.owner_only)
                for door in self._doors
            ],
        }
        os.pwrite(memory, json.dumps(known).encode(), 0)
        return program, memory

    def _places(self) -> range:
        """Numbers of descriptors, one for each door, that nothing else gets: those of new ones are
        the lowest that are free."""
        first = max(self._lasting(), default=0) + _APART
        return range(first, first + len(self._doors))

    def _lasting(self) -> Iterator[int]:
        yield self._socket.fileno()
        for door in self._doors:
            yield door.listener.fileno()
            yield door.channel.fileno()

    def _let_inherit(self, inheritable: bool) -> None:
        for fd in (*self._lasting(), *(self._asleep or ())):
            os.set_inheritable(fd, inheritable)

    def _hear(self) -> tuple[bytes, list[int]]:
        if self._boxed:
            return self._socket.recv(_MOST), []
        data, ancillary, _, _ = self._socket.recvmsg(
            _MOST, _socket.CMSG_SPACE(_FDS.size), _socket.MSG_CMSG_CLOEXEC
        )
        return data, [fd for _, _, content in ancillary for (fd,) in _ANSWER.iter_unpack(content)]

    def _listen(self, owner_only: bool, fds: list[int]) -> None:
        from pyvmm.monitor.broker import Broker, Door

        if self._broker is None:
            user = None
            if self._state.user is not None:
                from pyvmm.host.other_user import OtherUser

                user = OtherUser(self._state.user[0], self._state.user[1])
            self._broker = Broker(self._state.monitor, self._epoll, user)
        listener, channel = unix_sockets.adopt(fds[0]), _socket.socket(fileno=fds[1])
        fds.clear()
        self._doors.append(Door(listener, channel, owner_only))
        self._broker.add(self._doors[-1])

    def _do(self, what: bytes, rest: bytes, fds: list[int]) -> int:
        """The descriptor to answer with, or -1. Raises OSError, ValueError, IndexError."""
        if self._is_inside and what in (b"plg", b"dev"):
            from pyvmm.monitor import nodes_inside

            return nodes_inside.serve(what, rest)
        if self._is_inside and what in (b"log", b"end"):
            raise ValueError
        if what == b"log":
            return vm_log.open_log(self._place, self._name, rest != b"\0")
        if what == b"end":
            vm_log.note_end(self._place, self._name, **_end(rest))
        elif what == b"del":
            file = self._files[int(rest)]
            if file.identity is not None:
                _remove(file.exactly, file.identity)
        elif what == b"con":
            number, *port = map(int, rest.split())
            suffix = "".join(f"_{one}" for one in port[:1])
            file = self._files[number]
            if self._state.user is not None:
                return _connected_exactly(file.exactly + suffix)
            return _connected(file.path + suffix)
        elif what in (b"add", b"nam") and not self._boxed:
            self._files.append(_File.announced(os.fsdecode(rest), removes=what == b"add"))
        elif what == b"grp" and not self._boxed:
            import json

            self._group = tuple(map(str, json.loads(rest)))
        elif what == b"lis" and not self._boxed and len(fds) == 2:
            self._listen(rest != b"\0", fds)
        elif what == b"box" and not self._boxed:
            self._boxed = True
            if self._broker is not None:
                self._broker.begin()
            self._files = [
                one._replace(identity=_identity(one.path)) if one.removes else one
                for one in self._files
            ]
        else:
            raise ValueError
        return -1


@contextmanager
def _exactly(path: str) -> Iterator[int]:
    """A descriptor (O_PATH) of what is at `path`, an absolute one in which no link is followed.
    Raises OSError."""
    fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        for name in filter(None, path.split("/")):
            above, fd = fd, os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(above)
        yield fd
    finally:
        os.close(fd)


def _remove(path: str, identity: tuple[int, int]) -> None:
    """Remove what is at `path` if it is that. Raises OSError."""
    folder, name = os.path.split(path)
    with _exactly(folder) as fd:
        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if (found.st_dev, found.st_ino) == identity:
            os.unlink(name, dir_fd=fd)


def _connected_exactly(path: str) -> int:
    """Raises OSError."""
    with _exactly(path) as fd:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISSOCK(mode):
            number = errno.ELOOP if stat.S_ISLNK(mode) else errno.ECONNREFUSED
            raise OSError(number, os.strerror(number))
        return _connected(f"/proc/self/fd/{fd}")


def _connected(path: str) -> int:
    """Raises OSError."""
    try:
        return unix_sockets.connect_here(path).detach()
    except HostError as error:
        raise OSError(error.errno, "connect") from None


def _end(text: bytes) -> dict[str, Any]:
    """The end of a VM, with nothing in it but what is known. Raises ValueError."""
    import json

    said = json.loads(text)
    if not isinstance(said, dict) or type(said.get("exit_code")) not in (int, type(None)):
        raise ValueError
    kept = {key: said[key][:_MOST_TEXT] for key in _KEYS if isinstance(said.get(key), str)}
    return {"exit_code": said["exit_code"], **kept}


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
