"""The monitor of a VM that somebody else has started, reached by its control socket."""

from __future__ import annotations

import json
import os
import select
import signal
from contextlib import suppress
from threading import Lock, Thread
from typing import Any

from pyvmm.api.errors import Outcome
from pyvmm.api.monitor import PIECE, Monitor
from pyvmm.control.client import Client, open_console, open_events
from pyvmm.host.syscalls import EventFd
from pyvmm.host.unix_sockets import Socket


class AttachedMonitor(Monitor):
    """A monitor that runs already. How it has ended is what its last event says."""

    def __init__(self, name: str) -> None:
        """Raises ConfigError if no VM of that name runs, ControlError, HostError."""
        super().__init__(name)
        with Client.connect(name) as client:
            self.pid = client.pid
            self._process = client.watch_process()
        self._console = open_console(name)
        self._events = open_events(name)
        self._leaving = EventFd()
        self._closing = Lock()
        self._told = Outcome(None, "it did not say why")
        Thread(target=self._pump, name="pyvmm console", daemon=True).start()

    def signal(self, number: signal.Signals) -> None:
        # A number that `_close` gives back may be another file's at once.
        with self._closing, suppress(ProcessLookupError):  # it has just ended
            if self._process >= 0:
                signal.pidfd_send_signal(self._process, number)

    def type(self, data: bytes) -> None:
        self.write(self._console.fileno(), data)

    def detach(self) -> None:
        """Let go of it; it runs on."""
        with self._closing:
            if self._leaving.fd >= 0:
                self._leaving.signal()

    # --- the thread that reads --------------------------------------------------------------------

    def _pump(self) -> None:
        rest = b""
        poll = select.poll()
        streams = {self._console.fileno(): self._console, self._events.fileno(): self._events}
        for fd in (*streams, self._leaving.fd, *([self._process] if self._process >= 0 else [])):
            poll.register(fd, select.POLLIN)
        running = self._process >= 0
        while streams or running:
            for fd, _ in poll.poll():
                if fd == self._leaving.fd:
                    self.finish(Outcome(None, "it was let go of"), self._close)
                    return
                if fd == self._process:
                    poll.unregister(fd)
                    running = False
                elif not (data := _receive(streams[fd])):
                    poll.unregister(fd)
                    del streams[fd]
                elif fd == self._console.fileno():
                    self.transcript.append(data)
                else:
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        self._take(json.loads(line))
        self.finish(self._told, self._close)

    def _take(self, event: dict[str, Any]) -> None:
        if message := event.get("message"):
            self.messages.append(f"{self.name}: {message}")
        if event.get("event") == "ended":
            self._told = Outcome(event.get("exit_code"), event.get("message", ""))

    def _close(self) -> None:
        self._console.close()
        self._events.close()
        with self._closing:
            self._leaving.close()
            if self._process >= 0:
                os.close(self._process)
                self._process = -1


def _receive(stream: Socket) -> bytes:
    try:
        return stream.recv(PIECE)
    except OSError:
        return b""
