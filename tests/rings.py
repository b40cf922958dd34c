"""The rings that devices can be tested over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.features import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_PACKED,
    mask,
)
from pyvmm.virtio.negotiation import SUPPORTED_RESERVED_BITS

ALL_FEATURES = SUPPORTED_RESERVED_BITS & mask(
    VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX, VIRTIO_F_RING_PACKED
)
"""What a test's own device offers, so that it can be driven in every way."""

RINGS = ("split", "packed") if ALL_FEATURES >> VIRTIO_F_RING_PACKED & 1 else ("split",)


def for_each_ring(values: Callable[[str], Iterable[Any]]) -> list[Any]:
    """Parameters (ring, value) for `pytest.mark.parametrize`: all that `values` has for a ring."""
    return [
        pytest.param(ring, value, id=f"{ring}-{value}") for ring in RINGS for value in values(ring)
    ]


def offering(ring: str, device: VirtioDevice) -> VirtioDevice:
    """`device`, which then offers that ring as well: no device sees over which it is served."""
    if ring == "packed":
        device.features |= mask(VIRTIO_F_RING_PACKED)
    return device
