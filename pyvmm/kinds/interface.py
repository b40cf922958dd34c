"""What the registry and the kinds of devices have in common: what a kind is given, and what it
gives back. pyvmm.kinds.registry tells what a kind consists of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.spec.options import Option, as_list, wrong_type
from pyvmm.spec.vm import DeviceSpec, DiskSpec, VmSpec

if TYPE_CHECKING:
    from pyvmm.emulated_host import HostDisk, HostStream
    from pyvmm.host.named_listener import NamedListener
    from pyvmm.machine.alarm import Alarm
    from pyvmm.machine.trace import Hook
    from pyvmm.virtio.device import VirtioDevice

Spec = DiskSpec | DeviceSpec
Table = Mapping[str, Any]
"""The fields of a specification, by name."""
Path = str | os.PathLike[str]
Visible = Callable[[str, str], str]
"""Gives the path by which the file at a path is seen in an emulated host, or raises ConfigError,
which names the option that is the second argument."""
Reader = Callable[[Any], list[DeviceSpec]]
"""Reads the value of an option as it is read for most kinds, see `read_values`."""


class Context(NamedTuple):
    """What a device is opened with.

    `trace` gets its requests (or is None), `closing` undoes what was opened once the machine has
    ended. `alarm` ends the machine.

    `map_file(fd, size, read_only)` makes the first `size` bytes of a file, whole pages, memory of
    the guest, above its RAM, and returns its guest-physical address: pyvmm.machine.mapped_files
    tells the rest. Raises ConfigError if the guest has no room for it, HostError.
    """

    vm_name: str
    trace: Hook | None
    closing: ExitStack
    alarm: Alarm | None = None
    map_file: Callable[[int, int, bool], int] = lambda fd, size, read_only: _no_memory()


def _no_memory() -> int:
    raise ConfigError("there is no machine whose guest could have the file as memory")


class Border:
    """Where a VM crosses into an emulated host: what a kind's `cross` is given.

    `closing` keeps open what it has opened, for as long as the emulated host lives. `visible` is
    told above.
    """

    def __init__(self, closing: ExitStack, visible: Visible) -> None:
        self.closing = closing
        self.visible = visible
        self._given: dict[str, int] = {}

    def place(self, what: str) -> str:
        """A new path inside, for a thing of the kind `what` that has none of its own."""
        number = self._given[what] = self._given.get(what, -1) + 1
        return f"/run/pyvmm-{what}-{number}"


class Crossing(NamedTuple):
    """A device that will run in an emulated host, while what it uses stays on this machine.

    `spec` is what to ask for in there. Each of `disks` is a block device in there, at the same
    path; each of `streams` a character device. Each listener of `listening` leads to a path in
    there; `reached` are paths of this machine's sockets that the device may connect to, ``*`` at
    the end being a number. `sizes_terminal`: it wants to know the terminal's size.
    """

    spec: Spec
    listening: tuple[tuple[NamedListener, str], ...] = ()
    reached: tuple[str, ...] = ()
    disks: tuple[HostDisk, ...] = ()
    streams: tuple[HostStream, ...] = ()
    sizes_terminal: bool = False


class Running(NamedTuple):
    """A machine that runs: what a kind's control methods are given.

    `resident` tells the bytes of guest RAM that the host has given, `paused` whether the machine is
    paused. `resize_outside` is for where the files of disks are another machine's: it resizes the
    file at a path to so many bytes, or (None) to those it has by now, and returns when that shows
    here.
    """

    spec: VmSpec
    devices: tuple[VirtioDevice, ...]
    paused: Callable[[], bool]
    resident: Callable[[], int]
    resize_outside: Callable[[str, int | None], None] | None = None

    def of_kind(self, kind: str) -> list[tuple[Any, Any]]:
        """The specifications of that kind, each with its device."""
        pairs = zip(self.spec.parts, self.devices, strict=False)
        return [(spec, device) for spec, device in pairs if spec.kind == kind]


# --- reading values -------------------------------------------------------------------------------


def read_values(kind: Any, value: Any, option: Option) -> list[DeviceSpec]:
    """The devices that the value of a kind's `option` describes. Raises ConfigError."""
    values = as_list(value)
    if not option.many and len(values) > 1:
        raise wrong_type(option, value, "one only")
    return [read_value(kind, one, option) for one in values]


def read_value(kind: Any, value: Any, option: Option) -> DeviceSpec:
    """The device that one value describes: a text as on the command line, a table of the fields of
    its specification, or the specification itself. Raises ConfigError."""
    if isinstance(value, DeviceSpec) and value.kind == option.device:
        return value
    if isinstance(value, Mapping):
        from pyvmm.spec import tables

        found: DeviceSpec = tables.read(kind.Spec, value, option.name)
        return found
    if value is True and not option.many:
        value = ""
    if not isinstance(value, str):
        raise wrong_type(option, value, "a text, a table or a specification")
    return parse(kind, value)


def parse(kind: Any, text: str) -> DeviceSpec:
    """The device that ``--KIND TEXT`` describes; any may have ``packed`` among its options. Raises
    ConfigError."""
    rest, packed = _without_packed(text)
    spec: DeviceSpec = kind.parse(rest)
    return replace(spec, packed=packed)


def _without_packed(text: str) -> tuple[str, bool]:
    """`text` without the option, and whether it was there; a comma in a value is written twice."""
    lines = []
    packed = False
    for line in text.split("\n"):
        options = line.replace(",,", "\0").split(",")
        others = [option for option in options if option != "packed"]
        packed |= len(others) < len(options)
        lines.append(",".join(others).replace("\0", ",,"))
    return "\n".join(lines), packed
