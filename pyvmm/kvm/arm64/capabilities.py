"""KVM's capabilities that pyvmm needs on arm64, beyond ../capabilities.py."""

from __future__ import annotations

from pyvmm.kvm.arm64 import uapi
from pyvmm.kvm.capabilities import Requirement

REQUIRED = (
    Requirement(uapi.KVM_CAP_ONE_REG, "KVM_CAP_ONE_REG", "registers are read one by one"),
    Requirement(
        uapi.KVM_CAP_DEVICE_CTRL, "KVM_CAP_DEVICE_CTRL", "the interrupt controller is KVM's"
    ),
    Requirement(
        uapi.KVM_CAP_ARM_PSCI_0_2,
        "KVM_CAP_ARM_PSCI_0_2",
        "guests power off, and switch their vCPUs on, by PSCI",
    ),
)
