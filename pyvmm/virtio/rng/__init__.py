"""virtio-rng: random numbers for the guest (virtio 1.3, 5.4 Entropy Device)."""
