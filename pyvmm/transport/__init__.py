"""Transports: how a driver reaches a virtio device. Virtio-mmio (4.2) and vhost-user."""
