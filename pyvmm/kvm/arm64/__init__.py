"""What KVM has on arm64 alone: registers by their ids, the GIC as a device, the state of a vCPU."""
