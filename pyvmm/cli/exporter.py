"""`pyvmm metrics --listen`: a small web server that Prometheus fetches the numbers from.

Whoever reaches its port costs it little: there are so many connections at a time and no more, each
with so many bytes and seconds for one request, and VMs are asked for one client after the other.

A web page that a browser on this machine has open must not read it by DNS rebinding: a name that
its author first lets stand for his own server, then for 127.0.0.1. The browser sends that name as
the request's Host (RFC 9110, 7.2 Host and :authority), and so only addresses and known names are
answered.
"""

from __future__ import annotations

import io
import ipaddress
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any, cast

from pyvmm.errors import ConfigError
from pyvmm.host import log
from pyvmm.monitor.stats import CONTENT_TYPE

MAX_CLIENTS = 16
MAX_REQUEST = 16 << 10  # bytes of a request line and its headers
_REQUEST_SECONDS = 5.0  # for a client to send its request, all of it
_ANSWER_SECONDS = 10.0  # for a client to take its answer, all of it
_BUSY = b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\n\r\n"


def serve(host: str, port: int, gather: Callable[[], str], *, names: Collection[str] = ()) -> None:
    """Answer requests for /metrics with what `gather` gives, until KeyboardInterrupt.

    `host` is an address or a name of this machine. Requests have to be for an IP address,
    localhost, this machine's name or one of `names`. Raises ConfigError if nobody can listen there.
    """
    with open_server(host, port, gather, names=names) as server:
        shown = f"[{host}]" if ":" in host else host
        log.to_stderr(f"metrics at http://{shown}:{server.server_address[1]}/metrics")
        server.serve_forever()


def open_server(
    host: str, port: int, gather: Callable[[], str], *, names: Collection[str] = ()
) -> Server:
    """The server of `serve`, which listens already."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return Server(family, address, gather, {host, *names})
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen at {host}:{port}: {reason}", cure="name another", option="--listen"
        ) from None


class Server(socketserver.ThreadingTCPServer):
    """Not http.server's, which asks the DNS for this machine's name."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(
        self, family: int, address: Any, gather: Callable[[], str], names: Collection[str]
    ) -> None:
        self.address_family = family
        self._gather = gather
        self._asking = threading.Lock()
        self._room = threading.Semaphore(MAX_CLIENTS)
        self._names = {"localhost", socket.gethostname().lower(), *map(str.lower, names)}
        super().__init__(address, _Handler)

    def text(self) -> str:
        """The metrics of now. One at a time: the VMs' control sockets are for others too."""
        with self._asking:
            return self._gather()

    def is_ours(self, host: str) -> bool:
        """True if `host`, of a request's header, is what this server may be called."""
        name, colon, port = host.strip().lower().rpartition(":")
        if not colon or not port.isdigit():
            name = host.strip().lower()
        if name.startswith("[") and name.endswith("]"):
            name = name[1:-1]
        if name.removesuffix(".") in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            with suppress(OSError):
                request.send(_BUSY, socket.MSG_DONTWAIT)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):  # a client that has gone is nobody's concern
            log.to_stderr(f"a defect in pyvmm, met by a request for metrics: {error!r}")


class _TooLarge(Exception):
    pass


class _Bounded(io.BufferedIOBase):
    """A client's request, MAX_REQUEST bytes of it."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._left = MAX_REQUEST

    def readline(self, size: int | None = -1, /) -> bytes:
        line: bytes = self._source.readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise _TooLarge
        return line

    def close(self) -> None:
        self._source.close()


class _Handler(BaseHTTPRequestHandler):
    server_version = "pyvmm"
    sys_version = ""
    # For an error before the first line has come whole.
    requestline = request_version = command = ""

    def setup(self) -> None:
        super().setup()
        self.rfile = cast("Any", _Bounded(self.rfile))
        self._timer = self._end_after(_REQUEST_SECONDS)

    def finish(self) -> None:
        self._timer.cancel()
        super().finish()

    def _end_after(self, seconds: float) -> threading.Timer:
        """Have the connection ended then, whatever the client does: a time for each byte would let
        one that sends them slowly stay for ever."""
        timer = threading.Timer(seconds, self._end)
        timer.daemon = True
        timer.start()
        return timer

    def _end(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except _TooLarge:
            self.close_connection = True
            self.send_error(431)

    def do_GET(self) -> None:
        self._timer.cancel()
        server = cast("Server", self.server)
        if not all(map(server.is_ours, self.headers.get_all("Host", []))):
            self._answer(421, "text/plain", b"this server has another name: see --allow-host\n")
        elif self.path.partition("?")[0] != "/metrics":
            self._answer(404, "text/plain", b"metrics are at /metrics\n")
        else:
            self._answer(200, CONTENT_TYPE, server.text().encode())

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self._timer = self._end_after(_ANSWER_SECONDS)
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: it is fetched every few seconds."""
