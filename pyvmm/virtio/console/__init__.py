"""virtio-console: a terminal and byte streams for the guest (virtio 1.3, 5.3 Console Device)."""
