"""Numbers and structures of the console device, named as in <linux/virtio_console.h>.

A test compares them with the header. Structures are little endian.
"""

from __future__ import annotations

from struct import Struct

# Feature bits (5.3.3 Feature bits), as bit numbers
VIRTIO_CONSOLE_F_SIZE = 0
VIRTIO_CONSOLE_F_MULTIPORT = 1
VIRTIO_CONSOLE_F_EMERG_WRITE = 2
FEATURE_NAMES = {
    VIRTIO_CONSOLE_F_SIZE: "VIRTIO_CONSOLE_F_SIZE",
    VIRTIO_CONSOLE_F_MULTIPORT: "VIRTIO_CONSOLE_F_MULTIPORT",
    VIRTIO_CONSOLE_F_EMERG_WRITE: "VIRTIO_CONSOLE_F_EMERG_WRITE",
}

# Queues (5.3.2 Virtqueues); those of port N ≥ 1 begin at 2N + 2
RECEIVE_0, TRANSMIT_0, CONTROL_RECEIVE, CONTROL_TRANSMIT = range(4)

# Control messages (5.3.6.2 Multiport Device Operation)
VIRTIO_CONSOLE_DEVICE_READY = 0
VIRTIO_CONSOLE_PORT_ADD = 1
VIRTIO_CONSOLE_PORT_REMOVE = 2
VIRTIO_CONSOLE_PORT_READY = 3
VIRTIO_CONSOLE_CONSOLE_PORT = 4
VIRTIO_CONSOLE_RESIZE = 5
VIRTIO_CONSOLE_PORT_OPEN = 6
VIRTIO_CONSOLE_PORT_NAME = 7

CONTROL = Struct("<IHH")  # struct virtio_console_control: id, event, value
RESIZE = Struct("<HH")  # struct virtio_console_resize: cols, rows

# struct virtio_console_config: cols, rows, max_nr_ports, emerg_wr
CONFIG = Struct("<HHII")
EMERG_WR_OFFSET = 8


def receive_queue(port: int) -> int:
    """The index of the receive queue of `port`; that of its transmit queue is the next one."""
    return 2 * port + 2 if port else RECEIVE_0
