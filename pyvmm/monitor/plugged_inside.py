"""Devices that come to a guest in an emulated host, inside: emulated_plug has brought in what they
have of the machine, as block devices and ports that the kernel here finds.

A strictly confined monitor has its keeper make their nodes and open them.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from pyvmm.control.protocol import Later
from pyvmm.errors import ConfigError, HostError
from pyvmm.host.handed import Descriptors
from pyvmm.kinds import registry
from pyvmm.monitor.nodes_inside import device_of, place

if TYPE_CHECKING:
    from pyvmm.monitor.hotplug import Hotplug
    from pyvmm.monitor.keeper import Keeper


NEEDS: dict[str, type] = {
    "kind": str,
    "spec": dict,
    "described": dict,
    "disks": dict,
    "streams": list,
}
_PATIENCE = 60.0  # seconds for the kernel to find something
_STEP = 0.02


def plug(
    hotplug: Callable[[], Hotplug],
    kind: str,
    spec: dict[str, Any],
    described: dict[str, Any],
    disks: dict[str, str],
    streams: list[str],
) -> Later:
    """Add the device `spec` once the block devices with the serial numbers in `disks` are at their
    paths, and the ports `streams` are there. `described` is the device as it is known outside."""
    return Later(partial(_plug, hotplug(), kind, spec, described, disks, streams))


def _plug(
    hotplug: Hotplug,
    kind: str,
    spec: dict[str, Any],
    described: dict[str, Any],
    disks: dict[str, str],
    streams: list[str],
) -> dict[str, Any]:
    read = partial(registry.from_plain, kind)
    try:
        found, outside = read(spec), read(described)
    except TypeError as error:
        raise ConfigError(f"not a device: {error}") from None
    if not hotplug.opens_nothing:
        hotplug.run_outside(partial(_bring_in, disks, streams))
        return hotplug.add(kind, found, outside)
    assert keeper is not None
    with Descriptors() as owner:
        names = dict(_brought_in(keeper, disks, streams, owner))
        if getattr(found, "scratch", None) in names:
            from pyvmm.virtio.blk.overlay import SCRATCH

            names[SCRATCH] = names.pop(found.scratch)
        return hotplug.add_handed(kind, found, names, owner, outside)


keeper: Keeper | None = None
"""The one of this process, if it has one."""


def _brought_in(
    keeper: Keeper, disks: dict[str, str], streams: list[str], owner: Descriptors
) -> Iterator[tuple[str, int]]:
    """By their paths, the block devices with the serial numbers in `disks`, and the ports."""
    for path, serial in disks.items():
        _until(serial, partial(_done, keeper.plug, path, serial))
    for path in (*disks, *streams):
        [fd] = _until(path, partial(_done, keeper.open_device, path))
        owner.fds.append(fd)
        yield path, fd


def _done(job: Callable[..., Any], *args: str) -> list[Any]:
    """What `job` returns, if what it wants is there. Raises HostError."""
    try:
        return [job(*args)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HostError(error.errno or 0, f"{args[-1]} in the emulated KVM host") from None


def _bring_in(disks: dict[str, str], streams: list[str]) -> None:
    # The nodes stay, for a resize looks there; a RAM disk has them, and each has its own path.
    for path, serial in disks.items():
        place(path, _until(serial, partial(device_of, serial)))
    for port in streams:
        _until(port, partial(os.path.exists, port))


def _until(what: str, look: Callable[[], Any]) -> Any:
    give_up_at = time.monotonic() + _PATIENCE
    while not (found := look()):
        if time.monotonic() > give_up_at:
            raise HostError(errno.ETIMEDOUT, f"{what} in the emulated KVM host")
        time.sleep(_STEP)
    return found
