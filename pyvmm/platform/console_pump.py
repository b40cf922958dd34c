"""From standard input to the guest's serial port: a thread that never drops and never spins.

The guest takes 16 bytes at a time, whenever it likes. A pipe or a file is read only as fast as the
guest takes it. A terminal is read ahead, because behind a pasted text that the guest does not take
may come the keys that end the guest.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from pyvmm.host.syscalls import EventFd
from pyvmm.platform.escape import Command, EscapeParser
from pyvmm.platform.terminal import in_background

READ_AHEAD = 1 << 20  # bytes typed or pasted that wait for the guest; what comes on top is dropped

_CHUNK = 4096
_OFFER = 256
_PATIENCE = 0.5  # seconds
_BACKGROUND_CHECK = 0.25  # seconds


class InputPort(Protocol):
    """A receiver of input, such as `Serial`."""

    def enqueue_input(self, data: bytes) -> int: ...

    def watch_room(self, on_room: Callable[[], None] | None) -> None: ...


class ConsolePump:
    """Carries what is read from `fd` to `port`; None is an input that has ended.

    With `on_command`, the input is a keyboard: Ctrl-A keys are taken out and reported, in the
    pump's thread. Without, every byte goes to the guest. The end of the input, or an error reading
    it, ends only the input. Use `start`, and `stop` at the end.
    """

    def __init__(
        self,
        fd: int | None,
        port: InputPort,
        *,
        on_command: Callable[[Command], None] | None = None,
    ) -> None:
        self._fd = fd
        self._port = port
        self._on_command = on_command
        self._parser = EscapeParser()
        self._waiting = bytearray()
        self._room = EventFd()
        self._stop = EventFd()
        self._epoll = select.epoll()
        self._epoll.register(self._stop.fd, select.EPOLLIN)
        self._epoll.register(self._room.fd, select.EPOLLIN)
        self._always_ready = False
        self._watching = False
        self._thread = threading.Thread(target=self._run, name="console-input", daemon=True)

    def start(self) -> None:
        """Start carrying."""
        self._port.watch_room(self._room.signal)
        self._thread.start()

    def stop(self) -> None:
        """Stop reading. May be called from `on_command`, and more than once."""
        if self._stop.fd < 0:
            return
        self._stop.signal()
        if self._thread is threading.current_thread() or not self._thread.ident:
            return
        # A read can hang for all that epoll said: another process took what was there.
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            return
        self._port.watch_room(None)
        self._epoll.close()
        self._room.close()
        self._stop.close()

    # --- the pump's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            timeout = self._watch()
            ready = {fd for fd, _ in self._epoll.poll(timeout)}
            if self._stop.fd in ready:
                return
            if self._room.fd in ready:
                self._room.drain()
            if self._fd in ready or (self._always_ready and self._wants_input()):
                self._read()
            self._deliver()

    def _wants_input(self) -> bool:
        if self._fd is None:
            return False
        # A keyboard is always read, for the sake of its commands.
        return not self._waiting or self._on_command is not None

    def _watch(self) -> float | None:
        """Watch the input if it is wanted; how many seconds to wait, None for ever."""
        fd = self._fd
        if fd is None:
            return None
        # Reading a terminal from the background would stop the whole process (SIGTTIN).
        background = in_background(fd)
        wanted = self._wants_input() and not background
        if self._always_ready:
            return 0 if wanted else None
        try:
            if wanted and not self._watching:
                self._epoll.register(fd, select.EPOLLIN)
            elif self._watching and not wanted:
                self._epoll.unregister(fd)
            self._watching = wanted
        except PermissionError:  # a regular file, or /dev/null
            self._always_ready = True
            return 0
        except OSError:  # closed
            self._fd = None
        return _BACKGROUND_CHECK if background else None

    def _read(self) -> None:
        fd = self._fd
        assert fd is not None
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return  # someone who shares the input has been faster
        except OSError:
            data = b""  # EIO: the terminal hung up
        if not data:
            self._end_input(fd)
            return
        if self._on_command is None:
            self._waiting += data
            return
        to_guest, commands = self._parser.feed(data)
        self._waiting += to_guest[: READ_AHEAD - len(self._waiting)]
        for command in commands:
            self._on_command(command)

    def _end_input(self, fd: int) -> None:
        self._fd = None
        if self._watching:
            with suppress(OSError):  # closed while it was read
                self._epoll.unregister(fd)

    def _deliver(self) -> None:
        while self._waiting:
            offer = bytes(self._waiting[:_OFFER])
            taken = self._port.enqueue_input(offer)
            del self._waiting[:taken]
            if taken < len(offer):
                return
