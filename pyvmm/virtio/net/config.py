"""The configuration space of a network device: struct virtio_net_config of <linux/virtio_net.h>.

Virtio 1.3, 5.1.4 Device configuration layout. Fields that belong to features we do not offer are
zero.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

# (name, struct code) in order; little endian and packed.
_FIELDS = (
    ("mac", "6s"),
    ("status", "H"),
    ("max_virtqueue_pairs", "H"),
    ("mtu", "H"),
    ("speed", "I"),
    ("duplex", "B"),
    ("rss_max_key_size", "B"),
    ("rss_max_indirection_table_length", "H"),
    ("supported_hash_types", "I"),
)
_ENCODING = struct.Struct("<" + "".join(code for _, code in _FIELDS))


def layout() -> dict[str, tuple[int, int]]:
    """Each field's (offset, size) in bytes, as the encoding below uses them."""
    places = {}
    offset = 0
    for name, code in _FIELDS:
        size = struct.calcsize("<" + code)
        places[name] = (offset, size)
        offset += size
    return places


@dataclass(frozen=True)
class NetConfig:
    """The network card's configuration, as a driver reads it. `mac` is 6 bytes, `mtu` in bytes and
    without the Ethernet header; a `max_virtqueue_pairs` of 0 means that there is no choice."""

    mac: bytes
    status: int
    mtu: int
    max_virtqueue_pairs: int = 0

    def encode(self) -> bytes:
        """The configuration space, whole."""
        pairs = self.max_virtqueue_pairs
        return _ENCODING.pack(self.mac, self.status, pairs, self.mtu, 0, 0, 0, 0, 0)
