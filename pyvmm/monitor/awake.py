"""A keeper that is awake: Python, which serves the monitor and hears its clients, until it has had
nothing to do for some seconds. pyvmm.monitor.keeper is the monitor's end, and says what it can be
asked for."""

from __future__ import annotations

import _socket
import errno
import marshal
import os
import select
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from pyvmm.control import vm_log
from pyvmm.errors import HostError
from pyvmm.host import confinement, unix_sockets
from pyvmm.monitor.keeper_state import ANSWER, NOT_HEARD, REMOVE, State, begin

if TYPE_CHECKING:
    from pyvmm.monitor.broker import Broker

_MOST = 64 << 10  # bytes of a message
_LOOK_EVERY = 1.0  # seconds


def main(arguments: list[str]) -> NoReturn:
    """Go on with what is in the file that is the descriptor arguments[0], or begin."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or nobody could wait for children
        for number in NOT_HEARD:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        memory = int(arguments[0])
        state = State(*marshal.loads(os.pread(memory, os.fstat(memory).st_size, 0)))
        sys.path += state.packages
        if is_first := "first" in arguments[2:]:
            for call in begin(state):
                confinement.make_call(call)
        # To wake up takes an emulated processor seconds.
        sleeps = not is_first and not state.is_inside
        serving = Serving(state, memory, sleeps=sleeps)
        serving.run()
        serving.end()
    finally:
        os._exit(0)


class _Gone(BaseException):
    """The monitor has ended."""


class Serving:
    def __init__(self, state: State, memory: int, *, sleeps: bool) -> None:
        """`state` is in the file `memory`. Raises OSError, ValueError, TypeError for what it does
        not know."""
        self._state = state
        self._memory = memory
        self._sleeps = sleeps
        self._socket = _socket.socket(fileno=state.socket)
        self._epoll = select.epoll()
        for fd in (self._socket.fileno(), state.alive):
            if fd >= 0:
                self._epoll.register(fd, select.EPOLLIN)
        self._is_over = False
        self._broker = self._hear_clients() if state.doors else None
        self._let_inherit(False)

    def _hear_clients(self) -> Broker:
        from pyvmm.monitor.broker import Broker, Door

        user = None
        if self._state.user is not None:
            from pyvmm.host.other_user import OtherUser

            user = OtherUser(self._state.user[0], self._state.user[1])
        broker = Broker(self._state.monitor, self._epoll, user, self._given())
        for listener, channel, owner_only in self._state.doors:
            door = Door(unix_sockets.adopt(listener), _socket.socket(fileno=channel), owner_only)
            broker.add(door)
        broker.begin()
        for place, (listener, _, _) in zip(self._state.places(), self._state.doors, strict=True):
            with suppress(OSError):  # nobody is there
                os.set_inheritable(place, False)
                broker.go_on(place, listener)
        return broker

    def run(self) -> None:
        """Serve until the monitor has ended."""
        try:
            self._look_after_monitor(True)
            self._serve()
            self._is_over = True
        except _Gone:
            pass

    def _look_after_monitor(self, looks: bool) -> None:
        """Whoever has a listener too can have us wait in accept(2)."""
        signal.signal(signal.SIGALRM, self._look)
        seconds = _LOOK_EVERY if looks else 0.0
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)

    def _look(self, number: int, frame: FrameType | None) -> None:
        if not self._is_over and self._has_gone():
            self._is_over = True
            raise _Gone

    def _has_gone(self) -> bool:
        poll = select.poll()
        poll.register(self._socket.fileno(), 0)
        if self._state.alive >= 0:
            poll.register(self._state.alive, select.POLLIN)
        return bool(poll.poll(0))

    def _serve(self) -> None:
        while self._wait():
            try:
                message = self._socket.recv(_MOST)
            except ConnectionResetError:  # an answer was not read; what was asked is still there
                continue
            if not message:
                return
            fd, failed = -1, 0
            try:
                fd = self._do(message[:3], message[3:])
            except OSError as error:
                failed = error.errno or errno.EIO
            except (ValueError, TypeError, IndexError, RecursionError):
                failed = errno.EINVAL
            with suppress(ConnectionError):  # nobody hears it any more
                self._answer(failed, fd)
            if fd >= 0:
                os.close(fd)

    def _answer(self, failed: int, fd: int) -> None:
        """Raises ConnectionError."""
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, ANSWER.pack(fd))] if fd >= 0 else []
        try:
            self._socket.sendmsg([ANSWER.pack(failed)], rights)
        except ConnectionError:
            raise
        except OSError as error:  # ETOOMANYREFS
            self._socket.sendmsg([ANSWER.pack(error.errno or errno.EIO)])

    def end(self) -> None:
        """The monitor has ended."""
        if self._state.group:
            from pyvmm.monitor import cgroup

            os.closerange(0, os.sysconf("SC_OPEN_MAX"))
            cgroup.leave_last(*self._state.group)

    def _wait(self) -> bool:
        """Wait for the monitor, and hear clients meanwhile; False if it has ended, and has said all
        that it had to."""
        while True:
            is_idle = self._broker is None or self._broker.is_idle
            patience = self._state.awake if self._sleeps and is_idle else None
            ready = [fd for fd, _ in self._epoll.poll(patience)]
            if self._socket.fileno() in ready:
                return True
            if self._state.alive in ready:
                return False
            if not ready:
                self._sleep()
            elif self._broker is not None:
                for fd in ready:
                    self._broker.serve(fd)

    def _given(self) -> str:
        from pyvmm.control import registry

        return registry.given_at(os.path.join(self._state.place, self._state.name))

    def _sleep(self) -> None:
        """Become what waits without Python; this returns where that cannot be."""
        from pyvmm.monitor import asleep

        self._sleeps = False
        self._look_after_monitor(False)
        with suppress(OSError, ValueError):
            program = self._state.program(self._memory)
            self._let_inherit(True)
            asleep.become(program, self._state.name)
        self._let_inherit(False)
        self._look_after_monitor(True)

    def _let_inherit(self, inheritable: bool) -> None:
        for fd in (*self._state.lasting(), self._memory):
            os.set_inheritable(fd, inheritable)

    def _do(self, what: bytes, rest: bytes) -> int:
        """The descriptor to answer with, or -1. Raises OSError, ValueError, IndexError."""
        state = self._state
        if state.is_inside and what in (b"plg", b"dev"):
            from pyvmm.monitor import nodes_inside

            return nodes_inside.serve(what, rest)
        if what == b"log" and not state.is_inside:
            return vm_log.open_log(state.place, state.name, rest != b"\0")
        if what == b"del" and len(rest) == REMOVE.size - 3:
            _, number = REMOVE.unpack(what + rest)
            _remove(*state.files[number])
            return -1
        if what == b"con":
            number, *port = map(int, rest.split())
            suffix = "".join(f"_{one}" for one in port[:1])
            path, exactly = state.named[number]
            if state.user is not None:
                return _connected_exactly(exactly + suffix)
            return _connected(path + suffix)
        raise ValueError


def _remove(folder: int, name: str, device: int, inode: int) -> None:
    """Remove that file in the folder with that descriptor, if it is still the same. Raises
    OSError."""
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if (found.st_dev, found.st_ino) == (device, inode):
        os.unlink(name, dir_fd=folder)


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
