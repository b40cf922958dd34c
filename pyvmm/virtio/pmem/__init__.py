"""virtio-pmem: persistent memory of the guest that a file holds (virtio 1.3, 5.19 PMEM Device)."""
