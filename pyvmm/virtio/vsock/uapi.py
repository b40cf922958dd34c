"""Numbers of the socket device, named as in <linux/virtio_vsock.h> and <linux/vm_sockets.h>.

A test compares them with the headers; those that only newer headers have are of virtio 1.3.
"""

from __future__ import annotations

from struct import Struct

VIRTIO_VSOCK_RX, VIRTIO_VSOCK_TX, VIRTIO_VSOCK_EVENT = range(3)  # 5.10.2 Virtqueues

# Feature bits (5.10.3 Feature bits), as bit numbers
VIRTIO_VSOCK_F_STREAM = 0
VIRTIO_VSOCK_F_SEQPACKET = 1
VIRTIO_VSOCK_F_NO_IMPLIED_STREAM = 2
FEATURE_NAMES = {
    VIRTIO_VSOCK_F_STREAM: "VIRTIO_VSOCK_F_STREAM",
    VIRTIO_VSOCK_F_SEQPACKET: "VIRTIO_VSOCK_F_SEQPACKET",
    VIRTIO_VSOCK_F_NO_IMPLIED_STREAM: "VIRTIO_VSOCK_F_NO_IMPLIED_STREAM",
}

# Operations (5.10.6 Device Operation)
VIRTIO_VSOCK_OP_INVALID = 0
VIRTIO_VSOCK_OP_REQUEST = 1
VIRTIO_VSOCK_OP_RESPONSE = 2
VIRTIO_VSOCK_OP_RST = 3
VIRTIO_VSOCK_OP_SHUTDOWN = 4
VIRTIO_VSOCK_OP_RW = 5
VIRTIO_VSOCK_OP_CREDIT_UPDATE = 6
VIRTIO_VSOCK_OP_CREDIT_REQUEST = 7
OP_NAMES = (
    *("INVALID", "REQUEST", "RESPONSE", "RST", "SHUTDOWN", "RW"),
    *("CREDIT_UPDATE", "CREDIT_REQUEST"),
)

# Socket types (5.10.6.2 Addressing)
VIRTIO_VSOCK_TYPE_STREAM = 1
VIRTIO_VSOCK_TYPE_SEQPACKET = 2

# Bits of a SHUTDOWN's flags (5.10.6.5 Stream Sockets), as masks, which is how Linux has them
VIRTIO_VSOCK_SHUTDOWN_RCV = 1
VIRTIO_VSOCK_SHUTDOWN_SEND = 2
SHUTDOWN_BOTH = VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND

VIRTIO_VSOCK_EVENT_TRANSPORT_RESET = 0  # 5.10.6.7 Device Events
EVENT = Struct("<I")  # struct virtio_vsock_event

VMADDR_CID_HOST = 2
# 0, 1 and 2 have other meanings, and so has 2^32 - 1 (5.10.4 Device configuration layout).
LOWEST_GUEST_CID = 3
HIGHEST_GUEST_CID = 0xFFFF_FFFE

CONFIG = Struct("<Q")  # struct virtio_vsock_config: guest_cid
