"""The monitor's end of its control socket: one thread, which clients cannot keep busy for ever.

It serves one request of a client at a time, and reads the next when the answer is out; so it keeps
one line and one answer for each. Answers are paced, so that clients who ask all the time
leave the processor to the guest; so are those who come in by a door that is for others, too.
"""

from __future__ import annotations

import _socket
import errno
import os
import resource
import select
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import Any

from pyvmm.control.doors import MAX_CLIENTS, Door
from pyvmm.control.protocol import (
    BAD_REQUEST,
    BUSY,
    FAILED,
    FORBIDDEN,
    MAX_LINE,
    REFUSED,
    UNKNOWN_METHOD,
    ControlError,
    Later,
    Method,
    Request,
    Upgrade,
    check_params,
    error_line,
    parse_request,
    result_line,
)
from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.host import log, unix_sockets
from pyvmm.host.handed import MOST, Descriptors
from pyvmm.host.syscalls import EventFd
from pyvmm.host.unix_sockets import Socket
from pyvmm.spec.surroundings import EXEC, RIGHTS

# Of the connections that have become others (Upgrade) so many may be from doors for more than their
# owner, who is to find room among the streams (pyvmm.control.streams) all the same.
MAX_HANDED = 16
_PACE = 0.002  # seconds between two rounds of answers
_NO_ROOM_SECONDS = 0.2


class _Client:
    """One connection: what came and is not a whole line yet, what is to go out."""

    def __init__(self, socket: Socket, door: Door) -> None:
        self.socket = socket
        self.door = door
        self.received = bytearray()
        self.to_send = b""
        self.ending = False  # once `to_send` is out
        self.upgrade: Upgrade | None = None
        self.waits: Later | None = None  # for an answer that takes its time
        # That came with what was received, by the number of lines in it before theirs.
        self.descriptors: dict[int, Descriptors] = {}

    def give_back(self) -> None:
        """Close all descriptors that have come and wait for their line."""
        for of_line in self.descriptors.values():
            of_line.close()

    @property
    def has_line(self) -> bool:
        busy = self.to_send or self.ending or self.waits is not None
        return not busy and b"\n" in self.received


def answered(id: int | str | None, find: Callable[[], Any]) -> bytes:
    """The answer that `find` returns or raises; none if it comes later."""
    try:
        result = find()
        return b"" if isinstance(result, Later) else result_line(id, result)
    except ControlError as error:
        return error_line(id, error.code, str(error))
    except ConfigError as error:
        return error_line(id, REFUSED, str(error))
    except PyvmmError as error:
        return error_line(id, FAILED, str(error))
    except Exception as error:
        log.to_stderr(f"a defect in pyvmm, met by a control request: {error!r}")
        return error_line(id, FAILED, f"a defect in pyvmm: {error!r}")


class ControlServer:
    """Answers requests at doors. Connections of other users are closed at once, unless a door says
    otherwise.

    `close` lets answers that are ready go out.
    """

    def __init__(
        self,
        listener: Socket | Door,
        find: Callable[[str], Method | None],
        doors: Iterable[Door] = (),
    ) -> None:
        """`find` gives the method of a name, None if there is none. `listener` is a door for who
        has all rights, beside `doors`. Their sockets stay the caller's. Raises HostError."""
        first = listener if isinstance(listener, Door) else Door(listener)
        self._doors = {(door.passes or door.socket).fileno(): door for door in (first, *doors)}
        self._find = find
        self._clients: dict[int, _Client] = {}
        self._handed: list[tuple[Door, Socket]] = []  # over, from doors for more than their owner
        self._wake = EventFd()
        self._spare = -1  # a descriptor that makes room for who is told that there is none
        self._has_spare()
        self._late: deque[tuple[_Client, bytes]] = deque()  # answers that took their time
        self._at_work = 0  # threads that make such answers
        self._stopping = False
        self._epoll = select.epoll()
        self._epoll.register(self._wake.fd, select.EPOLLIN)
        for fd in self._doors:
            self._epoll.register(fd, select.EPOLLIN)
        self._thread = Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        """Start answering, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread and all connections; the method that is running still ends."""
        if self._wake.fd < 0:
            return
        self._stopping = True
        self._wake.signal()
        if self._thread.ident is not None:
            self._thread.join()
        self._epoll.close()
        self._wake.close()
        self._give_spare()

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            self._step()
        self._take_late()
        for client in list(self._clients.values()):
            self._send(client)
            self._drop(client)

    def _step(self) -> None:
        self._take_late()
        waiting = any(client.has_line for client in self._clients.values())
        paced = False
        for fd, events in self._epoll.poll(0 if waiting else -1):
            if (door := self._doors.get(fd)) is not None:
                if fd == door.socket.fileno():
                    self._accept(door)
                else:
                    self._take_passed(fd, door)
                # Whoever only comes and goes, again and again, is paced as who asks.
                paced |= not door.owner_only
            elif fd == self._wake.fd:
                if not self._stopping:
                    self._wake.drain()
            elif (client := self._clients.get(fd)) is not None:
                if events & select.EPOLLOUT:
                    self._send(client)
                if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                    self._receive(client)
        ready = [client for client in self._clients.values() if client.has_line]
        for client in ready:
            self._answer_one(client)
        for client in list(self._clients.values()):
            self._watch(client)
        if ready or paced:
            time.sleep(_PACE)

    def _take_late(self) -> None:
        while self._late:
            client, answer = self._late.popleft()
            self._at_work -= 1
            if self._clients.get(client.socket.fileno()) is client:
                client.waits = None
                client.to_send = answer
                self._send(client)
                self._watch(client)

    def _watch(self, client: _Client) -> None:
        if client.to_send:
            events = select.EPOLLOUT
        elif client.ending:
            self._drop(client)
            return
        elif client.upgrade is not None:
            self._hand_over(client, client.upgrade)
            return
        else:
            # With a whole line there, no more is read: that line comes first.
            events = 0 if client.has_line or client.waits is not None else select.EPOLLIN
        self._epoll.modify(client.socket.fileno(), events)

    def _accept(self, door: Door) -> None:
        self._give_spare()
        try:
            socket = unix_sockets.accept(door.socket)
        except HostError:  # no more file descriptors, and no spare one
            time.sleep(_NO_ROOM_SECONDS)
            return
        finally:
            has_room = self._has_spare()
        if socket is not None:
            self._let_in(door, socket, has_room)

    def _give_spare(self) -> None:
        spare, self._spare = self._spare, -1
        if spare >= 0:
            os.close(spare)

    def _has_spare(self) -> bool:
        """Whether there is one, which is made if need be."""
        if self._spare < 0:
            with suppress(OSError):
                self._spare = os.dup(self._wake.fd)
        return self._spare >= 0

    def _take_passed(self, fd: int, door: Door) -> None:
        """The next connection that somebody else has accepted for us."""
        assert door.passes is not None
        data, fds, has_all = b"", list[int](), True
        self._give_spare()
        with suppress(BlockingIOError, InterruptedError):
            try:
                data, fds, has_all = _with_descriptors(door.passes, MAX_LINE + 2)
            except BlockingIOError:
                raise
            except OSError:
                pass
            if not data:  # nobody does any more
                self._epoll.unregister(fd)
                self._doors[door.socket.fileno()] = self._doors.pop(fd)
                self._epoll.register(door.socket.fileno(), select.EPOLLIN)
        has_room = self._has_spare()
        if fds:
            client = self._let_in(door, unix_sockets.adopt(fds.pop(0)), has_room)
            if client is not None:
                if not self._take(client, data[1:], fds, has_all):
                    self._drop(client)
                return
        Descriptors(fds).close()

    def _let_in(self, door: Door, socket: Socket, has_room: bool) -> _Client | None:
        try:
            if door.owner_only and not unix_sockets.is_ours(socket):
                socket.close()
                return None
            if not has_room:
                socket.send(error_line(None, BUSY, _no_room()))
                socket.close()
                self._has_spare()
                return None
            at_door = sum(one.door is door for one in self._clients.values())
            if at_door + sum(one is door for one, _ in self._still_handed()) >= door.most:
                socket.send(error_line(None, BUSY, f"there are {door.most} clients already"))
                socket.close()
                return None
        except (OSError, HostError):
            socket.close()
            return None
        client = self._clients[socket.fileno()] = _Client(socket, door)
        self._epoll.register(socket.fileno(), select.EPOLLIN)
        return client

    def _receive(self, client: _Client) -> None:
        if client.has_line or client.to_send or client.waits is not None:
            # A hang-up while it is answered: the client has gone, and wants no answer.
            self._drop(client)
            return
        try:
            data, fds, has_all = _received(client, MAX_LINE + 1 - len(client.received))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, fds, has_all = b"", [], True
        if not data or not self._take(client, data, fds, has_all):
            self._drop(client)

    @staticmethod
    def _take(client: _Client, data: bytes, fds: list[int], has_all: bool) -> bool:
        """Keep what has come from it, `has_all`: there was room for all. False if a line has more
        descriptors than one may have."""
        client.received += data
        if fds:
            # The kernel gives nothing behind the message that they came with (unix(7)).
            before = client.received.removesuffix(b"\n").count(b"\n")
            of_line = client.descriptors.setdefault(before, Descriptors())
            of_line.fds += fds
            if len(of_line.fds) > MOST:
                return False
        if len(client.received) > MAX_LINE and b"\n" not in client.received:
            client.to_send = error_line(None, BAD_REQUEST, f"a line of more than {MAX_LINE} bytes")
            client.ending = True
        if not has_all:
            client.received.clear()
            client.give_back()
            client.to_send = error_line(None, BUSY, _no_room())
            client.ending = True
        return True

    def _answer_one(self, client: _Client) -> None:
        line, _, rest = bytes(client.received).partition(b"\n")
        client.received = bytearray(rest)
        came = client.descriptors.pop(0, Descriptors())
        client.descriptors = {before - 1: fds for before, fds in client.descriptors.items()}
        client.to_send = self._answer(client, line, came)
        self._send(client)

    def _answer(self, client: _Client, line: bytes, came: Descriptors) -> bytes:
        """The answer to `line`, with which `came` came; nothing yet for what takes its time."""
        try:
            request = parse_request(line)
        except ControlError as error:
            came.close()
            return error_line(None, error.code, str(error))
        answer = answered(request.id, partial(self._result, client, request, came))
        if client.waits is None:  # or else whoever makes the answer has them
            came.close()
        return answer

    def _result(self, client: _Client, request: Request, came: Descriptors) -> Any:
        method = self._find(request.method)
        if method is None:
            raise ControlError(UNKNOWN_METHOD, f"no method {request.method!r:.100}")
        check_params(method, request.params)
        needed = method.right(request.params)
        if RIGHTS.index(client.door.rights) < RIGHTS.index(needed):
            raise ControlError(
                FORBIDDEN,
                f"{request.method} needs the rights {needed}: this socket's are "
                f"{client.door.rights}",
            )
        params = request.params
        if method.takes_descriptors:
            params = {**params, "descriptors": came}
        result = method.run(**params)
        if isinstance(result, Upgrade):
            if not client.door.owner_only and self._count_handed() >= MAX_HANDED:
                raise ControlError(BUSY, f"{MAX_HANDED} look at this VM by such sockets already")
            client.upgrade = result
            return result.result
        if isinstance(result, Later):
            self._begin(client, request.id, result, came)
        return result

    def _begin(
        self, client: _Client, id: int | str | None, later: Later, came: Descriptors
    ) -> None:
        # One that hangs up and comes again with the next request must not cost a thread each time.
        if self._at_work >= MAX_CLIENTS:
            raise ControlError(BUSY, f"{MAX_CLIENTS} such requests are being answered already")
        thread = Thread(
            target=self._answer_later, args=(client, id, later, came), name="answer", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # all that Python says of pthread_create's EAGAIN
            raise HostError(errno.EAGAIN, "thread for a request") from None
        self._at_work += 1
        client.waits = later

    def _answer_later(
        self, client: _Client, id: int | str | None, later: Later, came: Descriptors
    ) -> None:
        answer = answered(id, later.run)
        came.close()
        self._late.append((client, answer))
        if not self._stopping:
            with suppress(OSError, HostError):  # it has just ended
                self._wake.signal()

    def _send(self, client: _Client) -> None:
        try:
            while client.to_send:
                client.to_send = client.to_send[client.socket.send(client.to_send) :]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            client.to_send, client.ending = b"", True

    def _still_handed(self) -> list[tuple[Door, Socket]]:
        self._handed = [one for one in self._handed if one[1].fileno() >= 0]
        return self._handed

    def _count_handed(self) -> int:
        """Those that are about to be included."""
        clients = self._clients.values()
        soon = sum(one.upgrade is not None and not one.door.owner_only for one in clients)
        return soon + len(self._still_handed())

    def _hand_over(self, client: _Client, upgrade: Upgrade) -> None:
        self._forget(client)
        if not client.door.owner_only:
            self._handed.append((client.door, client.socket))
        try:
            upgrade.hand_over(client.socket, bytes(client.received))
        except Exception as error:
            log.to_stderr(f"a defect in pyvmm, met by a control request: {error!r}")
            client.socket.close()

    def _drop(self, client: _Client) -> None:
        self._forget(client)
        if client.waits is not None:
            client.waits.cancel()
        client.socket.close()

    def _forget(self, client: _Client) -> None:
        client.give_back()
        fd = client.socket.fileno()
        if self._clients.pop(fd, None) is not None:
            self._epoll.unregister(fd)


def _no_room() -> str:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"the VM has all {most} files open that it may; start it with a higher limit: ulimit -n"


def _received(client: _Client, size: int) -> tuple[bytes, list[int], bool]:
    """The next bytes, the descriptors that come along, where they may be of use, and whether there
    was room for all of them; the kernel closes others. Raises OSError."""
    if client.door.rights != EXEC:
        return client.socket.recv(size), [], True
    return _with_descriptors(client.socket, size)


def _with_descriptors(socket: _socket.socket, size: int) -> tuple[bytes, list[int], bool]:
    """The next bytes, the descriptors that come with them, and whether these are all. Raises
    OSError."""
    room = unix_sockets.room_for(MOST + 2)
    data, ancillary, flags, _ = socket.recvmsg(size, room, _socket.MSG_CMSG_CLOEXEC)
    fds = unix_sockets.descriptors_in(ancillary)
    return data, fds, not (flags & _socket.MSG_CTRUNC and len(fds) <= MOST)
