"""Who gets which guest-physical window and which interrupt line."""

from __future__ import annotations

from typing import NamedTuple

from pyvmm.machine.board.x86 import layout


class VirtioSlot(NamedTuple):
    """A virtio-mmio device's place: guest-physical base, size in bytes, and its GSI."""

    base: int
    size: int
    gsi: int


def virtio_slots(count: int) -> tuple[VirtioSlot, ...]:
    """The first `count` places, in the order in which Linux names the disks behind them.

    Raises ValueError for more than there are interrupt lines; the specification was checked.
    """
    if count > len(layout.VIRTIO_GSIS):
        raise ValueError(f"{count} virtio devices, {len(layout.VIRTIO_GSIS)} interrupt lines")
    return tuple(
        VirtioSlot(
            layout.VIRTIO_MMIO_BASE + index * layout.VIRTIO_MMIO_STRIDE,
            layout.VIRTIO_MMIO_SIZE,
            gsi,
        )
        for index, gsi in enumerate(layout.VIRTIO_GSIS[:count])
    )
