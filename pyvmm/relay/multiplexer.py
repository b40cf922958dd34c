"""One end of a relay: a thread that carries many sockets over one byte stream.

It never waits for one socket while another could go on, and it always takes what the stream brings:
credit bounds how much of that may wait for a slow socket. So two ends cannot wait for each other,
and what either can make the other keep is WINDOW bytes for each slot.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Event, Thread
from typing import NamedTuple

from pyvmm.errors import HostError
from pyvmm.host import unix_sockets
from pyvmm.host.log import RateLimited
from pyvmm.host.syscalls import EventFd
from pyvmm.host.unix_sockets import Socket
from pyvmm.relay.channel import Channel
from pyvmm.relay.frames import (
    CLOSE,
    CREDIT,
    DATA,
    EOF,
    MAX_NAME,
    OPEN,
    SLOTS,
    WINDOW,
    Decoder,
    Frame,
    Violation,
    encode,
)

OUTSIDE, INSIDE = 0, 1  # which half of the slots an end opens connections in

_CHUNK = 1 << 16
_LONGEST_LINE = 64 << 10  # that is waited for before it is decided whose a connection is
_ENOUGH = 256 << 10  # bytes that wait for the stream: sockets are not read before it took some
# More than that many can wait only if the other end makes work and does not take the answers.
_TOO_MUCH = 4 << 20
_NO_ROOM_SECONDS = 0.05
_ANSWER_SECONDS = 5.0
_LOOK_SECONDS = 0.005
_GONE = select.EPOLLHUP | select.EPOLLERR
_READ = select.EPOLLIN | _GONE

_Watched = dict[int, tuple[int, object]]  # by descriptor: epoll's events, and whose it is


class Listener(NamedTuple):
    """Connections to `socket` lead to whoever the other end finds under `name`; with `owner_only`
    those of other users are closed at once. At most `most` are there at a time; others wait.

    `take` sees what a connection says first: its first line with what has come behind it, or less
    if it has ended or says too much. It returns what the connection is to be given to, with that,
    in place of the other end, or None. Neither may wait."""

    socket: Socket
    name: str
    owner_only: bool = False
    take: Callable[[bytes], Callable[[Socket, bytes], None] | None] | None = None
    most: int = SLOTS


class _Undecided:
    """A connection that has not said a whole line yet."""

    def __init__(self, socket: Socket, listener: Listener, said: bytes = b"") -> None:
        self.socket = socket
        self.listener = listener
        self.said = bytearray(said)
        self.is_whole = b"\n" in said  # so that it can be decided whose it is

    def hear(self) -> None:
        """Take what it says next."""
        try:
            more = self.socket.recv(_LONGEST_LINE + 1 - len(self.said))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.said.clear()
            more = b""
        self.said += more
        self.is_whole = not more or b"\n" in more or len(self.said) > _LONGEST_LINE


class _Request:
    """A thread that wants to reach `name`, and waits for `answered`."""

    def __init__(self, name: bytes, socket: Socket) -> None:
        self.name = name
        self.socket = socket
        self.accepted = False
        self.answered = Event()


class Multiplexer:
    """Carries connections to `listeners` to the other end, and those of the other end to whoever
    `reach` finds.

    `reach` gets the name that the other end asked for, and returns a connected socket or raises
    HostError; it is called in the relay's thread and must not wait. `on_broken` is called once, in
    that thread, when the other end has broken the protocol: all connections are cut by then.
    """

    def __init__(
        self,
        stream: int,
        side: int,
        *,
        reach: Callable[[str], Socket],
        listeners: Sequence[Listener] = (),
        on_broken: Callable[[str], None] = lambda reason: None,
        hold: bool = False,
    ) -> None:
        """`stream` is a non-blocking descriptor, which stays the caller's. With `hold`, connections
        of the other end wait until `admit` is called. Raises HostError."""
        self._stream = stream
        self._own_slots = range(side * SLOTS, (side + 1) * SLOTS)
        self._reach = reach
        self._listeners = {listener.socket.fileno(): listener for listener in listeners}
        self._on_broken = on_broken
        self._out = bytearray()
        self._decoder = Decoder()
        self._channels: dict[int, Channel] = {}
        self._watched: _Watched = {}
        self._asked: deque[_Request] = deque()
        self._waiting: dict[int, _Request] = {}  # by slot
        self._held: dict[int, Frame] = {}  # by slot
        self._hold = hold
        self._wake = EventFd()
        self._ended = False
        self._no_room = False
        self._crowded = False  # a listener has all it may; one given away ends without a word here
        self._full = False  # which has been said
        self._log = RateLimited()
        self._stopping = False
        self._undecided: list[_Undecided] = []
        # What there is of listeners that may not have all slots, undecided ones apart.
        self._by_slot: dict[int, Listener] = {}
        self._given: list[tuple[Listener, Socket]] = []
        self._epoll = select.epoll()
        self._thread = Thread(target=self._main, name="socket-relay", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def admit(self) -> None:
        """Let connections of the other end in, those that waited first."""
        self._hold = False
        self._wake.signal()

    def wait_quiet(self, patience: float) -> None:
        """Return when all that this end's sockets have said is on the stream, and each of them has
        come to its end; after `patience` seconds in any case."""
        give_up_at = time.monotonic() + patience
        while time.monotonic() < give_up_at and not self._ended and not self._is_quiet():
            time.sleep(_LOOK_SECONDS)

    def _is_quiet(self) -> bool:
        channels = list(self._channels.values())
        done = all(channel.socket is None or channel.sent_eof for channel in channels)
        return done and not self._out

    def stop(self, patience: float = 0) -> None:
        """End all connections and the thread, `patience` seconds after the stream's end has come
        at the latest. The listeners stay open, and are the caller's."""
        if patience and self._thread.ident is not None:
            self._thread.join(patience)
        self._stopping = True
        self._wake.signal()
        if self._thread.ident is not None:
            self._thread.join()
        self._epoll.close()

    def connect(self, name: str) -> Socket:
        """A connection to whoever the other end reaches as `name`; any thread may ask.

        Raises HostError: ECONNREFUSED if it reached nobody, or there are as many as there may be;
        ETIMEDOUT if it does not answer.
        """
        wanted = os.fsencode(name)
        if not 1 <= len(wanted) <= MAX_NAME:
            raise HostError(errno.ENAMETOOLONG, "relay a connection")
        ours, theirs = unix_sockets.pair()
        request = _Request(wanted, theirs)
        self._asked.append(request)
        self._wake.signal()
        answered = not self._ended and request.answered.wait(_ANSWER_SECONDS)
        if request.accepted:
            return ours
        ours.close()
        number = errno.ECONNREFUSED if answered or self._ended else errno.ETIMEDOUT
        raise HostError(number, f"connection to {name}")

    def take_back(self, socket: Socket, name: str, said: bytes = b"") -> None:
        """`socket` is a connection that a listener to `name` has given away; what it says next,
        from `said` on, decides anew. Any thread may call it."""
        listener = next(one for one in self._listeners.values() if one.name == name)
        self._undecided.append(_Undecided(socket, listener, said))
        self._wake.signal()
        if self._ended:  # nobody would read from it
            socket.close()

    # --- the thread ------------------------------------------------------------------------------

    def _main(self) -> None:
        reason = ""
        try:
            while not self._stopping:
                self._step()
        except Violation as violation:
            reason = str(violation)
        except OSError as error:
            # The machine at the other end has gone, and all its connections with it.
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENODEV):
                reason = error.strerror or str(error)
        self._end()
        if reason:
            self._on_broken(reason)

    def _end(self) -> None:
        self._ended = True
        for channel in self._channels.values():
            channel.close()
        for request in (*self._waiting.values(), *self._asked):
            request.socket.close()
            request.answered.set()
        for undecided in self._undecided:
            undecided.socket.close()

    def _step(self) -> None:
        no_room, self._no_room = self._no_room, False
        self._watch_all(listen=not no_room)
        again = no_room or self._crowded
        for fd, events in self._epoll.poll(_NO_ROOM_SECONDS if again else -1):
            if fd == self._stream:
                if events & _READ:
                    self._receive()
            elif fd == self._wake.fd:
                self._wake.drain()
            elif fd in self._listeners:
                self._accept(self._listeners[fd])
            elif fd not in self._watched:
                self._look_anew()
                break
            elif isinstance(owner := self._watched[fd][1], Channel):
                self._serve(owner, events)
            elif isinstance(owner, _Undecided):
                owner.hear()
        for one in [one for one in self._undecided if one.is_whole]:
            self._decide(one)
        if not self._hold:
            self._answer_held()
        while self._asked:
            self._open_asked()
        self._send()
        # After that, so that what is left because there is enough goes on once the stream takes it.
        for channel in self._channels.values():
            while channel.said and channel.credit and len(self._out) < _ENOUGH:
                channel.send_said()
        for slot in [slot for slot, channel in self._channels.items() if channel.free]:
            del self._channels[slot]
            self._by_slot.pop(slot, None)

    def _look_anew(self) -> None:
        """Epoll tells of a socket that was closed: a child of ours, which has not become its
        program yet, has it too."""
        self._epoll.close()
        self._epoll = select.epoll()
        self._watched = {}

    def _watch_all(self, listen: bool) -> None:
        self._crowded = False
        stream_events = select.EPOLLIN | (select.EPOLLOUT if self._out else 0)
        wanted: _Watched = {
            self._wake.fd: (select.EPOLLIN, self),
            self._stream: (stream_events, self),
        }
        # A listener that cannot be served would be ready for ever: it is looked at again later.
        silent = len(self._undecided) >= len(self._own_slots)
        if listen and self._listeners and not silent and self._has_slot():
            for fd, listener in self._listeners.items():
                if self._has_room(listener):
                    wanted[fd] = select.EPOLLIN, self
                else:
                    self._crowded = True
        for one in self._undecided:
            if not one.is_whole:
                wanted[one.socket.fileno()] = _READ, one
        for channel in self._channels.values():
            events = self._events_of(channel)
            if channel.socket is not None and events is not None:
                wanted[channel.socket.fileno()] = events, channel
        for fd in self._watched.keys() - wanted.keys():
            with suppress(OSError):  # closed, and so forgotten
                self._epoll.unregister(fd)
        for fd, (events, owner) in wanted.items():
            before = self._watched.get(fd)
            # A number that has another owner now was closed, and epoll forgot it.
            if before is None or before[1] is not owner:
                self._epoll.register(fd, events)
            elif before[0] != events:
                self._epoll.modify(fd, events)
        self._watched = wanted

    def _events_of(self, channel: Channel) -> int | None:
        events = select.EPOLLOUT if channel.pending else 0
        if channel.wants_input and len(self._out) < _ENOUGH:
            events |= select.EPOLLIN
        # With no events it is watched for a hang-up, which ends it. Before its end of file was
        # seen, a hang-up would only be reported again and again.
        return events if events or channel.sent_eof else None

    def _serve(self, channel: Channel, events: int) -> None:
        if channel.pending and channel.socket is not None:
            channel.write()
        if channel.socket is None:
            return
        if channel.sent_eof:
            if events & _GONE:
                channel.drop_pending()
                channel.close_if_done()
        elif channel.wants_input and events & _READ and len(self._out) < _ENOUGH:
            channel.read(hung_up=bool(events & select.EPOLLHUP))

    # --- the stream ------------------------------------------------------------------------------

    def _send(self) -> None:
        while self._out:
            try:
                del self._out[: os.write(self._stream, self._out[:_CHUNK])]
            except (BlockingIOError, InterruptedError):
                break
        if len(self._out) > _TOO_MUCH:
            raise Violation("answers that nobody takes")

    def _receive(self) -> None:
        try:
            data = os.read(self._stream, _CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        if not data:
            raise OSError(errno.EPIPE, "the relay's other end has gone")
        for frame in self._decoder.feed(data):
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        channel = self._channels.get(frame.slot)
        if frame.type == OPEN:
            if channel is not None and channel.free:
                channel = None
            if channel is not None or frame.slot in self._own_slots:
                raise Violation(f"slot {frame.slot} opened, which is not its to open")
            if frame.slot in self._held:
                raise Violation(f"slot {frame.slot} opened twice")
            self._held[frame.slot] = frame
            return
        if channel is None or channel.got_close:
            raise Violation(f"a frame of type {frame.type} in slot {frame.slot}, which is closed")
        if frame.type == DATA:
            channel.receive_data(frame.data)
        elif frame.type == CREDIT:
            channel.receive_credit(frame.value)
            self._settle(frame.slot, True)
        elif frame.type == EOF:
            channel.receive_eof()
        else:
            assert frame.type == CLOSE
            if frame.slot in self._waiting:
                channel.close()
                self._settle(frame.slot, False)
            channel.receive_close()

    def _answer_held(self) -> None:
        for slot, frame in list(self._held.items()):
            try:
                socket = self._reach(os.fsdecode(frame.data))
            except HostError as error:
                if error.errno == errno.EAGAIN:  # as many wait there as may: try again
                    self._no_room = True
                    continue
                channel = Channel(slot, None, self._out, credit=0)
                channel.close()
            else:
                channel = Channel(slot, socket, self._out, credit=WINDOW)
                self._out += encode(CREDIT, slot, WINDOW)
            del self._held[slot]
            self._channels[slot] = channel

    # --- connections of this end -----------------------------------------------------------------

    def _free_slot(self) -> int | None:
        return next((slot for slot in self._own_slots if slot not in self._channels), None)

    def _has_slot(self) -> bool:
        """True if a connection may be opened; when that ends, it is said."""
        full = self._free_slot() is None
        if full and not self._full:
            many = len(self._own_slots)
            self._log(f"{many} connections across the emulated KVM host at once; others wait")
        self._full = full
        return not full

    def _has_room(self, listener: Listener) -> bool:
        if listener.most >= len(self._own_slots):
            return True
        back = [one.socket for one in self._undecided if one.listener is listener]
        self._given = [one for one in self._given if one[1].fileno() >= 0 and one[1] not in back]
        count = len(back) + sum(one is listener for one, _ in self._given)
        return count + sum(one is listener for one in self._by_slot.values()) < listener.most

    def _accept(self, listener: Listener) -> None:
        slot = self._free_slot()
        if slot is None:
            return
        try:
            socket = unix_sockets.accept(listener.socket)
            if socket is not None and listener.owner_only and not unix_sockets.is_ours(socket):
                socket.close()
                return
        except HostError:
            self._no_room = True  # no more descriptors, for now
            return
        if socket is None:
            return
        if listener.take is None:
            self._open_from(listener, slot, socket)
        else:
            self._undecided.append(_Undecided(socket, listener))

    def _decide(self, one: _Undecided) -> None:
        """The owner of the connection, now that it has said something, or ended."""
        assert one.listener.take is not None
        slot = self._free_slot()
        if one.said and slot is None:
            self._no_room = True
            return
        self._undecided.remove(one)
        # Whoever is given it may give it back before the next look: epoll then takes it as new.
        fd = one.socket.fileno()
        if fd in self._watched:
            self._epoll.unregister(fd)
            del self._watched[fd]
        left = (given for given in self._given if given[1] is not one.socket)
        self._given = [given for given in left if given[1].fileno() >= 0]
        said = bytes(one.said)
        give = one.listener.take(said) if said else None
        if give is not None:
            self._given.append((one.listener, one.socket))
            give(one.socket, said)
        elif said and slot is not None:
            self._open_from(one.listener, slot, one.socket, said)
        else:
            one.socket.close()

    def _open_from(self, listener: Listener, slot: int, socket: Socket, said: bytes = b"") -> None:
        self._by_slot[slot] = listener
        self._open(slot, socket, os.fsencode(listener.name), said)

    def _open_asked(self) -> None:
        """Open what was asked for; without a slot it is refused, as whoever asked may have other
        connections to serve meanwhile."""
        request = self._asked.popleft()
        slot = self._free_slot() if self._has_slot() else None
        if slot is None:
            request.socket.close()
            request.answered.set()
            return
        self._waiting[slot] = request
        self._open(slot, request.socket, request.name)

    def _open(self, slot: int, socket: Socket, name: bytes, said: bytes = b"") -> None:
        self._channels[slot] = Channel(slot, socket, self._out, credit=0, said=said)
        self._out += encode(OPEN, slot, data=name)

    def _settle(self, slot: int, accepted: bool) -> None:
        """Tell whoever asked for the connection in `slot` whether it is open."""
        request = self._waiting.pop(slot, None)
        if request is not None:
            request.accepted = accepted
            request.answered.set()
