"""The parts of KVM for arm64 alone: registers by their ids, the GIC as a device, a vCPU's state."""
