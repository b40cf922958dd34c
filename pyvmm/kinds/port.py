"""``--port name=NAME,path=PATH``: byte streams of the guest's /dev/virtio-ports on Unix sockets."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pyvmm.errors import ConfigError
from pyvmm.host.named_listener import NamedListener
from pyvmm.kinds.registry import Context, Crossing
from pyvmm.spec.vm import DeviceSpec
from pyvmm.virtio.console.device import MAX_NAMED_PORTS, ConsoleDevice
from pyvmm.virtio.console.ends import SocketEnd

_OPTION = "--port"
_USAGE = "use name=NAME,path=PATH[,packed]"
_NAME_BYTES = 64
_INSIDE = "/run/pyvmm-port"


@dataclass(frozen=True)
class PortSpec:
    """One port: its name in the guest, and the socket at which a program of the host finds it."""

    name: str
    path: str


@dataclass(frozen=True)
class Spec(DeviceSpec):
    """A console device with named ports and no console."""

    kind: ClassVar[str] = "ports"

    ports: tuple[PortSpec, ...]


def parse(text: str) -> Spec:
    """The device of all ``--port``, each on a line of `text`. A comma is written twice in a path.

    Raises ConfigError.
    """
    return Spec(tuple(_parse_port(line) for line in text.split("\n")))


def _parse_port(text: str) -> PortSpec:
    values = {"name": "", "path": ""}
    for option in text.replace(",,", "\0").split(","):
        key, _, value = option.replace("\0", ",").partition("=")
        if key not in values or not value:
            raise ConfigError(f"unknown option {option!r}", cure=_USAGE, option=_OPTION)
        values[key] = value
    if not all(values.values()):
        raise ConfigError(f"no name or no path in {text!r}", cure=_USAGE, option=_OPTION)
    return PortSpec(**values)


def check(spec: Spec) -> Spec:
    """`spec`, or ConfigError for names that a guest cannot have."""
    ports = tuple(_as_port(port) for port in spec.ports)
    if not 1 <= len(ports) <= MAX_NAMED_PORTS:
        raise ConfigError(
            f"{len(ports)} ports", cure=f"use at most {MAX_NAMED_PORTS}", option=_OPTION
        )
    for port in ports:
        odd = not port.name.isprintable() or "/" in port.name or port.name in (".", "..")
        if odd or len(port.name.encode()) > _NAME_BYTES:
            raise ConfigError(
                f"the name {port.name!r} has a slash, is not printable or too long",
                cure=f"use at most {_NAME_BYTES} bytes",
                option=_OPTION,
            )
        if sum(port.name == other.name for other in ports) > 1:
            raise ConfigError(f"two ports are called {port.name!r}", option=_OPTION)
    return replace(spec, ports=ports)


def _as_port(port: Any) -> PortSpec:
    # As JSON has it, a port is a mapping.
    return port if isinstance(port, PortSpec) else PortSpec(**port)


def open_device(spec: Spec, context: Context) -> ConsoleDevice:
    """A device that listens at the ports' paths. Raises ConfigError if that cannot be."""
    named = []
    for port in spec.ports:
        listener = NamedListener(port.path, option=_OPTION)
        context.closing.callback(listener.close)
        named.append((port.name, SocketEnd(listener.socket, port.name)))
    return ConsoleDevice(named=named, name="ports")


def cross(spec: Spec, closing: ExitStack) -> Crossing:
    """The sockets stay here; each leads to one in there."""
    listening = []
    inside = []
    for number, port in enumerate(spec.ports):
        listener = NamedListener(os.path.abspath(port.path), option=_OPTION)
        closing.callback(listener.close)
        listening.append((listener, f"{_INSIDE}{number}"))
        inside.append(replace(port, path=f"{_INSIDE}{number}"))
    return Crossing(replace(spec, ports=tuple(inside)), tuple(listening))
