"""The byte streams between the command inside and the outside, one virtio-serial port each."""

from __future__ import annotations

import socket
from dataclasses import dataclass

# Ports are /dev/vport0pN inside. Number 0 is kept for a console by the device (virtio 1.3, 5.3.4
# Device configuration layout), so these begin at 1; command.sh counts the same way.
STDIN, STDOUT, STDERR, FIRST_SINK = 1, 2, 3, 4


@dataclass(frozen=True)
class Port:
    """A port's `number`, `name`, our end of it, and QEMU's."""

    number: int
    name: str
    ours: socket.socket
    theirs: socket.socket


def relay_device(sink_count: int) -> str:
    """The path inside of the port for sockets, which follows the sinks."""
    return f"/dev/vport0p{FIRST_SINK + sink_count}"


def first_stream(sink_count: int, *, relay: bool) -> int:
    """The number of the first port whose outer end is somebody else's; see HostStream."""
    return FIRST_SINK + sink_count + int(relay)


def open_ports(sink_count: int, *, relay: bool, stream_count: int = 0) -> list[Port]:
    """stdin, stdout, stderr, the sinks, perhaps the relay of sockets and, last, the control port,
    in order of their numbers. Those of the streams, before the control port, are left out.

    Socket pairs have no name anywhere, so nothing of them is left when both sides are gone.
    """
    sinks = (f"sink{n}" for n in range(sink_count))
    names = ["stdin", "stdout", "stderr", *sinks, *(["relay"] if relay else [])]
    ports = [_open_port(number, name) for number, name in enumerate(names, start=STDIN)]
    control = first_stream(sink_count, relay=relay) + stream_count
    return [*ports, _open_port(control, "control")]


def _open_port(number: int, name: str) -> Port:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return Port(number, name, ours, theirs)
