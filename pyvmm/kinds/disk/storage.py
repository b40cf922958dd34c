"""From a `DiskSpec` to a virtio-blk device on its storage: opened, locked, in layers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import log
from pyvmm.host.files import SECTOR, ImageFile, open_image
from pyvmm.kinds.interface import limiter
from pyvmm.machine.outcome import Alarm
from pyvmm.machine.trace import Hook
from pyvmm.spec.sizes import parse_memory
from pyvmm.spec.vm import DiskSpec
from pyvmm.virtio.blk.backend import Backend, FileBackend
from pyvmm.virtio.blk.device import BlockDevice
from pyvmm.virtio.features import ring_features

if TYPE_CHECKING:
    from pyvmm.host.qcow2 import Layer

_HANDSHAKE = 120.0  # seconds for a server that somebody else has started; it may repair its image


def lock_image(disk: DiskSpec, closing: ExitStack) -> ImageFile:
    """Open and lock the image and tell the user what is odd about it; `closing` undoes it.

    Raises ConfigError for an image that cannot serve as a disk.
    """
    image = open_image(disk.path, read_only=disk.base_read_only, direct=disk.direct)
    closing.callback(image.close)
    for hint in image.hints:
        _tell(hint)
    return image


def _tell(hint: str, told: set[str] = set()) -> None:  # noqa: B006 - remembers, on purpose
    """One line for the user, once: in front of an emulated host images are opened twice."""
    if hint not in told:
        told.add(hint)
        log.to_stderr(hint)


def open_disk(disk: DiskSpec, trace: Hook | None, closing: ExitStack, alarm: Alarm) -> BlockDevice:
    """Open and lock the image and put a device in front of it; `closing` undoes both.

    Raises ConfigError for an image that cannot serve as a disk.
    """
    device = BlockDevice(
        open_backend(disk, closing),
        name=disk.id,
        serial=disk.id,
        block_size=disk.block_size,
        num_queues=disk.queues,
        ring_features=ring_features(packed=disk.packed),
        stop=alarm.disk_failed if disk.on_error == "stop" else None,
        trace=trace,
    )
    device.limits = limiter(disk)
    return device


def open_backend(disk: DiskSpec, closing: ExitStack) -> Backend:
    """The storage that `disk` names; `closing` gives it up. Raises ConfigError or HostError."""
    base = _OPENERS[disk.storage](disk, closing)
    if not disk.copies_on_write:
        return base
    if disk.saved is not None:
        from pyvmm.virtio.blk.saved_overlay import open_saved

        base = open_saved(base, disk.saved)
        closing.callback(base.close)
    overlay: Backend
    if disk.overlay is not None:
        from pyvmm.virtio.blk.overlay_file import open_overlay

        overlay = open_overlay(base, disk.overlay)
    else:
        from pyvmm.virtio.blk.overlay import open_snapshot

        overlay = open_snapshot(base, disk.scratch)
    closing.callback(overlay.close)
    return overlay


def _open_raw(disk: DiskSpec, closing: ExitStack) -> Backend:
    image = lock_image(disk, closing)
    if disk.direct:
        from pyvmm.virtio.blk.direct import DirectBackend

        return DirectBackend(image)
    return FileBackend(image)


def ram_image(disk: DiskSpec, closing: ExitStack) -> ImageFile:
    """The anonymous file behind ``ram:SIZE``; `closing` frees it. Raises ConfigError."""
    from pyvmm.host.syscalls import create_memfd

    size = parse_memory(disk.path.removeprefix("ram:"), option="--disk")
    if not 0 < size < 1 << 63 or size % SECTOR:
        raise ConfigError(
            f"{disk.path}: no disk has {size} bytes", cure="write ram:64M", option="--disk"
        )
    image = ImageFile(disk.path, create_memfd(f"pyvmm-{disk.id}", size), size, False)
    closing.callback(image.close)
    return image


def _open_ram(disk: DiskSpec, closing: ExitStack) -> Backend:
    return FileBackend(ram_image(disk, closing))


def qcow2_layers(disk: DiskSpec, closing: ExitStack) -> tuple[Layer, ...]:
    """Open and lock a qcow2 image and what it builds on; `closing` undoes it. Raises ConfigError
    for a file that is not one, and for files that it names but the user does not; HostError."""
    from pyvmm.host.qcow2 import open_chain

    layers = open_chain(
        disk.path, disk.backing, disk.data_file, read_only=disk.base_read_only, closing=closing
    )
    for layer in layers:
        for image in layer.files:
            for hint in image.hints:
                _tell(hint)
    return layers


def _open_qcow2(disk: DiskSpec, closing: ExitStack) -> Backend:
    from pyvmm.host import handed
    from pyvmm.host.storage_daemon import EXPORT, Serving, start, take_over
    from pyvmm.virtio.blk.nbd import NbdBackend, load

    library = load()
    daemon: Serving
    patience = None
    if handed.present():
        daemon, patience = take_over(disk.path), _HANDSHAKE
    else:
        daemon = start(qcow2_layers(disk, closing), direct=disk.direct)
    closing.callback(daemon.close)
    try:
        backend = NbdBackend(library, daemon.socket, EXPORT, patience=patience)
    except HostError:
        raise ConfigError(
            f"{disk.path} cannot be opened: {daemon.why_it_failed()}",
            cure=f"qemu-img check {disk.path} may say more",
            option="--disk",
        ) from None
    daemon.serving()
    closing.callback(backend.close)
    return backend


def _open_python(disk: DiskSpec, closing: ExitStack) -> Backend:
    from pyvmm.kinds.disk.user import make_backend

    backend = make_backend(disk)
    closing.callback(backend.close)
    return backend


_OPENERS = {"raw": _open_raw, "ram": _open_ram, "qcow2": _open_qcow2, "python": _open_python}
