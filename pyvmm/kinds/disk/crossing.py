"""The way of a VM's disks into the emulated host: opened and locked here, block devices there.

The files of a disk are opened outside: mistakes show at once, and the inside can write only those
files. The layers above (snapshot, overlay, a class in Python) run inside, where the
virtio device is.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from pyvmm.emulated_host import HostDisk
from pyvmm.errors import ConfigError, HostError
from pyvmm.kinds.border import Border, Crossing
from pyvmm.kinds.disk.storage import lock_image, open_backend, qcow2_layers, ram_image
from pyvmm.spec.record import replace
from pyvmm.spec.vm import DiskSpec


def hand_over(disk: DiskSpec, border: Border) -> Crossing:
    """The disk to ask for inside, and what has to be there for it. Raises ConfigError."""
    inside, needed = _HANDLERS[disk.storage](disk, border)
    if disk.overlay is not None:
        inside, changes = _overlay(disk, inside, border.closing)
        needed = (*needed, changes)
    elif disk.snapshot:
        inside, changes = _scratch(disk, inside, border)
        needed = (*needed, changes)
    return Crossing(inside, disks=needed)


_Handed = tuple[DiskSpec, tuple[HostDisk, ...]]


def _raw(disk: DiskSpec, border: Border) -> _Handed:
    fd = lock_image(disk, border.closing).fd
    host = HostDisk(disk.path, disk.base_read_only, fd, direct=disk.direct)
    return replace(disk, path=os.path.realpath(disk.path), format="raw"), (host,)


def _qcow2(disk: DiskSpec, border: Border) -> _Handed:
    layers = qcow2_layers(disk, border.closing)
    host = HostDisk(disk.path, disk.base_read_only, layers=layers, direct=disk.direct)
    path = os.path.realpath(disk.path)
    return replace(disk, path=path, format="raw", backing=(), data_file=None), (host,)


def _ram(disk: DiskSpec, border: Border) -> _Handed:
    # Not from the emulated host's own memory, of which there is just enough.
    fd = ram_image(disk, border.closing).fd
    path = border.place("ram")
    return replace(disk, path=path), (HostDisk(path, False, fd),)


def _python(disk: DiskSpec, border: Border) -> _Handed:
    from pyvmm.kinds.disk.user import for_emulated_host

    return for_emulated_host(disk, border.visible), ()


_HANDLERS = {"raw": _raw, "qcow2": _qcow2, "ram": _ram, "python": _python}


def descriptors(disk: DiskSpec, closing: ExitStack) -> dict[str, int]:
    """The files of a disk, opened and locked for a monitor that opens nothing, by the names under
    which it looks for them. Raises ConfigError."""
    from pyvmm.virtio.blk.overlay import SCRATCH

    if disk.storage == "raw":
        found = {disk.path: lock_image(disk, closing).fd}
    elif disk.storage == "qcow2":
        from pyvmm.host.storage_daemon import start_apart

        found = start_apart(qcow2_layers(disk, closing), closing, direct=disk.direct)
    else:
        file = disk.path.rpartition(":")[0]
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ConfigError(f"cannot open {file}: {error.strerror}", option="--disk") from None
        closing.callback(os.close, fd)
        found = {file: fd}
    if disk.overlay is not None:
        found[disk.overlay] = _overlay_file(disk, disk.overlay, closing)
    elif disk.snapshot:
        found[SCRATCH] = _scratch_file(disk, closing)
    return found


def _overlay(disk: DiskSpec, inside: DiskSpec, closing: ExitStack) -> tuple[DiskSpec, HostDisk]:
    assert disk.overlay is not None
    fd = _overlay_file(disk, disk.overlay, closing)
    path = os.path.realpath(disk.overlay)
    return replace(inside, overlay=path), HostDisk(path, False, fd)


def _overlay_file(disk: DiskSpec, path: str, closing: ExitStack) -> int:
    from pyvmm.virtio.blk.overlay_file import open_overlay

    with ExitStack() as base_closing:
        base = open_backend(replace(disk, overlay=None, read_only=True), base_closing)
        overlay = open_overlay(base, path)
    closing.callback(overlay.close)
    return overlay.fd


def _scratch_file(disk: DiskSpec, closing: ExitStack) -> int:
    from pyvmm.virtio.blk.overlay import scratch_file
    from pyvmm.virtio.blk.overlay_layout import layout_for

    with ExitStack() as base_closing:
        base = open_backend(replace(disk, snapshot=False, read_only=True), base_closing)
        size = layout_for(base.size_sectors * 512).file_size
    try:
        fd = scratch_file(size)
    except OSError as error:
        raise HostError(error.errno or 0, "temporary file for a disk's changes") from None
    closing.callback(os.close, fd)
    return fd


def _scratch(disk: DiskSpec, inside: DiskSpec, border: Border) -> tuple[DiskSpec, HostDisk]:
    fd = _scratch_file(disk, border.closing)
    path = border.place("scratch")
    saved = None if disk.saved is None else border.visible(disk.saved, "--restore")
    return replace(inside, scratch=path, saved=saved), HostDisk(path, False, fd)
