"""Gives data to whoever connects to port 7001, and tells what comes to port 7002 apart by its
checksum; runs beside the monitor, with the standard library alone.

    python net_peer.py SEED BYTES
"""

from __future__ import annotations

import hashlib
import random
import socket
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread


def serve(server: socket.socket, data: bytes) -> None:
    while True:
        connection, _ = server.accept()
        with connection:
            connection.sendall(data)


def take(server: socket.socket) -> None:
    while True:
        connection, _ = server.accept()
        digest = hashlib.sha256()
        with connection:
            while part := connection.recv(1 << 20):
                digest.update(part)
            connection.sendall(digest.hexdigest().encode() + b"\n")


def kernel_threads() -> int:
    """Those of vhost."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):  # it has just ended
            found += path.read_text().startswith("vhost-")
    return found


def count(server: socket.socket) -> None:
    while True:
        connection, _ = server.accept()
        with connection:
            connection.sendall(f"{kernel_threads()}\n".encode())


def main() -> None:
    seed, size = map(int, sys.argv[1:])
    gives, takes, counts = (socket.create_server(("", 7001 + index)) for index in range(3))
    data = random.Random(seed).randbytes(size)
    Thread(target=take, args=[takes], daemon=True).start()
    Thread(target=count, args=[counts], daemon=True).start()
    serve(gives, data)


if __name__ == "__main__":
    main()
