"""The emulated host's end of the relay: the monitor in there serves it with a thread of its own."""

from __future__ import annotations

import os

from pyvmm.host import log, unix_sockets
from pyvmm.host.syscalls import allow_descriptors, open_file
from pyvmm.relay import VARIABLE
from pyvmm.relay.frames import DESCRIPTORS
from pyvmm.relay.multiplexer import INSIDE, Multiplexer

_relay: Multiplexer | None = None


def start() -> None:
    """From now on `unix_sockets.reach` reaches the machine's sockets. Nothing happens outside of an
    emulated host. Raises HostError.
    """
    global _relay
    path = os.environ.get(VARIABLE)
    if path is None or _relay is not None:
        return
    allow_descriptors(DESCRIPTORS)
    port = open_file(path, os.O_RDWR | os.O_NONBLOCK)
    _relay = Multiplexer(port, INSIDE, reach=unix_sockets.connect, on_broken=_say, hold=True)
    _relay.start()
    unix_sockets.set_route(_relay.connect)


def admit() -> None:
    """Let the machine's connections in, which have waited until now: all that listens does."""
    if _relay is not None:
        _relay.admit()


def finish(patience: float = 1.0) -> None:
    """Wait until what was said on connections that have ended here is out, as far as that takes
    less than `patience` seconds: the process is about to end."""
    if _relay is not None:
        _relay.wait_quiet(patience)


def _say(reason: str) -> None:
    log.to_stderr(f"sockets out of the emulated KVM host are cut off: {reason}")
