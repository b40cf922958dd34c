"""The host's programs at a vsock device: what they may say, who is let in, who is turned away."""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from descriptors import open_descriptors

from pyvmm.errors import HostError
from pyvmm.host import unix_sockets
from pyvmm.host.poller import Poller
from pyvmm.host.unix_sockets import Socket
from pyvmm.virtio.vsock.host_side import Client, HostSide

HANG = 60.0  # seconds; no measure of speed


class Side:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = unix_sockets.listen(str(path))
        self.poller = Poller()
        self.handed: deque[tuple[Socket, int]] = deque()
        self.host = HostSide(self.listener, str(path), self.poller, self.handed)

    def client(self, said: bytes = b"") -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(HANG)
        client.connect(str(self.path))
        client.sendall(said)
        return client

    def look(self) -> list[int]:
        """The ports that clients have asked for since the last look."""
        self.poller.arm()
        self.poller.wait(0)
        found = self.host.commands()
        for sock, _ in found:
            self.poller.remove(sock.fileno())
            sock.close()
        return [port for _, port in found]


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    made = Side(tmp_path / "vsock")
    yield made
    made.host.close()
    made.poller.close()
    made.listener.close()


def is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    ("said", "port", "rest"),
    [
        (b"", None, b""),
        (b"C", None, b"C"),
        (b"CONNECT ", None, b"CONNECT "),
        (b"CONNECT 5", None, b"CONNECT 5"),
        (b"CONNECT 5\n", 5, b""),
        (b"CONNECT 5\r\n", 5, b""),
        (b"CONNECT 5\nmore\n", 5, b"more\n"),
        (b"CONNECT 0\n", 0, b""),
        (b"CONNECT 4294967295\n", (1 << 32) - 1, b""),
        (b"CONNECT 4294967295\r\nmore", (1 << 32) - 1, b"more"),
        (b"CONNECT 4294967296\n", -1, b""),
        (b"CONNECT 4294967295 ", None, b"CONNECT 4294967295 "),
        (b"CONNECT 42949672955 ", -1, None),  # as long as none may be
        (b"CONNECT \n", -1, b""),
        (b"CONNECT -5\n", -1, b""),
        (b"CONNECT 5 6\n", -1, b""),
        (b"CONNECT\n", -1, b""),
        (b"connect 5\n", -1, b""),
        (b"\n", -1, b""),
        (b"GET /", -1, None),
        (b"CONNECTED", -1, None),
    ],
)
def test_what_a_client_may_say(said: bytes, port: int | None, rest: bytes | None) -> None:
    ours, theirs = unix_sockets.pair()
    ours.setblocking(False)
    theirs.send(said)
    assert Client(ours).read_command() == port
    if rest is not None:
        try:
            assert ours.recv(99) == rest
        except BlockingIOError:
            assert rest == b""
    ours.close()
    theirs.close()


def test_a_client_that_has_gone_said_nothing() -> None:
    for early in (b"", b"CONN"):
        ours, theirs = unix_sockets.pair()
        theirs.send(early)
        theirs.close()
        ours.recv(len(early)) if early else None
        assert Client(ours).read_command() == -1
        ours.close()
    ours, theirs = unix_sockets.pair()
    ours.send(b"never read")
    theirs.close()
    assert Client(ours).read_command() == -1  # a reset
    ours.close()


def test_clients_come_in_as_there_is_room(side: Side) -> None:
    before = open_descriptors()
    assert side.host.has_arrivals
    side.host.accept(5)
    assert not side.host.has_arrivals, "nobody was there"
    clients = [side.client() for _ in range(3)]
    side.look()
    assert side.host.has_arrivals
    side.host.accept(0)
    assert len(side.host) == 0
    side.host.accept(2)
    assert len(side.host) == 2 and side.host.has_arrivals
    side.host.accept(5)
    assert len(side.host) == 3 and not side.host.has_arrivals
    assert side.look() == []
    clients[0].sendall(b"CONNECT 1")
    assert side.look() == [] and len(side.host) == 3
    clients[0].sendall(b"0\n")
    clients[1].sendall(b"GET / HTTP/1.0\r\n")
    clients[2].sendall(b"CONNECT 0\n")
    assert sorted(side.look()) == [0, 10] and len(side.host) == 0
    assert all(is_closed(client) for client in clients)
    for client in clients:
        client.close()
    assert open_descriptors() == before


def test_a_client_that_is_not_ready_holds_up_nobody(side: Side) -> None:
    clients = [side.client(said) for said in (b"CONN", b"CONNECT 5\n", b"", b"CONNECT 6\n")]
    side.look()
    side.host.accept(9)
    assert sorted(side.look()) == [5, 6] and len(side.host) == 2
    clients[0].sendall(b"ECT 7\n")
    clients[0].sendall(b"more")  # heard of twice
    clients[2].sendall(b"CONNECT 8\n")
    assert sorted(side.look()) == [7, 8] and side.look() == []
    for client in clients:
        client.close()


def test_who_was_handed_over_without_room_is_closed(side: Side) -> None:
    pairs = [unix_sockets.pair() for _ in range(4)]
    side.handed.extend((theirs, port) for port, (_, theirs) in enumerate(pairs))
    assert side.host.has_arrivals
    found = side.host.calls(2)
    assert [port for _, port in found] == [0, 1]
    assert pairs[2][0].recv(1) == pairs[3][0].recv(1) == b""
    assert side.host.calls(2) == [] and not side.handed
    for sock, _ in found:
        side.poller.replace(sock.fileno(), lambda events: None)  # it is watched already
        side.poller.remove(sock.fileno())
        sock.close()
    for ours, _ in pairs:
        ours.close()


def test_the_end_closes_whoever_waits_and_not_the_listener(tmp_path: Path) -> None:
    side = Side(tmp_path / "vsock")
    client, (ours, theirs) = side.client(), unix_sockets.pair()
    side.host.accept(1)
    side.handed.append((theirs, 7))
    side.host.close()
    assert is_closed(client) and ours.recv(1) == b"" and len(side.host) == 0
    side.client().close()  # the next driver's
    side.poller.add(side.listener.fileno(), None)  # it was watched no more
    side.poller.close()
    side.listener.close()


def test_ports_are_used_in_order_and_again_at_last(side: Side) -> None:
    assert [side.host.new_port() for _ in range(3)] == [1 << 30, (1 << 30) + 1, (1 << 30) + 2]
    side.host._next_port = (1 << 30) - 1
    assert [side.host.new_port() for _ in range(2)] == [(1 << 31) - 1, 1 << 30]


def test_without_a_path_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Least of all at a path that happens to be called so."""
    monkeypatch.chdir(tmp_path)
    listener = unix_sockets.listen(str(tmp_path / "None_52"))
    poller = Poller()
    host = HostSide(None, None, poller, deque())
    assert not host.has_arrivals
    host.accept(1)
    with pytest.raises(HostError) as raised:
        host.connect(52)
    assert raised.value.errno == errno.ECONNREFUSED
    host.close()
    poller.close()
    listener.close()


def test_the_guest_reaches_the_listener_of_its_port(side: Side, tmp_path: Path) -> None:
    listener = unix_sockets.listen(str(tmp_path / "vsock_52"))
    side.host.connect(52).close()
    assert unix_sockets.accept(listener) is not None
    with pytest.raises(HostError):
        side.host.connect(53)
    listener.close()
