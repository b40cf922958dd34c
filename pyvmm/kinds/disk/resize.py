"""Resizing a disk at run time, for the control socket."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pyvmm.control.protocol import Method
from pyvmm.errors import ConfigError
from pyvmm.host.files import SECTOR
from pyvmm.kinds.interface import Running, unknown_id
from pyvmm.spec.vm import DiskSpec
from pyvmm.virtio.blk.device import BlockDevice

_FIXED = {  # kinds of storage that cannot be resized: what they are, and what to do instead
    "qcow2": (
        "is a qcow2 image in use",
        "stop the VM, then qemu-img resize {path} SIZE; with ,overlay=FILE it could be done live",
    ),
    "python": ("is of a class without resize", "write one: Backend.resize"),
}


def methods(running: Running) -> dict[str, Method]:
    """By the names that a request uses."""
    resize = partial(_resize, running)
    return {
        "disk.resize": Method(resize, needs={"disk": str}, takes={"size": int, "shrink": bool}),
    }


def _resize(
    running: Running, disk: str, size: int | None = None, shrink: bool = False
) -> dict[str, Any]:
    """Give a disk `size` bytes, its image file with it, or take over those it has by now.

    Raises ConfigError for what would lose data without `shrink`, or cannot be had.
    """
    spec, device = _disk(running, disk)
    _check(running, spec, device, size, shrink)
    return {"size": device.resize(size, _change_outside(running, spec, device, size))}


def _change_outside(
    running: Running, spec: DiskSpec, device: BlockDevice, size: int | None
) -> Callable[[], None] | None:
    """The work that somebody else has to do for it, if any."""
    outside = running.resize_outside
    if outside is None:
        return None
    if not spec.copies_on_write:
        return partial(outside, spec.path, size)
    if size is None or size < device.size:
        return None  # its file stays as long as it is, but for holes
    return partial(outside, spec.overlay or spec.scratch or "", device.storage_for(size))


def _check(
    running: Running, spec: DiskSpec, device: BlockDevice, size: int | None, shrink: bool
) -> None:
    if not device.can_resize:
        what, cure = _FIXED.get(spec.storage, _FIXED["python"])
        raise ConfigError(
            f"disk {spec.id} {what}, and keeps its size", cure=cure.format(path=spec.path)
        )
    if size is None:
        if spec.copies_on_write:
            raise ConfigError(
                f"disk {spec.id} copies on write: its size is not its base's",
                cure="say which size it shall have",
            )
        return
    if not 0 < size < 1 << 63 or size % SECTOR:
        raise ConfigError(f"no disk has {size} bytes", cure=f"use a multiple of {SECTOR}, above 0")
    if spec.read_only:
        raise ConfigError(
            f"disk {spec.id} is read-only",
            cure="resize its image elsewhere, then the disk, without a size",
        )
    if size < device.size and not shrink:
        raise ConfigError(
            f"disk {spec.id} has {device.size} bytes; all behind {size} would be lost",
            cure="if the guest has made room, add --shrink",
        )
    if size < device.size and running.paused():
        raise ConfigError("a paused VM's disk cannot shrink", cure="resume it first")


def _disk(running: Running, name: str) -> tuple[DiskSpec, BlockDevice]:
    for spec, device in running.of_kind("disk"):
        if spec.id == name:
            return spec, device
    raise unknown_id("disk", name, [spec.id or "" for spec in running.spec.disks])
