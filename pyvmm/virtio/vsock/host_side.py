"""The host's side of vsock: Unix sockets, by the convention that Firecracker's users know.

For a device with the path P:

- a client on the host connects to P and sends ``CONNECT <port>\\n``. Once the guest's listener on
  that port has accepted, it reads ``OK <host port>\\n``, and from then on the connection is the
  stream. If nobody listens in the guest, the connection is closed.
- a guest that connects to port N of the host (CID 2) reaches whoever listens on P_N.

Without a path there are neither; the monitor itself hands connections over, which wait for the same
OK (`call`).
"""

from __future__ import annotations

import _socket
import errno
from collections import deque
from contextlib import suppress

from pyvmm.errors import HostError
from pyvmm.host import unix_sockets
from pyvmm.host.poller import Handler, Poller
from pyvmm.host.unix_sockets import Socket

LONGEST_SUFFIX = len("_4294967295")
_LONGEST_COMMAND = len("CONNECT 4294967295\n") + 1  # and a carriage return, which some tools send
_FIRST_PORT = 1 << 30
_PORTS = 1 << 30


class Client:
    """A connection on the host that has not said yet where it wants to go."""

    def __init__(self, sock: Socket) -> None:
        self.sock = sock

    def read_command(self) -> int | None:
        """The port of its CONNECT, None if that has not come whole yet; -1 if it is something else.

        What follows the command stays in the socket: it belongs to the stream.
        """
        try:
            start = self.sock.recv(_LONGEST_COMMAND, _socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError:
            return -1
        line, newline, _ = start.partition(b"\n")
        if not newline:
            whole = len(start) == _LONGEST_COMMAND or not start
            return -1 if whole or not b"CONNECT ".startswith(start[:8]) else None
        self.sock.recv(len(line) + 1)
        word, _, number = line.rstrip(b"\r").partition(b" ")
        if word != b"CONNECT" or not number.isdigit() or int(number) >= 1 << 32:
            return -1
        return int(number)


class HostSide:
    """Connections from and to the host's programs. Used by the device's thread only."""

    def __init__(
        self,
        listener: Socket | None,
        path: str | None,
        poller: Poller,
        calls: deque[tuple[Socket, int]],
    ) -> None:
        """Clients come to `listener`; `path` is what the convention calls P. Connections that are
        handed over come by `calls`, each with its port. Raises HostError.

        `listener` stays open when this is closed.
        """
        self._listener = listener
        self._path = path
        self._poller = poller
        self._calls = calls
        self._may_accept = listener is not None
        self._waiting: set[Client] = set()
        self._heard: list[Client] = []
        self._next_port = 0
        if listener is not None:
            poller.add(listener.fileno(), self._note_arrival)

    def __len__(self) -> int:
        """The number of clients that have not said where they want to go."""
        return len(self._waiting)

    def _note_arrival(self, events: int) -> None:
        self._may_accept = True

    @property
    def has_arrivals(self) -> bool:
        """True if somebody may want in."""
        return self._may_accept or bool(self._calls)

    def accept(self, room: int) -> None:
        """Let at most `room` clients in; others wait outside. Raises HostError, for one of them at
        most: that one is turned away if it was in already."""
        while self._listener is not None and self._may_accept and room > 0:
            sock = unix_sockets.accept(self._listener)
            if sock is None:
                self._may_accept = False
                return
            room -= 1
            client = Client(sock)
            self._watch(sock, self._listen_to(client))
            self._waiting.add(client)
            self._heard.append(client)

    def _watch(self, sock: Socket, handler: Handler) -> None:
        """Raises HostError, and then `sock` is closed."""
        try:
            self._poller.add(sock.fileno(), handler)
        except HostError:
            sock.close()
            raise

    def _listen_to(self, client: Client) -> Handler:
        return lambda events: self._heard.append(client)

    def commands(self) -> list[tuple[Socket, int]]:
        """The clients that have said CONNECT: each one's socket, watched still, and the port."""
        found = []
        heard, self._heard = self._heard, []
        for client in heard:
            if client not in self._waiting:
                continue  # heard of twice
            port = client.read_command()
            if port is None:
                continue
            self._waiting.remove(client)
            if port < 0:
                self._drop(client)
            else:
                found.append((client.sock, port))
        return found

    def calls(self, room: int) -> list[tuple[Socket, int]]:
        """Connections that were handed over, as `commands` has those of clients; those for which
        there is no room are closed."""
        found: list[tuple[Socket, int]] = []
        while self._calls:
            sock, port = self._calls.popleft()
            if len(found) >= room:
                sock.close()
                continue
            with suppress(HostError):
                self._watch(sock, _ignore)
                found.append((sock, port))
        return found

    def connect(self, port: int) -> Socket:
        """A connection to the listener for a guest's connection to `port`, watched as those of
        clients are. Raises HostError."""
        if self._path is None:
            raise HostError(errno.ECONNREFUSED, f"connect to port {port}")
        sock = unix_sockets.reach(f"{self._path}_{port}")
        self._watch(sock, _ignore)
        return sock

    def new_port(self) -> int:
        """A port for a stream that begins on the host; in order, so that none is reused soon."""
        port = _FIRST_PORT + self._next_port
        self._next_port = (self._next_port + 1) % _PORTS
        return port

    def close(self) -> None:
        """Close the clients' connections."""
        for client in self._waiting:
            self._drop(client)
        self._waiting.clear()
        while self._calls:
            self._calls.popleft()[0].close()
        if self._listener is not None:
            self._poller.remove(self._listener.fileno())

    def _drop(self, client: Client) -> None:
        self._poller.remove(client.sock.fileno())
        client.sock.close()


def _ignore(events: int) -> None:
    """Nothing is lost: the stream that it becomes at once looks for itself."""
