"""The header in front of each frame: struct virtio_net_hdr_v1, 12 bytes.

Virtio 1.3, 5.1.6.2 Packet Transmission. What a driver asks for in it is checked here against the
frame and what was negotiated; what goes on to the host is built anew from the checked values.
"""

from __future__ import annotations

from struct import Struct

from pyvmm.virtio.features import has
from pyvmm.virtio.net.uapi import (
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP,
    VIRTIO_NET_HDR_GSO_UDP_L4,
)

# flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers
HEADER = Struct("<BBHHHHH")
HEADER_SIZE = HEADER.size
PLAIN = bytes(HEADER_SIZE)
NUM_BUFFERS_AT = 10
ETH_HEADER = 14  # <linux/if_ether.h> ETH_HLEN
VLAN_TAG = 4
# 14 bytes of Ethernet, 40 of IPv6 and 65,535 of payload (5.1.6.3 Setting Up Receive Buffers)
LARGEST_FRAME = 65589
SMALLEST_BUFFER = HEADER_SIZE

_GSO_FEATURE = {
    VIRTIO_NET_HDR_GSO_TCPV4: VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_HDR_GSO_TCPV6: VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_HDR_GSO_UDP: VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_HDR_GSO_UDP_L4: VIRTIO_NET_F_HOST_USO,
}
_TCP = (VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6)


class TransmitCheck:
    """Checks the headers of frames to send, for one set of negotiated `features`."""

    def __init__(self, features: int) -> None:
        self._csum = has(features, VIRTIO_NET_F_CSUM)
        self._ecn = has(features, VIRTIO_NET_F_HOST_ECN)
        self._gso = {gso for gso, feature in _GSO_FEATURE.items() if has(features, feature)}

    def __call__(self, header: bytes, length: int) -> bytes | str:
        """The header to send with a frame of `length` bytes; or, as text, why it is not sent.

        `header` is a copy of the driver's. Unknown flags are ignored, and so are `csum_start` and
        `csum_offset` where no checksum is wanted; `hdr_len` is a hint that is never relied on
        (5.1.6.2.2 Device Requirements: Packet Transmission).
        """
        if not ETH_HEADER <= length <= LARGEST_FRAME:
            return "too short or too long"
        flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, _ = HEADER.unpack(header)
        flags &= VIRTIO_NET_HDR_F_NEEDS_CSUM
        if not flags and gso_type == VIRTIO_NET_HDR_GSO_NONE:
            return PLAIN
        if not self._csum or not flags:
            return "an offload without VIRTIO_NET_F_CSUM or NEEDS_CSUM"
        if csum_start + csum_offset + 2 > length:
            return "a checksum outside of the frame"
        if gso_type == VIRTIO_NET_HDR_GSO_NONE:
            return HEADER.pack(flags, gso_type, 0, 0, csum_start, csum_offset, 0)
        kind = gso_type & ~VIRTIO_NET_HDR_GSO_ECN
        if kind not in self._gso or not self._ecn_allowed(gso_type):
            return "a gso_type that was not negotiated"
        if not gso_size:
            return "segments of 0 bytes"
        return HEADER.pack(
            flags, gso_type, min(hdr_len, length), gso_size, csum_start, csum_offset, 0
        )

    def _ecn_allowed(self, gso_type: int) -> bool:
        if not gso_type & VIRTIO_NET_HDR_GSO_ECN:
            return True
        return self._ecn and gso_type & ~VIRTIO_NET_HDR_GSO_ECN in _TCP
