"""KVM's capabilities that pyvmm needs on x86, beyond ../capabilities.py."""

from __future__ import annotations

from pyvmm.kvm.capabilities import Requirement
from pyvmm.kvm.x86 import uapi

REQUIRED = (
    Requirement(
        uapi.KVM_CAP_SET_TSS_ADDR, "KVM_CAP_SET_TSS_ADDR", "Intel runs real mode as a TSS task"
    ),
    Requirement(
        uapi.KVM_CAP_SET_IDENTITY_MAP_ADDR,
        "KVM_CAP_SET_IDENTITY_MAP_ADDR",
        "Intel runs unpaged code through an identity map, which must stay out of RAM",
    ),
    Requirement(uapi.KVM_CAP_PIT2, "KVM_CAP_PIT2", "kernels calibrate their clocks by the PIT"),
    Requirement(uapi.KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID", "every vCPU gets its own CPUID"),
)
