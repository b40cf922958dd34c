"""The kinds of virtio devices beside the disks, and how a specification becomes a device.

A kind is a module of its own, loaded when a VM has such a device. It has

    class Spec(DeviceSpec)                  frozen plain data, what the user asked for
    parse(text) -> Spec                     from the command line's --KIND TEXT; raises ConfigError
    open_device(spec, context) -> VirtioDevice
                                            raises ConfigError for what the user can mend

and may have `check(spec) -> Spec`, which fills in and refuses what needs no file to be seen wrong,
and `for_emulated_host(spec, visible) -> Spec`, which does so with the rest before an emulated host
is started, and makes paths ones that are seen there.
Where it has sockets for programs of the host, it has `cross(spec, closing) -> Crossing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.machine.trace import Hook
from pyvmm.spec.vm import DeviceSpec
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.features import VIRTIO_F_RING_PACKED, mask

if TYPE_CHECKING:
    from pyvmm.host.named_listener import NamedListener

# Kind → module. The order is the one in which a VM's devices appear in the guest, after its disks.
KINDS = {
    "net": "pyvmm.kinds.net",
    "console": "pyvmm.kinds.console",
    "ports": "pyvmm.kinds.port",
    "rng": "pyvmm.kinds.rng",
    "user": "pyvmm.kinds.user",
    "balloon": "pyvmm.kinds.balloon",
    "vsock": "pyvmm.kinds.vsock",
}


class Context(NamedTuple):
    """What a device is opened with: `closing` undoes it, `trace` gets its requests (or None)."""

    vm_name: str
    trace: Hook | None
    closing: ExitStack


def parse(kind: str, text: str) -> DeviceSpec:
    """The device that ``--KIND TEXT`` describes; any may have ``packed`` among its options. Raises
    ConfigError."""
    rest, packed = _without_packed(text)
    spec: DeviceSpec = _module(kind).parse(rest)
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


def from_table(kind: str, table: Mapping[str, Any], where: str) -> DeviceSpec:
    """The device that a table of its specification's fields describes; `where` names it in
    messages. Raises ConfigError."""
    from pyvmm.spec import tables

    spec: DeviceSpec = tables.read(_module(kind).Spec, table, where)
    return spec


def check(devices: Iterable[DeviceSpec]) -> tuple[DeviceSpec, ...]:
    """The devices in their order in the guest, each checked. Raises ConfigError."""
    order = list(KINDS)
    checked = []
    for spec in sorted(devices, key=lambda spec: order.index(spec.kind)):
        refine = getattr(_module(spec.kind), "check", None)
        checked.append(spec if refine is None else refine(spec))
    return tuple(checked)


def for_emulated_host(
    devices: Iterable[DeviceSpec], visible: Callable[[str, str], str]
) -> tuple[DeviceSpec, ...]:
    """The devices as they are to be asked for inside an emulated host. Raises ConfigError.

    `visible(path, option)` gives the path by which a file is seen there, or raises ConfigError.
    """
    inside = []
    for spec in devices:
        refine = getattr(_module(spec.kind), "for_emulated_host", None)
        inside.append(spec if refine is None else refine(spec, visible))
    return tuple(inside)


def open_device(spec: DeviceSpec, context: Context) -> VirtioDevice:
    """The device that `spec` asks for. Raises ConfigError for what the user can mend."""
    device: VirtioDevice = _module(spec.kind).open_device(spec, context)
    if spec.packed:  # which is served the same, whatever the device
        device.features |= mask(VIRTIO_F_RING_PACKED)
    return device


class Crossing(NamedTuple):
    """A device that will run in an emulated host while its sockets stay on this machine.

    `spec` is for in there; each of `listening` leads to a path in there; `reached` are paths of
    this machine's sockets that the device may connect to, ``*`` at the end being a number.
    """

    spec: DeviceSpec
    listening: tuple[tuple[NamedListener, str], ...] = ()
    reached: tuple[str, ...] = ()


def cross(spec: DeviceSpec, closing: ExitStack) -> Crossing:
    """Make the device's sockets here. Raises ConfigError for what the user can mend."""
    cross = getattr(_module(spec.kind), "cross", None)
    crossing: Crossing = Crossing(spec) if cross is None else cross(spec, closing)
    return crossing


def from_plain(kind: str, values: Mapping[str, Any]) -> DeviceSpec:
    """The spec whose `asdict` is `values`. Raises ConfigError or TypeError for anything else."""
    spec: DeviceSpec = _module(kind).Spec(**values)
    return spec


def _module(kind: str) -> Any:
    if kind not in KINDS:
        raise ConfigError(f"there is no device {kind!r}", cure=f"there are {', '.join(KINDS)}")
    return import_module(KINDS[kind])
