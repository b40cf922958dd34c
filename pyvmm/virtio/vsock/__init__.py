"""virtio-vsock: sockets between the guest and the host (virtio 1.3, 5.10 Socket Device)."""
