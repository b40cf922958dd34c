"""The virtio block device (virtio 1.3, 5.2 Block Device)."""
