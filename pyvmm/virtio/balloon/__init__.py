"""virtio-balloon: memory that the guest gives back (virtio 1.3, 5.5 Memory Balloon Device)."""
