"""The size of a terminal that is outside of the emulated host that we run in."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from pyvmm.errors import HostError
from pyvmm.host import unix_sockets
from pyvmm.host.unix_sockets import Socket

SERVICE = "terminal-size"  # the machine's end of a connection that tells it, line by line


class SizeService:
    """The machine's end: tells whoever connected the size now, and at each change."""

    def __init__(self, fd: int) -> None:
        """`fd` is the terminal."""
        self._fd = fd
        self._told: list[Socket] = []

    def connect(self) -> Socket:
        """A connection for the other end. Raises HostError."""
        ours, theirs = unix_sockets.pair()
        self._told.append(ours)
        size = os.get_terminal_size(self._fd)
        self._tell(ours, size.columns, size.lines)
        return theirs

    def tell(self, columns: int, rows: int) -> None:
        """The size has changed: fit for a signal's handler."""
        for connection in self._told:
            self._tell(connection, columns, rows)

    def _tell(self, connection: Socket, columns: int, rows: int) -> None:
        try:
            connection.send(f"{columns} {rows}\n".encode())
        except OSError:
            return  # gone, or far behind


def follow(on_size: Callable[[int, int], None]) -> None:
    """Have `on_size(columns, rows)` called, in a thread of its own, for the machine's terminal.

    Nothing happens outside of an emulated host, or if there is no terminal.
    """
    if not unix_sockets.is_routed():
        return
    try:
        connection = unix_sockets.reach(SERVICE)
    except HostError:
        return
    connection.setblocking(True)
    threading.Thread(target=_read, args=(connection, on_size), daemon=True).start()


def _read(connection: Socket, on_size: Callable[[int, int], None]) -> None:
    waiting = b""
    while data := connection.recv(4096):
        *lines, waiting = (waiting + data)[-4096:].split(b"\n")
        if lines:
            numbers = lines[-1].split()
            if len(numbers) == 2 and all(number.isdigit() for number in numbers):
                on_size(int(numbers[0][:9]), int(numbers[1][:9]))
