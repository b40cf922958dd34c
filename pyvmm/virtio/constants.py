"""Numbers every virtio device and transport shares, by their names in the kernel's UAPI headers.

A test compares each with the system's own headers through the C compiler. Feature bits are in
`pyvmm.virtio.features`, those of a device type beside the device.
"""

from __future__ import annotations

# --- device status, 2.1 Device Status Field, <linux/virtio_config.h> -----------------------------
VIRTIO_CONFIG_S_ACKNOWLEDGE = 0x01
VIRTIO_CONFIG_S_DRIVER = 0x02
VIRTIO_CONFIG_S_DRIVER_OK = 0x04
VIRTIO_CONFIG_S_FEATURES_OK = 0x08
VIRTIO_CONFIG_S_NEEDS_RESET = 0x40
VIRTIO_CONFIG_S_FAILED = 0x80

# --- device types, 5 Device Types, <linux/virtio_ids.h> ------------------------------------------
VIRTIO_ID_NET = 1
VIRTIO_ID_BLOCK = 2
VIRTIO_ID_CONSOLE = 3
VIRTIO_ID_RNG = 4
VIRTIO_ID_BALLOON = 5
VIRTIO_ID_VSOCK = 19

# --- virtio-mmio, 4.2.2 MMIO Device Register Layout ----------------------------------------------
VIRTIO_MMIO_MAGIC = 0x74726976  # "virt", little endian
VIRTIO_MMIO_VERSION_MODERN = 2  # 1 was the legacy interface, which pyvmm does not have
VIRTIO_MMIO_VENDOR_PYVMM = 0x4D4D5650  # "PVMM", little endian; the specification leaves it open
VIRTIO_MMIO_INT_VRING = 1 << 0  # <linux/virtio_mmio.h>: a buffer was used
VIRTIO_MMIO_INT_CONFIG = 1 << 1  # <linux/virtio_mmio.h>: the configuration changed
