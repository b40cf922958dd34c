"""An NBD server of a few lines, which may be told to fail and to say what makes no sense: the
"newstyle" handshake and simple replies of the NBD project's doc/proto.md."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from random import Random

_OPTION, _REPLY = 0x49484156454F5054, 0x3E889045565A9
_REQUEST, _SIMPLE = 0x25609513, 0x67446698
_GO, _ACK, _INFO, _UNSUPPORTED = 7, 1, 3, (1 << 31) + 1
_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM, _ZEROES = 0, 1, 2, 3, 4, 6
EIO, ENOSPC, EINVAL = 5, 28, 22


class Server:
    """Serves `data` over `connection`, in a thread that ends with it."""

    def __init__(self, data: bytearray, rng: Random, *, read_only: bool, plain: bool) -> None:
        """`plain` servers know neither TRIM nor WRITE_ZEROES."""
        self.data = data
        self.rng = rng
        # HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_TRIM, SEND_WRITE_ZEROES
        self.flags = 1 | (2 if read_only else 0) | 4 | (0 if plain else 0x60)
        self.fails = 0.0  # of so many requests it says so
        self.errs = 0.0  # of so many it says nonsense
        self.connection, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the connection, and wait for the thread."""
        with suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with self._ours, suppress(OSError, struct.error, ConnectionError):
            self._greet()
            while self._serve():
                pass

    def _take(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))

    def _bytes(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self._ours.recv(size - len(data))
            if not piece:
                raise ConnectionError
            data += piece
        return bytes(data)

    def _is_wrong(self) -> bool:
        return self.rng.random() < self.errs

    def _greet(self) -> None:
        self._ours.sendall(b"NBDMAGIC" + struct.pack(">QH", _OPTION, 1 | 2))
        self._take(">L")
        while True:
            _, option, length = self._take(">QLL")
            self._bytes(length)
            if self._is_wrong():
                self._ours.sendall(self.rng.randbytes(self.rng.randrange(40)))
                raise ConnectionError
            if option != _GO:
                self._answer(option, _UNSUPPORTED)
                continue
            self._answer(option, _INFO, struct.pack(">HQH", 0, len(self.data), self.flags))
            self._answer(option, _ACK)
            return

    def _answer(self, option: int, kind: int, data: bytes = b"") -> None:
        self._ours.sendall(struct.pack(">QLLL", _REPLY, option, kind, len(data)) + data)

    def _serve(self) -> bool:
        _, _, kind, cookie, offset, length = self._take(">LHHQQL")
        given = self._bytes(length) if kind == _WRITE else b""
        if kind == _DISCONNECT:
            return False
        error = self._carry_out(kind, offset, length, given)
        if self._is_wrong():
            way = self.rng.randrange(4)
            cookie ^= way == 0
            error = error if way else self.rng.getrandbits(32)
            if way == 1:
                self._ours.sendall(self.rng.randbytes(16))
                return False
            if way == 2:
                return False
        answer = struct.pack(">LLQ", _SIMPLE, error, cookie)
        if kind == _READ and not error:
            answer += self.data[offset : offset + length]
        self._ours.sendall(answer)
        return True

    def _carry_out(self, kind: int, offset: int, length: int, given: bytes) -> int:
        if self.rng.random() < self.fails:
            return self.rng.choice((EIO, ENOSPC))
        if kind not in (_READ, _WRITE, _FLUSH, _TRIM, _ZEROES):
            return EINVAL
        if kind == _WRITE:
            self.data[offset : offset + length] = given
        elif kind in (_TRIM, _ZEROES):
            self.data[offset : offset + length] = bytes(length)
        return 0
