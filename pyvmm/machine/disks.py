"""From a `DiskSpec` to a virtio-blk device on an open, locked image."""

from __future__ import annotations

from contextlib import ExitStack

from pyvmm.host import log
from pyvmm.host.files import ImageFile, open_image
from pyvmm.machine.alarm import Alarm
from pyvmm.machine.spec import DiskSpec
from pyvmm.machine.trace import Hook
from pyvmm.virtio.blk.backend import Backend, FileBackend
from pyvmm.virtio.blk.device import BlockDevice


def lock_image(disk: DiskSpec, closing: ExitStack) -> ImageFile:
    """Open and lock the image and tell the user what is odd about it; `closing` undoes it.

    Raises ConfigError for an image that cannot serve as a disk.
    """
    image = open_image(disk.path, read_only=disk.read_only, direct=disk.direct)
    closing.callback(image.close)
    for hint in image.hints:
        log.to_stderr(hint)
    return image


def open_disk(disk: DiskSpec, trace: Hook | None, closing: ExitStack, alarm: Alarm) -> BlockDevice:
    """Open and lock the image and put a device in front of it; `closing` undoes both.

    Raises ConfigError for an image that cannot serve as a disk.
    """
    return BlockDevice(
        open_backend(disk, closing),
        name=disk.id,
        serial=disk.id,
        block_size=disk.block_size,
        stop=alarm.disk_failed if disk.on_error == "stop" else None,
        trace=trace,
    )


def open_backend(disk: DiskSpec, closing: ExitStack) -> Backend:
    """The storage that `disk` names; `closing` gives it up. Raises ConfigError."""
    image = lock_image(disk, closing)
    if disk.direct:
        from pyvmm.virtio.blk.direct import DirectBackend

        return DirectBackend(image)
    return FileBackend(image)
