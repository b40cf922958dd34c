"""The parts that the registry and the kinds of devices share: what a kind is given, and what it
gives back. pyvmm.kinds.registry tells what a kind consists of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pyvmm.errors import ConfigError
from pyvmm.spec import rates
from pyvmm.spec.options import Option, as_list, wrong_type
from pyvmm.spec.record import replace
from pyvmm.spec.vm import DeviceSpec, DiskSpec, VmSpec

if TYPE_CHECKING:
    from pyvmm.machine.outcome import Alarm
    from pyvmm.machine.trace import Hook
    from pyvmm.memory.private_memory import PrivateMemory
    from pyvmm.virtio.device import VirtioDevice
    from pyvmm.virtio.rate_limit import RateLimiter

    MapFile = Callable[[int, int, bool, PrivateMemory | None], int]

Spec = DiskSpec | DeviceSpec
Table = Mapping[str, Any]
"""The fields of a specification, by name."""
Path = str | os.PathLike[str]
Reader = Callable[[Any], list[DeviceSpec]]
"""Reads the value of an option as it is read for most kinds, see `read_values`."""


class Context:
    """The surroundings in which a device is opened.

    `trace` gets its requests (or is None), `closing` undoes what was opened once the machine has
    ended. `alarm` ends the machine.

    `map_file(fd, size, read_only, private)` makes the first `size` bytes of a file, whole pages,
    memory of the guest, above its RAM, and returns its guest-physical address:
    pyvmm.machine.mapped_files tells the rest. Raises ConfigError if the guest has no room for it,
    HostError.

    A device may be busy for up to `poll_ns` nanoseconds rather than sleep; 0 where each processor
    is one that the guest's vCPUs may need.
    """

    def __init__(
        self,
        vm_name: str,
        trace: Hook | None,
        closing: ExitStack,
        alarm: Alarm | None = None,
        map_file: MapFile | None = None,
        poll_ns: int = 0,
    ) -> None:
        self.vm_name = vm_name
        self.trace = trace
        self.closing = closing
        self.alarm = alarm
        self.map_file = map_file or _no_memory
        self.poll_ns = poll_ns


def _no_memory(fd: int, size: int, read_only: bool, private: PrivateMemory | None) -> int:
    raise ConfigError("there is no machine whose guest could have the file as memory")


class Running:
    """A machine that runs: what a kind's control methods are given.

    `resident` tells the bytes of guest RAM that the host has given, `paused` whether the machine is
    paused. `resize_outside` is for where the files of disks are another machine's: it resizes the
    file at a path to so many bytes, or (None) to those it has by now, and returns when that shows
    here.
    """

    def __init__(
        self,
        spec: VmSpec,
        devices: tuple[VirtioDevice, ...],
        paused: Callable[[], bool],
        resident: Callable[[], int],
        resize_outside: Callable[[str, int | None], None] | None = None,
    ) -> None:
        self.spec = spec
        self.devices = devices
        self.paused = paused
        self.resident = resident
        self.resize_outside = resize_outside

    def of_kind(self, kind: str) -> list[tuple[Any, Any]]:
        """The specifications of that kind, each with its device."""
        pairs = zip(self.spec.parts, self.devices, strict=False)
        return [(spec, device) for spec, device in pairs if spec.kind == kind]


def limiter(spec: object, fields: Iterable[str] = rates.KEYS.values()) -> RateLimiter | None:
    """The buckets for the four `fields` of `spec`, full at first: bytes and operations a second and
    the bursts of both. None for none."""
    bps, iops, bps_burst, iops_burst = (getattr(spec, field) for field in fields)
    if not bps and not iops:
        return None
    from pyvmm.virtio import rate_limit

    return rate_limit.limiter(bps=bps, iops=iops, bps_burst=bps_burst, iops_burst=iops_burst)


def unknown_id(kind: str, id: str, known: Iterable[str]) -> ConfigError:
    """The error for `id`, which is none of the devices of `kind` that are there."""
    there = ", ".join(known)
    if not there:
        return ConfigError(f"there is no {kind} {id!r:.100}, nor any other {kind}")
    return ConfigError(f"there is no {kind} {id!r:.100}", cure=f"there are: {there}")


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
