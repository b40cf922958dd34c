"""Serving a device at a socket: one front end at a time, each in a process of its own.

A process each, because a front end can do what no check prevents: truncate the memory that it
lent, at which an access of ours raises SIGBUS, or lend memory whose pages never come. It then costs
itself its connection, and the next one finds the device as new. Memory, threads and file
descriptors cannot leak from one to the next either.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from pyvmm.errors import PyvmmError
from pyvmm.host import parent, unix_sockets
from pyvmm.host.log import RateLimited, Sink
from pyvmm.host.named_listener import NamedListener
from pyvmm.host.syscalls import Closable
from pyvmm.host.unix_sockets import Socket
from pyvmm.transport.vhost_user.back_end import BackEnd
from pyvmm.vhost_user.channel import Channel
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.lifecycle import Trace

Opener = Callable[[], AbstractContextManager[VirtioDevice]]
"""Opens a device, which is closed with the context. Raises ConfigError, HostError."""

_ENDING = (signal.SIGTERM, signal.SIGINT)
_NO_ROOM_SECONDS = 0.2
_REFUSED, _DEFECT = 1, 70  # a child's exit codes; the latter is EX_SOFTWARE
GRACE = 30  # seconds for a connection's process to finish its I/O once the front end has gone


def serve(device: VirtioDevice, path: str, *, trace: Trace | None = None) -> None:
    """Serve `device` to vhost-user front ends that connect to the Unix socket `path`, for ever.

    One front end is served at a time, by a child process with the device as it is now: files that
    the device has open are shared with it, threads are not, so it should have none yet. Returns
    when the process is asked to end by SIGTERM or SIGINT (call it from the main thread). The socket
    is for its owner only; who wants a front end of another user changes its mode or group. Raises
    ConfigError for a path where nothing can listen, HostError.
    """
    serve_each(lambda: contextlib.nullcontext(device), path, trace=trace)


def serve_each(open_device: Opener, path: str, *, trace: Trace | None = None) -> None:
    """The same with a device for each front end, for one whose other side cannot be shared by two
    processes one after the other: a stream in which the first stopped anywhere, say.

    The first is opened at once, each further one when a front end has left, and closed with the
    context. Raises what opening the first raises, ConfigError, HostError.
    """
    with contextlib.ExitStack() as current:
        first = current.enter_context(open_device())
        device: VirtioDevice | None = first
        log = RateLimited(prefix=f"{first.name}: ")
        with NamedListener(path, option="--socket") as listener, _Ended() as ended:
            log(f"waiting for a vhost-user front end at {path}")
            while ended.sleep((listener.socket, select.POLLIN)):
                try:
                    waiting = unix_sockets.accept(listener.socket)
                    if waiting is None:
                        continue  # it has gone again
                    with socket.socket(fileno=waiting.detach()) as connection:
                        connection.setblocking(True)
                        if device is None:
                            device = current.enter_context(open_device())
                        _serve_in_child(device, connection, listener, ended, log, trace)
                    device = None
                    current.close()
                    device = current.enter_context(open_device())
                except (PyvmmError, OSError) as error:
                    # No descriptor, memory or process for it, for now; others may have more luck.
                    log(f"a front end cannot be served: {error}")
                    time.sleep(_NO_ROOM_SECONDS)


def serve_connection(
    device: VirtioDevice,
    connection: socket.socket,
    *,
    log: Sink | None = None,
    trace: Trace | None = None,
) -> None:
    """Serve one front end until it goes, in this process and thread.

    For a socket that was come by otherwise. A front end that truncates its memory ends the process
    by SIGBUS. Raises FrontEndError for one that broke the protocol, HostError.
    """
    channel = Channel(connection)
    back_end = BackEnd(device, trace=trace, **({} if log is None else {"log": log}))
    try:
        while True:
            message = channel.receive()
            if message is None:
                return
            with message:
                reply = back_end.handle(message)
            if reply is not None and not channel.reply(message.request, *reply):
                return
    finally:
        back_end.close()


def _serve_in_child(
    device: VirtioDevice,
    connection: socket.socket,
    listener: NamedListener,
    ended: _Ended,
    log: RateLimited,
    trace: Trace | None,
) -> None:
    log(f"front end connected (PID {unix_sockets.peer(connection).pid})")
    own_pid = os.getpid()
    # A child would take a signal that comes before its own handlers are there as its parent does.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        child = os.fork()
    finally:
        if os.getpid() == own_pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if child == 0:
        code = _DEFECT
        try:
            # Else it would hold the image's lock, and the front end, against whoever follows us.
            parent.end_with(own_pid)
            listener.socket.close()  # without its name, which is the parent's to remove
            for number in _ENDING:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            serve_connection(device, connection, trace=trace)
            code = 0
        except PyvmmError as error:
            log(f"connection given up: {error}")
            code = _REFUSED
        except Exception as error:
            log(f"a defect in pyvmm: {type(error).__name__}: {error}")
        finally:
            os._exit(code)
    log(_ending(_await_child(child, connection, ended)))


def _await_child(child: int, connection: socket.socket, ended: _Ended) -> int:
    """Its wait status, once it has ended: by itself, or because it was told to."""
    try:
        pidfd = os.pidfd_open(child)
    except OSError:  # two that nobody watches could be at work on one image
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    try:
        if not ended.sleep((pidfd, select.POLLIN), (connection, select.POLLRDHUP)):
            os.kill(child, signal.SIGTERM)
        # The front end has gone, or the child has, or is about to.
        alone = select.poll()
        alone.register(pidfd, select.POLLIN)
        if not alone.poll(GRACE * 1000):
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(pidfd)
    return os.waitpid(child, 0)[1]


def _ending(wait_status: int) -> str:
    if os.WIFSIGNALED(wait_status):
        number = os.WTERMSIG(wait_status)
        if number == signal.SIGBUS:
            return "connection given up: the front end took memory away that it had lent"
        return f"connection ended by {signal.Signals(number).name}"
    return "front end disconnected" if os.WEXITSTATUS(wait_status) == 0 else "ready for another"


class _Ended(Closable):
    """True from the first signal on that ends the process."""

    def __init__(self) -> None:
        self._signalled = False
        # A handler of Python's runs between two of its instructions. The signal may come just
        # before a sleep begins, or to another thread, and then there is none for now.
        self._woken, self._wakes = socket.socketpair()
        self._woken.setblocking(False)
        self._wakes.setblocking(False)
        self._wakes_before = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in _ENDING}

    def _note(self, *_: object) -> None:
        self._signalled = True

    def close(self) -> None:
        """Signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakes_before)
        self._woken.close()
        self._wakes.close()

    def sleep(self, *until: tuple[Socket | socket.socket | int, int]) -> bool:
        """Wait for one of these files, each with the events that count; False once the process is
        to end."""
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        for file, events in until:
            poll.register(file, events)
        while not self._signalled:
            happened = {fd for fd, _ in poll.poll()}
            if happened != {self._woken.fileno()}:
                break
            self._woken.recv(64)
        return not self._signalled
