"""The virtio core: devices, queues, negotiation, without any transport or device type."""
