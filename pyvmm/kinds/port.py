"""``--port name=NAME,path=PATH``: byte streams of the guest's /dev/virtio-ports on Unix sockets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pyvmm.errors import ConfigError
from pyvmm.kinds.interface import Context, Reader
from pyvmm.spec import tables
from pyvmm.spec.options import Option, as_list, read_text, unknown_option, wrong_type
from pyvmm.spec.record import Record, replace
from pyvmm.spec.vm import DeviceSpec

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypedDict

    from pyvmm.kinds.border import Border, Crossing
    from pyvmm.kinds.interface import Table
    from pyvmm.virtio.console.device import ConsoleDevice

    class Keywords(TypedDict, total=False):
        """The keywords that `pyvmm.VM` takes."""

        ports: PortSpec | str | Table | Iterable[PortSpec | str | Table]


_FLAG = "--port"
_SYNTAX = "name=NAME,path=PATH[,packed]"
_NAME_BYTES = 64

OPTIONS = (
    Option(
        "ports",
        _FLAG,
        metavar=_SYNTAX,
        device="ports",
        many=True,
        default=(),
        repeats=True,
        help="Add a port, /dev/virtio-ports/NAME in the guest, that a program of the host finds at "
        "the Unix socket PATH; may be repeated.",
    ),
)


class PortSpec(Record):
    """One port: its name in the guest, and the socket at which a program of the host finds it."""

    name: str
    path: str


class Spec(DeviceSpec):
    """A console device with named ports and no console."""

    kind: ClassVar[str] = "ports"

    ports: tuple[PortSpec, ...]


TABLE = PortSpec  # in a file, each port is one


def read(value: Any, option: Option, usual: Reader) -> list[DeviceSpec]:
    """The one device that has all ports. Raises ConfigError."""
    specs = [spec for one in as_list(value) for spec in _read_port(one, option, usual)]
    if not specs:
        return []
    ports = tuple(port for spec in specs for port in spec.ports)
    return [Spec(ports, packed=any(spec.packed for spec in specs))]


def _read_port(value: Any, option: Option, usual: Reader) -> list[Any]:
    if isinstance(value, Spec):
        return [value]
    if isinstance(value, PortSpec):
        return [Spec((value,))]
    if isinstance(value, Mapping):
        table = dict(value)
        packed = table.pop("packed", False)
        if type(packed) is not bool:
            raise wrong_type(option, value, "with packed as true or false")
        return [Spec((tables.read(PortSpec, table, option.name),), packed=packed)]
    return usual(read_text(value, option))


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
            known = (*values, "packed")
            raise unknown_option(option, known, usage=f"use {_SYNTAX}", flag=_FLAG)
        values[key] = value
    if not all(values.values()):
        raise ConfigError(f"no name or no path in {text!r}", cure=f"use {_SYNTAX}", option=_FLAG)
    return PortSpec(**values)


def plain(specs: list[Spec], option: Option) -> tuple[dict[str, Any], ...]:
    """The values that a file has for them: a table for each port."""
    ports = [tables.write(port) for spec in specs for port in spec.ports]
    if any(spec.packed for spec in specs):
        ports[0]["packed"] = True
    return tuple(ports)


def with_paths(spec: Spec, change: Callable[[str], str]) -> Spec:
    """`spec` with the sockets' paths as `change` gives them."""
    ports = tuple(replace(port, path=change(port.path)) for port in spec.ports)
    return replace(spec, ports=ports)


def for_copy(spec: Spec, name: str) -> Spec:
    """`spec` for the VM `name`, a copy of one that has this: with sockets of its own."""
    return with_paths(spec, lambda path: f"{path}-{name}")


def check(spec: Spec) -> Spec:
    """`spec`, or ConfigError for names that a guest cannot have."""
    from pyvmm.virtio.console.device import MAX_NAMED_PORTS

    ports = spec.ports
    if not 1 <= len(ports) <= MAX_NAMED_PORTS:
        raise ConfigError(
            f"{len(ports)} ports", cure=f"use at most {MAX_NAMED_PORTS}", option=_FLAG
        )
    for port in ports:
        odd = not port.name.isprintable() or "/" in port.name or port.name in (".", "..")
        if odd or len(port.name.encode()) > _NAME_BYTES:
            raise ConfigError(
                f"the name {port.name!r:.100} has a slash, is not printable or too long",
                cure=f"use at most {_NAME_BYTES} bytes",
                option=_FLAG,
            )
        if sum(port.name == other.name for other in ports) > 1:
            raise ConfigError(f"two ports are called {port.name!r}", option=_FLAG)
    return replace(spec, ports=ports)


def from_plain(values: Mapping[str, Any]) -> Spec:
    """The specification of which JSON has made `values`. Raises TypeError, KeyError."""
    return Spec(**{**values, "ports": tuple(map(_as_port, values["ports"]))})


def _as_port(port: Any) -> PortSpec:
    # As JSON has it, a port is a mapping.
    return port if isinstance(port, PortSpec) else PortSpec(**port)


def open_device(spec: Spec, context: Context) -> ConsoleDevice:
    """A device that listens at the ports' paths. Raises ConfigError if that cannot be."""
    from pyvmm.host.named_listener import NamedListener
    from pyvmm.virtio.console.device import ConsoleDevice
    from pyvmm.virtio.console.ends import SocketEnd

    named = []
    for port in spec.ports:
        listener = NamedListener(port.path, option=_FLAG)
        context.closing.callback(listener.close)
        named.append((port.name, SocketEnd(listener.socket, port.name)))
    return ConsoleDevice(named=named, name="ports")


def cross(spec: Spec, border: Border) -> Crossing:
    """The sockets stay here; each leads to one in there."""
    from pyvmm.host.named_listener import NamedListener
    from pyvmm.kinds.border import Crossing

    listening = []
    inside = []
    for port in spec.ports:
        listener = NamedListener(os.path.abspath(port.path), option=_FLAG)
        border.closing.callback(listener.close)
        place = border.place("port")
        listening.append((listener, place))
        inside.append(replace(port, path=place))
    return Crossing(replace(spec, ports=tuple(inside)), tuple(listening))
