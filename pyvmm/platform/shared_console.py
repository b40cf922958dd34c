"""A console that several look at and type into: its last output, and its input in shares."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from pyvmm.platform.console_pump import InputPort

KEPT = 64 << 10  # bytes of output that whoever begins to look still sees

_SLACK = 16 << 10  # trimmed in pieces, not with each byte

Observer = Callable[[bytes], None]


class ConsoleTail:
    """Keeps the end of what a console shows, for those who come later. Any thread may call it."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._lock = Lock()
        self._observers: tuple[Observer, ...] = ()

    def observe(self, data: bytes) -> None:
        """The guest has written `data`."""
        with self._lock:
            self._data += data
            if len(self._data) > KEPT + _SLACK:
                del self._data[:-KEPT]
            for observer in self._observers:
                observer(data)

    def follow(self, observer: Observer, *, history: bool) -> None:
        """Have `observer` called with what comes from now on; it must not wait. With `history`
        first with what was there before: the last `KEPT` bytes, from the beginning of a line if
        there was more."""
        with self._lock:
            if history and self._data:
                observer(_from_a_line(bytes(self._data[-KEPT:]), cut=len(self._data) > KEPT))
            self._observers = (*self._observers, observer)

    def unfollow(self, observer: Observer) -> None:
        """`observer` is not called any more."""
        with self._lock:
            self._observers = tuple(one for one in self._observers if one != observer)


def _from_a_line(data: bytes, *, cut: bool) -> bytes:
    # Half a line, or half an escape sequence, would be shown as rubbish.
    return data[data.find(b"\n") + 1 :] if cut else data


class SharedInput:
    """Lets several type into one input port; what each offers at a time stays together.

    The port has one place for who waits for room; this is in it, and passes the word on.
    """

    def __init__(self, port: InputPort) -> None:
        self._port = port
        self._lock = Lock()
        self.shares: tuple[InputShare, ...] = ()
        port.watch_room(self._tell)

    def replace_serial(self, port: InputPort) -> None:
        """The machine has another serial port now, which gets the input if the old one did."""
        if type(self._port) is type(port):
            self._port.watch_room(None)
            self._port = port
            port.watch_room(self._tell)
            self._tell()

    def join(self) -> InputShare:
        """Another one who types; `leave` it at the end."""
        share = InputShare(self)
        with self._lock:
            self.shares = (*self.shares, share)
        return share

    def leave(self, share: InputShare) -> None:
        """`share` types no more."""
        with self._lock:
            self.shares = tuple(one for one in self.shares if one is not share)
        self._tell()  # it may have been the one that the port would have told next

    def enqueue(self, share: InputShare, data: bytes) -> int:
        """Give `data` of `share` to the port; how many bytes it took."""
        # Before the port is asked: whoever else is served after that sees it.
        share.waiting = True
        taken = self._port.enqueue_input(data)
        if taken == len(data):
            share.waiting = False
            # The port has forgotten those whom it turned down before.
            self._tell()
        return taken

    def _tell(self) -> None:
        # Called with the port's lock held, perhaps: no lock may be taken here.
        for share in self.shares:
            if share.waiting and share.on_room is not None:
                share.on_room()


class InputShare:
    """One of those who type: an InputPort."""

    def __init__(self, shared: SharedInput) -> None:
        self._shared = shared
        self.on_room: Callable[[], None] | None = None
        self.waiting = False  # some of what it offered last was turned down

    def enqueue_input(self, data: bytes) -> int:
        """Take what there is room for; how many bytes. `watch_room` tells when there is more."""
        return self._shared.enqueue(self, data)

    def watch_room(self, on_room: Callable[[], None] | None) -> None:
        """Have `on_room` called when input that was turned down has a chance again. It must not
        block, nor call back."""
        self.on_room = on_room

    def leave(self) -> None:
        """Nothing more is typed here."""
        self._shared.leave(self)
