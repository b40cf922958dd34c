"""Feature bits of the ring and of feature negotiation itself (virtio 1.3, 6 Reserved Feature Bits).

As in the specification and in <linux/virtio_config.h> and <linux/virtio_ring.h> a name stands for
the *number* of a bit. A set of features is an int with those bits set, made by `mask`. The bits of
a device type live beside the device.
"""

from __future__ import annotations

from collections.abc import Mapping

VIRTIO_F_INDIRECT_DESC = VIRTIO_RING_F_INDIRECT_DESC = 28
VIRTIO_F_EVENT_IDX = VIRTIO_RING_F_EVENT_IDX = 29
VIRTIO_F_VERSION_1 = 32
VIRTIO_F_ACCESS_PLATFORM = 33
VIRTIO_F_RING_PACKED = 34
VIRTIO_F_IN_ORDER = 35
VIRTIO_F_ORDER_PLATFORM = 36
VIRTIO_F_SR_IOV = 37
VIRTIO_F_NOTIFICATION_DATA = 38
VIRTIO_F_NOTIF_CONFIG_DATA = 39
VIRTIO_F_RING_RESET = 40
VIRTIO_F_ADMIN_VQ = 41

RESERVED_NAMES = {
    VIRTIO_F_INDIRECT_DESC: "VIRTIO_F_INDIRECT_DESC",
    VIRTIO_F_EVENT_IDX: "VIRTIO_F_EVENT_IDX",
    VIRTIO_F_VERSION_1: "VIRTIO_F_VERSION_1",
    VIRTIO_F_ACCESS_PLATFORM: "VIRTIO_F_ACCESS_PLATFORM",
    VIRTIO_F_RING_PACKED: "VIRTIO_F_RING_PACKED",
    VIRTIO_F_IN_ORDER: "VIRTIO_F_IN_ORDER",
    VIRTIO_F_ORDER_PLATFORM: "VIRTIO_F_ORDER_PLATFORM",
    VIRTIO_F_SR_IOV: "VIRTIO_F_SR_IOV",
    VIRTIO_F_NOTIFICATION_DATA: "VIRTIO_F_NOTIFICATION_DATA",
    VIRTIO_F_NOTIF_CONFIG_DATA: "VIRTIO_F_NOTIF_CONFIG_DATA",
    VIRTIO_F_RING_RESET: "VIRTIO_F_RING_RESET",
    VIRTIO_F_ADMIN_VQ: "VIRTIO_F_ADMIN_VQ",
}
"""Bit number → name, for all bits that 1.3 defines outside of device types."""


RING_FEATURES = 1 << VIRTIO_F_INDIRECT_DESC | 1 << VIRTIO_F_EVENT_IDX | 1 << VIRTIO_F_RING_RESET
"""The features of a device whose queues are served by `pyvmm.virtio.worker`. RING_PACKED goes with
any device, IN_ORDER with one that returns chains in the order in which it took them."""


def ring_features(*, packed: bool = False) -> int:
    """RING_FEATURES, and with `packed` the choice of packed rings, which a driver then prefers."""
    return RING_FEATURES | 1 << VIRTIO_F_RING_PACKED if packed else RING_FEATURES


def mask(*bits: int) -> int:
    """The feature set that has just these bit numbers."""
    features = 0
    for bit in bits:
        features |= 1 << bit
    return features


def has(features: int, bit: int) -> bool:
    """True if bit number `bit` is in the set `features`."""
    return bool(features >> bit & 1)


def describe(features: int, device_names: Mapping[int, str] | None = None) -> list[str]:
    """The names of the bits in `features`, lowest first; ``"bit 27"`` for one without a name.

    `device_names` gives the names of a device type's own bits.
    """
    names = {**RESERVED_NAMES, **(device_names or {})}
    return [
        names.get(bit, f"bit {bit}") for bit in range(features.bit_length()) if has(features, bit)
    ]
