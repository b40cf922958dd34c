"""The keeper of a monitor in a box under the fuzzer: hostile clients at its doors, and hostile
monitors that ask it for things, and answer it.

What hears clients (pyvmm.monitor.broker) and what serves the monitor (pyvmm.monitor.awake) are
real, at real sockets, in this process; who a client is, is made up, and the processes that open
files for a client are no processes here. A case raises AssertionError, with what was done, if

- the monitor gets another connection than it may have, other bytes or descriptors than its client
  has said, or a line by which a file may be opened,
- a client waits that has said a line, is turned away where there is room, or let in where not,
- the monitor has a file removed, a socket connected or a log opened that was not announced, or
  gets another answer than the model's,
- a file is opened that no client has named, a client has another answer than one line of JSON, or
  its connection does not become the monitor's after that,
- a connection or a descriptor is left.
"""

from __future__ import annotations

import array
import errno
import functools
import json
import os
import select
import socket
import stat
import struct
from collections import deque
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any
from unittest import mock

from fuzz.room import check_closed, open_files, room, told

from pyvmm.control.server import log
from pyvmm.errors import HostError
from pyvmm.host import unix_sockets
from pyvmm.host.handed import MOST
from pyvmm.host.unix_sockets import Peer
from pyvmm.monitor import awake, broker
from pyvmm.monitor.broker import Broker, Door
from pyvmm.monitor.keeper_state import State
from pyvmm.testing.mmio_driver import Ring

HANG = 60.0
MONITOR, SOMEBODY = 4_000_001, 4_000_002  # processes
LONGEST = 65536
# What may open a file; JSON has escapes for each of its characters.
ASKS = (b'"disk.add"', b'"net.add"', b'"share.add"', *(rb"\u00%d" % digit for digit in range(8)))
WAITING, WORKERS = {True: 32, False: 8}, {True: 8, False: 2}  # by whether a door is its owner's


class _Places:
    """The doors' sockets, and files to lend, of all cases."""

    def __init__(self) -> None:
        self.folder = room()
        self.listeners = {
            True: unix_sockets.listen(f"{self.folder}/own"),
            False: unix_sockets.listen(f"{self.folder}/others"),
        }
        self.lent = [os.memfd_create(f"lent {number}") for number in range(5)]
        self.inodes = [os.fstat(fd).st_ino for fd in self.lent]
        (self.folder / "image").write_bytes(bytes(1024))
        self.asked_for = (self.folder / "image").stat().st_ino


_places = functools.cache(_Places)


class _Time:
    """The module for the keeper, which never sleeps here."""

    monotonic = staticmethod(__import__("time").monotonic)

    @staticmethod
    def sleep(seconds: float) -> None:
        assert 0 <= seconds <= 0.2


# --- clients at the doors -------------------------------------------------------------------------


class _Client:
    def __init__(self, number: int, owner_only: bool, peer: Peer | None) -> None:
        self.number, self.owner_only, self.peer = number, owner_only, peer
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.setblocking(False)
        self.socket.bind(b"\0pyvmm-fuzz-%d-%d" % (os.getpid(), number))
        self.socket.connect(f"{_places().folder}/{'own' if owner_only else 'others'}")
        self.sent = b""
        self.lent: list[tuple[int, int]] = []  # where, and which file
        self.is_closed = self.is_shut = self.was_heard = False
        self.state = "comes"

    def send(self, data: bytes, lent: list[int]) -> None:
        places = _places()
        rights = [
            (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [places.lent[n] for n in lent]))
        ]
        with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            done = self.socket.sendmsg([data], rights if lent else [])
            self.lent += [(len(self.sent), places.inodes[n]) for n in lent]
            self.sent += data[:done]

    def heard(self) -> bytes | None:
        """What it is told; None if there is no end of it."""
        came = b""
        try:
            while data := self.socket.recv(LONGEST):
                came += data
        except BlockingIOError:
            return came or None
        except ConnectionResetError:
            pass
        return came

    def close(self) -> None:
        self.is_closed = True
        self.socket.close()


class _Hall:
    """A keeper's ear, the clients before it and the monitor behind it."""

    def __init__(self, rng: Random, closing: ExitStack, note: list[str]) -> None:
        self.rng, self.note = rng, note
        self.clients: list[_Client] = []
        self.coming: dict[bool, deque[_Client]] = {True: deque(), False: deque()}
        self.epoll = select.epoll()
        closing.callback(self.epoll.close)
        self.broker = Broker(MONITOR, self.epoll)
        self.broker._begin = self._begin  # type: ignore[method-assign]
        self.ends: dict[bool, socket.socket] = {}
        self.is_narrow = rng.random() < 0.15
        self.is_gone = False
        self.passed: list[tuple[_Client, bytes, socket.socket]] = []
        self.workers: list[int] = []
        for owner_only, listener in _places().listeners.items():
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            closing.callback(ours.close)
            closing.callback(theirs.close)
            theirs.setblocking(False)
            if self.is_narrow:
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 5000)
            self.ends[owner_only] = theirs
            self.broker.add(Door(listener, ours, owner_only))
        closing.enter_context(mock.patch.object(unix_sockets, "peer", self._peer))
        closing.enter_context(mock.patch.object(broker, "time", _Time))
        closing.callback(self._end)
        self.broker.begin()

    def _end(self) -> None:
        for listener in _places().listeners.values():
            while (left := unix_sockets.accept(listener)) is not None:
                left.close()
        for client in self.broker._clients.values():
            client.close()
        for _, _, connection in self.passed:
            connection.close()
        for client in self.clients:
            client.close()

    def _named(self, connection: Any) -> _Client:
        name = connection.getpeername()
        return self.clients[int(name.rpartition(b"-")[2])]

    def _peer(self, connection: Any) -> Peer:
        peer = self._named(connection).peer
        if peer is None:
            raise HostError(errno.EINVAL, "SO_PEERCRED")
        return peer

    def _begin(self, client: Any) -> None:
        """In place of a process that opens what the client names."""
        one = self._named(client.socket)
        assert not client.fds and len(client.said) <= LONGEST and one.sent.startswith(client.said)
        line = client.said.partition(b"\n")
        assert line[1] and any(ask in line[0] for ask in ASKS), client.said[:200]
        assert one.peer is not None and one.peer.pid not in (MONITOR, os.getpid())
        one.state = "served"
        number = -1 - len(self.workers) - len(self.clients) * 100
        self.workers.append(number)
        self.broker._workers[number] = 0, client.door
        client.close()

    # --- steps ------------------------------------------------------------------------------------

    def connect(self) -> None:
        if len(self.clients) >= 60:
            return
        ours = os.geteuid()
        pid = self.rng.choice((SOMEBODY,) * 12 + (MONITOR, os.getpid()))
        uid = self.rng.choice((ours,) * 8 + (ours + 1,))
        peer = None if self.rng.random() < 0.02 else Peer(pid, uid, 0)
        owner_only = self.rng.random() < 0.6
        client = _Client(len(self.clients), owner_only, peer)
        self.clients.append(client)
        self.coming[owner_only].append(client)

    def crowd(self) -> None:
        """So many that there is no room for all."""
        if self.rng.random() < 0.1:
            for _ in range(self.rng.choice((9, 34))):
                self.connect()

    def speak(self) -> None:
        there = [one for one in self.clients if not (one.is_closed or one.is_shut)]
        if not there:
            return
        client = self.rng.choice(there[-3:] if self.rng.random() < 0.5 else there)
        rng = self.rng
        method = rng.choice(("disk.add", "net.add", "share.add", "status", "disk.remove", "add"))
        line = json.dumps({"version": 1, "id": 7, "method": method}).encode()
        if rng.random() < 0.1:
            line = line.replace(b"add", rng.choice((rb"\u0061dd", rb"a\u0064d", rb"\u0161dd")))
        kind = rng.random()
        if kind < 0.04:
            size = rng.choice((LONGEST - 1, LONGEST, LONGEST + 1, LONGEST + 300)) - len(client.sent)
            line = (line if rng.random() < 0.5 else b"").ljust(max(0, size), b" ")
        elif kind < 0.6:
            line += b"\n" + rng.choice((b"", b"", b"more", b'{"method": "disk.add"}\n'))
        elif kind < 0.8:
            line = line[: rng.randrange(len(line))]
        elif kind < 0.85:
            line = rng.choice((b"\n", b"\0", rng.randbytes(9), b'"disk.add"', b"\n" + line + b"\n"))
        lent: list[int] = []
        if rng.random() < 0.1 and line:
            count = rng.choice((1, 1, 2, MOST, MOST + 1))
            lent = [rng.randrange(5) for _ in range(count)]
        if line:
            self.note.append(f"{client.number} says {line[:80]!r}, {len(line)} bytes, {lent}")
            client.send(line, lent)

    def leave(self) -> None:
        there = [one for one in self.clients if not one.is_closed]
        if there and self.rng.random() < 0.4:
            client = self.rng.choice(there)
            self.note.append(f"{client.number} goes")
            if self.rng.random() < 0.5:
                client.close()
            else:
                client.is_shut = True
                with suppress(OSError):
                    client.socket.shutdown(socket.SHUT_WR)

    def turn(self) -> None:
        """The keeper does what there is to do."""
        for fd, _ in self.epoll.poll(0):
            self._serve(fd)
        for one in self.broker._clients.values():
            assert len(one.said) <= LONGEST + 1 and len(one.fds) <= 2 * MOST + 1
        for is_own, most in WAITING.items():
            there = [one for one in self.broker._clients.values() if one.door.owner_only == is_own]
            assert len(there) <= most, f"{len(there)} wait"

    def _serve(self, fd: int) -> None:
        waiting = [one.door.owner_only for one in self.broker._clients.values()]
        workers = [door.owner_only for _, door in self.broker._workers.values()]
        door = self.broker._doors.get(fd)
        heard = self.broker._clients.get(fd)
        who = None if heard is None else self._named(heard.socket)
        self.broker.serve(fd)
        if door is not None:
            if not self.coming[door.owner_only]:
                return
            client = self.coming[door.owner_only].popleft()
            is_in = any(self._named(one.socket) is client for one in self.broker._clients.values())
            peer = client.peer
            is_client = peer is not None and peer.pid not in (MONITOR, os.getpid())
            if is_client and door.owner_only and peer is not None and peer.uid != os.geteuid():
                is_client = False
            has_room = waiting.count(door.owner_only) < WAITING[door.owner_only]
            assert is_in == (is_client and has_room), f"{client.number}: {is_in}, {has_room}"
            client.state = "waits" if is_in else "passed or refused"
            if is_client and not has_room:
                self._is_refused(client, "there are many clients already")
        elif heard is not None and who is not None and fd not in self.broker._clients:
            who.was_heard = heard.said == who.sent  # nothing unread takes an answer along
            if who.state == "waits":
                who.state = "passed or refused"
            line, end, _ = heard.said.partition(b"\n")
            asks = not who.lent and len(heard.said) <= LONGEST and any(ask in line for ask in ASKS)
            if asks and end and who.state != "served":
                is_full = workers.count(heard.door.owner_only) >= WORKERS[heard.door.owner_only]
                assert is_full, "it has room for that"
                self._is_refused(who, "many devices are being added already")

    def _is_refused(self, client: _Client, why: str) -> None:
        if client.is_closed:
            return
        told = client.heard()
        if told == b"" and client.sent:  # what was not read takes the answer along
            return
        assert told is not None
        answer = json.loads(told)
        assert answer["error"] == {"code": "busy", "message": why}, answer
        client.state = "refused"

    def take(self) -> None:
        """The monitor takes a connection."""
        for owner_only, end in self.ends.items():
            if end.fileno() < 0:
                continue
            while True:
                try:
                    space = socket.CMSG_SPACE(4 * 100)
                    data, ancillary, flags, _ = end.recvmsg(LONGEST + 100, space)
                except BlockingIOError:
                    break
                assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) and data
                fds = unix_sockets.descriptors_in(ancillary)
                connection = socket.socket(fileno=fds[0])
                inodes = [os.fstat(fd).st_ino for fd in fds[1:]]
                for fd in fds[1:]:
                    os.close(fd)
                client = self._named(connection)
                self.passed.append((client, data[1:], connection))
                self._check_passed(client, owner_only, data, inodes)
                if self.rng.random() < 0.5:
                    break

    def _check_passed(
        self, client: _Client, owner_only: bool, data: bytes, inodes: list[int]
    ) -> None:
        said, peer = data[1:], client.peer
        assert client.owner_only == owner_only and data[0] == 0
        assert client.state == "passed or refused", client.state
        client.state = "passed"
        assert client.sent.startswith(said), "other bytes than it has said"
        assert inodes == [inode for at, inode in client.lent if at < len(said)], "descriptors"
        assert peer is not None
        if peer.pid in (MONITOR, os.getpid()):
            assert not said and not inodes, "the keeper hears the monitor"
            return
        assert not owner_only or peer.uid == os.geteuid(), "another user's"
        line, end, _ = said.partition(b"\n")
        assert end or len(said) > LONGEST or inodes, "half a line"
        if not inodes and len(said) <= LONGEST:
            assert not any(ask in line for ask in ASKS), line

    def end_worker(self) -> None:
        if self.workers:
            number = self.workers.pop(self.rng.randrange(len(self.workers)))
            del self.broker._workers[number]

    def hang_up(self) -> None:
        """The monitor has no more ear, or says what nobody hears."""
        end = self.rng.choice(list(self.ends.values()))
        if end.fileno() >= 0 and self.rng.random() < 0.3:
            with suppress(OSError):
                end.send(self.rng.randbytes(9))
        if self.rng.random() < 0.05:
            self.note.append("the monitor closes a channel")
            self.is_gone = True
            end.close()

    def rest(self) -> None:
        for _ in range(300):
            self.take()
            if not self.epoll.poll(0):
                break
            self.turn()
        else:
            raise AssertionError("it does not come to rest")
        self.take()
        waiting = [self._named(one.socket) for one in self.broker._clients.values()]
        for client in waiting:
            assert b"\n" not in client.sent and len(client.sent) <= LONGEST, "it waits"
            assert not client.lent and not client.is_closed, "it waits"
        self.take()
        for client, said, connection in self.passed:
            rest = b""
            with suppress(BlockingIOError, ConnectionResetError):
                connection.setblocking(False)
                while data := connection.recv(LONGEST):
                    rest += data
            assert said + rest == client.sent, f"{client.number} has said more"
        for client in self.clients:
            if client.state != "passed or refused" or client.is_closed:
                continue
            told = client.heard()
            assert told is not None, f"{client.number} is neither heard nor turned away"
            if client.was_heard and not (client.is_shut or self.is_gone or len(client.lent) > MOST):
                assert told, f"{client.number} is left without a word"
            if told:
                assert json.loads(told)["error"]["code"] == "busy"
                why = json.loads(told)["error"]["message"]
                is_full = self.is_gone or self.is_narrow
                assert is_full or not why.startswith(("there are more", "the monitor")), why

    def run(self) -> None:
        ways = (
            *(self.connect, self.connect, self.crowd, self.speak, self.speak, self.speak),
            *(self.speak, self.turn, self.turn, self.turn, self.take, self.leave, self.hang_up),
            self.end_worker,
        )
        for _ in range(self.rng.randint(4, 50)):
            self.rng.choice(ways)()
        self.rest()


def _doors(rng: Random, note: list[str]) -> None:
    with ExitStack() as closing:
        _Hall(rng, closing, note).run()


# --- what the monitor asks for --------------------------------------------------------------------


def _asked(rng: Random, note: list[str]) -> None:
    with ExitStack() as closing:
        place = room()
        closing.callback(__import__("shutil").rmtree, place, True)
        _Asked(rng, place, closing, note).run()


class _Asked:
    """A keeper that is awake, with what was announced to it, and a monitor that asks for it."""

    def __init__(self, rng: Random, place: Path, closing: ExitStack, note: list[str]) -> None:
        self.rng, self.place, self.note = rng, place, note
        folder = os.open(place, os.O_PATH | os.O_DIRECTORY)
        self.files: list[tuple[int, str, int, int]] = []
        self.same: list[bool] = []
        for number in range(rng.randrange(4)):
            path = place / f"file {number}"
            path.write_text("announced")
            found = path.stat()
            self.files.append((folder, path.name, found.st_dev, found.st_ino))
            self.same.append(rng.random() < 0.5)
            if not self.same[-1]:
                path.rename(place / f"kept {number}")
                kind = rng.randrange(4)
                if kind == 0:
                    path.write_text("another one")
                elif kind == 1:
                    path.symlink_to(place / f"kept {number}")
                elif kind == 2:
                    path.mkdir()
        self.named: list[tuple[str, str]] = []
        self.listeners: dict[str, Any] = {}
        for name in ("one", "two", "two_7", "none"):
            if name != "none":
                self.listeners[name] = unix_sockets.listen(str(place / name))
                closing.callback(self.listeners[name].close)
            if name != "two_7":
                self.named.append((str(place / name), str(place / name)))
        (place / "link_8").symlink_to(place / "two_7")
        self.named.append((str(place / "link"), str(place / "link")))
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        closing.callback(self.ours.close)
        memory = os.memfd_create("state")
        user = (os.geteuid(), os.getegid()) if rng.random() < 0.4 else None
        state = State(
            *(str(place), "web", user, False, MONITOR, 5.0, -1, theirs.detach(), "nothing", [], ()),
            *([], self.named, self.files, []),
        )
        self.follows = user is None
        closing.callback(os.close, memory)
        closing.callback(os.close, folder)
        self.serving = awake.Serving(state, memory, sleeps=False)
        closing.callback(self.serving._epoll.close)
        closing.callback(self.serving._socket.close)

    def run(self) -> None:
        messages = [self._message() for _ in range(self.rng.randint(1, 8))]
        for message in messages:
            self.ours.send(message)
        self.ours.shutdown(socket.SHUT_WR)
        self.note += map(repr, messages)
        before = self._there()
        with suppress(ConnectionError):
            self.serving._serve()
        for message in messages:
            self._check(message, before)
        self.ours.setblocking(False)
        with suppress(BlockingIOError):
            raise AssertionError(f"one answer too many: {self.ours.recv(99)!r}")
        assert self._there() == before, "other files are gone, or there"

    def _there(self) -> dict[str, int]:
        return {one.name: one.lstat().st_ino for one in self.place.rglob("*")}

    def _message(self) -> bytes:
        rng = self.rng
        kind = rng.random()
        number = rng.randrange(-1, len(self.named) + 1)
        if kind < 0.35:
            number = rng.choice((0, 1, 2, 3, len(self.files), 0xFFFFFFFF))
            message = struct.pack("=3sxI", b"del", number)
            return message if rng.random() < 0.9 else message + rng.choice((b"x", b""))[:1]
        if kind < 0.75:
            port = rng.choice((b"", b"", b" 7", b" 8", b" 9", b" -1", b" 7 8", b" x", b" /../one"))
            return b"con%d" % number + port
        if kind < 0.85:
            return b"log" + rng.choice((b"\0", b"\1", b"\2", b"", b"\0\0", b"/etc/passwd"))
        words = (b"plg", b"dev/dev/null", b"del", b"con", b"xyz", b"dev", b"DEL\0\0\0\0\0", b"c")
        return rng.choice((*words, rng.randbytes(rng.randrange(1, 20))))

    def _check(self, message: bytes, there: dict[str, int]) -> None:
        """The answer is that of the model, which notes in `there` what has changed."""
        data, ancillary, _, _ = self.ours.recvmsg(99, socket.CMSG_SPACE(64))
        (failed,) = struct.unpack("=i", data)
        fds = unix_sockets.descriptors_in(ancillary)
        what, rest = message[:3], message[3:]
        try:
            if what == b"del" and len(rest) == 5:
                self._removes(int.from_bytes(rest[1:], "little"), failed, there)
                assert not fds
            elif what == b"con":
                self._connects(rest, failed, fds)
            elif what == b"log":
                self._logs(rest, failed, fds, there)
            else:
                assert failed == errno.EINVAL and not fds, (message, failed)
        except AssertionError as error:
            error.add_note(f"{message!r}: {failed}, {fds}")
            raise
        finally:
            for fd in fds:
                os.close(fd)

    def _removes(self, number: int, failed: int, there: dict[str, int]) -> None:
        if number >= len(self.files):
            assert failed == errno.EINVAL
            return
        name = self.files[number][1]
        if name not in there:
            assert failed == errno.ENOENT
            return
        assert failed == 0
        if self.same[number]:
            del there[name]

    def _connects(self, rest: bytes, failed: int, fds: list[int]) -> None:
        try:
            number, *ports = map(int, rest.split())
            path, _ = self.named[number]
        except (ValueError, IndexError):
            assert failed == errno.EINVAL and not fds
            return
        name = os.path.basename(path) + (f"_{ports[0]}" if ports else "")
        if name == "link_8":
            name = "two_7" if self.follows else "a link"
        if name not in self.listeners:
            wanted = errno.ELOOP if name == "a link" else errno.ENOENT
            assert failed == wanted and not fds, wanted
            return
        assert failed == 0 and len(fds) == 1
        came = unix_sockets.accept(self.listeners[name])
        assert came is not None, "it is connected to something else"
        came.close()

    def _logs(self, rest: bytes, failed: int, fds: list[int], there: dict[str, int]) -> None:
        if failed:
            assert failed == errno.ENOENT and rest != b"\0", "there was none to begin anew"
            return
        [fd] = fds
        found = os.fstat(fd)
        names = {one.name: one.lstat().st_ino for one in self.place.rglob("*")}
        new = {name: inode for name, inode in names.items() if there.get(name) != inode}
        assert stat.S_ISREG(found.st_mode) and all("web" in one or one.islower() for one in new)
        there.update(new)
        if found.st_nlink:
            assert found.st_ino in names.values(), "a log somewhere else"


# --- who names a file, and the monitor that answers -----------------------------------------------

_CODES = ("refused", "failed", "needs_files", "busy", "x" * 300, "\n\x1b[2J")


class _Answers(Thread):
    """A monitor at the other end of a channel: it answers once or twice, and may lie."""

    def __init__(self, rng: Random, channel: socket.socket) -> None:
        super().__init__(daemon=True)
        self.rng, self.channel = rng, channel
        self.heard: list[tuple[dict[str, Any], list[int]]] = []
        self.answers: list[bytes] = []
        self.kept: list[socket.socket] = []
        self.failed: BaseException | None = None

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.failed = error
        finally:
            for one in self.kept:
                one.close()

    def _run(self) -> None:
        space = socket.CMSG_SPACE(4 * 50)
        data, ancillary, _, _ = self.channel.recvmsg(LONGEST + 9, space)
        [fd] = unix_sockets.descriptors_in(ancillary)
        assert data == b"\0"
        connection = socket.socket(fileno=fd)
        self.kept.append(connection)
        connection.settimeout(HANG)
        while True:
            said, fds = b"", []
            while not said.endswith(b"\n"):
                data, ancillary, _, _ = connection.recvmsg(LONGEST, space)
                if not data:
                    return
                said += data
                fds += unix_sockets.descriptors_in(ancillary)
            inodes = [os.fstat(one).st_ino for one in fds]
            for one in fds:
                os.close(one)
            request = json.loads(said)
            self.heard.append((request, inodes))
            answer = self._answer(request["id"])
            self.answers.append(answer)
            if not answer:
                return
            try:
                connection.sendall(answer)
            except (BrokenPipeError, ConnectionResetError):
                return

    def _answer(self, id: int) -> bytes:
        rng = self.rng
        kind = rng.random()
        said: dict[str, Any] = {"version": 1, "id": id}
        if kind < 0.3:
            said["result"] = rng.choice(({"name": "d"}, None, [], "x" * 3000))
        elif kind < 0.75:
            code = "needs_files" if rng.random() < 0.7 else rng.choice(_CODES)
            said["error"] = {"code": code, "message": rng.choice(("no", "\n\n", "y" * 9000))}
        elif kind < 0.85:
            return rng.choice(
                (b"\n", b"[]\n", b"junk\n", b"[" * 3000 + b"\n", b'{"id": null}\n', b"")
            )
        else:
            said[rng.choice(("error", "result", "id"))] = rng.choice((None, 1, [], {}, {"code": 7}))
            said.setdefault("result", 1)
            said["id"] = said["id"] if said["id"] in (id, None) else id
        return json.dumps(said).encode() + b"\n"


def _named(rng: Random, note: list[str]) -> None:
    places = _places()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client, end = socket.socketpair(socket.AF_UNIX)
    client.settimeout(HANG)
    image = str(places.folder / "image")
    device = rng.choice(
        (image, image, f"{image},readonly", "/nowhere/at/all", f"{places.folder}/own", "")
    )
    params: dict[str, Any] = {"device": f"path={device}" if rng.random() < 0.3 else device}
    if rng.random() < 0.2:
        params[rng.choice(("device", "table", "files", "name"))] = rng.choice(
            (1, None, [], {}, "x")
        )
    said: dict[str, Any] = {"version": 1, "id": rng.choice((1, "a", None)), "method": "disk.add"}
    said["params"] = params
    if rng.random() < 0.15:
        said[rng.choice(("version", "id", "method", "params"))] = rng.choice(
            (2, [], "net.remove", {})
        )
    line = json.dumps(said).encode() + b"\n"
    if rng.random() < 0.05:
        line = line[: rng.randrange(len(line))] + b"\n"
    rest = rng.choice((b"", b"", b"more\n", b"\0"))
    note.append(f"{line!r}, {rest!r}")
    monitor = _Answers(rng, theirs)
    defects: list[str] = []
    try:
        try:
            request = json.loads(line)
        except ValueError:
            request = None
        is_one = isinstance(request, dict) and request.get("version") == 1
        is_one = (
            is_one and isinstance(request["method"], str) and isinstance(request["params"], dict)
        )
        is_one = is_one and (request["id"] is None or type(request["id"]) in (int, str))
        is_one = is_one and request["method"] == "disk.add" and "files" not in request["params"]
        if is_one:
            monitor.start()
        with mock.patch.object(log, "to_stderr", defects.append):
            broker._answer(ours, unix_sockets.adopt(end.detach()), line, rest)
        if is_one:
            monitor.join(HANG)
            assert not monitor.is_alive()
            if monitor.failed is not None:
                raise monitor.failed
        note.append(f"{monitor.heard}, {[one[:200] for one in monitor.answers]}")
        theirs.setblocking(False)
        data, ancillary, _, _ = theirs.recvmsg(LONGEST + 9, socket.CMSG_SPACE(64))
        [fd] = unix_sockets.descriptors_in(ancillary)
        os.close(fd)
        assert data == b"\0" + (rest if is_one else line + rest), data
        if not is_one:
            client.setblocking(False)
            with suppress(BlockingIOError):
                assert not client.recv(99), "it is told something"
            return
        _check_answer(monitor, request, client, image)
        assert not [one for one in defects if "SystemExit" in one]
    finally:
        for one in (ours, theirs, client):
            one.close()


def _check_answer(
    monitor: _Answers, request: dict[str, Any], client: socket.socket, image: str
) -> None:
    came = b""
    while not came.endswith(b"\n"):
        data = client.recv(LONGEST)
        if not data:
            break
        came += data
    assert came.count(b"\n") == 1, came
    answer = json.loads(came)
    assert (answer["version"], answer["id"]) == (1, request["id"]), answer
    assert monitor.heard and monitor.heard[0][0]["params"] == request["params"]
    assert not monitor.heard[0][1] and len(monitor.heard) <= 2
    for asked, inodes in monitor.heard:
        assert asked["method"] == "disk.add"
        assert set(inodes) <= {_places().asked_for}, "a file that nobody has named"
    if len(monitor.heard) == 2:
        asked, inodes = monitor.heard[1]
        assert asked["params"]["files"] and len(inodes) == len(asked["params"]["files"])
        text = str(request["params"].get("device", ""))
        assert image in text or "table" in request["params"], "nobody has named it"
    try:
        last = json.loads(monitor.answers[-1])
        error = last.get("error")
        result = last["result"] if error is None else None
        code = "" if error is None else str(error.get("code"))
    except (ValueError, AttributeError, LookupError, RecursionError):
        assert answer["error"]["code"] == "failed", answer
        return
    if error is None:
        assert answer["result"] == result
    elif code == "needs_files" and len(monitor.heard) == 1:  # and it could not be opened
        assert answer["error"]["code"] in ("refused", "failed"), answer
    else:
        assert answer["error"]["code"] == code, answer


_WAYS = (_doors, _doors, _doors, _asked, _named)


def keeper_case(rng: Random, ring: Ring) -> int:
    """One keeper; how many things were done."""
    assert _places()
    note: list[str] = []
    way = rng.choice(_WAYS)
    descriptors = open_files()
    with told(way, note):
        way(rng, note)
        check_closed(descriptors)
    return len(note) + 1
