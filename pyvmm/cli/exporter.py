"""`pyvmm metrics --listen`: a small web server that Prometheus fetches the numbers from."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

from pyvmm.errors import ConfigError
from pyvmm.host import log
from pyvmm.machine.metrics import CONTENT_TYPE

_PATIENCE = 10.0  # seconds for a client to send its request


def serve(host: str, port: int, gather: Callable[[], str]) -> None:
    """Answer requests for /metrics with what `gather` gives, until KeyboardInterrupt. Raises
    ConfigError if nobody can listen there."""

    class Handler(_Handler):
        text = staticmethod(gather)

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

    try:
        server = Server((host, port), Handler)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(
            f"cannot listen at {host}:{port}: {reason}", cure="name another", option="--listen"
        ) from None
    with server:
        shown = f"[{host}]" if ":" in host else host
        log.to_stderr(f"metrics at http://{shown}:{server.server_address[1]}/metrics")
        server.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    text: ClassVar[Callable[[], str]]
    timeout = _PATIENCE

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        body = type(self).text().encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: it is fetched every few seconds."""
