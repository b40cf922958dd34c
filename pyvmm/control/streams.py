"""Connections that have become streams (protocol.Upgrade): a console's watchers, who hears events.

One thread serves them all. It keeps bytes for each of them up to a limit and no further, so that a
client that does not read holds up neither the others nor the guest.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from threading import Lock, Thread

from pyvmm.errors import ConfigError
from pyvmm.host.syscalls import Closable, EventFd
from pyvmm.host.unix_sockets import Socket

MAX_STREAMS = 32
OUTPUT_LIMIT = 256 << 10  # bytes that wait for one that does not read

_CHUNK = 4096
_INPUT_LIMIT = 16 << 10  # bytes of one that nobody takes; then it is not read any further
_GONE = select.EPOLLHUP | select.EPOLLERR

Take = Callable[[bytes], int]


class Stream:
    """One connection. `take` gets what comes in and says how many bytes of it were taken; of the
    rest it is asked again after `resume`. None throws away what comes in."""

    def __init__(self, socket: Socket, wake: Callable[[], None], take: Take | None) -> None:
        self.socket = socket
        self.received = bytearray()
        self.on_end: Callable[[], None] = lambda: None
        self._take = take
        self._wake = wake
        self._lock = Lock()
        self._outgoing = bytearray()
        self._deaf = False
        self._try_again = False
        self._at_end = False  # of what comes in

    def offer(self, data: bytes) -> bool:
        """Send `data` after the bytes that wait; False, without sending it, if too many wait. Any
        thread may call it."""
        with self._lock:
            if self._deaf or len(self._outgoing) + len(data) > OUTPUT_LIMIT:
                return False
            self._outgoing += data
        self._wake()
        return True

    def resume(self) -> None:
        """`take` may be asked again. Any thread may call it."""
        self._try_again = True
        self._wake()

    # --- the thread of Streams -------------------------------------------------------------------

    @property
    def events(self) -> int:
        """The events that epoll is to watch for, beside a hang-up."""
        wanted = 0
        if self._outgoing:
            wanted |= select.EPOLLOUT
        if not self._at_end and len(self.received) < _INPUT_LIMIT:
            wanted |= select.EPOLLIN
        return wanted

    @property
    def empty(self) -> bool:
        """True if nothing waits to be sent."""
        return not self._outgoing

    def receive(self) -> bool:
        """Read what has come; False if the connection has failed."""
        try:
            data = self.socket.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        self._at_end = not data
        self.received += data
        self._try_again = True
        return True

    def deliver(self) -> None:
        """Give away what was received, if anything says that it may be taken now."""
        if not self._try_again:
            return
        self._try_again = False
        if self._take is None:
            self.received.clear()
        elif self.received:
            del self.received[: self._take(bytes(self.received))]

    def send(self) -> bool:
        """Send what is waiting as far as there is room; False if nobody takes it any more."""
        with self._lock:
            try:
                while self._outgoing:
                    del self._outgoing[: self.socket.send(self._outgoing)]
            except (BlockingIOError, InterruptedError):
                return True
            except OSError:
                return False
        return True

    def close(self) -> None:
        """Nothing is sent any more."""
        with self._lock:
            self._deaf = True
            self._outgoing.clear()
        self.on_end()
        self.socket.close()


class Streams(Closable):
    """The thread that serves the streams; it starts with the first one."""

    def __init__(self) -> None:
        """Raises HostError."""
        self._streams: dict[int, Stream] = {}
        self._new: list[Stream] = []
        self._lock = Lock()
        self._wake = EventFd()
        self._finish_by: float | None = None
        self._thread: Thread | None = None

    def check_room(self) -> None:
        """Raise ConfigError if there are as many streams as there may be."""
        if len(self._streams) + len(self._new) >= MAX_STREAMS:
            raise ConfigError(f"{MAX_STREAMS} look at this VM already", cure="end one of them")

    def make(self, socket: Socket, take: Take | None = None) -> Stream:
        """A stream over `socket`, to be given to `add`. The socket is the stream's."""
        return Stream(socket, self._signal, take)

    def add(self, stream: Stream, received: bytes = b"") -> None:
        """Serve `stream` from now on, which has sent `received` already."""
        stream.received += received
        with self._lock:
            ending = self._finish_by is not None
            if not ending:
                self._new.append(stream)
            if not ending and self._thread is None:
                self._thread = Thread(target=self._run, name="streams", daemon=True)
                self._thread.start()
        if ending:
            stream.close()
        else:
            stream.resume()

    def close(self, patience: float = 1.0) -> None:
        """Send what is waiting, to those who take it within `patience` seconds; then end all."""
        with self._lock:
            if self._finish_by is not None:
                return
            self._finish_by = time.monotonic() + patience
            thread = self._thread
        self._signal()
        if thread is not None:
            thread.join()
        with self._lock:
            self._wake.close()

    def _signal(self) -> None:
        with self._lock:  # not while `close` gives the number back for another file
            if self._wake.fd >= 0:
                self._wake.signal()

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        with select.epoll() as epoll:
            epoll.register(self._wake.fd, select.EPOLLIN)
            watched: dict[int, int] = {}
            while not self._finished():
                # In this order: what somebody asked for before the counter was drained is seen now.
                self._take_new()
                for stream in self._streams.values():
                    stream.deliver()
                self._watch(epoll, watched)
                for fd, events in epoll.poll(self._timeout()):
                    if fd == self._wake.fd:
                        self._wake.drain()
                    elif not _serve(self._streams[fd], events):
                        self._drop(epoll, fd, watched)
        for stream in (*self._streams.values(), *self._new):
            stream.close()

    def _finished(self) -> bool:
        if self._finish_by is None:
            return False
        with self._lock:
            all_sent = not self._new and all(stream.empty for stream in self._streams.values())
        return all_sent or time.monotonic() >= self._finish_by

    def _timeout(self) -> float | None:
        if self._finish_by is None:
            return None
        return max(0.0, self._finish_by - time.monotonic())

    def _take_new(self) -> None:
        with self._lock:
            for stream in self._new:
                self._streams[stream.socket.fileno()] = stream
            self._new.clear()

    def _watch(self, epoll: select.epoll, watched: dict[int, int]) -> None:
        for fd, stream in self._streams.items():
            events = stream.events
            if fd not in watched:
                epoll.register(fd, events)
            elif watched[fd] != events:
                epoll.modify(fd, events)
            watched[fd] = events

    def _drop(self, epoll: select.epoll, fd: int, watched: dict[int, int]) -> None:
        epoll.unregister(fd)
        del watched[fd]
        self._streams.pop(fd).close()


def _serve(stream: Stream, events: int) -> bool:
    if events & select.EPOLLIN and not stream.receive():
        return False
    if events & select.EPOLLOUT and not stream.send():
        return False
    return not events & _GONE or bool(events & select.EPOLLIN)
