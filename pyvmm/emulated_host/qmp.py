"""QEMU's machine protocol, as far as it is needed: one command after the other."""

from __future__ import annotations

import json
import socket
from threading import Lock
from typing import Any

from pyvmm.emulated_host.spec import EmulatedHostError

_PATIENCE = 20.0  # seconds for an answer
_MAX_LINE = 1 << 20


class Qmp:
    """A QMP monitor at a connected socket, which stays the caller's. This side is silent
    until the first command, and QEMU sends only its greeting before. Any thread may use it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""
        self._ready = False
        self._id = 0
        self._lock = Lock()

    def execute(self, command: str, fd: int | None = None, /, **arguments: object) -> Any:
        """The command's result; `fd` is a descriptor that goes with it. Raises EmulatedHostError
        for an error or no answer."""
        with self._lock:
            if not self._ready:
                self._connection.settimeout(_PATIENCE)
                self._read()  # the greeting
                self._call("qmp_capabilities", {})
                self._ready = True
            return self._call(command, arguments, fd)

    def _call(self, command: str, arguments: dict[str, object], fd: int | None = None) -> Any:
        self._id += 1  # an answer that came too late is not taken for the next one
        request = {"execute": command, "arguments": arguments, "id": self._id}
        try:
            line = json.dumps(request).encode() + b"\n"
            if fd is not None:  # with the first byte
                line = line[socket.send_fds(self._connection, [line], [fd]) :]
            self._connection.sendall(line)
        except OSError as error:
            raise EmulatedHostError(f"QEMU takes no commands: {error.strerror}") from None
        while True:
            answer = self._read()
            if answer.get("id") != self._id:
                continue  # an event, of no interest
            if "error" in answer:
                raise EmulatedHostError(str(answer["error"].get("desc")))
            return answer["return"]

    def _read(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            try:
                data = self._connection.recv(1 << 16)
            except OSError:
                data = b""
            if not data or len(self._received) > _MAX_LINE:
                raise EmulatedHostError("QEMU does not answer")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer
