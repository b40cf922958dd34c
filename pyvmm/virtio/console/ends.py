"""The host's end of a port: the user's terminal, or a Unix socket."""

from __future__ import annotations

import _socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from threading import Lock

from pyvmm.errors import HostError
from pyvmm.host import unix_sockets
from pyvmm.host.log import RateLimited
from pyvmm.host.poller import FAILED, HUNG_UP, Poller
from pyvmm.host.unix_sockets import Socket

_PIECE = 4096  # bytes given to the terminal at a time
_HELD = 4096  # typed bytes that wait for a receive buffer; more stays with whoever reads the keys


class End(ABC):
    """The host's end of a port. Called by the device's thread unless said otherwise.

    `connection` is a number for whoever is there, another one for each; 0 for nobody.
    """

    connection = 0

    @abstractmethod
    def write(self, view: memoryview) -> int:
        """Take bytes of the guest's; how many, 0 if none can be taken now."""

    @abstractmethod
    def read_into(self, views: list[memoryview]) -> int:
        """Fill `views` with bytes for the guest as far as there are some; how many."""

    @property
    @abstractmethod
    def has_input(self) -> bool:
        """True if `read_into` may find something."""

    def begin(self, poller: Poller) -> None:  # noqa: B027 - a choice, not a duty
        """A driver is there; `poller` tells what happens from now on. Raises HostError."""

    def finish(self) -> None:  # noqa: B027 - a choice, not a duty
        """The driver is gone, and so is what `begin` began."""

    def attend(self, guest_is_open: bool, pending: bool) -> None:  # noqa: B027 - a choice
        """Do what the events since the last time call for. `guest_is_open`: it has the port open;
        `pending`: some of what it wrote is not taken yet."""


class TerminalEnd(End):
    """A terminal that is always there. Its other side are `attach` and what ConsolePump calls.

    Output before `attach` goes nowhere; there is none, as no vCPU runs.
    """

    connection = 1

    def __init__(self) -> None:
        self._offer: Callable[[bytes], bool] = lambda data: True
        self._held = bytearray()
        self._lock = Lock()
        self._refused = False  # input was turned down
        self._on_room: Callable[[], None] | None = None
        self._wake: Callable[[], None] = lambda: None

    def attach(self, offer: Callable[[bytes], bool]) -> None:
        """Give the guest's output to `offer`, which takes all of it or says False, and never
        waits; `wake` tells that it might take it now."""
        self._offer = offer

    def set_wake(self, wake: Callable[[], None]) -> None:
        """Have the device's thread woken by `wake`."""
        self._wake = wake

    def wake(self) -> None:
        """The terminal may take more. Any thread may call it."""
        self._wake()

    def write(self, view: memoryview) -> int:
        piece = bytes(view[:_PIECE])
        return len(piece) if self._offer(piece) else 0

    def write_at_once(self, data: bytes) -> None:
        """Show `data` if there is room for it: an emergency write. Any thread may call it."""
        self._offer(data)

    # The keys' side: pyvmm.platform.console_pump.InputPort.

    def enqueue_input(self, data: bytes) -> int:
        """Take what there is room for; how many bytes. `watch_room` tells when there is more."""
        with self._lock:
            taken = data[: _HELD - len(self._held)]
            self._held += taken
            self._refused = len(taken) < len(data)
        if taken:
            self._wake()
        return len(taken)

    def watch_room(self, on_room: Callable[[], None] | None) -> None:
        """Have `on_room` called when input that was turned down has a chance again."""
        with self._lock:
            self._on_room = on_room

    @property
    def has_input(self) -> bool:
        return bool(self._held)

    def read_into(self, views: list[memoryview]) -> int:
        done = 0
        with self._lock:
            for view in views:
                piece = self._held[: len(view)]
                view[: len(piece)] = piece
                del self._held[: len(piece)]
                done += len(piece)
            if self._refused and not self._held:
                self._refused = False
                if self._on_room is not None:
                    self._on_room()
        return done


class SocketEnd(End):
    """A Unix socket that one program at a time may be connected to; others wait for their turn.

    The connection ends when the guest closes the port. Nothing is read from it, and so nothing
    lost, before the guest has opened the port.
    """

    def __init__(self, listener: Socket, name: str) -> None:
        """`listener` stays open. `name` is for messages."""
        self._listener = listener
        self._warn = RateLimited(prefix=f"port {name}: ", device=name)
        self._poller: Poller | None = None
        self._client: Socket | None = None
        self._guest_was_open = False
        self._closing = False  # the guest has closed; what it wrote before goes out yet
        self._connections = 0
        self._may_accept = self._readable = self._writable = self._hung_up = False

    def begin(self, poller: Poller) -> None:
        poller.add(self._listener.fileno(), self._note_arrival)
        self._poller = poller
        self._may_accept = True

    def finish(self) -> None:
        self._disconnect()
        self._poller = None
        self._guest_was_open = self._closing = False

    def _note_arrival(self, events: int) -> None:
        self._may_accept = True

    def _note(self, events: int) -> None:
        self._readable = self._writable = True
        self._hung_up = self._hung_up or bool(events & (HUNG_UP | FAILED))

    def attend(self, guest_is_open: bool, pending: bool) -> None:
        self._closing = not guest_is_open and (self._closing or self._guest_was_open)
        self._guest_was_open = guest_is_open
        gone = self._hung_up and not guest_is_open
        if self._client is not None and (gone or (self._closing and not pending)):
            self._disconnect()
        self._closing = self._closing and pending
        while self._client is None and self._may_accept and self._poller is not None:
            client = None
            try:
                client = unix_sockets.accept(self._listener)
                if client is not None:
                    self._poller.add(client.fileno(), self._note)
            except HostError as error:
                # No file descriptors left: it waits until some are. Or it cannot be watched.
                if client is not None:
                    client.close()
                self._warn(str(error))
                return
            if client is None:
                self._may_accept = False
                return
            self._client = client
            self._readable = self._writable = True
            self._hung_up = False
            self._connections += 1
            self.connection = self._connections

    def _disconnect(self) -> None:
        if self._client is not None:
            if self._poller is not None:
                self._poller.remove(self._client.fileno())
            self._client.close()
        self._client = None
        self.connection = 0
        self._readable = self._hung_up = False

    @property
    def has_input(self) -> bool:
        return self._readable and self._guest_was_open

    def write(self, view: memoryview) -> int:
        """Without a client the bytes are gone, as from an unplugged cable."""
        if self._client is None:
            return len(view)
        if not self._writable:
            return 0
        try:
            return self._client.send(view, _socket.MSG_NOSIGNAL)
        except BlockingIOError:
            self._writable = False
            return 0
        except OSError:  # EPIPE: it reads no more
            return len(view)

    def read_into(self, views: list[memoryview]) -> int:
        assert self._client is not None
        try:
            count = self._client.recvmsg_into(views)[0]
        except BlockingIOError:
            self._readable = False
            return 0
        except OSError:  # ECONNRESET
            count, self._hung_up = 0, True
        if not count:
            # A client that only sends no more may still read what the guest says.
            self._readable = False
            if self._hung_up:
                self._disconnect()
        return count
