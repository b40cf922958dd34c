"""The virtio network device (virtio 1.3, 5.1 Network Device)."""
