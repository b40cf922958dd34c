"""The byte streams between the command inside and the outside, one virtio-serial port each."""

from __future__ import annotations

import socket
from dataclasses import dataclass

# Each machine has these, /dev/vport0pN inside. Number 0 is kept for a console by the device
# (virtio 1.3, 5.3.4 Device configuration layout). init.sh and command.sh count the same way.
MACHINE_PORTS = ("stdin", "stdout", "stderr", "control", "relay")
FIRST_SPARE = 1 + len(MACHINE_PORTS)
SPARE_PORTS = 8  # for streams that come later
RELAY_DEVICE = f"/dev/vport0p{1 + MACHINE_PORTS.index('relay')}"


@dataclass(frozen=True)
class Port:
    """A port's `number`, `name`, our end of it, and QEMU's."""

    number: int
    name: str
    ours: socket.socket
    theirs: socket.socket


def open_machine_ports() -> list[Port]:
    """The ports that each machine has, in order of their numbers.

    Socket pairs have no name anywhere, so nothing of them is left when both sides are gone.
    """
    return [_open_port(number, name) for number, name in enumerate(MACHINE_PORTS, start=1)]


def open_run_ports(sink_count: int, stream_count: int) -> list[Port]:
    """The ports of one run, on a device of their own: sinks, numbered from 1; then its streams,
    which are left out, as their outer ends are somebody else's; and last one that tells inside that
    all before it are connected. None for a run that has neither sinks nor streams."""
    if not sink_count + stream_count:
        return []
    sinks = [_open_port(1 + n, f"sink{n}") for n in range(sink_count)]
    return [*sinks, _open_port(1 + sink_count + stream_count, "gate")]


def _open_port(number: int, name: str) -> Port:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return Port(number, name, ours, theirs)
