"""Devices that come to a guest in an emulated host, inside: emulated_plug has brought in what they
have of the machine, as block devices and ports that the kernel here finds."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from glob import glob
from typing import TYPE_CHECKING, Any

from pyvmm.control.protocol import Later
from pyvmm.errors import ConfigError, HostError
from pyvmm.kinds import registry

if TYPE_CHECKING:
    from pyvmm.monitor.hotplug import Hotplug

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
    hotplug.run_outside(partial(_bring_in, disks, streams))
    read = partial(registry.from_plain, kind)
    try:
        return hotplug.add(kind, read(spec), read(described))
    except TypeError as error:
        raise ConfigError(f"not a device: {error}") from None


def _bring_in(disks: dict[str, str], streams: list[str]) -> None:
    # The nodes stay, for a resize looks there; a RAM disk has them, and each has its own path.
    for path, serial in disks.items():
        _place(path, _until(serial, partial(_device_of, serial)))
    for port in streams:
        _until(port, partial(os.path.exists, port))


def _until(what: str, look: Callable[[], Any]) -> Any:
    give_up_at = time.monotonic() + _PATIENCE
    while not (found := look()):
        if time.monotonic() > give_up_at:
            raise HostError(errno.ETIMEDOUT, f"{what} in the emulated KVM host")
        time.sleep(_STEP)
    return found


def _device_of(serial: str) -> int | None:
    for block in glob("/sys/block/vd*"):
        try:
            with open(f"{block}/serial") as file:
                if file.read().strip() != serial:
                    continue
            with open(f"{block}/dev") as file:
                major, _, minor = file.read().strip().partition(":")
                return os.makedev(int(major), int(minor))
        except (OSError, ValueError):
            continue  # it has just come, or gone
    return None


def _place(path: str, device: int) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with suppress(FileNotFoundError):
        os.unlink(path)
    os.mknod(path, stat.S_IFBLK | 0o600, device)
