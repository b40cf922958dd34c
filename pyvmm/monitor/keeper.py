"""The keeper of a monitor in a box: a process beside it that does what the monitor cannot.

It does these things, for one VM whose name it knows from before, and nothing else:

    b"log" + one byte       open the VM's log, which is begun anew if the byte is not 0
    b"del" + one byte + a number in four
                            remove the file with that number, if it is still the same
    b"con" + a number       connect to the socket that was announced as that one
    b"con" + two numbers    connect to the socket whose name is that file's, "_" and the second one

and in an emulated host, whose block devices and ports are all this VM's, where there is no log:

    b"plg" + a JSON list    make a node at its first text, below PLACE, for the block device whose
                            serial number is its second
    b"dev" + a path         open the block device or the port that is there

An answer is an error number in four bytes, and a descriptor where one is asked for. Files are
announced until the monitor is about to enter the box. Then the keeper is started, and knows all
that it ever will: these files, which group of processes to remove at the end, and the control
sockets at which it hears who comes before the monitor does (pyvmm.monitor.broker). Descriptors
that only have to stay open, such as a lock's, are its alone from then on.

It begins asleep, as a program of some hundred bytes (pyvmm.monitor.asleep), and becomes Python for
what that cannot do (pyvmm.monitor.awake). It has nothing else of the monitor's open than its socket
and these, and ends with it: what tells is a descriptor of its process, as somebody else may have
the other end of the socket by then.

Where the monitor becomes another user, the keeper is root, and the folder of a socket may be that
user's: what he makes a link of later is not followed for him.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import marshal
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Lock
from typing import TYPE_CHECKING

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import confinement, named_listener, unix_sockets
from pyvmm.host.named_listener import Identity
from pyvmm.host.syscalls import allow_descriptors
from pyvmm.host.unix_sockets import Socket
from pyvmm.monitor import asleep
from pyvmm.monitor.keeper_state import ANSWER, NOT_HEARD, REMOVE, State, begin

if TYPE_CHECKING:
    from pyvmm.host.other_user import OtherUser
    from pyvmm.monitor.cgroup import Group

AWAKE = 5.0  # seconds without anything to do, before it sleeps again
_WAKES = "pyvmm.monitor.awake"
_MOST_OPEN = 64 << 10  # descriptors, as far as the hard limit allows
_FIRST = 3  # of its descriptors, after the standard streams
_APART = 16  # numbers for what is opened meanwhile


class Keeper:
    """The monitor's end. Any thread may call it."""

    def __init__(
        self, place: str, name: str, *, user: OtherUser | None = None, is_inside: bool = False
    ) -> None:
        """The keeper of the VM `name`, which is started by `enter_box`; `place` is the folder of
        control sockets. The monitor is to become `user`, if there is one. `is_inside`: this is an
        emulated host."""
        self._place, self._name, self._user, self._is_inside = place, name, user, is_inside
        self._socket: _socket.socket | None = None
        self._lock = Lock()
        self._announced: dict[str, bool] = {}  # whether it is to be removed
        self._named: dict[str, int] = {}
        self._removable: dict[str, int] = {}
        self._group: tuple[str, ...] = ()
        self._held: list[int] = []
        self._doors: list[tuple[Socket, _socket.socket, bool]] = []
        self.pid = 0

    def announce(self, path: str, *, removes: bool = True) -> None:
        """`path` is a file that this VM is to remove, or to connect to. Before `enter_box`, or else
        OSError is raised."""
        self._check_believed()
        self._announced[os.path.abspath(path)] = removes

    def leave(self, group: Group) -> None:
        """This VM's group of processes goes when the monitor has ended. Before `enter_box`."""
        if group.places[1]:
            self._group = group.places

    def hold(self, fd: int) -> None:
        """Keep the descriptor `fd` open as long as the monitor is there, which has it no more after
        `enter_box`. Before that."""
        self._held.append(fd)

    def listen(self, listener: Socket, *, owner_only: bool) -> _socket.socket:
        """From `enter_box` on, connections to `listener` come by the socket that this returns, with
        `owner_only` those of other users do not. Before that, or else OSError is raised."""
        self._check_believed()
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._doors.append((listener, theirs, owner_only))
        return ours

    def _check_believed(self) -> None:
        if self._socket is not None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def enter_box(self) -> None:
        """Start the keeper, which does not believe us from then on. By the main thread, with which
        it ends. Raises ConfigError, HostError."""
        if not sys.executable:
            raise ConfigError(
                "a confined VM has a process beside it, and this Python does not say where its own "
                "program is (sys.executable)",
                cure="set it, or use --confine off",
            )
        theirs: list[int] = []
        try:
            ours, end = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
            theirs += end.detach(), *self._held
            self._start(theirs)
        except OSError as error:
            raise HostError(error.errno or 0, "start of the VM's keeper") from None
        finally:
            for fd in theirs:
                os.close(fd)
            for _, channel, _ in self._doors:
                channel.close()
        self._socket = ours

    def _start(self, theirs: list[int]) -> None:
        """Start it; descriptors that are its alone are added to `theirs`. Raises OSError."""
        alive = -1
        with suppress(OSError):  # a sandbox that knows none
            alive = os.pidfd_open(os.getpid())
            theirs.append(alive)
        there = [int(name) for name in os.listdir("/proc/self/fd")]
        files = list(self._files(theirs))
        lasting = [*theirs]
        for listener, channel, _ in self._doors:
            lasting += listener.fileno(), channel.fileno()
        numbers = {fd: at for at, fd in enumerate(lasting, _FIRST)}  # by ours
        state = State(
            place=self._place,
            name=self._name,
            user=None if self._user is None else (self._user.uid, self._user.gid),
            is_inside=self._is_inside,
            monitor=os.getpid(),
            awake=AWAKE,
            alive=numbers.get(alive, -1),
            socket=numbers[theirs[0]],
            module=_WAKES,
            packages=list(confinement.package_folders()),
            group=self._group,
            held=[numbers[fd] for fd in self._held],
            named=[(path, self._exactly(path)) for path in self._announced],
            files=[(numbers[folder], *more) for folder, *more in files],  # type: ignore[misc]
            doors=[
                (numbers[listener.fileno()], numbers[channel.fileno()], owner_only)
                for listener, channel, owner_only in self._doors
            ],
        )
        self._named = {path: number for number, path in enumerate(self._announced)}
        memory = asleep.memory("pyvmm-keeper-state", [(0, marshal.dumps(tuple(state)))])
        theirs.append(memory)
        numbers[memory] = _FIRST + len(numbers)
        # By way of numbers that nobody has, as some are both. exec closes no copies.
        above = max(*there, *numbers) + _APART
        copies = {fd: above + at for at, fd in enumerate(numbers)}
        inherited = (fd for fd in there if fd > max(numbers.values()) and _is_inherited(fd))
        actions = [
            *((os.POSIX_SPAWN_DUP2, *pair) for pair in copies.items()),
            *((os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(_FIRST)),
            *((os.POSIX_SPAWN_DUP2, copies[fd], number) for fd, number in numbers.items()),
            *((os.POSIX_SPAWN_CLOSE, fd) for fd in (*copies.values(), *inherited)),
        ]
        with _more_descriptors():
            with suppress(OSError, ValueError):  # then it is Python at once
                program = state.program(numbers[memory], begin(state))
                theirs.append(program)
                # Not one of its numbers.
                theirs.append(fcntl.fcntl(program, fcntl.F_DUPFD_CLOEXEC, above + len(copies)))
                path = f"/proc/self/fd/{theirs[-1]}"
                self.pid = self._spawn(path, [asleep.called(self._name)], actions)
                return
            python = state.python(numbers[memory], "first")
            self.pid = self._spawn(python[0], python, actions)

    @staticmethod
    def _spawn(path: str, arguments: list[str], actions: Sequence[object]) -> int:
        """Raises OSError."""
        # Signals are blocked until it is Python, which ignores them.
        return os.posix_spawn(
            path,
            arguments,
            os.environ,
            file_actions=actions,  # type: ignore[arg-type]
            setsigmask=NOT_HEARD,
        )

    def _files(self, folders: list[int]) -> Iterator[tuple[int, str, int, int]]:
        """Those that are there to be removed, as asleep.File has them. Their folders, each opened
        once, are added to `folders`. Raises OSError."""
        opened: dict[str, int] = {}
        number = 0
        for path, removes in self._announced.items():
            if not removes:
                continue
            folder, name = os.path.split(path)
            try:
                if folder not in opened:
                    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
                    opened[folder] = os.open(folder, flags)
                    folders.append(opened[folder])
                found = os.stat(name, dir_fd=opened[folder], follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                continue
            self._removable[path] = number
            number += 1
            yield opened[folder], name, found.st_dev, found.st_ino

    def _exactly(self, path: str) -> str:
        if self._user is None:
            return path
        folder, name = os.path.split(path)
        return os.path.join(os.path.realpath(folder), name)

    def remove(self, path: str, identity: Identity | None = None) -> None:
        """Remove a file that was announced, if it is still the same, or, before `enter_box`, any,
        if it has `identity`. Raises OSError."""
        if self._socket is None:
            named_listener.remove_here(path, identity)
            return
        path = os.path.abspath(path)
        if path not in self._announced:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        number = self._removable.get(path)
        if number is not None:
            self._ask(REMOVE.pack(b"del", number))

    def reach(self, path: str) -> Socket:
        """A connection to the socket of a host's program that a guest wants. Raises HostError."""
        if self._socket is None:
            return unix_sockets.connect_here(path)
        path = os.path.abspath(path)
        prefix, _, port = path.rpartition("_")
        if path in self._named:
            which = b"con%d" % self._named[path]
        elif prefix in self._named and port.isdecimal():
            which = b"con%d %d" % (self._named[prefix], int(port))
        else:
            raise HostError(errno.ECONNREFUSED, f"connect to {path}")
        try:
            return unix_sockets.adopt(self._ask(which))
        except OSError as error:
            raise HostError(error.errno or 0, f"connect to {path}") from None

    def plug(self, path: str, serial: str) -> None:
        """Make a node at `path` for the block device with that serial number. Raises OSError,
        ENOENT while there is none."""
        import json

        self._ask(b"plg" + json.dumps([path, serial]).encode())

    def open_device(self, path: str) -> int:
        """The block device or port at `path`, opened. Raises OSError."""
        return self._ask(b"dev" + os.fsencode(path))

    def open_log(self, rotate: bool) -> int:
        """See vm_log.open_log."""
        return self._ask(b"log%c" % rotate)

    def _ask(self, message: bytes) -> int:
        """The descriptor in the answer, or -1. Raises OSError."""
        if self._socket is None:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        with self._lock:
            self._socket.send(message)
            data, ancillary, _, _ = self._socket.recvmsg(
                ANSWER.size, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC
            )
        came = [ANSWER.unpack(content[:4])[0] for _, _, content in ancillary]
        failed = ANSWER.unpack(data)[0] if len(data) == ANSWER.size else errno.EPIPE
        if failed:
            raise OSError(failed, os.strerror(failed))
        return int(came[0]) if came else -1


@contextmanager
def _more_descriptors() -> Iterator[None]:
    """A keeper may have more than its monitor: to send one fails when all processes of this user
    together have as many on their way as the sender may have, and those of a monitor in a box must
    not be in the way of its keeper's."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_descriptors(_MOST_OPEN)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _is_inherited(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:  # it was closed meanwhile
        return False
