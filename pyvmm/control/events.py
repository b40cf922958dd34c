"""The events of a VM, told to whoever listens on its control socket: a line of JSON each.

docs/control-socket.md has the kinds. The last ones are kept, so that who comes later knows too what
happened before.
"""

from __future__ import annotations

import time
from collections import deque
from threading import Lock
from typing import Any

from pyvmm.control.protocol import Upgrade
from pyvmm.control.streams import Stream, Streams
from pyvmm.host.unix_sockets import Socket

KEPT = 64  # events that whoever begins to listen still gets

Event = dict[str, Any]


class Events:
    """The events of one VM, and who hears them. Any thread may call any method."""

    def __init__(self, streams: Streams) -> None:
        """`streams` serves the connections of those who listen."""
        self._streams = streams
        self._lock = Lock()
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._listeners: list[_Listener] = []
        self._count = 0

    def emit(self, kind: str, /, **details: object) -> None:
        """Tell that `kind` has happened. `details` are fit for JSON, and none is called event,
        number or time. Never waits."""
        with self._lock:
            self._count += 1
            event = {"event": kind, "number": self._count, "time": round(time.time(), 6), **details}
            self._kept.append(event)
            for listener in self._listeners:
                listener.tell(event)

    def listen(self, history: bool = True) -> Upgrade:
        """Make a control connection one that gets the events: with `history` those that were
        kept, then each as it comes. Raises ConfigError if there are too many such connections."""
        self._streams.check_room()

        def hand_over(socket: Socket, received: bytes) -> None:
            stream = self._streams.make(socket)
            listener = _Listener(stream)
            stream.on_end = lambda: self._forget(listener)
            with self._lock:
                for event in self._kept if history else ():
                    listener.tell(event)
                self._listeners.append(listener)
            self._streams.add(stream)

        return Upgrade({}, hand_over)

    def _forget(self, listener: _Listener) -> None:
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)


class _Listener:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._lost = 0

    def tell(self, event: Event) -> None:
        import json  # only once somebody listens

        lines = json.dumps(event).encode() + b"\n"
        if self._lost:
            lost = {"event": "lost", "count": self._lost, "time": event["time"]}
            lines = json.dumps(lost).encode() + b"\n" + lines
        if self._stream.offer(lines):
            self._lost = 0
        else:
            self._lost += 1
